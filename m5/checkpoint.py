"""The best-on-validation checkpoint: weights as safetensors, and which dataset and step they belong to.

RUN/best/weights.safetensors and RUN/best/checkpoint.json are written to a temporary sibling and renamed, so that a
killed run leaves the previous checkpoint whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from m5.schema import DataError, Manifest

BEST = "best"


def save_weights(run: Path, state: dict[str, Tensor], manifest: Manifest, record: dict) -> None:
    """Replace RUN/best by these weights.

    Args:
        run: the run's folder.
        state: bare model's weights, tables whole.
        manifest: of the dataset that it was trained on.
        record: step, epoch and validation metrics, kept in checkpoint.json.
    """
    target, temporary = run / BEST, run / f".{BEST}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({key: value.contiguous().cpu() for key, value in state.items()}, temporary / "weights.safetensors")
    digest = hashlib.sha256((temporary / "weights.safetensors").read_bytes()).hexdigest()
    description = {"dataset": manifest.content_hash, "weights_sha256": digest, **record}
    (temporary / "checkpoint.json").write_text(json.dumps(description, indent=1))
    for file in temporary.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    previous = run / f".{BEST}.previous"
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    temporary.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def read_record(run: Path) -> dict:
    """checkpoint.json of RUN/best.

    Raises:
        DataError: the run has no checkpoint.
    """
    path = run / BEST / "checkpoint.json"
    if not path.is_file():
        raise DataError(f"{run} has no checkpoint ({path} is missing): its training has not reached a validation yet.")
    return json.loads(path.read_text())


def load_weights(run: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Weights of RUN/best for a dataset.

    Raises:
        DataError: no checkpoint, a damaged one, or one of another dataset.
    """
    record, path = read_record(run), run / BEST / "weights.safetensors"
    if record["dataset"] != manifest.content_hash:
        raise DataError(
            f"{run} was trained on a dataset with content hash {record['dataset'][:12]}, but the prepared dataset "
            f"'{manifest.name}' has {manifest.content_hash[:12]}. Its titles have other indices. Prepare the original "
            "data again, or train on this dataset."
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["weights_sha256"]:
        raise DataError(f"{path} is damaged: its sha256 differs from the one in checkpoint.json. Train again.")
    return load_file(path)
