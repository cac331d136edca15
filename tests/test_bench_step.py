"""What `step`, `scaling` and `embedding` compute themselves: parts of a step, efficiencies, floors. No times."""

from __future__ import annotations

from itertools import count, islice

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import scaling, step, workload
from benchmarks.embedding import floor_bytes, zipf_ids
from benchmarks.ranks import Found, Job
from benchmarks.scaling import APART, STRONG, THREADS, WEAK, Case, up_to
from benchmarks.step_parts import PARTS, UPDATE, Timeline, lookup_nodes, split, watched
from m5.batch import Batch
from m5.data.sequences import BatchBuilder
from m5.parallel import World, world
from m5.step import Stepper

TINY = ("sequences.sequences=6", "sequences.history=10", "sequences.requests=10", "model.width=16", "model.blocks=1")


def test_time_in_an_inner_part_is_not_the_outer_ones() -> None:
    clock = count()  # every look at it takes a second
    timeline = Timeline(lambda: next(clock), lambda first, second: second - first)

    def inner() -> None:
        timeline.around("innermost", lambda: None)()

    def outer() -> None:
        timeline.around("inner", inner)()
        timeline.around("inner", inner)()

    timeline.around("outer", outer)()
    timeline._now()  # between two calls of the outer one, hence nobody's
    timeline.around("outer", lambda: None)()
    # Stamps: outer 0, inner 1, innermost 2, left 3, 4, inner 5, innermost 6, left 7, 8, left 9; outer 11, left 12.
    assert timeline.totals() == {"outer": 1 + 1 + 1 + 1, "inner": 2 + 2, "innermost": 1 + 1}


def test_a_part_that_fails_is_left() -> None:
    timeline = Timeline.on(torch.device("cpu"))

    def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        timeline.around("part", fails)()
    assert not timeline._open


def made(place: World) -> tuple[Stepper, list[Batch]]:
    dataset = workload.made_dataset(users=30, length=20, titles=50, content_width=8)
    config = workload.settings(*TINY)
    batches = workload.endless(BatchBuilder(dataset, config), config, place)
    return workload.stepper(dataset, config, place), list(islice(batches, 2))


def test_a_watched_step_is_the_same_step() -> None:
    def weights(stepper: Stepper) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in stepper.dense.items()}

    with world("cpu") as place:
        plain, batches = made(place)
        other, _ = made(place)
        expected = [plain.step(batch, 0.1).loss for batch in batches]
        with watched(other, Timeline.on(place.device)):
            found = [other.step(batch, 0.1).loss for batch in batches]
        assert found == pytest.approx(expected, rel=1e-6)
        for name, weight in weights(plain).items():
            torch.testing.assert_close(weights(other)[name], weight, rtol=1e-4, atol=1e-6)
        assert "step" not in vars(other) and "forward" not in vars(other.model.module.model), "still wrapped"


def test_every_part_of_a_step_is_seen() -> None:
    with world("cpu") as place:
        stepper, batches = made(place)
        loss, _ = stepper.model(batches[0])
        assert len(list(lookup_nodes(loss))) == 2, "of titles with features, and of experts"
        seconds = split(stepper, batches)
    assert list(seconds) == list(PARTS)
    missing = [part for part, value in seconds.items() if not value and part != "all-reduce beyond backward"]
    assert not missing
    assert seconds[UPDATE] > 0


def test_the_page_of_several_ranks() -> None:
    job = Job(workload.settings(*TINY), {"users": 30, "length": 20, "titles": 50}, rounds=2, steps=2, threads=1)
    ranks = [
        Found([1.0, 2.0], [0.1, 0.1], [100, 100], [6, 6], [dict.fromkeys(PARTS, 0.05)] * 2, {"resident": 10**9}),
        Found([1.0, 4.0], [0.3, 0.3], [100, 100], [4, 4], [dict.fromkeys(PARTS, 0.05)] * 2, {"resident": 2 * 10**9}),
    ]
    rows = {row[""]: row for row in step.report(ranks, job, "cpu").rows}
    assert rows["targets, all ranks"]["value"].median == (100 / 1 + 100 / 4) / 2  # the slowest clock counts
    assert rows["sequences, a rank"]["value"].median == (10 / 1 + 10 / 4) / 2 / 2
    assert rows["data wait"]["value"].median == pytest.approx(1000 * 0.2 / 2)  # mean of ranks, by steps
    other = [1 - 0.2 - 9 * 0.05, 4 - 0.2 - 9 * 0.05]
    assert rows["other"]["value"].median == pytest.approx(1000 * sum(other) / 2 / 2)
    assert rows["other"]["share"] == f"{100 * sum(other) / 5:.1f}%"
    assert rows["peak memory, resident, a rank"]["value"] == 2.0


def test_efficiency_is_against_as_much_hardware() -> None:
    job = Job(workload.settings(*TINY), None, rounds=1, steps=1, threads=1)
    listed = scaling.cases([1, 2], 6, 1, "cpu", smoke=False)
    assert listed == [
        Case(scaling.ALONE, 1, 1, 6),
        Case(WEAK, 2, 1, 12),
        Case(APART, 2, 1, 6),
        Case(STRONG, 2, 1, 6),
        Case(THREADS, 1, 2, 6),
    ]

    def found(*seconds: float, targets: int) -> list[Found]:
        return [Found([t], [0.0], [targets], [6], memory={"resident": 1}) for t in seconds]

    turn = dict(
        zip(
            listed,
            (
                found(1.0, targets=60),
                found(1.5, 1.6, targets=120),  # targets are those of both ranks
                found(1.25, 2.0, targets=60),  # and here of each
                found(0.8, 0.8, targets=60),
                found(0.75, targets=60),
            ),
            strict=True,
        )
    )
    rows = {row[""]: row["efficiency"].median for row in scaling.report(listed, [turn], job, "cpu").rows}
    assert rows["one rank"] == 1
    assert rows[WEAK] == pytest.approx((120 / 1.6) / (2 * 60))
    assert rows[APART] == pytest.approx((60 / 1.25 + 60 / 2) / (2 * 60))
    assert rows[STRONG] == pytest.approx((60 / 0.8) / (2 * 60))
    assert rows[THREADS] == pytest.approx((60 / 0.75) / (2 * 60))


def test_numbers_of_ranks_reach_all_cores() -> None:
    assert [up_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_zipf() -> None:
    ids = zipf_ids(1000, 200_000)
    assert ids.min() >= 0 and ids.max() < 1000
    frequent = np.sort(np.bincount(ids, minlength=1000))[::-1]
    # The r-th most frequent has log((r + 1) / r) / log(rows + 1) of them.
    assert frequent[0] / len(ids) == pytest.approx(np.log(2) / np.log(1001), rel=0.03)
    assert frequent[1] / len(ids) == pytest.approx(np.log(3 / 2) / np.log(1001), rel=0.03)
    assert np.argmax(np.bincount(ids)) != 0, "frequent rows lie together"


def test_floor_counts_what_must_move() -> None:
    # 10 lookups of 4 distinct rows of 8 float32 and a sum of squares.
    assert floor_bytes(10, 4, 8) == (10 * 32 + 10 * 32, 10 * 32 + 10 * 32 + 10 * 32 + 2 * 4 * 36)
