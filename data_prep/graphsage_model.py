"""GraphSAGE over the metagraph: Hamilton, Ying and Leskovec, "Inductive Representation Learning on Large Graphs", 2017.

    h_title' = act(W h_title + 1/R sum_r SAGE_r(mean of the values that the title hears by relation r))
    h_value' = act(W_r h_value + SAGE_r'(mean of the titles that the value hears))

two layers deep. A title starts from its projected content features, so that one without a single training event gets a
vector all the same; a value starts from the mean of its titles' features plus a learned embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from data_prep.neighbour_sampler import Adjacency, sample_neighbours

ROWS_PER_CHUNK = 8192  # destination nodes of a layer-wise pass: bounds the messages held in memory
Edges = tuple[torch.Tensor, torch.Tensor]  # positions of sources and of destinations, int64 [e] each


@dataclass(frozen=True)
class MessageGraph:
    """What is heard by whom, and the fixed node features.

    Args:
        to_title: for each relation, the values of each title.
        to_value: for each relation, the titles of each value.
        title_features: float32 [N, F]; F may be 0.
        value_features: for each relation, float32 [V_r, F], the mean over the titles in `to_value`.
    """

    to_title: list[Adjacency]
    to_value: list[Adjacency]
    title_features: torch.Tensor
    value_features: list[torch.Tensor]


@dataclass(frozen=True)
class Heard:
    """Values of one relation that titles hear which have come later.

    Args:
        values: int64 [V], their numbers; any number from the trained ones on stands for one without learned embedding.
        features: float32 [V, F], the mean over the warm titles of each.
        edges: positions in `values` and of titles, the latter rising.
    """

    values: torch.Tensor
    features: torch.Tensor
    edges: Edges


@dataclass(frozen=True)
class Nodes:
    """Distinct nodes, rising: titles int64 [n], and for each relation values int64 [n_r]."""

    titles: torch.Tensor
    values: list[torch.Tensor]


@dataclass(frozen=True)
class Hop:
    """Edges that lead from `sources` to `destinations`, as positions in either."""

    sources: Nodes
    destinations: Nodes
    to_title: list[Edges]
    to_value: list[Edges]


def sample_hop(graph: MessageGraph, destinations: Nodes, fanout: int, generator: torch.Generator) -> Hop:
    """Draw up to `fanout` neighbours of every destination by every relation; the sources include the destinations."""
    heard_by_title = [sample_neighbours(a, destinations.titles, fanout, generator) for a in graph.to_title]
    heard_by_value = [
        sample_neighbours(adjacency, values, fanout, generator)
        for adjacency, values in zip(graph.to_value, destinations.values, strict=True)
    ]
    titles = torch.unique(torch.cat([destinations.titles, *(heard for _, heard in heard_by_value)]))
    values = [
        torch.unique(torch.cat([own, heard]))
        for own, (_, heard) in zip(destinations.values, heard_by_title, strict=True)
    ]
    return Hop(
        sources=Nodes(titles, values),
        destinations=destinations,
        to_title=[(torch.searchsorted(v, heard), at) for v, (at, heard) in zip(values, heard_by_title, strict=True)],
        to_value=[(torch.searchsorted(titles, heard), at) for at, heard in heard_by_value],
    )


def mean_heard(vectors: torch.Tensor, edges: Edges, n_destinations: int) -> torch.Tensor:
    """float [n_destinations, width]: the mean of the vectors (float [n, width]) at the sources of each; 0 without any.

    The edges' destinations must rise, as sampling and `Adjacency.neighbours` give them. No message is ever written out:
    an edge's vector is added where it is heard.
    """
    sources, destinations = edges
    counts = torch.bincount(destinations, minlength=n_destinations)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return functional.embedding_bag(sources, vectors, offsets, mode="mean", include_last_offset=True)


class SageLayer(nn.Module):
    """One round of messages between titles and values.

    Args:
        n_relations: R.
        width: of the node vectors.
    """

    def __init__(self, n_relations: int, width: int):
        super().__init__()

        def linears() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(width, width) for _ in range(n_relations))

        self.to_title, self.to_value = linears(), linears()
        self.title_self = nn.Linear(width, width)
        self.value_self = linears()

    def spoken(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """By relation, float [n_r, width] of values as titles hear them.

        The linear map comes before the mean, which is the same, because there are fewer values than titles; its bias
        waits for the titles, as one that hears nothing has it too.
        """
        linears = cast(Iterable[nn.Linear], self.to_title)
        return [functional.linear(v, linear.weight) for v, linear in zip(values, linears, strict=True)]

    def titles(self, own: torch.Tensor, spoken: Sequence[torch.Tensor], edges: Sequence[Edges]) -> torch.Tensor:
        """float [n, width] of n titles, from their own vectors and what values have `spoken`."""
        linears = cast(Iterable[nn.Linear], self.to_title)
        heard = [
            mean_heard(vectors, edge, len(own)) + linear.bias
            for vectors, edge, linear in zip(spoken, edges, linears, strict=True)
        ]
        return self.title_self(own) + sum(heard[1:], start=heard[0]) / len(heard)

    def values(self, relation: int, own: torch.Tensor, titles: torch.Tensor, edges: Edges) -> torch.Tensor:
        """float [n_r, width] of one relation's values, from their own vectors and those of titles."""
        heard = mean_heard(titles, edges, len(own))
        return self.value_self[relation](own) + self.to_value[relation](heard)


class MetagraphSage(nn.Module):
    """Two SageLayers, and the link score of title t and value v by relation r: s_r <z_t * w_r, z_v> + b_r.

    Args:
        n_features: F, may be 0.
        n_trained: for each relation, how many values have a learned embedding (the first ones).
        width: of the node vectors.
    """

    def __init__(self, *, n_features: int, n_trained: Sequence[int], width: int):
        super().__init__()
        self.project = nn.Linear(n_features, width)
        self.embeddings = nn.ParameterList(nn.Parameter(torch.randn(n, width) * 0.1) for n in n_trained)
        self.first, self.second = SageLayer(len(n_trained), width), SageLayer(len(n_trained), width)
        self.link_weight = nn.Parameter(torch.ones(len(n_trained), width))
        self.link_scale = nn.Parameter(torch.full((len(n_trained),), 5.0))
        self.link_bias = nn.Parameter(torch.zeros(len(n_trained)))

    def title_start(self, features: torch.Tensor) -> torch.Tensor:
        return self.project(features)

    def value_start(self, relation: int, features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """float [n, width] of the values int64 [n], whose features are float32 [n, F]."""
        table = self.embeddings[relation]
        if not len(table):
            return self.project(features)
        trained = (values < len(table)).to(table.dtype).unsqueeze(1)
        return self.project(features) + functional.embedding(values.clamp(max=len(table) - 1), table) * trained

    def forward(self, graph: MessageGraph, inner: Hop, outer: Hop) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Unit vectors of `outer.destinations`: titles float [n, width], and values float [n_r, width] by relation.

        Args:
            graph: features are taken from it.
            inner: the hop whose destinations are the sources of `outer`.
            outer: the hop that ends in the wanted nodes.
        """
        device = self.link_bias.device
        titles = self.title_start(graph.title_features[inner.sources.titles].to(device))
        values = [
            self.value_start(r, graph.value_features[r][nodes].to(device), nodes.to(device))
            for r, nodes in enumerate(inner.sources.values)
        ]
        titles, values = self._round(self.first, inner, titles, values)
        titles, values = self._round(self.second, outer, functional.relu(titles), [functional.relu(v) for v in values])
        return functional.normalize(titles, dim=1), [functional.normalize(v, dim=1) for v in values]

    @staticmethod
    def _round(
        layer: SageLayer, hop: Hop, titles: torch.Tensor, values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        def on(edges: Edges) -> Edges:
            return edges[0].to(titles.device), edges[1].to(titles.device)

        own_titles = titles[torch.searchsorted(hop.sources.titles, hop.destinations.titles).to(titles.device)]
        own_values = [
            v[torch.searchsorted(source, destination).to(titles.device)]
            for v, source, destination in zip(values, hop.sources.values, hop.destinations.values, strict=True)
        ]
        new_values = [layer.values(r, own, titles, on(hop.to_value[r])) for r, own in enumerate(own_values)]
        return layer.titles(own_titles, layer.spoken(values), [on(e) for e in hop.to_title]), new_values

    def link_logits(self, relation: int, titles: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """float [...] from unit vectors float [..., width]."""
        product = (titles * self.link_weight[relation] * values).sum(-1)
        return self.link_scale[relation] * product + self.link_bias[relation]

    @torch.no_grad()
    def all_nodes(self, graph: MessageGraph) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`forward` of every node with all its neighbours, a layer at a time and without sampling; on the CPU."""
        device = self.link_bias.device
        titles = self.title_start(graph.title_features.to(device))
        values = [
            self.value_start(r, features.to(device), torch.arange(len(features), device=device))
            for r, features in enumerate(graph.value_features)
        ]
        titles, values = self._full_round(self.first, graph, titles, values)
        titles, values = self._full_round(
            self.second, graph, functional.relu(titles), [functional.relu(v) for v in values]
        )
        return functional.normalize(titles, dim=1).cpu(), [functional.normalize(v, dim=1).cpu() for v in values]

    @torch.no_grad()
    def new_titles(self, features: torch.Tensor, heard: Sequence[Heard]) -> torch.Tensor:
        """Unit vectors float32 [n, width] of titles that no value hears: what `all_nodes` gives them, but for rounding.

        A value's two vectors follow from the mean of its titles' features, as their projection is linear: nothing else
        of the graph is looked at.

        Args:
            features: float32 [n, F].
            heard: by relation.
        """
        starts = [self.value_start(r, one.features, one.values) for r, one in enumerate(heard)]
        later = []
        for r, one in enumerate(heard):
            itself = torch.arange(len(one.values))
            titles = self.title_start(one.features)
            later.append(functional.relu(self.first.values(r, starts[r], titles, (itself, itself))))
        edges = [one.edges for one in heard]
        own = functional.relu(self.first.titles(self.title_start(features), self.first.spoken(starts), edges))
        return functional.normalize(self.second.titles(own, self.second.spoken(later), edges), dim=1)

    @staticmethod
    def _full_round(
        layer: SageLayer, graph: MessageGraph, titles: torch.Tensor, values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        def edges(adjacency: Adjacency, chunk: torch.Tensor) -> Edges:
            at, heard = adjacency.neighbours(chunk)
            return heard.to(titles.device), at.to(titles.device)

        def chunks(n: int) -> Sequence[torch.Tensor]:
            return torch.arange(n).split(ROWS_PER_CHUNK)

        spoken = layer.spoken(values)
        new_titles = [
            layer.titles(titles[c[0] : c[-1] + 1], spoken, [edges(a, c) for a in graph.to_title])
            for c in chunks(len(titles))
        ]
        new_values = [
            torch.cat(
                [layer.values(r, v[c[0] : c[-1] + 1], titles, edges(graph.to_value[r], c)) for c in chunks(len(v))]
            )
            for r, v in enumerate(values)
        ]
        return torch.cat(new_titles), new_values
