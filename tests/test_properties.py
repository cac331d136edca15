"""Properties of the whole model with random weights, from event arrays to queries, keys and recommendations."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m5.assemble import build_model
from m5.data.sequences import BatchBuilder, Windows
from m5.predict import Predictor
from m5.recommend import ad_hoc_viewer, known_viewer, latest_time, recommend_titles
from m5.viewer import Viewer
from tests.world import REGIONAL, tiny_config, write_world

TITLES, USERS, REGIONS = 30, 12, 3
MODELS = {
    "causal": ("sequences.history=8", "sequences.requests=8"),
    "bidirectional": ("model.attention=bidirectional", "sequences.history=8", "sequences.requests=1"),
    "mmoe, dot": ("model.mixing=mmoe", "model.score=dot"),
    "plain": ("model.mixing=mlp", "model.content=[]", "model.subsidiary=false", "model.categories=false"),
}
WORLDS = TemporaryDirectory(prefix="m5-properties-")  # removed when the process ends
quick = settings(max_examples=8, deadline=None, derandomize=True)
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def predictor(name: str) -> Predictor:
    """A model with random weights, biases included, so that nothing is hidden by a zero."""
    folder = Path(WORLDS.name) / str(len(list(Path(WORLDS.name).iterdir())))
    dataset = write_world(folder / "data", users=USERS, titles=TITLES, regions=REGIONS, rights=True, longest=20)
    drops = ("model.dropout=0.5", "model.id_dropout=0.5", "model.scenario_dropout=0.5")  # evaluation must not use them
    config = tiny_config(folder / "data", folder / "run", *drops, *MODELS[name])
    model = build_model(dataset, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Predictor(model, BatchBuilder(dataset, config), config, torch.device("cpu"))


def queries(name: str, windows: Windows, builder: BatchBuilder | None = None) -> Tensor:
    answering = predictor(name)
    return answering.forward((builder or answering.builder).build(windows, None)).query_PQ.clone()


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def n_events() -> int:
    return predictor("causal").dataset.manifest.n_events


events = st.lists(st.integers(0, 10_000), min_size=2, max_size=8).map(lambda xs: np.array(xs) % n_events())


@every_model
@quick
@given(event=events)
def test_padding_never_matters(name: str, event: np.ndarray) -> None:
    """A sequence answers alone as it does padded among longer ones."""
    builder = predictor(name).builder
    together = queries(name, builder.windows_before(event))
    for row in range(len(event)):
        close(together[row : row + 1], queries(name, builder.windows_before(event[row : row + 1])))


@every_model
@quick
@given(event=events, seed=st.integers(0, 100))
def test_order_of_the_batch_never_matters(name: str, event: np.ndarray, seed: int) -> None:
    builder, order = predictor(name).builder, np.random.default_rng(seed).permutation(len(event))
    windows = builder.windows_before(event)
    close(queries(name, windows)[torch.from_numpy(order)], queries(name, windows[order]))


def altered_from(builder: BatchBuilder, event: int, generator: np.random.Generator) -> BatchBuilder:
    """A builder whose world differs in all that a request for `event` must not know."""
    changed = BatchBuilder(builder.dataset, builder.config)
    later = slice(event + 1, None)
    changed.title = np.array(builder.title)
    changed.title[event:] = generator.integers(0, TITLES, len(changed.title[event:]))
    changed.intensity = [values.copy() for values in builder.intensity]
    for values in changed.intensity:
        values[event:] = generator.integers(0, 5, len(values[event:]))
    changed.timestamp = np.array(builder.timestamp)
    changed.timestamp[later] += generator.integers(1, 10**7, len(changed.timestamp[later]))
    changed.scenario = [np.array(values) for values in builder.scenario]
    changed.context = [np.array(values) for values in builder.context]
    for values in [*changed.scenario, *changed.context]:
        values[later] = generator.integers(0, 3, len(values[later]))
    return changed


@every_model
@quick
@given(seed=st.integers(0, 1000))
def test_the_target_and_the_future_never_matter(name: str, seed: int) -> None:
    """All requests up to an event stay the same when that event's title, watch time and
    everything after it change; the window itself runs on into the changed part."""
    answering, generator = predictor(name), np.random.default_rng(seed)
    builder, offsets = answering.builder, answering.dataset.offsets
    user = int(generator.choice(np.flatnonzero(np.diff(offsets) >= 3)))
    event = int(generator.integers(offsets[user] + 1, offsets[user + 1]))
    changed = altered_from(builder, event, generator)
    if answering.config.model.attention == "bidirectional":
        windows, kept = builder.windows_before(np.array([event])), 1
    else:
        start, last = max(offsets[user], event - 5), min(offsets[user + 1] - 1, event + 2)
        windows = Windows(*(np.array([value]) for value in (start, last, start)))
        kept = event - start + 1
    before, after = queries(name, windows), queries(name, windows, changed)
    close(before[:kept], after[:kept])
    if len(before) > kept:  # later requests do read what changed, so the comparison above could have failed
        assert not torch.allclose(before[kept:], after[kept:], rtol=1e-4, atol=1e-4)


@every_model
def test_the_past_matters(name: str) -> None:
    """The counterpart of causality: an earlier title does change the query."""
    answering = predictor(name)
    builder = answering.builder
    user = int(np.argmax(np.diff(answering.dataset.offsets)))
    event = int(answering.dataset.offsets[user]) + 6
    changed = BatchBuilder(builder.dataset, builder.config)
    changed.title = np.array(builder.title)
    changed.title[event - 2] = (changed.title[event - 2] + 7) % (TITLES - 4)
    windows = builder.windows_before(np.array([event]))
    assert not torch.allclose(queries(name, windows), queries(name, windows, changed), rtol=1e-3, atol=1e-3)


@every_model
@quick
@given(region=st.integers(0, REGIONS), plan=st.integers(0, 2), watched=st.integers(0, 3))
def test_any_scenario_and_any_history_give_finite_scores(name: str, region: int, plan: int, watched: int) -> None:
    """Unknown scenario values (0) and viewers without history included."""
    answering = predictor(name)
    viewer = ad_hoc_viewer(answering.dataset, ";".join(f"t{i}" for i in range(watched)))
    viewer = Viewer(**{**vars(viewer), "scenario": {"region": region, "plan": plan}})
    answer = recommend_titles(answering, viewer, k=TITLES)
    assert np.isfinite([item.score for item in answer]).all()
    assert len(answer) >= TITLES - REGIONAL - 1 - watched


@every_model
@quick
@given(
    region=st.integers(0, REGIONS),
    watched=st.lists(st.integers(0, TITLES - 1), max_size=10),
    k=st.integers(1, TITLES),
    filter_seen=st.booleans(),
)
def test_recommended_are_the_best_playable_titles(
    name: str, region: int, watched: list[int], k: int, filter_seen: bool
) -> None:
    """Never one whose rights are another region's or have ended, nor a seen one; and of the others, the best."""
    answering = predictor(name)
    viewer = ad_hoc_viewer(answering.dataset, ";".join(f"t{i}" for i in watched))
    viewer = Viewer(**{**vars(viewer), "scenario": {"region": region}})
    answer = recommend_titles(answering, viewer, k=k, filter_seen=filter_seen)
    forbidden = (
        {TITLES - 1} | (set() if region == 1 else set(range(REGIONAL))) | (set(watched) if filter_seen else set())
    )
    titles = [int(item.title_id[1:]) for item in answer]
    assert not forbidden & set(titles)
    assert len(titles) == len(set(titles)) == min(k, TITLES - len(forbidden))
    scores = [item.score for item in answer]
    assert scores == sorted(scores, reverse=True)
    everything = recommend_titles(answering, viewer, k=TITLES, filter_seen=filter_seen)
    assert scores == [item.score for item in everything[:k]]  # titles with equal scores may change places


@every_model
def test_a_known_viewer_is_served_as_the_dataset_has_them(name: str) -> None:
    """The ad-hoc path (recommend) and the dataset's path (evaluate) give one and the same query."""
    answering = predictor(name)
    dataset = answering.dataset
    user = int(np.argmax(np.diff(dataset.offsets)))
    last = int(dataset.offsets[user + 1]) - 1
    viewer = known_viewer(dataset, f"u{user}")
    earlier = {
        "title": viewer.title[:-1],
        "timestamp": viewer.timestamp[:-1],
        "intensity": {key: values[:-1] for key, values in viewer.intensity.items()},
        "context": {"device": int(dataset.event_array("context_device")[last])},
        "at": int(dataset.event_array("timestamp")[last]),
    }
    viewer = Viewer(**{**vars(viewer), **earlier})
    score_N = answering.score(np.array([last]))[0]
    for item in recommend_titles(answering, viewer, k=TITLES, filter_seen=False):
        assert item.score == pytest.approx(float(score_N[int(item.title_id[1:])]), abs=1e-4)


def test_latest_time_is_now() -> None:
    dataset = predictor("causal").dataset
    assert latest_time(dataset) == dataset.event_array("timestamp").max()


def test_a_cold_titles_key_does_not_read_its_id_row() -> None:
    answering = predictor("causal")
    table = dict(answering.model.tables.named_parameters())["embeddings.title.weight"]
    cold = torch.from_numpy(answering.builder.cold)
    keys, saved = answering.key_NQ.clone(), table.detach().clone()
    with torch.no_grad():
        table[:TITLES] += 1
        answering.__dict__.pop("key_NQ")
        changed = answering.key_NQ.clone()
        table.copy_(saved)
        answering.__dict__.pop("key_NQ")
    torch.testing.assert_close(changed[cold], keys[cold])
    assert not torch.isclose(changed[~cold], keys[~cold]).all(-1).any()
    # What tells cold titles apart is their content alone.
    width = keys.shape[1] // 2
    torch.testing.assert_close(keys[cold][:, :width], keys[cold][:1, :width].expand(int(cold.sum()), width))
    assert len(keys[cold][:, width:].unique(dim=0)) == int(cold.sum()) > 1


def test_a_dropped_titles_key_and_gradient_do_not_touch_its_id_row() -> None:
    answering = predictor("causal")
    builder, model = answering.builder, answering.model
    windows = builder.windows_before(np.arange(5, 12))
    batch = builder.build(windows, np.random.default_rng(0))
    table = dict(model.tables.named_parameters())["embeddings.title.weight"]
    table.grad = None
    scores = model(batch)
    (scores.key_CQ.square() @ torch.arange(1.0, scores.key_CQ.shape[1] + 1)).sum().backward()
    lost = batch.candidate_C[batch.sparse["candidates"].values() == TITLES + 1]
    kept = batch.candidate_C[batch.sparse["candidates"].values() < TITLES]
    gradient_N = table.grad[:TITLES].abs().sum(-1)
    table.grad = None
    assert len(lost) > 3
    assert len(kept) > 3
    assert not gradient_N[lost].any()
    assert (gradient_N[kept] > 0).all()
