"""The candidate softmax against loops and against PyTorch's cross-entropy; what counts as a negative; the MLM term."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m5 import losses, train
from m5.assemble import build_model
from m5.batch import Batch
from m5.data.sequences import BatchBuilder
from m5.losses import M5Train, candidate_softmax, place_among
from tests import reference
from tests.world import REGIONAL, tiny_config, write_world

REQUESTS, CANDIDATES, WIDTH = 7, 9, 5


@pytest.fixture
def case() -> dict[str, Tensor]:
    """Requests whose targets are candidates (own >= 0) or, the last two, are not."""
    torch.manual_seed(0)
    key_CQ = torch.randn(CANDIDATES, WIDTH)
    own_P = torch.tensor([0, 3, 3, 8, 5, -1, -1])
    outside_PQ = torch.randn(REQUESTS, WIDTH)
    return {
        "query": torch.randn(REQUESTS, WIDTH),
        "key": key_CQ,
        "positive": torch.where(own_P[:, None] >= 0, key_CQ[own_P.clamp(min=0)], outside_PQ),
        "log_q": torch.linspace(-3, 0, CANDIDATES),
        "own": own_P,
        "playable": torch.rand(REQUESTS, CANDIDATES) > 0.3,
    }


def both_losses(case: dict[str, Tensor], *, playable: bool, log_q: bool, precision: torch.dtype) -> list[list[Tensor]]:
    """[loss, gradients of query, key, positive] of ours and of the loops."""
    log_q_C = case["log_q"] if log_q else torch.zeros(CANDIDATES)
    allowed_PC = case["playable"] if playable else torch.ones(REQUESTS, CANDIDATES, dtype=torch.bool)
    results = []
    for dtype in (torch.float32, torch.float64):
        query, key, positive = (case[name].clone().to(dtype).requires_grad_() for name in ("query", "key", "positive"))
        if dtype == torch.float32:
            loss = candidate_softmax(
                query,
                key,
                positive,
                log_q_C=log_q_C,
                own_G=case["own"],
                playable=(lambda rows: case["playable"][rows]) if playable else None,
                precision=precision,
            )
        else:
            own = case["own"].tolist()
            loss = reference.candidate_loss(query, key, positive, log_q_C.double(), own, allowed_PC.tolist())
        (3 * loss).backward()  # the incoming gradient is not one
        results.append([loss.detach(), query.grad, key.grad, positive.grad])
    return results


@pytest.mark.parametrize("chunk_elements", [2**21, 2 * CANDIDATES])  # one chunk; chunks of two requests
@pytest.mark.parametrize("playable", [True, False])
@pytest.mark.parametrize("log_q", [True, False])
def test_loss_and_gradients_equal_loops(
    case: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, chunk_elements: int, playable: bool, log_q: bool
) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", chunk_elements)
    monkeypatch.setattr(losses, "LEAST_ROWS", 1)
    ours, slow = both_losses(case, playable=playable, log_q=log_q, precision=torch.float32)
    for mine, theirs in zip(ours, slow, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_products_stay_close(case: dict[str, Tensor]) -> None:
    ours, slow = both_losses(case, playable=True, log_q=True, precision=torch.bfloat16)
    for mine, theirs in zip(ours, slow, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=0.05, atol=0.1)


def test_all_playable_full_catalogue_is_cross_entropy(case: dict[str, Tensor]) -> None:
    target_P = torch.tensor([0, 3, 3, 8, 5, 1, 2])
    results = []
    for ours in (True, False):
        query, key = (case[name].clone().requires_grad_() for name in ("query", "key"))
        if ours:
            loss = candidate_softmax(query, key, key[target_P], log_q_C=torch.zeros(CANDIDATES), own_G=target_P)
        else:
            loss = functional.cross_entropy(query @ key.T, target_P, reduction="sum")
        loss.backward()
        results.append((loss.detach(), query.grad, key.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_playable_but_the_target_costs_nothing(case: dict[str, Tensor]) -> None:
    query = case["query"].requires_grad_()
    nothing = torch.zeros(REQUESTS, CANDIDATES, dtype=torch.bool)
    loss = candidate_softmax(
        query,
        case["key"],
        case["positive"],
        log_q_C=case["log_q"],
        own_G=case["own"],
        playable=lambda rows: nothing[rows],
    )
    loss.backward()
    assert loss.item() == 0
    assert not query.grad.any()


def test_huge_scores_stay_finite(case: dict[str, Tensor]) -> None:
    query = (1e4 * case["query"]).requires_grad_()
    loss = candidate_softmax(
        query, case["key"], case["positive"], log_q_C=case["log_q"], own_G=case["own"], playable=None
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(query.grad).all()


def test_log_q_makes_the_sampled_normaliser_unbiased() -> None:
    """The mean over samples of exp(s_target) + sum exp(s_c - log Q_c) is the full softmax's normaliser."""
    generator = np.random.default_rng(0)
    score = generator.normal(size=20)
    probability = generator.random(20)
    probability /= probability.sum()
    draws, target = 8, 3
    log_q = np.log(1 - (1 - probability) ** draws)
    totals = []
    for _ in range(20_000):
        sample = np.unique(generator.choice(20, draws, p=probability))
        sample = sample[sample != target]
        totals.append(np.exp(score[target]) + np.exp(score[sample] - log_q[sample]).sum())
    assert np.mean(totals) == pytest.approx(np.exp(score).sum(), abs=5 * np.std(totals) / math.sqrt(len(totals)))


# ---- the wrapper -----------------------------------------------------------------------------------------------


def training_model(folder: Path, *overrides: str, rights: bool = False) -> tuple[M5Train, BatchBuilder, Batch]:
    """Model with loss, the builder and a training batch of the last event's window of several users."""
    dataset = write_world(folder / "data", rights=rights)
    config = tiny_config(folder / "data", folder / "run", *overrides)
    builder = BatchBuilder(dataset, config)
    model = train.training_model(dataset, config, build_model(dataset, config))
    split = np.asarray(dataset.event_array("split"))
    users = np.flatnonzero(np.diff(dataset.offsets))
    count = np.array([(split[dataset.offsets[u] : dataset.offsets[u + 1]] == 0).sum() for u in users])
    last = (dataset.offsets[users] + count - 1)[count > 0]
    batch = builder.build(builder.windows_before(last), np.random.default_rng(0))
    return model, builder, batch


@pytest.mark.parametrize("candidates", [("full",), ("sampled", "candidates.count=6")])
def test_wrapper_equals_loops_over_the_models_scores(tmp_path: Path, candidates: tuple[str, ...]) -> None:
    kind, *more = candidates
    model, _, batch = training_model(tmp_path, f"candidates.kind={kind}", *more, rights=True)
    loss, scores = model(batch)
    negatives = batch.candidate_C[: len(batch.log_q_C)].tolist()
    rights = batch.rights_PM[:, 0]
    n_titles = model.model.embedding.content.n_titles
    # The world's rights as its author wrote them: regional titles need region 1, the last title's window is over.
    playable = [
        [not ((c < REGIONAL and region != 1) or c == n_titles - 1) for c in negatives] for region in rights.tolist()
    ]
    own = [negatives.index(t) if t in negatives else -1 for t in batch.target_P.tolist()]
    key_CQ, query_PQ = scores.key_CQ.detach().double(), scores.query_PQ.detach().double()
    targets = [batch.candidate_C.tolist().index(t) for t in batch.target_P.tolist()]
    expected = reference.candidate_loss(
        query_PQ, key_CQ[: len(negatives)], key_CQ[targets], batch.log_q_C.double(), own, playable
    )
    assert not all(all(row) for row in playable)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_masked_titles_are_hidden_and_scored(tmp_path: Path) -> None:
    paper = ("model.attention=bidirectional", "sequences.requests=1", "model.mlm_share=0.4")
    model, builder, batch = training_model(tmp_path, *paper, "model.mlm_weight=0.5")
    loss, scores = model(batch)
    n_titles, n_masked = builder.n_titles, len(batch.masked_Q)
    assert n_masked > 3
    assert (batch.title_BL.flatten()[batch.masked_Q] == n_titles + 2).all()
    history = batch.sparse["history"].values()
    place_of = {int(flat): place for place, flat in enumerate(batch.history_T)}
    assert all(history[place_of[int(flat)]] == n_titles + 2 for flat in batch.masked_Q)
    matching = candidate_softmax(
        scores.query_PQ,
        scores.key_CQ[: len(batch.log_q_C)],
        scores.key_CQ[batch.positive_P],
        log_q_C=batch.log_q_C,
        own_G=place_among(batch.candidate_C[: len(batch.log_q_C)], batch.target_P),
    )
    titles = []
    for flat, place in zip(batch.masked_Q.tolist(), batch.masked_place_Q.tolist(), strict=True):
        state = model.loss.mlm_projection(scores.interests.h_BLD.flatten(0, 1)[flat])
        logits = torch.stack([state @ key for key in scores.id_key_CD])
        titles.append(torch.logsumexp(logits, 0) - logits[place])
    expected = matching + 0.5 * torch.stack(titles).mean() * batch.request_P.numel()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_loss_is_a_sum_over_requests(tmp_path: Path) -> None:
    """Two halves of a batch add up to the whole: what lets ranks share it."""
    model, builder, _ = training_model(tmp_path)
    model.eval()
    targets = builder.dataset.offsets[1:][2:10] - 1
    # Validation events as targets of a training batch: those of cold titles are left out.
    targets = targets[~builder.cold[builder.title[targets]]]

    def loss(events: np.ndarray) -> Tensor:
        return model(builder.build(builder.windows_before(events), np.random.default_rng(0)))[0]

    torch.testing.assert_close(loss(targets), loss(targets[:2]) + loss(targets[2:]), rtol=1e-5, atol=1e-5)


def test_dropped_scenario_does_not_lift_rights(tmp_path: Path) -> None:
    """Scenario dropout hides the region from the model, never from the rights."""
    model, _, batch = training_model(tmp_path, "model.scenario_dropout=0.9", rights=True)
    assert (batch.scenario_PM == 0).float().mean() > (batch.rights_PM == 0).float().mean()
    loss, _ = model(batch)
    unrestricted, _ = model(replace(batch, rights_PM=torch.ones_like(batch.rights_PM)))
    hidden, _ = model(replace(batch, rights_PM=batch.scenario_PM))
    assert loss < unrestricted
    assert loss != hidden
