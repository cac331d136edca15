"""The report of a search: one HTML page that needs no network, with tables and Plotly's figures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from m5.resume import all_settings
from tune import plots
from tune.importance import BEST, FEWEST, importances
from tune.objective import COLUMNS, Objective
from tune.plots import COLOURS, EMPHASISED, Trials, shown
from tune.records import PRESET, Folder, Record, write_whole
from tune.settings import Plan
from tune.summary import Spread, Summary, of_trial

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 64px; background: #fcfcfb; color: #262c33;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; margin: 8px 0 4px; } h2 { font-size: 19px; margin: 44px 0 6px; }
p { max-width: 75ch; margin: 6px 0 12px; } .verdict { font-size: 18px; } .note { color: #5c6670; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 18px 0; }
dt { color: #5c6670; } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 8px 0 14px; }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; white-space: nowrap; }
th { border-bottom: 1.5px solid #aab3bb; font-weight: 600; vertical-align: bottom; }
td { border-bottom: 1px solid #e6e9ec; } .number { text-align: right; }
td.wrap { white-space: normal; min-width: 300px; }
tr.winner td, tr.front td { background: #e4f2ea; } tr.preset td { background: #f1f1ef; }
th[data-sort] { cursor: pointer; } th[data-sort]:hover { text-decoration: underline; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 4px 16px; }
.grid > * { min-width: 0; } .pair { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.legend span { margin-right: 16px; white-space: nowrap; } .legend { font-size: 13.5px; color: #5c6670; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; } }
</style>
<script>$plotly</script>
</head>
<body>
$body
<script>
for (const head of document.querySelectorAll("th[data-sort]")) head.onclick = () => {
  const rows = [...head.closest("table").tBodies[0].rows], down = head.dataset.sort !== "down";
  const key = row => row.cells[head.cellIndex].textContent.replaceAll(",", "");
  const order = (a, b) => a === "—" || b === "—" ? (a === "—") - (b === "—")
    : (down ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  head.dataset.sort = down ? "down" : "up";
  head.closest("table").tBodies[0].append(...rows.sort((a, b) => order(key(a), key(b))));
};
</script>
</body>
</html>
""")
NOTHING = "—"


def write_report(path: Path, plan: Plan, objective: Objective, folder: Folder, summary: Summary) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        plan, objective: of the search.
        folder: its records.
        summary: what it has found.
    """
    trials = Trials(plan, objective, folder.of("search"), summary.winner)
    title = f"Search of {plan.base['preset']}: {objective.metric}"
    sections = [
        _head(title, trials, summary),
        _seeds(folder, summary),
        _settings(trials),
        _progress(trials),
        _importance(trials),
        _slices(trials),
        _measures(trials, summary),
        _scenarios(trials),
        _all_trials(trials),
        _failures(folder),
    ]
    body = "\n".join(sections)
    write_whole(path, PAGE.substitute(title=html.escape(title), plotly=get_plotlyjs(), body=body))


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: int = 1,
    classes: Sequence[str] = (),
    sort: bool = False,
) -> str:
    """A table; all that it is given is escaped here.

    Args:
        head, rows: cells.
        text: how many columns, from the left, hold text; the others hold numbers, and are set flush right.
        classes: of the rows.
        sort: whether a click on a column's head sorts by it.
    """
    align = ["" if index < text else ' class="number"' for index in range(len(head))]
    tick = ' data-sort="" title="sort"' if sort else ""
    heads = "".join(f"<th{one}{tick}>{html.escape(cell)}</th>" for one, cell in zip(align, head, strict=True))
    lines = []
    for index, row in enumerate(rows):
        kinds = ["number" if column >= text else "wrap" if len(cell) > 60 else "" for column, cell in enumerate(row)]
        cells = "".join(f'<td class="{kind}">{html.escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        lines.append(f'<tr class="{classes[index] if classes else ""}">{cells}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def plot(figure: go.Figure | None, name: str, otherwise: str = "No trial has come to its first validation.") -> str:
    """A figure's part of the page, or a sentence where there is none. `name` is the part's id."""
    if figure is None:
        return f'<p class="note">{html.escape(otherwise)}</p>'
    # Plotly writes its JSON with <, > and / escaped, so that no label ends the script.
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
        default_height=f"{figure.layout.height}px",
    )


def paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>'


def _legend() -> str:
    marks = {"finished": "●", "stopped": "●", "failed": "●", "preset": "◆", "winner": "★"}
    spans = [f'<span><b style="color: {COLOURS[kind]}">{mark}</b> {kind}</span>' for kind, mark in marks.items()]
    return f'<p class="legend">{"".join(spans)}</p>'


def _head(title: str, trials: Trials, summary: Summary) -> str:
    plan, config = trials.plan, trials.plan.config
    counts = [f"{count} {status}" for status, count in summary.counts.items() if count]
    kinds = {
        "single": f"the highest {summary.metric}",
        "constrained": f"the highest {summary.metric} of the trials in which no scenario loses more than "
        f"{config.objective.tolerance:.1%} against {config.objective.baseline or 'the preset'}",
        "pareto": "the trials that no other one beats in all of " + ", ".join(trials.objective.measures),
    }
    common = leaves({name: value for name, value in plan.base.items() if name not in ("data", "out", "preset")})
    facts = {
        "preset": str(plan.base["preset"]),
        "space": plan.where,
        "sought": kinds[config.objective.kind],
        "trials": f"{sum(summary.counts.values())} of {config.search.trials}: {', '.join(counts) or 'none'}",
        "sampler, scheduler": f"{config.search.sampler}, {config.scheduler}",
        "settings of all trials": " ".join(
            f"{name}={shown(value)}" for name, value in common.items() if name not in plan.space.parameters
        ),
    }
    if summary.note:
        facts["ended before all"] = summary.note
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"<h1>{html.escape(title)}</h1>{paragraph(summary.verdict(), 'verdict')}<dl>{listed}</dl>"


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by section as settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _seeds(folder: Folder, summary: Summary) -> str:
    """Preset and winner over seeds: mean, standard deviation and each value."""
    heading = "<h2>Preset and winner over seeds</h2>"
    trials = {"preset": folder.records.get(PRESET), "winner": summary.winner}
    by_role = {
        role: {record.seed: record for record in of_trial(folder.of(role), trial)}  # type: ignore[arg-type]
        for role, trial in trials.items()
    }
    seeds = sorted({seed for records in by_role.values() for seed in records})
    if not seeds:
        return heading + paragraph("They were not trained on further seeds.")

    def quality(record: Record | None) -> float | None:
        row = record.best(summary.metric) if record is not None and record.status == "finished" else None
        return row[summary.metric] if row is not None else None

    def row(role: str, spread: Spread | None) -> list[str]:
        records = [by_role[role].get(seed) for seed in seeds]
        values = [(quality(record), record.status if record is not None else NOTHING) for record in records]
        over = [f"{spread.mean:.4f}", f"{spread.deviation:.4f}"] if spread is not None else [NOTHING, NOTHING]
        return [role, *over, *(status if value is None else f"{value:.4f}" for value, status in values)]

    # Of a winner that is the preset itself there are no further trainings.
    spreads = {"preset": summary.preset, "winner": summary.again}
    rows = [row(role, spread) for role, spread in spreads.items() if by_role[role]]
    if summary.preset is not None and summary.again is not None:
        pairs = [(quality(by_role["winner"].get(seed)), quality(by_role["preset"].get(seed))) for seed in seeds]
        each = [NOTHING if a is None or b is None else f"{a - b:+.4f}" for a, b in pairs]
        rows.append(["difference", f"{summary.again.mean - summary.preset.mean:+.4f}", "", *each])
    head = [f"validation {summary.metric}", "mean", "standard deviation", *(f"seed {seed}" for seed in seeds)]
    note = "The winner was chosen for its value on the search's seed, which flatters it; the search did not see these."
    return heading + table(head, rows) + paragraph(note)


def _settings(trials: Trials) -> str:
    """The winner's settings beside the preset's."""
    heading = "<h2>Settings</h2>"
    preset = all_settings(trials.plan.preset)
    active = {parameter.name for parameter in trials.plan.space.active(preset)}
    winner = trials.winner.values if trials.winner is not None else {}
    rows, classes = [], []
    for name, parameter in trials.plan.space.parameters.items():
        before = shown(preset[name]) if name in active else NOTHING
        now = shown(winner[name]) if name in winner else NOTHING
        rows.append([name, before, now, parameter.describe()])
        classes.append("winner" if trials.winner is not None and now != before else "")
    name = f"winner ({trials.winner.name})" if trials.winner is not None else "winner"
    note = (
        f"{NOTHING}: not in force beside the other settings, or not known yet. Marked: where the winner is different."
    )
    return heading + table(["setting", "preset", name, "searched"], rows, text=4, classes=classes) + paragraph(note)


def _progress(trials: Trials) -> str:
    limit = " Hollow: outside of the tolerance." if trials.objective.settings.kind == "constrained" else ""
    return "".join(
        [
            "<h2>Quality by trial</h2>",
            paragraph(f"Line: the best so far of those that could win, which were trained to their end.{limit}"),
            _legend(),
            plot(plots.quality_by_trial(trials), "quality-by-trial"),
            "<h2>Learning curves</h2>",
            plot(plots.learning_curves(trials), "learning-curves"),
            "<h2>Settings together</h2>",
            paragraph(
                "A line per ended trial, darker the better; green: the winner; dotted: the preset. "
                f"{NOTHING}: the trial does not have that setting, or has a value outside of what is searched."
            ),
            f'<div class="scroll"><div style="min-width: {92 * (len(trials.plan.space.parameters) + 1)}px">',
            plot(plots.parallel_coordinates(trials), "parallel-coordinates"),
            "</div></div>",
        ]
    )


def _importance(trials: Trials) -> str:
    heading = "<h2>Importance</h2>"
    found = importances(trials.plan, trials.objective, trials.records)
    if not found:
        ended = [record.values.items() for record, _ in trials.judged if record.status != "failed"]
        parameters = trials.plan.space.parameters
        count = sum(all(parameters[name].holds(value) for name, value in values) for values in ended)
        few = f"Too few trials to say: {count} in the space finished or were stopped, and it takes {FEWEST}."
        return heading + paragraph(few if count < FEWEST else "No setting sets the best trials apart from the others.")
    count = max(one.trials for one in found)
    text = (
        f"How differently a setting is distributed among the {max(BEST, -(-count // 10))} trials of the highest "
        f"{trials.objective.metric} and among all {count} that finished or were stopped (PED-ANOVA). It says what went "
        "with being good in this search, in these ranges: not how much is to be gained, nor by which value. The red "
        "mark is what chance does: with the trials' qualities shuffled, nine in ten times a setting stays below it. A "
        "pale bar has not come above that."
    )
    if partly := ", ".join(f"{one.name} (in {one.trials} trials)" for one in found if one.trials < count):
        text += f" Judged only among the trials that have it, and weighted by their share of the best: {partly}."
    return heading + paragraph(text) + plot(plots.importance_bars(found), "importance")


def _slices(trials: Trials) -> str:
    figures = plots.slices(trials)
    grid = "".join(f"<div>{plot(figure, f'slice-{name}')}</div>" for name, figure in figures.items())
    text = paragraph("Each point is an ended trial that has the setting; the other settings vary, too.")
    panels = text + _legend() + f'<div class="grid">{grid}</div>' if figures else plot(None, "")
    return f"<h2>Quality by setting</h2>{panels}"


def _measures(trials: Trials, summary: Summary) -> str:
    figures = plots.measures_against_each_other(trials)
    grid = "".join(f"<div>{plot(figure, '-against-'.join(pair))}</div>" for pair, figure in figures.items())
    panels = f'<div class="grid pair">{grid}</div>' if figures else plot(None, "")
    if trials.objective.settings.kind != "pareto":
        text = "Speed and memory are those of this search's trials, which may have shared their machines."
        return f"<h2>What quality costs</h2>{paragraph(text)}{_legend() if figures else ''}{panels}"
    measures = trials.objective.measures
    text = (
        f"Green: the {len(summary.pareto)} trials, trained to their end, that no other one equals or beats in all of "
        f"{', '.join(measures)}. Grey: the others. "
    )
    if len(measures) > 2:
        text += "A trial of the front may look beaten in a single plot: it is not, in the measure that is not shown. "
    text += "The front's settings are in the table of all trials, where its rows are marked."
    best = [(record.name, record.best(summary.metric)) for record in summary.pareto]
    rows = [[name, *(measure(row, one, summary.metric) for one in measures)] for name, row in best if row is not None]
    head = ["trial", *(trials.titles()[one] for one in measures)]
    return f"<h2>Pareto front</h2>{paragraph(text)}{panels}{table(head, rows) if rows else ''}"


def measure(row: Mapping[str, float], name: str, metric: str) -> str:
    """A measure of a validation with its digits."""
    value = row[COLUMNS.get(name, metric)]
    return {"quality": f"{value:.4f}", "targets_per_second": f"{value:,.0f}", "memory": f"{value:.2f}"}[name]


def _scenarios(trials: Trials) -> str:
    if trials.objective.settings.kind != "constrained":
        return ""
    heading, objective = "<h2>Scenarios against the baseline</h2>", trials.objective
    finished = [(record, row) for record, row in trials.judged if record.status == "finished"]
    if objective.baseline is None or not finished:
        return heading + paragraph("There is no baseline yet, or no trial that was trained to its end.")
    # Without a winner, the trial that was nearest to holding the constraint is what one wants to see.
    nearest = min(finished, key=lambda pair: objective.violation(pair[1]))[0]
    record = trials.winner or nearest
    who = (
        f"Trial {record.name}, {'the winner' if trials.winner is not None else 'the nearest to it: there is no winner'}"
    )
    text = (
        f"{who}. Dashed: the {objective.settings.tolerance:.1%} that a scenario may lose. Scenarios with fewer than "
        f"{objective.settings.smallest_scenario} validation targets are not judged."
    )
    figure = plots.scenario_changes(trials, record)
    return heading + paragraph(text) + plot(figure, "scenarios", "No scenario has targets enough to be judged.")


def _all_trials(trials: Trials) -> str:
    """Every trial with its settings, its best validation's measures and its scenarios."""
    heading = "<h2>All trials</h2>"
    if not trials.records:
        return heading + paragraph("None has begun.")
    objective, names = trials.objective, list(trials.plan.space.parameters)
    best = [(record, record.best(objective.metric)) for record in trials.records]
    scenarios = sorted({name for _, row in best if row is not None for name in objective.scenarios(row)})
    pareto = objective.settings.kind == "pareto"
    front = objective.pareto(trials.records) if pareto else []
    rows, classes = [], []
    for record, row in best:
        judged = objective.scenarios(row) if row is not None else {}
        measures = [
            measure(row, one, objective.metric) if row is not None else NOTHING for one in ("quality", *COLUMNS)
        ]
        epochs = str(int(record.history[-1]["epoch"]) + 1) if record.history else NOTHING
        rows.append(
            [record.name, record.status, measures[0], epochs, *measures[1:], f"{record.seconds:,.0f}"]
            + [shown(record.values[name]) if name in record.values else NOTHING for name in names]
            + [f"{judged[name]:.4f}" if name in judged else NOTHING for name in scenarios]
        )
        marked = "front" if record in front else trials.kind(record) if not pareto else ""
        classes.append(marked if marked in ("front", *EMPHASISED) else "")
    head = ["trial", "status", objective.metric, "epochs", "targets/s", "memory, GB", "seconds", *names]
    head += scenarios
    text = f"Of each trial's best validation. Last columns: {objective.metric} by scenario. Click on a heading to sort."
    return heading + paragraph(text) + table(head, rows, text=2, classes=classes, sort=True)


def _failures(folder: Folder) -> str:
    """Failed trials, and those that failed and then went on, each attempt with its reason."""
    records = folder.records.values()
    failed = [record for record in records if record.status == "failed"]
    others = [record for record in records if record.status != "failed" and record.reasons]
    head = ["trial", "attempt", "reason"]

    def rows(records: Iterable[Record]) -> list[list[str]]:
        return [
            [record.name, str(attempt), reason]
            for record in records
            for attempt, reason in enumerate(record.reasons or ["no reason was given"], start=1)
        ]

    parts = ["<h2>Failed trials</h2>", table(head, rows(failed), text=3) if failed else paragraph("None.")]
    if others:
        parts += [paragraph("Failed at first, and were begun again:"), table(head, rows(others), text=3)]
    return "".join(parts)
