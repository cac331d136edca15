"""Checkpoints of several ranks, of real TorchRec objects: any number of ranks reads them, a lost rank harms none."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

import m5.checkpoint
from benchmarks.invariance import whole
from m5.checkpoint import Checkpoints
from m5.checkpoint_files import newest
from m5.data.loader import Loader
from m5.parallel import World, training_state
from m5.train import Trainer
from tests.world import tiny_config, write_world

pytestmark = pytest.mark.distributed

# Processes are forked from one that has imported torch and TorchRec: a second each instead of six.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["m5.train"])
BEFORE, AFTER = 3, 2  # steps before and after the checkpoint
LIMIT = 120.0


def run_ranks(size: int, work: Callable, *arguments) -> list[int | None]:
    """Run `work(place, *arguments)` on as many processes; their exit codes."""
    store = Path(arguments[0]) / f"store-{time.monotonic_ns()}"
    processes = [FORKS.Process(target=_rank, args=(rank, size, store, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, "some rank hangs"
    return [process.exitcode for process in processes]


def _rank(rank: int, size: int, store: Path, work: Callable, arguments: tuple) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT)
    )
    work(World(rank, size, torch.device("cpu")), *arguments)
    dist.destroy_process_group()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return training_state(trainer.model, trainer.stepper.optimizer, trainer.stepper.dense)


def trainer_of(folder: Path, place: World, seed: int, sharding: str) -> Trainer:
    settings = ("sequences.sequences=3", f"seed={seed}", f"sharding.default={sharding}")
    return Trainer(tiny_config(folder / "data", folder / "run", *settings), place)


def take_steps(trainer: Trainer, place: World, first: int, last: int) -> None:
    """Train on some batches of the epoch; the order is that of seed 0, whatever the trainer's own."""
    trainer.model.train()
    loader = Loader(trainer.builder, seed=0, epoch=0, rank=place.rank, world_size=place.size)
    taken = 0
    for number, batch in enumerate(loader):
        if first <= number < last:
            trainer.stepper.step(batch, 1.0)
            taken += 1
    assert taken == last - first


def _train_and_save(place: World, folder: Path) -> None:
    trainer = trainer_of(folder, place, seed=0, sharding="row_wise")
    take_steps(trainer, place, 0, BEFORE)
    state = state_of(trainer)
    saved = whole(state)
    with Checkpoints(folder / "checkpoints", keep=2, place=place) as checkpoints:
        checkpoints.save(state, {"step": BEFORE})
        take_steps(trainer, place, BEFORE, BEFORE + AFTER)  # while the background writes
    last = whole(state_of(trainer))
    if place.first:
        torch.save((saved, last), folder / "expected.pt")


def _load_and_go_on(place: World, folder: Path, sharding: str) -> None:
    """Load into a trainer that began elsewhere; where nothing else differs, go on as the first one did."""
    trainer = trainer_of(folder, place, seed=1, sharding=sharding)
    state = state_of(trainer)
    before = whole(state)
    with Checkpoints(folder / "checkpoints", keep=2, place=place) as checkpoints:
        assert checkpoints.load(state) == {"step": BEFORE}
    # Asked of the model and the optimizers anew: did the values reach what they train with?
    after = whole(state_of(trainer))
    if place.first:
        saved, _ = torch.load(folder / "expected.pt")
        assert after.keys() == saved.keys()
        assert all(torch.equal(after[key], saved[key]) for key in saved)
        changed = {key.split(".")[0] for key in saved if not torch.equal(before[key], saved[key])}
        assert changed == {"weights", "table_optimizer", "optimizer"}
    if place.size != 2 or sharding != "row_wise":
        return
    take_steps(trainer, place, BEFORE, BEFORE + AFTER)
    last = whole(state_of(trainer))
    if place.first:
        _, expected = torch.load(folder / "expected.pt")
        assert all(torch.equal(last[key], expected[key]) for key in expected)
        assert any(not torch.equal(last[key], after[key]) for key in last if key.startswith("table_optimizer"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, and what they had."""
    folder = tmp_path_factory.mktemp("ranks")
    write_world(folder / "data", users=60, rights=True)
    assert run_ranks(2, _train_and_save, folder) == [0, 0]
    return folder


@pytest.mark.parametrize(("size", "sharding"), [(1, "row_wise"), (2, "row_wise"), (4, "row_wise"), (4, "table_wise")])
def test_two_ranks_save_and_any_number_loads(trained: Path, size: int, sharding: str) -> None:
    """Bitwise, weights and momenta; two ranks then go on as the ones that were not interrupted did."""
    assert run_ranks(size, _load_and_go_on, trained, sharding) == [0] * size


def test_both_ranks_write_tables(trained: Path) -> None:
    files = {path.name for path in (trained / "checkpoints" / "step-00000003").iterdir()}
    assert files == {"__0_0.distcp", "__1_0.distcp", ".metadata", "checkpoint.json"}


def table(place: World, number: float, rows: int = 40) -> dict[str, Tensor]:
    """A row-wise sharded table and a plain tensor that tell which save they came from."""
    each = rows // place.size
    shard = Shard.from_tensor_and_offsets(torch.full((each, 4), number), [each * place.rank, 0], place.rank)
    return {"table": init_from_local_shards([shard], rows, 4), "plain": torch.full((3,), number)}


def assert_number(state: dict[str, Tensor], number: float) -> None:
    (shard,) = state["table"].local_shards()
    assert bool((shard.tensor == number).all()) and bool((state["plain"] == number).all())


def _trouble_on_one_rank(place: World, folder: Path) -> None:
    """A disk that is full for one rank, then a file of one rank that is damaged: all ranks see it."""
    with Checkpoints(folder / "checkpoints", keep=2, place=place) as checkpoints:
        for step in (1, 2):
            checkpoints.save(table(place, step), {"step": step})
        checkpoints.wait()
        describe = m5.checkpoint.mark_of
        if place.rank == 1:

            def fail(path: Path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

            m5.checkpoint.mark_of = fail
        checkpoints.save(table(place, 3), {"step": 3})
        with pytest.raises(OSError) as caught:
            checkpoints.wait()
        assert caught.value.errno == errno.ENOSPC and "__1_0" in caught.value.filename
        m5.checkpoint.mark_of = describe
        dist.barrier()  # the first rank removes what was written, in its own time
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}
        if place.first:
            os.truncate(folder / "checkpoints" / "step-00000002" / "__1_0.distcp", 100)
        dist.barrier()
        state = table(place, 0)
        assert checkpoints.load(state) == {"step": 1}
        assert_number(state, 1)
        checkpoints.save(table(place, 4), {"step": 4})
        checkpoints.wait()
        assert checkpoints.load(state) == {"step": 4}
        assert_number(state, 4)


def test_trouble_on_one_rank_is_seen_by_all(tmp_path: Path) -> None:
    assert run_ranks(2, _trouble_on_one_rank, tmp_path) == [0, 0]


def _lose_a_rank(place: World, folder: Path, how: int) -> None:
    """The second rank is lost while the second checkpoint is written."""
    m5.checkpoint.LAST_WAIT_SECONDS = 2.0
    with Checkpoints(folder / "checkpoints", keep=2, place=place) as checkpoints:
        checkpoints.save(table(place, 1), {"step": 1})
        checkpoints.wait()
        if place.rank == 1:
            m5.checkpoint.mark_of = lambda path: os.kill(os.getpid(), how)
        checkpoints.save(table(place, 2), {"step": 2})
        if how == signal.SIGKILL or place.rank == 1:
            checkpoints.wait()
        # What a training does whose watchdog has seen that the other rank hangs.
        (folder / "leaving").touch()
        sys.exit(3)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stalled"])
def test_a_lost_rank_neither_hangs_the_others_nor_harms(tmp_path: Path, how: int) -> None:
    store = tmp_path / "store"
    processes = [FORKS.Process(target=_rank, args=(rank, 2, store, _lose_a_rank, (tmp_path, how))) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        processes[0].join(30)
        assert processes[0].exitcode not in (None, 0)
        if how == signal.SIGSTOP:
            assert processes[0].exitcode == 3
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert newest(tmp_path / "checkpoints") == {"step": 1}
    assert run_ranks(1, _load_first, tmp_path) == [0]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000001"}


def _load_first(place: World, folder: Path) -> None:
    state = table(place, 0)
    with Checkpoints(folder / "checkpoints", keep=2, place=place) as checkpoints:
        assert checkpoints.load(state) == {"step": 1}
    assert_number(state, 1)
