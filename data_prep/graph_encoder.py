"""Content vectors of titles that have come after the graph was built, from what `m5 graph` has kept.

GraphSAGE is inductive: a new title hears the values of its metadata, and no value hears it, as with any title that has
no event of the training period. So its vector is what a preparation with it in the catalogue would have given it, but
for rounding, as long as the graph has the kinds of its metadata. A kind of which no value was shared has no relation:
its values say nothing here, while a preparation with a title that shares one would begin the relation.

Needed are content/graph.safetensors (components of the features and weights), the trained values' names in
metagraph.npz, and the features and metadata of the titles of the training period (content/graph.npy, whose first half
the features are, and titles.parquet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_prep.content_arrays import load_kept, unit_rows
from data_prep.content_features import FeatureMap
from data_prep.graphsage_model import Heard, MetagraphSage
from data_prep.metagraph import Relation, load_metagraph
from m5.schema import ContentKind, DataError, PreparedDataset

Metadata = Mapping[str, Sequence[str]]  # kind -> values


@dataclass(frozen=True)
class GraphEncoder:
    """What encodes further titles of a prepared dataset.

    Args:
        dataset: whose graph it is.
        feature_map: text and image vectors -> node features.
        relations: of the metagraph; empty where no metadata is shared.
        model: None without relations.
    """

    dataset: PreparedDataset
    feature_map: FeatureMap
    relations: tuple[Relation, ...]
    model: MetagraphSage | None

    @classmethod
    def load(cls, data: Path) -> GraphEncoder:
        """Of a prepared dataset.

        Raises:
            DataError: no content graph, or one of an earlier version, or of other text or image vectors.
        """
        dataset = PreparedDataset(data)
        remedy = f"`m5 graph {data}`"
        if "graph" not in dataset.manifest.encoders:
            raise DataError(f"{data} has no content graph to encode a title with. Run {remedy} first.")
        kept = load_kept(Path(data), "graph", dataset.manifest, remedy)
        weights = {name.removeprefix("sage."): kept[name] for name in kept if name.startswith("sage.")}
        feature_map = FeatureMap.from_tensors(kept)
        if not weights:
            return cls(dataset, feature_map, (), None)
        relations = load_metagraph(Path(data) / "metagraph.npz").relations
        width, n_features = weights["project.weight"].shape
        model = MetagraphSage(n_features=n_features, n_trained=[r.n_trained for r in relations], width=width)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return cls(dataset, feature_map, relations, model.eval())

    @property
    def kinds(self) -> set[str]:
        """Metadata kinds that the graph has."""
        return {relation.kind for relation in self.relations}

    @cached_property
    def _features(self) -> np.ndarray:
        """float32 [N, F] of the catalogue: the first half of graph.npy, whose halves are unit rows."""
        vectors = self.dataset.content("graph")
        assert vectors is not None, "the manifest records it"
        return unit_rows(vectors[:, : self.feature_map.joint.axes.shape[1]])

    @cached_property
    def _having(self) -> list[dict[str, np.ndarray]]:
        """By relation, int64 titles of the training period that have each value."""
        titles, found = self.dataset.titles, []
        warm = np.flatnonzero(~titles["cold"].to_numpy(bool))
        for relation in self.relations:
            names = pd.Series(titles[relation.kind].to_numpy()[warm], index=warm).explode().dropna().astype(str)
            found.append({str(name): np.unique(rows) for name, rows in names.groupby(names).groups.items()})
        return found

    def _heard(self, number: int, lists: Sequence[Sequence[str]]) -> tuple[Heard, list[list[str]]]:
        """What n titles hear by one relation, and those of their values that no title of the training period has."""
        relation, having = self.relations[number], self._having[number]
        names = sorted({value for values in lists for value in values} & having.keys())
        mean = np.zeros((len(names), self._features.shape[1]), dtype=np.float32)
        for row, name in enumerate(names):
            mean[row] = self._features[having[name]].mean(axis=0)
        trained = {name: row for row, name in enumerate(relation.values[: relation.n_trained].tolist())}
        place = {name: row for row, name in enumerate(names)}
        edges = [(place[v], row) for row, values in enumerate(lists) for v in sorted(set(values)) if v in place]
        source, destination = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).unbind(1)
        heard = Heard(
            values=torch.tensor([trained.get(name, relation.n_trained) for name in names], dtype=torch.int64),
            features=torch.from_numpy(mean),
            edges=(source, destination),
        )
        return heard, [[value for value in values if value not in place] for values in lists]

    def encode(
        self, vectors: Mapping[ContentKind, np.ndarray], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, list[dict[str, list[str]]]]:
        """Rows as in graph.npy of n titles.

        Args:
            vectors: float32 [n, d] text and image vectors as in text.npy and image.npy, of each kind that the graph
                was built on; a zero row is one that is missing.
            metadata: of every title, kind -> values.

        Returns:
            float32 [n, G] unit rows, and for each title the values by kind that say nothing, because no title of the
            training period has them, or because the graph has nothing of that kind (`kinds`).
        """
        n = len(metadata)
        features = self.feature_map.apply(vectors, n)
        unknown: list[dict[str, list[str]]] = [{} for _ in metadata]
        halves = [features] if features.shape[1] else []
        if self.model is not None:
            heard = []
            for number, relation in enumerate(self.relations):
                one, strange = self._heard(number, [titles.get(relation.kind, ()) for titles in metadata])
                heard.append(one)
                for row, values in enumerate(strange):
                    unknown[row] |= {relation.kind: values} if values else {}
            halves.append(self.model.new_titles(torch.from_numpy(features), heard).numpy())
        for row, titles in enumerate(metadata):
            unknown[row] |= {kind: list(values) for kind, values in titles.items() if kind not in self.kinds and values}
        return unit_rows(np.concatenate(halves, axis=1)), unknown
