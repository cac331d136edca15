"""The prepared dataset: the one contract between `data_prep`, which writes it, and `m5`, which reads it.

    DATA/
      manifest.json                 Manifest: counts, vocabularies, split, encoders, hashes
      titles.parquet                one row a title, row number = title index (0 .. N-1); columns TITLE_COLUMNS,
                                    then one list<string> column per metadata kind
      users.parquet                 one row a user, row number = user index; user_id, then one int32 column per feature
      rights.parquet                optional: title (int32), one int32 column per right's scenario (0 = any),
                                    start, end (int64 seconds, start <= t < end); a title may have several rows
      events/offsets.npy            int64 [U + 1]; user u owns the events offsets[u] .. offsets[u + 1] - 1
      events/title.npy              int32 [T], sorted by user, then timestamp (stable)
      events/timestamp.npy          int64 [T], seconds since the epoch, UTC
      events/split.npy              uint8 [T], TRAIN | VALID | TEST
      events/intensity_<kind>.npy   float32 [T], raw value (NaN = not given), e.g. seconds, completion, rating
      events/scenario_<name>.npy    int32 [T], vocabulary index (0 = unknown), e.g. region, plan
      events/context_<name>.npy     int32 [T], vocabulary index (0 = unknown), e.g. device
      content/text.npy              float32 [N, d_text], unit rows
      content/image.npy             float32 [N, d_image], unit rows; a zero row where the artwork is missing
      content/graph.npy             float32 [N, d_graph], GraphSAGE vectors beside the features' components, unit
                                    rows
      content/image.safetensors     what encodes titles that come later, as no dataset of an earlier version has it:
      content/graph.safetensors     mean and scale of the image's channels; components of the features and GraphSAGE's
                                    weights, with the sha256 of the records they belong to (see
                                    data_prep.content_arrays and data_prep.graph_encoder)
      metagraph.npz                 the metagraph's CSR arrays (see data_prep.metagraph)
      truth.npz                     synthetic world only: what evaluation's oracle needs (see m5.oracle)

Every vocabulary keeps index 0 for "unknown or missing"; index i >= 1 is `Vocabulary.values[i - 1]`.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TRAIN, VALID, TEST = 0, 1, 2
TITLE_COLUMNS = (
    "title_id",  # string, the owner's id
    "title",  # string, the display name
    "description",  # string, "" where missing
    "category",  # int32, vocabulary index of the behaviour category (0 = unknown)
    "artwork",  # string, path of the poster, "" where missing
    "released",  # int64 seconds, ALWAYS where not given
    "train_count",  # int64, events in the training period
    "cold",  # bool, no event in the training period
)
ContentKind = Literal["text", "image", "graph"]
ALWAYS = -(2**62)  # a start that lies before every timestamp; an end is `-ALWAYS`


class DataError(ValueError):
    """A user's mistake in data or settings. The command line prints it as one paragraph and exits with 2.

    The message names the file, the column, how many rows, an example, and the remedy.
    """


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Vocabulary(_Record):
    """A categorical column. Index 0 means unknown or missing; `values[i - 1]` has index i."""

    name: str
    values: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.values) + 1

    def index(self, value: str | None) -> int:
        """Index of a raw value; 0 where it is None or unknown."""
        return self.values.index(value) + 1 if value in self.values else 0


class Intensity(_Record):
    """A watch-intensity column in buckets; boundaries are quantiles of the training events, or part its few values.

    Bucket 0 = missing; a value v has bucket 1 + (number of boundaries <= v).
    """

    name: str
    boundaries: tuple[float, ...]

    @property
    def size(self) -> int:
        return len(self.boundaries) + 2

    def bucket(self, values: np.ndarray) -> np.ndarray:
        """float32 [...] raw values (NaN = missing) -> int64 [...] buckets."""
        buckets = 1 + np.searchsorted(np.asarray(self.boundaries, dtype=np.float32), values, side="right")
        return np.where(np.isnan(values), 0, buckets).astype(np.int64)


class Split(_Record):
    """How events were divided; `valid_start` and `test_start` are timestamps in seconds (time split only)."""

    kind: Literal["time", "leave-last-out"]
    valid_start: int | None = None
    test_start: int | None = None


class Encoder(_Record):
    """Where a content array came from: part of the record, so that random image weights are never forgotten."""

    model: str
    weights: str
    dim: int
    sha256: str = ""
    coverage: float = Field(1.0, description="Share of titles that had this content.")
    metrics: dict[str, float] = Field(default_factory=dict, description="e.g. held_out_auc of the graph")


class Manifest(_Record):
    schema_version: int = SCHEMA_VERSION
    source: str
    name: str
    n_users: int
    n_titles: int
    n_events: int
    n_cold_titles: int
    split: Split
    split_counts: dict[str, int]
    categories: Vocabulary
    scenarios: tuple[Vocabulary, ...] = ()
    contexts: tuple[Vocabulary, ...] = ()
    user_features: tuple[Vocabulary, ...] = ()
    intensities: tuple[Intensity, ...] = ()
    metadata: tuple[str, ...] = ()
    rights_scenarios: tuple[str, ...] | None = Field(None, description="Scenario names in rights.parquet, or none.")
    encoders: dict[str, Encoder] = Field(default_factory=dict, description="text, image, graph")
    content_hash: str = Field(
        "", description="sha256 of events, titles, users, rights and vocabularies: the dataset's identity."
    )
    notes: tuple[str, ...] = Field((), description="Warnings of the preparation, kept for the reader of results.")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder} is not a prepared dataset: it has no {MANIFEST}. Make one with `m5 prepare`.")
        try:
            record = json.loads(path.read_text())
        except ValueError:
            raise DataError(f"{path} is damaged: it is no JSON. Run `m5 prepare` again.") from None
        if record.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{path}: schema version {record.get('schema_version')}, but this program reads {SCHEMA_VERSION}. "
                "Run `m5 prepare` again."
            )
        try:
            return cls.model_validate(record)
        except ValueError as error:
            raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}). Run `m5 prepare` again.") from None

    def scenario(self, name: str) -> Vocabulary:
        """The values of a scenario, e.g. region.

        Raises:
            KeyError: the dataset has no such scenario.
        """
        return {vocabulary.name: vocabulary for vocabulary in self.scenarios}[name]

    def write(self, folder: Path) -> None:
        (Path(folder) / MANIFEST).write_text(json.dumps(self.model_dump(), indent=1))


class PreparedDataset:
    """Read access to a prepared dataset; arrays are memory-mapped, tables are read on first use."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)

    def event_array(self, name: str) -> np.ndarray:
        """Memory-mapped column `events/<name>.npy`."""
        return np.load(self.folder / "events" / f"{name}.npy", mmap_mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.load(self.folder / "events" / "offsets.npy")

    def user_of(self, event: np.ndarray) -> np.ndarray:
        """int64 [B] places in `events/*.npy` -> int64 [B] users that own them."""
        return np.searchsorted(self.offsets, event, side="right") - 1

    def watched_before(self, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] places in `events/*.npy` -> (row in 0..B-1, title) of all that their users had watched earlier."""
        start = self.offsets[self.user_of(event)]
        count = event - start
        row = np.repeat(np.arange(len(count)), count)
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(start, count)
        return row, np.asarray(self.event_array("title")[place], dtype=np.int64)

    @cached_property
    def titles(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "titles.parquet")

    @cached_property
    def users(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "users.parquet")

    @cached_property
    def rights(self) -> pd.DataFrame | None:
        path = self.folder / "rights.parquet"
        return pd.read_parquet(path) if path.is_file() else None

    def content(self, kind: ContentKind) -> np.ndarray | None:
        """float32 [N, d], or None where that stage was not run."""
        path = self.folder / "content" / f"{kind}.npy"
        return np.load(path) if path.is_file() else None
