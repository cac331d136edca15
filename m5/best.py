"""The best-on-validation checkpoint: weights as safetensors, and which dataset and step they belong to.

RUN/best/weights.safetensors and RUN/best/checkpoint.json are replaced together (`m5.folders`), so that a killed run
leaves the previous checkpoint whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from m5.folders import recover, replacing
from m5.schema import ContentKind, DataError, Manifest, PreparedDataset

BEST = "best"


def save_weights(run: Path, state: dict[str, Tensor], manifest: Manifest, record: dict) -> None:
    """Replace RUN/best by these weights.

    Args:
        run: the run's folder.
        state: bare model's weights, tables whole.
        manifest: of the dataset that it was trained on.
        record: step, epoch and validation metrics, kept in checkpoint.json.
    """
    with replacing(run / BEST) as folder:
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, folder / "weights.safetensors")
        digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        description = {"dataset": manifest.content_hash, "weights_sha256": digest, **record}
        (folder / "checkpoint.json").write_text(json.dumps(description, indent=1))
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def read_record(run: Path) -> dict:
    """checkpoint.json of RUN/best.

    Raises:
        DataError: the run has no checkpoint.
    """
    recover(run / BEST)
    path = run / BEST / "checkpoint.json"
    if not path.is_file():
        raise DataError(f"{run} has no checkpoint ({path} is missing): its training has not reached a validation yet.")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path} is damaged: it is no JSON. Train again.") from None


def content_digest(dataset: PreparedDataset, kinds: tuple[ContentKind, ...]) -> str:
    """sha256 of the content arrays that a model reads: its weights mean nothing beside others."""
    digest = hashlib.sha256()
    for kind in kinds:
        digest.update((dataset.folder / "content" / f"{kind}.npy").read_bytes())
    return digest.hexdigest()


def refuse_other_content(run: Path, dataset: PreparedDataset, kinds: tuple[ContentKind, ...]) -> None:
    """Raises DataError where the content vectors are no longer those that RUN was trained on."""
    if read_record(run)["content"] != content_digest(dataset, kinds):
        raise DataError(
            f"{run} was trained on other content vectors than {dataset.folder}/content now holds ({', '.join(kinds)}): "
            "`m5 encode`, `m5 graph` or `m5 prepare` has written them anew since. Train again."
        )


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
