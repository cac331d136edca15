"""Training that is interrupted goes on as if it had not been: resumed, stopped by a signal, killed, on other ranks."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import chaos
from benchmarks.soak import audit
from m5.checkpoint_files import newest
from m5.cli import main
from m5.config import ConfigError
from m5.data.loader import Loader
from m5.parallel import world
from m5.replay import load_batch, replay, save_batch
from m5.resume import Position, Stopped
from m5.schema import DataError
from m5.step import NonFinite
from m5.train import Trainer, train
from tests.world import TINY, tiny_config, write_world

DROPS = ("model.dropout=0.2", "model.id_dropout=0.1", "model.scenario_dropout=0.1")
# Epochs of unequal length under a schedule that plans with their number.
UNEQUAL = ("optimizer.schedule=cosine", "sequences.requests=2", "sequences.sequences=7")
LONG = (
    *("training.epochs=5", "training.log_every=1", "training.checkpoint_every=3", "training.patience=99"),
    *DROPS,
    *UNEQUAL,
)
KILLS = 12  # benchmarks/soak.py kills for half an hour


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "data"
    write_world(folder, users=60, rights=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_config(data, run, *LONG))
    return run


def test_epochs_differ_in_length(data: Path, tmp_path: Path) -> None:
    """Else the tests below could not see a schedule that is planned anew."""
    with world("cpu") as place:
        trainer = Trainer(tiny_config(data, tmp_path / "run", *LONG), place)
        assert len({len(trainer.loader(Position(epoch=epoch))) for epoch in range(5)}) > 1


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "best" / "weights.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """The process gets a signal while it takes that step."""
    build, made = Trainer._steps, []

    def steps(self, *arguments):
        for taken in build(self, *arguments):
            made.append(taken)
            if len(made) == step:
                os.kill(os.getpid(), number)
            yield taken

    monkeypatch.setattr(Trainer, "_steps", steps)


# ---- stopping and going on, one rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 37])
@pytest.mark.parametrize("pipeline", ["false", "true"])
def test_a_stopped_training_goes_on_as_the_uninterrupted_one(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, pipeline: str
) -> None:
    """Same weights, bit by bit, same losses; also in the pipeline, which has read two batches ahead."""
    config = tiny_config(data, tmp_path / "run", *LONG, f"training.pipeline={pipeline}")
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Stopped, match=rf"stopped at step {step + 1} and saved in .*--resume") as caught:
            train(config)
    assert caught.value.signal == signal.SIGTERM
    torch.manual_seed(step)  # no random state of torch's or NumPy's plays a part
    np.random.seed(step)  # noqa: NPY002
    metrics = train(config, resume="yes")
    assert_same_weights(undisturbed, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert metrics == json.loads((undisturbed / "best" / "checkpoint.json").read_text())["valid"]


def test_a_finished_training_is_not_trained_again(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    metrics = train(tiny_config(data, tmp_path / "run", *LONG), resume="yes")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert metrics == json.loads((undisturbed / "best" / "checkpoint.json").read_text())["valid"]


def test_resume_begins_where_there_is_nothing(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    train(tiny_config(data, tmp_path / "run", *LONG), resume="yes")
    assert_same_weights(undisturbed, tmp_path / "run")


@pytest.fixture
def stopped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in its first epoch, by Ctrl-C."""
    with monkeypatch.context() as patch:
        stop_at(4, patch, signal.SIGINT)
        with pytest.raises(Stopped) as caught:
            train(tiny_config(data, tmp_path / "run", *LONG))
    assert caught.value.signal == signal.SIGINT
    return tmp_path / "run"


def test_an_unfinished_run_is_not_lost_by_accident(data: Path, stopped: Path, undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"unfinished training \(5 steps taken\).*--resume.*--restart"):
        train(tiny_config(data, stopped, *LONG))
    train(tiny_config(data, stopped, *LONG), resume="over")
    assert_same_weights(undisturbed, stopped)
    assert losses(stopped) == losses(undisturbed)


def test_a_run_goes_on_with_its_own_settings(data: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot resume: optimizer\.lr was 0\.002 and is 0\.1"):
        train(tiny_config(data, stopped, *LONG, "optimizer.lr=0.1"), resume="yes")
    write_world(tmp_path / "other", users=60, rights=True, seed=1)
    with pytest.raises(ConfigError, match="cannot resume: the dataset is another one"):
        train(tiny_config(tmp_path / "other", stopped, *LONG), resume="yes")


def test_settings_that_change_nothing_may_change(data: Path, stopped: Path, undisturbed: Path) -> None:
    other = ("training.log_every=7", "training.checkpoint_every=50", "sequences.prefetch=3", "training.pipeline=true")
    train(tiny_config(data, stopped, *LONG, *other), resume="yes")
    assert_same_weights(undisturbed, stopped)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, damage: str
) -> None:
    config = tiny_config(data, tmp_path / "run", *LONG)
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(Stopped):
            train(config)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000008"
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    train(config, resume="yes")
    said = capfd.readouterr().err
    assert "step-00000008 is not used" in said
    assert victim.name in said
    assert "resumed at step 6" in said
    assert_same_weights(undisturbed, tmp_path / "run")


def test_the_command_tells_how_to_go_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = ["train", "--data", str(data), "--out", str(tmp_path / "run"), *TINY, *LONG]
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert main(arguments) == 128 + signal.SIGTERM
    assert "The same command with --resume goes on" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--restart" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert not any((tmp_path / "run").glob("checkpoints/.*"))


def test_only_the_last_checkpoints_are_kept(undisturbed: Path) -> None:
    steps = losses(undisturbed)[-1][0]
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert len(kept) == 2
    assert kept[-1].startswith(f"step-{steps:08d}")


def test_a_signal_during_validation_is_heeded_after_it(data: Path, tmp_path: Path, monkeypatch) -> None:
    """Not two steps later, which may be minutes: torchrun waits half a minute."""
    measure = Trainer._measure

    def asked(self, state):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, state)

    config = tiny_config(data, tmp_path / "run", *LONG)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_measure", asked)
        with pytest.raises(Stopped):
            train(config)
    record = newest(tmp_path / "run" / "checkpoints")
    assert (record["position"]["epoch"], record["position"]["batch"]) == (1, 0)


# ---- a loss that is not finite ---------------------------------------------------------------------------------------


@pytest.fixture
def diverged(tmp_path: Path) -> Path:
    """A run whose tables overflow: the learning rate is absurd."""
    write_world(tmp_path / "data", users=60, rights=True)
    config = tiny_config(tmp_path / "data", tmp_path / "run", "optimizer.table_lr=1e38", "model.score=dot", *DROPS)
    with pytest.raises(ConfigError, match=r"diverged: the loss is (nan|inf) at step \d+ .*m5 replay"):
        train(config)
    assert not (tmp_path / "run" / "best").exists()
    return tmp_path / "run"


def test_the_batch_of_a_loss_that_is_not_finite_is_kept(diverged: Path, capsys) -> None:
    found = replay(diverged)
    assert not np.isfinite(found["loss"])
    assert found["module"] is not None
    position = json.loads((diverged / "replay" / "step.json").read_text())
    assert int(position["step"]) >= 1
    assert main(["replay", str(diverged)]) == 0
    assert f"step {position['step']}" in capsys.readouterr().out


def test_weights_that_are_not_finite_displace_no_checkpoint(tmp_path: Path) -> None:
    """The tables overflow in a step whose loss and gradient still are numbers."""
    write_world(tmp_path / "data", users=60, rights=True)
    absurd = ("optimizer.table_lr=1e38", "model.score=dot", "training.checkpoint_every=1")
    with pytest.raises(ConfigError, match=r"diverged: weights are not finite after step 1\."):
        train(tiny_config(tmp_path / "data", tmp_path / "run", *absurd))
    assert newest(tmp_path / "run" / "checkpoints") is None


def test_a_gradient_that_is_not_finite_is_not_stepped_with(data: Path, tmp_path: Path) -> None:
    with world("cpu") as place:
        trainer = Trainer(tiny_config(data, tmp_path / "run"), place)
        name, parameter = next(iter(trainer.stepper.dense.items()))
        parameter.register_hook(lambda gradient: gradient * torch.inf)
        before = parameter.detach().clone()
        with pytest.raises(NonFinite, match="the gradient's norm is"):
            trainer.stepper.step(next(iter(trainer.loader(Position()))), 1.0)
        assert torch.equal(parameter, before), name


def test_nothing_of_an_earlier_run_is_lost_by_accident(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A repeated command, damaged checkpoints, a refused resumption, a stranger's folder, a second start."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)

    def refused(match: str, resume: str = "no", *overrides: str) -> None:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        with pytest.raises((ConfigError, DataError), match=match):
            train(tiny_config(data, run, *LONG, *overrides), resume=resume)
        assert {path: path.read_bytes() for path in before} == before

    refused("holds a finished training")
    refused(r"cannot resume: model\.width was 16 and is 32", "yes", "model.width=32")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("is in use", "over")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "checkpoint.json").write_text("{")
    refused("without a checkpoint that can be read")
    refused("no checkpoint can be read", "yes")
    shutil.rmtree(run / "checkpoints")
    refused("no checkpoint to resume from", "yes")
    (run / "config.yaml").write_text("server: {port: 80}")
    refused("not a run of m5", "over")


def test_a_run_that_has_kept_no_batch_says_so(undisturbed: Path) -> None:
    with pytest.raises(DataError, match="has kept no batch"):
        replay(undisturbed)


@pytest.mark.parametrize("overrides", [(), ("model.content=[]", "model.mixing=mmoe"), ("candidates.kind=in-batch",)])
def test_a_kept_batch_is_the_batch(data: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    with world("cpu") as place:
        trainer = Trainer(tiny_config(data, tmp_path / "run", *overrides), place)
        batch = next(iter(Loader(trainer.builder, seed=0, epoch=0)))
        save_batch(batch, tmp_path / "batch.safetensors")
        again = load_batch(tmp_path / "batch.safetensors")
        trainer.model.eval()
        with torch.no_grad():
            assert torch.equal(trainer.model(batch)[0], trainer.model(again)[0])
    assert again.ranks_P == batch.ranks_P


# ---- ranks that are killed -------------------------------------------------------------------------------------------


def arguments(data: Path, out: Path, *overrides: str) -> list[str]:
    return ["--preset", "default", "--data", str(data), "--out", str(out), *TINY, *LONG, *overrides]


STORMY = ("training.checkpoint_every=1", "training.epochs=8")


@pytest.fixture(scope="module")
def calm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    outcome = chaos.run(arguments(data, folder / "run", *STORMY), folder / "run", log=folder / "log")
    assert outcome.code == 0, outcome.output
    return folder / "run"


@pytest.mark.distributed
@pytest.mark.slow
def test_many_kills_change_nothing(data: Path, calm: Path, tmp_path: Path) -> None:
    """kill -9 of a random rank at random moments; torchrun restarts; the weights are the undisturbed run's."""
    generator = np.random.default_rng(0)
    outcome = chaos.run(
        arguments(data, tmp_path / "run", *STORMY),
        tmp_path / "run",
        log=tmp_path / "log",
        kills=KILLS,
        pause=lambda: float(generator.uniform(0, 0.4)),
    )
    assert outcome.code == 0, outcome.output[-5000:]
    assert len(outcome.kills) == KILLS
    assert {kill.rank for kill in outcome.kills} == {0, 1}
    assert_same_weights(calm, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(calm)


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(data: Path, calm: Path, tmp_path: Path) -> None:
    """From 2 ranks to 1: the data goes on where it was, the weights differ by rounding alone."""
    out = tmp_path / "run"
    command = chaos.command(arguments(data, out, *STORMY), ranks=2, restarts=0)
    log = (tmp_path / "log").open("w")
    job = subprocess.Popen(command, env=chaos.environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while chaos.steps_taken(out) < 6 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # torchrun hands it on
        job.wait(60)
    finally:
        if job.poll() is None:
            job.kill()
        log.close()
    assert "stopped at step" in (tmp_path / "log").read_text()
    single = [sys.executable, "-m", "m5.train", *arguments(data, out, *STORMY), "--resume"]
    done = subprocess.run(single, env=chaos.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    ours, theirs = losses(calm), losses(out)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    np.testing.assert_allclose([loss for _, loss in theirs], [loss for _, loss in ours], rtol=2e-4)


@pytest.mark.distributed
def test_a_refused_job_stays_refused_when_torchrun_starts_it_again(data: Path, stopped: Path, tmp_path: Path) -> None:
    before = (stopped / "metrics.jsonl").read_text()
    command = chaos.command(arguments(data, stopped), ranks=2, restarts=1)
    done = subprocess.run(command, env=chaos.environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert done.stderr.count("holds an unfinished training") == 2 * 2  # two ranks, two starts
    assert (stopped / "metrics.jsonl").read_text() == before


@pytest.mark.distributed
@pytest.mark.slow
def test_a_training_that_stalls_ends_with_the_stacks_of_its_ranks(data: Path, tmp_path: Path) -> None:
    """One rank is stopped (SIGSTOP) in the middle: the other one names it, and torchrun ends with an error."""
    out = tmp_path / "run"
    settings = ("training.epochs=500", "training.stall_seconds=5")
    command = chaos.command(arguments(data, out, *settings), ranks=2, restarts=0)
    with (tmp_path / "log").open("w") as log:
        quick = chaos.environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
        job = subprocess.Popen(command, env=quick, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while newest(out / "checkpoints") is None and time.monotonic() < deadline:
                time.sleep(0.1)
            chaos.ranks_of(job)[1].suspend()
            assert job.wait(120) != 0
        finally:
            if job.poll() is None:
                job.kill()
    said = (tmp_path / "log").read_text()
    assert "training has stalled: for 5 s no rank has made progress" in said
    assert said.index("rank 1: not heard of") < said.index("rank 0: no progress")
    stack = (out / "stalls" / "rank-0.txt").read_text()
    # The signal falls where it falls: in a step, a validation, a checkpoint. All are below the loop.
    assert re.search(r'\(training\):\n(  File .*\n)+?  File ".*m5/train\.py", line \d+, in run\n', stack)
    # What was saved before is whole.
    assert newest(out / "checkpoints")["step"] >= 3


@pytest.mark.distributed
def test_every_event_is_trained_on_once_through_kills(data: Path, tmp_path: Path) -> None:
    """The audit of `benchmarks.soak`, which notes what each rank has trained on; and that it sees what is wrong."""
    out = tmp_path / "run"
    overrides = [*TINY, *LONG, "training.epochs=3"]
    outcome = chaos.run(
        ["--rank", "default", str(data), str(out), *overrides],
        out,
        log=tmp_path / "log",
        kills=2,
        module="benchmarks.soak",
    )
    assert outcome.code == 0, outcome.output[-5000:]
    found = audit(out)
    assert found["every_event_once"] and found["repeated_alike"]
    assert (found["epochs"], found["repeated"] > 0) == (3, True)
    note = sorted((out / "audit").glob("[!.]*.npy"))[0]
    events = np.load(note)
    np.save(note, np.append(events, events[:1]))
    assert not audit(out)["every_event_once"] or not audit(out)["repeated_alike"]
