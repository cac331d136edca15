"""Writing one content array and its record in the manifest, so that neither is ever half there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from m5.schema import MANIFEST, Encoder, Manifest


def unit_rows(array: np.ndarray) -> np.ndarray:
    """float32 [n, d] with rows of length 1; zero rows stay zero."""
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    return (array / np.where(norms > 0, norms, 1)).astype(np.float32)


def pick_device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save through a temporary sibling."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _update_manifest(data: Path, kind: str, encoder: Encoder | None, notes: Sequence[str]) -> None:
    manifest = Manifest.read(data)
    encoders = {name: record for name, record in manifest.encoders.items() if name != kind}
    if encoder is not None:
        encoders[kind] = encoder
    kept = [note for note in manifest.notes if not note.startswith(f"{kind}: ")]
    update = {"encoders": encoders, "notes": (*kept, *(f"{kind}: {note}" for note in notes))}
    folder = data / ".manifest.writing"
    folder.mkdir(exist_ok=True)
    try:
        manifest.model_copy(update=update).write(folder)
        (folder / MANIFEST).replace(data / MANIFEST)
    finally:
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()


def save_content(data: Path, kind: str, array: np.ndarray, encoder: Encoder, notes: Sequence[str] = ()) -> None:
    """Write content/<kind>.npy, the encoder's record, and `notes` in place of this kind's earlier ones.

    Args:
        data: prepared dataset.
        kind: text, image or graph.
        array: float32 [N, d].
    """
    save_array(Path(data) / "content" / f"{kind}.npy", array)
    _update_manifest(Path(data), kind, encoder, notes)


def remove_content(data: Path, kind: str, notes: Sequence[str]) -> None:
    """Take an earlier array of this kind away, where the dataset has nothing to encode, and note why."""
    _update_manifest(Path(data), kind, None, notes)
    (Path(data) / "content" / f"{kind}.npy").unlink(missing_ok=True)
