"""Puts a model together from a prepared dataset and a configuration, and gives its weights their first values."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from m5.config import RunConfig
from m5.data.sequences import AGE_BUCKETS, scenario_names
from m5.model.keyed_dropout import KeyedDropout
from m5.model.m5 import M5, Tower
from m5.model.multi_interest_extraction import MultiInterestExtraction
from m5.model.multi_modal_embedding import ContentProjection, MultiModalEmbedding, sharded_tables
from m5.model.multi_scenario_mixing import (
    Expert,
    FeatureCrossing,
    MultiGateMixture,
    MultiScenarioMixing,
    SplitMixture,
    expert_rows,
    expert_tables,
)
from m5.model.weighted_candidate_matching import WeightedCandidateMatching
from m5.schema import ContentKind, DataError, PreparedDataset

RESIDUAL_OUTPUTS = ("attention_output", "perceptron_output", "decoration")
NUMBERS_PER_SEED = 2**20  # of a table, drawn from one random stream; see `initial_rows`


def content_vectors(dataset: PreparedDataset, kinds: tuple[ContentKind, ...]) -> Tensor | None:
    """float32 [N, G]: the content arrays side by side, or None for a model without content branch."""
    arrays = []
    for kind in kinds:
        array = dataset.content(kind)
        if array is None:
            command = "graph" if kind == "graph" else "encode"
            raise DataError(
                f"{dataset.folder}/content/{kind}.npy is missing, but model.content asks for '{kind}'. If the titles "
                f"have descriptions, artwork or metadata, run `m5 {command} {dataset.folder}`; if they have none, "
                "train without a content branch: model.content=[]."
            )
        arrays.append(array)
    return torch.from_numpy(np.concatenate(arrays, axis=1)).float() if arrays else None


def table_sizes(dataset: PreparedDataset, config: RunConfig) -> dict[str, int]:
    """Rows of every feature table, by its key in `Batch.sparse`; the order is the model's."""
    manifest = dataset.manifest
    sizes: dict[str, int] = {}
    if config.model.subsidiary:
        sizes["age"] = AGE_BUCKETS
        sizes |= {f"intensity_{intensity.name}": intensity.size for intensity in manifest.intensities}
    sizes |= {f"user_{vocabulary.name}": vocabulary.size for vocabulary in manifest.user_features}
    sizes |= {f"context_{vocabulary.name}": vocabulary.size for vocabulary in manifest.contexts}
    visible = scenario_names(dataset, config)
    return sizes | {f"scenario_{v.name}": v.size for v in manifest.scenarios if v.name in visible}


@dataclass(frozen=True)
class Inputs:
    """What of a dataset decides the model's sizes.

    Attributes:
        n_titles: N.
        categories: K of the dataset, unknown included.
        tables: rows of every feature table, by its key in `Batch.sparse`; the order is the model's.
        content_NG: float32 content vectors, None without content branch. On device `meta` where only sizes matter.
    """

    n_titles: int
    categories: int
    tables: dict[str, int]
    content_NG: Tensor | None

    @classmethod
    def of(cls, dataset: PreparedDataset, config: RunConfig) -> Inputs:
        """Raises DataError where a content array that the configuration asks for is missing."""
        manifest = dataset.manifest
        content_NG = content_vectors(dataset, config.model.content)
        return cls(manifest.n_titles, manifest.categories.size, table_sizes(dataset, config), content_NG)


def build_model(dataset: PreparedDataset, config: RunConfig, *, table_device: torch.device | str = "cpu") -> M5:
    """The model of `config` for `dataset`; `assemble` says the rest."""
    return assemble(Inputs.of(dataset, config), config, table_device=table_device)


def assemble(inputs: Inputs, config: RunConfig, *, table_device: torch.device | str = "cpu") -> M5:
    """The model of `config` for a dataset of these sizes, dense part initialised from `config.seed`.

    Args:
        table_device: where the TorchRec collections are created; `meta` leaves them to be sharded, `cpu` or `cuda`
            makes ordinary ones (for evaluation and export). Under `torch.device("meta")` nothing at all is allocated.
    """
    model, sizes, content_NG = config.model, inputs.tables, inputs.content_NG
    subsidiary = tuple(key for key in sizes if key.startswith(("age", "intensity_")))
    features = tuple(key for key in sizes if key.startswith(("user_", "context_")))
    scenarios = tuple(key for key in sizes if key.startswith("scenario_"))
    device = torch.device(table_device)
    torch.manual_seed(config.seed)

    def tower(branch: str) -> Tower:
        categories = inputs.categories if model.categories else 1
        return Tower(
            extraction=MultiInterestExtraction(
                width=model.width,
                subsidiary_width=model.width * len(subsidiary),
                categories=categories,
                blocks=model.blocks if branch == "id" else 0,
                heads=model.heads,
                dropout=model.dropout,
                history=config.sequences.history,
                attention=model.attention,
            ),
            mixing=_mixing(config, categories + 1, len(features), tuple(sizes[key] for key in scenarios)),
        )

    branches = ("id", "cg") if content_NG is not None else ("id",)
    owned = {f"{b}_{key.removeprefix('scenario_')}": sizes[key] for b in branches for key in scenarios}
    shape = {"input_width": model.mixing_width, "output_width": model.width}
    gate_crossing = (
        FeatureCrossing(width=model.width, features=len(features), scenarios=len(scenarios))
        if content_NG is not None
        else None
    )
    m5 = M5(
        tables=sharded_tables(n_titles=inputs.n_titles, features=sizes, width=model.width, device=device),
        embedding=MultiModalEmbedding(
            content=ContentProjection(content_NG=content_NG, width=model.width) if content_NG is not None else None,
            subsidiary=subsidiary,
            features=features,
            scenarios=scenarios,
            width=model.width,
            dropout=model.dropout,
        ),
        experts=expert_tables(owned=owned, hidden=model.expert_hidden, device=device, **shape)
        if owned and model.mixing == "smoe"
        else None,
        expert_shape=(expert_rows(**shape), model.expert_hidden),
        towers={branch: tower(branch) for branch in branches},
        gate_crossing=gate_crossing,
        matching=WeightedCandidateMatching(
            width=model.width,
            gate_width=gate_crossing.output_width if gate_crossing is not None else 0,
            score=model.score,
            content=content_NG is not None,
        ),
    )
    initialise_dense(m5)
    for name, module in m5.named_modules():
        if isinstance(module, KeyedDropout):
            module.salt(zlib.crc32(name.encode()))
    return m5


def _mixing(config: RunConfig, interests: int, features: int, scenario_sizes: tuple[int, ...]) -> MultiScenarioMixing:
    model, scenarios = config.model, len(scenario_sizes)
    hidden = model.expert_hidden
    mixture: SplitMixture | MultiGateMixture | Expert
    if model.mixing == "smoe":
        mixture = SplitMixture(
            input_width=model.mixing_width,
            hidden=hidden,
            output_width=model.width,
            scenario_width=scenarios * model.width,
            shared=model.shared_experts,
            scenarios=scenarios,
        )
    elif model.mixing == "mmoe":
        mixture = MultiGateMixture(
            input_width=model.mixing_width,
            hidden=hidden,
            output_width=model.width,
            experts=model.shared_experts + scenarios,
            scenario_values=scenario_sizes,
        )
    else:
        # As many hidden units as the active experts of SMoE would have on a dataset with two scenario dimensions.
        hidden *= model.shared_experts + 2
        mixture = Expert(input_width=model.mixing_width, hidden=hidden, output_width=model.width)
    return MultiScenarioMixing(
        crossing=FeatureCrossing(width=model.width, features=features, scenarios=scenarios),
        interest_width=interests * model.width,
        mixture=mixture,
        input_width=model.mixing_width,
        dropout=model.dropout,
    )


def initialise_dense(model: nn.Module) -> None:
    """Truncated normal of std 1 / sqrt(fan-in) for matrices, zero for biases; residual outputs start small.

    An expert's output and a block's outputs start at a tenth, so that the user vector starts as the latest
    behaviour's state and the towers as near-identities.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            if name.endswith(RESIDUAL_OUTPUTS) or (".mixture" in name and name.endswith("output")):
                std *= 0.1
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def rows_per_seed(width: int) -> int:
    """Rows of a table that are drawn from one random stream."""
    return max(1, NUMBERS_PER_SEED // width)


def initial_rows(
    name: str, first: int, rows: int, width: int, *, seed: int, expert: tuple[int, int, int] | None
) -> Tensor:
    """float32 [rows, width]: the first values of rows first .. first + rows - 1 of a table.

    Every block of `rows_per_seed` rows has a random stream of its own, so that a row starts with the same values
    however the table is sharded.

    Args:
        name: of the table.
        expert: (I, R, H) for a table of experts, which are W_1 (std 1 / sqrt(I)), a bias (0) and W_2 (a tenth of
            1 / sqrt(H)), R x H numbers in all; None for embeddings (std 1 / sqrt(D)).
    """
    digest = zlib.crc32(name.encode())
    blocks, block_rows = [], rows_per_seed(width)
    for block in range(first // block_rows, (first + rows - 1) // block_rows + 1):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + digest) * 1_009 + block)
        blocks.append(torch.randn(block_rows, width, generator=generator))
    offset = first % block_rows
    values = torch.cat(blocks)[offset : offset + rows]
    if expert is None:
        return values / math.sqrt(width)
    input_width, height, hidden = expert
    row_X1 = (torch.arange(first, first + rows) % (height * hidden // width)).unsqueeze(-1)
    place = (row_X1 * width + torch.arange(width)) // hidden  # which of the expert's R rows of width H
    scale = torch.where(place < input_width, 1 / math.sqrt(input_width), 0.1 / math.sqrt(hidden))
    return values * torch.where(place == input_width, 0.0, scale)
