"""Every layer against its slow reference (values and gradients), and the reductions to simpler models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m5.assemble import build_model
from m5.data.sequences import BatchBuilder
from m5.model.multi_interest_extraction import (
    CategoryAggregation,
    MultiInterestExtraction,
    SubsidiaryIntensity,
    TransformerBlock,
)
from m5.model.multi_modal_embedding import ContentProjection
from m5.model.multi_scenario_mixing import (
    Expert,
    FeatureCrossing,
    MultiGateMixture,
    SplitMixture,
    expert_rows,
    owned_expert,
)
from m5.model.weighted_candidate_matching import WeightedCandidateMatching
from tests import reference
from tests.world import tiny_config, write_world

LENGTHS = (5, 2)  # a full sequence and a padded one
WIDTH, SUBSIDIARY, CATEGORIES = 8, 6, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> nn.Module:
    """Every weight random, so that no zero start hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def assert_same(
    module: nn.Module,
    inputs: dict[str, Tensor],
    ours: Callable[..., Tensor],
    slow: Callable[..., Tensor],
    tolerance: float = 2e-4,
) -> None:
    """`ours(**inputs)` and `slow(weights, **inputs)` agree in values and in all gradients of a random projection."""
    exact = {name: w.detach().double().requires_grad_() for name, w in module.named_parameters()}
    exact_inputs = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    mine, theirs = ours(**inputs), slow(exact, **exact_inputs)
    torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(theirs)
    (mine * direction).sum().backward()
    (theirs * direction).sum().backward()
    pairs = {name: (w, exact[name]) for name, w in module.named_parameters()}
    pairs |= {name: (x, exact_inputs[name]) for name, x in inputs.items()}
    for name, (mine, theirs) in pairs.items():
        torch.testing.assert_close(
            gradient(mine),
            gradient(theirs),
            rtol=10 * tolerance,
            atol=10 * tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def gradient(x: Tensor) -> Tensor:
    """float64; what nothing was computed from has gradient zero."""
    return torch.zeros_like(x, dtype=torch.float64) if x.grad is None else x.grad.double()


def valid_mask() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def over_sequences(one: Callable[[int, int], Tensor]) -> Tensor:
    """`one(sequence, length)` [length, ...] of both sequences, one after the other, as the valid positions lie."""
    return torch.cat([one(b, length) for b, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_block(causal: bool) -> None:
    block = randomise(TransformerBlock(width=WIDTH, heads=2, dropout=0.0, causal=causal))
    assert_same(
        block,
        {"x": torch.randn(2, max(LENGTHS), WIDTH)},
        lambda x: block(x, valid_mask())[valid_mask()],
        lambda weights, x: over_sequences(
            lambda b, length: reference.transformer_block(weights, x[b, :length], heads=2, causal=causal)
        ),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_subsidiary_intensity(causal: bool) -> None:
    layer = randomise(SubsidiaryIntensity(subsidiary_width=SUBSIDIARY, causal=causal, width=4))
    assert_same(
        layer,
        {"s": torch.randn(2, max(LENGTHS), SUBSIDIARY)},
        lambda s: layer(s, valid_mask())[valid_mask()],
        lambda weights, s: over_sequences(
            lambda b, length: reference.subsidiary_intensity(weights, s[b, :length], causal=causal)
        ),
    )


CATEGORY = torch.tensor([[-1, 0, 2, 0, 2], [-1, 1, -1, -1, -1]])
REQUESTS = torch.tensor([0, 1, 3, 4, 5, 6])  # flat positions b * 5 + l: starts, middles and ends of both sequences


def test_category_aggregation() -> None:
    layer = randomise(CategoryAggregation(width=WIDTH, categories=CATEGORIES, history=4))

    def slow(weights: reference.Weights, h: Tensor, a: Tensor) -> Tensor:
        rows = []
        for place in REQUESTS.tolist():
            b, last = divmod(place, 5)
            category = CATEGORY[b].tolist()
            rows.append(reference.category_aggregation(weights, h[b], a[b], category, last, max_slope=layer.max_slope))
        return torch.stack(rows)

    inputs = {"h": torch.randn(2, 5, WIDTH), "a": 3 * torch.randn(2, 5)}
    assert_same(layer, inputs, lambda h, a: layer(h, a, CATEGORY, REQUESTS), slow)


@pytest.mark.parametrize(("blocks", "subsidiary"), [(2, SUBSIDIARY), (0, SUBSIDIARY), (1, 0)])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_extraction(blocks: int, subsidiary: int, attention: str) -> None:
    layer = randomise(
        MultiInterestExtraction(
            width=WIDTH,
            subsidiary_width=subsidiary,
            categories=CATEGORIES,
            blocks=blocks,
            heads=2,
            dropout=0.0,
            history=4,
            attention=attention,
        )
    )
    causal = attention == "causal"
    requests = REQUESTS if causal else torch.tensor([4, 6])  # bidirectional: the last position of each sequence

    def slow(weights: reference.Weights, e: Tensor, s: Tensor) -> Tensor:
        rows = []
        for place in requests.tolist():
            b, last = divmod(place, 5)
            length = LENGTHS[b]
            rows.append(
                reference.extraction(
                    weights,
                    e[b, :length],
                    s[b, :length],
                    CATEGORY[b].tolist(),
                    last,
                    blocks=blocks,
                    heads=2,
                    causal=causal,
                    max_slope=layer.aggregation.max_slope,
                )
            )
        return torch.stack(rows)

    inputs = {"e": torch.randn(2, 5, WIDTH), "s": torch.randn(2, 5, subsidiary)}
    assert_same(
        layer,
        inputs,
        lambda e, s: layer(e, s, CATEGORY, valid_mask(), requests)[0],
        slow,
        tolerance=1e-3,
    )


def test_content_projection() -> None:
    content = torch.randn(6, 4)
    layer = randomise(ContentProjection(content_NG=content, width=WIDTH))
    titles = torch.tensor([0, 5, 5, 6, 7, 8])  # titles, one of them twice, and the three special rows
    assert_same(
        layer,
        {},
        lambda: layer(titles),
        lambda weights: torch.stack(
            [reference.content_embedding(weights, content.double(), title) for title in titles.tolist()]
        ),
    )


@pytest.mark.parametrize(("features", "scenarios"), [(2, 2), (0, 1), (2, 0)])
def test_feature_crossing(features: int, scenarios: int) -> None:
    layer = randomise(FeatureCrossing(width=WIDTH, interests=3, features=features, scenarios=scenarios))
    inputs = {
        "v": torch.randn(4, 3, WIDTH),
        "f": torch.randn(4, features, WIDTH),
        "s": torch.randn(4, scenarios, WIDTH),
    }
    expected_width = (3 + features + scenarios + (features if scenarios else 0)) * WIDTH
    assert layer(inputs["v"], inputs["f"], inputs["s"]).shape == (4, expected_width) == (4, layer.output_width)
    assert_same(
        layer,
        inputs,
        lambda v, f, s: layer(v, f, s),
        lambda weights, v, f, s: torch.stack([reference.crossing(weights, v[p], f[p], s[p]) for p in range(4)]),
    )


INPUT, HIDDEN = 5, 4
GROUPS = torch.tensor([[0, 1], [2, 0], [0, 1], [1, 1], [2, 0], [0, 0]])  # three regions and two plans occur


def test_split_mixture() -> None:
    layer = randomise(
        SplitMixture(
            input_width=INPUT,
            hidden=HIDDEN,
            output_width=WIDTH,
            scenario_width=6,
            shared=2,
            scenarios=2,
        )
    )
    rows = expert_rows(INPUT, WIDTH)
    inputs = {
        "x": torch.randn(6, INPUT),
        "s": torch.randn(6, 6),
        "region": torch.randn(3, rows, HIDDEN),
        "plan": torch.randn(2, rows, HIDDEN),
    }

    def slow(weights: reference.Weights, x: Tensor, s: Tensor, region: Tensor, plan: Tensor) -> Tensor:
        return torch.stack(
            [
                reference.split_mixture(
                    weights,
                    x[p],
                    s[p],
                    [region[GROUPS[p, 0]], plan[GROUPS[p, 1]]],
                    shared=2,
                )
                for p in range(6)
            ]
        )

    assert_same(
        layer,
        inputs,
        lambda x, s, region, plan: layer(x, s, [region, plan], GROUPS).user_PD,
        slow,
    )


def test_multi_gate_mixture() -> None:
    layer = randomise(
        MultiGateMixture(
            input_width=INPUT,
            hidden=HIDDEN,
            output_width=WIDTH,
            experts=3,
            scenario_values=(4, 3),
        )
    )
    assert_same(
        layer,
        {"x": torch.randn(6, INPUT)},
        lambda x: layer(x, GROUPS).user_PD,
        lambda weights, x: torch.stack(
            [reference.multi_gate_mixture(weights, x[p], GROUPS[p].tolist(), experts=3) for p in range(6)]
        ),
    )


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize(("content", "gate_width"), [(True, 7), (True, 0), (False, 7)])
def test_matching(score: str, content: bool, gate_width: int) -> None:
    layer = randomise(WeightedCandidateMatching(width=WIDTH, gate_width=gate_width, score=score, content=content))
    branches = ("id", "cg") if content else ("id",)
    inputs = {f"u_{branch}": torch.randn(3, WIDTH) for branch in branches}
    inputs |= {f"e_{branch}": torch.randn(4, WIDTH) for branch in branches}
    inputs["crossed"] = torch.randn(3, gate_width)

    def ours(
        crossed: Tensor,
        u_id: Tensor,
        e_id: Tensor,
        u_cg: Tensor | None = None,
        e_cg: Tensor | None = None,
    ):
        score_PN = layer(u_id, u_cg, crossed).query_PQ @ layer.key(e_id, e_cg).T
        return score_PN + 0 * crossed.sum()  # a model without content branch has no gate to read them

    def slow(weights: reference.Weights, crossed: Tensor, **vectors: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.stack(
                    [
                        reference.matching_score(
                            weights,
                            {branch: vectors[f"u_{branch}"][p] for branch in branches},
                            {branch: vectors[f"e_{branch}"][n] for branch in branches},
                            crossed[p],
                            cosine=score == "cosine",
                        )
                        for n in range(4)
                    ]
                )
                for p in range(3)
            ]
        )

    assert_same(layer, inputs, ours, slow)


def test_embedding_layer_places_every_row(tmp_path: Path) -> None:
    """The jagged look-up against one look-up per position, feature and candidate."""
    dataset = write_world(tmp_path / "data")
    config = tiny_config(tmp_path / "data", tmp_path / "run")
    builder, layer = (
        BatchBuilder(dataset, config),
        build_model(dataset, config).embedding.eval(),
    )
    targets = dataset.offsets[1:][2:8] - 1
    batch = builder.build(builder.windows_before(targets), None)
    embedded = layer(batch)
    rows = {name.split(".")[1]: weight for name, weight in layer.tables.state_dict().items()}
    n_titles, cold = dataset.manifest.n_titles, dataset.titles["cold"].to_numpy()
    seconds = dataset.manifest.intensities[0].bucket(dataset.event_array("intensity_seconds"))
    for b, target in enumerate(targets):
        user = int((dataset.offsets <= target).sum()) - 1
        first = max(int(dataset.offsets[user]), int(target) - config.sequences.history)
        assert batch.length_B[b] == target - first + 1
        torch.testing.assert_close(embedded.id_BLD[b, 0], rows["title"][n_titles])
        for place, event in enumerate(range(first, int(target)), start=1):
            title = int(dataset.event_array("title")[event])
            torch.testing.assert_close(
                embedded.id_BLD[b, place],
                rows["title"][n_titles + 1 if cold[title] else title],
            )
            torch.testing.assert_close(embedded.cg_BLD[b, place], layer.content(torch.tensor([title]))[0])
            torch.testing.assert_close(
                embedded.subsidiary_BLF[b, place, 16:],
                rows["intensity_seconds"][seconds[event]],
            )
        torch.testing.assert_close(embedded.feature_PFD[b, 0], rows["user_profile"][user + 1])
        device = int(dataset.event_array("context_device")[target])
        torch.testing.assert_close(embedded.feature_PFD[b, 1], rows["context_device"][device])
        for m, name in enumerate(("region", "plan")):
            value = int(dataset.event_array(f"scenario_{name}")[target])
            torch.testing.assert_close(embedded.scenario_PMD[b, m], rows[f"scenario_{name}"][value])
        assert not embedded.id_BLD[b, int(batch.length_B[b]) :].any()


# ---- reductions ----------------------------------------------------------------------------------------------


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
    mixed = mixture(x_PI, torch.zeros(6, 0), [], torch.zeros(6, 0, dtype=torch.int64))
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
    x_PI, group_P1 = torch.randn(6, INPUT), torch.zeros(6, 1, dtype=torch.int64)
    torch.testing.assert_close(
        split(x_PI, torch.zeros(6, 0), [own.unsqueeze(0)], group_P1).user_PD,
        blind(x_PI, torch.zeros(6, 0), [], group_P1[:, :0]).user_PD,
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


def test_one_category_without_slope_and_intensity_is_the_running_mean() -> None:
    layer = CategoryAggregation(width=WIDTH, categories=1, history=4)
    with torch.no_grad():
        layer.slope.fill_(-torch.inf)
    h_BLD = torch.randn(1, 5, WIDTH)
    category_BL = torch.tensor([[-1, 0, 0, 0, 0]])
    interests = layer(h_BLD, torch.zeros(1, 5), category_BL, torch.arange(5))
    for last in range(1, 5):
        torch.testing.assert_close(interests[last, 0], h_BLD[0, 1 : last + 1].mean(0))


def test_one_category_without_slope_is_attention_pooling() -> None:
    layer = CategoryAggregation(width=WIDTH, categories=1, history=4)
    with torch.no_grad():
        layer.slope.fill_(-torch.inf)
    h_BLD, intensity_BL = torch.randn(1, 5, WIDTH), torch.randn(1, 5)
    pooled = torch.softmax(intensity_BL[0], dim=0) @ h_BLD[0]
    interests = layer(h_BLD, intensity_BL, torch.zeros(1, 5, dtype=torch.int64), torch.tensor([4]))
    torch.testing.assert_close(interests[0, 0], pooled)


def test_aggregation_survives_the_longest_history_at_the_steepest_slope() -> None:
    history = 2000
    layer = CategoryAggregation(width=2, categories=1, history=history)
    with torch.no_grad():
        layer.slope.fill_(torch.inf)
    h_BLD = torch.arange(history + 1.0).view(1, -1, 1).expand(1, -1, 2)
    category_BL = torch.zeros(1, history + 1, dtype=torch.int64)
    extreme_BL = torch.full((1, history + 1), 10.0)
    interests = layer(h_BLD, extreme_BL, category_BL, torch.arange(history + 1))
    decay = torch.exp(torch.tensor(-layer.max_slope, dtype=torch.float64)) ** torch.arange(history + 1).flip(0)
    expected = (decay * h_BLD[0, :, 0]).sum() / decay.sum()
    assert torch.isfinite(interests).all()
    torch.testing.assert_close(interests[-1, 0, 0].double(), expected, rtol=1e-4, atol=0)


# ---- the cost of scenarios -----------------------------------------------------------------------------------


def test_owned_experts_cost_the_same_however_many_requests_share_them() -> None:
    """FLOPs depend on the number of requests, not on the number of values among them."""
    rows = expert_rows(INPUT, WIDTH)
    x_PI = torch.randn(12, INPUT)

    def flops(values: int) -> int:
        with FlopCounterMode(display=False) as counter:
            owned_expert(
                x_PI,
                torch.randn(values, rows, HIDDEN),
                torch.arange(12) % values,
                WIDTH,
            )
        return counter.get_total_flops()

    assert flops(1) == flops(3) == flops(12) == 12 * 2 * HIDDEN * (INPUT + WIDTH)


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
        assert dict(model.experts.named_parameters())["embeddings.experts_id_region.weight"].shape[0] == (
            regions + 1
        ) * expert_rows(12, 16)
        costs.append((batch.experts.values().numel(), counter.get_total_flops()))
    assert costs[0] == costs[1]
    assert costs[0][1] > 0
