"""An artifact: everything that a service needs of a trained run, in files that hold data and no code.

    ARTIFACT/
      artifact.json         ArtifactManifest: sizes, vocabularies, settings, versions, metrics, sha256 of the others
      artifact.json.sha256  of that file
      card.md               the same for people
      model.safetensors     the bare model without the titles' table
      titles.safetensors    float32 id_ND, cg_ND [N, D] as behaviours meet them, special_id, special_cg [3, D], and
                            key_NQ [N, Q]; int8 key_NQ and float32 scale_N instead where the keys are int8
      titles.parquet        title_id, title, description, category (int32), released (int64 s), cold, train_count
      rights.safetensors    optional: see m5.serving.rights
      index.safetensors     optional: the state of an index that takes long to build
      posters.safetensors   optional: uint8 bytes of JPEG files, int64 offsets [N + 1]
      viewers.json          optional: a few viewers to look at
      tower.pt2             the user tower as torch.export wrote it, for other runtimes

Nothing is pickled: tower.pt2 too holds JSON and raw tensors only. The checksums tell a damaged artifact, not a forged
one: whoever can write the folder can write both.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from torch import Tensor

from m5.config import DataConfig, ModelConfig
from m5.folders import recover
from m5.model.multi_modal_embedding import SPECIAL_ROWS
from m5.schema import DataError, Intensity, Vocabulary
from m5.serving.index import IndexKind
from m5.serving.rights import RightsMasks

FORMAT = 1
MANIFEST, MANIFEST_DIGEST = "artifact.json", "artifact.json.sha256"
MODEL, TITLES, TITLE_TABLE, RIGHTS, POSTERS, INDEX = (
    "model.safetensors",
    "titles.safetensors",
    "titles.parquet",
    "rights.safetensors",
    "posters.safetensors",
    "index.safetensors",
)
VIEWERS, PROGRAM, CARD = "viewers.json", "tower.pt2", "card.md"
# Not mapped, as safetensors would by itself: to overwrite a mapped file where it lies ends the process that reads it.
IN_MEMORY = "pread"


class ArtifactManifest(BaseModel):
    """artifact.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    name: str
    created: str = Field(description="UTC, ISO 8601.")
    n_titles: int
    n_trained: int = Field(description="The first so many titles were there when the model was trained.")
    content_width: int = Field(description="G, 0 in a model without content branch.")
    tables: dict[str, int] = Field(description="Rows of every feature table, in the model's order.")
    model: ModelConfig
    sequences: DataConfig
    seed: int
    categories: Vocabulary
    scenarios: tuple[Vocabulary, ...]
    contexts: tuple[Vocabulary, ...]
    user_features: tuple[Vocabulary, ...]
    intensities: tuple[Intensity, ...]
    rights: dict[str, Any] | None = Field(None, description="Header of rights.safetensors.")
    keys: str = Field("float32", pattern="^(float32|int8)$")
    index: IndexKind | None = Field(None, description="Whose state is in index.safetensors.")
    now: int = Field(description="Time of the dataset's last event in seconds.")
    dataset: dict[str, Any] = Field(description="Name, content hash, counts.")
    weights_sha256: str = Field(description="Of the run's checkpoint.")
    metrics: dict[str, Any] = Field(description="Of validation, and of the test split where it was evaluated.")
    versions: dict[str, str]
    files: dict[str, str] = Field({}, description="sha256 by name.")

    @property
    def history(self) -> int:
        return self.sequences.history


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _identity(path: Path) -> tuple[int, int, int]:
    """What differs once a file was replaced or overwritten: its inode, its size, when it was written to."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def seal(folder: Path, manifest: ArtifactManifest) -> ArtifactManifest:
    """Write artifact.json with the checksums of all that lies in `folder`, then its own, and wait for the disk."""
    files = {
        path.name: file_digest(path)
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, MANIFEST_DIGEST)
    }
    sealed = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_text(json.dumps(sealed.model_dump(mode="json"), indent=1))
    (folder / MANIFEST_DIGEST).write_text(file_digest(folder / MANIFEST) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors leaves files that only their owner can read; a service is often someone else
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return sealed


def refuse_foreign(target: Path) -> None:
    """Raises DataError where `target` is something else than an artifact or an empty folder, which is not replaced."""
    if target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir())):
        return
    if target.exists():
        raise DataError(f"{target} exists and is no artifact; it is not replaced. Choose another --out.")


class Posters:
    """Small JPEG posters, read from one open file, which may be replaced or deleted meanwhile."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "np", backend=IN_MEMORY).__enter__()
        self._offsets = self._file.get_tensor("offsets")

    def __getitem__(self, title: int) -> bytes:
        """JPEG of a title; empty where it has none."""
        first, last = self._offsets[title : title + 2].tolist() if title < len(self._offsets) - 1 else (0, 0)
        return self._file.get_slice("bytes")[first:last].tobytes() if first < last else b""


class Artifact:
    """Read access to a verified artifact; large arrays are read on first use, into memory.

    Args:
        folder: what `m5 export` wrote.

    Raises:
        DataError: no artifact, one of another format or version, or a damaged one: every file is compared with its
            checksum.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        recover(self.folder)
        self._files: dict[str, tuple[int, int, int]] = {}  # as they were before their checksums were compared
        self.manifest, self.digest = self._verified()

    def _verified(self) -> tuple[ArtifactManifest, str]:
        """The manifest and its sha256, after a look at all files."""
        path, recorded = self.folder / MANIFEST, self.folder / MANIFEST_DIGEST
        if not path.is_file():
            raise DataError(f"{self.folder} is no artifact: it has no {MANIFEST}. Make one with `m5 export`.")
        self._files[MANIFEST] = _identity(path)
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if not recorded.is_file() or recorded.read_bytes().strip() != digest.encode():
            raise self._damaged(MANIFEST)
        record = json.loads(content)
        if record.get("format") != FORMAT:
            raise DataError(f"{self.folder}: format {record.get('format')}, but this program reads {FORMAT}.")
        try:
            manifest = ArtifactManifest.model_validate(record)
        except ValidationError as error:
            field, what = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
            raise DataError(
                f"{self.folder} was written by another version of this program ({MANIFEST}, {field}: {what}). Export "
                "the run again."
            ) from None
        for name, expected in manifest.files.items():
            file = self.folder / name
            if not file.is_file():
                raise self._damaged(name)
            self._files[name] = _identity(file)
            if file_digest(file) != expected:
                raise self._damaged(name)
        return manifest, digest

    def refuse_replaced(self) -> None:
        """Raises DataError where a file is not the verified one any more: what was read since may be another's."""
        for name, identity in self._files.items():
            try:
                same = _identity(self.folder / name) == identity
            except OSError:
                same = False
            if not same:
                raise DataError(f"{self.folder / name} was replaced while the artifact was read.")

    def _damaged(self, name: str) -> DataError:
        return DataError(
            f"{self.folder / name} is damaged or missing: its sha256 is not the one recorded. Export the run again."
        )

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    @cached_property
    def titles(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / TITLE_TABLE)

    @cached_property
    def title_arrays(self) -> dict[str, Tensor]:
        """Arrays of titles.safetensors."""
        return load_file(self.folder / TITLES, backend=IN_MEMORY)

    @cached_property
    def key_NQ(self) -> Tensor:
        """float32 [N, Q]; from int8 keys, to within half a step of each title's scale."""
        arrays = self.title_arrays
        if "scale_N" not in arrays:
            return arrays["key_NQ"]
        return arrays["key_NQ"].float() * arrays["scale_N"].unsqueeze(-1)

    @cached_property
    def rows_ND(self) -> tuple[Tensor, Tensor | None]:
        """float32 [N + 3, D]: embeddings of all titles, then the special rows, of the ID and the CG branch."""
        arrays = self.title_arrays
        id_ND = torch.cat([arrays["id_ND"], arrays["special_id"]])
        cg_ND = torch.cat([arrays["cg_ND"], arrays["special_cg"]]) if "cg_ND" in arrays else None
        return id_ND, cg_ND

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The bare model's weights without the titles' table."""
        return load_file(self.folder / MODEL, backend=IN_MEMORY)

    @cached_property
    def viewers(self) -> list[dict[str, Any]]:
        """Histories to look at, as bodies of requests; none unless the export was asked for them."""
        return json.loads((self.folder / VIEWERS).read_text()) if self.has(VIEWERS) else []

    @cached_property
    def rights(self) -> RightsMasks | None:
        """None where every title is playable by everyone."""
        if self.manifest.rights is None:
            return None
        return RightsMasks.restored(self.manifest.rights, load_numpy(self.folder / RIGHTS, backend=IN_MEMORY))

    @cached_property
    def index_state(self) -> dict[str, np.ndarray]:
        """Arrays for `m5.serving.index.restored_index`, where the manifest names an index."""
        return load_numpy(self.folder / INDEX, backend=IN_MEMORY)

    @cached_property
    def posters(self) -> Posters | None:
        return Posters(self.folder / POSTERS) if self.has(POSTERS) else None

    def user_tower(self):
        """The `UserTower` in evaluation mode, put together from the manifest's sizes and the weights.

        Raises:
            DataError: the weights are another version's.
        """
        from m5.assemble import Inputs, assemble
        from m5.serving.tower import UserTower

        manifest = self.manifest
        content = torch.empty(1, manifest.content_width, device="meta") if manifest.content_width else None
        run = _run_config(manifest)
        with torch.device("meta"):
            inputs = Inputs(n_titles=1, categories=manifest.categories.size, tables=manifest.tables, content_NG=content)
            model = assemble(inputs, run, table_device="meta")
        wanted = {key for key in model.state_dict() if key != "tables.embeddings.title.weight"}
        if wanted != set(self.weights):
            raise DataError(f"{self.folder} was exported by another version of the model: export the run again.")
        model.load_state_dict(self.weights, strict=False, assign=True)
        return UserTower(model).eval().requires_grad_(False)


def _run_config(manifest: ArtifactManifest):
    from m5.config import RunConfig

    unused = Path("-")
    return RunConfig(data=unused, out=unused, seed=manifest.seed, model=manifest.model, sequences=manifest.sequences)


assert SPECIAL_ROWS == 3, "titles.safetensors holds three special rows"
