"""The matching loss: softmax cross-entropy over the candidates, without ever holding all logits.

    loss_p = -s_p + log( exp(s_p) + sum_{c != target, c playable} exp(q_p . k_c - log Q_c) ),   s_p = q_p . k_target

`log Q_c` is the log expected number of draws of a sampled candidate (Bengio & Senecal 2008; Yi et al., RecSys 2019,
doi 10.1145/3298689.3346996) and 0 for the full catalogue. Logits are made chunk by chunk; the gradient of a chunk is
taken while its probabilities are still in cache, so that forward and backward together need three matrix products and
no second pass. The products may run in bfloat16; the score of the target, the log-sum-exp and all sums stay in
float32. Dimension legend in `m5.batch`; Q width of query and key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from m5.batch import Batch
from m5.model.m5 import M5, Scores

CHUNK_ELEMENTS = 2**21  # float32 logits of a chunk: 8 MiB, which stays in a server core's share of the last-level cache

PlayableRows = Callable[[slice], Tensor]
"""Rows of the requests -> bool [rows, C], True where the candidate may be played."""


class _CandidateSoftmax(torch.autograd.Function):
    """Mean loss over the requests; gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, query_PQ, key_CQ, positive_PQ, log_q_C, own_P, playable, precision):
        requests, candidates = query_PQ.shape[0], key_CQ.shape[0]
        query_grad, positive_grad = torch.empty_like(query_PQ), torch.empty_like(positive_PQ)
        key_grad = torch.zeros_like(key_CQ)
        loss_P = query_PQ.new_empty(requests)
        factor_CQ = key_CQ.to(precision)
        rows = max(1, CHUNK_ELEMENTS // candidates)
        for first in range(0, requests, rows):
            part = slice(first, min(first + rows, requests))
            query, positive, own = query_PQ[part], positive_PQ[part], own_P[part]
            factor = query.to(precision)
            logits = (factor @ factor_CQ.T).float()
            logits -= log_q_C
            if playable is not None:
                logits.masked_fill_(~playable(part), -torch.inf)
            has_own = (own >= 0).nonzero().squeeze(-1)
            logits[has_own, own[has_own]] = -torch.inf  # the target counts once, as `score`
            score = (query * positive).sum(-1)
            largest = torch.maximum(logits.amax(-1), score)
            logits.sub_(largest.unsqueeze(-1)).exp_()
            positive_exp = (score - largest).exp()
            total = logits.sum(-1) + positive_exp
            loss_P[part] = total.log() + largest - score
            probability = logits.div_(total.unsqueeze(-1)).to(precision)
            residual = (positive_exp / total - 1).unsqueeze(-1)
            query_grad[part] = (probability @ factor_CQ).float().addcmul_(residual, positive)
            positive_grad[part] = residual * query
            key_grad += probability.T @ factor
        ctx.save_for_backward(query_grad, key_grad, positive_grad)
        return loss_P.sum()

    @staticmethod
    def backward(ctx, grad):
        query_grad, key_grad, positive_grad = ctx.saved_tensors
        return grad * query_grad, grad * key_grad, grad * positive_grad, None, None, None, None


def candidate_softmax(
    query_PQ: Tensor,
    key_CQ: Tensor,
    positive_PQ: Tensor,
    *,
    log_q_C: Tensor,
    own_P: Tensor,
    playable: PlayableRows | None = None,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Sum over the requests of the softmax cross-entropy.

    Args:
        query_PQ: float32 [P, Q].
        key_CQ: float32 [C, Q] candidate keys.
        positive_PQ: float32 [P, Q] key of each request's target.
        log_q_C: float32 [C], subtracted from the candidates' logits; 0 for the full catalogue.
        own_P: int64 [P], the candidate that is the target itself, -1 where there is none.
        playable: rows -> bool [rows, C]; a title that the viewer may not play is no negative. None: all are.
        precision: of the three matrix products.

    Returns:
        float32 scalar in nats.
    """
    # Inside autocast the products would come out in bf16; the logits' log-sum-exp is kept in float32.
    with torch.autocast(query_PQ.device.type, enabled=False):
        return _CandidateSoftmax.apply(
            query_PQ.float(), key_CQ.float(), positive_PQ.float(), log_q_C, own_P, playable, precision
        )


class M5Train(nn.Module):
    """The model with its loss L = L_match + lambda L_mlm, as DLRMTrain wraps DLRM.

    Args:
        model: the bare model.
        playable: (rights [P, M], time [P], candidates [C]) -> bool [P, C], or None where nothing restricts playing.
        mlm_weight: lambda; 0 for causal attention, where every position already is a target.
        width: D, for the masked-language-model head.
        precision: of the matrix products of the candidate softmax.
    """

    def __init__(
        self,
        *,
        model: M5,
        playable: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        mlm_weight: float,
        width: int,
        precision: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model = model
        self.playable = playable
        self.mlm_weight = mlm_weight
        self.precision = precision
        self.mlm_projection = nn.Linear(width, width) if mlm_weight else None

    def forward(self, batch: Batch) -> tuple[Tensor, Scores]:
        """Batch -> (sum over its requests of the loss in nats, Scores)."""
        scores = self.model(batch)

        def playable_rows(rows: slice) -> Tensor:
            assert self.playable is not None
            return self.playable(batch.rights_PM[rows], batch.timestamp_P[rows], batch.candidate_C[:negatives])

        negatives = batch.log_q_C.numel()
        loss = candidate_softmax(
            scores.query_PQ,
            scores.key_CQ[:negatives],
            scores.key_CQ.index_select(0, batch.positive_P),
            log_q_C=batch.log_q_C,
            own_P=batch.own_P,
            playable=playable_rows if self.playable is not None else None,
            precision=self.precision,
        )
        if self.mlm_projection is not None:
            loss = loss + self.mlm_weight * self._masked_title_loss(batch, scores, self.mlm_projection)
        return loss, scores

    @staticmethod
    def _masked_title_loss(batch: Batch, scores: Scores, projection: nn.Linear) -> Tensor:
        """Cross-entropy of the hidden titles against E^ID, on the scale of one loss per request.

        It is computed, as zero, for a batch without hidden titles too: ranks must agree on the graph that they train.
        """
        hidden_QD = scores.h_BLD.flatten(0, 1).index_select(0, batch.masked_Q)
        logits_QC = projection(hidden_QD) @ scores.id_key_CD.T
        loss = functional.cross_entropy(logits_QC.float(), batch.masked_place_Q, reduction="sum")
        return loss * (batch.request_P.numel() / max(1, batch.masked_Q.numel()))
