"""Several interests against one: themes on a circle that no single vector can serve; and M5 on what suits it.

A viewer watches two of six themes, next but one to each other, in any order. Titles' vectors are given: a theme is a
direction in a plane, and the two themes' mean points to the theme between them. Inner products with a single vector
rank themes by their angle to it, so that no vector puts the two before the one between; two vectors do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.literature.amf import AsymmetricFactorisation
from benchmarks.literature.comirec import ComiRec
from benchmarks.literature.data import Data
from benchmarks.literature.mind import INFINITE, MIND
from benchmarks.literature.network import Network, NetworkScorer
from benchmarks.literature.systems import system
from m5.baselines import DAY
from m5.config import load_config
from m5.predict import Predictor
from m5.schema import TEST, TRAIN, VALID, PreparedDataset
from m5.train import train
from tests.handmade import write_handmade

THEMES, SIZE = 6, 10  # of titles
PLAN = [TRAIN] * 8 + [VALID, TEST]  # five titles of each of a viewer's themes
LEFT = 11  # titles of the two themes that a viewer has not seen by the test event: nine of twenty are


@pytest.fixture(scope="module")
def circle(tmp_path_factory) -> Data:
    generator = np.random.default_rng(0)
    histories = []
    for user in range(240):
        pair = [user % THEMES, (user + 2) % THEMES]
        left = {theme: (generator.permutation(SIZE) + SIZE * theme).tolist() for theme in pair}
        titles = [left[theme].pop() for theme in generator.permutation(pair * 5)]
        histories.append([(title, DAY * place, PLAN[place]) for place, title in enumerate(titles)])
    dataset = write_handmade(tmp_path_factory.mktemp("circle") / "d", histories, titles=THEMES * SIZE)
    return Data(dataset, history=8)


def themes_served(data: Data, network: Network, table_ND: Tensor, *, lr: float, steps: int = 300) -> float:
    """Share of the viewers in whose first LEFT titles each of their themes has at least four of its five or six."""
    width = table_ND.shape[1]
    angle_N = torch.arange(THEMES * SIZE) // SIZE * (2 * torch.pi / THEMES)
    place_N2 = torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
    own_ND = torch.randn(len(place_N2), width - 2, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        table_ND[: THEMES * SIZE] = torch.cat([place_N2, own_ND], dim=1)
    table_ND.requires_grad_(False)
    trained(network, data, lr=lr, steps=steps)
    event = np.flatnonzero(np.asarray(data.dataset.event_array("split")) == TEST)
    score_BN = NetworkScorer("x", network, data).score(event)
    row, seen = data.dataset.watched_before(event)
    score_BN[row, seen] = -torch.inf
    best_BK = score_BN.topk(LEFT).indices.numpy() // SIZE
    user = np.arange(len(event))
    found = [(best_BK == theme[:, None] % THEMES).sum(1) >= 4 for theme in (user, user + 2)]
    return float((found[0] & found[1]).mean())


def trained(network: Network, data: Data, *, lr: float, steps: int) -> None:
    """So many steps, however long they take; the learning rate falls to nothing."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        network.loss(data.sequences(generator.choice(data.train, 128), network.history)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def mind(data: Data, **settings) -> MIND:
    torch.manual_seed(0)
    return MIND(data, width=64, negatives=512, **settings)


def comirec(data: Data, interests: int, contrast: str) -> ComiRec:
    torch.manual_seed(0)
    return ComiRec(data, width=64, interests=interests, negatives=512, contrast=contrast)


SEVERAL: dict[str, Callable[[Data], Network]] = {
    "mind": lambda data: mind(data, interests=4, power=2.0),
    "mind-hard": lambda data: mind(data, interests=4, power=INFINITE),
    "comirec": lambda data: comirec(data, 4, "best"),
    "comirec-chosen": lambda data: comirec(data, 4, "chosen"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_both_interests_of_a_viewer_are_served(name: str, circle: Data) -> None:
    network = SEVERAL[name](circle)
    lr = system(name.split("-")[0]).settings[0]["lr"]
    steps = 600 if name == "mind" else 300  # all its interests learn from each title, and part slowly
    assert themes_served(circle, network, network.embedding.title.weight, lr=lr, steps=steps) > 0.9


def test_one_vector_cannot_serve_both(circle: Data) -> None:
    """The structure tells: with one interest each of the models fails, and so does one that never had several."""
    for network in (mind(circle, interests=1, power=2.0), comirec(circle, 1, "best")):
        assert themes_served(circle, network, network.embedding.title.weight, lr=5e-3, steps=150) < 0.1
    torch.manual_seed(0)
    factors = AsymmetricFactorisation(circle, width=64, dropout=0.0)
    assert themes_served(circle, factors, factors.offered.weight, lr=5e-3) < 0.1


# ---- M5 ------------------------------------------------------------------------------------------------------


def m5(dataset: PreparedDataset, folder, epochs: int) -> Predictor:
    """The row's first settings for so many epochs."""
    values = {"name": "m5", "training.device": "cpu", "training.epochs": epochs, "training.patience": epochs}
    values |= {
        "training.threads": 1,
        "sequences.history": 8,
        "sequences.requests": 8,
        "training.checkpoint_minutes": 99,
    }
    values |= {"model.content": "[]"} | dict(system("m5").settings[0])
    config = load_config("default", [f"{name}={value}" for name, value in values.items()], dataset.folder, folder)
    train(config, resume="over")
    return Predictor.load(config.out, "cpu")


def history(titles) -> list[tuple[int, int, int]]:
    plan = [TRAIN] * 6 + [VALID, TEST]
    return [(int(title), DAY * place, split) for place, (title, split) in enumerate(zip(titles, plan, strict=True))]


def test_m5_knows_ten_viewers_by_heart(tmp_path) -> None:
    """Each goes round in four titles of its own. Validation keeps the weights, so it must ask for what can be known."""
    rounds = [history(4 * user + np.arange(8) % 4) for user in range(10)]
    dataset = write_handmade(tmp_path / "d", rounds, titles=40)
    scorer = m5(dataset, tmp_path / "run", epochs=60)
    # Weights are kept as soon as validation is content, which asks after all of training: earlier requests need not be.
    asked = dataset.offsets[:-1] + 5
    best = np.asarray(scorer.score(asked)).argmax(1)
    assert (best == np.asarray(dataset.event_array("title"))[asked]).mean() > 0.95


def test_m5_follows_the_scenario(tmp_path) -> None:
    """Which half of the catalogue comes next depends on the request's region alone."""
    generator = np.random.default_rng(0)
    region = generator.integers(1, 3, (80, 8))
    histories = [history(row) for row in generator.integers(0, 12, (80, 8)) + 12 * (region - 1)]
    scenario = [[(int(value), 1) for value in row] for row in region]
    dataset = write_handmade(tmp_path / "d", histories, titles=24, scenario=scenario)
    targets = np.flatnonzero(np.asarray(dataset.event_array("split")) == TEST)
    best = np.asarray(m5(dataset, tmp_path / "run", epochs=25).score(targets)).argmax(1) // 12
    assert (best == region[:, 7] - 1).mean() > 0.95
