"""`m5 onboard`: a title launched a minute ago joins an artifact, by its content alone; nothing is trained.

It has no ID embedding, so it gets the row that titles without one have, and the content branch carries it, as it
carries cold titles. Its key stands behind all others; the user tower and the keys that are there stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor

from m5.best import content_digest
from m5.folders import replacing
from m5.model.multi_modal_embedding import UNKNOWN, ContentProjection
from m5.schema import ALWAYS, ContentKind, DataError, Manifest, PreparedDataset
from m5.serving import artifact as files
from m5.serving.artifact import Artifact
from m5.serving.card import model_card
from m5.serving.export import one_writer, poster_bytes, stored_again, stored_keys, write_posters
from m5.serving.index import restored_index
from m5.serving.rights import Grant, RightsMasks


@dataclass(frozen=True)
class LaunchedTitle:
    """What an artifact keeps of a title.

    Attributes:
        content_G: float32, the content arrays that the model reads, side by side.
        category: vocabulary index, 0 = unknown.
        released: seconds since the epoch.
        grants: who may play it, release dates included; `[Grant()]` is everybody at all times, none is nobody.
        poster: path of its artwork, or None.
    """

    title_id: str
    title: str
    description: str
    category: int
    content_G: np.ndarray
    released: int = ALWAYS
    grants: Sequence[Grant] = field(default_factory=list)
    poster: Path | None = None


def refuse_other_dataset(artifact: Artifact, dataset: PreparedDataset) -> None:
    """Raises DataError where the artifact's model was trained on another dataset or on other content vectors."""
    known, manifest = artifact.manifest.dataset, dataset.manifest
    if known["content_hash"] != manifest.content_hash:
        raise DataError(f"{artifact.folder} belongs to the dataset '{known['name']}', not to {dataset.folder}.")
    if known["content"] != content_digest(dataset, artifact.manifest.model.content):
        raise DataError(
            f"{dataset.folder}/content now holds other vectors than the artifact's model was trained on. Train and "
            "export again."
        )


def refuse_known(artifact: Artifact, title_ids: Sequence[str]) -> None:
    """Raises DataError where the artifact has one of the titles, or one is named twice."""
    known = set(artifact.titles["title_id"])
    for title_id in title_ids:
        if title_id in known:
            raise DataError(f"{artifact.folder} has a title '{title_id}' already; a title is added once.")
        known.add(title_id)


def joined_content(artifact: Artifact, vectors: Mapping[ContentKind, np.ndarray]) -> np.ndarray:
    """float32 [G]: the kinds that the model reads, in its order."""
    kinds = artifact.manifest.model.content
    return np.concatenate([vectors[kind] for kind in kinds]) if kinds else np.zeros(0, dtype=np.float32)


def grants(rights: pd.DataFrame | None, released: int | None, manifest: Manifest) -> list[Grant]:
    """Rows of a rights table, and a release date, as grants; without a table everyone may play it once released."""
    start = ALWAYS if released is None else released
    if rights is None:
        return [Grant(start)]
    place = {vocabulary.name: column for column, vocabulary in enumerate(manifest.scenarios)}
    names = manifest.rights_scenarios or ()
    return [
        Grant(max(int(row["start"]), start), int(row["end"]), {place[name]: int(row[name]) for name in names})
        for _, row in rights.iterrows()
    ]


@torch.inference_mode()
def content_keys(artifact: Artifact, content_XG: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [X, G] content vectors -> CG embeddings [X, D] and keys [X, Q] of titles without ID embedding."""
    prefix = "embedding.content."
    weights = {key.removeprefix(prefix): value for key, value in artifact.weights.items() if key.startswith(prefix)}
    projection = ContentProjection(content_NG=content_XG, width=artifact.manifest.model.width)
    projection.load_state_dict(weights)
    cg_XD = projection(torch.arange(len(content_XG)))
    id_XD = artifact.title_arrays["special_id"][UNKNOWN].expand_as(cg_XD)
    return cg_XD, artifact.user_tower().matching.key(id_XD, cg_XD)


def add_titles(folder: Path, launched: Sequence[LaunchedTitle], *, weights: str | None = None) -> Artifact:
    """Write the artifact anew with more titles behind the last one, and let it take the old one's place.

    Args:
        folder: of the artifact.
        launched: what is added.
        weights: `weights_sha256` of the artifact that the titles' vectors were made for; None: they fit whatever is
            there now.

    Raises:
        ConfigError: another process writes to it.
        DataError: no whole artifact, a model without content branch, one of other weights, vectors of another width or
            of zeros, or a title that it has.
    """
    with one_writer(folder):
        artifact = Artifact(folder)
        if weights not in (None, artifact.manifest.weights_sha256):
            raise DataError(f"{folder} was exported from another run meanwhile. Run the command again.")
        _refuse(artifact, launched)
        with replacing(folder) as target:
            shutil.copytree(folder, target, dirs_exist_ok=True)
            _extend_titles(artifact, launched, target)
            _extend_posters(artifact, launched, target)
            manifest = artifact.manifest.model_copy(
                update={
                    "n_titles": artifact.manifest.n_titles + len(launched),
                    "rights": _extended_rights(artifact, launched, target),
                }
            )
            (target / files.CARD).write_text(model_card(manifest))
            files.seal(target, manifest)
        return Artifact(folder)


def _refuse(artifact: Artifact, launched: Sequence[LaunchedTitle]) -> None:
    width, kinds = artifact.manifest.content_width, ", ".join(artifact.manifest.model.content)
    if not width:
        raise DataError(
            f"{artifact.folder}: its model has no content branch, so a title is nothing to it but its watches."
        )
    refuse_known(artifact, [one.title_id for one in launched])
    for one in launched:
        if one.content_G.shape != (width,) or not np.isfinite(one.content_G).all():
            raise DataError(
                f"title '{one.title_id}': content vectors of shape {one.content_G.shape}, where the model reads "
                f"{width} finite numbers: the artifact belongs to another dataset, or to other content settings."
            )
        if not one.content_G.any():
            raise DataError(
                f"title '{one.title_id}': nothing that the model reads ({kinds}) is known of it, so it would be placed "
                "at random. Describe it: graph is made of text, artwork and metadata."
            )


def _extended_rights(artifact: Artifact, launched: Sequence[LaunchedTitle], target: Path) -> dict[str, Any] | None:
    """Write the rights of all titles; their header, or None where everybody may play everything at all times."""
    masks = artifact.rights
    if masks is None:
        if all(list(one.grants) == [Grant()] for one in launched):
            return None
        masks = RightsMasks.compiled(None, artifact.manifest.n_titles)
    rights = masks.with_titles([one.grants for one in launched])
    save_numpy(rights.arrays(), target / files.RIGHTS)
    return rights.header.model_dump(mode="json")


def _extend_titles(artifact: Artifact, launched: Sequence[LaunchedTitle], target: Path) -> None:
    content_XG = torch.from_numpy(np.stack([one.content_G for one in launched]).astype(np.float32))
    cg_XD, key_XQ = content_keys(artifact, content_XG)
    arrays = dict(artifact.title_arrays)
    id_XD = arrays["special_id"][UNKNOWN].expand_as(cg_XD)
    int8 = artifact.manifest.keys == "int8"
    added = {"id_ND": id_XD, "cg_ND": cg_XD, **stored_keys(key_XQ, int8)}
    joined = {name: torch.cat([arrays[name], rows]) for name, rows in added.items()}
    save_file({name: array.contiguous() for name, array in (arrays | joined).items()}, target / files.TITLES)
    rows = pd.DataFrame(
        {
            "title_id": [one.title_id for one in launched],
            "title": [one.title for one in launched],
            "description": [one.description for one in launched],
            "category": np.array([one.category for one in launched], dtype=np.int32),
            "released": np.array([one.released for one in launched], dtype=np.int64),
            "cold": True,
            "train_count": np.zeros(len(launched), dtype=np.int64),
        }
    )
    pd.concat([artifact.titles, rows], ignore_index=True).to_parquet(target / files.TITLE_TABLE, index=False)
    if (kind := artifact.manifest.index) is not None:
        index = restored_index(artifact.key_NQ.numpy(), kind, artifact.index_state)
        save_numpy(index.with_titles(stored_again(key_XQ, int8)).state(), target / files.INDEX)


def _extend_posters(artifact: Artifact, launched: Sequence[LaunchedTitle], target: Path) -> None:
    earlier = [artifact.posters[n] if artifact.posters is not None else b"" for n in range(artifact.manifest.n_titles)]
    write_posters(target / files.POSTERS, [*earlier, *(poster_bytes(one.poster) for one in launched)])
