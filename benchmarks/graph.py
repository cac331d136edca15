"""The content graph: nodes/s of building it, of a pass of link prediction and of inference, by number of titles.

Each size is a process of its own, for its peak memory. Titles have the synthetic world's genres, actors, studios and
countries, and random text vectors that are alike within a theme.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.catalogue import write_titles
from benchmarks.harness import GB, Report, Spread, apart, in_turns, run
from benchmarks.options import positive
from data_prep import graphsage
from data_prep.content_arrays import pick_device
from data_prep.content_features import FeatureMap
from data_prep.graphsage import LinkPredictor
from data_prep.graphsage_model import Hop, Nodes
from data_prep.metagraph import build_metagraph
from m5.config import ConfigError
from m5.schema import PreparedDataset

WIDTH, FANOUT = 128, (5, 5)  # as `build_graph` has them
TEXT_WIDTH = 384  # of the text encoder's vectors
LEAST_TITLES, SMOKE_TITLES = 200, 500


class Measured(NamedTuple):
    """A graph of one size.

    Attributes:
        titles, values, links: of the graph.
        steps: optimizer steps of one pass.
        drawn: nodes that the steps of one pass start from, neighbours of neighbours included, added up.
        seconds: of every repeat, by what was done.
    """

    titles: int
    values: int
    links: int
    steps: int
    drawn: int
    seconds: dict[str, list[float]]

    @property
    def nodes(self) -> int:
        return self.titles + self.values


@contextmanager
def counted() -> Iterator[list[Nodes]]:
    """Yields a list that grows by the sources of every hop that is drawn, outer and inner in turns."""
    sources: list[Nodes] = []
    draw = graphsage.sample_hop

    def counting(*arguments: Any) -> Hop:
        hop = draw(*arguments)
        sources.append(hop.sources)
        return hop

    with mock.patch.object(graphsage, "sample_hop", counting):
        yield sources


def measured(data: Path, device: str, repeats: int, threads: int) -> Measured:
    """All the stages of `build_graph`, one by one; in a process of its own."""
    torch.set_num_threads(threads)
    dataset = PreparedDataset(data)
    warm = ~dataset.titles["cold"].to_numpy(dtype=bool)

    def make_features() -> Any:
        return FeatureMap.of(dataset, warm, WIDTH)[1]

    features, graph = make_features(), build_metagraph(dataset)
    predictor = LinkPredictor(graph, features, width=WIDTH, fanout=FANOUT, seed=0, device=pick_device(device))
    with counted() as sources:
        predictor.epoch()  # and with the next line, all is warm
    predictor.title_vectors(graph)
    inner = sources[1::2]  # every step draws the outer hop, then the inner one
    works = {
        "features": make_features,
        "metagraph": lambda: build_metagraph(dataset),
        "training": predictor.epoch,
        "inference": lambda: predictor.title_vectors(graph),
    }
    return Measured(
        titles=graph.n_titles,
        values=sum(len(relation.values) for relation in graph.relations),
        links=graph.n_links,
        steps=len(inner),
        drawn=sum(len(nodes.titles) + sum(map(len, nodes.values)) for nodes in inner),
        seconds=in_turns(works, repeats=repeats, warm_up=0),
    )


def row(one: Measured, peak: int) -> dict[str, Any]:
    seconds = one.seconds
    return {
        "titles": one.titles,
        "nodes": one.nodes,
        "links": one.links,
        "features, titles/s": Spread.rate(one.titles, seconds["features"]),
        "metagraph, nodes/s": Spread.rate(one.nodes, seconds["metagraph"]),
        "training, nodes/s": Spread.rate(one.drawn, seconds["training"]),
        "training, steps/s": Spread.rate(one.steps, seconds["training"]),
        "a pass, s": Spread.of(seconds["training"]),
        "inference, nodes/s": Spread.rate(one.nodes, seconds["inference"]),
        "peak GB": peak / GB,
    }


def measure(options: argparse.Namespace) -> Report:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU here.")
    if min(options.titles) < LEAST_TITLES:
        raise ConfigError(f"--titles {min(options.titles)}: at least {LEAST_TITLES}, so that titles share metadata.")
    sizes, repeats = ([SMOKE_TITLES], 1) if options.smoke else (sorted(options.titles), options.repeats)
    found: list[Measured] = []
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            data = write_titles(Path(name) / str(size), size, text_width=TEXT_WIDTH)
            one, peak = apart(measured, data, device, repeats, options.threads)
            found.append(one)
            rows.append(row(one, peak))
            print(f"{size:,} titles are done", file=sys.stderr, flush=True)
    return Report(
        title=f"The content graph on {device}: nodes per second",
        rows=rows,
        notes=[
            "Nodes are titles and the values of their metadata that titles share. `features` are the principal "
            "components of the text vectors. `training` is one pass of link prediction as `m5 graph` makes at most 16 "
            "of: it predicts three tenths of the links, at most 100,000; its nodes are the ones that a step starts "
            "from, neighbours of neighbours included, added up over the steps. `inference` is every node with all its "
            "neighbours. Peak memory is that of the whole process, libraries included.",
        ],
        plot=lambda axes: draw(axes, found),
        details={"seconds": [one._asdict() for one in found]},
    )


def draw(axes: Any, found: list[Measured]) -> None:
    """Nodes/s of three stages against titles."""
    for name, work in (("metagraph", "nodes"), ("training", "drawn"), ("inference", "nodes")):
        rates = [Spread.rate(getattr(one, work), one.seconds[name]).median for one in found]
        axes.plot([one.titles for one in found], rates, "o-", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("titles")
    axes.set_ylabel("nodes/s")
    axes.legend()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--titles", type=positive, nargs="+", default=[2_000, 20_000, 70_000], help="sizes of the catalogue"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the network (default: a GPU where there is one)")


def main(argv: list[str] | None = None) -> int:
    return run(__spec__.name if __spec__ else __name__, __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
