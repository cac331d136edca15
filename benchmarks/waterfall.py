"""The index, stage by stage: float32 -> int8 -> HNSW -> IVF-PQ, each without and with rights; recall and latency.

Queries come one at a time, as requests do; the same in batches of 64 for the throughput. Recall is against the exact
index under the same rights. With --run, keys and queries are a trained run's, and rights its dataset's, by plan;
without, keys, queries and rights are made, in the shape of a run's (see `made`).

    m5 bench waterfall --run RUN
    m5 bench waterfall --titles 70000
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import Promise, Report, Spread, run
from benchmarks.options import positive
from m5.eligibility import NEVER, Eligibility
from m5.predict import Predictor
from m5.schema import TEST
from m5.serving.index import Index, IndexKind, build_index
from m5.serving.rights import RightsMasks
from m5.serving.top import eligible_counts

NAMES: dict[str, IndexKind] = {"exact, float32": "exact", "int8": "int8", "HNSW": "hnsw", "IVF-PQ": "ivfpq"}
K = 200  # the paper's candidates are some hundred
BATCH = 64
THEMES = 60  # of made keys
POOREST = 200  # titles of the poorest plan that is made: exactly as many as are asked for
RECALL, P99_MS = 0.98, 10.0
WATCHED, LIKED = 100, 1_000  # titles of a history that are left out; made ones are among so many of a viewer's best
HISTORY = f"none, {WATCHED} watched titles left out"
TINY = {"titles": 3_000, "queries": 20}
DAY = 86_400


class Asked(NamedTuple):
    """What is searched for, in what.

    Attributes:
        key_NQ, query_BQ: float32.
        rights: uint8 [B, Y] by name, None: no rights.
        watched: int64 titles of each query's viewer, left out under the rights that are called `HISTORY`.
        masks, scenario_BM, time_B: for the rights by themselves.
        text: where all of it comes from.
    """

    key_NQ: np.ndarray
    query_BQ: np.ndarray
    rights: dict[str, np.ndarray | None]
    watched: list[np.ndarray]
    masks: RightsMasks
    scenario_BM: np.ndarray
    time_B: np.ndarray
    text: str


# ---- what is asked -------------------------------------------------------------------------------------------


def of_run(folder: Path, queries: int) -> Asked:
    """Keys of a trained run, and queries of requests of its test period, each also as if asked on every plan."""
    predictor = Predictor.load(folder, "cpu")
    dataset = predictor.dataset
    events = np.flatnonzero(dataset.event_array("split") == TEST)
    events = np.sort(np.random.default_rng(0).choice(events, min(queries, len(events)), replace=False))
    batches = [(predictor.forward(batch).query_PQ, batch) for batch in predictor.batches(events)]
    query_BQ = np.concatenate([query_PQ.numpy() for query_PQ, _ in batches])
    scenario_BM = np.concatenate([batch.rights_PM.numpy() for _, batch in batches])
    time_B = np.concatenate([batch.timestamp_P.numpy() for _, batch in batches])
    key_NQ = predictor.key_NQ.numpy()
    masks = RightsMasks.compiled(Eligibility.from_dataset(dataset), len(key_NQ))
    rights: dict[str, np.ndarray | None] = {"none": None, HISTORY: None}
    if masks.header.columns:
        plan = dataset.manifest.scenarios[masks.header.columns[-1]]
        for index, value in enumerate(plan.values, start=1):
            on_plan_BM = scenario_BM.copy()
            on_plan_BM[:, masks.header.columns[-1]] = index
            rights[f"{plan.name}={value}"] = np.stack(list(map(masks.bits, on_plan_BM, time_B.tolist())))
    rights |= made_rights(key_NQ, query_BQ)
    row_W, title_W = dataset.watched_before(events)
    watched = [np.unique(title_W[row_W == row][-WATCHED:]) for row in range(len(events))]
    manifest = dataset.manifest
    text = (
        f"Keys of {len(key_NQ):,} titles and queries of {len(query_BQ):,} requests of the test period, from a trained "
        f"run ({predictor.config.preset} preset, width {predictor.config.model.width}) on '{manifest.name}' "
        f"({manifest.n_users:,} users, {manifest.n_events:,} events)."
    )
    return Asked(key_NQ, query_BQ, rights, watched, masks, scenario_BM, time_B, text)


def made(titles: int, queries: int, width: int = 64) -> Asked:
    """Keys, queries and rights of no run.

    Both halves of a key are themes with titles around them, in few directions: what training leaves. Figures are fitted
    to a demo-preset run on the synthetic service: the content half has norm sqrt(width), the ID half is shorter and its
    norm varies, with popularity; a query is a mixture of some themes.
    """
    generator = np.random.default_rng(0)
    theme_N = generator.choice(THEMES, titles, p=(popularity := 1 / np.arange(3, THEMES + 3)) / popularity.sum())
    halves = []
    for decay, within, norm_N in (
        (4.0, 1.0, generator.lognormal(np.log(1.9), 0.35, titles)),
        (8.0, 0.6, np.full(titles, np.sqrt(width))),
    ):
        spread_Q = np.exp(-np.arange(width) / (2 * decay)) + 0.02
        rotation = np.linalg.qr(generator.normal(size=(width, width)))[0]
        theme_GQ = generator.normal(size=(THEMES, width)) * spread_Q
        half_NQ = (theme_GQ[theme_N] + within * generator.normal(size=(titles, width)) * spread_Q) @ rotation
        halves.append(half_NQ * (norm_N / np.linalg.norm(half_NQ, axis=1))[:, None])
    liked_BI = generator.choice(titles, (queries, 4))
    taste_BI = generator.dirichlet(np.ones(4), queries)
    key_NQ = np.concatenate(halves, axis=1)
    query_BQ = np.einsum("bi,biq->bq", taste_BI, key_NQ[liked_BI])
    query_BQ[:, width:] /= 8
    query_BQ += 0.1 * generator.normal(size=query_BQ.shape) * query_BQ.std(axis=0)
    key_NQ, query_BQ = key_NQ.astype(np.float32), query_BQ.astype(np.float32)
    masks, scenario_BM, time_B = made_masks(generator, titles, queries)
    rights: dict[str, np.ndarray | None] = {"none": None, HISTORY: None, **made_rights(key_NQ, query_BQ)}
    watched = [
        generator.choice(np.argpartition(-key_NQ @ query_Q, min(LIKED, titles - 1))[:LIKED], WATCHED, replace=False)
        for query_Q in query_BQ
    ]
    text = (
        f"Made, not trained: {titles:,} keys of width {2 * width} and {queries:,} queries, {THEMES} themes, fitted to "
        "the norms and spectra of a run on the synthetic service. Recall on keys of your own may differ: --run."
    )
    return Asked(key_NQ, query_BQ, rights, watched, masks, scenario_BM, time_B, text)


def made_masks(generator: np.random.Generator, titles: int, queries: int) -> tuple[RightsMasks, np.ndarray, np.ndarray]:
    """Rights of 10 regions and 3 plans, a window a title within two years, and viewers who ask within one day."""
    sizes = [11, 4]
    start_WSN = generator.integers(-365 * DAY, 180 * DAY, (1, 44, titles)).astype(np.int32)
    end_WSN = start_WSN + generator.integers(90 * DAY, 365 * DAY, start_WSN.shape, dtype=np.int32)
    absent = generator.random(start_WSN.shape) < 0.3
    start_WSN[absent] = end_WSN[absent] = NEVER
    eligibility = Eligibility(torch.from_numpy(start_WSN), torch.from_numpy(end_WSN), 0, [0, 1], sizes)
    scenario_BM = np.stack([generator.integers(size, size=queries) for size in sizes], axis=1)
    return RightsMasks.compiled(eligibility, titles), scenario_BM, np.sort(generator.integers(0, DAY, queries))


def made_rights(key_NQ: np.ndarray, query_BQ: np.ndarray) -> dict[str, np.ndarray | None]:
    """Plans by name, uint8 [B, Y]: chance, what these viewers like least (the worst case for a graph), the poorest."""
    titles, generator = len(key_NQ), np.random.default_rng(1)
    unpopular = np.argsort(key_NQ @ query_BQ.mean(axis=0))
    shuffled = generator.permutation(titles)
    plans = {
        "half": shuffled[: titles // 2],
        "half, the least liked": unpopular[: titles // 2],
        "a tenth": shuffled[: titles // 10],
        f"{POOREST} titles": shuffled[:POOREST],
    }
    rights: dict[str, np.ndarray | None] = {}
    for name, title in plans.items():
        allowed_N = np.zeros(titles, dtype=bool)
        allowed_N[title] = True
        rights[name] = np.tile(np.packbits(allowed_N, bitorder="little"), (len(query_BQ), 1))
    return rights


# ---- measuring -----------------------------------------------------------------------------------------------


def stages(key_NQ: np.ndarray) -> Iterator[tuple[str, Index, float]]:
    """(name, index, seconds to build it); int8 and IVF-PQ also without the second look at their best."""
    for name, kind in NAMES.items():
        began = time.perf_counter()
        index: Any = build_index(key_NQ, kind)
        taken = time.perf_counter() - began
        if getattr(index, "reranked", 1) > 1:
            once = copy.copy(index)
            once.reranked = 1
            yield f"{name}, not scored again", once, taken
        yield name, index, taken


class Stage:
    """One index under one kind of rights, measured in turns with the others.

    Args:
        index: searched.
        asked: with the queries.
        rights: a name of `asked.rights`.
    """

    def __init__(self, index: Index, asked: Asked, rights: str):
        self.index, self.query_BQ, self.bits_BY = index, asked.query_BQ, asked.rights[rights]
        self.watched = asked.watched if rights == HISTORY else None
        self.title_BR = np.zeros((0, K), dtype=np.int64)
        self.seconds: list[float] = []
        self.batched: list[float] = []

    def turn(self) -> None:
        """Every query once by itself, and once in a batch."""
        found = []
        for rows in _slices(len(self.query_BQ), 1):
            began = time.perf_counter()
            one = self._search(rows)
            self.seconds.append(time.perf_counter() - began)
            found.append(one)
        began = time.perf_counter()
        for rows in _slices(len(self.query_BQ), BATCH):
            self._search(rows)
        self.batched.append(time.perf_counter() - began)
        self.title_BR = np.concatenate(found)

    def _search(self, rows: slice) -> np.ndarray:
        bits_BY = None if self.bits_BY is None else self.bits_BY[rows]
        watched = None if self.watched is None else self.watched[rows]
        return self.index.search(self.query_BQ[rows], K, bits_BY, watched).title_BR

    def leaks(self) -> int:
        """Titles found that the rights do not allow, or that were watched."""
        if self.watched is not None:
            return sum(len(np.intersect1d(*pair)) for pair in zip(self.title_BR, self.watched, strict=True))
        if self.bits_BY is None:
            return 0
        row, place = np.nonzero(self.title_BR >= 0)
        title = self.title_BR[row, place]
        return int((self.bits_BY[row, title >> 3] >> (title & 7) & 1 == 0).sum())


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def recall(found_BR: np.ndarray, exact_BR: np.ndarray) -> float:
    """Share of the exact results that were found."""
    common = sum(
        len(np.intersect1d(found[found >= 0], exact[exact >= 0]))
        for found, exact in zip(found_BR, exact_BR, strict=True)
    )
    return common / max(1, int((exact_BR >= 0).sum()))


def measure(options: argparse.Namespace) -> Report:
    if options.smoke:
        for name, value in TINY.items():
            setattr(options, name, value)
    asked = of_run(options.run, options.queries) if options.run else made(options.titles, options.queries)
    built = list(stages(asked.key_NQ))
    measured = {(name, rights): Stage(index, asked, rights) for rights in asked.rights for name, index, _ in built}
    rights_seconds: list[float] = []
    for _ in range(options.repeats):
        for stage in measured.values():
            stage.turn()
        rights_seconds += rights_turn(asked)
    rows = [rights_row(asked, rights_seconds)]
    seconds_to_build = {name: taken for name, _, taken in built}
    for (name, rights), stage in measured.items():
        rows.append(row(name, rights, stage, measured["exact, float32", rights], seconds_to_build[name]))
    titles = len(asked.key_NQ)
    return Report(
        title=f"The waterfall: {K} of {titles:,} titles, from exact to approximate, with and without rights",
        rows=rows,
        notes=notes(asked, options),
        promises=promises(rows, measured, titles),
        plot=lambda axes: draw(axes, [row for row in rows if row["rights"] == "none"]),
        spread_over=f"{options.repeats} turns through all {len(asked.query_BQ):,} queries",
    )


def rights_turn(asked: Asked) -> list[float]:
    """Seconds of every request's mask; times ascend, as a service's do."""
    taken = []
    for scenario_M, timestamp in zip(asked.scenario_BM, asked.time_B.tolist(), strict=True):
        began = time.perf_counter()
        asked.masks.bits(scenario_M, timestamp)
        taken.append(time.perf_counter() - began)
    return taken


def rights_row(asked: Asked, seconds: list[float]) -> dict[str, Any]:
    masks = asked.masks
    some = np.stack([masks.bits(*viewer) for viewer in zip(asked.scenario_BM, asked.time_B.tolist(), strict=True)])
    return {
        "stage": "the mask of a viewer's rights",
        "rights": f"{masks.header.combinations} combinations",
        "eligible": f"{eligible_counts(some).mean() / max(1, masks.header.titles):.0%}",
        f"recall@{K}": "",
        "fewest": "",
        "P50 ms": 1000 * float(np.quantile(seconds, 0.5)),
        "P99 ms": 1000 * float(np.quantile(seconds, 0.99)),
        f"queries/s, batches of {BATCH}": "",
        "MB": sum(array.nbytes for array in masks.arrays().values()) / 1e6,
        "built in s": "",
    }


def row(name: str, rights: str, stage: Stage, exact: Stage, build_seconds: float) -> dict[str, Any]:
    titles, queries = stage.index.titles, len(stage.query_BQ)
    share = 1.0 if stage.bits_BY is None else eligible_counts(stage.bits_BY).mean() / titles
    return {
        "stage": name,
        "rights": rights,
        "eligible": f"{share:.2g}" if share < 0.01 else f"{share:.0%}",
        f"recall@{K}": f"{recall(stage.title_BR, exact.title_BR):.4f}",
        "fewest": int((stage.title_BR >= 0).sum(axis=1).min()),
        "P50 ms": 1000 * float(np.quantile(stage.seconds, 0.5)),
        "P99 ms": 1000 * float(np.quantile(stage.seconds, 0.99)),
        f"queries/s, batches of {BATCH}": Spread.rate(queries, stage.batched),
        "MB": sum(array.nbytes for array in stage.index.state().values()) / 1e6,
        "built in s": build_seconds,
    }


def promises(rows: list[dict[str, Any]], measured: dict[tuple[str, str], Stage], titles: int) -> list[Promise]:
    graph = [row for row in rows if row["stage"] == "HNSW"]
    plain = next(row for row in graph if row["rights"] == "none")
    poorest = [row["fewest"] for row in rows if row["rights"] == f"{POOREST} titles"]
    at = f"HNSW at {titles:,} titles"
    lowest = min(float(row[f"recall@{K}"]) for row in graph)
    slowest = max(row["P99 ms"] for row in graph)
    return [
        Promise(f"recall@{K} of {at}", float(plain[f"recall@{K}"]), RECALL, at_least=True),
        Promise(f"recall@{K} of {at}, under any rights", lowest, RECALL, at_least=True),
        Promise(f"P99 ms of {at}, without rights", plain["P99 ms"], P99_MS),
        Promise(f"P99 ms of {at}, under any rights", slowest, P99_MS),
        Promise(f"titles found on a plan that has {POOREST}, by any index", min(poorest), POOREST, at_least=True),
        Promise("titles found that may not be, by any index", sum(s.leaks() for s in measured.values()), 0),
    ]


def notes(asked: Asked, options: argparse.Namespace) -> list[str]:
    return [
        asked.text,
        f"One query at a time on {options.threads} thread(s), from the query vector to {K} ordered titles; the user "
        "tower is not in it. 'fewest': titles that the worst-served query got. 'MB': what the index keeps beside "
        f"float32 keys ({asked.key_NQ.nbytes / 1e6:.0f} MB). Where rights leave so little that a search would cost "
        "more, HNSW and IVF-PQ scan: the eligible titles in float32 up to 5%, else all in int8.",
        f"Plans: a half, a tenth and {POOREST} titles by chance, and the half that these viewers like least on "
        "average, which is the worst case for a graph: what lies near the query is not eligible.",
        f"'{HISTORY}' is what a service does where there are no rights: the last titles of a run's viewer, or made "
        f"ones, by chance of the {LIKED:,} that the viewer likes best. HNSW and IVF-PQ search for as many more.",
    ]


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        axes.errorbar(
            row["P50 ms"],
            float(row[f"recall@{K}"]),
            xerr=[[0], [row["P99 ms"] - row["P50 ms"]]],
            marker="o",
            capsize=3,
            label=row["stage"],
        )
    axes.axhline(RECALL, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("ms a query: P50, with a line to P99")
    axes.set_ylabel(f"recall@{K}")
    axes.legend(fontsize=8)


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, help="a trained run, whose keys, queries and rights are taken")
    source.add_argument("--titles", type=positive, default=70_000, help="keys that are made (default 70000)")
    parser.add_argument("--queries", type=positive, default=1_000)
    parser.set_defaults(threads=1)  # a service answers requests side by side


def main(argv: list[str] | None = None) -> int:
    return run("benchmarks.waterfall", __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
