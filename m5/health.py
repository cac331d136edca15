"""Live health of a model in training: expert load and entropy, the branches' weight per scenario, interest collapse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from m5.batch import Batch
from m5.model.m5 import Scores
from m5.schema import Manifest


@dataclass(frozen=True)
class Health:
    """Health of one batch.

    Attributes:
        expert_load: per branch, float [A], mean gate weight of each active expert; shared ones first, then one per
            scenario dimension. All mass on one expert is a collapsed mixture.
        expert_entropy: per branch, mean entropy of the gate over log A: 1 = even, 0 = one expert per request.
        gate: mean weight w of the ID branch, overall and per scenario value.
        interest_similarity: mean cosine between a request's interests of different categories, those that stand for
            no behaviour left in; near 1 the interests have collapsed into one.
    """

    expert_load: dict[str, list[float]]
    expert_entropy: dict[str, float]
    gate: dict[str, float]
    interest_similarity: float

    @classmethod
    @torch.no_grad()
    def of(cls, scores: Scores, batch: Batch, manifest: Manifest) -> Health:
        return cls(
            expert_load={branch: gate_PA.mean(0).tolist() for branch, gate_PA in scores.expert_PA.items()},
            expert_entropy={branch: _relative_entropy(gate_PA) for branch, gate_PA in scores.expert_PA.items()},
            gate=_gate_by_scenario(scores.gate_P.cpu(), batch.rights_PM.cpu(), manifest),
            interest_similarity=_interest_similarity(scores.interests.each()),
        )

    def numbers(self) -> dict[str, float]:
        """Flat names for metrics.jsonl and TensorBoard."""
        flat = {"interest_similarity": self.interest_similarity}
        flat |= {f"expert_entropy/{branch}": value for branch, value in self.expert_entropy.items()}
        for branch, load in self.expert_load.items():
            flat |= {f"expert_load/{branch}/{index}": value for index, value in enumerate(load)}
        return flat | {f"gate/{scenario}": value for scenario, value in self.gate.items()}


def _relative_entropy(gate_PA: Tensor) -> float:
    experts = gate_PA.shape[1]
    if experts == 1:
        return 0.0
    entropy_P = torch.special.entr(gate_PA).sum(-1)
    return float(entropy_P.mean() / torch.log(torch.tensor(float(experts))))


def _gate_by_scenario(gate_P: Tensor, scenario_PM: Tensor, manifest: Manifest) -> dict[str, float]:
    gates = {"all": float(gate_P.mean())}
    for column, vocabulary in enumerate(manifest.scenarios):
        count_V = torch.bincount(scenario_PM[:, column], minlength=vocabulary.size)
        sum_V = torch.bincount(scenario_PM[:, column], weights=gate_P.float(), minlength=vocabulary.size)
        for index in count_V.nonzero().flatten().tolist():
            value = vocabulary.values[index - 1] if index else "unknown"
            gates[f"{vocabulary.name}={value}"] = float(sum_V[index] / count_V[index])
    return gates


def _interest_similarity(interest_PKD: Tensor) -> float:
    K = interest_PKD.shape[1]
    if K < 2:
        return 0.0
    unit_PKD = functional.normalize(interest_PKD.float(), dim=-1)
    total_P = unit_PKD.sum(1).square().sum(-1) - unit_PKD.square().sum((1, 2))
    return float(total_P.mean() / (K * (K - 1)))
