"""A copy of a prepared dataset as it was before one value of a scenario joined: for `m5 bench adapt`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from data_prep.training_period import intensity_boundaries
from data_prep.write import content_hash
from m5.evaluate import in_scenario
from m5.schema import TEST, TRAIN, VALID, DataError, PreparedDataset, Vocabulary

SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}


def without(dataset: PreparedDataset, name: str, value: str, out: Path) -> PreparedDataset:
    """Write the dataset without a value: its events, its rights and its word in the vocabulary are gone.

    Titles and users stay, so that all indices but the scenario's are those of the original; what is learned of the
    training period, counts and bucket boundaries, is learned again, and a title that only the value's viewers watched
    there is cold. Content vectors are copied: GraphSAGE hears warm titles only, so `m5 graph` makes others of them.

    Args:
        dataset: the prepared dataset.
        name, value: of the scenario, e.g. region and US.
        out: folder to be written; it must not exist.

    Raises:
        DataError: no split is left, or a scenario or value that the dataset does not have.
    """
    manifest = dataset.manifest
    if name not in [one.name for one in manifest.scenarios] or value not in manifest.scenario(name).values:
        raise DataError(f"{dataset.folder} has no {name}={value}.")
    vocabulary = manifest.scenario(name)
    index, keep = vocabulary.index(value), ~in_scenario(dataset, name, value)
    split = np.asarray(dataset.event_array("split"))[keep]
    counts = {part: int((split == code).sum()) for part, code in SPLITS.items()}
    if not all(counts.values()):
        raise DataError(f"{dataset.folder}: without {name}={value} no event is left in one of its periods.")
    (out / "events").mkdir(parents=True)
    for path in sorted((dataset.folder / "events").glob("*.npy")):
        if path.stem == "offsets":
            array = np.concatenate([[0], np.cumsum(keep)])[dataset.offsets]
        else:
            array = np.asarray(dataset.event_array(path.stem))[keep]
        np.save(out / "events" / path.name, _moved(array, index) if path.stem == f"scenario_{name}" else array)
    shutil.copytree(dataset.folder / "content", out / "content", copy_function=shutil.copyfile)
    dataset.users.to_parquet(out / "users.parquet")
    titles, title = dataset.titles.copy(), np.load(out / "events" / "title.npy")
    train_count = np.bincount(title[split == TRAIN], minlength=manifest.n_titles)
    titles["train_count"], titles["cold"] = train_count.astype(np.int64), train_count == 0
    titles.to_parquet(out / "titles.parquet")
    if (rights := dataset.rights) is not None:
        if name in rights:
            rights = rights[rights[name] != index].copy()
            rights[name] = _moved(rights[name].to_numpy(), index)
        rights.to_parquet(out / "rights.parquet")
    trained = split == TRAIN
    intensities = tuple(
        intensity_boundaries(one.name, np.load(out / "events" / f"intensity_{one.name}.npy")[trained])
        for one in manifest.intensities
    )
    left = Vocabulary(name=name, values=tuple(other for other in vocabulary.values if other != value))
    manifest = manifest.model_copy(
        update={
            "name": f"{manifest.name} without {name}={value}",
            "n_events": int(keep.sum()),
            "n_cold_titles": int((train_count == 0).sum()),
            "split_counts": counts,
            "intensities": intensities,
            "scenarios": tuple(left if one.name == name else one for one in manifest.scenarios),
        }
    )
    manifest.model_copy(update={"content_hash": content_hash(out, manifest)}).write(out)
    return PreparedDataset(out)


def _moved(index_X: np.ndarray, gone: int) -> np.ndarray:
    """Vocabulary indices after one of them has gone; none of them is it."""
    return index_X - (index_X > gone).astype(index_X.dtype)
