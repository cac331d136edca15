"""M5: two mirrored towers over shared tables (Zhao et al., KDD 2023, doi 10.1145/3580305.3599863).

Dimension legend in `m5.batch`; Q = 2 D width of query and key (D without content branch).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection

from m5.batch import Batch
from m5.model.keyed_dropout import position_keys
from m5.model.multi_interest_extraction import Interests, MultiInterestExtraction
from m5.model.multi_modal_embedding import Embedded, MultiModalEmbedding
from m5.model.multi_scenario_mixing import FeatureCrossing, Mixed, MultiScenarioMixing, OwnedExperts
from m5.model.weighted_candidate_matching import WeightedCandidateMatching


class TowerOutput(NamedTuple):
    mixed: Mixed
    interests: Interests


class Scores(NamedTuple):
    """What the loss and the evaluation need; score of request p and candidate c is query_PQ[p] . key_CQ[c].

    `gate_P`, `expert_PA` (per branch) and `interests` (ID branch) tell the model's health; `h_BLD` feeds the
    masked-language-model loss.
    """

    query_PQ: Tensor
    key_CQ: Tensor
    gate_P: Tensor
    expert_PA: dict[str, Tensor]
    interests: Interests
    id_key_CD: Tensor


class Tower(nn.Module):
    """One branch: multi-interest extraction, then multi-scenario mixing."""

    def __init__(self, *, extraction: MultiInterestExtraction, mixing: MultiScenarioMixing):
        super().__init__()
        self.extraction = extraction
        self.mixing = mixing

    def forward(self, e_BLD: Tensor, embedded: Embedded, owned: list[OwnedExperts], batch: Batch) -> TowerOutput:
        draw_BL = position_keys(batch.draw_B, e_BLD.shape[1])
        valid_BL = torch.arange(e_BLD.shape[1], device=e_BLD.device) < batch.length_B.unsqueeze(-1)
        interests = self.extraction(
            e_BLD, embedded.subsidiary, batch.category_BL, valid_BL, batch.by_category, batch.request_P, draw_BL
        )
        mixed = self.mixing(
            interests,
            embedded.situations,
            owned,
            batch.scenario_PM,
            draw_BL.flatten().index_select(0, batch.request_P),
        )
        return TowerOutput(mixed, interests)


class MirroredTowers(nn.ModuleDict):
    """`id` and, with a content branch, `cg`: the same layers, separate weights."""

    def forward(self, embedded: Embedded, owned: dict[str, list[OwnedExperts]], batch: Batch) -> dict[str, TowerOutput]:
        return {
            branch: tower(e_BLD, embedded, owned[branch], batch)
            for (branch, tower), e_BLD in zip(self.items(), (embedded.id_BLD, embedded.cg_BLD), strict=False)
        }


class M5(nn.Module):
    """The bare model, without loss: this is what is evaluated and exported.

    The sharded collections are direct children, and `forward` hands them fields of the batch as they are: that is what
    TorchRec's pipeline needs to distribute the next batch's input while this one is computed.

    Args:
        tables: the sharded tables of titles and features.
        embedding: the multi-modal embedding layer.
        experts: the sharded tables of the experts that scenario values own, or None.
        expert_shape: (R, H) of one of those experts.
        towers: `id` and, with a content branch, `cg`.
        gate_crossing: crossed features that the branches' weight w reads; None without content branch.
        matching: the weighted candidate matching layer.
    """

    def __init__(
        self,
        *,
        tables: EmbeddingCollection,
        embedding: MultiModalEmbedding,
        experts: EmbeddingCollection | None,
        expert_shape: tuple[int, int],
        towers: dict[str, Tower],
        gate_crossing: FeatureCrossing | None,
        matching: WeightedCandidateMatching,
    ):
        super().__init__()
        self.tables = tables
        self.embedding = embedding
        self.experts = experts
        self.expert_shape = expert_shape
        # The order of a batch's keys, which is order_MP's: a sharded collection answers in the order of its plan.
        owned = experts.embedding_configs() if experts is not None else ()
        self.expert_keys = [name for table in owned for name in table.feature_names]
        self.towers = MirroredTowers(towers)
        self.gate_crossing = gate_crossing
        self.matching = matching

    def _owned_experts(self, batch: Batch) -> dict[str, list[OwnedExperts]]:
        """Per branch and scenario dimension the experts of the values that occur in the batch."""
        owned: dict[str, list[OwnedExperts]] = {branch: [] for branch in self.towers}
        if self.experts is not None and batch.experts is not None:
            rows = self.experts(batch.experts)
            for key in self.expert_keys:
                of_branch = owned[key.split("_")[0]]
                weight_URH = rows[key].values().reshape(-1, *self.expert_shape)
                m = len(of_branch)
                of_branch.append(OwnedExperts(weight_URH, batch.order_MP[m], batch.group_sizes[m]))
        return owned

    def forward(self, batch: Batch) -> Scores:
        """Batch -> Scores."""
        embedded = self.embedding(self.tables(batch.sparse), batch)
        outputs = self.towers(embedded, self._owned_experts(batch), batch)
        user = {branch: outputs[branch].mixed.user_PD for branch in self.towers}
        situations = embedded.situations
        crossed_JX = None
        if self.gate_crossing is not None:
            crossed_JX = self.gate_crossing(situations.feature_JFD, situations.scenario_JMD)
        query_PQ, gate_P = self.matching(user["id"], user.get("cg"), crossed_JX, situations)
        return Scores(
            query_PQ=query_PQ,
            key_CQ=self.matching.key(embedded.id_key_CD, embedded.cg_key_CD),
            gate_P=gate_P,
            expert_PA={branch: outputs[branch].mixed.gate_PA for branch in self.towers},
            interests=outputs["id"].interests,
            id_key_CD=embedded.id_key_CD,
        )
