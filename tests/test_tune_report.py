"""The report of a search: what its page says, and what its figures show."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import yaml

from tune import plots
from tune.importance import BEST, FEWEST, importances
from tune.objective import Objective
from tune.plots import ABSENT, COLOURS, Trials
from tune.records import MEMORY, TARGETS_PER_SECOND, Folder, Record
from tune.report import write_report
from tune.settings import Plan, read_plan
from tune.space import Parameter
from tune.summary import Summary

METRIC = "ndcg@10"
SPACE = {
    "optimizer.lr": {"loguniform": [1e-3, 1e-1]},
    "model.dropout": {"uniform": [0.0, 0.5], "step": 0.1},
    "model.mixing": {"choice": ["smoe", "mlp"]},
    "optimizer.expert_lr": {"loguniform": [0.01, 0.1], "when": {"model.mixing": "smoe"}},
}
MLP = {"optimizer.lr": 0.01, "model.dropout": 0.2, "model.mixing": "mlp"}
SMOE = {"optimizer.lr": 0.02, "model.dropout": 0.1, "model.mixing": "smoe", "optimizer.expert_lr": 0.05}
HOSTILE = "raised ValueError: <img src=x onerror=alert(1)> & </script>"


def make_plan(folder: Path, **sections: Any) -> Plan:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"space": SPACE, **sections}, sort_keys=False))
    return read_plan("demo", path, [])


def row(epoch: int, quality: float, speed: float = 5000.0, memory: float = 1.0, **regions: float) -> dict[str, float]:
    scenarios = {f"{METRIC}/region={name}": value for name, value in regions.items()}
    targets = {f"n/region={name}": 1000.0 for name in regions}
    return {"epoch": epoch, METRIC: quality, TARGETS_PER_SECOND: speed, MEMORY: memory} | scenarios | targets


def trial(number: int, values: dict[str, Any], status: str, *history: dict[str, float], **others: Any) -> Record:
    return Record(f"{number:04}", "search", values, 0, status, history=list(history), **others)  # type: ignore[arg-type]


def seeds(role: str, *qualities: float) -> list[Record]:
    return [
        Record(f"{role}-{seed}", role, SMOE if role == "winner" else MLP, seed, "finished", history=[row(0, quality)])  # type: ignore[arg-type]
        for seed, quality in enumerate(qualities, start=1)
    ]


SEARCH = (
    trial(0, MLP, "finished", row(0, 0.10), row(1, 0.12)),
    trial(1, SMOE, "finished", row(0, 0.11), row(1, 0.1567), row(2, 0.15), seconds=1234.5),
    trial(2, MLP | {"optimizer.lr": 0.05}, "stopped", row(0, 0.08)),
    trial(3, MLP | {"optimizer.lr": 0.09}, "failed", reasons=["killed", HOSTILE], attempts=2),
    trial(4, SMOE | {"model.dropout": 0.3}, "running", row(0, 0.5)),
    trial(5, SMOE | {"model.dropout": 0.4}, "finished", row(0, 0.14), reasons=["its process died"], attempts=2),
)
# quality, targets/s, memory; by hand: 2 loses to 1 in all, 3 has the least memory, 0 the highest speed, 4 was stopped.
PARETO = (
    trial(0, MLP, "finished", row(0, 0.10, 9000.0, 2.0)),
    trial(1, SMOE, "finished", row(0, 0.15, 5000.0, 2.0)),
    trial(2, MLP | {"model.dropout": 0.0}, "finished", row(0, 0.14, 4000.0, 2.5)),
    trial(3, MLP | {"model.dropout": 0.5}, "finished", row(0, 0.09, 3000.0, 0.5)),
    trial(4, SMOE | {"model.dropout": 0.5}, "stopped", row(0, 0.2, 9900.0, 0.1)),
)


def found(folder: Path, records: Sequence[Record], baseline: dict[str, float] | None = None, **sections: Any) -> Trials:
    plan = make_plan(folder, **sections)
    objective = Objective(plan.config.objective, METRIC, baseline)
    searched = [record for record in records if record.role == "search"]
    return Trials(plan, objective, searched, objective.winner(searched))


def page(folder: Path, records: Sequence[Record], baseline: dict[str, float] | None = None, **sections: Any) -> str:
    """The report, without plotly.js."""
    trials = found(folder, records, baseline, **sections)
    kept = Folder(folder)
    kept.records = {record.name: record for record in records}
    path = folder / "report.html"
    write_report(path, trials.plan, trials.objective, kept, Summary.of(kept, trials.objective))
    text = path.read_text()
    assert list(folder.glob(".*")) == []
    library = re.search(r"<script>.{1000000,}?</script>", text, re.DOTALL)
    assert library is not None and "plotly.js v" in library[0]
    return text.replace(library[0], "")


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, its head included."""
    table = text.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)]
        for line in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    ]


def trace(figure: go.Figure | None, name: str) -> Any:
    assert figure is not None
    (one,) = [one for one in figure.data if one.name == name]
    return one


# ---- the page --------------------------------------------------------------------------------------------------------


def test_page_says_what_was_asked_and_found(tmp_path: Path) -> None:
    text = page(tmp_path, [*SEARCH, *seeds("preset", 0.10, 0.12), *seeds("winner", 0.15, 0.16)])
    shown = html.unescape(text)
    assert "Better than the preset by +0.0450 (+40.9%)" in shown
    assert str(tmp_path / "space.yaml") in shown
    assert "6 of 20: 3 finished, 1 stopped, 1 failed, 1 running" in shown
    assert "<title>Search of demo: ndcg@10</title>" in text


def test_page_needs_no_network(tmp_path: Path) -> None:
    text = page(tmp_path, SEARCH)
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", text)
    assert "@import" not in text and "url(" not in text


def test_seeds_have_mean_deviation_and_each_value(tmp_path: Path) -> None:
    preset, winner = (0.10, 0.12), (0.15, 0.16)
    text = page(tmp_path, [*SEARCH, *seeds("preset", *preset), *seeds("winner", *winner)])
    deviations = [f"{statistics.stdev(values):.4f}" for values in (preset, winner)]
    assert rows_of(text, "Preset and winner over seeds") == [
        ["validation ndcg@10", "mean", "standard deviation", "seed 1", "seed 2"],
        ["preset", "0.1100", deviations[0], "0.1000", "0.1200"],
        ["winner", "0.1550", deviations[1], "0.1500", "0.1600"],
        ["difference", "+0.0450", "", "+0.0500", "+0.0400"],
    ]


def test_a_seed_that_failed_is_shown_as_such(tmp_path: Path) -> None:
    failed = Record("winner-2", "winner", SMOE, 2, "failed", reasons=["out of memory"])
    text = page(tmp_path, [*SEARCH, *seeds("preset", 0.10, 0.12), *seeds("winner", 0.15), failed])
    rows = rows_of(text, "Preset and winner over seeds")
    assert rows[2] == ["winner", "0.1500", "0.0000", "0.1500", "failed"]
    assert rows[3][-1] == "—"
    assert ["winner-2", "1", "out of memory"] in rows_of(text, "Failed trials")


def test_a_winner_that_is_the_preset_has_no_row_of_its_own(tmp_path: Path) -> None:
    rows = rows_of(page(tmp_path, [SEARCH[0], *seeds("preset", 0.1)]), "Preset and winner over seeds")
    assert [row[0] for row in rows] == ["validation ndcg@10", "preset"]


def test_winners_settings_are_beside_the_presets(tmp_path: Path) -> None:
    rows = {row[0]: row[1:3] for row in rows_of(page(tmp_path, SEARCH), "Settings")}
    assert rows["setting"] == ["preset", "winner (0001)"]
    assert rows["optimizer.lr"] == ["0.002", "0.02"]  # 0.002: the demo's own
    assert rows["optimizer.expert_lr"][1] == "0.05"
    without = {row[0]: row[1:3] for row in rows_of(page(tmp_path, [SEARCH[0]]), "Settings")}
    assert without["optimizer.expert_lr"][1] == "—"  # its winner's mixing is mlp


def test_all_trials_are_in_the_table(tmp_path: Path) -> None:
    searched = [*SEARCH[:3], trial(3, SMOE, "finished", row(0, 0.11, 8765.4, 1.234, US=0.1234), seconds=61.7)]
    head, *rows = rows_of(page(tmp_path, searched), "All trials")
    assert head[:7] == ["trial", "status", "ndcg@10", "epochs", "targets/s", "memory, GB", "seconds"]
    assert head[7:] == [*SPACE, "region=US"]
    assert rows[1] == ["0001", "finished", "0.1567", "3", "5,000", "1.00", "1,234", "0.02", "0.1", "smoe", "0.05", "—"]
    assert rows[2] == ["0002", "stopped", "0.0800", "1", "5,000", "1.00", "0", "0.05", "0.2", "mlp", "—", "—"]
    assert rows[3][2:7] == ["0.1100", "1", "8,765", "1.23", "62"] and rows[3][-1] == "0.1234"


def test_reasons_are_there_and_escaped(tmp_path: Path) -> None:
    text = page(tmp_path, SEARCH)
    assert "<img" not in text
    assert html.escape(HOSTILE) in text
    assert rows_of(text, "Failed trials")[1:] == [["0003", "1", "killed"], ["0003", "2", HOSTILE]]
    assert "its process died" in text.split("were begun again")[1]  # 0005 has failed once, and then finished


def test_names_from_records_are_escaped_in_figures_and_tables(tmp_path: Path) -> None:
    name = "<img src=x>"
    baseline = row(0, 0.1, **{name: 0.1})
    searched = [trial(0, MLP, "finished", row(0, 0.1, **{name: 0.1}))]
    text = page(tmp_path, searched, baseline, objective={"kind": "constrained"})
    assert "<img" not in text
    assert f"region={html.escape(name)}" in text


@pytest.mark.parametrize(
    ("records", "winner"),
    [
        pytest.param([], False, id="nothing"),
        pytest.param([trial(0, MLP, "running")], False, id="none ended"),
        pytest.param([SEARCH[0]], True, id="one"),
        pytest.param([SEARCH[2]], False, id="no winner"),
        pytest.param([trial(n, MLP, "failed", reasons=["killed"]) for n in range(3)], False, id="all failed"),
        pytest.param([trial(0, MLP, "failed")], False, id="failed for no reason"),
        pytest.param([trial(0, MLP | {"optimizer.lr": 5.0}, "finished", row(0, 0.0))], True, id="preset outside"),
    ],
)
@pytest.mark.parametrize("kind", ["single", "constrained", "pareto"])
def test_page_of_a_search_that_has_found_little(tmp_path: Path, kind: str, records: list[Record], winner: bool) -> None:
    text = page(tmp_path, records, objective={"kind": kind})
    assert ("there is no winner" in text) is not winner
    assert "Too few trials to say" in text
    assert "They were not trained on further seeds." in text
    assert ("None has begun." in text) is not bool(records)
    judged = any(record.history and record.ended for record in records)
    assert ('id="quality-by-trial"' in text) is judged


# ---- its figures -----------------------------------------------------------------------------------------------------


def test_quality_by_trial_and_the_best_so_far(tmp_path: Path) -> None:
    figure = plots.quality_by_trial(found(tmp_path, SEARCH))
    assert (list(trace(figure, "preset").x), list(trace(figure, "preset").y)) == ([0], [0.12])
    assert (list(trace(figure, "winner").x), list(trace(figure, "winner").y)) == ([1], [0.1567])
    assert (list(trace(figure, "stopped").x), list(trace(figure, "stopped").y)) == ([2], [0.08])
    assert (list(trace(figure, "finished").x), list(trace(figure, "finished").y)) == ([5], [0.14])
    # To the last trial, 5; the running trial's 0.5 is not the best of anything yet.
    best = trace(figure, "best so far")
    assert (list(best.x), list(best.y)) == ([0, 1, 5], [0.12, 0.1567, 0.1567])
    lost = trace(figure, "failed without a validation")
    assert list(lost.x) == [3] and lost.y[0] < 0.08
    assert html.escape(HOSTILE) in lost.hovertext[0]


def test_trials_outside_of_the_tolerance_are_hollow_and_never_the_best(tmp_path: Path) -> None:
    searched = [
        trial(0, MLP, "finished", row(0, 0.10, US=0.10)),
        trial(1, SMOE, "finished", row(0, 0.15, US=0.09)),  # loses a tenth in US
        trial(2, MLP | {"model.dropout": 0.0}, "finished", row(0, 0.12, US=0.11)),
    ]
    constrained = found(tmp_path, searched, searched[0].history[0], objective={"kind": "constrained"})
    figure = plots.quality_by_trial(constrained)
    assert list(trace(figure, "finished").marker.symbol) == ["circle-open"]
    assert list(trace(figure, "winner").x) == [2]
    assert list(trace(figure, "best so far").y) == [0.10, 0.12, 0.12]


def test_learning_curves_emphasise_winner_and_preset(tmp_path: Path) -> None:
    figure = plots.learning_curves(found(tmp_path, SEARCH))
    winner, preset, other = (trace(figure, name) for name in ("0001", "0000", "0005"))
    assert (list(winner.x), list(winner.y)) == ([1, 2, 3], [0.11, 0.1567, 0.15])
    assert (winner.line.color, preset.line.color) == (COLOURS["winner"], COLOURS["preset"])
    assert winner.line.width == preset.line.width > other.line.width
    assert figure is not None and {one.name for one in figure.data[-2:]} == {"0000", "0001"}  # above the others
    assert "0003" not in {one.name for one in figure.data}  # without a validation


def test_parallel_coordinates_go_by_the_space(tmp_path: Path) -> None:
    figure = plots.parallel_coordinates(found(tmp_path, SEARCH))
    # lr 0.01 is the middle of the decades 0.001 to 0.1; dropout 0.2 of 0.5; mlp the second of two; no expert_lr; and
    # the preset's quality between those of 0002 and 0001.
    share = (0.12 - 0.08) / (0.1567 - 0.08)
    assert trace(figure, "0000").y == pytest.approx([1 / 2, 2 / 5, 3 / 4, ABSENT, share])
    assert trace(figure, "0001").y[3] == pytest.approx(0.699, abs=1e-3)  # log10(0.05 / 0.01) of one decade
    assert figure is not None and {one.name for one in figure.data} == {"0000", "0001", "0002", "0005"}


def test_ticks_are_round_and_inside() -> None:
    assert plots.number_ticks(Parameter("a", low=5e-4, high=1e-2, log=True)) == [5e-4, 1e-3, 2e-3, 5e-3, 1e-2]
    assert plots.number_ticks(Parameter("a", low=1e-5, high=1.0, log=True)) == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert plots.number_ticks(Parameter("a", low=2.2, high=2.4, log=True)) == [2.2, 2.4]
    assert plots.number_ticks(Parameter("a", low=0.0, high=0.5)) == [0.0, 0.25, 0.5]
    assert plots.number_ticks(Parameter("a", low=0.0, high=0.5, step=0.1)) == [0.0, 0.5]  # 0.25 cannot be drawn


def test_slices_hold_the_trials_that_have_the_setting(tmp_path: Path) -> None:
    figures = plots.slices(found(tmp_path, SEARCH))
    assert list(figures) == list(SPACE)
    points = {(x, y) for one in figures["optimizer.expert_lr"].data for x, y in zip(one.x, one.y, strict=True)}
    assert points == {(0.05, 0.1567), (0.05, 0.14)}
    assert figures["optimizer.lr"].layout.xaxis.type == "log"
    mixing = figures["model.mixing"]
    assert mixing.layout.xaxis.categoryarray == ("smoe", "mlp")
    assert (trace(mixing, "preset").x, trace(mixing, "winner").x) == (("mlp",), ("smoe",))


def test_what_quality_costs(tmp_path: Path) -> None:
    figures = plots.measures_against_each_other(found(tmp_path, PARETO))
    assert list(figures) == [("quality", "targets_per_second"), ("quality", "memory")]
    memory = figures["quality", "memory"]
    assert (list(trace(memory, "winner").x), list(trace(memory, "winner").y)) == ([2.0], [0.15])
    assert memory.layout.xaxis.title.text == "peak memory, GB"


def test_pareto_front(tmp_path: Path) -> None:
    pareto = {"kind": "pareto"}
    figures = plots.measures_against_each_other(found(tmp_path, PARETO, objective=pareto))
    assert list(figures) == [
        ("quality", "targets_per_second"),
        ("quality", "memory"),
        ("targets_per_second", "memory"),
    ]
    for figure in figures.values():
        assert set(trace(figure, "front").text) == {"0", "1", "3"}
        assert set(trace(figure, "dominated").text) == {"2", "4"}
    front = trace(figures["targets_per_second", "memory"], "front")
    assert (list(front.x), list(front.y)) == ([0.5, 2.0, 2.0], [3000.0, 9000.0, 5000.0])
    text = page(tmp_path, PARETO, objective=pareto)
    assert rows_of(text, "Pareto front")[1:] == [
        ["0001", "0.1500", "5,000", "2.00"],
        ["0000", "0.1000", "9,000", "2.00"],
        ["0003", "0.0900", "3,000", "0.50"],
    ]
    assert re.findall(r'<tr class="front"><td class="">(\d+)', text) == ["0000", "0001", "0003"]


def test_scenarios_against_the_baseline(tmp_path: Path) -> None:
    baseline = row(0, 0.10, US=0.10, BR=0.20, JP=0.05) | {"n/region=JP": 199}  # too few to be judged
    winner = trial(0, MLP, "finished", row(0, 0.11, US=0.12, BR=0.199, JP=0.01))
    beyond = trial(1, SMOE, "finished", row(0, 0.15, US=0.15, BR=0.15, JP=0.05))
    trials = found(tmp_path, [winner, beyond], baseline, objective={"kind": "constrained"})
    assert trials.winner is winner
    figure = plots.scenario_changes(trials, winner)
    assert figure is not None
    (bars,) = figure.data
    assert bars.y == ("region=US", "region=BR")
    assert bars.x == pytest.approx([0.12 / 0.10 - 1, 0.199 / 0.20 - 1])
    assert figure.layout.shapes[0].x0 == -0.02  # the tolerance
    lost = plots.scenario_changes(trials, beyond)
    assert lost is not None and lost.data[0].marker.color == (COLOURS["finished"], COLOURS["failed"])
    text = page(tmp_path, [beyond], baseline, objective={"kind": "constrained"})
    assert "Trial 0001, the nearest to it: there is no winner" in text


# ---- importance ------------------------------------------------------------------------------------------------------


def graded(count: int) -> list[Record]:
    """Trials whose quality is their dropout's alone, the lower the better; every other one has expert_lr."""
    records = []
    for number in range(count):
        values: dict[str, Any] = {"optimizer.lr": 0.001 * 1.05 ** (7 * number % count)}
        values |= {"model.dropout": round(0.1 * (number % 6), 1), "model.mixing": ("smoe", "mlp")[number % 2]}
        values |= {"optimizer.expert_lr": 0.01 * 1.05 ** (number % 20)} if number % 2 == 0 else {}
        status = "finished" if number % 3 else "stopped"
        records.append(trial(number, values, status, row(0, 0.2 - values["model.dropout"] * 0.1 + 1e-6 * number)))
    return records


def test_importance_finds_the_setting_that_matters(tmp_path: Path) -> None:
    records = graded(36)
    trials = found(tmp_path, records)
    shares = importances(trials.plan, trials.objective, records)
    first, *others = shares
    assert first.name == "model.dropout" and first.share > first.chance and first.share > 0.5
    assert sum(one.share for one in shares) == pytest.approx(1)
    assert {one.name: one.trials for one in shares}["optimizer.expert_lr"] == 18
    figure = plots.importance_bars(shares)
    assert figure is not None and figure.data[0].y[0] == "model.dropout" and figure.data[0].x[0] == first.share
    assert figure.data[1].x == tuple(one.chance for one in shares)
    assert len(others) == len(SPACE) - 1
    text = page(tmp_path, records)
    assert "the 5 trials of the highest ndcg@10 and among all 36" in text
    assert "optimizer.expert_lr (in 18 trials)" in text


def test_importance_needs_trials_enough(tmp_path: Path) -> None:
    assert FEWEST == 2 * BEST == 10
    few = graded(FEWEST - 1)
    failed = [trial(FEWEST - 1, MLP, "failed", row(0, 0.1))]
    trials = found(tmp_path, [*few, *failed])
    assert importances(trials.plan, trials.objective, trials.records) == []
    assert "Too few trials to say: 9 in the space finished or were stopped, and it takes 10." in page(tmp_path, few)
    enough = found(tmp_path, graded(FEWEST))
    assert importances(enough.plan, enough.objective, enough.records)


def test_importance_of_equals_is_none(tmp_path: Path) -> None:
    same = [trial(number, MLP, "finished", row(0, 0.1)) for number in range(12)]
    trials = found(tmp_path, same)
    assert importances(trials.plan, trials.objective, same) == []
    assert "No setting sets the best trials apart from the others." in page(tmp_path, same)
