"""Multi-scenario mixing layer (paper: "multi-scenario mixing layer"), one per branch: interests to ONE user vector.

    z   = [interests ; E^SH(x^u, x^s, x^c) ; crosses],  cross(f) = (W_f E(f)) * (W_s E(x^s))   concat and crossing
    x   = gelu(W z)
    g   = softmax(G [x ; E(x^s)]) over the A = E_shared + M active experts
    u   = h_latest + sum_a g_a expert_a(x)                                                     split mixture of experts

Split mixture of experts (SMoE): shared experts serve everybody; every value of every scenario dimension (region=US,
plan=ads, ...) owns one more. An example pays for its A active experts, whatever the number of scenario values: the
owned experts are *rows of a sharded table*, of which a batch looks up, and the optimizer updates, only the values
that occur; within the batch requests are grouped by value, one matrix product a group.

Controls behind the same interface: `MultiGateMixture` (MMoE: all experts, one gate per scenario value) and
a single `Expert` (scenario-blind).

Source: Zhao et al., KDD 2023 (the layer and SMoE by name); internals are our decisions. MMoE: Ma et al., KDD 2018,
doi 10.1145/3219819.3220007. Dimension legend in `m5.batch`; A active experts, I width of x, H hidden width of an
expert, V scenario values, R = I + 1 + D rows that hold one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingCollection, EmbeddingConfig

from m5.model.keyed_dropout import KeyedDropout


class Mixed(NamedTuple):
    """u_PD and, for the model's health, the weight each active expert got (shared ones first)."""

    user_PD: Tensor
    gate_PA: Tensor


def expert_rows(input_width: int, output_width: int) -> int:
    """R: rows of width H that hold one expert: W_1 [I, H], its bias [1, H] and the transposed W_2 [D, H]."""
    return input_width + 1 + output_width


def expert_tables(
    *, owned: dict[str, int], input_width: int, hidden: int, output_width: int, device: torch.device
) -> EmbeddingCollection:
    """One table of V * R rows per key of `Batch.experts` (`id_region`, `cg_plan`, ...)."""
    rows = expert_rows(input_width, output_width)
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=f"experts_{key}", num_embeddings=values * rows, embedding_dim=hidden, feature_names=[key]
            )
            for key, values in owned.items()
        ],
        device=device,
    )


class FeatureCrossing(nn.Module):
    """z: interests, features and the Hadamard products of projected features with the projected scenario."""

    def __init__(
        self, *, width: int, interests: int, features: int, scenarios: int, device: torch.device | None = None
    ):
        super().__init__()
        self.scenario_projection = nn.Linear(scenarios * width, width, device=device) if scenarios else None
        self.feature_projection = nn.Linear(width, width, device=device) if scenarios else None
        crossed = features if scenarios else 0
        self.output_width = (interests + features + scenarios + crossed) * width

    def forward(self, interest_PXD: Tensor, feature_PFD: Tensor, scenario_PMD: Tensor) -> Tensor:
        """[P, X, D], [P, F, D], [P, M, D] -> [P, (X + F + M + crosses) * D]."""
        parts = [interest_PXD, feature_PFD.to(interest_PXD.dtype), scenario_PMD.to(interest_PXD.dtype)]
        if self.scenario_projection is not None and self.feature_projection is not None:
            scenario_PD = self.scenario_projection(scenario_PMD.flatten(1))
            parts.append(self.feature_projection(parts[1]) * scenario_PD.unsqueeze(1))
        return torch.cat(parts, dim=1).flatten(1)


class Expert(nn.Module):
    """A two-layer perceptron I -> H -> D."""

    def __init__(self, *, input_width: int, hidden: int, output_width: int, device: torch.device | None = None):
        super().__init__()
        self.hidden = nn.Linear(input_width, hidden, device=device)
        self.output = nn.Linear(hidden, output_width, bias=False, device=device)

    def forward(self, x_PI: Tensor) -> Tensor:
        return self.output(functional.gelu(self.hidden(x_PI)))


def owned_expert(x_PI: Tensor, weight_URH: Tensor, group_P: Tensor, output_width: int) -> Tensor:
    """Apply to every request the expert of its scenario value.

    Args:
        x_PI: [P, I].
        weight_URH: [U, R, H], the experts of the U values that occur in the batch.
        group_P: int64 in 0..U-1, which of them a request owns.

    Returns:
        [P, D]. One pair of matrix products per group, each over that group's requests alone.
    """
    if not len(weight_URH):
        # No request at all. The table stays in the graph: other ranks wait for this one in its backward.
        return x_PI.new_zeros(0, output_width) + weight_URH.sum().to(x_PI.dtype)
    order_P = torch.argsort(group_P, stable=True)
    sizes = torch.bincount(group_P, minlength=weight_URH.shape[0]).tolist()
    outputs = []
    for x_GI, weight_RH in zip(x_PI.index_select(0, order_P).split(sizes), weight_URH.unbind(0), strict=True):
        first_IH, bias_H, second_DH = weight_RH.split([x_PI.shape[1], 1, output_width])
        hidden_GH = functional.gelu(torch.addmm(bias_H.to(x_GI.dtype), x_GI, first_IH.to(x_GI.dtype)))
        outputs.append(hidden_GH @ second_DH.to(x_GI.dtype).T)
    position_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    return torch.cat(outputs).index_select(0, position_P)


class SplitMixture(nn.Module):
    """SMoE. Args: I, H, D as `input_width`, `hidden`, `output_width`; `shared` experts; M as `scenarios`."""

    def __init__(
        self,
        *,
        input_width: int,
        hidden: int,
        output_width: int,
        scenario_width: int,
        shared: int,
        scenarios: int,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.output_width = output_width
        self.shared = nn.ModuleList(
            Expert(input_width=input_width, hidden=hidden, output_width=output_width, device=device)
            for _ in range(shared)
        )
        self.gate = nn.Linear(input_width + scenario_width, shared + scenarios, device=device)

    def forward(self, x_PI: Tensor, scenario_PX: Tensor, owned_URH: list[Tensor], group_PM: Tensor) -> Mixed:
        """[P, I], [P, M * D], M tensors [U_m, R, H], int64 [P, M] -> Mixed."""
        gate_PA = torch.softmax(self.gate(torch.cat([x_PI, scenario_PX.to(x_PI.dtype)], dim=-1)).float(), dim=-1)
        outputs = [expert(x_PI) for expert in self.shared]
        outputs += [
            owned_expert(x_PI, weight_URH, group_PM[:, m], self.output_width) for m, weight_URH in enumerate(owned_URH)
        ]
        weight_PA = gate_PA.to(x_PI.dtype)
        user_PD = sum(weight_PA[:, a : a + 1] * output_PD for a, output_PD in enumerate(outputs))
        return Mixed(user_PD, gate_PA)


class MultiGateMixture(nn.Module):
    """MMoE control: every expert runs for everybody; each scenario value has its own gate over them."""

    def __init__(
        self,
        *,
        input_width: int,
        hidden: int,
        output_width: int,
        experts: int,
        scenario_values: tuple[int, ...],
        device: torch.device | None = None,
    ):
        super().__init__()
        self.experts = nn.ModuleList(
            Expert(input_width=input_width, hidden=hidden, output_width=output_width, device=device)
            for _ in range(experts)
        )
        self.default_gate = nn.Linear(input_width, experts, device=device)
        self.gates = nn.ParameterList(
            nn.Parameter(torch.zeros(values, experts, input_width, device=device)) for values in scenario_values
        )

    def forward(self, x_PI: Tensor, scenario_PM: Tensor) -> Mixed:
        """[P, I], int64 [P, M] vocabulary indices -> Mixed; the gates of an example's scenario values add up."""
        logit_PE = self.default_gate(x_PI)
        for m, gate_VEI in enumerate(self.gates):
            gate_PEI = gate_VEI.to(x_PI.dtype).index_select(0, scenario_PM[:, m])
            logit_PE = logit_PE + torch.einsum("pei,pi->pe", gate_PEI, x_PI)
        gate_PE = torch.softmax(logit_PE.float(), dim=-1)
        output_PED = torch.stack([expert(x_PI) for expert in self.experts], dim=1)
        return Mixed(torch.einsum("pe,ped->pd", gate_PE.to(x_PI.dtype), output_PED), gate_PE)


class MultiScenarioMixing(nn.Module):
    """Crossing, bottom projection and mixture of one branch.

    Args:
        crossing: `FeatureCrossing`.
        mixture: `SplitMixture`, `MultiGateMixture` or `Expert` (the scenario-blind control).
        input_width: I.
        dropout: on x in training.
    """

    def __init__(
        self,
        *,
        crossing: FeatureCrossing,
        mixture: SplitMixture | MultiGateMixture | Expert,
        input_width: int,
        dropout: float,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.crossing = crossing
        self.bottom = nn.Linear(crossing.output_width, input_width, device=device)
        self.mixture = mixture
        self.dropout = KeyedDropout(dropout, input_width)

    def forward(
        self,
        interest_PXD: Tensor,
        feature_PFD: Tensor,
        scenario_PMD: Tensor,
        owned_URH: list[Tensor],
        group_PM: Tensor,
        scenario_PM: Tensor,
        draw_P: Tensor | None = None,
    ) -> Mixed:
        """Interests [P, X, D] (the latest state last), features [P, F, D], scenario embeddings [P, M, D] -> Mixed.

        `draw_P` are the int32 dropout keys of the requests; None in evaluation.
        """
        crossed_PZ = self.crossing(interest_PXD, feature_PFD, scenario_PMD)
        x_PI = self.dropout(functional.gelu(self.bottom(crossed_PZ)), draw_P)
        if isinstance(self.mixture, SplitMixture):
            mixed = self.mixture(x_PI, scenario_PMD.flatten(1), owned_URH, group_PM)
        elif isinstance(self.mixture, MultiGateMixture):
            mixed = self.mixture(x_PI, scenario_PM)
        else:
            mixed = Mixed(self.mixture(x_PI), x_PI.new_ones(x_PI.shape[0], 1, dtype=torch.float32))
        return Mixed(interest_PXD[:, -1] + mixed.user_PD, mixed.gate_PA)
