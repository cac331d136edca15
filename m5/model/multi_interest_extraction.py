"""Multi-interest extraction layer (paper: "multi-interest extraction layer"), one per branch.

    d_i       = e_i + W [e_i ; s_i]                subsidiary decoration
    h         = Transformer(d)   (ID branch)       self-attention interest extraction
    h         = d                (CG branch)       identity mapping: the pre-trained space is kept
    a_i       = A(s)_i                             intensity, recomputed from the relations within the sequence
    v_{k,j}   = sum_{i <= j, c_i = k} alpha_i h_i  alpha = softmax over those i of (a_i + rho_k i)
with c_i the behaviour's category and rho_k a learned recency slope. Because a softmax ignores constants, exp(rho_k i)
is a decay by age that does not depend on the request j: all prefixes come from two cumulative sums, in O(L).

Source: Zhao et al., KDD 2023 (layer, categorisation, decoration, identity mapping); US 11,880,376 (reweighting of
subsidiary features); softmax aggregation, prefixes and recency slope are our decisions.
Dimension legend in `m5.batch`; H heads, F width of the subsidiary features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from m5.model.keyed_dropout import KeyedDropout

MAX_SLOPE = 0.5  # per behaviour: the interest then lives in the last two or three behaviours of its category
MAX_SLOPE_EXPONENT = 40.0  # slope x history: exp() of it, times a long history's sum, stays inside float32
MAX_INTENSITY = 10.0


def rotate(x_BHLX: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): attention sees relative positions only."""
    half = x_BHLX.shape[-1] // 2
    position_L1 = torch.arange(x_BHLX.shape[-2], device=x_BHLX.device, dtype=torch.float32).unsqueeze(-1)
    frequency_X = base ** (-torch.arange(half, device=x_BHLX.device, dtype=torch.float32) / half)
    angle_LX = position_L1 * frequency_X
    cos, sin = angle_LX.cos().to(x_BHLX.dtype), angle_LX.sin().to(x_BHLX.dtype)
    first, second = x_BHLX[..., :half], x_BHLX[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention with rotary positions, then a two-layer perceptron; both residual."""

    def __init__(self, *, width: int, heads: int, dropout: float, causal: bool, device: torch.device | None = None):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(width, device=device)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False, device=device)
        self.attention_output = nn.Linear(width, width, bias=False, device=device)
        self.perceptron_norm = nn.LayerNorm(width, device=device)
        self.perceptron_hidden = nn.Linear(width, 4 * width, device=device)
        self.perceptron_output = nn.Linear(4 * width, width, device=device)
        self.attention_dropout = KeyedDropout(dropout, width)
        self.perceptron_dropout = KeyedDropout(dropout, width)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor, draw_BL: Tensor | None = None) -> Tensor:
        """[B, L, D], bool [B, L], int32 dropout keys [B, L] -> [B, L, D].

        With causal attention right padding needs no mask: it lies ahead.
        """
        B, L, D = x_BLD.shape
        packed = self.query_key_value(self.attention_norm(x_BLD)).view(B, L, 3, self.heads, D // self.heads)
        query_BHLX, key_BHLX, value_BHLX = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended_BHLX = functional.scaled_dot_product_attention(
            rotate(query_BHLX),
            rotate(key_BHLX),
            value_BHLX,
            attn_mask=None if self.causal else valid_BL[:, None, None, :],
            is_causal=self.causal,
        )
        attended_BLD = attended_BHLX.transpose(1, 2).reshape(B, L, D)
        x_BLD = x_BLD + self.attention_dropout(self.attention_output(attended_BLD), draw_BL)
        hidden = functional.gelu(self.perceptron_hidden(self.perceptron_norm(x_BLD)))
        return x_BLD + self.perceptron_dropout(self.perceptron_output(hidden), draw_BL)


class SubsidiaryIntensity(nn.Module):
    """a = A(s): a scalar per behaviour from its subsidiary features, recomputed from those around it.

    A single narrow attention over the subsidiary features lets "long for this viewer" differ from "long"; the
    result is bounded by +-MAX_INTENSITY through tanh, so that its exponential is safe without a running maximum.
    """

    def __init__(self, *, subsidiary_width: int, causal: bool, width: int = 16, device: torch.device | None = None):
        super().__init__()
        self.causal = causal
        self.own = nn.Linear(subsidiary_width, width, device=device)
        self.query_key = nn.Linear(width, 2 * width, bias=False, device=device)
        # Without bias: the softmax over behaviours hardly sees one, so its gradient would be rounding, which Adam blows
        # up to full steps.
        self.scalar = nn.Linear(2 * width, 1, bias=False, device=device)

    def forward(self, subsidiary_BLF: Tensor, valid_BL: Tensor) -> Tensor:
        """[B, L, F], bool [B, L] -> float32 [B, L]."""
        own_BLX = functional.gelu(self.own(subsidiary_BLF))
        query_BLX, key_BLX = self.query_key(own_BLX).chunk(2, dim=-1)
        related_BLX = functional.scaled_dot_product_attention(
            query_BLX.unsqueeze(1),
            key_BLX.unsqueeze(1),
            own_BLX.unsqueeze(1),
            attn_mask=None if self.causal else valid_BL[:, None, None, :],
            is_causal=self.causal,
        ).squeeze(1)
        raw_BL = self.scalar(torch.cat([own_BLX, related_BLX], dim=-1)).squeeze(-1).float()
        return MAX_INTENSITY * torch.tanh(raw_BL / MAX_INTENSITY)


class CategoryAggregation(nn.Module):
    """v_{k,j}: one interest per category and prefix, by cumulative softmax sums."""

    def __init__(self, *, width: int, categories: int, history: int, device: torch.device | None = None):
        super().__init__()
        self.categories = categories
        self.max_slope = min(MAX_SLOPE, MAX_SLOPE_EXPONENT / history)
        # sigmoid(-3) of the largest slope: at first an interest averages over some forty behaviours.
        self.slope = nn.Parameter(torch.full((categories,), -3.0, device=device))
        self.default = nn.Parameter(torch.zeros(categories, width, device=device))

    def forward(self, h_BLD: Tensor, intensity_BL: Tensor, category_BL: Tensor, request_P: Tensor) -> Tensor:
        """Interests at the requests.

        Args:
            h_BLD: extracted behaviours.
            intensity_BL: float32 intensities.
            category_BL: int64 in 0..K-1, -1 = belongs to no category (start, padding).
            request_P: int64 flat positions b * L + l.

        Returns:
            [P, K, D]; the learned default where the prefix has no behaviour of the category.
        """
        B, L, D = h_BLD.shape
        position_L1 = torch.arange(L, device=h_BLD.device, dtype=torch.float32).unsqueeze(-1)
        slope_K = torch.sigmoid(self.slope.float()) * self.max_slope
        member_BLK = functional.one_hot(category_BL + 1, self.categories + 1)[..., 1:].to(torch.float32)
        weight_BLK = member_BLK * torch.exp(intensity_BL.unsqueeze(-1) + position_L1 * slope_K)
        total_BLK = weight_BLK.cumsum(dim=1)
        sums = [(weight_BLK[..., k : k + 1] * h_BLD).cumsum(dim=1) for k in range(self.categories)]
        sum_PKD = torch.stack([sum_BLD.reshape(B * L, D).index_select(0, request_P) for sum_BLD in sums], dim=1)
        total_PK1 = total_BLK.reshape(B * L, -1).index_select(0, request_P).unsqueeze(-1)
        mean_PKD = sum_PKD / total_PK1.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(total_PK1 > 0, mean_PKD, self.default)


class MultiInterestExtraction(nn.Module):
    """Decoration, extraction and aggregation of one branch.

    Args:
        width: D.
        subsidiary_width: F; 0 switches decoration off.
        categories: K.
        blocks: transformer blocks; 0 is the CG branch's identity mapping.
        heads, dropout: of the blocks.
        history: the longest history, for the range of the recency slope.
        attention: `causal` (every position is a request) or `bidirectional` (only the last is, as in the paper).
    """

    def __init__(
        self,
        *,
        width: int,
        subsidiary_width: int,
        categories: int,
        blocks: int,
        heads: int,
        dropout: float,
        history: int,
        attention: Literal["causal", "bidirectional"],
        device: torch.device | None = None,
    ):
        super().__init__()
        causal = attention == "causal"
        self.decoration = nn.Linear(width + subsidiary_width, width, device=device) if subsidiary_width else None
        self.blocks = nn.ModuleList(
            TransformerBlock(width=width, heads=heads, dropout=dropout, causal=causal, device=device)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width, device=device)
        self.intensity = (
            SubsidiaryIntensity(subsidiary_width=subsidiary_width, causal=causal, device=device)
            if subsidiary_width
            else None
        )
        self.aggregation = CategoryAggregation(width=width, categories=categories, history=history, device=device)

    def forward(
        self,
        e_BLD: Tensor,
        subsidiary_BLF: Tensor,
        category_BL: Tensor,
        valid_BL: Tensor,
        request_P: Tensor,
        draw_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Interests of every request.

        Args:
            e_BLD: title embeddings of the behaviours.
            subsidiary_BLF: concatenated subsidiary embeddings.
            category_BL: int64, -1 outside behaviours.
            valid_BL: bool, start and behaviours.
            request_P: int64 flat positions.
            draw_BL: int32 dropout keys of the positions; None in evaluation.

        Returns:
            interest_PXD: [P, K + 1, D]; the K category interests, then the latest behaviour's state, which plays
                the part of a session interest (it is SASRec's user vector; our decision).
            h_BLD: the extracted behaviours, for the masked-language-model loss.
        """
        B, L, D = e_BLD.shape
        h_BLD = e_BLD
        if self.decoration is not None:
            h_BLD = e_BLD + self.decoration(torch.cat([e_BLD, subsidiary_BLF], dim=-1))
        for block in self.blocks:
            h_BLD = block(h_BLD, valid_BL, draw_BL)
        h_BLD = self.norm(h_BLD)
        if self.intensity is not None:
            intensity_BL = self.intensity(subsidiary_BLF, valid_BL)
        else:
            intensity_BL = torch.zeros(B, L, device=e_BLD.device)
        interest_PKD = self.aggregation(h_BLD.float(), intensity_BL, category_BL, request_P)
        latest_PD = h_BLD.reshape(B * L, D).index_select(0, request_P)
        return torch.cat([interest_PKD.to(h_BLD.dtype), latest_PD.unsqueeze(1)], dim=1), h_BLD
