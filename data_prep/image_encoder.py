"""Titles' artwork -> content/image.npy, through any model of timm (ResNet-50 by default)."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.content_arrays import pick_device, remove_content, save_content, unit_rows
from data_prep.vector_cache import VectorCache, default_cache, encode_through, hash_bytes, hash_file
from m5.schema import DataError, Encoder, PreparedDataset
from m5.torchvision_shim import declare_missing_operators

RANDOM_SIZE = 96  # pixels; random filters gain nothing from more, and a CPU encodes 224 pixels 5 times more slowly
_LOADERS = 4  # threads: decoding releases the interpreter's lock
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, zlib.error)


@dataclass
class ImageModel:
    """A timm model without its classifier, and the transform it was trained with.

    Args:
        name: of timm.
        weights: `hub`, `random` (seeded), or a local .pth or .safetensors file.
        device: where it runs; with mixed precision on a GPU.
        image_size: pixels of a side; None is the model's own, or RANDOM_SIZE with random weights.
    """

    name: str
    weights: str
    device: torch.device
    image_size: int | None

    @cached_property
    def network(self) -> Any:
        declare_missing_operators()
        import timm

        settings: dict[str, Any] = {"num_classes": 0}
        if self.weights != "random" and self.weights != "hub":
            file = Path(self.weights).expanduser()
            if not file.is_file():
                raise DataError(
                    f"--image-weights {self.weights}: no such file. Give a .pth or .safetensors file, hub or random."
                )
            settings["checkpoint_path"] = str(file)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                network = timm.create_model(self.name, pretrained=self.weights == "hub", **settings)
            except Exception as error:  # unknown name, no connection, weights of another model: many kinds
                raise DataError(self._why(error)) from error
        return network.to(device=self.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def _why(self, error: Exception) -> str:
        if "nknown model" in str(error):
            return f"--image {self.name}: timm has no such model. `timm.list_models()` names them all."
        if self.weights == "hub":
            return (
                f"The weights of image model {self.name} could not be had from the hub ({type(error).__name__}). Give "
                " them as a file (--image-weights FILE), or use untrained ones (--image-weights random)."
            )
        return f"--image-weights {self.weights}: not weights of {self.name} ({str(error).splitlines()[0][:200]})."

    @cached_property
    def size(self) -> int:
        if self.image_size is not None:
            return self.image_size
        return RANDOM_SIZE if self.weights == "random" else int(self.network.pretrained_cfg["input_size"][-1])

    @cached_property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(self.network)
        return create_transform(**{**config, "input_size": (3, self.size, self.size)}, is_training=False)

    @cached_property
    def weights_hash(self) -> str:
        state = self.network.state_dict()
        return hash_bytes(*(part for name in sorted(state) for part in (name.encode(), _tensor_bytes(state[name]))))

    @cached_property
    def cache_hash(self) -> str:
        return hash_bytes(*(str(part).encode() for part in (self.name, self.weights_hash, self.size, self.device.type)))

    @torch.inference_mode()
    def encode(self, paths: Sequence[Path], batch_size: int, bad: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions int64 [b], raw features float32 [b, d]); paths that are no readable image go to `bad`."""
        half = torch.bfloat16 if self.device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.float16
        for batch in _batches(load_images(paths, self.transform, bad), batch_size):
            pixels = torch.stack([image for _, image in batch]).to(self.device, memory_format=torch.channels_last)
            with torch.autocast(self.device.type, dtype=half, enabled=self.device.type == "cuda"):
                features = self.network(pixels)
            yield np.array([position for position, _ in batch]), features.float().cpu().numpy()


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def load_images(
    paths: Sequence[Path], transform: Callable[[Image.Image], torch.Tensor], bad: list[str]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (position, transformed image) in order, decoding a few ahead in threads; unreadable ones go to `bad`."""

    def load(path: Path) -> torch.Tensor | None:
        try:
            with Image.open(path) as image:
                return transform(image.convert("RGB"))
        except _IMAGE_ERRORS:
            return None

    with ThreadPoolExecutor(_LOADERS) as pool:
        waiting: deque[tuple[int, Future[torch.Tensor | None]]] = deque()

        def take() -> Iterator[tuple[int, torch.Tensor]]:
            position, future = waiting.popleft()
            image = future.result()
            if image is None:
                bad.append(str(paths[position]))
            else:
                yield position, image

        for position, path in enumerate(paths):
            waiting.append((position, pool.submit(load, path)))
            if len(waiting) > 32 * _LOADERS:  # bounds the decoded images held in memory
                yield from take()
        while waiting:
            yield from take()


def _batches(items: Iterator[tuple[int, torch.Tensor]], size: int) -> Iterator[list[tuple[int, torch.Tensor]]]:
    batch: list[tuple[int, torch.Tensor]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class Standardisation:
    """Centres and scales per channel, then makes unit rows.

    A convolutional network's pooled features are positive and nearly parallel, most of all with random weights; what
    tells images apart is the deviation from the mean.

    Args:
        mean, scale: float32 [d]; scale 0 marks a channel that says nothing.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, fit_on: np.ndarray) -> Standardisation:
        """Of float32 [n, d]; bool [n] are titles of the training period, or all count where there are none."""
        rows = features[fit_on] if fit_on.any() else features
        scale = rows.std(axis=0)
        alive = scale > 1e-6 * max(float(scale.max()), 1e-30)
        return cls(rows.mean(axis=0), np.where(alive, scale, 0))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """float32 [n, d] -> float32 [n, d], unit rows."""
        alive = self.scale > 0
        return unit_rows(np.where(alive, (features - self.mean) / np.where(alive, self.scale, 1), 0))


def _existing(data: Path, artwork: Sequence[str]) -> tuple[list[int], list[Path], list[str]]:
    """Rows and paths of the artwork that exists, and the names of what does not."""
    named = [(row, Path(data) / name) for row, name in enumerate(artwork) if name]
    there = [(row, path) for row, path in named if path.is_file()]
    absent = [str(path) for _, path in named if not path.is_file()]
    return [row for row, _ in there], [path for _, path in there], absent


def encode_images(
    data: Path,
    *,
    model: str = "resnet50",
    weights: str = "hub",
    image_size: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    cache: Path | None = None,
) -> Encoder | None:
    """Write content/image.npy (unit rows; zero where the artwork is missing or unreadable) and its record.

    Args:
        data: prepared dataset; relative artwork paths are looked up in it.
        model: any model of timm.
        weights: `hub`, `random`, or a local .pth or .safetensors file.
        image_size: pixels of a side; None is the model's own, or 96 with random weights.
        batch_size: images a batch.
        device: as torch names it; None takes the GPU where there is one.
        cache: root of the vector cache; None is `default_cache()`.

    Returns:
        The record, or None where no title has readable artwork. Its metrics hold `encoded` (images not in the cache),
        `unreadable`, `missing` and `image_size` (pixels).

    Raises:
        DataError: no such model, or weights that cannot be had.
    """
    titles = PreparedDataset(data).titles
    rows, paths, absent = _existing(data, titles["artwork"].fillna("").tolist())
    notes = [f"{len(absent):,} artwork files do not exist, for example {absent[0]}."] if absent else []
    if not rows:
        _without_images(data, notes)
        return None
    encoder = ImageModel(model, weights, pick_device(device), image_size)
    if weights == "random":
        notes.insert(0, f"{model} has RANDOM, untrained weights: its vectors know colour and texture, not content.")
        print(f"WARNING: image model {notes[0]}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(_LOADERS) as pool:
        keys = list(pool.map(hash_file, paths))
    bad: list[str] = []
    store = VectorCache(cache or default_cache(), "image", encoder.cache_hash)

    def encode(missing: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for positions, features in encoder.encode([paths[i] for i in missing], batch_size, bad):
            yield missing[positions], features

    vectors, encoded = encode_through(store, keys, encode, "encoding artwork")
    good = [position for position, key in enumerate(keys) if key.encode() in vectors]
    unreadable = len(keys) - len(good)
    if unreadable:
        notes.append(
            f"{unreadable:,} artwork files are no readable image, for example {bad[0]}; they count as missing."
        )
        print(f"image: {notes[-1]}", file=sys.stderr)
    if not good:
        _without_images(data, notes)
        return None
    found = np.array([rows[position] for position in good])
    features = np.stack([vectors[keys[position].encode()] for position in good])
    array = np.zeros((len(titles), features.shape[1]), dtype=np.float32)
    standard = Standardisation.fit(features, ~titles["cold"].to_numpy()[found])
    array[found] = standard.apply(features)
    record = Encoder(
        model=model,
        weights=weights if weights in ("hub", "random") else Path(weights).name,
        dim=array.shape[1],
        sha256=encoder.weights_hash,
        coverage=len(found) / len(titles),
        metrics={
            "encoded": float(encoded),
            "unreadable": float(unreadable),
            "missing": float(len(absent)),
            "image_size": float(encoder.size),
        },
    )
    save_content(data, "image", array, record, notes, kept={"mean": standard.mean, "scale": standard.scale})
    return record


def _without_images(data: Path, notes: list[str]) -> None:
    """Say and record that there is nothing to encode."""
    print("image: no title has readable artwork; there are no image vectors.", file=sys.stderr)
    remove_content(data, "image", [*notes, "no title has readable artwork."])
