"""Pre-train content vectors of titles on the metagraph by link prediction, and write content/graph.npy.

Weights and components stay in content/graph.safetensors, for titles that come later (`data_prep.graph_encoder`).

A row of graph.npy is the unit vector of two halves: the GraphSAGE vector, which knows what titles share, and the
principal components of the content features, so that link prediction cannot wear away what text and artwork say.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import rankdata
from torch.nn import functional

from data_prep.content_arrays import pick_device, remove_content, save_content, unit_rows
from data_prep.content_features import FeatureMap, neighbour_overlap
from data_prep.graphsage_model import MessageGraph, MetagraphSage, Nodes, sample_hop
from data_prep.metagraph import Metagraph, build_metagraph, save_metagraph
from data_prep.neighbour_sampler import Adjacency
from data_prep.vector_cache import hash_bytes, stage_progress
from m5.schema import Encoder, PreparedDataset

HELD_OUT = 0.1  # share of the links that tell when to stop
TARGETS = 0.3  # share of an epoch's links that are predicted, and so hidden from the messages
MOST_TARGETS = 100_000  # an epoch, so that a large catalogue's epochs do not grow without end
NEGATIVES = 4  # a link
PATIENCE = 3  # epochs without a better held-out AUC
STEPS_PER_EPOCH = 25  # many small steps: with a fifth of them, MovieLens-1M's held-out AUC stays at .65 instead of .86
SMALLEST_BATCH, LARGEST_BATCH = 64, 2048  # links
LEARNING_RATE = 3e-3  # falls linearly to nothing over the epochs
SMALLEST_GAIN = 1e-3  # of the held-out AUC, to count as better

Links = list[tuple[np.ndarray, np.ndarray]]  # for each relation: titles and values, int64 [e] each


@dataclass(frozen=True)
class LinkSplit:
    """Links between warm titles and trained values; `keys` are the sorted title * V + value of all of them."""

    train: Links
    held_out: Links
    keys: list[np.ndarray]
    n_values: list[int]

    def is_link(self, relation: int, titles: np.ndarray, values: np.ndarray) -> np.ndarray:
        """bool [...], for titles and values int64 [...]."""
        wanted = titles * self.n_values[relation] + values
        keys = self.keys[relation]
        return keys[np.searchsorted(keys, wanted).clip(max=len(keys) - 1)] == wanted

    def negatives(self, relation: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [count] values, as often as they have links, so that popularity gives nothing away."""
        return rng.choice(self.train[relation][1], count)


def split_links(graph: Metagraph, rng: np.random.Generator) -> LinkSplit:
    """Hold out a tenth of the links of each relation. Links of cold titles are in neither part."""
    train, held_out, keys, n_values = [], [], [], []
    for relation in graph.relations:
        titles, values = relation.value_links()
        shared = values < relation.n_trained
        titles, values = titles[shared], values[shared]
        out = rng.random(len(titles)) < HELD_OUT
        train.append((titles[~out], values[~out]))
        held_out.append((titles[out], values[out]))
        keys.append(np.sort(titles * len(relation.values) + values))
        n_values.append(len(relation.values))
    return LinkSplit(train, held_out, keys, n_values)


def message_graph(
    features: np.ndarray, heard_by_title: Links, heard_by_value: Links, sizes: Sequence[int]
) -> MessageGraph:
    """Adjacencies and value features of links.

    Args:
        features: float32 [N, F] of the titles.
        heard_by_title, heard_by_value: links in either direction.
        sizes: for each relation, its number of values.
    """
    to_title, to_value, value_features = [], [], []
    for (titles, values), (heard, hearers), size in zip(heard_by_title, heard_by_value, sizes, strict=True):
        to_title.append(Adjacency.from_edges(torch.from_numpy(titles), torch.from_numpy(values), len(features)))
        to_value.append(Adjacency.from_edges(torch.from_numpy(hearers), torch.from_numpy(heard), size))
        share = (1 / np.bincount(hearers, minlength=size).clip(min=1)).astype(np.float32)[hearers]
        mean = csr_array((share, (hearers, heard)), shape=(size, len(features))) @ features
        value_features.append(torch.from_numpy(np.ascontiguousarray(mean, dtype=np.float32)))
    return MessageGraph(to_title, to_value, torch.from_numpy(features), value_features)


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive's score exceeds a negative's, ties half: the Mann-Whitney statistic."""
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


class LinkPredictor:
    """Trains a MetagraphSage.

    Args:
        graph: the metagraph.
        features: float32 [N, F].
        width: of the node vectors.
        fanout: neighbours drawn by relation, of the inner and the outer hop.
        seed: of everything random.
        device: where the network runs; sampling is on the CPU.
    """

    def __init__(
        self,
        graph: Metagraph,
        features: np.ndarray,
        *,
        width: int,
        fanout: tuple[int, int],
        seed: int,
        device: torch.device,
    ):
        self.features, self.fanout, self.device = features, fanout, device
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.links = split_links(graph, self.rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = MetagraphSage(
                n_features=features.shape[1], n_trained=[r.n_trained for r in graph.relations], width=width
            ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
        self.held_out_negatives = [
            self._true_negatives(relation, titles) for relation, (titles, _) in enumerate(self.links.held_out)
        ]

    def _true_negatives(self, relation: int, titles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = self.links.negatives(relation, len(titles), self.rng)
        fair = ~self.links.is_link(relation, titles, values)
        return titles[fair], values[fair]

    def epoch(self) -> float:
        """Predict a random part of the training links from the rest; returns the mean loss."""
        share = min(TARGETS, MOST_TARGETS / max(1, sum(len(titles) for titles, _ in self.links.train)))
        hidden = [self.rng.random(len(titles)) < share for titles, _ in self.links.train]
        pairs = list(zip(self.links.train, hidden, strict=True))
        seen = [(titles[~h], values[~h]) for (titles, values), h in pairs]
        graph = message_graph(self.features, seen, seen, self.links.n_values)
        relation = np.concatenate([np.full(int(h.sum()), r) for r, h in enumerate(hidden)])
        titles = np.concatenate([t[h] for (t, _), h in pairs])
        values = np.concatenate([v[h] for (_, v), h in pairs])
        order = self.rng.permutation(len(relation))
        size = int(np.clip(len(order) // STEPS_PER_EPOCH, SMALLEST_BATCH, LARGEST_BATCH))
        losses = []
        self.model.train()
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            losses.append(self._step(graph, relation[rows], titles[rows], values[rows]))
        return float(np.mean(losses)) if losses else 0.0

    def _step(self, graph: MessageGraph, relation: np.ndarray, titles: np.ndarray, values: np.ndarray) -> float:
        """One optimizer step on links int64 [b]; a drawn negative that is a link after all has no weight."""
        n_relations = len(self.links.n_values)
        links = [(titles[relation == r], values[relation == r]) for r in range(n_relations)]
        drawn = [
            self.links.negatives(r, len(t) * NEGATIVES, self.rng).reshape(-1, NEGATIVES)
            for r, (t, _) in enumerate(links)
        ]
        seeds = Nodes(
            torch.from_numpy(np.unique(titles)),
            [torch.from_numpy(np.unique(np.append(v, drawn[r]))) for r, (_, v) in enumerate(links)],
        )
        outer = sample_hop(graph, seeds, self.fanout[1], self.generator)
        inner = sample_hop(graph, outer.sources, self.fanout[0], self.generator)
        title_vectors, value_vectors = self.model(graph, inner, outer)
        loss = title_vectors.new_zeros(())
        for r, (t, v) in enumerate(links):
            if not len(t):
                continue
            z_title = title_vectors[self._at(seeds.titles, t)]
            positive = self.model.link_logits(r, z_title, value_vectors[r][self._at(seeds.values[r], v)])
            z_negative = value_vectors[r][self._at(seeds.values[r], drawn[r])]
            negative = self.model.link_logits(r, z_title.unsqueeze(1), z_negative)
            fair = torch.from_numpy(~self.links.is_link(r, t[:, None], drawn[r])).to(negative)
            loss = (
                loss + functional.softplus(-positive).sum() + (functional.softplus(negative) * fair).sum() / NEGATIVES
            )
        loss = loss / len(titles)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _at(self, nodes: torch.Tensor, wanted: np.ndarray) -> torch.Tensor:
        return torch.searchsorted(nodes, torch.from_numpy(np.ascontiguousarray(wanted))).to(self.device)

    @torch.no_grad()
    def held_out_auc(self) -> dict[int, float]:
        """AUC of the held-out links against fair negatives, by relation; messages go along the training links only."""
        self.model.eval()
        train = self.links.train
        title_vectors, value_vectors = self.model.all_nodes(
            message_graph(self.features, train, train, self.links.n_values)
        )
        model, found = self.model, {}
        for r, (true, false) in enumerate(zip(self.links.held_out, self.held_out_negatives, strict=True)):
            if len(true[0]) and len(false[0]):
                scores = [
                    model.link_logits(r, title_vectors[t].to(self.device), value_vectors[r][v].to(self.device)).cpu()
                    for t, v in (true, false)
                ]
                found[r] = area_under_curve(scores[0].numpy(), scores[1].numpy())
        return found

    def mean_auc(self, found: dict[int, float]) -> float:
        """Mean over the relations, each by its number of held-out links; NaN without any."""
        if not found:
            return float("nan")
        return float(np.average(list(found.values()), weights=[len(self.links.held_out[r][0]) for r in found]))

    def train(self, epochs: int) -> dict[int, float]:
        """Train until the held-out AUC stops rising, and keep the best; returns its AUC by relation."""
        best, best_auc, waited = self.held_out_auc(), -1.0, 0
        best_state = copy.deepcopy(self.model.state_dict())
        with stage_progress("pre-training on the metagraph (epochs at most)", epochs) as advance:
            for epoch in range(epochs):
                for group in self.optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - epoch / epochs)
                self.epoch()
                found = self.held_out_auc()
                auc = self.mean_auc(found)
                advance(1)
                # Without held-out links (a tiny graph) nothing says when to stop: all epochs run, and the last counts.
                if not found or auc > best_auc + SMALLEST_GAIN:
                    best, best_auc, waited = found, auc, 0
                    best_state = copy.deepcopy(self.model.state_dict())
                elif (waited := waited + 1) == PATIENCE:
                    break
        self.model.load_state_dict(best_state)
        return best

    def title_vectors(self, graph: Metagraph) -> np.ndarray:
        """float32 [N, width] unit rows of all titles over the whole metagraph, cold ones by what they hear."""
        self.model.eval()
        heard_by_title = [relation.title_links() for relation in graph.relations]
        heard_by_value = [relation.value_links() for relation in graph.relations]
        sizes = [len(relation.values) for relation in graph.relations]
        return self.model.all_nodes(message_graph(self.features, heard_by_title, heard_by_value, sizes))[0].numpy()


def build_graph(
    data: Path,
    *,
    dim: int = 128,
    epochs: int = 16,
    fanout: tuple[int, int] = (5, 5),
    seed: int = 0,
    device: str | None = None,
) -> Encoder | None:
    """Write metagraph.npz, content/graph.npy, what encodes titles that come later, and the record in the manifest.

    Works with any of text, artwork and metadata missing: without metadata the vector is the features' half alone,
    without features the GraphSAGE half.

    Args:
        data: prepared dataset, with content/text.npy and content/image.npy as far as there are any.
        dim: width of each of the two halves.
        epochs: at most; training stops when the AUC of held-out links no longer rises.
        fanout: neighbours drawn by relation, of the inner and the outer hop.
        seed: of everything random.
        device: as torch names it; None takes the GPU where there is one.

    Returns:
        The record, or None where the titles have neither content nor shared metadata (no array then). Its metrics:
        `held_out_auc`, `auc_<kind>`, `links`, and of 10 nearest neighbours how alike their values of the coarsest
        metadata kind are (mean Jaccard index): `overlap_features` before and `overlap_graph` after.
    """
    data = Path(data)
    dataset = PreparedDataset(data)
    warm = ~dataset.titles["cold"].to_numpy(dtype=bool)
    feature_map, features = FeatureMap.of(dataset, warm, dim)
    graph = build_metagraph(dataset)
    save_metagraph(graph, data / "metagraph.npz")
    halves, metrics, notes = [], {"links": float(graph.n_links)}, []
    kept = feature_map.tensors()
    if features.shape[1]:
        halves.append(features)
    if graph.relations:
        predictor = LinkPredictor(graph, features, width=dim, fanout=fanout, seed=seed, device=pick_device(device))
        found = predictor.train(epochs)
        metrics |= {f"auc_{graph.relations[r].kind}": auc for r, auc in found.items()}
        if found:
            metrics["held_out_auc"] = predictor.mean_auc(found)
            print(f"graph: AUC of held-out links {metrics['held_out_auc']:.3f}", file=sys.stderr, flush=True)
        halves.append(predictor.title_vectors(graph))
        kept |= {f"sage.{name}": tensor.cpu().numpy() for name, tensor in predictor.model.state_dict().items()}
    else:
        notes.append("no metadata value is shared by two titles; the vectors are the content features alone.")
    if not halves:
        notes = ["the titles have neither text, artwork nor shared metadata; there are no content vectors."]
        print(f"graph: {notes[0]}", file=sys.stderr)
        remove_content(data, "graph", notes)
        return None
    vectors = unit_rows(np.concatenate(halves, axis=1))
    if graph.relations:
        coarsest = min(graph.relations, key=lambda relation: relation.n_trained)
        metrics["overlap_graph"] = neighbour_overlap(vectors, coarsest)
        if features.shape[1]:
            metrics["overlap_features"] = neighbour_overlap(halves[0], coarsest)
    record = Encoder(
        model="GraphSAGE" if graph.relations else "principal components",
        weights="trained",
        dim=vectors.shape[1],
        sha256=hash_bytes(vectors.tobytes()),
        coverage=float((vectors != 0).any(axis=1).mean()),
        metrics=metrics,
    )
    made_of = {str(kind): dataset.manifest.encoders[kind].sha256 for kind in feature_map.parts}
    save_content(data, "graph", vectors, record, notes, kept=kept, made_of=made_of)
    return record
