"""The prepared dataset of a search: a folder, or an fsspec URL that each node copies once, for all of its trials."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from m5.config import ConfigError
from tune.records import locked

MANIFEST = "manifest.json"
COPYING = 24 * 3600.0  # seconds to wait for another process of this node that copies


def cache_folder() -> Path:
    """Where copies lie: $M5_CACHE/data, by default ~/.cache/m5/data."""
    return Path(os.environ.get("M5_CACHE", Path.home() / ".cache" / "m5")) / "data"


def local_dataset(data: str) -> Path:
    """The folder of a prepared dataset on this node.

    Args:
        data: a folder, or a URL such as s3://bucket/prepared. Its protocol's package (s3fs, gcsfs, adlfs ...) must be
            installed; credentials are found as that package finds them.

    Returns:
        The folder; of a URL a copy, made once for each content of its manifest.

    Raises:
        ConfigError: nothing there that is a prepared dataset, or no package for the protocol.
    """
    if "://" not in data:
        return Path(data).resolve()
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(data)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--data {data}: {error}") from None
    path = path.rstrip("/")
    try:
        manifest = files.cat_file(f"{path}/{MANIFEST}")
    except (FileNotFoundError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"--data {data} is no prepared dataset: {MANIFEST} cannot be read ({reason}).") from None
    copy = cache_folder() / hashlib.sha256(data.encode() + manifest).hexdigest()[:16]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with locked(copy.with_suffix(".lock"), f"{copy} is being copied by another process for a day.", COPYING):
        if not copy.is_dir():
            temporary = copy.with_suffix(".writing")
            shutil.rmtree(temporary, ignore_errors=True)
            files.get(f"{path}/", f"{temporary}/", recursive=True)
            temporary.rename(copy)
    return copy
