"""Whole searches, with Ray's processes: trials that fail in every way, the driver killed, several ranks, objectives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import ray
import yaml

from m5.cli import main
from m5.config import ConfigError, RunConfig
from m5.schema import TEST, PreparedDataset
from tests import mischief
from tests.world import TINY, write_world
from tune.search import search

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROOT = Path(__file__).parents[1]
SETTINGS = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in TINY)}
SETTINGS = {name: value for name, value in SETTINGS.items() if name not in ("training.threads", "training.device")}
SETTINGS["sequences.sequences_per_epoch"] = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "data"
    write_world(folder, users=120, rights=True, longest=30)
    return folder


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trials' processes import `tests` from where this one is."""
    monkeypatch.chdir(ROOT)
    # Ray's workers give way to everything else by default; beside another test they would take minutes.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    yield
    ray.shutdown()


def write_space(folder: Path, space: dict, **sections: Any) -> Path:
    sections = {"settings": SETTINGS | {"training.epochs": 2} | sections.pop("settings", {})} | sections
    for name in space:
        sections["settings"].pop(name, None)
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"space": space, **sections}))
    return path


def records(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))}


def test_trials_that_fail_are_named_with_their_reason_and_the_search_ends_well(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that raises, one that runs out of memory, one that hangs, one that diverges, one that fails once only."""
    choices = [mischief.RAISES, mischief.HOGS, mischief.HANGS, mischief.ONCE, mischief.FINE]
    space = write_space(
        tmp_path,
        {"optimizer.warmup_steps": {"choice": choices}},
        settings={"training.stall_seconds": 4, "training.checkpoint_every": 1},
        search={"trials": 9, "scheduler": "none", "seeds": 0},
        trial={"memory_gb": 1.5},
    )
    out = tmp_path / "out"
    summary = search(preset="default", data=str(data), space=space, out=out, overrides=[], trainer=mischief.Mischief)
    found = {one["values"]["optimizer.warmup_steps"]: one for one in records(out).values()}
    # The preset's warm-up of 100 steps is none of the choices; all of these were tried once.
    assert set(found) == {100, *choices}
    assert {what: found[what]["status"] for what in (100, *choices)} == {
        100: "finished",
        mischief.RAISES: "failed",
        mischief.HOGS: "failed",
        mischief.HANGS: "failed",
        mischief.ONCE: "finished",
        mischief.FINE: "finished",
    }
    for what, said in (
        (mischief.RAISES, "raised ArithmeticError: a fault of the program"),
        (mischief.HOGS, "out of memory: "),
        (mischief.HANGS, "hung: for 4 s no rank has made progress; rank 0: no progress for"),
    ):
        assert found[what]["attempts"] == 2, "retried once"
        assert len(found[what]["reasons"]) == 2
        assert all(reason.startswith(said) for reason in found[what]["reasons"]), found[what]["reasons"]
    assert "GB, and trial.memory_gb is 1.5" in found[mischief.HOGS]["reasons"][0]
    stacks = found[mischief.HANGS]["reasons"][1].rpartition("Stacks: ")[2]
    assert "in _steps" in (out / stacks / "rank-0.txt").read_text()
    # What failed once has gone on from its checkpoint of the first epoch, and both are in its history.
    once = found[mischief.ONCE]
    assert (once["attempts"], once["reasons"]) == (2, ["raised ConnectionError: the network has gone away"])
    assert [row["epoch"] for row in once["history"]] == [0, 1]
    assert {one.name for one in summary.failed} == {one["name"] for one in found.values() if one["status"] == "failed"}
    printed = capsys.readouterr().out
    for one in summary.failed:
        assert f"failed: {one.name}, 2 attempts: {one.reasons[-1]}" in printed
    page = (out / "report.html").read_text()
    assert "a fault of the program" in page
    table = pd.read_parquet(out / "trials.parquet")
    assert table.set_index("name")["status"].to_dict() == {one["name"]: one["status"] for one in found.values()}
    assert not list((out / "trials").glob("*/checkpoints")), "the state of ended trials is not kept"


def test_settings_that_diverge_are_not_tried_again(data: Path, tmp_path: Path) -> None:
    space = write_space(
        tmp_path, {"optimizer.lr": {"choice": [0.002, 1e30]}}, search={"trials": 2, "scheduler": "none", "seeds": 0}
    )
    search(preset="default", data=str(data), space=space, out=tmp_path / "out", overrides=[])
    one = next(one for one in records(tmp_path / "out").values() if one["values"]["optimizer.lr"] == 1e30)
    assert (one["status"], one["attempts"]) == ("failed", 1)
    assert "training diverged" in one["reasons"][0]


def trial_processes(out: Path) -> list[psutil.Process]:
    """Processes that hold a file of the search open."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(file.path.startswith(str(out)) for file in process.open_files()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_killed_search_goes_on_and_runs_no_ended_trial_again(data: Path, tmp_path: Path) -> None:
    space = write_space(
        tmp_path,
        {"optimizer.lr": {"loguniform": [1e-3, 1e-2]}},
        settings={"training.epochs": 15, "training.checkpoint_every": 20, "training.patience": 99},
        search={"trials": 4, "seeds": 0, "scheduler": "none", "concurrent": 1},
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "m5.cli", "tune", "--data", str(data), "--space", str(space), "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

        def middle() -> bool:
            """Two trials have ended, the third has been at it for a while."""
            return (
                sum(one["status"] == "finished" for one in records(out).values()) == 2
                and len(records(out).get("0002", {"history": []})["history"]) > 3
            )

        deadline = time.monotonic() + 240
        while not middle() and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert driver.poll() is None, (tmp_path / "log").read_text()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    deadline = time.monotonic() + 60
    while trial_processes(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert trial_processes(out) == [], "a trial lives on without its search"
    before = records(out)
    assert [before[name]["status"] for name in sorted(before)][:3] == ["finished", "finished", "running"]
    untouched = {name: os.stat(out / "trials" / name / "metrics.jsonl").st_mtime_ns for name in ("0000", "0001")}
    epochs = len((out / "trials" / "0002" / "metrics.jsonl").read_text().splitlines())
    # Ctrl-C, as soon as it has gone on: it says what to do, leaves a report, and keeps what was done.
    with (tmp_path / "log").open("w") as log:
        # A suite that runs in the background of a shell has SIGINT ignored, and hands that on.
        default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        driver = subprocess.Popen([*command, "--resume"], stdout=log, stderr=log, cwd=ROOT, preexec_fn=default)
        deadline = time.monotonic() + 120
        while records(out)["0002"]["attempts"] < 2 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130
    assert "the same command with --resume goes on" in (tmp_path / "log").read_text()
    assert (out / "report.html").is_file()
    assert records(out)["0002"]["status"] == "running"
    # As if it had been killed between its first validation and its first checkpoint: it has weights, and begins anew.
    shutil.rmtree(out / "trials" / "0002" / "checkpoints")
    assert (out / "trials" / "0002" / "best").is_dir()
    assert main([*command[3:], "--resume"]) == 0
    after = records(out)
    assert list(after) == [f"{place:04}" for place in range(4)]
    assert {one["status"] for one in after.values()} == {"finished"}
    for name, changed in untouched.items():
        assert after[name] == before[name]
        assert os.stat(out / "trials" / name / "metrics.jsonl").st_mtime_ns == changed
    # The third's log holds each epoch once.
    assert after["0002"]["attempts"] == 3
    assert [row["epoch"] for row in after["0002"]["history"]] == list(range(15))
    assert epochs > 3
    # Once more: nothing is left to do, and everything is left as it is.
    assert main([*command[3:], "--resume"]) == 0
    assert records(out) == after


def test_a_trial_of_two_ranks_is_one_world_by_ray_train(data: Path, tmp_path: Path) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    space = write_space(
        tmp_path,
        {"optimizer.lr": {"choice": [0.002, 0.004, 1e-7, 1e30]}},
        settings={"optimizer.table_lr": 1e-7, "training.epochs": 3},
        search={"trials": 4, "seeds": 0, "concurrent": 1},
        trial={"ranks": 2},
    )
    out = tmp_path / "out"
    search(preset="default", data=str(data), space=space, out=out, overrides=[])
    found = {one["values"]["optimizer.lr"]: one for one in records(out).values()}
    assert [row["epoch"] for row in found[0.002]["history"]] == [0, 1, 2]
    assert (found[1e30]["status"], found[1e30]["attempts"]) == ("failed", 1)
    assert "training diverged" in found[1e30]["reasons"][0]
    # The ranks of what ended early have ended with it: on two cores, the trials behind it could not have begun.
    assert found[1e-7]["status"] == "stopped"
    began = {one["name"]: one["began_at"] for one in found.values()}
    assert found[1e-7]["name"] < max(began), "choose another seed: the stopped trial is to be followed by others"
    assert sorted(began, key=lambda name: began[name]) == sorted(began)


@pytest.mark.parametrize("objective", ["constrained", "pareto"])
def test_objectives_beside_a_single_one(tmp_path: Path, objective: str) -> None:
    sections = {"kind": objective} | (
        {"tolerance": 0.5, "smallest_scenario": 100} if objective == "constrained" else {}
    )
    space = write_space(
        tmp_path,
        {"optimizer.lr": {"choice": [0.002, 0.004]}, "model.mixing": {"choice": ["smoe", "mlp"]}},
        search={"trials": 3, "seeds": 1},
        objective=sections,
    )
    out, data = tmp_path / "out", tmp_path / "data"
    write_world(data, users=800, rights=True, longest=30)
    summary = search(preset="default", data=str(data), space=space, out=out, overrides=[])
    assert summary.counts["finished"] + summary.counts["stopped"] == 3
    assert records(out)["0000"]["status"] == "finished", "the baseline, if one is needed, is trained to its end"
    assert summary.winner is not None
    if objective == "pareto":
        assert summary.winner in summary.pareto
        assert {path.stem for path in (out / "pareto").glob("*.yaml")} == {one.name for one in summary.pareto}
    else:
        scenarios = [name for name in records(out)["0000"]["history"][0] if name.startswith("ndcg@10/region=")]
        assert len(scenarios) >= 1
        assert "violation" in pd.read_parquet(out / "trials.parquet")
    assert summary.preset is not None
    # best.yaml is a preset as it is, and the seeds' runs are runs.
    config = RunConfig.read(out / "seeds" / "preset-1" / "config.yaml")
    assert config.seed == 1
    assert main(["train", "--preset", str(out / "best.yaml"), "--data", str(data), "--out", str(tmp_path / "run")]) == 0


def test_a_search_never_looks_at_the_test_period(data: Path, tmp_path: Path) -> None:
    """With all test events replaced by others, every number is the same."""
    space = write_space(
        tmp_path, {"optimizer.lr": {"choice": [0.002, 0.004]}}, search={"trials": 1, "seeds": 0, "scheduler": "none"}
    )
    outcomes = []
    for place in range(2):
        folder = tmp_path / f"data{place}"
        dataset = write_world(folder, users=120, rights=True, longest=30)
        if place:
            replace_test_titles(dataset)
        search(preset="default", data=str(folder), space=space, out=tmp_path / f"out{place}", overrides=[])
        history = records(tmp_path / f"out{place}")["0000"]["history"]
        outcomes.append([{k: v for k, v in row.items() if "@" in k or k == "n"} for row in history])
    assert outcomes[0] == outcomes[1]


def replace_test_titles(dataset: PreparedDataset) -> None:
    import numpy as np

    path = dataset.folder / "events" / "title.npy"
    titles = np.load(path)
    test = np.asarray(dataset.event_array("split")) == TEST
    assert test.any()
    titles[test] = (titles[test] + 7) % dataset.manifest.n_titles
    np.save(path, titles)


def test_a_cluster_without_room_for_a_trial_is_said(data: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, {"optimizer.lr": {"choice": [0.002, 0.004]}}, trial={"cpus": 1000})
    with pytest.raises(ConfigError, match=r"a trial of 1 x \(1000 CPUs, 0 GPUs\) has no room"):
        search(preset="default", data=str(data), space=space, out=tmp_path / "out", overrides=[])
