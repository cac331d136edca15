"""A run's weights on another dataset's vocabularies, and the blend that a new scenario value starts with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from m5.assemble import build_model
from m5.carry_over import bucket_shares, carry_over, title_rows, value_rows
from m5.config import RunConfig
from m5.data.sequences import BatchBuilder
from m5.predict import Predictor
from m5.schema import TEST, TRAIN, Intensity, Manifest, PreparedDataset, Vocabulary
from m5.zero_shot import aligned, blend_weights, nearness, with_row
from tests.handmade import write_handmade
from tests.world import tiny_config, write_world

# ---- rows by what they stand for -------------------------------------------------------------------------------------


def test_values_are_found_by_their_text() -> None:
    before = Vocabulary(name="region", values=("US", "BR", "JP"))
    after = Vocabulary(name="region", values=("XX", "JP", "US"))
    assert value_rows(before, after).tolist() == [0, 0, 3, 1]


def test_titles_are_found_by_their_id_and_those_without_embedding_share_a_row(tmp_path: Path) -> None:
    """t1 is cold in the old dataset: its row was never trained, so it starts as the unknown row, 3 + 1."""
    old = write_handmade(tmp_path / "old", [[(0, 1, TRAIN), (2, 2, TRAIN)]], titles=3)
    new = write_handmade(tmp_path / "new", [[(0, 1, TRAIN)]], titles=4)
    new.titles["title_id"] = ["t2", "new", "t0", "t1"]
    start_row, unknown, mask = 3, 4, 5
    assert title_rows(old, new).tolist() == [2, unknown, 0, unknown, start_row, unknown, mask]


def test_buckets_are_made_of_what_they_cover() -> None:
    before = Intensity(name="seconds", boundaries=(10.0, 20.0))  # missing, below 10, 10 to 20, from 20
    same = bucket_shares(before, before)
    assert same.tolist() == np.eye(4).tolist()
    after = Intensity(name="seconds", boundaries=(12.0, 20.0, 30.0))
    np.testing.assert_allclose(
        bucket_shares(before, after),
        [
            [1, 0, 0, 0],
            [0, 1 / 1.2, 0.2 / 1.2, 0],  # all below 10, a fifth of 10 to 20
            [0, 0, 1, 0],
            [0, 0, 0, 1],
            [0, 0, 0, 1],
        ],
        atol=1e-9,
    )
    nothing = Intensity(name="seconds", boundaries=())
    assert bucket_shares(nothing, after).tolist() == [[1, 0], [0, 1], [0, 1], [0, 1], [0, 1]]


def shuffled(source: Path, target: Path, seed: int) -> PreparedDataset:
    """The same service with titles, regions, devices and categories in another order, a new title and a new category.

    Users are the same; every index of the events is moved with what it stands for.
    """
    shutil.copytree(source, target)
    old, generator = PreparedDataset(source), np.random.default_rng(seed)
    n = old.manifest.n_titles
    place = generator.permutation(n + 1)  # where each old title, and the new one, stands
    extra = old.titles.iloc[[0]].assign(title_id="brand new", cold=True, train_count=0, category=0)
    titles = pd.concat([old.titles, extra], ignore_index=True).iloc[np.argsort(place)].reset_index(drop=True)
    turned = {name: np.array([0, *(1 + generator.permutation(count))]) for name, count in sizes(old.manifest).items()}
    # Region and category get one value more, which takes the first index.
    moved = {name: np.where(turn > 0, turn + (name in ("region", "category")), 0) for name, turn in turned.items()}
    titles["category"] = moved["category"][titles["category"]].astype(np.int32)
    titles.to_parquet(target / "titles.parquet")
    np.save(target / "events" / "title.npy", place[old.event_array("title")].astype(np.int32))
    for array in ("scenario_region", "scenario_plan", "context_device"):
        values = moved[array.split("_")[1]][old.event_array(array)]
        np.save(target / "events" / f"{array}.npy", values.astype(np.int32))
    vectors = np.concatenate([old.content("graph"), old.content("graph")[:1]])
    np.save(target / "content" / "graph.npy", vectors[np.argsort(place)])
    rights = old.rights.assign(title=place[old.rights["title"]].astype(np.int32))
    rights["region"] = moved["region"][rights["region"]].astype(np.int32)
    rights.to_parquet(target / "rights.parquet")

    def renamed(vocabulary: Vocabulary) -> Vocabulary:
        values = {int(moved[vocabulary.name][i + 1]): value for i, value in enumerate(vocabulary.values)}
        top = max(values)
        return vocabulary.model_copy(update={"values": tuple(values.get(i, "XX") for i in range(1, top + 1))})

    manifest = old.manifest
    manifest.model_copy(
        update={
            "n_titles": n + 1,
            "content_hash": "shuffled",
            "categories": renamed(manifest.categories),
            "scenarios": tuple(map(renamed, manifest.scenarios)),
            "contexts": tuple(map(renamed, manifest.contexts)),
        }
    ).write(target)
    return PreparedDataset(target)


def sizes(manifest: Manifest) -> dict[str, int]:
    vocabularies = (manifest.categories, *manifest.scenarios, *manifest.contexts)
    return {vocabulary.name: len(vocabulary.values) for vocabulary in vocabularies}


def weights_of(dataset: PreparedDataset, config: RunConfig) -> dict[str, Tensor]:
    """Every number counts: nothing is 0, or 1, or the same in every row, as some weights are before training."""
    generator = torch.Generator().manual_seed(0)
    state = build_model(dataset, config).state_dict()
    return {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def asked(dataset: PreparedDataset, config: RunConfig, state: dict[str, Tensor]) -> Predictor:
    model = build_model(dataset, config)
    model.load_state_dict(state)
    return Predictor(model, BatchBuilder(dataset, config), config, torch.device("cpu"))


def queries(predictor: Predictor, events: np.ndarray) -> Tensor:
    return torch.cat([predictor.forward(batch).query_PQ for batch in predictor.batches(events)])


@pytest.mark.parametrize("seed", [1, 2])
def test_a_model_answers_the_same_in_a_shuffled_dataset(tmp_path: Path, seed: int) -> None:
    source = write_world(tmp_path / "old", users=60, rights=True)
    target, config = shuffled(tmp_path / "old", tmp_path / "data", seed), tiny_config(tmp_path / "data", tmp_path)
    weights = weights_of(source, config)
    before = asked(source, config, weights)
    after = asked(target, config, carry_over(weights, source, target, config).state)
    events = np.arange(0, source.manifest.n_events, 3)
    torch.testing.assert_close(queries(after, events), queries(before, events), atol=2e-5, rtol=1e-5)
    place = [target.titles["title_id"].tolist().index(title) for title in source.titles["title_id"]]
    torch.testing.assert_close(after.key_NQ[place], before.key_NQ)


def test_content_vectors_that_were_learnt_anew_are_turned_back(tmp_path: Path) -> None:
    """The new dataset's vectors are the old ones, rotated and shifted."""
    source = write_world(tmp_path / "old", titles=60)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    vectors, config = source.content("graph"), tiny_config(tmp_path / "new", tmp_path)
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))
    np.save(tmp_path / "new" / "content" / "graph.npy", (vectors @ turn + 0.1).astype(np.float32))
    target, weights = PreparedDataset(tmp_path / "new"), weights_of(source, config)
    carried = carry_over(weights, source, target, config)
    assert carried.content_fit == pytest.approx(1, abs=1e-4)
    before, after = asked(source, config, weights), asked(target, config, carried.state)
    torch.testing.assert_close(after.key_NQ, before.key_NQ, atol=2e-3, rtol=0)
    same = carry_over(weights, source, source, config)
    assert same.content_fit == 1.0
    changed = {key for key, value in same.state.items() if not torch.equal(value, weights[key])}
    assert changed == {"tables.embeddings.title.weight"}  # cold titles, whose rows nobody reads


def test_a_lost_category_leaves_what_it_brought_to_everybody(tmp_path: Path) -> None:
    """In both datasets no title is of category "movie", so no viewer has a behaviour of it; one still names it."""
    source = write_world(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "without")
    for name in ("old", "without"):
        titles = pd.read_parquet(tmp_path / name / "titles.parquet")
        titles["category"] = titles["category"].where(titles["category"] < 2, 0).astype(np.int32)
        titles.to_parquet(tmp_path / name / "titles.parquet")
    kept = Vocabulary(name="category", values=("series",))
    source.manifest.model_copy(update={"categories": kept}).write(tmp_path / "without")
    target, config = PreparedDataset(tmp_path / "without"), tiny_config(tmp_path / "without", tmp_path)
    weights = weights_of(source, config)
    before = asked(source, config, weights)
    after = asked(target, config, carry_over(weights, source, target, config).state)
    events = np.arange(0, source.manifest.n_events, 5)
    torch.testing.assert_close(queries(after, events), queries(before, events), atol=1e-5, rtol=1e-5)


# ---- the blend -------------------------------------------------------------------------------------------------------


def test_nearness_by_hand(tmp_path: Path) -> None:
    """US watched t0 twice and t1 once in the training period, BR t0 once and t1 twice; t2 and the rest do not count."""
    histories = [
        [(0, 1, TRAIN), (0, 2, TRAIN), (1, 3, TRAIN), (2, 4, TEST)],
        [(0, 1, TRAIN), (1, 2, TRAIN), (1, 3, TRAIN)],
    ]
    scenario = [[(1, 1)] * 4, [(2, 1)] * 3]
    dataset = write_handmade(tmp_path / "data", histories, titles=3, scenario=scenario)
    q = np.array([(3 + 1) / 9, (3 + 1) / 9, 1 / 9])
    us = (np.array([2, 1, 0]) + 100 * q) / 103
    br = (np.array([1, 2, 0]) + 100 * q) / 103
    found = nearness(dataset, "region", 1, np.array([2, 1]))
    np.testing.assert_allclose(found, [np.sqrt(us * br).sum(), 1.0])
    assert nearness(dataset, "plan", 2, np.array([1])) is None  # no event at all


def test_blend_weights_by_hand() -> None:
    near = np.array([0.9, 0.8, 0.9])
    weight = np.exp(np.array([0.9, 0.8, 0.9]) / 0.05)
    np.testing.assert_allclose(blend_weights(near, 3, temperature=0.05), weight / weight.sum())
    assert blend_weights(None, 4).tolist() == [0.25] * 4


def test_hidden_units_are_put_in_order_before_they_are_blended() -> None:
    """The second expert is the first with its three units in another order: their blend is the first itself."""
    first_RH = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [5.0, 1.0, 0.0], [0.0, 1.0, 4.0]])
    second_RH = first_RH[:, [2, 0, 1]]
    assert torch.equal(aligned(second_RH, first_RH), first_RH)
    state = {
        "tables.embeddings.scenario_region.weight": torch.tensor([[0.0], [1.0], [3.0], [9.0]]),
        "experts.embeddings.experts_id_region.weight": torch.stack(
            [torch.zeros(4, 3), first_RH, second_RH, torch.zeros(4, 3)]
        ).view(-1, 6),
    }
    before = {key: value.clone() for key, value in state.items()}
    changed = dict(state)
    with_row(changed, "region", 3, np.array([1, 2]), np.array([0.75, 0.25]), hidden=3)
    assert changed["tables.embeddings.scenario_region.weight"].flatten().tolist() == [0, 1, 3, 0.75 * 1 + 0.25 * 3]
    experts = changed["experts.embeddings.experts_id_region.weight"].view(4, 4, 3)
    assert torch.equal(experts[3], first_RH)
    assert torch.equal(experts[:3], before["experts.embeddings.experts_id_region.weight"].view(4, 4, 3)[:3])
    assert all(torch.equal(state[key], before[key]) for key in state)
