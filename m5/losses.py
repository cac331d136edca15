"""The matching loss: softmax cross-entropy over the candidates, without ever holding all logits.

    loss_p = -s_p + log( exp(s_p) + sum_{c != target, c playable} exp(q_p . k_c - log Q_c) ),   s_p = q_p . k_target

`log Q_c` is the log expected number of draws of a sampled candidate (Bengio & Senecal 2008; Yi et al., RecSys 2019,
doi 10.1145/3298689.3346996) and 0 for the full catalogue. Logits are made chunk by chunk; the gradient of a chunk is
taken while its probabilities are still in cache, so that forward and backward together need three matrix products and
no second pass. The products may run in bfloat16; the score of the target, the log-sum-exp and all sums stay in
float32.

On several ranks each holds a slice of the candidates. The queries of all ranks are gathered, every rank makes the
logits of all of them over its slice, the log-sum-exp is joined from two numbers per request and rank, and each query's
gradient goes back to its owner. So the loss and its gradients are those of one rank with the whole batch, every key is
looked up and every logit made once in the job. Dimension legend in `m5.batch`; Q width of query and key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from m5.batch import Batch
from m5.eligibility import Playable
from m5.model.m5 import M5, Scores
from m5.ranks import ALONE, Exchange

# float32 logits of a chunk: on a CPU 4 MiB, which stay in a server core's caches (with an eighth or four times of it a
# step takes a tenth longer); on a GPU enough to fill it, and few enough chunks for the ranks' exchange after each.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**26
# On a CPU at least so many requests, however large the catalogue: every chunk goes over the gradient of all keys.
LEAST_ROWS = 128
# In place of -inf for what is no candidate: a row without any candidate would otherwise be NaN, and not 0.
NOTHING = -1e30

PlayableRows = Callable[[slice], Tensor]
"""Rows of the requests of all ranks -> bool [rows, C], True where the candidate may be played."""


class _CandidateSoftmax(torch.autograd.Function):
    """Loss summed over the requests of all ranks; gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, query_PQ, key_CQ, positive_PQ, log_q_C, own_G, playable, precision, exchange, ranks_P, longest):
        # One gather carries a query and the score of its target.
        score_P1 = (query_PQ * positive_PQ).sum(-1, keepdim=True)
        query_GQ, score_G = exchange.gather_rows(torch.cat([query_PQ, score_P1], -1), ranks_P).split(
            [query_PQ.shape[1], 1], -1
        )
        score_G = score_G.squeeze(-1)
        partial_GQ, key_grad = torch.empty_like(query_GQ), torch.zeros_like(key_CQ)
        log_sum_G = torch.empty_like(score_G)
        factor_CQ = key_CQ.to(precision)
        # Ranks exchange after every chunk, so they must cut alike: by the longest slice.
        for part in _chunks(len(query_GQ), longest, query_PQ.device.type == "cpu"):
            score, own = score_G[part], own_G[part]
            factor = query_GQ[part].to(precision)
            logits = (factor @ factor_CQ.T).float()
            if log_q_C is not None:
                logits -= log_q_C
            if playable is not None:
                logits.masked_fill_(~playable(part), NOTHING)
            has_own = (own >= 0).nonzero().squeeze(-1)
            logits[has_own, own[has_own]] = NOTHING  # the target counts once, as `score`
            if len(key_CQ):
                base, among = logits.amax(-1), torch.softmax(logits, -1)
                sums = 1 / among.amax(-1)
            else:
                base, among, sums = torch.full_like(score, NOTHING), logits, torch.zeros_like(score)
            base_WG, sum_WG = exchange.gather_pairs(base, sums)
            largest = torch.maximum(base_WG.amax(0), score)
            total = (sum_WG * (base_WG - largest).exp()).sum(0) + (score - largest).exp()
            log_sum_G[part] = total.log() + largest
            # Of each request's probability, what falls to this slice; it scales rows of Q numbers instead of C.
            share_G1 = (sums * (base - largest).exp() / total).unsqueeze(-1)
            among = among.to(precision)
            partial_GQ[part] = share_G1 * (among @ factor_CQ)
            key_grad += among.T @ (share_G1 * query_GQ[part]).to(precision)
        own = exchange.own(ranks_P)
        residual_P1 = torch.expm1(score_G[own] - log_sum_G[own]).unsqueeze(-1)  # probability of the target, less one
        query_grad = exchange.sum_rows(partial_GQ, ranks_P).addcmul(residual_P1, positive_PQ)
        ctx.save_for_backward(query_grad, key_grad, residual_P1 * query_PQ)
        return (log_sum_G - score_G).sum()

    @staticmethod
    def backward(ctx, grad):
        query_grad, key_grad, positive_grad = ctx.saved_tensors
        return grad * query_grad, grad * key_grad, grad * positive_grad, *[None] * 7


def chunk_rows(candidates: int, *, on_cpu: bool) -> int:
    """Requests whose logits are made at a time."""
    rows = (CPU_CHUNK if on_cpu else GPU_CHUNK) // max(1, candidates)
    return max(LEAST_ROWS if on_cpu else 1, rows)


def _chunks(requests: int, candidates: int, on_cpu: bool) -> Iterator[slice]:
    rows = chunk_rows(candidates, on_cpu=on_cpu)
    for first in range(0, requests, rows):
        yield slice(first, min(first + rows, requests))


def candidate_softmax(
    query_PQ: Tensor,
    key_CQ: Tensor,
    positive_PQ: Tensor,
    *,
    log_q_C: Tensor | None,
    own_G: Tensor,
    playable: PlayableRows | None = None,
    precision: torch.dtype = torch.float32,
    exchange: Exchange = ALONE,
    ranks_P: tuple[int, ...] | None = None,
    longest: int | None = None,
) -> Tensor:
    """Sum over the requests of all ranks of the softmax cross-entropy (a collective call on several ranks).

    Args:
        query_PQ: float32 [P, Q] of this rank.
        key_CQ: float32 [C, Q] candidate keys, this rank's slice of them.
        positive_PQ: float32 [P, Q] key of each request's target.
        log_q_C: float32 [C], subtracted from the candidates' logits; None, which is faster, for the full catalogue.
        own_G: int64 [G], for every request of all ranks the candidate of the slice that is its target, -1 where there
            is none.
        playable: rows -> bool [rows, C]; a title that the viewer may not play is no negative. None: all are.
        precision: of the three matrix products.
        exchange, ranks_P: the ranks, and how many requests each has; by default this is the only one.
        longest: C of the rank that has the longest slice.

    Returns:
        float32 scalar in nats, the same on every rank. Its gradients are those of the whole sum with respect to this
        rank's arguments.
    """
    # Inside autocast the products would come out in bf16; the logits' log-sum-exp is kept in float32.
    with torch.autocast(query_PQ.device.type, enabled=False):
        return _CandidateSoftmax.apply(
            query_PQ.float(),
            key_CQ.float(),
            positive_PQ.float(),
            log_q_C,
            own_G,
            playable,
            precision,
            exchange,
            (len(query_PQ),) if ranks_P is None else ranks_P,
            len(key_CQ) if longest is None else longest,
        )


class MatchingLoss(nn.Module):
    """L_match + lambda L_mlm, summed over the requests of all ranks.

    Args:
        playable: None where nothing restricts playing.
        sampled: whether the candidates are drawn, so that their log Q counts; over the full catalogue it is 0.
        mlm_weight: lambda; 0 for causal attention, where every position already is a target.
        width: D, for the masked-language-model head.
        precision: of the matrix products of the candidate softmax.
        exchange: with the other ranks.
    """

    def __init__(
        self,
        *,
        playable: Playable | None,
        sampled: bool,
        mlm_weight: float,
        width: int,
        precision: torch.dtype = torch.float32,
        exchange: Exchange = ALONE,
    ):
        super().__init__()
        self.playable = playable
        self.sampled = sampled
        self.mlm_weight = mlm_weight
        self.precision = precision
        self.exchange = exchange
        self.mlm_projection = nn.Linear(width, width) if mlm_weight else None

    def forward(self, scores: Scores, batch: Batch) -> Tensor:
        """Scores and their batch -> float32 scalar in nats, the same on every rank."""
        negative_C = batch.negative_C
        facts_PX = torch.cat([batch.target_P.unsqueeze(-1), batch.timestamp_P.unsqueeze(-1), batch.rights_PM], -1)
        facts_GX = self.exchange.gather_rows(facts_PX, batch.ranks_P)

        def playable_rows(rows: slice) -> Tensor:
            assert self.playable is not None
            return self.playable(facts_GX[rows, 2:], facts_GX[rows, 1], negative_C)

        loss = candidate_softmax(
            scores.query_PQ,
            scores.key_CQ[: len(negative_C)],
            scores.key_CQ.index_select(0, batch.positive_P),
            log_q_C=batch.log_q_C if self.sampled else None,
            own_G=place_among(negative_C, facts_GX[:, 0]),
            playable=playable_rows if self.playable is not None else None,
            precision=self.precision,
            exchange=self.exchange,
            ranks_P=batch.ranks_P,
            longest=batch.longest_slice,
        )
        if self.mlm_projection is not None:
            loss = loss + self.mlm_weight * self._masked_title_loss(batch, scores, self.mlm_projection)
        return loss

    def _masked_title_loss(self, batch: Batch, scores: Scores, projection: nn.Linear) -> Tensor:
        """The same softmax of the hidden titles against E^ID, on the scale of one loss per request.

        It is computed, as zero, for a batch without hidden titles too: ranks must agree on the graph that they train.
        """
        negative_C = batch.negative_C
        hidden_QD = scores.interests.h_BLD.flatten(0, 1).index_select(0, batch.masked_Q)
        title_Q1 = batch.candidate_C.index_select(0, batch.masked_place_Q).unsqueeze(-1)
        loss = candidate_softmax(
            projection(hidden_QD),
            scores.id_key_CD[: len(negative_C)],
            scores.id_key_CD.index_select(0, batch.masked_place_Q),
            log_q_C=batch.log_q_C if self.sampled else None,
            own_G=place_among(negative_C, self.exchange.gather_rows(title_Q1, batch.ranks_Q).squeeze(-1)),
            precision=self.precision,
            exchange=self.exchange,
            ranks_P=batch.ranks_Q,
            longest=batch.longest_slice,
        )
        return loss * (sum(batch.ranks_P) / max(1, sum(batch.ranks_Q)))


def place_among(ascending_C: Tensor, wanted_G: Tensor) -> Tensor:
    """int64 [C] ascending, [G] -> [G]: where each wanted number stands, -1 where it does not."""
    if not len(ascending_C):
        return torch.full_like(wanted_G, -1)
    place_G = torch.searchsorted(ascending_C, wanted_G.contiguous()).clamp(max=len(ascending_C) - 1)
    return torch.where(ascending_C[place_G] == wanted_G, place_G, -1)


class M5Train(nn.Module):
    """The model with its loss, as DLRMTrain wraps DLRM."""

    def __init__(self, model: M5, loss: MatchingLoss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> tuple[Tensor, Scores]:
        """Batch -> (sum over the requests of all ranks of the loss in nats, Scores of this rank's requests)."""
        scores = self.model(batch)
        return self.loss(scores, batch), scores
