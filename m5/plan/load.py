"""What a rank has to do in one step: sizes of its batch, values that it looks up, and a rough count of operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from m5.assemble import Inputs
from m5.config import RunConfig
from m5.model.m5 import M5, Tower
from m5.model.multi_interest_extraction import CategoryAggregation, SubsidiaryIntensity, chunked
from m5.model.multi_modal_embedding import SPECIAL_ROWS
from m5.model.multi_scenario_mixing import SplitMixture, expert_table_shape
from m5.plan.description import Dataset
from m5.plan.step_memory import Sizes


@dataclass(frozen=True)
class Load:
    """One rank's share of a batch whose sequences are all as long as they can be: the most that a step may ask for.

    Attributes:
        sizes: of the rank's batch.
        columns: L, positions of a sequence.
        everywhere: G, requests of all ranks.
        masked_everywhere: hidden titles of all ranks.
        negatives: the rank's slice of the candidates, its own targets left out.
        facts: whole numbers that ranks tell each other of a request: its target, time and scenario.
        lookups: values that the rank looks up, by feature.
    """

    sizes: Sizes
    columns: int
    everywhere: int
    masked_everywhere: int
    negatives: int
    facts: int
    lookups: dict[str, int]


def rank_load(dataset: Dataset, inputs: Inputs, config: RunConfig, world_size: int) -> Load:
    """The load of the rank that has most."""
    model, settings = config.model, config.sequences
    sequences = math.ceil(settings.sequences / world_size)
    columns = min(settings.history + 1, dataset.longest_history)
    each = min(settings.requests, columns)
    requests, everywhere = sequences * each, settings.sequences * each
    positions = sequences * columns
    share = model.mlm_share if model.mlm_weight else 0.0
    masked, masked_everywhere = (math.ceil(share * n * (columns - 1)) for n in (sequences, settings.sequences))
    warm = dataset.titles - dataset.cold_titles
    candidates = {"full": warm, "sampled": config.candidates.count, "in-batch": everywhere}[config.candidates.kind]
    negatives = math.ceil(min(warm, candidates) / world_size)
    # With the whole catalogue as its slice, a rank finds every target in it.
    own = min(requests + masked, warm - negatives)
    titles = min(dataset.titles + SPECIAL_ROWS, negatives + own + min(positions, dataset.titles))
    present = {key: min(rows, requests) for key, rows in inputs.tables.items() if key.startswith("scenario_")}
    smoe = model.mixing == "smoe"
    of_behaviours = {key: rows for key, rows in inputs.tables.items() if key.startswith(("age", "intensity_"))}
    of_requests = {key: rows for key, rows in inputs.tables.items() if key not in of_behaviours}
    combinations = min(positions, math.prod(of_behaviours.values()))
    situations = min(requests, math.prod(of_requests.values()))
    chunks, length = chunked(columns)
    sizes = Sizes(
        sequences=sequences,
        positions=positions,
        behaviours=positions,
        chunks=sequences * chunks,
        pairs=sequences * chunks * length**2,
        combinations=combinations,
        requests=requests,
        situations=situations,
        candidates=negatives + own,
        titles=titles,
        expert_values=sum(present.values()) if smoe else 0,
        masked=masked,
    )
    lookups = {"history": positions, "candidates": negatives + own}
    lookups |= dict.fromkeys(of_behaviours, combinations) | dict.fromkeys(of_requests, situations)
    if smoe:
        rows, _ = expert_table_shape(
            input_width=model.mixing_width, hidden=model.expert_hidden, output_width=model.width
        )
        for branch in ("id", "cg") if model.content else ("id",):
            lookups |= {f"{branch}_{key.removeprefix('scenario_')}": n * rows for key, n in present.items()}
    return Load(sizes, columns, everywhere, masked_everywhere, negatives, 2 + len(dataset.scenarios), lookups)


def operations(model: M5, load: Load, config: RunConfig) -> float:
    """Floating-point operations of a rank's step, forward and backward: matrix products alone, so a rough count.

    A weight costs 6 a row: 2 forward, 4 backward; 4 in all where the input is frozen, as content vectors are. The
    candidate softmax makes three products of the queries of all ranks with the rank's slice.
    """
    sizes, settings = load.sizes, config.model
    total = attention_operations(model, load, config)
    shared = {}  # columns of what depends on the situation alone
    for branch, tower in model.towers.items():
        assert isinstance(tower, Tower)
        mixing = tower.mixing
        shared[f"towers.{branch}.mixing.bottom"] = mixing.crossing.output_width
        if isinstance(mixing.mixture, SplitMixture):
            gate = mixing.mixture.gate
            shared[f"towers.{branch}.mixing.mixture.gate"] = gate.in_features - settings.mixing_width
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            each = 4 if name == "embedding.content.hidden" else 6
            total += each * module.out_features * _inputs(name, module, sizes, settings.width, shared)
        elif isinstance(module, CategoryAggregation):
            # Pairs within chunks, and what came before a position's chunk; in mixing's width (see `Interests`).
            earlier = 3 * sizes.positions * module.categories
            total += 6 * (settings.mixing_width * (sizes.pairs + earlier) + module.categories * sizes.pairs)
    branches = 2 if settings.content else 1
    if model.experts is not None:
        scenarios = len(model.experts.embedding_configs()) // branches
        per_request = settings.expert_hidden * (settings.mixing_width + 1 + settings.width)
        total += 6 * sizes.requests * branches * scenarios * per_request
    key = settings.width * branches
    return total + 6 * load.negatives * (load.everywhere * key + load.masked_everywhere * settings.width)


def _inputs(name: str, module: nn.Linear, sizes: Sizes, width: int, shared: dict[str, int]) -> float:
    """Numbers that a layer multiplies with each row of its weight: its columns, times as often as they are met.

    Parts of an input that many behaviours or requests share are multiplied once; see `Subsidiary` and `Situations`.
    """
    columns = module.in_features
    if name.startswith("embedding"):
        return columns * sizes.titles
    if "intensity." in name and not name.endswith("scalar"):
        return columns * sizes.combinations
    if name.endswith("decoration"):
        return width * sizes.positions + (columns - width) * sizes.combinations
    if "extraction" in name:
        return columns * sizes.positions
    if "crossing" in name or name.startswith("matching"):
        return columns * sizes.situations
    if name.endswith("bottom"):  # a behaviour meets its own category's columns, see `Interests.linear`
        return width * (sizes.behaviours + sizes.requests) + shared[name] * sizes.situations
    of_situation = shared.get(name, 0)
    return (columns - of_situation) * sizes.requests + of_situation * sizes.situations


def attention_operations(model: M5, load: Load, config: RunConfig) -> float:
    """12 L^2 D a sequence and attention of width D, half of it where it is causal."""
    widths = sum(module.own.out_features for module in model.modules() if isinstance(module, SubsidiaryIntensity))
    widths += config.model.blocks * config.model.width
    causal = config.model.attention == "causal"
    return (6 if causal else 12) * load.sizes.sequences * load.columns**2 * widths
