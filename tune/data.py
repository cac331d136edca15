"""The prepared dataset of a search: a folder, or an fsspec URL that each node copies once, for all of its trials."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from data_prep.vector_cache import default_cache
from m5.config import ConfigError
from m5.folders import holding

MANIFEST = "manifest.json"
COPYING = 24 * 3600.0  # seconds to wait for another process of this node that copies


def local_dataset(data: str) -> Path:
    """The folder of a prepared dataset on this node.

    Args:
        data: a folder, or a URL such as s3://bucket/prepared. Its protocol's package (s3fs, gcsfs, adlfs ...) must be
            installed; credentials are found as that package finds them.

    Returns:
        The folder; of a URL a copy in $M5_CACHE/data, made once for each content of its manifest.

    Raises:
        ConfigError: nothing there that is a prepared dataset, or no package for the protocol.
    """
    if "://" not in data:
        return Path(data).resolve()
    files, path = _files(data)
    manifest = _manifest(files, path, data)
    copy = default_cache() / "data" / hashlib.sha256(data.encode() + manifest).hexdigest()[:16]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with holding(copy.with_suffix(".lock"), f"{copy} is being copied by another process for a day.", COPYING):
        if not copy.is_dir():
            # It gets its name when it is whole. What a killed process has left is begun anew.
            temporary = copy.with_suffix(".writing")
            shutil.rmtree(temporary, ignore_errors=True)
            _copy(files, path, temporary)
            if (temporary / MANIFEST).read_bytes() != manifest:
                raise ConfigError(f"--data {data} was changed while it was copied. Run it again.")
            temporary.rename(copy)
    return copy


def _files(data: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    import fsspec

    # An instance of its own: one that another call has used remembers its listings.
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if data.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout

            # By default a file may take five minutes in all. Large arrays take longer.
            options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=300)}
        files, path = fsspec.core.url_to_fs(data, **options)
    except ImportError as error:
        raise ConfigError(f"--data {data}: {error}, on every node.") from None
    except ValueError as error:
        known = "s3://, gs://, abfs://, https:// and file://"
        raise ConfigError(f"--data {data}: {error}. Known are e.g. {known}.") from None
    return files, path.rstrip("/")


def _manifest(files: Any, path: str, data: str) -> bytes:
    try:
        return files.cat_file(f"{path}/{MANIFEST}")
    except FileNotFoundError:
        raise ConfigError(f"--data {data} is no prepared dataset: it has no {MANIFEST}.") from None
    except Exception as error:  # each protocol's package has errors of its own: no network, no permission, no account
        reason = str(error) or type(error).__name__
        raise ConfigError(f"--data {data}: {MANIFEST} cannot be read: {reason}") from None


def _copy(files: Any, path: str, folder: Path) -> None:
    """Copy all files below `path`. Not by get(recursive=True), which over HTTP takes folders for files."""
    names = [source.removeprefix(f"{path}/") for source in files.find(path)]
    # Pages that list a folder also have links to other pages, and to themselves in another order.
    names = [name for name in names if "://" not in name and "?" not in name and ".." not in name.split("/")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    files.get([f"{path}/{name}" for name in names], [str(folder / name) for name in names])
