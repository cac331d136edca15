"""Raw tables -> prepared dataset: validate, sort into sequences, split, learn from the training period, write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.catalogue import natural_order, read_titles, read_users
from data_prep.raw_table import RawTable, connect
from data_prep.rights import map_rights, scenarios_of
from data_prep.sequences import (
    Sequences,
    refuse_unknown_titles,
    settle_duplicates,
    sort_events,
    stage_events,
)
from data_prep.spec import DatasetSpec
from data_prep.training_period import (
    SPLIT_NAMES,
    SplitKind,
    intensity_boundaries,
    keep_trained,
    split_events,
)
from data_prep.validate import check_events, check_titles, check_users
from data_prep.write import (
    content_hash,
    keep_content,
    refuse_foreign_folder,
    temporary_sibling,
)
from m5.folders import put_in_place
from m5.schema import ALWAYS, TRAIN, DataError, Intensity, Manifest, Split, Vocabulary

Progress = Callable[[str], None]


def say(text: str) -> None:
    """Progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def silent(text: str) -> None:
    """No progress."""


def _index_categorical(
    sequences: Sequences, names: tuple[str, ...], prefix: str, trained: np.ndarray
) -> list[Vocabulary]:
    """Cut the scenario or context columns down to the values of the training period, in place."""
    vocabularies = []
    for name in names:
        codes = sequences.array(f"{prefix}_{name}")
        values = sequences.values[f"{prefix}_{name}"]
        vocabulary, codes[:] = keep_trained(name, values, codes, trained)
        late = len(values) - len(vocabulary.values)
        if late:
            sequences.notes.append(f"{late:,} values of {name} have no training event and count as unknown.")
        vocabularies.append(vocabulary)
    return vocabularies


def _index_features(frame: pd.DataFrame, trained_users: np.ndarray) -> tuple[pd.DataFrame, list[Vocabulary]]:
    """users.parquet and its vocabularies, from raw features; `trained_users` is bool [U]."""
    indexed, vocabularies = pd.DataFrame({"user_id": frame["user_id"].astype(str)}), []
    for name in frame.columns.drop("user_id"):
        values = natural_order(frame[name].dropna().astype(str).unique().tolist())
        position = {value: code for code, value in enumerate(values, start=1)}
        codes = frame[name].map(position).fillna(0).astype(np.int32).to_numpy()
        vocabulary, indexed[name] = keep_trained(name, values, codes, trained_users)
        vocabularies.append(vocabulary)
    return indexed, vocabularies


def _count_titles(titles: pd.DataFrame, sequences: Sequences, trained: np.ndarray) -> list[str]:
    """Add train_count and cold to the catalogue, behind `released`; returns notes."""
    events = np.asarray(sequences.array("title"))
    counts = np.bincount(events[trained], minlength=len(titles)).astype(np.int64)
    place = titles.columns.get_loc("released") + 1
    titles.insert(place, "train_count", counts)
    titles.insert(place + 1, "cold", counts == 0)
    released = titles["released"].to_numpy()
    notes = []
    if (released != ALWAYS).any():
        early = np.asarray(sequences.array("timestamp")) < released[events]
        if early.any():
            example = titles["title_id"].iloc[events[int(np.argmax(early))]]
            notes.append(
                f"{int(early.sum()):,} events of {len(np.unique(events[early])):,} titles lie before the title's "
                f"release (for example title {example}); check `released`."
            )
    return notes


def _missing_artwork(titles: pd.DataFrame) -> list[str]:
    """A note where artwork is named whose file does not exist."""
    absent = [path for path in titles["artwork"] if path and not Path(path).is_file()]
    return [f"{len(absent):,} artwork files do not exist, for example {absent[0]}."] if absent else []


class _Preparation:
    """The steps of one preparation, sharing its tables; `folder` is the unfinished dataset, `work` DuckDB's."""

    def __init__(self, spec: DatasetSpec, folder: Path, work: Path, memory_limit: str, progress: Progress):
        self.spec, self.folder, self.work = spec, folder, work
        self.memory_limit, self.progress = memory_limit, progress
        self.notes = list(spec.notes)

    def sort(self, min_events: int) -> tuple[Sequences, pd.DataFrame, Vocabulary, pd.DataFrame]:
        """Validate and sort; returns the sequences, titles, category vocabulary and raw users."""
        spec = self.spec
        with connect(self.work, self.memory_limit) as connection:
            events = RawTable(connection, spec.resolve(spec.events.path), "events")
            titles = RawTable(connection, spec.resolve(spec.titles.path), "titles")
            users = RawTable(connection, spec.resolve(spec.users.path), "users") if spec.users else None
            self.progress("checking the tables")
            check_titles(titles, spec)
            if users is not None and spec.users is not None:
                check_users(users, spec.users.id, spec.users.features)
            rows, notes = check_events(events, spec.events)
            self.notes += notes
            self.progress(f"reading {rows:,} events")
            catalogue, categories = read_titles(titles, spec)
            stage_events(events, users, spec)
            refuse_unknown_titles(events, titles, spec)
            self.notes += settle_duplicates(events, spec)
            self.progress("sorting them by user and time")
            (self.folder / "events").mkdir()
            sequences = sort_events(connection, spec, self.folder / "events", min_events)
            raw_users, notes = read_users(users, spec, sequences.user_ids)
            self.notes += sequences.notes + notes
            sequences.notes = []
        return sequences, catalogue, categories, raw_users

    def rights(
        self, seen: dict[str, list[str]], vocabularies: list[Vocabulary], n_titles: int
    ) -> tuple[str, ...] | None:
        """Write rights.parquet; returns its scenarios, or None where there are no rights."""
        if self.spec.rights is None:
            return None
        named = {vocabulary.name: vocabulary for vocabulary in vocabularies}
        with connect(self.work, self.memory_limit) as connection:
            table = RawTable(connection, self.spec.resolve(self.spec.rights.path), "rights")
            frame, notes = map_rights(table, self.spec.rights, named, seen, n_titles)
        self.notes += notes
        frame.to_parquet(self.folder / "rights.parquet", index=False)
        return scenarios_of(self.spec.rights, named)

    def intensities(self, sequences: Sequences, trained: np.ndarray) -> tuple[Intensity, ...]:
        found = []
        for kind in self.spec.events.intensity:
            found.append(intensity_boundaries(kind, np.asarray(sequences.array(f"intensity_{kind}"))[trained]))
        return tuple(found)


def _learn_and_write(
    preparation: _Preparation,
    sequences: Sequences,
    titles: pd.DataFrame,
    categories: Vocabulary,
    raw_users: pd.DataFrame,
    marks: np.ndarray,
    split: Split,
) -> Manifest:
    """Take vocabularies, boundaries and counts from the training period, and write the tables; `marks` is uint8 [T]."""
    spec, folder, trained = preparation.spec, preparation.folder, marks == TRAIN
    preparation.progress("vocabularies and counts of the training period")
    seen = {name: sequences.values[f"scenario_{name}"] for name in spec.events.scenario}
    scenarios = _index_categorical(sequences, spec.events.scenario, "scenario", trained)
    contexts = _index_categorical(sequences, spec.events.context, "context", trained)
    events_trained = np.concatenate([[0], np.cumsum(trained)])
    trained_users = np.diff(events_trained[sequences.offsets]) > 0
    users, features = _index_features(raw_users, trained_users)
    preparation.notes += sequences.notes + _count_titles(titles, sequences, trained) + _missing_artwork(titles)
    rights_scenarios = preparation.rights(seen, scenarios, len(titles))
    users.to_parquet(folder / "users.parquet", index=False)
    titles.to_parquet(folder / "titles.parquet", index=False)
    return Manifest(
        source=spec.source,
        name=spec.name,
        n_users=len(users),
        n_titles=len(titles),
        n_events=sequences.n_events,
        n_cold_titles=int(titles["cold"].sum()),
        split=split,
        split_counts={name: int((marks == value).sum()) for name, value in SPLIT_NAMES.items()},
        categories=categories,
        scenarios=tuple(scenarios),
        contexts=tuple(contexts),
        user_features=tuple(features),
        intensities=preparation.intensities(sequences, trained),
        metadata=spec.titles.metadata,
        rights_scenarios=rights_scenarios,
        notes=tuple(preparation.notes),
    )


def prepare_dataset(
    spec: DatasetSpec,
    out: Path,
    *,
    split: SplitKind = "time",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    min_events_per_user: int = 1,
    memory_limit: str = "3GB",
    progress: Progress = silent,
) -> Manifest:
    """Write the prepared dataset of `m5.schema` to `out`, or nothing at all.

    Args:
        spec: the tables and their columns' roles.
        out: folder to write; a prepared dataset there is replaced, and its content vectors are kept where the events,
            titles and users are the same.
        split: `time` (global) or `leave-last-out`.
        valid_fraction, test_fraction: shares of the events, in time, of a `time` split.
        min_events_per_user: users with fewer events, in all splits together, are left out.
        memory_limit: what DuckDB may hold before it spills to disk; NumPy needs about 30 bytes an event besides.
        progress: called with a line of text at each step.

    Raises:
        DataError: a mistake in the tables or settings.
        OSError: ENOSPC, where the disk is full.
    """
    out = Path(out).absolute()
    refuse_foreign_folder(out)
    if spec.truth is not None and not spec.resolve(spec.truth).is_file():
        raise DataError(f"truth: the file {spec.resolve(spec.truth)} does not exist. Correct or remove the key.")
    with temporary_sibling(out, "preparing") as temporary:
        folder, work = temporary / "dataset", temporary / "work"
        folder.mkdir()
        work.mkdir()
        preparation = _Preparation(spec, folder, work, memory_limit, progress)
        sequences, titles, categories, raw_users = preparation.sort(min_events_per_user)
        if sequences.n_events == 0:
            raise DataError(f"No user has {min_events_per_user} events: nothing is left. Lower min_events_per_user.")
        np.save(folder / "events" / "offsets.npy", sequences.offsets)
        timestamps = np.asarray(sequences.array("timestamp"))
        marks, described = split_events(
            split, timestamps, sequences.offsets, valid_fraction=valid_fraction, test_fraction=test_fraction
        )
        np.save(folder / "events" / "split.npy", marks)
        manifest = _learn_and_write(preparation, sequences, titles, categories, raw_users, marks, described)
        if spec.truth is not None:
            (folder / "truth.npz").write_bytes(spec.resolve(spec.truth).read_bytes())
        manifest = manifest.model_copy(update={"content_hash": content_hash(folder, manifest)})
        manifest = keep_content(out, folder, manifest)
        manifest.write(folder)
        put_in_place(folder, out)
    progress(f"{manifest.name}: {manifest.n_events:,} events, {manifest.n_users:,} users, {manifest.n_titles:,} titles")
    return manifest


def prepare_all(
    spec: DatasetSpec,
    out: Path,
    *,
    text: str | None = None,
    image: str = "resnet50",
    image_weights: str = "hub",
    split: SplitKind = "time",
    min_events_per_user: int = 1,
    progress: Progress = say,
) -> Manifest:
    """Every stage: `prepare_dataset`, then text and image vectors, then the graph.

    Text is skipped where no title has a description, images where none has artwork. The folder appears when all stages
    are done: where an encoder is missing, what was there before stays. A second try is quick, as vectors are cached.

    Args:
        spec: the tables and their columns' roles.
        out: folder to write.
        text: hub name or folder of the text encoder; the one that comes with the installation by default.
        image: timm model.
        image_weights: "hub", "random" or a file.
        split, min_events_per_user, progress: as in `prepare_dataset`.

    Returns:
        The manifest, with the encoders that ran.

    Raises:
        DataError: a mistake in the tables or settings, or a missing encoder.
        OSError: ENOSPC, where the disk is full.
    """
    from data_prep.graphsage import build_graph
    from data_prep.image_encoder import encode_images
    from data_prep.text_encoder import encode_text

    out = Path(out).absolute()
    refuse_foreign_folder(out)
    with temporary_sibling(out, "encoding") as temporary:
        data = temporary / out.name
        manifest = prepare_dataset(spec, data, split=split, min_events_per_user=min_events_per_user, progress=progress)
        keep_content(out, data, manifest).write(data)
        titles = pd.read_parquet(data / "titles.parquet", columns=["description", "artwork"])
        if (titles["description"] != "").any():
            encode_text(data, model=text)
        else:
            progress("no title has a description: text vectors are skipped")
        if (titles["artwork"] != "").any():
            encode_images(data, model=image, weights=image_weights)
        else:
            progress("no title has artwork: image vectors are skipped")
        build_graph(data)
        put_in_place(data, out)
    manifest = Manifest.read(out)
    for note in manifest.notes:
        progress(f"note: {note}")
    return manifest
