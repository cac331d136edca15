"""Weighted candidate matching layer (paper: "weighted candidate matching layer").

    f^t = scale^t u^t . E^t(n),  w = sigmoid(W_2 gelu(W_1 crossed E^SH)),  p = softmax(w f^ID + (1 - w) f^CG)

u^t and E^t(n) are plain or unit vectors (`score`). Because w and scale belong to the request, the
score is ONE inner product: query [w s u^ID ; (1 - w) s u^CG] against key [E^ID ; E^CG], which is what an index serves.

Source: Zhao et al., KDD 2023; scales and normalisation are our decisions. Dimension legend in `m5.batch`; Q = 2 D.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from m5.model.multi_modal_embedding import Situations


class Matching(NamedTuple):
    """query_PQ and the ID branch's weight gate_P (1 in a model without content branch)."""

    query_PQ: Tensor
    gate_P: Tensor


class WeightedCandidateMatching(nn.Module):
    """Joins both branches' user vectors into the query and their embeddings into the key.

    Args:
        width: D.
        gate_width: width of the crossed user, scenario and context features; 0 makes w one learned number.
        score: `cosine` (unit vectors, learned scale) or `dot` (plain inner product).
        content: False for a model without content branch.
    """

    def __init__(
        self,
        *,
        width: int,
        gate_width: int,
        score: Literal["cosine", "dot"],
        content: bool,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.cosine, self.content = score == "cosine", content
        # Cosines in -1..1 need a scale near log(N) to make a peaked softmax. Plain ID keys start short (norm 1), but
        # CG keys are layer-normalised (norm sqrt(D)) and would start the softmax saturated.
        start = [math.log(12.0)] * 2 if self.cosine else [0.0, -0.5 * math.log(width)]
        self.log_scale = nn.Parameter(torch.tensor(start[: 1 + content], device=device))
        self.gate_bias = nn.Parameter(torch.zeros(1, device=device)) if content else None
        self.gate_hidden = nn.Linear(gate_width, 32, device=device) if content and gate_width else None
        self.gate_output = nn.Linear(32, 1, bias=False, device=device) if content and gate_width else None

    def _branch(self, x_XD: Tensor) -> Tensor:
        return functional.normalize(x_XD.float(), dim=-1) if self.cosine else x_XD.float()

    def key(self, id_ND: Tensor, cg_ND: Tensor | None) -> Tensor:
        """[N, D] and [N, D] (None without content) -> float32 [N, Q]."""
        if cg_ND is None:
            return self._branch(id_ND)
        return torch.cat([self._branch(id_ND), self._branch(cg_ND)], dim=-1)

    def forward(
        self, id_PD: Tensor, cg_PD: Tensor | None, crossed_JX: Tensor | None, situations: Situations
    ) -> Matching:
        """User vectors [P, D] of both branches and the situations' crossed features [J, X] -> Matching, float32.

        `cg_PD` and `crossed_JX` are None in a model without content branch.
        """
        scale = self.log_scale.float().exp()
        if cg_PD is None:
            return Matching(scale[0] * self._branch(id_PD), torch.ones(id_PD.shape[0], device=id_PD.device))
        assert self.gate_bias is not None, "a model without content branch got a CG vector"
        if self.gate_hidden is not None and self.gate_output is not None:
            logit_J1 = self.gate_bias + self.gate_output(functional.gelu(self.gate_hidden(crossed_JX)))
            gate_P1 = situations.each(torch.sigmoid(logit_J1.float()))
        else:
            gate_P1 = torch.sigmoid(self.gate_bias.float()).expand(id_PD.shape[0], 1)
        query_PQ = torch.cat(
            [gate_P1 * scale[0] * self._branch(id_PD), (1 - gate_P1) * scale[1] * self._branch(cg_PD)], dim=-1
        )
        return Matching(query_PQ, gate_P1.squeeze(-1))
