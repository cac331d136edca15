"""Layers reduce to simpler models where they should, and SMoE costs the same however many scenario values there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m5.assemble import build_model
from m5.batch import ByCategory
from m5.data.arrays import by_category
from m5.data.sequences import BatchBuilder
from m5.model.multi_interest_extraction import CategoryAggregation, Interests
from m5.model.multi_modal_embedding import Situations
from m5.model.multi_scenario_mixing import (
    Expert,
    MultiGateMixture,
    OwnedExperts,
    SplitMixture,
    expert_rows,
    expert_table_shape,
)
from tests.reference import randomise
from tests.world import tiny_config, write_world

WIDTH, INPUT, HIDDEN = 8, 5, 4
NO_SCENARIO = Situations(torch.zeros(1, 0, WIDTH), torch.zeros(1, 0, WIDTH), torch.zeros(6, dtype=torch.int64))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_split_mixture_of_one_shared_expert_is_the_perceptron() -> None:
    mixture = randomise(
        SplitMixture(
            input_width=INPUT,
            hidden=HIDDEN,
            output_width=WIDTH,
            scenario_width=0,
            shared=1,
            scenarios=0,
        )
    )
    perceptron = Expert(input_width=INPUT, hidden=HIDDEN, output_width=WIDTH)
    perceptron.load_state_dict(mixture.shared[0].state_dict())
    x_PI = torch.randn(6, INPUT)
    mixed = mixture(x_PI, NO_SCENARIO, [])
    torch.testing.assert_close(mixed.user_PD, perceptron(x_PI))


def test_one_scenario_value_is_scenario_blind() -> None:
    """Where all requests share the scenario, its expert is one more shared expert."""
    split = randomise(
        SplitMixture(
            input_width=INPUT,
            hidden=HIDDEN,
            output_width=WIDTH,
            scenario_width=0,
            shared=1,
            scenarios=1,
        )
    )
    blind = SplitMixture(
        input_width=INPUT,
        hidden=HIDDEN,
        output_width=WIDTH,
        scenario_width=0,
        shared=2,
        scenarios=0,
    )
    own = torch.randn(expert_rows(INPUT, WIDTH), HIDDEN)
    with torch.no_grad():
        blind.gate.load_state_dict(split.gate.state_dict())
        blind.shared[0].load_state_dict(split.shared[0].state_dict())
        blind.shared[1].hidden.weight.copy_(own[:INPUT].T)
        blind.shared[1].hidden.bias.copy_(own[INPUT])
        blind.shared[1].output.weight.copy_(own[INPUT + 1 :])
    x_PI = torch.randn(6, INPUT)
    torch.testing.assert_close(
        split(x_PI, NO_SCENARIO, [OwnedExperts(own.unsqueeze(0), torch.arange(6), (6,))]).user_PD,
        blind(x_PI, NO_SCENARIO, []).user_PD,
    )


def test_multi_gate_mixture_without_scenarios_is_plain_mixture() -> None:
    mixture = randomise(
        MultiGateMixture(
            input_width=INPUT,
            hidden=HIDDEN,
            output_width=WIDTH,
            experts=3,
            scenario_values=(),
        )
    )
    x_PI = torch.randn(4, INPUT)
    gate_PE = torch.softmax(mixture.default_gate(x_PI), dim=-1)
    expected = sum(gate_PE[:, e : e + 1] * mixture.experts[e](x_PI) for e in range(3))
    torch.testing.assert_close(mixture(x_PI, torch.zeros(4, 0, dtype=torch.int64)).user_PD, expected)


def interests_of(layer: CategoryAggregation, h_BLD: Tensor, intensity_BL: Tensor, category_BL: Tensor) -> Tensor:
    """[B * L, K, D]: the interests at every position."""
    order, sizes = by_category(category_BL.numpy(), layer.categories)
    every_P = torch.arange(category_BL.numel())
    means = layer(intensity_BL, category_BL)
    grouped = ByCategory(torch.from_numpy(order), sizes)
    return Interests(h_BLD, means, layer.default, grouped, every_P, h_BLD.flatten(0, 1)).each()


def test_one_category_without_slope_and_intensity_is_the_running_mean() -> None:
    layer = CategoryAggregation(width=WIDTH, categories=1, history=4)
    with torch.no_grad():
        layer.slope.fill_(-torch.inf)
    h_BLD = torch.randn(1, 5, WIDTH)
    category_BL = torch.tensor([[-1, 0, 0, 0, 0]])
    interests = interests_of(layer, h_BLD, torch.zeros(1, 5), category_BL)
    for last in range(1, 5):
        torch.testing.assert_close(interests[last, 0], h_BLD[0, 1 : last + 1].mean(0))


def test_one_category_without_slope_is_attention_pooling() -> None:
    layer = CategoryAggregation(width=WIDTH, categories=1, history=4)
    with torch.no_grad():
        layer.slope.fill_(-torch.inf)
    h_BLD, intensity_BL = torch.randn(1, 5, WIDTH), torch.randn(1, 5)
    pooled = torch.softmax(intensity_BL[0], dim=0) @ h_BLD[0]
    interests = interests_of(layer, h_BLD, intensity_BL, torch.zeros(1, 5, dtype=torch.int64))
    torch.testing.assert_close(interests[4, 0], pooled)


def test_aggregation_survives_the_longest_history_at_the_steepest_slope() -> None:
    history = 2000
    layer = CategoryAggregation(width=2, categories=1, history=history)
    with torch.no_grad():
        layer.slope.fill_(torch.inf)
    h_BLD = torch.arange(history + 1.0).view(1, -1, 1).expand(1, -1, 2)
    category_BL = torch.zeros(1, history + 1, dtype=torch.int64)
    extreme_BL = torch.full((1, history + 1), 10.0)
    interests = interests_of(layer, h_BLD, extreme_BL, category_BL)
    decay = torch.exp(torch.tensor(-layer.max_slope, dtype=torch.float64)) ** torch.arange(history + 1).flip(0)
    expected = (decay * h_BLD[0, :, 0]).sum() / decay.sum()
    assert torch.isfinite(interests).all()
    torch.testing.assert_close(interests[-1, 0, 0].double(), expected, rtol=1e-4, atol=0)


def test_autocast_does_not_blur_a_long_history() -> None:
    """Of many behaviours that are all alike the interest is that one, to float32 and not to bfloat16."""
    layer = CategoryAggregation(width=2, categories=1, history=400)
    h_BLD, category_BL = torch.full((1, 400, 2), 1.001), torch.zeros(1, 400, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        interests = interests_of(layer, h_BLD, torch.randn(1, 400), category_BL)
    torch.testing.assert_close(interests, torch.full((400, 1, 2), 1.001))


# ---- the cost of scenarios -----------------------------------------------------------------------------------


def test_owned_experts_cost_the_same_however_many_requests_share_them() -> None:
    """FLOPs depend on the number of requests, not on the number of values among them."""
    rows = expert_rows(INPUT, WIDTH)
    split = SplitMixture(input_width=INPUT, hidden=HIDDEN, output_width=WIDTH, scenario_width=0, shared=1, scenarios=1)
    blind = SplitMixture(input_width=INPUT, hidden=HIDDEN, output_width=WIDTH, scenario_width=0, shared=1, scenarios=0)
    x_PI = torch.randn(6, INPUT)

    def flops(mixture: SplitMixture, owned: list[OwnedExperts]) -> int:
        with FlopCounterMode(display=False) as counter:
            mixture(x_PI, NO_SCENARIO, owned)
        return counter.get_total_flops()

    def of_values(values: int) -> int:
        experts = OwnedExperts(torch.randn(values, rows, HIDDEN), torch.randperm(6), (6 // values,) * values)
        return flops(split, [experts]) - flops(blind, [])

    # Its expert's two products, the bias among the first one's rows, and its column of the gate's.
    assert of_values(1) == of_values(3) == of_values(6) == 6 * 2 * (HIDDEN * (INPUT + 1 + WIDTH) + INPUT)


def test_cost_of_a_batch_does_not_grow_with_the_number_of_scenario_values(
    tmp_path: Path,
) -> None:
    """The same requests in worlds of 3 and of 300 regions: same rows looked up, same FLOPs."""
    costs = []
    for regions in (3, 300):
        dataset = write_world(tmp_path / str(regions), regions=3)
        names = tuple(f"r{i}" for i in range(1, regions + 1))
        manifest = dataset.manifest
        wide = manifest.scenarios[0].model_copy(update={"values": names})
        dataset.manifest = manifest.model_copy(update={"scenarios": (wide, *manifest.scenarios[1:])})
        config = tiny_config(tmp_path / str(regions), tmp_path / "run")
        builder, model = BatchBuilder(dataset, config), build_model(dataset, config)
        batch = builder.build(builder.windows_before(dataset.offsets[1:][2:10] - 1), None)
        with FlopCounterMode(display=False) as counter:
            model(batch)
        assert (
            dict(model.experts.named_parameters())["embeddings.experts_id_region.weight"].shape[0]
            == (regions + 1) * expert_table_shape(input_width=12, hidden=8, output_width=16)[0]
        )
        costs.append((batch.experts.values().numel(), counter.get_total_flops()))
    assert costs[0] == costs[1]
    assert costs[0][1] > 0
