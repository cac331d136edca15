"""Windows, batches and their order: every target once, nothing from the future, the same for every world size."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from m5.batch import Batch
from m5.data.arrays import by_category, distinct_rows, sorted_by_value
from m5.data.loader import Loader, epoch_batches, training_windows
from m5.data.sequences import AGE_BUCKETS, BatchBuilder, age_bucket
from m5.schema import TRAIN
from tests.world import tiny_config, write_world

START, UNKNOWN = 0, 1


def builder_of(folder: Path, *overrides: str, split: str = "time", **world) -> BatchBuilder:
    dataset = write_world(folder / "data", split=split, **world)
    return BatchBuilder(dataset, tiny_config(folder / "data", folder / "run", *overrides))


def training_events(builder: BatchBuilder) -> np.ndarray:
    return np.flatnonzero(np.asarray(builder.dataset.event_array("split")) == TRAIN)


@pytest.mark.parametrize("split", ["time", "leave-last-out"])
@pytest.mark.parametrize(("history", "requests"), [(6, 6), (6, 2), (5, 1), (50, 50)])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_training_event_is_requested_once(
    tmp_path: Path, split: str, history: int, requests: int, epoch: int
) -> None:
    settings = (f"sequences.history={history}", f"sequences.requests={requests}")
    builder = builder_of(tmp_path, *settings, split=split, longest=25)
    loader = Loader(builder, seed=1, epoch=epoch)
    events = np.concatenate([batch.event_P.numpy() for batch in loader])
    np.testing.assert_array_equal(np.sort(events), training_events(builder))


@pytest.mark.parametrize("overrides", [(), ("sequences.requests=2",), ("sequences.requests=1",)])
def test_windows_stay_inside_one_user_and_the_history(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    builder = builder_of(tmp_path, *overrides, longest=25)
    windows = training_windows(builder, np.random.default_rng(0))
    offsets, settings = builder.dataset.offsets, builder.config.sequences
    user = np.searchsorted(offsets, windows.last, side="right") - 1
    assert (windows.start >= offsets[user]).all()
    assert (windows.start <= windows.first).all()
    assert (windows.first <= windows.last).all()
    assert (windows.last - windows.start <= settings.history).all()
    assert (windows.last - windows.first < settings.requests).all()
    # As much history as the model may read, unless the user has no more.
    full = windows.last - windows.start == settings.history
    assert (full | (windows.start == offsets[user])).all()


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_no_request_reads_its_target_or_later(tmp_path: Path, attention: str) -> None:
    """Rebuild each position's event from the request's own event: the inputs are the events just before it."""
    requests = 6 if attention == "causal" else 1
    builder = builder_of(tmp_path, f"model.attention={attention}", f"sequences.requests={requests}", longest=25)
    title, time = np.asarray(builder.title), np.asarray(builder.timestamp)
    seconds = builder.intensity[0]
    for batch in Loader(builder, seed=0, epoch=0):
        L = batch.size[1]
        for flat, event, target in zip(
            batch.request_P.tolist(), batch.event_P.tolist(), batch.target_P.tolist(), strict=True
        ):
            b, position = divmod(flat, L)
            assert target == title[event]
            assert batch.timestamp_P[batch.event_P == event] == time[event]
            assert batch.title_BL[b, 0] == builder.n_titles + START
            before = np.arange(event - position, event)
            np.testing.assert_array_equal(batch.title_BL[b, 1 : position + 1], title[before])
            np.testing.assert_array_equal(batch.category_BL[b, 1 : position + 1], builder.category[title[before]])
            combination = batch.subsidiary_BL[b, : position + 1]
            np.testing.assert_array_equal(
                batch.sparse["intensity_seconds"].values()[combination].numpy()[1:], seconds[before]
            )
            # An age reaches to the next watch, at most to the request.
            until = np.minimum(before + 1, event) if attention == "causal" else np.full(position, event)
            np.testing.assert_array_equal(
                batch.sparse["age"].values()[combination].numpy()[1:], age_bucket(time[until] - time[before])
            )
            if attention == "bidirectional":
                assert position + 1 == batch.length_B[b]


def test_a_training_batch_never_reads_later_periods(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, longest=25)
    split = np.asarray(builder.dataset.event_array("split"))
    windows = training_windows(builder, np.random.default_rng(0))
    assert all(
        (split[start : last + 1] == TRAIN).all() for start, last in zip(windows.start, windows.last, strict=True)
    )


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "sequences.requests=2", users=40)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([batch.last for batch in epoch_batches(builder, seed=seed, epoch=epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def same(first: Batch, second: Batch) -> bool:
    names = [name for name in vars(first) if name not in ("sparse", "experts", "group_sizes")]
    equal = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)
    equal &= first.group_sizes == second.group_sizes
    return equal and np.array_equal(first.sparse.values(), second.sparse.values())


def test_a_batch_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    drops = ("model.id_dropout=0.3", "model.scenario_dropout=0.3", "candidates.kind=sampled", "candidates.count=5")
    builder = builder_of(tmp_path, "sequences.requests=2", *drops, users=40)
    once, again = (list(Loader(builder, seed=3, epoch=1)) for _ in range(2))
    assert len(once) > 3
    assert all(same(first, second) for first, second in zip(once, again, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 9])  # of nine ranks one has nothing in a batch of eight
def test_ranks_partition_every_batch_and_share_candidates(tmp_path: Path, world_size: int) -> None:
    drops = ("model.id_dropout=0.3", "candidates.kind=sampled", "candidates.count=5")
    builder = builder_of(tmp_path, "sequences.requests=2", *drops, users=41)
    alone = list(Loader(builder, seed=0, epoch=0))
    ranks = [Loader(builder, seed=0, epoch=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(loader) for loader in ranks} == {len(alone)}
    for whole, *parts in zip(alone, *ranks, strict=True):
        events = np.concatenate([part.event_P.numpy() for part in parts])
        np.testing.assert_array_equal(np.sort(events), np.sort(whole.event_P.numpy()))
        assert {part.ranks_P for part in parts} == {tuple(len(part.event_P) for part in parts)}
        # The ranks' slices are the negatives, each once, and the same titles have lost their ID on all ranks.
        slices = [slice(len(part.log_q_C)) for part in parts]
        assert max(len(part.log_q_C) for part in parts) == parts[0].longest_slice
        for name in ("candidate_C", "log_q_C"):
            joined = np.concatenate([getattr(part, name)[cut] for part, cut in zip(parts, slices, strict=True)])
            np.testing.assert_array_equal(joined, getattr(whole, name)[: len(whole.log_q_C)])
        rows = [part.sparse["candidates"].values()[cut] for part, cut in zip(parts, slices, strict=True)]
        np.testing.assert_array_equal(np.concatenate(rows), whole.sparse["candidates"].values()[: len(whole.log_q_C)])
        for part in parts:
            np.testing.assert_array_equal(part.candidate_C[part.positive_P], part.target_P)


def sequences_of(batch: Batch) -> dict[tuple[int, ...], tuple]:
    """What chance decided, by the events that a sequence asks for."""
    row_P = (batch.request_P // batch.size[1]).tolist()
    hidden = set(batch.masked_Q.tolist())
    found = {}
    for row in set(row_P):
        mine = [place for place, owner in enumerate(row_P) if owner == row]
        masked = tuple(flat % batch.size[1] for flat in hidden if flat // batch.size[1] == row)
        scenario = tuple(map(tuple, batch.scenario_PM[mine].tolist()))
        found[tuple(batch.event_P[mine].tolist())] = (int(batch.draw_B[row]), scenario, sorted(masked))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_chance_decides_the_same_for_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    """Dropout keys, forgotten scenarios and masked titles belong to a sequence, whoever computes it."""
    drops = ("model.scenario_dropout=0.4", "model.mlm_weight=0.1", "model.mlm_share=0.3")
    paper = ("model.attention=bidirectional", "sequences.requests=1")
    builder = builder_of(tmp_path, *paper, *drops, users=41)
    ranks = [Loader(builder, seed=0, epoch=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(Loader(builder, seed=0, epoch=0), *ranks, strict=True):
        together = {}
        for part in parts:
            together |= sequences_of(part)
        assert together == sequences_of(whole)
        assert parts[0].ranks_Q == tuple(len(part.masked_Q) for part in parts)
        assert len(set(whole.draw_B.tolist())) == whole.size[0]


def test_in_batch_negatives_are_the_targets_of_all_ranks(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "candidates.kind=in-batch", users=20)
    batch = next(iter(Loader(builder, seed=0, epoch=0)))
    parts = [next(iter(Loader(builder, seed=0, epoch=0, rank=rank, world_size=2))) for rank in range(2)]
    targets = np.unique(np.concatenate([part.target_P for part in parts]))
    np.testing.assert_array_equal(batch.candidate_C, targets)
    np.testing.assert_array_equal(np.concatenate([part.candidate_C[: len(part.log_q_C)] for part in parts]), targets)
    count = builder.dataset.titles["train_count"].to_numpy()
    q = count[targets] / count.sum()
    np.testing.assert_allclose(batch.log_q_C, np.log(1 - (1 - q) ** len(batch.target_P)), rtol=1e-5)


def test_a_loader_can_begin_in_the_middle(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "sequences.requests=2", "model.id_dropout=0.3", users=40)
    whole = list(Loader(builder, seed=3, epoch=1))
    rest = Loader(builder, seed=3, epoch=1, first=2)
    assert len(rest) == len(whole) > 3
    assert all(same(first, second) for first, second in zip(rest, whole[2:], strict=True))


def test_sequences_per_epoch_is_a_random_part(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "sequences.requests=1", "sequences.sequences_per_epoch=20", users=30)
    epochs = [np.concatenate([b.last for b in epoch_batches(builder, seed=0, epoch=e)]) for e in range(2)]
    assert [len(np.unique(events)) for events in epochs] == [20, 20]
    assert set(epochs[0]) != set(epochs[1])


def test_sampled_negatives_and_their_log_q(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "candidates.kind=sampled", "candidates.count=7", "candidates.power=0.5")
    batch = next(iter(Loader(builder, seed=0, epoch=0)))
    negatives = batch.candidate_C[: len(batch.log_q_C)].numpy()
    count = builder.dataset.titles["train_count"].to_numpy()
    cold = builder.dataset.titles["cold"].to_numpy()
    weight = np.where(cold, 0, np.sqrt(count + 1.0))
    q = weight / weight.sum()
    assert len(np.unique(negatives)) == len(negatives) <= 7
    assert not cold[negatives].any()
    np.testing.assert_allclose(batch.log_q_C, np.log(1 - (1 - q[negatives]) ** 7), rtol=1e-5)
    np.testing.assert_array_equal(batch.candidate_C[batch.positive_P], batch.target_P)


def test_full_candidates_are_all_warm_titles(tmp_path: Path) -> None:
    builder = builder_of(tmp_path)
    batch = next(iter(Loader(builder, seed=0, epoch=0)))
    np.testing.assert_array_equal(batch.candidate_C, np.flatnonzero(~builder.dataset.titles["cold"]))
    assert not batch.log_q_C.any()
    np.testing.assert_array_equal(batch.candidate_C[batch.positive_P], batch.target_P)


def test_dropped_titles_lose_their_id_as_behaviour_and_as_candidate(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "model.id_dropout=0.5")
    batch = next(iter(Loader(builder, seed=0, epoch=0)))
    unknown = builder.n_titles + UNKNOWN
    candidate_rows = batch.sparse["candidates"].values()
    lost = set(batch.candidate_C[candidate_rows == unknown].tolist())
    assert 0.2 < len(lost) / len(batch.candidate_C) < 0.8
    titles = batch.title_BL.flatten()[batch.history_T].tolist()
    rows = batch.sparse["history"].values().tolist()
    assert rows == [unknown if title in lost else title for title in titles]


def test_evaluation_drops_nothing_but_cold_ids(tmp_path: Path) -> None:
    drops = ("model.id_dropout=0.5", "model.scenario_dropout=0.9")
    builder = builder_of(tmp_path, *drops)
    catalogue = builder.catalogue()
    np.testing.assert_array_equal(catalogue.candidate_C, np.arange(builder.n_titles))
    unknown = catalogue.sparse["candidates"].values().numpy() == builder.n_titles + UNKNOWN
    np.testing.assert_array_equal(unknown, builder.dataset.titles["cold"])
    batch = builder.build(builder.windows_before(builder.dataset.offsets[1:][2:] - 1), None)
    np.testing.assert_array_equal(batch.scenario_PM, batch.rights_PM)


def test_age_buckets() -> None:
    seconds = np.array([-5, 0, 1, 2, 3, 7, 2**40])
    assert age_bucket(seconds).tolist() == [1, 1, 2, 2, 3, 4, AGE_BUCKETS - 1]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "m5-loader"]


def test_thread_ends_when_the_consumer_leaves_early(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "sequences.requests=1", "sequences.sequences=2", users=30)
    batches = iter(Loader(builder, seed=0, epoch=0))
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()


def test_the_threads_exception_reaches_the_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = builder_of(tmp_path, "sequences.requests=1", users=30)
    loader = Loader(builder, seed=0, epoch=0)
    build, made = builder.build, []

    def broken(windows, generator, **part):
        made.append(windows)
        if len(made) == 2:
            raise OSError("disk is gone")
        return build(windows, generator, **part)

    monkeypatch.setattr(builder, "build", broken)
    batches = iter(loader)
    next(batches)
    with pytest.raises(OSError, match="disk is gone"):
        next(batches)
    assert not loader_threads()


# ---- what rows of a batch share --------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [3, 2**40])  # the second overflows a plain mixed-radix number
def test_distinct_rows(largest: int) -> None:
    values = np.random.default_rng(0).integers(0, 3, (50, 4)) * (largest // 2)
    first, place = distinct_rows(values)
    assert len(first) == len(np.unique(values, axis=0)) < len(values)
    np.testing.assert_array_equal(values[first][place], values)


@pytest.mark.parametrize("largest", [9, 2**17])  # the second is too wide for 16 bits
def test_sorted_by_value(largest: int) -> None:
    values = np.random.default_rng(0).choice([0, 3, largest], 40)
    distinct, counts, order = sorted_by_value(values)
    expected, expected_counts = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(distinct, expected)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(order, np.argsort(values, kind="stable"))


def test_rows_without_columns_are_one() -> None:
    first, place = distinct_rows(np.zeros((3, 0), dtype=np.int64))
    assert first.tolist() == [0] and place.tolist() == [0, 0, 0]


def test_by_category() -> None:
    order, sizes = by_category(np.array([[-1, 1, 0, 1], [-1, 3, 0, -1]]), 5)
    assert order.tolist() == [2, 6, 1, 3, 5]  # flat positions; in each category in the order of the sequences
    assert sizes == (2, 2, 0, 1, 0)
    nobody, none = by_category(np.full((2, 3), -1), 2)
    assert (nobody.tolist(), none) == ([], (0, 0))
