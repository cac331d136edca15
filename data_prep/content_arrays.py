"""Writing one content array and its record in the manifest, so that neither is ever half there.

Beside content/<kind>.npy, content/<kind>.safetensors keeps what it takes to encode a title that comes later: statistics
and weights that were learned from the dataset. Its metadata names the record it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from m5.schema import MANIFEST, DataError, Encoder, Manifest


def unit_rows(array: np.ndarray) -> np.ndarray:
    """float32 [n, d] with rows of length 1; zero rows stay zero."""
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    return (array / np.where(norms > 0, norms, 1)).astype(np.float32)


def pick_device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file through a temporary sibling."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save through a temporary sibling."""
    _replace(path, lambda file: np.save(file, array))


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


def save_content(
    data: Path,
    kind: str,
    array: np.ndarray,
    encoder: Encoder,
    notes: Sequence[str] = (),
    *,
    kept: Mapping[str, np.ndarray] | None = None,
    made_of: Mapping[str, str] | None = None,
) -> None:
    """Write content/<kind>.npy, the encoder's record, and `notes` in place of this kind's earlier ones.

    Args:
        data: prepared dataset.
        kind: text, image or graph.
        array: float32 [N, d].
        encoder: the record.
        notes: for the manifest.
        kept: for content/<kind>.safetensors; None where a further title needs no more than the record names.
        made_of: kind -> `sha256` of the encoders whose vectors this array was made of.
    """
    folder = Path(data) / "content"
    if kept is not None:
        # First of all: what is left by a crash before the manifest is written names another record, and is refused.
        tensors = {name: np.ascontiguousarray(value) for name, value in kept.items()}
        content = save(tensors, {"record": encoder.sha256, **(made_of or {})})
        _replace(folder / f"{kind}.safetensors", lambda file: file.write(content))
    save_array(folder / f"{kind}.npy", array)
    _update_manifest(Path(data), kind, encoder, notes)


def load_kept(data: Path, kind: str, manifest: Manifest, remedy: str) -> dict[str, np.ndarray]:
    """What `save_content` has kept of the encoder that the manifest records.

    Raises:
        DataError: it is not there (an earlier version prepared the dataset), is damaged, or belongs to vectors that
            have been written anew since; `remedy` is the command that helps.
    """
    path = Path(data) / "content" / f"{kind}.safetensors"
    if not path.is_file():
        raise DataError(
            f"{path} is missing, and no further title can be encoded without it: an earlier version has prepared this "
            f"dataset. Run {remedy} again."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}). Run {remedy} again.") from None
    for name in {"record", *about}:
        recorded = manifest.encoders.get(kind if name == "record" else name)
        if recorded is None or recorded.sha256 != about.get(name):
            raise DataError(f"{path} belongs to other vectors than the dataset has now. Run {remedy} again.")
    return tensors


def remove_content(data: Path, kind: str, notes: Sequence[str]) -> None:
    """Take an earlier array of this kind away, where the dataset has nothing to encode, and note why."""
    _update_manifest(Path(data), kind, None, notes)
    for suffix in ("npy", "safetensors"):
        (Path(data) / "content" / f"{kind}.{suffix}").unlink(missing_ok=True)
