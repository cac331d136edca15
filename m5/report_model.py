"""What a trained model does inside at test requests: use of its experts, weight of its branches, interests with titles.

Dimension legend in `m5.batch`; R test requests, A active experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        content branch, "viewers": [...]}; slices without a sampled request are left out.
    """
    rows = np.arange(len(requests.event))
    if len(rows) > GATED_REQUESTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, GATED_REQUESTS, replace=False))
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
    gate = {name: float(gates.weight_R[member].mean()) for name, member in inside.items()}
    return {
        "mixing": predictor.config.model.mixing,
        "requests": len(rows),
        "experts": experts,
        "gate": gate if "cg" in gates.expert_RA else None,
        "viewers": example_viewers(predictor, requests, rows),
    }


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


@torch.inference_mode()
def example_viewers(predictor: Predictor, requests: Requests, rows: np.ndarray) -> list[dict[str, Any]]:
    """Some viewers with, per behaviour category, the titles that lie nearest to their interest in the ID branch.

    Categories that no title has are left out: their interest is the same constant for everybody.
    """
    builder, dataset = predictor.builder, predictor.dataset
    chosen = choose_viewers(builder, requests, rows, VIEWERS)
    windows = builder.windows_before(requests.event[chosen])
    interest_PKD = predictor.forward(builder.build(windows, None)).interests.each().float()
    id_key_ND = predictor.forward(builder.catalogue()).id_key_CD.float()
    allowed_N = torch.from_numpy(~builder.cold).to(id_key_ND.device)
    names = _category_names(predictor)
    viewers = []
    for place, row in enumerate(chosen):
        watched = np.asarray(builder.title[windows.start[place] : windows.last[place]], dtype=np.int64)
        title_KX, cosine_KX = (
            found.cpu().numpy() for found in nearest_titles(interest_PKD[place], id_key_ND, allowed_N, NEAREST)
        )
        viewers.append(
            {
                "user": str(dataset.users["user_id"].iloc[requests.user[row]]),
                "scenario": scenario_text(dataset.manifest, requests.scenario[row]),
                "interests": [
                    _interest(predictor, names[k], watched[builder.category[watched] == k], watched, title, cosine)
                    for k, (title, cosine) in enumerate(zip(title_KX, cosine_KX, strict=True))
                    if np.any(builder.category == k)
                ],
            }
        )
    return viewers


def _interest(
    predictor: Predictor, name: str, own: np.ndarray, watched: np.ndarray, title: np.ndarray, cosine: np.ndarray
) -> dict[str, Any]:
    """One category of one viewer; `own` are the watched titles of the category, oldest first."""
    called = predictor.dataset.titles["title"].to_numpy()
    return {
        "category": name,
        "behaviours": len(own),
        "learned_default": not len(own),
        "last_watched": [str(called[index]) for index in own[: -WATCHED - 1 : -1]],
        "nearest": [
            {
                "index": int(index),
                "title": str(called[index]),
                "cosine": float(value),
                "watched": bool(index in watched),
            }
            for index, value in zip(title, cosine, strict=True)
            if cosine.any()  # a default that training never touched is 0, and no title is near it
        ],
    }


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
