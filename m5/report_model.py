"""What a trained model does inside at test requests: use of its experts, weight of its branches, interests with titles.

Dimension legend in `m5.batch`; R test requests, A active experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m5.config import ModelConfig
from m5.data.sequences import BatchBuilder
from m5.evaluate import Requests
from m5.predict import Predictor
from m5.schema import Manifest

GATED_REQUESTS = 4_000  # at most; a mean weight is then known to about 0.01
TYPICAL_REQUESTS = 500  # at most; all interests of a request are written out
VIEWERS, NEAREST, WATCHED = 5, 5, 5


@dataclass(frozen=True)
class Gates:
    """Weights at some requests.

    Attributes:
        weight_R: float32, w of the ID branch.
        expert_RA: per branch, float32 gate weight of each active expert.
    """

    weight_R: np.ndarray
    expert_RA: dict[str, np.ndarray]

    @classmethod
    def at(cls, predictor: Predictor, event: np.ndarray) -> Gates:
        """Gates at int64 [R] target events, in their order."""
        scores = [predictor.forward(batch) for batch in predictor.batches(event)]
        return cls(
            weight_R=torch.cat([one.gate_P for one in scores]).float().cpu().numpy(),
            expert_RA={
                branch: torch.cat([one.expert_PA[branch] for one in scores]).float().cpu().numpy()
                for branch in scores[0].expert_PA
            },
        )


def expert_names(model: ModelConfig, scenarios: tuple[str, ...]) -> list[str]:
    """Names of the active experts in the order of their gate weights; none for the scenario-blind control.

    Args:
        model: of the run.
        scenarios: names of the dimensions that the model sees.
    """
    if model.mixing == "mlp":
        return []
    if model.mixing == "mmoe":
        return [f"expert {index}" for index in range(1, model.shared_experts + len(scenarios) + 1)]
    shared = [f"shared {index}" for index in range(1, model.shared_experts + 1)]
    return shared + [f"{name}'s own" for name in scenarios]


def inner_life(predictor: Predictor, requests: Requests, slices: dict[str, np.ndarray], *, seed: int) -> dict[str, Any]:
    """Mean expert and branch weights by slice, and example viewers, for the report.

    Args:
        predictor: the run.
        requests: that the report is about.
        slices: name -> int64 rows of the requests: overall and scenario values.
        seed: of the sample, where there are more than GATED_REQUESTS.

    Returns:
        {"mixing", "requests", "experts": {branch: {"names", "load": {slice: [A]}}}, "gate": {slice: w} or None without
        content branch, "alike": {category: see Typical}, "viewers": [...]}; slices without a sampled request, and in
        "alike" categories without two viewers, are left out.
    """
    rows = _sample(np.arange(len(requests.event)), GATED_REQUESTS, seed)
    gates = Gates.at(predictor, requests.event[rows])
    inside = {name: np.isin(rows, members) for name, members in slices.items()}
    inside = {name: member for name, member in inside.items() if member.any()}
    names = expert_names(predictor.config.model, predictor.builder.scenario_names)
    experts = {
        branch: {
            "names": names,
            "load": {name: expert_RA[member].mean(0).tolist() for name, member in inside.items()},
        }
        for branch, expert_RA in gates.expert_RA.items()
        if names
    }
    typical = typical_interests(predictor, requests.event[_sample(rows, TYPICAL_REQUESTS, seed)])
    alike = {
        name: float(typical.alike_K[k])
        for k, name in enumerate(_category_names(predictor))
        if math.isfinite(typical.alike_K[k])
    }
    gate = {name: float(gates.weight_R[member].mean()) for name, member in inside.items()}
    return {
        "mixing": predictor.config.model.mixing,
        "requests": len(rows),
        "experts": experts,
        "gate": gate if "cg" in gates.expert_RA else None,
        "alike": alike,
        "viewers": example_viewers(predictor, requests, rows, typical),
    }


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """int64 rows -> at most so many of them, ascending."""
    return rows if len(rows) <= most else np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def choose_viewers(builder: BatchBuilder, requests: Requests, rows: np.ndarray, count: int) -> list[int]:
    """Rows of the requests to show: the most behaviour categories first, a viewer and at first a scenario once.

    Deterministic. Args: `rows` int64, to choose among.
    """
    windows = builder.windows_before(requests.event[rows])
    category = [
        np.unique(builder.category[np.asarray(builder.title[first:last], dtype=np.int64)])
        for first, last in zip(windows.start, windows.last, strict=True)
    ]
    by_variety = sorted(range(len(rows)), key=lambda place: -len(category[place]))
    chosen: list[int] = []
    for new_scenario in (True, False):
        for row in (int(rows[place]) for place in by_variety):
            if len(chosen) == count:
                return chosen
            known = any(np.array_equal(requests.scenario[row], requests.scenario[one]) for one in chosen)
            if requests.user[row] not in requests.user[chosen] and not (new_scenario and known):
                chosen.append(row)
    return chosen


def nearest_titles(interest_XD: Tensor, id_key_ND: Tensor, allowed_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Titles by cosine to a vector.

    Args:
        interest_XD: float32.
        id_key_ND: float32 E^ID of every title.
        allowed_N: bool, titles that may be named: cold ones share the row of titles without ID embedding.
        count: how many, or as many as are allowed.

    Returns:
        int64 [X, count] titles, best first, and float32 [X, count] their cosines.
    """
    cosine_XN = functional.normalize(interest_XD, dim=-1) @ functional.normalize(id_key_ND, dim=-1).T
    best = cosine_XN.masked_fill(~allowed_N, -torch.inf).topk(min(count, int(allowed_N.sum())))
    return best.indices, best.values


class Typical(NamedTuple):
    """Interests of many viewers, those without behaviour of the category left out: what all have in common.

    Attributes:
        mean_KD: float32, 0 where nobody has behaviours of the category.
        alike_K: float32, mean cosine between two viewers' interests of the category; near 1 all have the same one. Not
            finite where there are no two.
    """

    mean_KD: Tensor
    alike_K: Tensor

    @classmethod
    def of(cls, interest_PKD: Tensor, present_PK: Tensor) -> Typical:
        """float32 interests and bool whether there is behaviour of the category -> Typical."""
        count_K1 = present_PK.sum(0).unsqueeze(-1)
        unit_PKD = functional.normalize(interest_PKD, dim=-1) * present_PK.unsqueeze(-1)
        pairs_K = (count_K1 * (count_K1 - 1)).squeeze(-1)
        alike_K = (unit_PKD.sum(0).square().sum(-1) - unit_PKD.square().sum((0, 2))) / pairs_K
        return cls((interest_PKD * present_PK.unsqueeze(-1)).sum(0) / count_K1.clamp(min=1), alike_K)


@torch.inference_mode()
def typical_interests(predictor: Predictor, event: np.ndarray) -> Typical:
    """Of the requests at int64 [R] target events, ID branch."""
    interests, present = [], []
    for batch in predictor.batches(event):
        interests.append(predictor.forward(batch).interests.each().float().cpu())
        category_K = torch.arange(interests[-1].shape[1])
        present.append((batch.category_BL.unsqueeze(-1) == category_K).any(1))
    return Typical.of(torch.cat(interests), torch.cat(present))


@torch.inference_mode()
def example_viewers(
    predictor: Predictor, requests: Requests, rows: np.ndarray, typical: Typical
) -> list[dict[str, Any]]:
    """Some viewers with, per behaviour category, the titles that lie nearest to their interest in the ID branch.

    Categories that no title has are left out: their interest is the same constant for everybody.
    """
    builder, dataset = predictor.builder, predictor.dataset
    chosen = choose_viewers(builder, requests, rows, VIEWERS)
    windows = builder.windows_before(requests.event[chosen])
    interest_PKD = predictor.forward(builder.build(windows, None)).interests.each().float()
    id_key_ND = predictor.forward(builder.catalogue()).id_key_CD.float()
    allowed_N = torch.from_numpy(~builder.cold).to(id_key_ND.device)
    apart_PKD = interest_PKD - typical.mean_KD.to(interest_PKD.device)
    names, called = _category_names(predictor), dataset.titles["title"].astype(str).to_numpy()
    viewers = []
    for place, row in enumerate(chosen):
        watched = np.asarray(builder.title[windows.start[place] : windows.last[place]], dtype=np.int64)
        plain, apart = (
            nearest_titles(vector_PKD[place], id_key_ND, allowed_N, NEAREST) for vector_PKD in (interest_PKD, apart_PKD)
        )
        interests = []
        for k in range(len(names)):
            own = watched[builder.category[watched] == k]
            if not np.any(builder.category == k):
                continue
            interests.append(
                {
                    "category": names[k],
                    "behaviours": len(own),
                    "learned_default": not len(own),
                    "last_watched": called[own[: -WATCHED - 1 : -1]].tolist(),
                    "nearest": _named(plain[0][k], plain[1][k], called, watched),
                    "apart": _named(apart[0][k], apart[1][k], called, watched) if len(own) else [],
                }
            )
        viewers.append(
            {
                "user": str(dataset.users["user_id"].iloc[requests.user[row]]),
                "scenario": scenario_text(dataset.manifest, requests.scenario[row]),
                "interests": interests,
            }
        )
    return viewers


def _named(title_X: Tensor, cosine_X: Tensor, called: np.ndarray, watched: np.ndarray) -> list[dict[str, Any]]:
    """Titles near a vector by name; none near 0, which a default is that training never touched."""
    if not cosine_X.any():
        return []
    return [
        {"index": index, "title": str(called[index]), "cosine": cosine, "watched": index in watched.tolist()}
        for index, cosine in zip(title_X.tolist(), cosine_X.tolist(), strict=True)
    ]


def _category_names(predictor: Predictor) -> list[str]:
    """By the category's index in the model."""
    if not predictor.config.model.categories:
        return ["all categories together"]
    return ["unknown category", *predictor.dataset.manifest.categories.values]


def scenario_text(manifest: Manifest, scenario_M: np.ndarray) -> str:
    """int64 [M] vocabulary indices -> "region=US, plan=ads"; "" without scenarios."""
    return ", ".join(
        f"{vocabulary.name}={vocabulary.values[index - 1] if index else 'unknown'}"
        for vocabulary, index in zip(manifest.scenarios, scenario_M, strict=False)
    )
