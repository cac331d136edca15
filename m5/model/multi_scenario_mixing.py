"""Multi-scenario mixing layer (paper: "multi-scenario mixing layer"), one per branch: interests to ONE user vector.

    z   = [interests ; E^SH(x^u, x^s, x^c) ; crosses],  cross(f) = (W_f E(f)) * (W_s E(x^s))   concat and crossing
    x   = gelu(W z)     W's part for all but the interests is applied once per situation (`m5.batch`)
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
expert, V scenario values, R = I + 1 + D rows of width H that hold one expert (in its table they are cut otherwise, see
`expert_table_shape`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchrec import EmbeddingCollection, EmbeddingConfig

from m5.model.keyed_dropout import KeyedDropout
from m5.model.multi_interest_extraction import Interests, LastInterests
from m5.model.multi_modal_embedding import Situations

EXPERT_ROW = (512, 2048)  # least and most numbers in a row of a table of experts


class Mixed(NamedTuple):
    """u_PD and, for the model's health, the weight each active expert got (shared ones first)."""

    user_PD: Tensor
    gate_PA: Tensor


def expert_rows(input_width: int, output_width: int) -> int:
    """R: rows of width H of which one expert consists: W_1 [I, H], its bias [1, H] and the transposed W_2 [D, H]."""
    return input_width + 1 + output_width


def expert_table_shape(*, input_width: int, hidden: int, output_width: int) -> tuple[int, int]:
    """Rows of an expert's table that hold one expert, and their width: its R x H numbers one after the other.

    A lookup and its update cost FBGEMM about as much for a narrow row as for a wide one, so rows are made some hundred
    numbers wide (on a CPU the update of 63 experts takes a third of the time that rows of width H = 128 take). The
    width is the least in EXPERT_ROW that divides R x H and by 4, or H where there is none. Row-wise Adagrad keeps one
    sum of squares for such a row.
    """
    numbers = expert_rows(input_width, output_width) * hidden
    least, most = EXPERT_ROW
    width = next((width for width in range(least, most + 1, 4) if numbers % width == 0), hidden)
    return numbers // width, width


def expert_tables(
    *, owned: dict[str, int], input_width: int, hidden: int, output_width: int, device: torch.device
) -> EmbeddingCollection:
    """One table per key of `Batch.experts` (`id_region`, `cg_plan`, ...), of `expert_table_shape` rows a value."""
    rows, width = expert_table_shape(input_width=input_width, hidden=hidden, output_width=output_width)
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=f"experts_{key}", num_embeddings=values * rows, embedding_dim=width, feature_names=[key]
            )
            for key, values in owned.items()
        ],
        device=device,
    )


class FeatureCrossing(nn.Module):
    """z without the interests: features and the Hadamard products of projected features with the projected scenario."""

    def __init__(self, *, width: int, features: int, scenarios: int, device: torch.device | None = None):
        super().__init__()
        self.scenario_projection = nn.Linear(scenarios * width, width, device=device) if scenarios else None
        self.feature_projection = nn.Linear(width, width, device=device) if scenarios else None
        crossed = features if scenarios else 0
        self.output_width = (features + scenarios + crossed) * width

    def forward(self, feature_JFD: Tensor, scenario_JMD: Tensor) -> Tensor:
        """[J, F, D], [J, M, D] -> [J, (F + M + crosses) * D]."""
        parts = [feature_JFD, scenario_JMD]
        if self.scenario_projection is not None and self.feature_projection is not None:
            scenario_JD = self.scenario_projection(scenario_JMD.flatten(1))
            parts.append((self.feature_projection(feature_JFD) * scenario_JD.unsqueeze(1)).to(feature_JFD.dtype))
        return torch.cat(parts, dim=1).flatten(1)


class Expert(nn.Module):
    """A two-layer perceptron I -> H -> D."""

    def __init__(self, *, input_width: int, hidden: int, output_width: int, device: torch.device | None = None):
        super().__init__()
        self.hidden = nn.Linear(input_width, hidden, device=device)
        self.output = nn.Linear(hidden, output_width, bias=False, device=device)

    def forward(self, x_PI: Tensor) -> Tensor:
        return self.output(functional.gelu(self.hidden(x_PI)))


class OwnedExperts(NamedTuple):
    """The experts of one scenario dimension's values that occur in the batch.

    Attributes:
        weight_URH: of the U values that occur.
        order_P: int64, the requests sorted by their value.
        sizes: how many requests have each of the U values.
    """

    weight_URH: Tensor
    order_P: Tensor
    sizes: tuple[int, ...]

    def weighed(self, x_PI: Tensor, gate_P: Tensor) -> Tensor:
        """[P, I] and the owned expert's weight [P] -> [P, D], in the precision of x."""
        return _OwnedExperts.apply(x_PI, gate_P, self.weight_URH.to(x_PI.dtype), self.order_P, self.sizes)


class GatheredExperts(NamedTuple):
    """The same for a few requests, which only ask: every request's expert is gathered, and nothing is grouped.

    Attributes:
        weight_VRH: of all V values.
        value_P: int64, each request's value.
    """

    weight_VRH: Tensor
    value_P: Tensor

    def weighed(self, x_PI: Tensor, gate_P: Tensor) -> Tensor:
        """As of `OwnedExperts`."""
        inputs = x_PI.shape[1]
        weight_PRH = self.weight_VRH.index_select(0, self.value_P)
        first_PIH, bias_PH, second_PDH = weight_PRH[:, :inputs], weight_PRH[:, inputs], weight_PRH[:, inputs + 1 :]
        active_PH = functional.gelu(torch.einsum("pi,pih->ph", x_PI, first_PIH) + bias_PH)
        return torch.einsum("ph,pdh->pd", active_PH * gate_P.unsqueeze(-1), second_PDH)


class _OwnedExperts(torch.autograd.Function):
    """g_p W_2 gelu(W_1 x_p + b) with the expert of each request's value; in value order inside, request order outside.

    Every expert multiplies its requests alone. One function, because autograd would keep and copy each group apart.
    x_PJ is x with a one behind it, J = I + 1, which meets b: in an expert b is the row after W_1.
    """

    @staticmethod
    def forward(ctx, x_PI, gate_P, weight_URH, order_P, sizes):
        P, input_width = x_PI.shape
        # A few columns more than are used keep the rows aligned, which matrix products like.
        x_PJ = x_PI.new_ones(P, input_width + 8)[:, : input_width + 1]
        x_PJ[:, :-1] = x_PI.index_select(0, order_P)
        gate_P1 = gate_P.index_select(0, order_P).unsqueeze(-1)
        first_UJH, second_UDH = weight_URH.tensor_split([x_PJ.shape[1]], dim=1)
        hidden_PH = x_PJ.new_empty(len(x_PJ), first_UJH.shape[2])
        output_PD = x_PJ.new_empty(len(x_PJ), second_UDH.shape[1])
        _multiply(x_PJ.split(sizes), first_UJH, hidden_PH.split(sizes))
        active_PH = functional.gelu(hidden_PH)
        _multiply((active_PH * gate_P1).split(sizes), second_UDH.mT, output_PD.split(sizes))
        ctx.save_for_backward(x_PJ, gate_P1, weight_URH, order_P, hidden_PH, active_PH)
        ctx.sizes = sizes
        return torch.empty_like(output_PD).index_copy_(0, order_P, output_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PD):
        x_PJ, gate_P1, weight_URH, order_P, hidden_PH, active_PH = ctx.saved_tensors
        sizes, inputs = ctx.sizes, x_PJ.shape[1]
        grad_PD = grad_PD.index_select(0, order_P)
        grad_URH, back_PH = torch.empty_like(weight_URH), torch.empty_like(hidden_PH)
        grad_PI = x_PJ.new_empty(len(x_PJ), inputs - 1)
        (first_UJH, second_UDH), (grad_UJH, grad_UDH) = (
            experts.tensor_split([inputs], dim=1) for experts in (weight_URH, grad_URH)
        )
        _multiply(grad_PD.split(sizes), second_UDH, back_PH.split(sizes))
        _multiply(grad_PD.T.split(sizes, dim=1), (active_PH * gate_P1).split(sizes), grad_UDH)
        grad_gate_P = (back_PH * active_PH).sum(-1)
        back_PH = torch.ops.aten.gelu_backward(back_PH.mul_(gate_P1), hidden_PH)
        _multiply(back_PH.split(sizes), first_UJH[:, :-1].mT, grad_PI.split(sizes))
        _multiply(x_PJ.T.split(sizes, dim=1), back_PH.split(sizes), grad_UJH)
        in_order_PI = torch.empty_like(grad_PI).index_copy_(0, order_P, grad_PI)
        return in_order_PI, torch.empty_like(grad_gate_P).index_copy_(0, order_P, grad_gate_P), grad_URH, None, None


def _multiply(lefts: Iterable[Tensor], rights: Iterable[Tensor], products: Iterable[Tensor]) -> None:
    """A matrix product each, into place."""
    for left, right, product in zip(lefts, rights, products, strict=True):
        torch.mm(left, right, out=product)


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
        self.shared = nn.ModuleList(
            Expert(input_width=input_width, hidden=hidden, output_width=output_width, device=device)
            for _ in range(shared)
        )
        self.gate = nn.Linear(input_width + scenario_width, shared + scenarios, device=device)

    def forward(self, x_PI: Tensor, situations: Situations, owned: Sequence[OwnedExperts | GatheredExperts]) -> Mixed:
        """[P, I], E(x^s) of the situations, the owned experts of M dimensions -> Mixed."""
        of_x_AI, of_scenario_AX = self.gate.weight.split([x_PI.shape[1], self.gate.in_features - x_PI.shape[1]], dim=1)
        logit_JA = functional.linear(situations.scenario_JMD.flatten(1), of_scenario_AX, self.gate.bias)
        logit_PA = functional.linear(x_PI, of_x_AI) + situations.each(logit_JA)
        gate_PA = torch.softmax(logit_PA.float(), dim=-1)
        # All in the precision of x, which autocast may have lowered.
        weight_PA = gate_PA.to(x_PI.dtype)
        user_PD = self._shared(x_PI, weight_PA[:, : len(self.shared)])
        for m, experts in enumerate(owned):
            user_PD = user_PD + experts.weighed(x_PI, weight_PA[:, len(self.shared) + m])
        return Mixed(user_PD, gate_PA)

    def _shared(self, x_PI: Tensor, weight_PE: Tensor) -> Tensor:
        """Shared experts side by side as one hidden layer; weighing its units, the second product adds them up."""
        experts = [expert for expert in self.shared if isinstance(expert, Expert)]
        first_XI = torch.cat([expert.hidden.weight for expert in experts])
        bias_X = torch.cat([expert.hidden.bias for expert in experts])
        second_DX = torch.cat([expert.output.weight for expert in experts], dim=1)
        active_PX = functional.gelu(functional.linear(x_PI, first_XI, bias_X))
        weighed_PEH = active_PX.unflatten(1, (len(self.shared), -1)) * weight_PE.unsqueeze(-1)
        return functional.linear(weighed_PEH.flatten(1), second_DX)


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
        interest_width: (K + 1) * D, of all interests of a request together.
        mixture: `SplitMixture`, `MultiGateMixture` or `Expert` (the scenario-blind control).
        input_width: I.
        dropout: on x in training.
    """

    def __init__(
        self,
        *,
        crossing: FeatureCrossing,
        interest_width: int,
        mixture: SplitMixture | MultiGateMixture | Expert,
        input_width: int,
        dropout: float,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.crossing = crossing
        self.bottom = nn.Linear(interest_width + crossing.output_width, input_width, device=device)
        self.mixture = mixture
        self.dropout = KeyedDropout(dropout, input_width)

    def forward(
        self,
        interests: Interests | LastInterests,
        situations: Situations,
        owned: Sequence[OwnedExperts | GatheredExperts],
        scenario_PM: Tensor,
        draw_P: Tensor | None = None,
    ) -> Mixed:
        """Interests and situations -> Mixed.

        `draw_P` are the int32 dropout keys of the requests; None in evaluation.
        """
        crossed_JZ = self.crossing(situations.feature_JFD, situations.scenario_JMD)
        # W z without ever joining z: every part meets its own columns of W.
        widths = [interests.default_KD.numel(), interests.latest_PD.shape[1], crossed_JZ.shape[1]]
        of_interest_IX, of_latest_ID, of_situation_IZ = self.bottom.weight.split(widths, dim=1)
        bottom_PI = situations.each(functional.linear(crossed_JZ, of_situation_IZ, self.bottom.bias))
        bottom_PI = bottom_PI + interests.linear(of_interest_IX)
        bottom_PI = bottom_PI + functional.linear(interests.latest_PD, of_latest_ID)
        x_PI = self.dropout(functional.gelu(bottom_PI), draw_P)
        if isinstance(self.mixture, SplitMixture):
            mixed = self.mixture(x_PI, situations, owned)
        elif isinstance(self.mixture, MultiGateMixture):
            mixed = self.mixture(x_PI, scenario_PM)
        else:
            mixed = Mixed(self.mixture(x_PI), x_PI.new_ones(x_PI.shape[0], 1, dtype=torch.float32))
        return Mixed(interests.latest_PD + mixed.user_PD, mixed.gate_PA)
