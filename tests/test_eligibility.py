"""Rights and release dates: against a slow reference, and the edges of windows by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m5.eligibility import Eligibility, Playable
from m5.schema import ALWAYS, TRAIN, PreparedDataset
from tests.handmade import rights_table, write_handmade

FOREVER = -ALWAYS


def world(folder: Path, *, titles: int, origin: int = 1000, rows=None, released=None, scenarios: bool = True):
    return write_handmade(
        folder,
        [[(0, origin, TRAIN)]],
        titles=titles,
        scenario=[[(1, 1)]] if scenarios else None,
        released=released,
        rights=None if rows is None else rights_table(rows),
    )


def reference_mask(dataset: PreparedDataset, scenario: list[tuple[int, int]], timestamp: list[int]) -> np.ndarray:
    """The definition, request by request, title by title, row by row."""
    playable = np.zeros((len(timestamp), dataset.manifest.n_titles), dtype=bool)
    for request, (viewer, time) in enumerate(zip(scenario, timestamp, strict=True)):
        for title, released in enumerate(dataset.titles["released"]):
            covered = dataset.rights is None
            for row in [] if covered else dataset.rights.to_dict("records"):
                matches = row["region"] in (0, viewer[0]) and row["plan"] in (0, viewer[1])
                covered |= row["title"] == title and matches and row["start"] <= time < row["end"]
            playable[request, title] = covered and released <= time
    return playable


def mask(dataset: PreparedDataset, scenario: list[tuple[int, int]], timestamp: list[int]) -> np.ndarray:
    eligibility = Eligibility.from_dataset(dataset, "cpu")
    assert eligibility is not None
    return eligibility.mask(torch.tensor(scenario), torch.tensor(timestamp)).numpy()


def test_nothing_to_restrict_compiles_to_none(tmp_path):
    assert Eligibility.from_dataset(world(tmp_path, titles=3)) is None


def test_windows_are_half_open_and_may_be_disjoint(tmp_path):
    dataset = world(tmp_path, titles=1, rows=[(0, 0, 0, 10, 20), (0, 0, 0, 30, 40)])
    times = [9, 10, 19, 20, 29, 30, 39, 40]
    expected = [False, True, True, False, False, True, True, False]
    assert mask(dataset, [(1, 1)] * len(times), times)[:, 0].tolist() == expected


def test_any_row_reaches_unknown_viewers_and_a_named_row_does_not(tmp_path):
    dataset = world(tmp_path, titles=3, rows=[(0, 0, 0, 0, 9), (1, 1, 0, 0, 9), (2, 1, 2, 0, 9)])
    viewers = [(0, 0), (1, 0), (1, 2), (2, 2), (0, 2)]
    expected = [
        [True, False, False],
        [True, True, False],
        [True, True, True],
        [True, False, False],
        [True, False, False],
    ]
    assert mask(dataset, viewers, [5] * 5).tolist() == expected


def test_a_title_without_a_row_is_never_playable(tmp_path):
    assert mask(world(tmp_path, titles=2, rows=[(0, 0, 0, ALWAYS, FOREVER)]), [(1, 1)], [0]).tolist() == [[True, False]]


def test_release_date_cuts_the_window_and_works_without_rights_or_scenarios(tmp_path):
    both = world(tmp_path / "both", titles=2, released=[50, ALWAYS], rows=[(0, 0, 0, 0, 60), (1, 0, 0, 0, 60)])
    assert mask(both, [(0, 0)] * 3, [49, 50, 60]).tolist() == [[False, True], [True, True], [False, False]]
    alone = world(tmp_path / "alone", titles=2, released=[50, ALWAYS], scenarios=False)
    playable = Eligibility.from_dataset(alone).mask(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([49, 50]))
    assert playable.tolist() == [[False, True], [True, True]]


def test_an_empty_rights_table_allows_nothing(tmp_path):
    assert not mask(world(tmp_path, titles=2, rows=[]), [(1, 1)], [0]).any()


def test_times_far_beyond_int32_keep_their_side(tmp_path):
    century = 3_200_000_000
    dataset = world(tmp_path, titles=3, rows=[(0, 0, 0, ALWAYS, FOREVER), (1, 0, 0, century, FOREVER), (2, 0, 0, 0, 9)])
    assert mask(dataset, [(1, 1)] * 2, [1_800_000_000, -century]).tolist() == [[True, False, False]] * 2


def test_overlapping_rows_share_one_slot(tmp_path):
    rows = [(0, 0, 0, 0, 10), (0, 1, 0, 5, 15), (0, 1, 1, 15, 30), (0, 1, 1, 2, 3), (0, 0, 0, 0, 10)]
    eligibility = Eligibility.from_dataset(world(tmp_path, titles=1, rows=rows))
    assert eligibility.start_WSN.shape == (1, 3 * 3, 1)


moment = st.integers(-3, 12)
row = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), moment, moment)
request = st.tuples(st.tuples(st.integers(0, 2), st.integers(0, 2)), moment)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(row, max_size=12),
    released=st.lists(st.one_of(moment, st.just(ALWAYS)), min_size=3, max_size=3),
    requests=st.lists(request, min_size=1, max_size=8),
    with_rights=st.booleans(),
)
def test_equals_the_definition(rows, released, requests, with_rights):
    scenario, timestamp = [viewer for viewer, _ in requests], [time for _, time in requests]
    with tempfile.TemporaryDirectory() as folder:
        dataset = world(Path(folder) / "d", titles=3, origin=4, rows=rows if with_rights else None, released=released)
        eligibility = Eligibility.from_dataset(dataset)
        expected = reference_mask(dataset, scenario, timestamp)
        if eligibility is None:
            assert expected.all()
        else:
            actual = eligibility.mask(torch.tensor(scenario), torch.tensor(timestamp)).numpy()
            np.testing.assert_array_equal(actual, expected)
            for title in range(3):
                one = torch.full((len(timestamp),), title)
                allowed = eligibility.allows(torch.tensor(scenario), torch.tensor(timestamp), one).numpy()
                np.testing.assert_array_equal(allowed, expected[:, title])


@pytest.mark.parametrize("batch", [1, 5])
def test_mask_shape_and_type(tmp_path, batch):
    eligibility = Eligibility.from_dataset(world(tmp_path, titles=4, rows=[(0, 0, 0, 0, 9)]))
    playable = eligibility.mask(torch.zeros(batch, 2, dtype=torch.int64), torch.full((batch,), 5))
    assert playable.shape == (batch, 4)
    assert playable.dtype == torch.bool
    assert playable[:, 0].all()


def test_masks_over_candidates_are_columns_of_the_whole_mask(tmp_path):
    """Also where candidates change from batch to batch and back, and where a rank's slice is empty."""
    dataset = world(tmp_path, titles=4, released=[0, 50, 0, 0], rows=[(t, t % 3, 0, 10 * t, 90) for t in range(4)])
    scenario, time = torch.tensor([(1, 1), (2, 0), (0, 2)]), torch.tensor([15, 60, 89])
    whole = Eligibility.from_dataset(dataset).mask(scenario, time)
    assert 0 < whole.sum() < whole.numel()
    playable = Playable(Eligibility.from_dataset(dataset))
    for titles in ([3, 1], [3, 1], [0, 1, 2, 3], [], [2]):
        candidates = torch.tensor(titles, dtype=torch.int64)
        for rows in (slice(0, 2), slice(2, 3)):  # as the loss asks, chunk by chunk
            assert torch.equal(playable(scenario[rows], time[rows], candidates), whole[rows][:, candidates])
