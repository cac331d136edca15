"""Source `tables`: a user's own Parquet or CSV tables, described by a dataset.yaml (see data_prep.spec)."""

from __future__ import annotations

from pathlib import Path

from data_prep.spec import DatasetSpec, read_spec


def load(yaml_path: Path) -> DatasetSpec:
    """Read a dataset.yaml, or the one in a folder.

    Raises:
        DataError: the file does not exist, is not YAML, or has missing or unknown keys.
    """
    yaml_path = Path(yaml_path)
    return read_spec(yaml_path / "dataset.yaml" if yaml_path.is_dir() else yaml_path)
