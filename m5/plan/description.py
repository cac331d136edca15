"""What a plan starts from: a cluster and a dataset, described by a few numbers in YAML."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m5.assemble import Inputs
from m5.config import ConfigError, RunConfig, problems_of
from m5.data.sequences import AGE_BUCKETS
from m5.plan.hardware import HARDWARE, Hardware
from m5.schema import TRAIN, DataError, PreparedDataset

GB = 10**9
FIGURES = tuple(name for name in Hardware.__dataclass_fields__ if name != "device")
Description = TypeVar("Description", bound=BaseModel)


# Of memory (GB) or a link (GB/s). Bounds are far beyond any machine or service; they keep slips such as 1e300 out of
# the arithmetic. Titles, viewers and values are numbered by int32 (`m5.schema`).
Figure = Annotated[float, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Width = Annotated[int, Field(ge=1, le=2**16)]


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cluster(_Described):
    """Machines that train together. Figures that are not given are those of `hardware`."""

    hardware: str = Field(description="A known kind: h100, h200, a100, l40s or cpu.")
    nodes: Width = Field(1, description="Machines.")
    ranks_per_node: Width = Field(8, description="Processes on a machine: one a GPU.")
    usable: float = Field(0.9, gt=0, le=1, description="Share of the memory that a plan may fill; the rest is margin.")
    device_memory: Figure | None = Field(None, description="GB (10^9 bytes) of one GPU.")
    device_bandwidth: Figure | None = Field(None, description="GB/s between a GPU and its memory.")
    host_memory: Figure | None = Field(None, description="GB of a node.")
    host_bandwidth: Figure | None = Field(None, description="GB/s between a node's processors and their memory.")
    device_to_host: Figure | None = Field(None, description="GB/s between a GPU and the host, one direction.")
    intra_node: Figure | None = Field(None, description="GB/s that a rank sends within its node.")
    inter_node: Figure | None = Field(None, description="GB/s that a rank sends to other nodes.")
    allowance: float | None = Field(
        None, ge=0, le=10**9, description="GB a rank for CUDA's context, NCCL, workspaces; on a CPU for the libraries."
    )

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        if self.hardware not in HARDWARE:
            close = difflib.get_close_matches(self.hardware, HARDWARE, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"there is no hardware '{self.hardware}'. Known: {', '.join(HARDWARE)}.{hint} For another, name the "
                "nearest and give its figures"
            )
        if self.device == "cpu":
            for name in ("device_memory", "device_bandwidth", "device_to_host"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect on CPU ranks, which share host_memory")
        return self

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return HARDWARE[self.hardware].device

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def figure(self, name: str) -> float:
        """A figure of `Hardware`, as described or as known."""
        described = getattr(self, name)
        return getattr(HARDWARE[self.hardware], name) if described is None else described

    @property
    def memory_per_rank(self) -> float:
        """Bytes in which a rank's model and batch must lie: the GPU's, or its share of the node's."""
        if self.device == "cuda":
            return self.figure("device_memory") * GB
        return self.figure("host_memory") * GB / self.ranks_per_node


class Dataset(_Described):
    """Sizes of a dataset. A vocabulary's size does not count the unknown value, which every one has besides."""

    users: Count = Field(description="Viewers.")
    titles: Count = Field(description="N: titles of the catalogue.")
    cold_titles: int = Field(0, ge=0, description="Titles that nobody watched in the training period.")
    events: int = Field(ge=1, le=10**15, description="Watches in the training period.")
    longest_history: Count = Field(description="Training watches of the viewer who has most.")
    categories: Count = Field(1, description="Kinds of title, e.g. series and movie.")
    scenarios: dict[str, Count] = Field({}, description="Vocabulary sizes of scenario dimensions, e.g. region, plan.")
    contexts: dict[str, Count] = Field({}, description="Vocabulary sizes of context columns, e.g. device.")
    user_features: dict[str, Count] = Field({}, description="Vocabulary sizes of user features; an id has one a user.")
    intensities: dict[str, Count] = Field({}, description="Buckets of watch-intensity columns, e.g. seconds: 10.")
    content: dict[Literal["graph", "text", "image"], Width] = Field({}, description="Widths of the content vectors.")
    rights: tuple[str, ...] | None = Field(None, description="Scenarios that rights depend on; none: no rights table.")
    rights_windows: Count = Field(1, description="Most windows that one title has in one region and plan.")

    @model_validator(mode="after")
    def _check(self) -> Dataset:
        if self.cold_titles >= self.titles:
            raise ValueError("cold_titles must be fewer than titles")
        if self.longest_history < self.mean_history:
            raise ValueError(f"longest_history is below the mean, events / users = {self.mean_history:.1f}")
        if unknown := set(self.rights or ()) - set(self.scenarios):
            raise ValueError(f"rights names no scenario: {', '.join(sorted(unknown))}")
        names = [*self.scenarios, *self.contexts, *self.user_features, *self.intensities]
        # They become names of torch's modules, and of files.
        if wrong := [name for name in names if not re.fullmatch(r"[^./]+", name)]:
            raise ValueError(f"a name must not be empty or hold a dot or slash: '{wrong[0]}'")
        return self

    @property
    def mean_history(self) -> float:
        return self.events / self.users

    @classmethod
    def of(cls, prepared: PreparedDataset) -> Dataset:
        """The description of a prepared dataset, its training period alone."""
        manifest, rights = prepared.manifest, prepared.manifest.rights_scenarios
        before = np.concatenate([[0], np.cumsum(np.asarray(prepared.event_array("split")) == TRAIN)])
        counts = before[prepared.offsets[1:]] - before[prepared.offsets[:-1]]
        if not counts.sum():
            raise DataError(
                f"{prepared.folder}: no event lies in the training period, so there is nothing to plan for."
            )
        arrays = {kind: prepared.content(kind) for kind in ("graph", "text", "image")}
        windows = None if prepared.rights is None else prepared.rights.groupby(["title", *(rights or ())]).size().max()
        sizes = {
            "users": manifest.n_users,
            "titles": manifest.n_titles,
            "cold_titles": manifest.n_cold_titles,
            "events": int(counts.sum()),
            "longest_history": int(counts.max()),
            "categories": max(1, len(manifest.categories.values)),
            "scenarios": {v.name: len(v.values) for v in manifest.scenarios},
            "contexts": {v.name: len(v.values) for v in manifest.contexts},
            "user_features": {v.name: len(v.values) for v in manifest.user_features},
            "intensities": {i.name: i.size - 1 for i in manifest.intensities},
            "content": {kind: array.shape[1] for kind, array in arrays.items() if array is not None},
            "rights": rights,
            "rights_windows": 1 if windows is None else int(windows),
        }
        return described(cls, sizes, str(prepared.folder))

    def inputs(self, config: RunConfig) -> Inputs:
        """What decides the model's sizes; content vectors are on `meta`.

        Raises:
            ConfigError: `model.content` asks for a width that is not described.
        """
        if missing := [kind for kind in config.model.content if kind not in self.content]:
            raise ConfigError(
                f"model.content asks for '{missing[0]}', but the dataset's description has no content.{missing[0]} "
                "(the width of those vectors). Add it, or plan without a content branch: model.content=[]."
            )
        width = sum(self.content[kind] for kind in config.model.content)
        content_NG = torch.empty(self.titles, width, device="meta") if config.model.content else None
        sizes: dict[str, int] = {}
        if config.model.subsidiary:
            sizes["age"] = AGE_BUCKETS
            sizes |= {f"intensity_{name}": size + 1 for name, size in self.intensities.items()}
        sizes |= {f"user_{name}": size + 1 for name, size in self.user_features.items()}
        sizes |= {f"context_{name}": size + 1 for name, size in self.contexts.items()}
        if config.model.mixing != "mlp":
            sizes |= {f"scenario_{name}": size + 1 for name, size in self.scenarios.items()}
        return Inputs(self.titles, self.categories + 1, sizes, content_NG)

    def sequences_per_epoch(self, config: RunConfig) -> float:
        """Expected number of training sequences in an epoch.

        Only the mean history is known: lengths are taken as exponential, cut nowhere. A viewer of n watches gives one
        sequence, or (n + R - 1) / R of them where n > R, R the requests of a sequence (see `m5.data.loader`).
        """
        requests, mean = config.sequences.requests, self.mean_history
        long = math.exp(-requests / mean)
        sequences = self.users * (1 - long + long * (requests + mean + requests - 1) / requests)
        limit = config.sequences.sequences_per_epoch
        return min(sequences, limit) if limit is not None else sequences


def read_description(kind: type[Description], path: Path) -> Description:
    """A cluster or a dataset from YAML.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value that does not fit.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. It should describe a {kind.__name__.lower()} (see docs/plans).")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected fields of a {kind.__name__.lower()}, e.g. `nodes: 2`.")
    return described(kind, settings, str(path))


def described(kind: type[Description], settings: dict, where: str) -> Description:
    """Validated; raises ConfigError with `where` in front."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = problems_of(error, kind.__name__)
        raise ConfigError(f"{where}: {problems}. Fields: {', '.join(kind.model_fields)}.") from None
