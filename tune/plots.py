"""Plots of a search, as Plotly figures; each function gives None where there is nothing to draw.

Optuna's own figures are not used: its parallel coordinates leave out trials that lack a conditional setting, none tells
trials that ended early from others, and its slices are one row of panels, which no narrow screen can show.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from tune.importance import Importance
from tune.objective import COLUMNS, Objective
from tune.records import PRESET, Record
from tune.settings import Plan
from tune.space import Parameter

# By what a trial is; the later lie above the earlier.
COLOURS = {"stopped": "#a9b3bd", "failed": "#c0563f", "finished": "#4a7ba6", "preset": "#222222", "winner": "#16794f"}
EMPHASISED = ("preset", "winner")
PALE, LINES, TEXT = "#c3ccd4", "#7d8790", "#39424c"
QUALITY_SCALE = ["#d5dfe8", "#1d4568"]  # from the lowest to the highest
ABSENT = -0.16  # height, under the axes of the parallel coordinates, of settings that a trial does not have
OTHER_TITLES = {"targets_per_second": "training speed, targets/s", "memory": "peak memory, GB"}
LABELLED = 15  # points that get their trial's number beside them; more would overlap

Judged = list[tuple[Record, dict[str, float]]]


@dataclass(frozen=True)
class Trials:
    """What is plotted.

    Attributes:
        plan, objective: of the search.
        records: its trials.
        winner: the best of them, if there is one.
    """

    plan: Plan
    objective: Objective
    records: Sequence[Record]
    winner: Record | None

    @cached_property
    def judged(self) -> Judged:
        """Ended trials that have a validation, each with its best one."""
        rows = [(record, record.best(self.objective.metric)) for record in self.records if record.ended]
        return [(record, row) for record, row in rows if row is not None]

    def titles(self) -> dict[str, str]:
        """Of axes, by measure."""
        return {"quality": f"validation {self.objective.metric}"} | OTHER_TITLES

    def kind(self, record: Record) -> str:
        """ "winner", "preset", or the status of any other trial."""
        if self.winner is not None and record.name == self.winner.name:
            return "winner"
        return "preset" if record.name == PRESET else record.status


def shown(value: Any) -> str:
    """A setting's value as YAML has it, numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def styled(figure: go.Figure, x: str, y: str, height: int = 340) -> go.Figure:
    """Axis titles and the look that all figures share. `height` is in pixels; the width is that of the page."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 62, "r": 14, "t": 12, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12, "color": TEXT},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hovermode="closest",
        hoverlabel={"align": "left"},
    )
    axis = {"gridcolor": "#e9ecef", "linecolor": "#b8c0c8", "zeroline": False, "automargin": True, "title_standoff": 8}
    figure.update_xaxes(title_text=html.escape(x), **axis)
    figure.update_yaxes(title_text=html.escape(y), **axis)
    # Of a single value, Plotly would show from 1 below to 1 above, as if quality could be negative.
    for update, values in ((figure.update_xaxes, "x"), (figure.update_yaxes, "y")):
        found = {value for trace in figure.data for value in trace[values] if not isinstance(value, str)}
        if len(found) == 1:
            value = found.pop()
            update(range=[value - (abs(value) / 5 or 1), value + (abs(value) / 5 or 1)])
    return figure


def described(trials: Trials, record: Record, row: Mapping[str, float] | None) -> str:
    """What is shown where the pointer is on a trial. Plotly reads labels as HTML, hence the escapes."""
    lines = [f"<b>trial {record.name}</b>, {record.status}"]
    if row is not None:
        lines.append(html.escape(f"{trials.objective.metric} {row[trials.objective.metric]:.4f}"))
    if record.reasons and record.status == "failed":
        lines.append(html.escape(record.reasons[-1][:100]))
    lines += [html.escape(f"{name} = {shown(value)}") for name, value in record.values.items()]
    return "<br>".join(lines)


def points(
    trials: Trials, judged: Judged, x: Iterable[Any], y: Iterable[float], sizes: tuple[int, int]
) -> list[go.Scatter]:
    """Trials as points, coloured by status; the winner and the preset larger, and above the others.

    Args:
        x, y: of each.
        sizes: diameters in pixels, of trials and of the winner and the preset.
    """
    groups: dict[str, list[tuple[Any, float, str, str]]] = {kind: [] for kind in COLOURS}
    for (record, row), across, up in zip(judged, x, y, strict=True):
        kind = trials.kind(record)
        symbol = {"preset": "diamond", "winner": "star"}.get(kind, "circle")
        symbol += "-open" if trials.objective.violation(row) > 0 else ""
        groups[kind].append((across, up, described(trials, record, row), symbol))
    return [
        go.Scatter(
            x=[one[0] for one in group],
            y=[one[1] for one in group],
            hovertext=[one[2] for one in group],
            hoverinfo="text",
            mode="markers",
            name=kind,
            marker_symbol=[one[3] for one in group],
            marker_color=COLOURS[kind],
            marker_size=sizes[kind in EMPHASISED],
        )
        for kind, group in groups.items()
        if group
    ]


def quality_by_trial(trials: Trials) -> go.Figure | None:
    """Quality in the order of the trials, and the best so far of those that could win."""
    if not trials.judged:
        return None
    numbers = [int(record.name) for record, _ in trials.judged]
    qualities = [row[trials.objective.metric] for _, row in trials.judged]
    best: list[tuple[int, float]] = []
    for number, quality, (record, _) in zip(numbers, qualities, trials.judged, strict=True):
        # By the objective itself, so that the line ends at the winner.
        if trials.objective.winner([record]) is not None and (not best or quality > best[-1][1]):
            best.append((number, quality))
    figure = go.Figure()
    if best:
        x, y = zip(*best, (int(trials.records[-1].name), best[-1][1]), strict=True)
        line = {"color": COLOURS["winner"], "width": 1.5, "shape": "hv"}
        figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", name="best so far")
    figure.add_traces(points(trials, trials.judged, numbers, qualities, (9, 14)))
    # What failed before its first validation has no quality: it is marked on the lower edge.
    if lost := [record for record in trials.records if record.status == "failed" and not record.history]:
        spread = max(qualities) - min(qualities) or abs(max(qualities)) or 1.0
        figure.add_scatter(
            x=[int(record.name) for record in lost],
            y=[min(qualities) - 0.1 * spread] * len(lost),
            hovertext=[described(trials, record, None) for record in lost],
            hoverinfo="text",
            mode="markers",
            name="failed without a validation",
            marker={"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": COLOURS["failed"]}},
        )
    styled(figure, "trial", trials.titles()["quality"])
    return figure.update_xaxes(tickformat="d", dtick=1 if len(trials.records) <= 12 else None)


def learning_curves(trials: Trials) -> go.Figure | None:
    """Quality by epoch, a line per trial; the winner's and the preset's are drawn last and thicker."""
    lines = [record for record in trials.records if record.history]
    if not lines:
        return None
    figure = go.Figure()
    for record in sorted(lines, key=lambda record: trials.kind(record) in EMPHASISED):
        kind = trials.kind(record)
        thick = kind in EMPHASISED
        figure.add_scatter(
            x=[int(row["epoch"]) + 1 for row in record.history],
            y=[row[trials.objective.metric] for row in record.history],
            mode="lines+markers",
            name=record.name,
            opacity=1 if thick else 0.65,
            # What is still running is as pale as what was stopped.
            line={"color": COLOURS.get(kind, COLOURS["stopped"]), "width": 2.8 if thick else 1.2},
            marker={"size": 6 if thick or len(record.history) == 1 else 4},
            hovertext=described(trials, record, record.best(trials.objective.metric)),
            hoverinfo="text",
        )
    longest = max(int(record.history[-1]["epoch"]) + 1 for record in lines)
    styled(figure, "epoch", trials.titles()["quality"])
    return figure.update_xaxes(tickformat="d", dtick=1 if longest <= 12 else None)


def number_ticks(parameter: Parameter, most: int = 5) -> list[float]:
    """Round numbers in a parameter's range, not many more than `most`, for a logarithmic or a linear axis."""
    low, high = parameter.low, parameter.high
    if not parameter.log:
        middle = (low + high) / 2
        return [low, middle, high] if parameter.holds(middle) and not parameter.integer else [low, high]
    for digits in ((1, 2, 5), (1, 3), (1,)):
        # As text, as 5 times 10.0**-4 may be a little more than 0.0005, and so outside of the range.
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else [low, high]


def height(parameter: Parameter, value: Any) -> float:
    """Where a value is between a parameter's lower (0) and upper end (1); `ABSENT` if it is outside."""
    if not parameter.holds(value):
        return ABSENT
    if parameter.choices:
        return (parameter.choices.index(value) + 0.5) / len(parameter.choices)
    low, high, here = (math.log(one) if parameter.log else one for one in (parameter.low, parameter.high, value))
    return (here - low) / (high - low)


def parallel_coordinates(trials: Trials) -> go.Figure | None:
    """A line per ended trial through its settings to its quality, which also colours it."""
    if not trials.judged:
        return None
    parameters = list(trials.plan.space.parameters.values())
    qualities = [row[trials.objective.metric] for _, row in trials.judged]
    lowest, spread = min(qualities), max(qualities) - min(qualities)
    figure = go.Figure()
    # The best are drawn last, above the others.
    for quality, (record, row) in sorted(zip(qualities, trials.judged, strict=True), key=lambda pair: pair[0]):
        share = (quality - lowest) / spread if spread else 0.5
        kind = trials.kind(record)
        heights = [height(one, record.values[one.name]) if one.name in record.values else ABSENT for one in parameters]
        figure.add_scatter(
            x=list(range(len(parameters) + 1)),
            y=[*heights, share],
            mode="lines",
            name=record.name,
            line_color=COLOURS[kind] if kind in EMPHASISED else sample_colorscale(QUALITY_SCALE, [share])[0],
            line_width=3 if kind in EMPHASISED else 1.6,
            line_dash="dot" if kind == "preset" else "solid",
            hovertext=described(trials, record, row),
            hoverinfo="text",
        )
    for index, parameter in enumerate(parameters):
        marks = parameter.choices or number_ticks(parameter)
        ticks = [(height(parameter, mark), shown(mark)) for mark in marks]
        if any(heights.y[index] == ABSENT for heights in figure.data):
            ticks.append((ABSENT, "—"))
        _axis(figure, index, html.escape(parameter.name).replace(".", ".<br>"), ticks)
    ends = [(0.0, f"{lowest:.4f}"), (1.0, f"{max(qualities):.4f}")] if spread else [(0.5, f"{lowest:.4f}")]
    _axis(figure, len(parameters), f"<b>{html.escape(trials.objective.metric)}</b>", ends)
    styled(figure, "", "", height=430)
    figure.update_layout(margin={"l": 20, "r": 50, "t": 50, "b": 10})
    figure.update_xaxes(visible=False, range=[-0.2, len(parameters) + 0.2])
    return figure.update_yaxes(visible=False, range=[ABSENT - 0.06, 1.06])


def _axis(figure: go.Figure, x: int, title: str, ticks: Iterable[tuple[float, str]]) -> None:
    """An upright axis with its title above it and its ticks, (height, label), to its right."""
    figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, line={"color": LINES, "width": 1}, layer="below")
    figure.add_annotation(x=x, y=1.06, yanchor="bottom", text=title, showarrow=False)
    look = {"xanchor": "left", "xshift": 3, "showarrow": False, "bgcolor": "rgba(255,255,255,0.8)", "font_size": 11}
    for y, label in ticks:
        figure.add_annotation(x=x, y=y, text=html.escape(label), **look)


def bars(values: Mapping[str, float], colours: list[str], texts: list[str], title: str) -> go.Figure:
    """Bars to the right, the first on top, each with its name before it and a text behind it."""
    figure = go.Figure()
    figure.add_bar(
        x=list(values.values()),
        y=[html.escape(name) for name in values],
        orientation="h",
        marker_color=colours,
        text=texts,
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    styled(figure, title, "", height=80 + 27 * len(values))
    return figure.update_yaxes(autorange="reversed", showgrid=False).update_layout(bargap=0.35)


def importance_bars(found: list[Importance]) -> go.Figure | None:
    """The share of each setting, and a mark at what chance gives."""
    if not found:
        return None
    shares = {one.name: one.share for one in found}
    colours = [COLOURS["finished"] if one.share > one.chance else PALE for one in found]
    figure = bars(shares, colours, [f"{one.share:.0%}" for one in found], "share of importance")
    mark = {"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": COLOURS["failed"]}}
    names = [html.escape(name) for name in shares]
    figure.add_scatter(x=[one.chance for one in found], y=names, mode="markers", marker=mark, hoverinfo="skip")
    longest = max(max(one.share, one.chance) for one in found)
    return figure.update_xaxes(tickformat=".0%", range=[0, 1.15 * longest])  # with room for the texts


def slices(trials: Trials) -> dict[str, go.Figure]:
    """By setting: quality against its value, of the ended trials that have it."""
    figures = {}
    for name, parameter in trials.plan.space.parameters.items():
        # The preset may have a value outside of the space, or none where others have numbers.
        judged = [
            (record, row)
            for record, row in trials.judged
            if name in record.values and (parameter.choices or isinstance(record.values[name], int | float))
        ]
        if not judged:
            continue
        raw = [record.values[name] for record, _ in judged]
        values = [html.escape(shown(value)) for value in raw] if parameter.choices else raw
        qualities = [row[trials.objective.metric] for _, row in judged]
        figures[name] = figure = go.Figure(points(trials, judged, values, qualities, (7, 12)))
        styled(figure, name, trials.objective.metric, height=250)
        if parameter.choices:
            order = list(dict.fromkeys([*(html.escape(shown(value)) for value in parameter.choices), *values]))
            figure.update_xaxes(type="category", categoryarray=order, range=[-0.6, len(order) - 0.4])
            continue
        # All of what was searched is shown, so that one sees what has not been tried.
        low, high = min(parameter.low, *raw), max(parameter.high, *raw)
        if parameter.log and low > 0:
            low, high, ticks = math.log10(low), math.log10(high), number_ticks(parameter)
            figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
        elif parameter.integer:
            figure.update_xaxes(dtick=max(1, round((high - low) / 5)), tick0=low, tickformat="d")
        else:
            figure.update_xaxes(nticks=6)
        figure.update_xaxes(range=[low - 0.06 * (high - low), high + 0.06 * (high - low)])
    return figures


def measures_against_each_other(trials: Trials) -> dict[tuple[str, str], go.Figure]:
    """By pair of measures: of several objectives each pair; else quality against the two that it may cost.

    Trials of the Pareto front, of all measures together, are coloured and numbered; the others are grey.
    """
    pareto = trials.objective.settings.kind == "pareto"
    pairs = itertools.combinations(trials.objective.measures, 2) if pareto else (("quality", name) for name in COLUMNS)
    titles, figures = trials.titles(), {}
    for up, across in pairs if trials.judged else ():
        x, y = ([row[COLUMNS.get(one, trials.objective.metric)] for _, row in trials.judged] for one in (across, up))
        traces = front_points(trials, x, y) if pareto else points(trials, trials.judged, x, y, (8, 13))
        figures[up, across] = styled(go.Figure(traces), titles[across], titles[up])
    return figures


def front_points(trials: Trials, x: list[float], y: list[float]) -> list[go.Scatter]:
    """Judged trials at x and y: those that are not in the Pareto front, and those that are."""
    front = {record.name for record in trials.objective.pareto(trials.records)}
    # In the order of x, so that the numbers of neighbours are above and below in turn.
    placed = sorted(zip(x, y, trials.judged, strict=True), key=lambda one: one[0])
    traces = []
    for name, colour, inside in (("dominated", PALE, False), ("front", COLOURS["winner"], True)):
        chosen = [one for one in placed if (one[2][0].name in front) == inside]
        traces.append(
            go.Scatter(
                x=[one[0] for one in chosen],
                y=[one[1] for one in chosen],
                hovertext=[described(trials, *one[2]) for one in chosen],
                hoverinfo="text",
                mode="markers+text" if inside and len(front) <= LABELLED else "markers",
                text=[str(int(record.name)) for _, _, (record, _) in chosen],
                textposition=[("top center", "bottom center")[index % 2] for index in range(len(chosen))],
                name=name,
                marker={"color": colour, "size": 10 if inside else 8},
            )
        )
    return traces


def scenario_changes(trials: Trials, record: Record) -> go.Figure | None:
    """By scenario: a trial's quality against the baseline's, as a share of it, and the line of what may be lost."""
    objective, row = trials.objective, record.best(trials.objective.metric)
    if objective.baseline is None or row is None:
        return None
    now, before = objective.scenarios(row), objective.scenarios(objective.baseline)
    changes = {name: now[name] / value - 1 for name, value in before.items() if value > 0 and name in now}
    if not changes:
        return None
    limit = -objective.settings.tolerance
    changes = dict(sorted(changes.items(), key=lambda item: -item[1]))
    lost, held = COLOURS["failed"], COLOURS["finished"]
    colours = [lost if change < limit else held for change in changes.values()]
    texts = [f"{change:+.1%} (to {now[name]:.4f})" for name, change in changes.items()]
    figure = bars(changes, colours, texts, f"change of {objective.metric} against the baseline")
    figure.add_vline(x=limit, line={"color": lost, "dash": "dash", "width": 1.5})
    ends = min(1.6 * limit, *changes.values()), max(0.0, *changes.values())
    pad = 0.2 * (ends[1] - ends[0])  # for the texts behind the bars
    return figure.update_xaxes(
        tickformat="+.0%", range=[ends[0] - pad, ends[1] + pad], zeroline=True, zerolinecolor=LINES
    )
