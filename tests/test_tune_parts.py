"""The parts of a search without Ray's processes: objectives, records, sampler, early stopping, outputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from m5.config import ConfigError, RunConfig, load_config
from tune.engine import describe, said_by
from tune.live import LiveTable
from tune.objective import Objective
from tune.outputs import trials_table, write_outputs
from tune.records import MEMORY, TARGETS_PER_SECOND, Folder, Record, opened, read_history
from tune.schedulers import make_scheduler
from tune.settings import ObjectiveSettings, Plan, read_plan
from tune.study import StudySearcher, frozen, make_study
from tune.summary import Spread, Summary

SPACE = {
    "optimizer.lr": {"loguniform": [1e-3, 1e-2]},
    "model.mixing": {"choice": ["smoe", "mlp"]},
    "optimizer.expert_lr": {"loguniform": [0.01, 0.1], "when": {"model.mixing": "smoe"}},
    "model.content": {"choice": [["graph"], ["graph", "text"]]},
}
METRIC = "ndcg@10"


def make_plan(tmp_path: Path, *overrides: str, space: dict | None = None, **sections: Any) -> Plan:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"space": space or SPACE, **sections}))
    return read_plan("default", path, list(overrides))


def row(quality: float, *, epoch: int = 0, speed: float = 1000.0, memory: float = 1.0, **scenarios: Any) -> dict:
    """A validation; a scenario as its quality, or its quality and its number of targets."""
    made = {"epoch": epoch, "seconds": 10.0 * (epoch + 1), METRIC: quality, TARGETS_PER_SECOND: speed, MEMORY: memory}
    for name, value in scenarios.items():
        of, n = value if isinstance(value, tuple) else (value, 1000)
        made |= {f"{METRIC}/region={name}": of, f"n/region={name}": n}
    return made


def record(name: str, *history: dict, status: str = "finished", **values: Any) -> Record:
    settings = {"optimizer.lr": 0.002, "model.mixing": "mlp", "model.content": ["graph"]} | values
    return Record(name=name, role="search", values=settings, seed=0, status=status, history=list(history))  # type: ignore[arg-type]


# ---- objectives ------------------------------------------------------------------------------------------------------


def test_the_best_of_a_single_objective_was_trained_to_its_end() -> None:
    objective = Objective(ObjectiveSettings(), METRIC)
    records = [
        record("0000", row(0.1), row(0.3, epoch=1), row(0.2, epoch=2)),
        record("0001", row(0.25)),
        record("0002", row(0.9), status="stopped"),
        record("0003", status="failed"),
    ]
    assert objective.winner(records) is records[0]
    assert records[0].best(METRIC)["epoch"] == 1
    assert objective.winner(records[2:]) is None


def test_a_constrained_objective_leaves_out_what_harms_a_scenario() -> None:
    settings = ObjectiveSettings(kind="constrained", tolerance=0.05)
    objective = Objective(settings, METRIC, row(0.2, US=0.2, BR=0.1, JP=(0.4, 199)))
    harms, spares = row(0.3, US=0.4, BR=0.09, JP=0.0), row(0.25, US=0.25, BR=0.0951, JP=0.0)
    # JP has fewer targets than objective.smallest_scenario in the baseline, so it is not judged.
    assert objective.loss(harms).scenario == "region=BR"
    assert objective.loss(harms).share == pytest.approx(1 - 0.09 / 0.1)
    assert objective.violation(harms) == pytest.approx(0.1 - 0.05)
    assert objective.violation(spares) == pytest.approx(1 - 0.951 - 0.05) and objective.violation(spares) < 0
    records = [record("0000", harms), record("0001", spares), record("0002", row(0.1, US=0.2, BR=0.1))]
    assert objective.winner(records) is records[1]


def test_the_pareto_set_is_what_nothing_dominates() -> None:
    objective = Objective(ObjectiveSettings(kind="pareto"), METRIC)
    records = [
        record("best", row(0.3, speed=100, memory=3)),
        record("fast", row(0.1, speed=900, memory=3)),
        record("small", row(0.1, speed=100, memory=1)),
        record("dominated", row(0.2, speed=90, memory=3)),
        record("equal", row(0.3, speed=100, memory=3)),
        record("stopped", row(0.9, speed=999, memory=0), status="stopped"),
    ]
    assert {one.name for one in objective.pareto(records)} == {"best", "equal", "fast", "small"}
    assert objective.pareto(records)[0].name == "best"
    assert objective.directions == ["maximize", "maximize", "minimize"]
    two = Objective(ObjectiveSettings(kind="pareto", measures=("quality", "memory")), METRIC)
    assert {one.name for one in two.pareto(records)} == {"best", "equal", "small"}


# ---- the sampler -----------------------------------------------------------------------------------------------------


def searcher(plan: Plan, tmp_path: Path, *records: Record, concurrent: int = 2, **objective: Any) -> StudySearcher:
    folder = Folder(tmp_path / "out")
    for one in records:
        folder.write(one)
    made = Objective(ObjectiveSettings(**objective), METRIC)
    return StudySearcher(plan, made, folder, task=lambda record: {"record": record.name}, concurrent=concurrent)


def test_the_first_trial_is_the_preset_and_no_settings_come_twice(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, "search.trials=12", "search.random_trials=2", space={"model.blocks": {"choice": [1, 2, 3]}}
    )
    made = searcher(plan, tmp_path, concurrent=99)
    given = [made.suggest(str(place)) for place in range(12)]
    # Three combinations, of which the preset is one.
    assert [task["record"] for task in given[:3]] == ["0000", "0001", "0002"]
    assert given[3] == "FINISHED"
    assert "tried out" in made.note
    values = [one.values["model.blocks"] for one in made.folder.of("search")]
    assert values[0] == plan.preset.model.blocks
    assert sorted(values) == [1, 2, 3]


@pytest.mark.parametrize("missing", ["0000", "0002", "0004"])
def test_a_record_that_was_taken_away_is_made_again(tmp_path: Path, missing: str) -> None:
    plan = make_plan(tmp_path, "search.trials=5")
    names = [f"{place:04}" for place in range(5)]
    before = [record(name, row(0.1), **{"optimizer.lr": 0.002 + place / 1000}) for place, name in enumerate(names)]
    made = searcher(plan, tmp_path, *(one for one in before if one.name != missing), concurrent=9)
    left = made.folder.path / "trials" / missing / "best"
    left.mkdir(parents=True)
    assert [made.suggest("a"), made.suggest("b")] == [{"record": missing}, "FINISHED"]
    assert sorted(made.folder.records) == names
    assert (made.folder.records[missing].values["optimizer.lr"] == plan.preset.optimizer.lr) == (missing == "0000")
    assert not left.exists(), "its training is another one's"


def test_only_so_many_trials_run_at_a_time(tmp_path: Path) -> None:
    made = searcher(make_plan(tmp_path, "search.trials=3"), tmp_path)
    assert [made.suggest("a")["record"], made.suggest("b")["record"]] == ["0000", "0001"]
    assert made.suggest("c") is None
    made.on_trial_complete("a")
    assert made.suggest("c")["record"] == "0002"
    made.on_trial_complete("b", error=True)
    assert made.suggest("d") == "FINISHED"


def test_a_resumed_search_first_goes_on_with_what_was_running(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "search.trials=4")
    before = [record("0000", row(0.1)), record("0001", row(0.1), status="running"), record("0002", status="waiting")]
    made = searcher(plan, tmp_path, *before, concurrent=9)
    given = [made.suggest(str(place)) for place in range(4)]
    assert [task["record"] for task in given[:3]] == ["0001", "0002", "0003"]
    assert given[3] == "FINISHED"


def test_the_sampler_learns_and_holds_the_conditions(tmp_path: Path) -> None:
    """Of 14 trials those near lr 0.009 with mlp were good: TPE proposes more of them than chance would."""
    plan = make_plan(tmp_path, "search.trials=60", "search.random_trials=2")
    rates = [0.001 * 10 ** (place / 13) for place in range(14)]
    before = [
        record(f"{place:04}", row(0.5 - abs(rate - 0.009) * 50), **{"optimizer.lr": rate})
        for place, rate in enumerate(rates)
    ]
    bad = {"model.mixing": "smoe", "optimizer.expert_lr": 0.02}
    before += [
        record(f"{place + 14:04}", row(0.01), **{"optimizer.lr": rate}, **bad) for place, rate in enumerate(rates)
    ]
    made = searcher(plan, tmp_path, *before, concurrent=99)
    for place in range(20):
        made.suggest(str(place))
    new = made.folder.of("search")[28:]
    assert len(new) == 20
    assert sum(one.values["optimizer.lr"] > 0.005 for one in new) > 10  # by chance: 6
    assert sum(one.values["model.mixing"] == "mlp" for one in new) > 14
    for one in new:
        assert ("optimizer.expert_lr" in one.values) == (one.values["model.mixing"] == "smoe")
        assert isinstance(one.values["model.content"], list)


def test_records_become_trials_of_the_study(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    objective = Objective(ObjectiveSettings(kind="constrained"), METRIC, row(0.2, US=0.2))
    ended = record("0001", row(0.1, US=0.1), row(0.3, epoch=1, US=0.15))
    records = [
        record("0000", row(0.2), **{"optimizer.lr": 0.5}),  # a preset outside of the space
        ended,
        record("0002", row(0.1), status="running"),
        record("0003", status="failed"),
    ]
    study = make_study(plan, objective, records)
    assert [trial.user_attrs["record"] for trial in study.trials] == ["0001", "0002", "0003"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING", "FAIL"]
    assert study.trials[0].params == {"optimizer.lr": 0.002, "model.mixing": "mlp", "model.content": '["graph"]'}
    assert study.trials[0].intermediate_values == {1: 0.1, 2: 0.3}
    assert study.trials[0].values == [0.3]
    trial = frozen(plan, objective, ended)
    # The worst scenario lost a quarter; 2% are tolerated.
    assert optuna.trial.FrozenTrial.constraints.fget(trial) == {"violation": pytest.approx(0.25 - 0.02)}  # type: ignore[attr-defined]


# ---- early stopping --------------------------------------------------------------------------------------------------


class Live:
    """Stands for Ray's trial and its controller."""

    def __init__(self, name: str, epochs: int = 9):
        self.trial_id = name
        self.config = {"run": {"training": {"epochs": epochs}}}

    def get_live_trials(self) -> list[Any]:
        return []


def decisions(scheduler: Any, name: str, *scores: float, epochs: int = 9) -> list[bool]:
    """Whether the trial goes on after each epoch."""
    trial = Live(name, epochs)
    scheduler.on_trial_add(trial, trial)
    return [
        scheduler.on_trial_result(trial, trial, {"epoch": place + 1, "score": score}) == TrialScheduler.CONTINUE
        for place, score in enumerate(scores)
    ]


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_weak_trials_end_early_also_after_a_resumption(tmp_path: Path, scheduler: str) -> None:
    """The ended trials are known from their records alone."""
    plan = make_plan(tmp_path, f"search.scheduler={scheduler}", "training.epochs=9")
    before = [record(f"{place:04}", *(row(0.3 + place / 100, epoch=epoch) for epoch in range(9))) for place in range(4)]
    made = make_scheduler(plan, before)
    assert made.stopped == set()
    assert decisions(made, "weak", 0.1) == [False]
    assert decisions(made, "strong", *[0.5] * 9) == [True] * 9
    assert made.stopped == {"weak"}
    # Without those before, there is nothing to compare the weak one with.
    assert decisions(make_scheduler(plan), "weak", 0.1) == [True]


def test_a_trial_in_its_last_epoch_is_not_said_to_have_ended_early(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "training.epochs=9", "search.grace_epochs=3")
    before = [record(f"{place:04}", *(row(0.3, epoch=epoch) for epoch in range(9))) for place in range(4)]
    made = make_scheduler(plan, before)
    assert decisions(made, "short", 0.1, 0.1, 0.1, epochs=3) == [True] * 3
    assert made.stopped == set()
    assert decisions(make_scheduler(plan, before, early=False), "weak", 0.1, 0.1, 0.1, 0.1) == [True] * 4


# ---- records and outputs ---------------------------------------------------------------------------------------------


def test_a_search_belongs_to_its_settings_and_to_one_process(tmp_path: Path) -> None:
    identity = make_plan(tmp_path).identity()
    with opened(tmp_path / "out", identity, resume=False) as folder:
        folder.write(record("0000", row(0.1)))
        with pytest.raises(ConfigError, match="is in use"), opened(tmp_path / "out", identity, resume=True):
            pass
    with pytest.raises(ConfigError, match="holds a search with 1 ended trials"):
        opened(tmp_path / "out", identity, resume=False).__enter__()
    other = make_plan(tmp_path, "training.epochs=3").identity()
    with pytest.raises(ConfigError, match=r"cannot resume .*: settings\.training.* was null and is {\"epochs\": 3}"):
        opened(tmp_path / "out", other, resume=True).__enter__()
    # More trials, other means: that is the same search.
    longer = make_plan(tmp_path, "search.trials=99", "search.seeds=1", "trial.memory_gb=3").identity()
    with opened(tmp_path / "out", longer, resume=True) as folder:
        assert folder.records == {"0000": record("0000", row(0.1))}
    (tmp_path / "out" / "records" / "0000.json").write_text("{")
    with pytest.raises(ConfigError, match=r"0000\.json is damaged"):
        opened(tmp_path / "out", longer, resume=True).__enter__()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="is not a search"):
        opened(tmp_path / "mine", identity, resume=False).__enter__()


def test_history_is_read_up_to_where_a_process_was_killed(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": kind, "epoch": 0, METRIC: 0.1}) for kind in ("train", "valid")]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[1][:20]]))
    assert read_history(tmp_path) == [{"epoch": 0, METRIC: 0.1}]
    assert read_history(tmp_path / "none") == []


@pytest.mark.parametrize("kind", ["single", "pareto"])
def test_what_is_left_behind_can_be_trained_on(tmp_path: Path, kind: str) -> None:
    plan = make_plan(tmp_path, "training.epochs=3", objective={"kind": kind}, trial={"cpus": 2})
    folder, objective = Folder(tmp_path / "out"), Objective(plan.config.objective, METRIC)
    folder.write(record("0000", row(0.1, US=0.2), **{"model.mixing": "smoe", "optimizer.expert_lr": 0.02}))
    folder.write(record("0001", row(0.2, speed=5.0, US=0.3), **{"model.content": ["graph", "text"]}))
    failed = record("0002", status="failed")
    failed.reasons.append("raised ValueError: no")
    folder.write(failed)
    summary = Summary.of(folder, objective)
    write_outputs(plan, objective, folder, summary)
    best = load_config(str(tmp_path / "out" / "best.yaml"), [], Path("d"), Path("o"))
    same = ["model.mixing=mlp", "model.content=[graph, text]", "optimizer.lr=0.002", "training.epochs=3"]
    assert best == load_config("default", same, Path("d"), Path("o")).model_copy(update={"preset": "best"})
    table = pd.read_parquet(tmp_path / "out" / "trials.parquet").set_index("name")
    assert table[METRIC].round(3).fillna(-1).to_dict() == {"0000": 0.1, "0001": 0.2, "0002": -1}
    assert table["reason"].dropna().to_dict() == {"0002": "raised ValueError: no"}
    assert table[f"{METRIC}/region=US"].dropna().to_dict() == {"0000": 0.2, "0001": 0.3}
    assert table["optimizer.expert_lr"].dropna().to_dict() == {"0000": 0.02}
    assert table["model.content"].to_dict()["0001"] == "graph,text"
    there = {path.name for path in (tmp_path / "out" / "pareto").glob("*")}
    assert there == ({"0000.yaml", "0001.yaml"} if kind == "pareto" else set())
    # What is no longer so goes.
    for name in ("0000", "0001"):
        folder.records[name].status = "failed"
    write_outputs(plan, objective, folder, Summary.of(folder, objective))
    assert not (tmp_path / "out" / "best.yaml").exists()
    assert trials_table(folder, objective)["status"].to_list() == ["failed"] * 3


def test_the_verdict_goes_by_the_spread_over_seeds() -> None:
    def verdict(preset: tuple[float, ...], again: tuple[float, ...], winner: str = "0003") -> str:
        counts = {"finished": 4}
        return Summary(METRIC, record(winner, row(0.3)), Spread(preset), Spread(again), (), counts, ()).verdict()

    assert Spread((0.1, 0.2, 0.3)).mean == pytest.approx(0.2)
    assert Spread((0.1, 0.2, 0.3)).deviation == pytest.approx(((0.1**2 + 0 + 0.1**2) / 2) ** 0.5)
    assert "Better than the preset by +0.1000 (+50.0%)" in verdict((0.19, 0.2, 0.21), (0.29, 0.3, 0.31))
    assert "ranges overlap" in verdict((0.1, 0.2, 0.21), (0.2, 0.29, 0.3))
    assert "Within chance" in verdict((0.1, 0.2, 0.3), (0.11, 0.21, 0.31))
    assert "tells nothing of the spread" in verdict((0.1,), (0.2,))
    assert "it was there already" in verdict((0.1,), (0.2,), winner="0000")


def test_trainings_on_seeds_count_for_their_own_trial(tmp_path: Path) -> None:
    """A search that went on may have found another winner."""
    folder, objective = Folder(tmp_path), Objective(ObjectiveSettings(), METRIC)
    folder.write(record("0000", row(0.1)))
    folder.write(record("0001", row(0.3), **{"optimizer.lr": 0.005}))
    for place, (rate, quality) in enumerate([(0.005, 0.28), (0.004, 0.9), (0.005, 0.26)], start=1):
        values = record("", **{"optimizer.lr": rate}).values | {"training.epochs": 9}
        one = Record(f"winner-{place}", "winner", values, place, "finished", history=[row(quality)])
        folder.write(one)
    assert Summary.of(folder, objective).again == Spread((0.28, 0.26))
    folder.forget(folder.records["winner-1"])
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        *("0000.json", "0001.json", "winner-2.json", "winner-3.json")
    ]


def test_what_an_exception_says_is_no_markup(tmp_path: Path) -> None:
    folder, objective = Folder(tmp_path), Objective(ObjectiveSettings(), METRIC)
    failed = record("0001", status="failed")
    failed.reasons.append("raised OSError: [/data] [red]gone[/blue]")
    folder.write(failed)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(LiveTable(folder, objective, 3).table())
    assert failed.reasons[0] in console.export_text()


# ---- reasons ---------------------------------------------------------------------------------------------------------


def test_reasons_are_told_in_a_line(tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

    error = RayTaskError("train", "Traceback ...", ValueError("no such\nthing"))
    assert describe(error) == "raised ValueError: no such"
    assert describe(OutOfMemoryError("node")).startswith("out of memory: Ray ended it")
    assert "process died" in describe(ActorDiedError())
    folder, one = Folder(tmp_path), record("0007", status="running")
    assert said_by(folder, one) is None
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "0007.said").write_text("out of memory: 3 GB")
    assert said_by(folder, one) == "out of memory: 3 GB"
    assert said_by(folder, one) is None


def test_the_presets_configuration_is_the_base_of_all(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    assert isinstance(plan.preset, RunConfig)
    assert plan.preset.training.threads == 1
    assert plan.preset.training.device == "cpu"
