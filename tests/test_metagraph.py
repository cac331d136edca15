"""Metagraph, neighbour sampler and GraphSAGE: what is sampled, what is learned, and what must not be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.content_features import Components, FeatureMap, neighbour_overlap
from data_prep.graphsage import LinkPredictor, area_under_curve, build_graph, message_graph
from data_prep.graphsage_model import MetagraphSage, Nodes, mean_heard, sample_hop
from data_prep.metagraph import Metagraph, build_metagraph, build_relation
from data_prep.neighbour_sampler import Adjacency, sample_neighbours
from m5.schema import ALWAYS, Encoder, Manifest, PreparedDataset, Split, Vocabulary

GENRES = 4


@dataclass
class Planted:
    """Titles of planted genres; the text vector, the genre list and nine actors in ten follow the genre."""

    genre: np.ndarray
    cold: np.ndarray
    genres: list[list[str]]
    actors: list[list[str]]
    text: np.ndarray

    @staticmethod
    def draw(n: int = 160, n_cold: int = 12, seed: int = 0) -> Planted:
        rng = np.random.default_rng(seed)
        genre = rng.permutation(np.arange(n) % GENRES)
        own = np.where(rng.random((n, 4)) < 0.9, genre[:, None], rng.integers(0, GENRES, (n, 4)))
        actors = [[f"actor {g}.{rng.integers(0, 8)}" for g in row] for row in own]
        text = rng.normal(0, 1, (GENRES, 24))[genre] + rng.normal(0, 1.5, (n, 24))
        text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
        return Planted(genre, np.arange(n) >= n - n_cold, [[f"genre {g}"] for g in genre], actors, text)

    def write(self, folder: Path, *, text: bool = True, metadata: tuple[str, ...] = ("genres", "actors")) -> Path:
        n = len(self.genre)
        frame = pd.DataFrame(
            {
                "title_id": [f"t{i}" for i in range(n)],
                "title": "",
                "description": "",
                "category": np.zeros(n, dtype=np.int32),
                "artwork": "",
                "released": np.full(n, ALWAYS),
                "train_count": np.where(self.cold, 0, 5),
                "cold": self.cold,
                "genres": self.genres,
                "actors": self.actors,
            }
        )
        (folder / "content").mkdir(parents=True)
        frame.to_parquet(folder / "titles.parquet")
        encoders = {}
        if text:
            np.save(folder / "content" / "text.npy", self.text)
            encoders["text"] = Encoder(model="planted", weights="planted", dim=self.text.shape[1])
        Manifest(
            source="tables",
            name="planted",
            n_users=0,
            n_titles=n,
            n_events=0,
            n_cold_titles=int(self.cold.sum()),
            split=Split(kind="time"),
            split_counts={},
            categories=Vocabulary(name="category", values=()),
            metadata=metadata,
            encoders=encoders,
        ).write(folder)
        return folder


def adjacency_of(neighbours: list[list[int]]) -> Adjacency:
    destinations = torch.tensor([i for i, row in enumerate(neighbours) for _ in row], dtype=torch.int64)
    sources = torch.tensor([j for row in neighbours for j in row], dtype=torch.int64)
    return Adjacency.from_edges(destinations, sources, len(neighbours))


neighbour_lists = st.lists(st.lists(st.integers(0, 50), unique=True, max_size=12), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(neighbours=neighbour_lists, fanout=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_sampler_draws_true_distinct_neighbours(
    neighbours: list[list[int]], fanout: int, seed: int, data: st.DataObject
) -> None:
    nodes = data.draw(st.lists(st.integers(0, len(neighbours) - 1), max_size=10))
    arguments = (adjacency_of(neighbours), torch.tensor(nodes, dtype=torch.int64), fanout)
    at, heard = sample_neighbours(*arguments, torch.Generator().manual_seed(seed))
    for position, node in enumerate(nodes):
        drawn = heard[at == position].tolist()
        assert len(drawn) == min(fanout, len(neighbours[node]))
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(neighbours[node])
    at_again, heard_again = sample_neighbours(*arguments, torch.Generator().manual_seed(seed))
    assert torch.equal(at, at_again)
    assert torch.equal(heard, heard_again)


def test_sampler_is_uniform() -> None:
    draws, degree, fanout = 20_000, 7, 3
    nodes = torch.zeros(draws, dtype=torch.int64)
    _, heard = sample_neighbours(adjacency_of([list(range(degree))]), nodes, fanout, torch.Generator().manual_seed(0))
    share = torch.bincount(heard, minlength=degree) / draws
    deviation = (fanout / degree * (1 - fanout / degree) / draws) ** 0.5
    assert (share - fanout / degree).abs().max() < 5 * deviation


@settings(max_examples=30, deadline=None)
@given(neighbours=neighbour_lists)
def test_all_neighbours(neighbours: list[list[int]]) -> None:
    nodes = torch.arange(len(neighbours)).flip(0)
    at, heard = adjacency_of(neighbours).neighbours(nodes)
    assert [heard[at == i].tolist() for i in range(len(nodes))] == neighbours[::-1]


def test_relation_by_hand() -> None:
    lists = pd.Series([["x", "y"], ["x", "y", "y"], ["z", "x"], ["z", "only cold", "x"], ["only cold"], []])
    relation = build_relation("actors", lists, warm=np.array([True, True, True, False, False, True]))
    # x and y are shared by warm titles; z joins a warm and a cold one; "only cold" has no warm title.
    assert (relation.values.tolist(), relation.n_trained) == (["x", "y", "z"], 2)
    heard = [part.tolist() for part in np.split(relation.title_values, relation.title_offsets[1:-1])]
    assert heard == [[0, 1], [0, 1], [0], [0, 2], [], []]
    hearers = [part.tolist() for part in np.split(relation.value_titles, relation.value_offsets[1:-1])]
    assert hearers == [[0, 1, 2], [0, 1], [2]]


def test_relation_without_shared_values_is_none() -> None:
    assert build_relation("actors", pd.Series([["x"], ["y"], []]), np.ones(3, dtype=bool)) is None
    assert build_relation("actors", pd.Series([[], []]), np.ones(2, dtype=bool)) is None


def test_saved_metagraph_holds_the_arrays(tmp_path: Path) -> None:
    data = Planted.draw().write(tmp_path / "data")
    build_graph(data, dim=4, epochs=1)
    graph = build_metagraph(PreparedDataset(data))
    saved = np.load(data / "metagraph.npz")
    assert saved["kinds"].tolist() == ["genres", "actors"]
    for i, relation in enumerate(graph.relations):
        for name in ("title_offsets", "title_values", "value_offsets", "value_titles", "values"):
            np.testing.assert_array_equal(saved[f"{i}_{name}"], getattr(relation, name))


def small_graph(seed: int = 0) -> tuple[Metagraph, np.ndarray]:
    planted = Planted.draw(40, 5, seed)
    warm = ~planted.cold
    columns = (("genres", planted.genres), ("actors", planted.actors))
    relations = tuple(build_relation(kind, pd.Series(lists), warm) for kind, lists in columns)
    return Metagraph(40, relations), planted.text


def test_two_layers_equal_loops_over_nodes() -> None:
    graph, features = small_graph()
    torch.manual_seed(0)
    model = MetagraphSage(n_features=24, n_trained=[r.n_trained for r in graph.relations], width=6)
    messages = message_graph(
        features,
        [r.title_links() for r in graph.relations],
        [r.value_links() for r in graph.relations],
        [len(r.values) for r in graph.relations],
    )
    found, _ = model.all_nodes(messages)
    x = torch.from_numpy(features)

    def mean(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(rows).mean(0) if rows else torch.zeros(6)

    with torch.no_grad():
        titles = [model.project(row) for row in x]
        values = []
        for r, relation in enumerate(graph.relations):
            values.append([])
            for v in range(len(relation.values)):
                hearing = relation.value_titles[relation.value_offsets[v] : relation.value_offsets[v + 1]]
                own = model.project(torch.stack([x[t] for t in hearing]).mean(0))
                values[r].append(own + model.embeddings[r][v] if v < relation.n_trained else own)
        for depth, layer in enumerate((model.first, model.second)):
            new_titles, new_values = [], []
            for t, own in enumerate(titles):
                messages_r = []
                for r, relation in enumerate(graph.relations):
                    linked = relation.title_values[relation.title_offsets[t] : relation.title_offsets[t + 1]]
                    messages_r.append(layer.to_title[r](mean([values[r][v] for v in linked])))
                new_titles.append(layer.title_self(own) + sum(messages_r) / len(messages_r))
            for r, relation in enumerate(graph.relations):
                new_values.append([])
                for v, own in enumerate(values[r]):
                    linked = relation.value_titles[relation.value_offsets[v] : relation.value_offsets[v + 1]]
                    message = layer.to_value[r](mean([titles[t] for t in linked]))
                    new_values[r].append(layer.value_self[r](own) + message)
            titles, values = new_titles, new_values
            if depth == 0:
                titles = [torch.relu(row) for row in titles]
                values = [[torch.relu(row) for row in rows] for rows in values]
    expected = torch.nn.functional.normalize(torch.stack(titles), dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sampling_every_neighbour_equals_the_full_pass() -> None:
    graph, features = small_graph()
    model = MetagraphSage(n_features=24, n_trained=[r.n_trained for r in graph.relations], width=6)
    links = [r.value_links() for r in graph.relations]
    messages = message_graph(features, links, links, [len(r.values) for r in graph.relations])
    seeds = Nodes(torch.tensor([1, 7, 20]), [torch.tensor([0, 2]), torch.tensor([1])])
    generator = torch.Generator().manual_seed(0)
    outer = sample_hop(messages, seeds, 1000, generator)
    titles, values = model(messages, sample_hop(messages, outer.sources, 1000, generator), outer)
    all_titles, all_values = model.all_nodes(messages)
    torch.testing.assert_close(titles, all_titles[seeds.titles], atol=1e-5, rtol=1e-5)
    for found, everything, nodes in zip(values, all_values, seeds.values, strict=True):
        torch.testing.assert_close(found, everything[nodes], atol=1e-5, rtol=1e-5)


def test_gradients_of_what_is_heard_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    sources, destinations = [4, 0, 0, 2, 4], [0, 0, 2, 2, 2]  # nothing leads to 1 and 3
    found = mean_heard(vectors, (torch.tensor(sources), torch.tensor(destinations)), 4)
    loops = [torch.zeros(3, dtype=torch.float64) for _ in range(4)]
    for destination in range(4):
        heard = [vectors[s] for s, d in zip(sources, destinations, strict=True) if d == destination]
        if heard:
            loops[destination] = sum(heard) / len(heard)
    expected = torch.stack(loops)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((out * weights).sum(), vectors)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_area_under_curve_by_hand() -> None:
    # Pairs: (3 > 1), (3 > 2), (2 > 1), (2 = 2, half).
    assert area_under_curve(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == (1 + 1 + 1 + 0.5) / 4


def test_links_are_predicted_on_a_planted_graph(tmp_path: Path) -> None:
    dataset = PreparedDataset(Planted.draw(240).write(tmp_path / "data"))
    warm = ~dataset.titles["cold"].to_numpy()
    _, features = FeatureMap.of(dataset, warm, 24)
    graph, device, found = build_metagraph(dataset), torch.device("cpu"), []
    for seed in range(3):  # so small a graph learns badly from one start in six
        predictor = LinkPredictor(graph, features, width=16, fanout=(5, 5), seed=seed, device=device)
        untrained = predictor.mean_auc(predictor.held_out_auc())
        found.append((untrained, predictor.mean_auc(predictor.train(15))))
    before, after = np.median(found, axis=0)
    assert after > 0.8
    assert after > before + 0.1


def test_held_out_links_are_hidden_from_the_messages() -> None:
    graph, features = small_graph()
    predictor = LinkPredictor(graph, features, width=4, fanout=(2, 2), seed=0, device=torch.device("cpu"))
    for r, relation in enumerate(graph.relations):
        train, held_out = (
            set(zip(*part[r], strict=True)) for part in (predictor.links.train, predictor.links.held_out)
        )
        titles, values = relation.value_links()
        assert not train & held_out
        assert train | held_out == {(t, v) for t, v in zip(titles, values, strict=True) if v < relation.n_trained}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planted, np.ndarray, Encoder]:
    planted = Planted.draw(240, 24)
    data = planted.write(tmp_path_factory.mktemp("graph") / "data")
    record = build_graph(data, dim=16, epochs=12)
    return planted, PreparedDataset(data).content("graph"), record


def test_cold_titles_change_nothing_for_warm_ones(built: tuple[Planted, np.ndarray, Encoder], tmp_path: Path) -> None:
    planted, before, _ = built
    other = Planted.draw(240, 24)
    rng = np.random.default_rng(5)
    for title in np.flatnonzero(other.cold):
        other.genres[title] = ["a genre of cold titles", f"genre {rng.integers(0, GENRES)}"]
        other.actors[title] = ["a cold actor", *planted.actors[0], f"actor {rng.integers(0, GENRES)}.0"]
        other.text[title] = rng.permutation(other.text[title])
    data = other.write(tmp_path / "data")
    build_graph(data, dim=16, epochs=12)
    after = PreparedDataset(data).content("graph")
    np.testing.assert_array_equal(after[~planted.cold], before[~planted.cold])
    assert not np.allclose(after[planted.cold], before[planted.cold])


def test_cold_titles_land_in_their_genre(built: tuple[Planted, np.ndarray, Encoder]) -> None:
    planted, vectors, _ = built
    warm = ~planted.cold
    centres = np.stack([vectors[warm & (planted.genre == g)].mean(0) for g in range(GENRES)])
    nearest = (vectors[planted.cold] @ centres.T).argmax(1)
    assert (nearest == planted.genre[planted.cold]).mean() > 0.9


def test_record_of_the_graph(built: tuple[Planted, np.ndarray, Encoder]) -> None:
    _, vectors, record = built
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert (record.dim, record.coverage) == (vectors.shape[1], 1.0)
    assert {"held_out_auc", "auc_genres", "auc_actors"} <= set(record.metrics)
    assert record.metrics["overlap_graph"] > record.metrics["overlap_features"]


def test_without_text_the_graph_alone_speaks(tmp_path: Path) -> None:
    planted = Planted.draw(240, 24)
    data = planted.write(tmp_path / "data", text=False)
    record = build_graph(data, dim=16, epochs=12)
    vectors = PreparedDataset(data).content("graph")
    warm = ~planted.cold
    centres = np.stack([vectors[warm & (planted.genre == g)].mean(0) for g in range(GENRES)])
    assert record.dim == 16
    assert ((vectors[planted.cold] @ centres.T).argmax(1) == planted.genre[planted.cold]).mean() > 0.9


def test_without_metadata_the_features_alone_speak(tmp_path: Path) -> None:
    planted = Planted.draw()
    data = planted.write(tmp_path / "data", metadata=())
    record = build_graph(data, dim=64)
    vectors = PreparedDataset(data).content("graph")
    centred = planted.text - planted.text[~planted.cold].mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert record.model == "principal components"
    np.testing.assert_allclose(vectors @ vectors.T, centred @ centred.T, atol=0.05)
    assert "no metadata value is shared" in Manifest.read(data).notes[0]


def test_without_anything_there_is_no_array(tmp_path: Path) -> None:
    data = Planted.draw().write(tmp_path / "data", text=False, metadata=())
    assert build_graph(data) is None
    assert PreparedDataset(data).content("graph") is None
    assert "neither text" in Manifest.read(data).notes[0]


def test_principal_components_keep_distances_and_missing_rows() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (30, 5)).astype(np.float32)
    features[3] = 0
    fit_on = np.arange(30) < 20
    turned = Components.fit(features, fit_on, 5).apply(features)
    kept = np.arange(30) != 3
    np.testing.assert_array_equal(turned[3], np.zeros(5))
    np.testing.assert_allclose(
        np.linalg.norm(turned[kept][:, None] - turned[kept][None], axis=-1),
        np.linalg.norm(features[kept][:, None] - features[kept][None], axis=-1),
        atol=1e-4,
    )
    changed = features.copy()
    changed[25] *= 10
    np.testing.assert_array_equal(Components.fit(changed, fit_on, 5).apply(changed)[:20], turned[:20])


def test_neighbour_overlap_by_hand() -> None:
    # 22 titles on two axes, eleven each: the 10 nearest of each are its own axis, whose titles share its one value.
    axis = np.arange(22) % 2
    relation = build_relation("genres", pd.Series([[f"g{a}"] for a in axis]), np.ones(22, dtype=bool))
    assert neighbour_overlap(np.eye(2, dtype=np.float32)[axis], relation) == 1.0
    mixed = build_relation("genres", pd.Series([["all", f"g{i}"] for i in axis]), np.ones(22, dtype=bool))
    assert neighbour_overlap(np.eye(2, dtype=np.float32)[1 - axis], mixed) == 1.0
    halves = build_relation("genres", pd.Series([["all", f"g{i // 2}"] for i in range(22)]), np.ones(22, dtype=bool))
    # Of the two values of each title one is everybody's, the other that of a title on the other axis: 1 of 3.
    assert neighbour_overlap(np.eye(2, dtype=np.float32)[axis], halves) == pytest.approx(1 / 3)
