"""What the literature's systems share in training and ranking: cuts of histories, softmax, what may be listed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.literature import mu_wu, network, siet
from benchmarks.literature.bert import BertStyle
from benchmarks.literature.data import Data
from benchmarks.literature.network import SampledSoftmax
from m5.baselines import DAY
from m5.data.loader import training_windows as m5_windows
from m5.data.sequences import Windows
from m5.schema import TEST, TRAIN, VALID
from tests.handmade import rights_table, write_handmade


@pytest.fixture(scope="module")
def tastes(tmp_path_factory):
    """Eighty viewers with eight of 24 titles each, six of them in training."""
    generator = np.random.default_rng(0)
    plan = [TRAIN] * 6 + [VALID, TEST]
    histories = [
        [(int(title), DAY * place, plan[place]) for place, title in enumerate(generator.permutation(24)[:8])]
        for _ in range(80)
    ]
    return write_handmade(tmp_path_factory.mktemp("tastes") / "d", histories, titles=24)


def test_training_windows_are_those_of_m5(tastes):
    """Every training event is asked for once, and each epoch cuts a viewer's events elsewhere."""
    data = Data(tastes, history=4)
    own = data.training_windows(np.random.default_rng(3))
    sequences = SimpleNamespace(history=4, requests=4)
    builder = SimpleNamespace(dataset=tastes, config=SimpleNamespace(sequences=sequences))
    theirs = m5_windows(builder, np.random.default_rng(3))
    for part in ("start", "last", "first"):
        assert getattr(own, part).tolist() == getattr(theirs, part).tolist()
    assert sum(data.sequences(own).asked_BL.sum(1)) == len(data.train)
    batches = network._shuffled(SimpleNamespace(windows="every"), data, 1000, np.random.default_rng(0))
    epochs = [next(batches) for _ in range(2)]
    events = [np.concatenate([np.arange(a, b + 1) for a, b in zip(e.first, e.last, strict=True)]) for e in epochs]
    assert sorted(events[0]) == sorted(events[1]) == data.train.tolist()
    assert set(epochs[0].first) != set(epochs[1].first)


def test_a_window_is_read_with_what_lies_before_it(tastes):
    """Six events, the last two asked for: column 0 stands before the second, for four behaviours fit."""
    batch = Data(tastes, history=4).sequences(Windows(np.array([1]), np.array([5]), np.array([4])))
    title = np.asarray(tastes.event_array("title"))
    assert batch.title_BL.tolist() == [[24, *title[1:5]]]
    assert batch.asked_BL.tolist() == [[False, False, False, True, True]]


def test_bert_asks_for_any_event_as_the_last(tastes):
    data = Data(tastes, history=4)
    batch = data.sequences(Windows(np.full(300, 1), np.full(300, 5), np.full(300, 3)))
    torch.manual_seed(0)
    lengths = BertStyle._end(None, batch)
    assert sorted(set(lengths.tolist())) == [3, 4, 5]  # columns 2, 3 and 4 are asked for
    assert torch.bincount(lengths)[3:].min() > 70


def test_log_q_by_arithmetic(tastes, monkeypatch):
    """Two draws from 1/2, 3/10 and 1/5: a title is among them by 1 - (1 - p)^2; the target need not be."""
    softmax = SampledSoftmax(Data(tastes, history=3), 2)
    softmax.probability_N = torch.tensor([0.5, 0.3, 0.2])
    monkeypatch.setattr(torch, "multinomial", lambda *arguments, **more: torch.tensor([1, 0]))
    logit = torch.tensor([[1.0], [2.0], [3.0]])
    negative = np.exp(1) / (1 - 0.5**2) + np.exp(2) / (1 - 0.7**2)
    target = np.exp(3) / (1 - 0.8**2)
    expected = -np.log(target / (target + negative))
    assert softmax(torch.ones(1, 1), logit, torch.tensor([2])).item() == pytest.approx(expected, rel=1e-5)


def test_titles_that_cannot_be_listed_do_not_lower_others(tmp_path):
    """Title 0 is seen and title 3 not playable: of the one cluster, title 1 counts as the first and 2 as the second."""
    rights = rights_table([(title, 0, 0, 0, 100 * DAY) for title in (0, 1, 2)])
    histories = [[(0, 0, TRAIN), (1, DAY, TRAIN), (2, 2 * DAY, TEST)]]
    dataset = write_handmade(tmp_path / "d", histories, titles=4, scenario=[[(1, 1)] * 3], rights=rights)
    listed = siet.listed(Data(dataset, history=2), np.array([1]))
    assert listed.tolist() == [[False, True, True, False]]
    score = torch.tensor([[9.0, 7.0, 6.0, 8.0]])
    spread = float(np.std([9.0, 7.0, 6.0, 8.0], ddof=1))
    found = siet.mixed(score, torch.zeros(4, dtype=torch.int64), 0.5, listed)
    assert found[0].tolist() == pytest.approx([9.0, 7.0, 6.0 - 0.5 * spread, 8.0])


def test_mu_wu_runs_the_tower_of_titles_once_for_all_requests(tastes):
    data = Data(tastes, history=3)
    torch.manual_seed(0)
    towers = mu_wu.MuWu(data, loss="softmax", width=8, channels=4, dropout=0.0)
    ran = []
    towers.title.register_forward_hook(lambda *arguments: ran.append(1))
    scorer = network.NetworkScorer("mu-wu", towers, data)
    before = scorer.score(np.arange(600))
    assert len(ran) == 1
    with torch.no_grad():
        towers.train().bias.weight[0] += 1.0
    after = network.NetworkScorer("mu-wu", towers, data).score(np.arange(600))
    torch.testing.assert_close(after[:, 0], before[:, 0] + 1.0)
