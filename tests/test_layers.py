"""Every layer against its slow reference, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m5.assemble import build_model
from m5.batch import ByCategory
from m5.data.sequences import BatchBuilder
from m5.model import multi_interest_extraction
from m5.model.multi_interest_extraction import (
    CategoryAggregation,
    Interests,
    MultiInterestExtraction,
    SubsidiaryIntensity,
    TransformerBlock,
)
from m5.model.multi_modal_embedding import ContentProjection, Situations, Subsidiary
from m5.model.multi_scenario_mixing import (
    FeatureCrossing,
    MultiGateMixture,
    OwnedExperts,
    SplitMixture,
    expert_rows,
)
from m5.model.weighted_candidate_matching import WeightedCandidateMatching
from tests import reference
from tests.reference import randomise
from tests.world import tiny_config, write_world

LENGTHS = (5, 2)  # a full sequence and a padded one
WIDTH, SUBSIDIARY, CATEGORIES = 8, 6, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
        lambda s: layer(every_behaviour(s), valid_mask())[valid_mask()],
        lambda weights, s: over_sequences(
            lambda b, length: reference.subsidiary_intensity(weights, s[b, :length], causal=causal)
        ),
    )


def every_behaviour(subsidiary_BLF: Tensor) -> Subsidiary:
    """Subsidiary features of which no two behaviours share a combination."""
    B, L, _ = subsidiary_BLF.shape
    return Subsidiary(subsidiary_BLF.flatten(0, 1), torch.arange(B * L).view(B, L))


def every_request(feature_PFD: Tensor, scenario_PMD: Tensor) -> Situations:
    """Features of requests of which no two share a situation."""
    return Situations(feature_PFD, scenario_PMD, torch.arange(len(feature_PFD)))


def grouped(category_BL: Tensor, categories: int) -> ByCategory:
    """`Batch.by_category`, by looking for each category."""
    places = [(category_BL.flatten() == k).nonzero().flatten() for k in range(categories)]
    return ByCategory(torch.cat(places), tuple(len(found) for found in places))


CATEGORY = torch.tensor([[-1, 0, 2, 0, 2], [-1, 1, -1, -1, -1]])
REQUESTS = torch.tensor([0, 1, 3, 4, 5, 6])  # flat positions b * 5 + l: starts, middles and ends of both sequences


@pytest.mark.parametrize("chunk", [2, 64])  # sequences in three parts, and whole
def test_category_aggregation(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    layer = randomise(CategoryAggregation(width=WIDTH, categories=CATEGORIES, history=4))

    def slow(weights: reference.Weights, h: Tensor, a: Tensor) -> Tensor:
        rows = []
        for place in REQUESTS.tolist():
            b, last = divmod(place, 5)
            category = CATEGORY[b].tolist()
            rows.append(reference.category_aggregation(weights, h[b], a[b], category, last, max_slope=layer.max_slope))
        return torch.stack(rows)

    def interests_of(h: Tensor, a: Tensor) -> Interests:
        means, behaviours = layer(a, CATEGORY), grouped(CATEGORY, CATEGORIES)
        return Interests(h, means, layer.default, behaviours, REQUESTS, h.flatten(0, 1)[REQUESTS])

    inputs = {"h": torch.randn(2, 5, WIDTH), "a": 3 * torch.randn(2, 5)}
    monkeypatch.setattr(multi_interest_extraction, "CHUNK", chunk)
    assert_same(layer, inputs, lambda h, a: interests_of(h, a).each(), slow)
    layer.zero_grad()
    # A linear layer of all interests, never written out: output and gradients, its weight's too.
    inputs["w"] = torch.randn(3, CATEGORIES * WIDTH)
    assert_same(
        layer,
        inputs,
        lambda h, a, w: interests_of(h, a).linear(w),
        lambda weights, h, a, w: slow(weights, h, a).flatten(1) @ w.T,
    )


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

    def interests_of(e: Tensor, s: Tensor) -> Tensor:
        found = layer(e, every_behaviour(s), CATEGORY, valid_mask(), grouped(CATEGORY, CATEGORIES), requests)
        return torch.cat([found.each(), found.latest_PD.unsqueeze(1)], dim=1)

    inputs = {"e": torch.randn(2, 5, WIDTH), "s": torch.randn(2, 5, subsidiary)}
    assert_same(
        layer,
        inputs,
        interests_of,
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
    layer = randomise(FeatureCrossing(width=WIDTH, features=features, scenarios=scenarios))
    inputs = {
        "f": torch.randn(4, features, WIDTH),
        "s": torch.randn(4, scenarios, WIDTH),
    }
    expected_width = (features + scenarios + (features if scenarios else 0)) * WIDTH
    assert layer(inputs["f"], inputs["s"]).shape == (4, expected_width) == (4, layer.output_width)
    assert_same(
        layer,
        inputs,
        lambda f, s: layer(f, s),
        lambda weights, f, s: torch.stack([reference.crossing(weights, f[p], s[p]) for p in range(4)]),
    )


INPUT, HIDDEN = 5, 4
GROUPS = torch.tensor([[0, 1], [2, 0], [0, 1], [1, 1], [2, 0], [0, 0]])  # three regions and two plans occur


def owned_by(*weights: Tensor) -> list[OwnedExperts]:
    """The experts of each dimension, with the requests of GROUPS sorted by value."""
    sizes = [torch.bincount(GROUPS[:, m], minlength=len(weight_URH)) for m, weight_URH in enumerate(weights)]
    return [
        OwnedExperts(weight_URH, torch.argsort(GROUPS[:, m], stable=True), tuple(sizes[m].tolist()))
        for m, weight_URH in enumerate(weights)
    ]


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
        lambda x, s, region, plan: layer(x, every_request(x[:, None], s[:, None]), owned_by(region, plan)).user_PD,
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
        no_features = crossed.new_zeros(len(crossed), 0, WIDTH)
        situations = every_request(no_features, no_features)
        score_PN = layer(u_id, u_cg, crossed, situations).query_PQ @ layer.key(e_id, e_cg).T
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
    builder, model = BatchBuilder(dataset, config), build_model(dataset, config).eval()
    layer = model.embedding
    targets = dataset.offsets[1:][2:8] - 1
    batch = builder.build(builder.windows_before(targets), None)
    embedded = layer(model.tables(batch.sparse), batch)
    subsidiary, situations = embedded.subsidiary, embedded.situations
    rows = {name.split(".")[1]: weight for name, weight in model.tables.state_dict().items()}
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
                subsidiary.feature_SF[subsidiary.place_BL[b, place], 16:],
                rows["intensity_seconds"][seconds[event]],
            )
        mine = situations.situation_P[b]
        torch.testing.assert_close(situations.feature_JFD[mine, 0], rows["user_profile"][user + 1])
        device = int(dataset.event_array("context_device")[target])
        torch.testing.assert_close(situations.feature_JFD[mine, 1], rows["context_device"][device])
        for m, name in enumerate(("region", "plan")):
            value = int(dataset.event_array(f"scenario_{name}")[target])
            torch.testing.assert_close(situations.scenario_JMD[mine, m], rows[f"scenario_{name}"][value])
        assert not embedded.id_BLD[b, int(batch.length_B[b]) :].any()
