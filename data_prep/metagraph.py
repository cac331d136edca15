"""The metagraph: titles and the values of their metadata (genres, actors, studios, ...), one relation per kind.

Saved as DATA/metagraph.npz; for the i-th kind:
    kinds                  str [R], the metadata kinds that have links
    i_values               str [V], the kind's value nodes; the first i_trained of them have two warm titles or more
    i_trained              int64 []
    i_title_offsets        int64 [N + 1]; title n is linked to the values i_title_values[offsets[n]:offsets[n + 1]]
    i_title_values         int32 [edges]
    i_value_offsets        int64 [V + 1]; value v hears the titles i_value_titles[offsets[v]:offsets[v + 1]]
    i_value_titles         int32 [edges], warm titles only

The graph is built so that nothing after the training period reaches what is learned from it. A *warm* title has events
in the training period. Values hear warm titles only, and a warm title hears only values that two warm titles share; so
no warm title's vector depends on a cold title. A cold title hears every value that at least one warm title has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from m5.schema import PreparedDataset


@dataclass(frozen=True)
class Relation:
    """The links of one metadata kind; see the module for the arrays."""

    kind: str
    values: np.ndarray
    n_trained: int
    title_offsets: np.ndarray
    title_values: np.ndarray
    value_offsets: np.ndarray
    value_titles: np.ndarray

    def title_links(self) -> tuple[np.ndarray, np.ndarray]:
        """(titles, values), both int64 [edges]: what titles hear."""
        titles = np.repeat(np.arange(len(self.title_offsets) - 1), np.diff(self.title_offsets))
        return titles, self.title_values.astype(np.int64)

    def value_links(self) -> tuple[np.ndarray, np.ndarray]:
        """(titles, values), both int64 [edges]: what values hear."""
        values = np.repeat(np.arange(len(self.value_offsets) - 1), np.diff(self.value_offsets))
        return self.value_titles.astype(np.int64), values


@dataclass(frozen=True)
class Metagraph:
    n_titles: int
    relations: tuple[Relation, ...]

    @property
    def n_links(self) -> int:
        return sum(len(relation.title_values) for relation in self.relations)


def _offsets(sorted_rows: np.ndarray, n_rows: int) -> np.ndarray:
    return np.concatenate([[0], np.bincount(sorted_rows, minlength=n_rows).cumsum()]).astype(np.int64)


def build_relation(kind: str, lists: pd.Series, warm: np.ndarray) -> Relation | None:
    """One kind's links, or None where no value is shared.

    Args:
        kind: the metadata column.
        lists: N lists of strings.
        warm: bool [N], titles with events in the training period.
    """
    exploded = pd.Series(lists.to_numpy(), index=np.arange(len(lists))).explode().dropna()
    pairs = pd.DataFrame({"title": exploded.index, "name": exploded.astype(str).to_numpy()}).drop_duplicates()
    if not len(pairs):
        return None
    codes, names = pd.factorize(pairs["name"], sort=True)
    titles, is_warm = pairs["title"].to_numpy(), warm[pairs["title"].to_numpy()]
    n_warm, n_all = np.bincount(codes[is_warm], minlength=len(names)), np.bincount(codes, minlength=len(names))
    # Trained values first, so that what is learned of them does not move when cold titles bring others in.
    trained, kept = n_warm >= 2, (n_warm >= 1) & (n_all >= 2)
    if not kept.any():
        return None
    order = np.concatenate([np.flatnonzero(kept & trained), np.flatnonzero(kept & ~trained)])
    position = np.full(len(names), -1)
    position[order] = np.arange(len(order))
    values = position[codes]
    hears = (values >= 0) & (trained[codes] | ~is_warm)
    heard = (values >= 0) & is_warm
    by_title = np.lexsort((values[hears], titles[hears]))
    by_value = np.lexsort((titles[heard], values[heard]))
    return Relation(
        kind=kind,
        values=np.asarray(names[order], dtype=np.str_),
        n_trained=int(trained.sum()),
        title_offsets=_offsets(titles[hears][by_title], len(warm)),
        title_values=values[hears][by_title].astype(np.int32),
        value_offsets=_offsets(values[heard][by_value], len(order)),
        value_titles=titles[heard][by_value].astype(np.int32),
    )


def build_metagraph(dataset: PreparedDataset) -> Metagraph:
    """The graph of a prepared dataset; without relations where no metadata value is shared by two titles."""
    titles = dataset.titles
    warm = ~titles["cold"].to_numpy(dtype=bool)
    found = (build_relation(kind, titles[kind], warm) for kind in dataset.manifest.metadata)
    return Metagraph(len(titles), tuple(relation for relation in found if relation is not None))


def save_metagraph(graph: Metagraph, path: Path) -> None:
    """Write the arrays that the module describes, through a temporary sibling."""
    arrays: dict[str, np.ndarray] = {"kinds": np.array([r.kind for r in graph.relations], dtype=np.str_)}
    for i, relation in enumerate(graph.relations):
        arrays |= {
            f"{i}_values": relation.values,
            f"{i}_trained": np.array(relation.n_trained),
            f"{i}_title_offsets": relation.title_offsets,
            f"{i}_title_values": relation.title_values,
            f"{i}_value_offsets": relation.value_offsets,
            f"{i}_value_titles": relation.value_titles,
        }
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_metagraph(path: Path) -> Metagraph:
    """What `save_metagraph` wrote."""
    with np.load(path) as file:
        arrays = dict(file)
    relations = tuple(
        Relation(
            kind=str(kind),
            values=arrays[f"{i}_values"],
            n_trained=int(arrays[f"{i}_trained"]),
            title_offsets=arrays[f"{i}_title_offsets"],
            title_values=arrays[f"{i}_title_values"],
            value_offsets=arrays[f"{i}_value_offsets"],
            value_titles=arrays[f"{i}_value_titles"],
        )
        for i, kind in enumerate(arrays["kinds"])
    )
    return Metagraph(len(relations[0].title_offsets) - 1 if relations else 0, relations)
