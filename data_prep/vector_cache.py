"""Encoded vectors on disk, by the hash of what was encoded, so that a second run encodes only what changed.

    CACHE/<kind>/<model hash>/<name>.keys.npy       bytes S64 [n], sha256 of the content, hexadecimal
    CACHE/<kind>/<model hash>/<name>.vectors.npy    float32 [n, d]

Each `add` writes a segment of its own, vectors first and keys last, so that neither a crash nor a second process leaves
keys without vectors.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ITEMS_PER_SEGMENT = 4096  # what an interrupted run can lose
LINES_PER_STAGE = 4  # where the output is not a terminal
Batches = Iterable[tuple[np.ndarray, np.ndarray]]


def default_cache() -> Path:
    """The folder of environment variable M5_CACHE, or ~/.cache/m5."""
    return Path(os.environ.get("M5_CACHE") or Path.home() / ".cache" / "m5")


def hash_bytes(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def stage_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress on stderr: a bar on a terminal, else a few plain lines. Yields `advance(count)`."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done * LINES_PER_STAGE // max(total, 1) > before * LINES_PER_STAGE // max(total, 1):
            print(f"{name}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    yield advance


class VectorCache:
    """Vectors of one model.

    Args:
        folder: the cache's root, e.g. `default_cache()`.
        kind: text or image.
        model_hash: of everything that a vector depends on besides its content: weights, pooling, size.
    """

    def __init__(self, folder: Path, kind: str, model_hash: str):
        self.folder = Path(folder) / kind / model_hash

    def find(self, keys: np.ndarray) -> dict[bytes, np.ndarray]:
        """Vectors (float32 [d]) of those of the keys (bytes S64 [n]) that are cached."""
        found: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.keys.npy")):
            try:
                segment = np.load(path)
                vectors = np.load(path.with_name(path.name.replace(".keys.", ".vectors.")), mmap_mode="r")
            except (OSError, ValueError, EOFError):
                continue  # a damaged segment only costs encoding it again
            rows = np.flatnonzero(np.isin(segment, keys))
            if len(vectors) == len(segment) and len(rows):
                found.update(zip(segment[rows].tolist(), np.asarray(vectors[rows]), strict=True))
        return found

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Write a segment: keys bytes S64 [n], vectors float32 [n, d]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        for part, array in (("vectors", vectors.astype(np.float32)), ("keys", keys)):
            temporary = self.folder / f".{name}.{part}"
            try:
                with temporary.open("wb") as file:
                    np.save(file, array)
                temporary.replace(self.folder / f"{name}.{part}.npy")
            finally:
                temporary.unlink(missing_ok=True)


def encode_through(
    cache: VectorCache, keys: Sequence[str], encode: Callable[[np.ndarray], Batches], name: str
) -> tuple[dict[bytes, np.ndarray], int]:
    """Vectors of all the keys, encoding the ones that the cache lacks, each content once.

    Args:
        keys: sha256 of each item's content, hexadecimal.
        encode: given int64 [m] positions in `keys`, yields (positions [b], float32 [b, d]); what it leaves out could
            not be encoded.
        name: what the progress bar is called.

    Returns:
        Vectors by key, and how many items `encode` returned.
    """
    unique, first = np.unique(np.asarray(keys, dtype="S64"), return_index=True)
    found = cache.find(unique)
    missing = first[[key not in found for key in unique.tolist()]] if len(unique) else first
    if not len(missing):
        return found, 0
    encoded = 0
    pending: list[tuple[np.ndarray, np.ndarray]] = []

    def flush() -> None:
        if pending:
            cache.add(np.concatenate([k for k, _ in pending]), np.concatenate([v for _, v in pending]))
            pending.clear()

    with stage_progress(name, len(missing)) as advance:
        for positions, vectors in encode(missing):
            batch = np.asarray([keys[i] for i in positions], dtype="S64")
            found.update(zip(batch.tolist(), vectors, strict=True))
            pending.append((batch, vectors))
            encoded += len(batch)
            advance(len(batch))
            if sum(len(k) for k, _ in pending) >= ITEMS_PER_SEGMENT:
                flush()
        flush()
    return found, encoded
