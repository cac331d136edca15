"""Two systems of `benchmarks/literature`: graph attention over metadata, and reinforcement learning over factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from benchmarks.literature import chakder, peng
from benchmarks.literature.data import Data
from benchmarks.literature.network import NetworkScorer
from benchmarks.literature.peng_environment import LoggedViewers, States, title_factors
from m5.schema import TRAIN, VALID, DataError, PreparedDataset
from tests.handmade import write_handmade
from tests.world import write_world

GROUPS, GROUP_SIZE = 4, 12  # of titles; the last of each group is cold
Histories = Sequence[Sequence[int]]


def write_histories(folder: Path, histories: Histories, *, titles: int) -> PreparedDataset:
    """Titles of each viewer in the order of watching; the last is the validation target."""
    events = [
        [(title, place, VALID if place == len(history) - 1 else TRAIN) for place, title in enumerate(history)]
        for history in histories
    ]
    return write_handmade(folder, events, titles=titles)


def add_content(dataset: PreparedDataset, text: np.ndarray, genres: list[list[str]] | None) -> PreparedDataset:
    """The dataset with text vectors, image vectors that mean nothing, and one kind of metadata."""
    (dataset.folder / "content").mkdir(exist_ok=True)
    noise = np.random.default_rng(9).standard_normal((len(text), 5))
    for kind, vectors in (("text", text), ("image", noise)):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(dataset.folder / "content" / f"{kind}.npy", unit.astype(np.float32))
    if genres is not None:
        titles = pd.read_parquet(dataset.folder / "titles.parquet")
        titles["genres"] = genres
        titles.to_parquet(dataset.folder / "titles.parquet")
        dataset.manifest.model_copy(update={"metadata": ("genres",)}).write(dataset.folder)
    return PreparedDataset(dataset.folder)


def grouped_world(folder: Path, told_by: str) -> Data:
    """Viewers who keep to one group of titles, which either the text or the metadata tells; the other one is noise."""
    generator = np.random.default_rng(0)
    titles = GROUPS * GROUP_SIZE
    warm = np.arange(titles).reshape(GROUPS, GROUP_SIZE)[:, :-1]
    histories = [generator.choice(warm[user % GROUPS], 9, replace=False).tolist() for user in range(80)]
    group = np.repeat(np.arange(GROUPS), GROUP_SIZE)
    text = generator.standard_normal((titles, 6))
    shown = group if told_by == "metadata" else generator.permutation(group)
    if told_by == "text":
        text = 3 * np.eye(6)[group] + 0.3 * text
    dataset = write_histories(folder, histories, titles=titles)
    return Data(add_content(dataset, text, [[f"g{value}"] for value in shown]), history=8)


def ten_viewers(folder: Path) -> Data:
    """Each watches six titles of sixty that are its own, the last of them twice."""
    generator = np.random.default_rng(1)
    histories = [[*row, row[-1]] for row in generator.permutation(60).reshape(10, 6).tolist()]
    dataset = write_histories(folder, histories, titles=60)
    genres = [[f"g{value}"] for value in generator.integers(0, 8, 60)]
    return Data(add_content(dataset, generator.standard_normal((60, 6)), genres), history=8)


def train(network: chakder.MultiModalGAT, data: Data, *, steps: int, lr: float) -> NetworkScorer:
    """A number of steps on all windows at once, whatever the clock says."""
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=lr)
    batch = data.sequences(data.training_windows(np.random.default_rng(0)))
    for _ in range(steps):
        optimizer.zero_grad()
        network.loss(batch).backward()
        optimizer.step()
    return NetworkScorer("chakder", network, data)


def hit_rate(scorer: Any, data: Data, k: int) -> float:
    """Share of the training events after a viewer's first whose title is among the k best."""
    event = data.train[~np.isin(data.train, data.dataset.offsets)]
    best = torch.topk(torch.as_tensor(scorer.score(event)), k).indices.numpy()
    return float((best == data.title[event][:, None]).any(axis=1).mean())


# Graph attention over metadata


@pytest.mark.parametrize("told_by", ["metadata", "text"])
def test_a_cold_title_is_found_by_what_is_known_of_it(tmp_path: Path, told_by: str) -> None:
    data = grouped_world(tmp_path, told_by)
    torch.manual_seed(0)
    scorer = train(chakder.MultiModalGAT(data, dropout=0.1, id_embedding=False), data, steps=60, lr=0.01)
    target = data.dataset.offsets[1:] - 1
    score = scorer.score(target).reshape(-1, GROUPS, GROUP_SIZE)
    own = torch.from_numpy(data.title[target] // GROUP_SIZE)
    assert (score[:, :, -1].argmax(1) == own).float().mean() >= 0.95, "cold titles"
    assert (score[:, :, :-1].mean(-1).argmax(1) == own).float().mean() >= 0.95, "warm titles"


def test_graph_attention_overfits_ten_viewers(tmp_path: Path) -> None:
    data = ten_viewers(tmp_path)
    torch.manual_seed(0)
    network = chakder.MultiModalGAT(data, dropout=0.0, id_embedding=True)
    before = hit_rate(NetworkScorer("chakder", network, data), data, 1)
    assert before < 0.2
    assert hit_rate(train(network, data, steps=120, lr=0.01), data, 1) >= 0.95


def test_attention_layer_equals_a_loop(tmp_path: Path) -> None:
    network = chakder.MultiModalGAT(grouped_world(tmp_path, "metadata"), dropout=0.0, id_embedding=False)
    layer, H = network.hear_values, chakder.HEADS
    torch.manual_seed(0)
    value_KD, title_ND = torch.randn(GROUPS, chakder.WIDTH), torch.randn(network.n_titles, chakder.WIDTH)
    links = network.to_title_2E.T.tolist()
    with torch.no_grad():
        found_ND = layer((value_KD, title_ND), network.to_title_2E)
        source_KHW = layer.lin_src(value_KD).unflatten(-1, (H, -1))
        target_NHW = layer.lin_dst(title_ND).unflatten(-1, (H, -1))
        for title in (0, 17, network.n_titles - 1):
            heard = [value for value, hearer in links if hearer == title]
            for head in range(H):
                logit = [
                    functional.leaky_relu(
                        (layer.att_src[0, head] * source_KHW[value, head]).sum()
                        + (layer.att_dst[0, head] * target_NHW[title, head]).sum(),
                        0.2,
                    )
                    for value in heard
                ]
                share = torch.stack(logit).softmax(0)
                expected_W = sum(share[i] * source_KHW[value, head] for i, value in enumerate(heard))
                torch.testing.assert_close(found_ND[title].unflatten(-1, (H, -1))[head], expected_W)


def test_pooling_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    pool = chakder.HistoryPooling(8, 2, longest=5)
    h_BLD = torch.randn(3, 6, 8)
    changed_BLD = h_BLD.clone()
    changed_BLD[:, 4:] += 1
    torch.testing.assert_close(pool(h_BLD)[:, :4], pool(changed_BLD)[:, :4])
    assert not torch.allclose(pool(h_BLD)[:, 4:], pool(changed_BLD)[:, 4:])


def test_no_warm_title_hears_of_a_cold_one_and_scoring_passes_the_graph_anew_after_training(tmp_path: Path) -> None:
    data = grouped_world(tmp_path, "metadata")
    network = chakder.MultiModalGAT(data, dropout=0.0, id_embedding=False).eval()
    before_ND = network.titles()
    assert network.titles() is before_ND, "while scoring the graph is passed once"
    with torch.no_grad():
        network.text_NF[torch.from_numpy(data.cold)] += 1
    after_ND = network.train().eval().titles()
    torch.testing.assert_close(after_ND[~data.cold], before_ND[~data.cold])
    assert not torch.allclose(after_ND[data.cold], before_ND[data.cold])


def test_values_of_most_titles_are_left_out(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, [list(range(10))] * 2 + [[9, 9]], titles=10)
    genres = [["all", "pair"], ["all", "pair"], *([["all"]] * 8)]
    graph = chakder.build_metagraph(add_content(dataset, np.ones((10, 2)), genres))
    to_value_2E, to_title_2E, count = chakder.links(graph, common=0.5)
    assert (to_value_2E.tolist(), to_title_2E.tolist(), count) == ([[0, 1], [0, 0]], [[0, 0], [0, 1]], 1)
    assert chakder.links(graph, common=1.0)[2] == 2


def test_graph_attention_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, [[0, 1, 2], [1, 2, 0]], titles=3)
    with pytest.raises(DataError, match="text vectors"):
        chakder.MultiModalGAT(Data(dataset, history=3), dropout=0.0, id_embedding=False)
    dataset = add_content(dataset, np.eye(3), None)
    with pytest.raises(DataError, match="no metadata value is shared"):
        chakder.MultiModalGAT(Data(dataset, history=3), dropout=0.0, id_embedding=False)


# Reinforcement learning over factors


def test_environment_by_hand(tmp_path: Path) -> None:
    data = Data(write_histories(tmp_path, [[0, 1, 2, 0]], titles=3), history=3)
    factors = np.array([[1, 0], [0, 2], [-3, 0], [0.5, 0.5]], dtype=np.float32)
    viewers = LoggedViewers(data, States(data, factors), viewers=1, seed=0)
    nothing = [0.5, 0.5] * 4
    np.testing.assert_allclose(viewers.reset(), [nothing])
    state, reward, done, _ = viewers.step(np.array([[0.6, 0.8]], np.float32))
    assert reward == pytest.approx(0.6 * 1 + 0.8 * 0) and not done
    np.testing.assert_allclose(state, [[1, 0] * 4])
    state, reward, done, _ = viewers.step(np.array([[0.0, 1.0]], np.float32))
    assert reward == pytest.approx(0 * 0 + 1 * 1) and not done
    last = [0.9 / 1.9, 2 / 1.9, 1 / 2, 2 / 2, 1, 2, 0, 2]  # recency-weighted mean, mean, maximum, last title
    np.testing.assert_allclose(state, [last], rtol=1e-6)
    state, reward, done, info = viewers.step(np.array([[0.6, 0.8]], np.float32))
    assert reward == pytest.approx(0.6 * -1 + 0.8 * 0)
    assert done, "the validation event is not asked for"
    np.testing.assert_allclose(state, [nothing])
    np.testing.assert_allclose(info[0]["terminal_observation"], last, rtol=1e-6)


def test_environment_asks_for_every_training_event_once(tmp_path: Path) -> None:
    data = Data(write_world(tmp_path / "d", users=9, titles=20, split="leave-last-out"), history=4)
    viewers = LoggedViewers(data, States(data, title_factors(data, 4, 0)), viewers=1, seed=0)
    viewers.reset()
    asked, episodes = [], 0
    for _ in range(len(data.train)):
        asked.append(int(viewers.event_V[0]))
        episodes += int(viewers.step(np.zeros((1, 4), np.float32))[2][0])
    assert sorted(asked) == data.train.tolist()
    assert episodes == len(np.unique(data.dataset.user_of(data.train)))


def test_no_state_holds_the_title_to_be_found(tmp_path: Path) -> None:
    data = Data(write_world(tmp_path / "d", users=9, titles=20), history=4)
    states = States(data, title_factors(data, 4, 0))
    warm = np.flatnonzero(~data.cold)
    for event in data.train[::5]:
        before = states.before(np.array([event]))
        kept, data.title = data.title, data.title.copy()
        data.title[event:] = warm[(data.title[event:] + 1) % len(warm)]
        np.testing.assert_array_equal(states.before(np.array([event])), before)
        data.title = kept


def test_factors_are_zero_where_cold(tmp_path: Path) -> None:
    data = Data(write_world(tmp_path / "d", users=20, titles=20), history=4)
    factor_ND = title_factors(data, 5, 0)
    assert factor_ND.shape == (21, 5)
    assert not factor_ND[:-1][data.cold].any()
    assert np.mean(factor_ND[:-1][~data.cold] ** 2) == pytest.approx(1, rel=1e-5)
    expected = sum(factor_ND[title] for title in data.title[data.train]) / len(data.train)
    np.testing.assert_allclose(factor_ND[-1], expected, rtol=1e-4, atol=1e-6)


def switching_world(folder: Path) -> Data:
    """Eight groups of eight titles; the next title is of the last one's group, or by 30% chance of any."""
    generator = np.random.default_rng(2)
    histories = []
    for _ in range(150):
        group, history = generator.integers(8), []
        for _ in range(16):
            group = generator.integers(8) if generator.random() < 0.3 else group
            history.append(int(group * 8 + generator.integers(8)))
        histories.append(history)
    return Data(write_histories(folder, histories, titles=64), history=12, filter_seen=False)


def in_group(scorer: peng.ActorScorer, data: Data) -> float:
    """Share of the eight best titles that are of the last watched title's group."""
    event = data.dataset.offsets[1:] - 1
    best = torch.topk(scorer.score(event), 8).indices.numpy()
    return float((best // 8 == (data.title[event - 1] // 8)[:, None]).mean())


def test_agent_learns_what_the_filter_cannot_know(tmp_path: Path) -> None:
    data = switching_world(tmp_path)
    settings = {"factors": 8, "noise": 2.0, "gamma": 0.0, "lr": 0.02}
    states = States(data, title_factors(data, settings["factors"], 0))
    agent = peng.make_agent(data, states, settings, 0)
    start = in_group(peng.ActorScorer(agent.policy.actor, states), data)
    agent.learn(peng.VIEWERS * 120)
    learned = in_group(peng.ActorScorer(agent.policy.actor, states), data)
    assert start < 0.6 < 0.95 < learned


def test_agent_starts_as_the_collaborative_filter(tmp_path: Path) -> None:
    data = ten_viewers(tmp_path)
    states = States(data, title_factors(data, 6, 0))
    agent = peng.make_agent(data, states, peng.SYSTEM.settings[0], 0)
    event = data.dataset.offsets[1:] - 1
    mean_BD = torch.from_numpy(states.before(event)[:, :6])
    expected_BN = functional.normalize(mean_BD, dim=-1) @ torch.from_numpy(states.factor_ND[:-1]).T
    torch.testing.assert_close(peng.ActorScorer(agent.policy.actor, states).score(event), expected_BN)


def test_agent_overfits_ten_viewers_from_a_start_that_knows_nothing(tmp_path: Path) -> None:
    data = ten_viewers(tmp_path)
    settings = {"factors": 9, "noise": 2.0, "gamma": 0.0, "lr": 0.02}
    states = States(data, title_factors(data, settings["factors"], 0))
    agent = peng.make_agent(data, states, settings, 0)
    actor: Any = agent.policy.actor
    with torch.no_grad():
        actor.mu[0].weight.normal_()
    assert hit_rate(peng.ActorScorer(actor, states), data, 10) < 0.8
    agent.learn(peng.VIEWERS * 150)
    assert hit_rate(peng.ActorScorer(actor, states), data, 10) >= 0.95


def test_one_seed_one_agent(tmp_path: Path) -> None:
    data = ten_viewers(tmp_path)
    states = States(data, title_factors(data, 4, 0))
    weights = []
    for seed in (0, 0, 1):
        agent = peng.make_agent(data, states, peng.SYSTEM.settings[0], seed).learn(peng.VIEWERS * 5)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in agent.policy.actor.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# Both, as `m5 compare` calls them


@pytest.mark.parametrize("system", [chakder.SYSTEM, peng.SYSTEM], ids=lambda system: system.name)
def test_fit_gives_a_scorer_of_every_title(tmp_path: Path, system: Any) -> None:
    data = ten_viewers(tmp_path)
    for settings in system.settings[:2]:
        scorer = system.fit(data, settings, 0, 0.5)
        score = torch.as_tensor(scorer.score(data.dataset.offsets[1:] - 1))
        assert scorer.name == system.name and score.shape == (10, 60) and score.isfinite().all()
        assert scorer.parameters > 0
