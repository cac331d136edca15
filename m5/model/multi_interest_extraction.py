"""Multi-interest extraction layer (paper: "multi-interest extraction layer"), one per branch.

    d_i       = e_i + W [e_i ; s_i]                subsidiary decoration; W s once per distinct s (`m5.batch`)
    h         = Transformer(d)   (ID branch)       self-attention interest extraction
    h         = d                (CG branch)       identity mapping: the pre-trained space is kept
    a_i       = A(s)_i                             intensity, recomputed from the relations within the sequence
    v_{k,j}   = sum_{i <= j, c_i = k} alpha_i h_i  alpha = softmax over those i of (a_i + rho_k i)
with c_i the behaviour's category and rho_k a learned recency slope. Because a softmax ignores constants, exp(rho_k i)
is a decay by age that does not depend on the request j. W v is a weighted sum of W h: no interest is ever written out.

Source: Zhao et al., KDD 2023 (layer, categorisation, decoration, identity mapping); US 11,880,376 (reweighting of
subsidiary features); softmax aggregation, prefixes and recency slope are our decisions.
Dimension legend in `m5.batch`; H heads, F width of the subsidiary features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from m5.batch import ByCategory
from m5.model.keyed_dropout import KeyedDropout
from m5.model.multi_modal_embedding import Subsidiary

MAX_SLOPE = 0.5  # per behaviour: the interest then lives in the last two or three behaviours of its category
MAX_SLOPE_EXPONENT = 40.0  # slope x history: exp() of it, times a long history's sum, stays inside float32
MAX_INTENSITY = 10.0
CHUNK = 64  # behaviours whose pairs are multiplied at once; the work per behaviour is that of one such row


def rotate(x_BLHX: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): attention sees relative positions only.

    Neighbouring elements are a pair, hence one complex number, and turning it is one product.
    """
    length, half = x_BLHX.shape[1], x_BLHX.shape[-1] // 2
    position_L1 = torch.arange(length, device=x_BLHX.device, dtype=torch.float32).unsqueeze(-1)
    frequency_X = base ** (-torch.arange(half, device=x_BLHX.device, dtype=torch.float32) / half)
    angle_LX = position_L1 * frequency_X
    turn_LX = torch.polar(torch.ones_like(angle_LX), angle_LX)
    pairs_BLHX = torch.view_as_complex(x_BLHX.float().unflatten(-1, (half, 2)))
    return torch.view_as_real(pairs_BLHX * turn_LX.unsqueeze(1)).flatten(-2).to(x_BLHX.dtype)


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
        packed = self.query_key_value(self.attention_norm(x_BLD)).view(B, L, 3 * self.heads, D // self.heads)
        turned, value_BLHX = packed.split([2 * self.heads, self.heads], dim=2)
        query_BHLX, key_BHLX = rotate(turned).transpose(1, 2).chunk(2, dim=1)
        attended_BHLX = functional.scaled_dot_product_attention(
            query_BHLX,
            key_BHLX,
            value_BLHX.transpose(1, 2),
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

    def forward(self, subsidiary: Subsidiary, valid_BL: Tensor) -> Tensor:
        """Subsidiary features, bool [B, L] -> float32 [B, L]."""
        own_SX = functional.gelu(self.own(subsidiary.feature_SF))
        packed_SX = torch.cat([own_SX, self.query_key(own_SX)], dim=-1)
        own_BLX, query_BLX, key_BLX = subsidiary.each(packed_SX).chunk(3, dim=-1)
        related_BLX = functional.scaled_dot_product_attention(
            query_BLX.unsqueeze(1),
            key_BLX.unsqueeze(1),
            own_BLX.unsqueeze(1),
            attn_mask=None if self.causal else valid_BL[:, None, None, :],
            is_causal=self.causal,
        ).squeeze(1)
        raw_BL = self.scalar(torch.cat([own_BLX, related_BLX], dim=-1)).squeeze(-1).float()
        return MAX_INTENSITY * torch.tanh(raw_BL / MAX_INTENSITY)


class PrefixMeans(NamedTuple):
    """The interests as weights: behaviour i is in the interest of category k at position j by weight_{i,k} share_{j,k}.

    So whatever is linear in the interests is one weighted sum over the behaviours, and nobody needs the K vectors that
    every request has of them.

    Attributes:
        weight_BLK: exp(a_i + rho_k i), up to a constant; 0 for all but the behaviour's own category.
        share_BLK: one over the category's weights up to and including each position, 0 where it has no behaviour yet.
        missing_BLK: 1 where it has none.
    """

    weight_BLK: Tensor
    share_BLK: Tensor
    missing_BLK: Tensor

    def added_up(self, x_BLX: Tensor, default_KX: Tensor) -> Tensor:
        """float32 [B, L, X]: at every position the sum over categories of the mean of x over the category's behaviours.

        A category without behaviour up to there brings its default. Chunk by chunk: within a chunk one matrix product
        over its pairs of behaviours; what came before a chunk is one sum per category.
        """
        B, L, X = x_BLX.shape
        chunks, length = chunked(L)
        pad = chunks * length - L

        # Y chunks, of I behaviours each. The same operators whatever their number, for the compiler and for `m5.plan`.
        def cut(y_BLZ: Tensor) -> Tensor:
            return functional.pad(y_BLZ, (0, 0, 0, pad)).view(B * chunks, length, -1)

        x_YIX, weight_YKI, share_YIK = cut(x_BLX), cut(self.weight_BLK).mT, cut(self.share_BLK)
        before_II = torch.ones(length, length, device=x_BLX.device).tril()
        weight_YII = torch.bmm(share_YIK, weight_YKI) * before_II
        earlier_YKX = _before(torch.bmm(weight_YKI, x_YIX), chunks)
        share_YIZ = torch.cat([share_YIK, cut(self.missing_BLK)], dim=-1)
        earlier_YZX = torch.cat([earlier_YKX, default_KX.expand(B * chunks, -1, -1)], dim=1)
        sum_YIX = torch.baddbmm(torch.bmm(weight_YII, x_YIX), share_YIZ, earlier_YZX)
        return sum_YIX.view(B, chunks * length, X)[:, :L]


class CategoryAggregation(nn.Module):
    """v_{k,j}: one interest per category and prefix, by cumulative softmax sums."""

    def __init__(self, *, width: int, categories: int, history: int, device: torch.device | None = None):
        super().__init__()
        self.categories = categories
        self.max_slope = min(MAX_SLOPE, MAX_SLOPE_EXPONENT / history)
        # sigmoid(-3) of the largest slope: at first an interest averages over some forty behaviours.
        self.slope = nn.Parameter(torch.full((categories,), -3.0, device=device))
        self.default = nn.Parameter(torch.zeros(categories, width, device=device))

    def forward(self, intensity_BL: Tensor, category_BL: Tensor) -> PrefixMeans:
        """How the behaviours' states make up the interests.

        Args:
            intensity_BL: float32 intensities.
            category_BL: int64 in 0..K-1, -1 = belongs to no category (start, padding).
        """
        L = category_BL.shape[1]
        # Counted from the middle: exponents of either sign, so that neither weights nor squares of sums leave float32.
        position_L = torch.arange(L, device=category_BL.device, dtype=torch.float32)
        position_L = position_L - torch.full_like(position_L, L) / 2
        member_BLK = functional.one_hot(category_BL + 1, self.categories + 1)[..., 1:].float()
        slope_BL = (member_BLK * (torch.sigmoid(self.slope.float()) * self.max_slope)).sum(-1)
        weight_BLK = member_BLK * torch.exp(intensity_BL + position_L * slope_BL).unsqueeze(-1)
        missing_BLK = (member_BLK.cumsum(1) == 0).float()
        share_BLK = (1 - missing_BLK) / (weight_BLK.cumsum(1) + missing_BLK)
        return PrefixMeans(weight_BLK, share_BLK, missing_BLK)


def chunked(length: int) -> tuple[int, int]:
    """L -> number and length of the chunks that a sequence is cut into, as even as can be."""
    chunks = -(-length // CHUNK)
    return chunks, -(-length // chunks)


def _before(sum_YKX: Tensor, chunks: int) -> Tensor:
    """Sums of each chunk -> sums of all earlier chunks of its sequence."""
    sum_BYKX = sum_YKX.view(-1, chunks, *sum_YKX.shape[1:])
    earlier_BYKX = functional.pad(sum_BYKX.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
    return earlier_BYKX.reshape(sum_YKX.shape)


class Interests(NamedTuple):
    """What a branch has extracted.

    Attributes:
        h_BLD: the extracted behaviours, for the masked-language-model loss too.
        means: how they make up the interest of every category.
        default_KD: the learned interest of a category without behaviour.
        behaviours: by category.
        request_P: int64 flat positions of the requests.
        latest_PD: the latest behaviour's state, which plays the part of a session interest (it is SASRec's user vector;
            our decision).
    """

    h_BLD: Tensor
    means: PrefixMeans
    default_KD: Tensor
    behaviours: ByCategory
    request_P: Tensor
    latest_PD: Tensor

    def linear(self, weight_XV: Tensor) -> Tensor:
        """W [v_1 ; ... ; v_K] of every request, W [X, K * D] -> [P, X].

        Behaviours are multiplied with their own category's columns and then averaged, instead of the other way round:
        one product of width D a behaviour, not K a request.
        """
        B, L, D = self.h_BLD.shape
        own_TD = self.h_BLD.reshape(B * L, D).index_select(0, self.behaviours.order_T)
        groups = zip(own_TD.split(self.behaviours.sizes), weight_XV.split(D, dim=1), strict=True)
        own_TX = torch.cat([functional.linear(own_XD, columns_XD) for own_XD, columns_XD in groups])
        x_BLX = own_TX.new_zeros(B * L, own_TX.shape[1]).index_copy(0, self.behaviours.order_T, own_TX).view(B, L, -1)
        columns_XKD = weight_XV.unflatten(1, self.default_KD.shape)
        return self._requested(x_BLX, (columns_XKD * self.default_KD).sum(-1).T).to(own_TX.dtype)

    def each(self) -> Tensor:
        """float32 [P, K, D]: v_k of every request. Training does without; this is for reports and tests."""
        of_each = []
        for k, member_BL1 in enumerate((self.means.weight_BLK > 0).split(1, dim=-1)):
            default_KD = torch.zeros_like(self.default_KD)
            default_KD[k] = self.default_KD[k]
            of_each.append(self._requested(member_BL1 * self.h_BLD, default_KD))
        return torch.stack(of_each, dim=1)

    def _requested(self, x_BLX: Tensor, default_KX: Tensor) -> Tensor:
        # Sums of a whole history: autocast would make its products in bfloat16.
        with torch.autocast(x_BLX.device.type, enabled=False):
            sum_BLX = self.means.added_up(x_BLX.float(), default_KX.float())
        return sum_BLX.flatten(0, 1).index_select(0, self.request_P)


class LastInterests(NamedTuple):
    """The interests at one position of every sequence, written out: what a viewer who asks now needs.

    Attributes:
        each_BKD: v_k, float32.
        default_KD, latest_PD: as of `Interests`; P = B.
    """

    each_BKD: Tensor
    default_KD: Tensor
    latest_PD: Tensor

    @classmethod
    def of(cls, interests: Interests, position_B: Tensor) -> LastInterests:
        """Those at int64 `position_B` of each sequence, which are `interests`' requests."""
        means, B = interests.means, position_B.shape[0]
        row_B = torch.arange(B, device=position_B.device)
        share_BK, missing_BK = means.share_BLK[row_B, position_B], means.missing_BLK[row_B, position_B]
        # Behaviours after the position have no share: they are padding, of no category.
        weight_BKL = means.weight_BLK.mT * share_BK.unsqueeze(-1)
        each_BKD = torch.bmm(weight_BKL, interests.h_BLD.float())
        each_BKD = each_BKD + missing_BK.unsqueeze(-1) * interests.default_KD.float()
        return cls(each_BKD, interests.default_KD, interests.latest_PD)

    def linear(self, weight_XV: Tensor) -> Tensor:
        """As of `Interests`."""
        return functional.linear(self.each_BKD.flatten(1), weight_XV)


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
        subsidiary: Subsidiary,
        category_BL: Tensor,
        valid_BL: Tensor,
        behaviours: ByCategory,
        request_P: Tensor,
        draw_BL: Tensor | None = None,
    ) -> Interests:
        """Interests of every request.

        Args:
            e_BLD: title embeddings of the behaviours.
            subsidiary: their subsidiary features.
            category_BL: int64, -1 outside behaviours.
            valid_BL: bool, start and behaviours.
            behaviours: those of a category, by category.
            request_P: int64 flat positions.
            draw_BL: int32 dropout keys of the positions; None in evaluation.

        Returns:
            Interests.
        """
        B, L, D = e_BLD.shape
        h_BLD = e_BLD
        if self.decoration is not None:
            of_title_DD, of_subsidiary_DF = self.decoration.weight.split([D, self.decoration.in_features - D], dim=1)
            decoration_SD = functional.linear(subsidiary.feature_SF, of_subsidiary_DF, self.decoration.bias)
            h_BLD = e_BLD + functional.linear(e_BLD, of_title_DD) + subsidiary.each(decoration_SD)
        for block in self.blocks:
            h_BLD = block(h_BLD, valid_BL, draw_BL)
        h_BLD = self.norm(h_BLD)
        if self.intensity is not None:
            intensity_BL = self.intensity(subsidiary, valid_BL)
        else:
            intensity_BL = torch.zeros(B, L, device=e_BLD.device)
        with torch.autocast(h_BLD.device.type, enabled=False):
            means = self.aggregation(intensity_BL, category_BL)
        latest_PD = h_BLD.reshape(B * L, D).index_select(0, request_P)
        return Interests(h_BLD, means, self.aggregation.default, behaviours, request_P, latest_PD)
