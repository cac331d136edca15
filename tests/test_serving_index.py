"""The four indices: only allowed titles, as many as there are, in a fixed order, and close to the exact answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from m5.schema import DataError
from m5.serving.index import KINDS, Index, IndexKind, build_index, restored_index
from m5.serving.rights import RightsMasks
from m5.serving.scan import Int8, quantised
from tests.test_serving_rights import random_rights, random_viewer

each_kind = pytest.mark.parametrize("kind", KINDS)


def reference(key_NQ: np.ndarray, query_Q: np.ndarray, k: int, allowed_N: np.ndarray) -> list[int]:
    """The definition: sort all allowed titles by score, then by number."""
    score = key_NQ.astype(np.float64) @ query_Q.astype(np.float64)
    return sorted(np.flatnonzero(allowed_N).tolist(), key=lambda title: (-score[title], title))[:k]


def packed(allowed_BN: np.ndarray) -> np.ndarray:
    return np.packbits(allowed_BN, axis=1, bitorder="little")


def clustered(titles: int, queries: int, width: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys as training leaves them: a short half and a layer-normalised one, both around some themes."""
    generator = np.random.default_rng(seed)
    theme = generator.normal(size=(30, 2 * width))
    key = theme[generator.integers(30, size=titles)] + 0.7 * generator.normal(size=(titles, 2 * width))
    key[:, :width] *= generator.lognormal(0, 0.3, (titles, 1)) / np.sqrt(width)
    key[:, width:] *= np.sqrt(width) / np.linalg.norm(key[:, width:], axis=1, keepdims=True)
    query = key[generator.integers(titles, size=queries)] + 0.5 * generator.normal(size=(queries, 2 * width))
    return key.astype(np.float32), query.astype(np.float32)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(exact, found, strict=True)]))


def searching(index: Index) -> Index:
    """The same; an approximate one searches even where a scan of so few titles would cost less."""
    if hasattr(index, "worth"):
        index.worth = 0
    return index


# ---- rights --------------------------------------------------------------------------------------------------


@each_kind
def test_10_000_random_viewers_get_no_title_that_they_may_not_play(kind: IndexKind) -> None:
    """Random rights tables, times and exclusions; and they get as many titles as there are."""
    generator = np.random.default_rng(KINDS.index(kind))
    found_titles = 0
    for _ in range(200):
        rights = random_rights(generator)
        titles = rights.start_WSN.shape[2]
        masks = RightsMasks.compiled(rights, titles)
        index = build_index(generator.normal(size=(titles, 8)).astype(np.float32), kind)
        index = searching(index) if generator.random() < 0.5 else index
        scenario, timestamp = zip(*(random_viewer(generator, rights) for _ in range(50)), strict=True)
        allowed = rights.mask(torch.from_numpy(np.stack(scenario)), torch.tensor(timestamp)).numpy()
        excluded = [generator.choice(titles, generator.integers(titles // 3 + 1)) for _ in timestamp]
        for row, title in enumerate(excluded):
            allowed[row, title] = False
        bits, k = np.stack(list(map(masks.bits, scenario, timestamp))), int(generator.integers(1, 12))
        found = index.search(generator.normal(size=(50, 8)).astype(np.float32), k, bits, excluded)
        there = found.title_BR >= 0
        assert np.take_along_axis(allowed, found.title_BR, axis=1)[there].all()
        assert (there.sum(axis=1) == np.minimum(k, allowed.sum(axis=1))).all()
        assert (np.diff(there.astype(int), axis=1) <= 0).all()  # what is missing is at the end
        assert np.isneginf(found.score_BR[~there]).all() and np.isfinite(found.score_BR[there]).all()
        assert all(len(np.unique(title[title >= 0])) == (title >= 0).sum() for title in found.title_BR)
        found_titles += int(there.sum())
    assert 15_000 < found_titles < 60_000


@each_kind
@pytest.mark.parametrize("eligible", [0, 1, 200, 2_500, 4_000])
def test_all_eligible_titles_come_back(kind: IndexKind, eligible: int) -> None:
    """Also the 200 of a plan that has exactly 200 of 5,000, and the half that lies farthest from the query."""
    key, query = clustered(5_000, 5)
    index = searching(build_index(key, kind))
    farthest = np.argsort(key @ query.T, axis=0)[:eligible].T
    allowed = np.zeros((5, 5_000), dtype=bool)
    np.put_along_axis(allowed, farthest, True, axis=1)
    found = index.search(query, 200, packed(allowed))
    exact = build_index(key, "exact").search(query, 200, packed(allowed))
    assert ((found.title_BR >= 0).sum(axis=1) == min(200, eligible)).all()
    assert [allowed[row, title[title >= 0]].all() for row, title in enumerate(found.title_BR)] == [True] * 5
    if kind != "ivfpq":
        assert recall(found.title_BR, exact.title_BR) >= 0.98


@each_kind
def test_excluded_titles_make_room_for_the_next(kind: IndexKind) -> None:
    key, query = clustered(500, 2)
    index = build_index(key, kind)
    before = index.search(query, 20)
    without = index.search(query, 20, None, [before.title_BR[0, :5], np.zeros(0, dtype=np.int64)])
    assert without.title_BR[0, :15].tolist() == before.title_BR[0, 5:].tolist()
    assert without.title_BR[1].tolist() == before.title_BR[1].tolist()


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
@pytest.mark.parametrize("rights", [False, True])
def test_what_was_watched_is_searched_around_and_not_scanned_for(
    kind: IndexKind, rights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all that a viewer has watched lies right before them."""
    key, query = clustered(5_000, 20)
    exact, index = build_index(key, "exact"), build_index(key, kind)
    allowed = packed(np.random.default_rng(0).random((20, 5_000)) < 0.8) if rights else None
    watched = list(exact.search(query, 40, allowed).title_BR)
    expected = exact.search(query, 50, allowed, watched)
    if rights:
        searching(index)  # so few titles would else be scanned
    for scan in (Int8, type(exact)):
        monkeypatch.setattr(scan, "search", lambda *arguments: pytest.fail("scanned"))
    found = index.search(query, 50, allowed, watched)
    assert (found.title_BR >= 0).all()
    assert not any(np.isin(one, other).any() for one, other in zip(found.title_BR, watched, strict=True))
    assert recall(found.title_BR, expected.title_BR) >= (0.98 if kind == "hnsw" else 0.9)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_where_most_was_watched_the_rest_is_scanned(kind: IndexKind, monkeypatch: pytest.MonkeyPatch) -> None:
    key, query = clustered(5_000, 1)
    index, exact = build_index(key, kind), build_index(key, "exact")
    watched = [np.arange(4_000)]
    monkeypatch.setattr(type(index), "_searched", lambda *arguments: pytest.fail("searched"))
    found = index.search(query, 50, None, watched)
    assert recall(found.title_BR, exact.search(query, 50, None, watched).title_BR) >= 0.98


# ---- order and quality ---------------------------------------------------------------------------------------


@each_kind
def test_order_is_by_score_then_title(kind: IndexKind) -> None:
    """Many titles with one key: the first of them, in every repetition, alone or in a batch."""
    key = np.zeros((100, 8), dtype=np.float32)
    key[:, 0] = 1
    key[[90, 70], 0] = 2
    query = np.eye(1, 8, dtype=np.float32)
    index = build_index(key, kind)
    found = index.search(np.repeat(query, 3, axis=0), 100)
    assert found.title_BR.tolist() == [[70, 90, *range(70), *range(71, 90), *range(91, 100)]] * 3
    assert found.score_BR[0, :3].tolist() == [2, 2, 1]
    if kind in ("exact", "int8"):
        assert index.search(query, 5).title_BR.tolist() == [[70, 90, 0, 1, 2]]
        odd = packed(np.arange(100)[None] % 2 == 1)
        assert index.search(query, 5, odd).title_BR.tolist() == [[1, 3, 5, 7, 9]]


@each_kind
def test_answers_do_not_depend_on_the_batch(kind: IndexKind) -> None:
    key, query = clustered(1_000, 8)
    allowed = packed(np.random.default_rng(0).random((8, 1_000)) < np.linspace(0.01, 1, 8)[:, None])
    index = build_index(key, kind)
    together = index.search(query, 30, allowed)
    for row in range(8):
        alone = index.search(query[row : row + 1], 30, allowed[row : row + 1])
        assert alone.title_BR[0].tolist() == together.title_BR[row].tolist()


@each_kind
def test_threads_share_one(kind: IndexKind) -> None:
    key, query = clustered(2_000, 64)
    allowed = packed(np.random.default_rng(0).random((64, 2_000)) < np.linspace(0.01, 1, 64)[:, None])
    index = build_index(key, kind)
    together = index.search(query, 50, allowed).title_BR.tolist()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            alone = pool.map(lambda row: index.search(query[row : row + 1], 50, allowed[row : row + 1]), range(64))
            assert [found.title_BR[0].tolist() for found in alone] == together


@pytest.mark.parametrize("share", [1.0, 0.5, 0.14, 0.01])
def test_exact_equals_sorting(share: float) -> None:
    key, query = clustered(700, 6)
    allowed = np.random.default_rng(1).random((6, 700)) < share
    found = build_index(key, "exact").search(query, 50, packed(allowed))
    for row in range(6):
        expected = reference(key, query[row], 50, allowed[row])
        assert found.title_BR[row, : len(expected)].tolist() == expected
        np.testing.assert_allclose(found.score_BR[row, : len(expected)], key[expected] @ query[row], atol=1e-4)


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.998), ("hnsw", 0.98), ("ivfpq", 0.9)])
def test_recall_on_clustered_keys(kind: IndexKind, least: float) -> None:
    key, query = clustered(6_000, 60)
    found, exact = build_index(key, kind).search(query, 200), build_index(key, "exact").search(query, 200)
    assert recall(found.title_BR, exact.title_BR) >= least
    found_titles = found.title_BR[0]
    np.testing.assert_allclose(found.score_BR[0], key[found_titles] @ query[0], atol=1e-4)  # exact scores


@each_kind
def test_more_results_than_titles(kind: IndexKind) -> None:
    key, query = clustered(13, 2)
    found = build_index(key, kind).search(query, 20)
    assert sorted(found.title_BR[0, :13].tolist()) == list(range(13))
    assert found.title_BR[:, 13:].tolist() == [[-1] * 7] * 2
    assert np.isneginf(found.score_BR[:, 13:]).all()
    assert found.score_BR.dtype == np.float32 and found.title_BR.dtype == np.int64


# ---- int8 ----------------------------------------------------------------------------------------------------


def test_quantised_vectors() -> None:
    vector = np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [127.0, 1.0, -0.4]], dtype=np.float32)
    integer, scale = quantised(vector)
    assert integer.tolist() == [[64, -127, 32], [0, 0, 0], [127, 1, 0]]
    np.testing.assert_allclose(scale, [2 / 127, 0, 1])


def test_int8_products_do_not_overflow() -> None:
    """The worst there is: 128 products of 127 by 127, which 16-bit sums could not hold."""
    key = np.full((40, 128), 127, dtype=np.int8)
    key[1::2] = -127
    index = Int8(key, np.ones(40, dtype=np.float32))
    found = index.search(np.full((1, 128), 127, dtype=np.float32), 40)
    assert found.score_BR[0].tolist() == [127.0 * 127 * 128] * 20 + [-127.0 * 127 * 128] * 20


def test_int8_without_float_keys_scores_by_what_it_has() -> None:
    key, query = clustered(2_000, 20)
    integer, scale = quantised(key)
    lean = restored_index(None, "int8", {"key8": integer, "scale": scale})
    exact = build_index(key, "exact").search(query, 100)
    found = lean.search(query, 100)
    assert recall(found.title_BR, exact.title_BR) >= 0.97
    title = found.title_BR[0]
    np.testing.assert_allclose(found.score_BR[0], (integer[title] * scale[title, None]) @ query[0], rtol=1e-4)


# ---- refusals ------------------------------------------------------------------------------------------------


def small(kind: IndexKind) -> Index:
    return build_index(clustered(50, 1, width=4)[0], kind)


@each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_refused(kind: IndexKind, value: float) -> None:
    query = np.ones((2, 8), dtype=np.float32)
    query[1, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        small(kind).search(query, 5)


@each_kind
def test_shapes_that_do_not_fit_are_refused(kind: IndexKind) -> None:
    index, query = small(kind), np.ones((2, 8), dtype=np.float32)
    for wrong, match in (
        (lambda: index.search(query[:, :7], 5), "width 8"),
        (lambda: index.search(query[0], 5), "width 8"),
        (lambda: index.search(query, 0), "at least 1"),
        (lambda: index.search(query, 5, np.zeros((2, 6), dtype=np.uint8)), "masks of shape"),
        (lambda: index.search(query, 5, np.zeros((1, 7), dtype=np.uint8)), "masks of shape"),
        (lambda: index.search(query, 5, np.zeros((2, 7), dtype=bool)), "masks of shape"),
        (lambda: index.search(query, 5, None, [np.array([1])]), "exclusions of 1"),
        (lambda: index.search(query, 5, None, [np.array([50]), np.array([1])]), "none of the 50 titles"),
        (lambda: index.search(query, 5, None, [np.array([-1]), np.array([1])]), "none of the 50 titles"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
    assert index.search(query[:0], 5).title_BR.shape == (0, 5)


@each_kind
@pytest.mark.parametrize("key", [np.zeros((0, 8)), np.zeros(8), np.full((3, 8), np.nan)])
def test_keys_that_are_none_are_refused(kind: IndexKind, key: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at least one title|not finite"):
        build_index(key.astype(np.float32), kind)


# ---- files, and titles that come later -----------------------------------------------------------------------


@each_kind
def test_kept_and_restored(kind: IndexKind) -> None:
    key, query = clustered(1_000, 10)
    index = build_index(key, kind)
    again = restored_index(key, kind, {name: array.copy() for name, array in index.state().items()})
    allowed = packed(np.random.default_rng(2).random((10, 1_000)) < 0.7)
    for mask in (None, allowed):
        before, after = index.search(query, 50, mask), again.search(query, 50, mask)
        assert after.title_BR.tolist() == before.title_BR.tolist()
        assert after.score_BR.tolist() == before.score_BR.tolist()
    assert again.kind == kind and again.titles == 1_000
    added = again.with_titles(key[:3])
    assert added.titles == 1_003


@each_kind
def test_built_again_it_is_the_same(kind: IndexKind) -> None:
    key, _ = clustered(1_000, 1)
    first, second = build_index(key, kind).state(), build_index(key, kind).state()
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("kind", ["int8", "hnsw", "ivfpq"])
def test_a_state_that_does_not_fit_is_refused(kind: IndexKind) -> None:
    key, _ = clustered(300, 1)
    state = build_index(key, kind).state()
    other = build_index(key, "hnsw" if kind == "ivfpq" else "ivfpq").state()
    for wrong_key, wrong_state in ((key[:200], state), (key[:, :40], state), (key, {}), (key, other)):
        with pytest.raises(DataError, match="index is"):
            restored_index(wrong_key, kind, wrong_state)


@each_kind
def test_added_titles_are_found_and_the_old_index_stays(kind: IndexKind) -> None:
    key, query = clustered(1_000, 4)
    index = build_index(key, kind)
    before = index.search(query, 10)
    added = index.with_titles(np.concatenate([1.1 * query, -query]))  # the best title for each query, and the worst
    assert (index.titles, added.titles) == (1_000, 1_008)
    found = added.search(query, 10)
    best = np.argmax(query @ (1.1 * query).T, axis=1) + 1_000
    assert found.title_BR[:, 0].tolist() == best.tolist()
    assert index.search(query, 10).title_BR.tolist() == before.title_BR.tolist()
    only_new = np.zeros((4, 1_008), dtype=bool)
    only_new[:, 1_000:] = True
    alone = added.search(query, 10, packed(only_new))
    assert (np.sort(alone.title_BR[:, :8], axis=1) == np.arange(1_000, 1_008)).all()
