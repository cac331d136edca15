"""Rights as bits: equal to `Eligibility.mask` for any viewer, time and rights table, whatever was asked before."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from m5.eligibility import NEVER, Eligibility
from m5.schema import ALWAYS, DataError
from m5.serving.rights import Grant, RightsMasks

ORIGIN = 1_700_000_000


def eligibility(start_WSN: np.ndarray, end_WSN: np.ndarray, columns: list[int], sizes: list[int]) -> Eligibility:
    tensors = (torch.from_numpy(windows.astype(np.int32)) for windows in (start_WSN, end_WSN))
    return Eligibility(*tensors, ORIGIN, columns, sizes)


def random_rights(generator: np.random.Generator) -> Eligibility:
    """Windows that overlap, touch, are empty, begin before everything or never end, over 1 to 29 titles."""
    sizes = generator.integers(1, 4, size=generator.integers(0, 3)).tolist()
    shape = int(generator.integers(1, 4)), int(np.prod(sizes, dtype=int)), int(generator.integers(1, 30))
    start, end = generator.integers(-20, 20, shape), generator.integers(-20, 20, shape)
    start[generator.random(shape) < 0.2] = -NEVER
    end[generator.random(shape) < 0.2] = NEVER
    unused = generator.random(shape) < 0.2
    start[unused] = end[unused] = NEVER
    columns = generator.permutation(3)[: len(sizes)].tolist()
    return eligibility(start, end, columns, sizes)


def random_viewer(generator: np.random.Generator, rights: Eligibility) -> tuple[np.ndarray, int]:
    """Three scenario values, 0 (unknown) among them, and a time: mostly near the windows, some far outside."""
    scenario = np.zeros(3, dtype=np.int64)
    for column, size in zip(rights.columns, rights.sizes, strict=True):
        scenario[column] = generator.integers(size)
    near = int(generator.integers(-25, 26))
    far = int(generator.choice([-(2**40), 2**40, -NEVER, NEVER, NEVER - 1]))
    return scenario, ORIGIN + (near if generator.random() < 0.9 else far)


def unpacked(bits: np.ndarray, titles: int) -> np.ndarray:
    return np.unpackbits(bits, count=titles, bitorder="little").astype(bool)


def test_10_000_random_viewers_times_and_rights_tables() -> None:
    generator = np.random.default_rng(0)
    playable = 0
    for _ in range(500):
        rights = random_rights(generator)
        titles = rights.start_WSN.shape[2]
        masks = RightsMasks.compiled(rights, titles)
        for _ in range(20):  # times go forwards and backwards
            scenario, timestamp = random_viewer(generator, rights)
            expected = rights.mask(torch.from_numpy(scenario)[None], torch.tensor([timestamp]))[0].numpy()
            bits = masks.bits(scenario, timestamp)
            assert bits.dtype == np.uint8 and len(bits) == -(-titles // 8)
            np.testing.assert_array_equal(unpacked(bits, titles), expected)
            assert not np.unpackbits(bits, bitorder="little")[titles:].any()
            playable += int(expected.sum())
    assert 20_000 < playable < 130_000  # of 150,000 on average: the comparison is not of empty masks


def test_bit_order_is_that_of_faiss() -> None:
    start = np.full((1, 1, 10), NEVER)
    start[0, 0, [1, 9]] = 5
    masks = RightsMasks.compiled(eligibility(start, np.full_like(start, NEVER), [], []), 10)
    assert masks.bits(np.zeros(0, dtype=np.int64), ORIGIN + 4).tolist() == [0, 0]
    assert masks.bits(np.zeros(0, dtype=np.int64), ORIGIN + 5).tolist() == [0b10, 0b10]


def test_a_mask_that_was_handed_out_does_not_change() -> None:
    start = np.arange(27).reshape(1, 1, 27)
    masks = RightsMasks.compiled(eligibility(start, start + 3, [], []), 27)
    scenario = np.zeros(3, dtype=np.int64)
    early = masks.bits(scenario, ORIGIN)
    for moment in range(30):
        masks.bits(scenario, ORIGIN + moment)
    assert early.tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        early[0] = 1


def test_without_rights_everything_is_playable() -> None:
    masks = RightsMasks.compiled(None, 11)
    assert masks.bits(np.array([2, 0]), 0).tolist() == [255, 0b111]
    later = masks.with_titles([[Grant()], [Grant(start=100)]])
    assert later.bits(np.array([1]), 99).tolist() == [255, 0b1111]
    assert later.bits(np.array([1]), 100).tolist() == [255, 0b11111]


def test_threads_share_one() -> None:
    generator = np.random.default_rng(5)
    start = generator.integers(-500, 500, (2, 4, 301))
    rights = eligibility(start, start + generator.integers(1, 300, start.shape), [0], [4])
    masks = RightsMasks.compiled(rights, 301)
    scenario, time = generator.integers(4, size=(2_000, 1)), ORIGIN + generator.integers(-600, 900, 2_000)
    expected = rights.mask(torch.from_numpy(scenario), torch.from_numpy(time)).numpy()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(masks.bits, scenario, time.tolist()))
    np.testing.assert_array_equal([unpacked(bits, 301) for bits in found], expected)


@pytest.mark.parametrize(("scenario", "match"), [([3, 0], "no value 3"), ([-1, 0], "no value -1"), ([], "no value -1")])
def test_a_scenario_value_that_does_not_exist_is_refused(scenario: list[int], match: str) -> None:
    windows = np.zeros((1, 3, 4))
    masks = RightsMasks.compiled(eligibility(windows, windows + 1, [0], [3]), 4)
    with pytest.raises(ValueError, match=match):
        masks.bits(np.array(scenario, dtype=np.int64), ORIGIN)


# ---- titles that come later ----------------------------------------------------------------------------------


def test_added_titles_equal_titles_that_were_there_from_the_start() -> None:
    generator = np.random.default_rng(7)
    for _ in range(50):
        rights = random_rights(generator)
        titles = rights.start_WSN.shape[2]
        kept = int(generator.integers(0, titles + 1))
        before = RightsMasks.compiled(rights.of(torch.arange(kept)), kept)
        grants = []
        for title in range(kept, titles):
            rows = []
            for combination, values in enumerate(np.ndindex(*rights.sizes)):
                if 0 in values:  # a grant cannot say "unknown only"
                    continue
                start, end = rights.start_WSN[:, combination, title], rights.end_WSN[:, combination, title]
                scenario = dict(zip(rights.columns, values, strict=True))
                rows += [
                    Grant(ORIGIN + int(s), ORIGIN + int(e), scenario) for s, e in zip(start, end, strict=True) if s < e
                ]
            grants.append(rows)
        after = before.with_titles(grants)
        assert after.header.titles == titles
        for _ in range(20):
            scenario, timestamp = random_viewer(generator, rights)
            expected = rights.mask(torch.from_numpy(scenario)[None], torch.tensor([timestamp]))[0].numpy()
            if any(scenario[column] == 0 for column in rights.columns):
                expected[kept:] = False
            np.testing.assert_array_equal(unpacked(after.bits(scenario, timestamp), titles), expected)


def test_a_grant_for_any_value_reaches_unknown_viewers_and_a_named_one_does_not() -> None:
    nothing = np.full((1, 6, 1), NEVER)
    masks = RightsMasks.compiled(eligibility(nothing, nothing, [0, 2], [3, 2]), 1)
    grants = [[Grant()], [Grant(scenario={0: 2})], [Grant(scenario={0: 2, 2: 1})], [], [Grant(ORIGIN, ORIGIN + 5)]]
    masks = masks.with_titles(grants)

    def playable(viewer: list[int], moment: int = 0) -> list[int]:
        return np.flatnonzero(unpacked(masks.bits(np.array(viewer), ORIGIN + moment), 6)).tolist()

    assert playable([0, 0, 0]) == [1, 5]
    assert playable([2, 0, 0]) == [1, 2, 5]
    assert playable([2, 7, 1]) == [1, 2, 3, 5]
    assert playable([1, 0, 1]) == [1, 5]
    assert playable([1, 0, 1], moment=-1) == [1]
    assert playable([1, 0, 1], moment=5) == [1]


@pytest.mark.parametrize("scenario", [{1: 1}, {0: 3}, {0: -1}])
def test_a_grant_that_rights_cannot_follow_is_refused(scenario: dict[int, int]) -> None:
    windows = np.zeros((1, 3, 4))
    masks = RightsMasks.compiled(eligibility(windows, windows + 1, [0], [3]), 4)
    with pytest.raises(ValueError, match="rights know no value"):
        masks.with_titles([[Grant(scenario=scenario)]])


# ---- files ---------------------------------------------------------------------------------------------------


def kept(seed: int = 11) -> tuple[dict, dict[str, np.ndarray], RightsMasks]:
    generator = np.random.default_rng(seed)
    start = generator.integers(-50, 50, (2, 3, 13))
    masks = RightsMasks.compiled(eligibility(start, start + 20, [1], [3]), 13)
    return json.loads(json.dumps(masks.header.model_dump())), masks.arrays(), masks


def test_kept_and_restored() -> None:
    header, arrays, masks = kept()
    assert header == {"origin": ORIGIN, "titles": 13, "columns": [1], "sizes": [3]}
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "base": "uint8",
        "first": "int64",
        "time": "int32",
        "title": "int32",
    }
    again = RightsMasks.restored(header, arrays)
    for moment in range(-60, 80, 7):
        viewer = np.array([0, moment % 3])
        np.testing.assert_array_equal(again.bits(viewer, ORIGIN + moment), masks.bits(viewer, ORIGIN + moment))


def changed(name: str, change) -> tuple[dict, dict[str, np.ndarray]]:
    header, arrays, _ = kept()
    return header, arrays | {name: change(arrays[name].copy())}


def put(place: int | tuple[int, int], value: int):
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("base", lambda a: a[:, :1], "masks of shape"),
        ("base", lambda a: a[:2], "masks of shape"),
        ("base", lambda a: a.astype(np.int64), "no uint8 array"),
        ("base", put((0, 1), 0b100000), "do not exist"),
        ("first", lambda a: a[1:], "bounds"),
        ("first", put(0, 1), "bounds"),
        ("first", put(1, -1), "bounds"),
        ("first", put(1, 2**60), "bounds"),
        ("time", lambda a: a[:-1], "bounds"),
        ("time", lambda a: a[::-1].copy(), "ascend"),
        ("time", lambda a: a.reshape(1, -1), "no int32 array"),
        ("title", lambda a: a[:-1], "as many titles"),
        ("title", put(0, 13), "does not exist"),
        ("title", put(0, -1), "does not exist"),
    ],
)
def test_damaged_arrays_are_refused(name: str, change, match: str) -> None:
    with pytest.raises(DataError, match=match):
        RightsMasks.restored(*changed(name, change))


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [2]},
        {"sizes": [3, 1]},
        {"sizes": [-3]},
        {"columns": [-1]},
        {"titles": 17},
        {"titles": -1},
        {"origin": "soon"},
        {"more": 1},
    ],
)
def test_a_damaged_header_is_refused(change: dict) -> None:
    header, arrays, _ = kept()
    with pytest.raises(DataError, match="damaged"):
        RightsMasks.restored(header | change, arrays)


def test_a_missing_array_is_told() -> None:
    header, arrays, _ = kept()
    del arrays["time"]
    with pytest.raises(DataError, match="time is missing"):
        RightsMasks.restored(header, arrays)


def test_windows_of_another_catalogue_are_refused() -> None:
    with pytest.raises(ValueError, match="4 titles for a catalogue of 5"):
        RightsMasks.compiled(eligibility(np.zeros((1, 1, 4)), np.ones((1, 1, 4)), [], []), 5)
    assert ALWAYS < ORIGIN - NEVER  # an open start lies before every window's
