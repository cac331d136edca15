"""Writing a prepared dataset: hash of its content, and where it is written."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from m5.folders import recover
from m5.schema import MANIFEST, DataError, Manifest

BYTES_PER_READ = 1 << 24


def content_hash(folder: Path, manifest: Manifest) -> str:
    """sha256 of the events' arrays, of the titles, users and rights tables, and of what their indices stand for.

    Of the artwork only the file names count: moving the posters does not make another dataset.
    """
    meaning = manifest.model_dump_json(
        include={"categories", "scenarios", "contexts", "user_features", "intensities", "rights_scenarios"}
    )
    digest = hashlib.sha256(meaning.encode())
    for path in sorted((folder / "events").glob("*.npy")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(BYTES_PER_READ):
                digest.update(block)
    for name in ("titles", "users", "rights"):
        path = folder / f"{name}.parquet"
        if not path.is_file():
            continue
        frame = pd.read_parquet(path)
        if "artwork" in frame:
            frame["artwork"] = [Path(value).name for value in frame["artwork"]]
        for column in frame:
            digest.update(f"{name}.{column}".encode())
            if frame[column].dtype.kind in "iufb":
                digest.update(np.ascontiguousarray(frame[column].to_numpy()).tobytes())
            else:
                values = ("\x1f".join(v) if isinstance(v, np.ndarray) else str(v) for v in frame[column])
                digest.update("\x1e".join(values).encode())
    return digest.hexdigest()


def refuse_foreign_folder(out: Path) -> None:
    """Raises DataError where `out` exists and is something else than a prepared dataset: it would be replaced."""
    recover(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise DataError(
            f"{out} exists and is not a prepared dataset (it has no {MANIFEST}), so it is not overwritten. Choose "
            "another folder for --out, or remove it."
        )


@contextmanager
def temporary_sibling(out: Path, stage: str) -> Iterator[Path]:
    """A fresh folder `.<out>.<stage>` beside what `out` is, or is a link to; removed at the end whatever happens."""
    place = out.resolve()
    folder = place.with_name(f".{place.name}.{stage}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep_content(out: Path, fresh: Path, manifest: Manifest) -> Manifest:
    """Carry the vectors of an earlier preparation of the same data over to the fresh folder.

    The encoders look at what they are given again and encode only what changed.
    """
    if not (out / MANIFEST).is_file():
        return manifest
    try:
        before = Manifest.read(out)
    except (DataError, ValueError):
        return manifest  # written by another version: nothing of it is kept
    if before.content_hash != manifest.content_hash:
        return manifest
    if (out / "content").is_dir():
        shutil.copytree(out / "content", fresh / "content")
    if (out / "metagraph.npz").is_file():
        shutil.copy2(out / "metagraph.npz", fresh / "metagraph.npz")
    return manifest.model_copy(update={"encoders": before.encoders})
