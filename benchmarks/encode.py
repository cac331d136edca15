"""Text and artwork to vectors: titles/s of the encoders by batch size, and of the whole stage, cache cold and warm.

Text goes through the all-MiniLM-L6-v2 that comes with the installation, posters (JPEG, 128 x 192 pixels) through a
ResNet-50 with random weights, which computes what a trained one does. Both are the product's, on titles that are made
beforehand in a temporary folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.catalogue import write_titles
from benchmarks.harness import Promise, Report, Spread, in_turns, run
from data_prep.content_arrays import unit_rows
from data_prep.image_encoder import ImageModel, Standardisation, encode_images
from data_prep.text_encoder import CPU_BATCH, TextModel, bundled_model, encode_text, title_texts
from data_prep.vector_cache import VectorCache, hash_bytes, hash_file
from m5.config import ConfigError
from m5.schema import PreparedDataset

MAX_LENGTH = 128  # tokens, as `encode_text` has it
IMAGE_MODEL, SMOKE_IMAGE_MODEL = "resnet50", "test_resnet"
IMAGE_BATCH, FULL_PIXELS = 32, 224  # FULL_PIXELS is what trained weights are used with
BATCHES = {"cpu": (4, 16, 64, 256), "cuda": (16, 64, 256, 1024)}
ALL, SOME, SMOKE = 5_000, 256, 96  # titles: of a GPU and a warm cache, of a CPU, and with --smoke
COMPARED = 96  # titles whose vectors are compared
EXACT = 1e-3  # promised difference between two batch sizes, in any component of a unit vector
Batches = Iterator[tuple[np.ndarray, np.ndarray]]


class Case(NamedTuple):
    """An encoder on a device, with the batch size that is varied.

    Attributes:
        kind: text, or image and its size.
        device: cpu or cuda.
        batch: titles a batch.
        titles: how many it encodes a call.
    """

    kind: str
    device: str
    batch: int
    titles: int


class Measured(NamedTuple):
    case: Case
    seconds: list[float]
    flops: int  # a title
    vectors: np.ndarray  # of the first titles, unit rows


# ---- the encoders alone --------------------------------------------------------------------------------------


def in_order(batches: Batches, count: int) -> np.ndarray:
    """float32 [count, d] of batches in any order."""
    positions, vectors = zip(*batches, strict=True)
    found = np.empty((count, vectors[0].shape[1]), dtype=np.float32)
    found[np.concatenate(positions)] = np.concatenate(vectors)
    return found


Works = dict[Case, Callable[[], np.ndarray]]


def text_works(texts: list[str], device: str, batches: tuple[int, ...]) -> Works:
    model = TextModel(bundled_model(), torch.device(device), MAX_LENGTH, CPU_BATCH)

    def work(batch: int) -> Callable[[], np.ndarray]:
        def encode() -> np.ndarray:
            model.batch_size = batch
            return in_order(model.encode(texts), len(texts))

        return encode

    return {Case("text", device, batch, len(texts)): work(batch) for batch in batches}


def image_works(name: str, paths: list[Path], device: str, batches: tuple[int, ...], pixels: int | None) -> Works:
    model = ImageModel(name, "random", torch.device(device), pixels)

    def work(batch: int) -> Callable[[], np.ndarray]:
        return lambda: in_order(model.encode(paths, batch, []), len(paths))

    kind = f"image, {model.size} pixels"
    return {Case(kind, device, batch, len(paths)): work(batch) for batch in batches}


def compared(case: Case, vectors: np.ndarray) -> np.ndarray:
    """What the product would keep of the first titles, if there were no others."""
    first = vectors[:COMPARED]
    return (
        unit_rows(first) if case.kind == "text" else Standardisation.fit(first, np.ones(len(first), bool)).apply(first)
    )


def measured(works: Works, repeats: int) -> list[Measured]:
    """Seconds of every case, in turns; the call that gives the vectors warms up."""
    vectors, flops = {}, {}
    for case, work in works.items():
        with FlopCounterMode(display=False) as counter:
            vectors[case] = compared(case, work())
        flops[case] = counter.get_total_flops() // case.titles
    named = {str(number): work for number, work in enumerate(works.values())}
    taken = in_turns(named, repeats=repeats, warm_up=0).values()
    return [Measured(case, seconds, flops[case], vectors[case]) for case, seconds in zip(works, taken, strict=True)]


# ---- the whole stage -----------------------------------------------------------------------------------------


def filled_cache(root: Path, data: Path, device: str, image_model: str) -> Path:
    """A cache that has a (random) vector for every text and image."""
    titles, place = PreparedDataset(data).titles, torch.device(device)
    text = TextModel(bundled_model(), place, MAX_LENGTH, CPU_BATCH)
    image = ImageModel(image_model, "random", place, None)
    parts = (
        ("text", text.cache_hash, [hash_bytes(content.encode()) for content in title_texts(titles)], 384),
        ("image", image.cache_hash, [hash_file(path) for path in titles["artwork"]], 2048),
    )
    generator = np.random.default_rng(0)
    for kind, model_hash, keys, width in parts:
        vectors = generator.normal(size=(len(keys), width)).astype(np.float32)
        VectorCache(root, kind, model_hash).add(np.asarray(keys, dtype="S64"), vectors)
    return root


def stages(cold: Path, warm: Path, device: str, image_model: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of `encode_text` and `encode_images`: `cold` with an empty cache, `warm` with one that has everything."""
    with tempfile.TemporaryDirectory() as name:
        full = filled_cache(Path(name) / "full", warm, device, image_model)

        def work(kind: str, data: Path, cache: Path | None) -> None:
            with tempfile.TemporaryDirectory(dir=name) as empty:
                if kind == "text":
                    encode_text(data, device=device, cache=cache or Path(empty))
                else:
                    encode_images(data, model=image_model, weights="random", device=device, cache=cache or Path(empty))

        for kind, (state, data, cache) in product(("text", "image"), (("empty", cold, None), ("warm", warm, full))):
            taken = in_turns({"stage": partial(work, kind, data, cache)}, repeats=repeats, warm_up=0)["stage"]
            titles = PreparedDataset(data).manifest.n_titles
            yield row(f"{kind}, whole stage, {state} cache", device, "default", titles, taken)


# ---- the report ----------------------------------------------------------------------------------------------


def row(what: str, device: str, batch: int | str, titles: int, seconds: list[float]) -> dict[str, Any]:
    rate = Spread.rate(titles, seconds)
    return {"what": what, "device": device, "batch": batch, "titles": titles, "titles/s": rate}


def rows(found: list[Measured]) -> Iterator[dict[str, Any]]:
    for one in found:
        case = one.case
        speed = one.flops * case.titles / float(np.median(one.seconds)) / 1e9
        made = row(case.kind, case.device, case.batch, case.titles, one.seconds)
        yield made | {"GFLOP/s": speed, "difference": f"{difference(one, found):.1e}"}


def difference(one: Measured, found: list[Measured]) -> float:
    """The largest in any component from the first case of its kind: the smallest batch, on the CPU if it takes part."""
    reference = next(other for other in found if other.case.kind == one.case.kind)
    return float(np.abs(one.vectors - reference.vectors).max())


def measure(options: argparse.Namespace) -> Report:
    devices = options.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if "cuda" in devices and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU here.")
    repeats, image_model = (1, SMOKE_IMAGE_MODEL) if options.smoke else (options.repeats, IMAGE_MODEL)
    found: list[Measured] = []
    whole: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        few = write_titles(Path(name) / "few", SMOKE if options.smoke else SOME, posters=True)
        many = few if options.smoke else write_titles(Path(name) / "many", ALL, posters=True)
        for device in devices:
            titles = PreparedDataset(few if device == "cpu" else many).titles
            texts, paths = title_texts(titles), [Path(path) for path in titles["artwork"]]
            batches = BATCHES[device][1:2] if options.smoke else BATCHES[device]
            texts = texts[::3] if options.smoke else texts
            found += measured(text_works(texts, device, batches), repeats)
            found += measured(image_works(image_model, paths, device, batches, None), repeats)
            if not options.smoke:
                found += measured(image_works(image_model, paths, device, (IMAGE_BATCH,), FULL_PIXELS), repeats)
            whole += stages(few if device == "cpu" else many, many, device, image_model, repeats)
    exact = max(difference(one, found) for one in found if one.case.device == devices[0])
    return Report(
        title="Encoding: titles/s of text and artwork",
        rows=[*rows(found), *({**line, "GFLOP/s": "", "difference": ""} for line in whole)],
        notes=[
            "The encoders alone, after one call that loads them; then the whole stages as `m5 encode` runs them, with "
            "reading, hashing, loading the model, the cache and writing. The titles of the empty cache and of the warm "
            "one differ in number, and a stage's fixed cost is shared by them.",
            "Texts are 30 to 130 tokens long and sorted by length before they are cut into batches, so that little is "
            "padding. `GFLOP/s` counts the operations of the model, padding included. `difference` is the largest one "
            f"in any component of a unit vector of the first {COMPARED} titles, from the first row of the same kind; "
            "artwork's vectors are standardised over these titles, as the stage does over all.",
            "A CPU computes in float32. bfloat16 was tried on it: 1.6 times as fast for text and 1.9 times for artwork "
            "(CPU time), but text vectors then differ by .003, and those of untrained filters, which only small "
            "deviations tell apart, by .28. A GPU uses mixed precision; its rows show what that changes.",
        ],
        promises=[Promise(f"difference between batch sizes on {devices[0]}", exact, EXACT)],
        plot=lambda axes: draw(axes, found),
    )


def draw(axes: Any, found: list[Measured]) -> None:
    """Titles/s against batch size."""
    for device, kind in dict.fromkeys((one.case.device, one.case.kind) for one in found):
        line = [one for one in found if (one.case.device, one.case.kind) == (device, kind)]
        speeds = [one.case.titles / float(np.median(one.seconds)) for one in line]
        axes.plot([one.case.batch for one in line], speeds, "o-", label=f"{kind}, {device}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("titles a batch")
    axes.set_ylabel("titles/s")
    axes.legend()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", nargs="+", choices=["cpu", "cuda"], help="default: all there are")


def main(argv: list[str] | None = None) -> int:
    return run(__spec__.name if __spec__ else __name__, __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
