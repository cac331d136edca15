"""Uniform neighbour sampling on CSR arrays, without a loop over nodes.

PyG's NeighborLoader needs pyg-lib, which is not on PyPI.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Adjacency:
    """Neighbours of each destination node: those of node i are `sources[offsets[i]:offsets[i + 1]]`.

    Args:
        offsets: int64 [n + 1].
        sources: int64 [edges].
    """

    offsets: torch.Tensor
    sources: torch.Tensor

    @staticmethod
    def from_edges(destinations: torch.Tensor, sources: torch.Tensor, n_destinations: int) -> Adjacency:
        """From parallel int64 [edges] arrays; a node's neighbours keep the order of the edges."""
        order = torch.argsort(destinations, stable=True)
        counts = torch.bincount(destinations, minlength=n_destinations)
        return Adjacency(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), sources[order])

    def neighbours(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All neighbours of int64 [m] nodes, as `sample_neighbours` returns them."""
        first, degrees = self.offsets[nodes], self.offsets[nodes + 1] - self.offsets[nodes]
        positions = torch.repeat_interleave(torch.arange(len(nodes)), degrees)
        within = torch.arange(len(positions)) - (degrees.cumsum(0) - degrees)[positions]
        return positions, self.sources[first[positions] + within]


def sample_neighbours(
    adjacency: Adjacency, nodes: torch.Tensor, fanout: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw up to `fanout` edges of each node, uniformly and without replacement.

    Nodes with more edges than that get Floyd's sample (Bentley and Floyd, "A sample of brilliance", CACM 30(9), 1987):
    the j-th draw is uniform on 0 .. degree - fanout + j, and one that is taken already becomes degree - fanout + j. It
    needs `fanout` steps over all nodes at once, whatever their degrees.

    Args:
        adjacency: the graph.
        nodes: int64 [m]; a node may occur again and is then sampled again.
        fanout: most edges a node keeps.
        generator: makes the draws reproducible.

    Returns:
        positions: int64 [s], rising; which of `nodes` each edge belongs to.
        neighbours: int64 [s], the edges' source nodes.
    """
    first, degrees = adjacency.offsets[nodes], adjacency.offsets[nodes + 1] - adjacency.offsets[nodes]
    columns = torch.arange(fanout)
    chosen = columns.repeat(len(nodes), 1)
    crowded = torch.nonzero(degrees > fanout).squeeze(1)
    if len(crowded):
        picks = torch.full((len(crowded), fanout), -1)
        for column in range(fanout):
            last = degrees[crowded] - fanout + column
            draw = (torch.rand(len(crowded), generator=generator, dtype=torch.float64) * (last + 1)).long()
            taken = (picks == draw.unsqueeze(1)).any(1)
            picks[:, column] = torch.where(taken, last, draw)
        chosen[crowded] = picks
    kept = columns < degrees.unsqueeze(1)
    edges = (first.unsqueeze(1) + chosen)[kept]
    return torch.nonzero(kept)[:, 0], adjacency.sources[edges]
