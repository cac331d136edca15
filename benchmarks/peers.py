"""M5 beside RecTools' SASRec and HSTU: targets/s, memory, and NDCG@10 after the same time of training.

    m5 prepare movielens ml-1m.zip --titles titles.parquet --split leave-last-out --out data-ml1m
    python3.11 -m venv .venv-peers
    .venv-peers/bin/python -m pip install -r requirements/peers.txt
    python -m benchmarks.peers --data data-ml1m

Width, blocks, heads, history, sequences a batch and threads are the same, and so are the training events. RecTools
lives in an environment of its own, because it wants older NumPy and pandas. Every system is a process
(`benchmarks.peers_line`). Speed is measured in turns; for quality they train one after another, and one call of
`m5.evaluate` measures them all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import GB, Promise, Report, Spread, run
from benchmarks.options import positive
from benchmarks.peers_line import Ended, Line
from m5.config import ConfigError
from m5.evaluate import Scorer, evaluate
from m5.predict import Predictor
from m5.schema import DataError, PreparedDataset

WIDTH, BLOCKS, HEADS, SEQUENCES, NEGATIVES = 64, 2, 2, 128, 128
SKIP = 2  # batches of every turn before its clock starts
LISTED = 200  # titles of a peer's list: the longest list of `m5.metrics.CUTOFFS`
FASTER = 3.0  # promised: M5's targets/s over SASRec's
MODELS = {
    "m5": "M5",
    "m5-plain": "M5, what SASRec has",
    "sasrec": "RecTools SASRec",
    "hstu": "RecTools HSTU",
}
PEERS = ("sasrec", "hstu")
# Without content, scenarios, categories and subsidiary features, with the softmax in the peer's precision.
PLAIN = (
    "model.content=[]",
    "model.mixing=mlp",
    "model.categories=false",
    "model.subsidiary=false",
    "model.id_dropout=0",
    "candidates.precision=float32",
)
LOSSES = {
    "softmax": (["candidates.kind=full"], {"loss": "softmax"}),
    "sampled": (
        ["candidates.kind=sampled", f"candidates.count={NEGATIVES}"],
        {"loss": "sampled_softmax", "n_negatives": NEGATIVES},
    ),
}
NOTES = [
    "Targets are positions with a next watch to predict; padding is not counted. A turn's clock runs over the same "
    f"number of batches on each side, loading included, after {SKIP} others. An epoch of RecTools' models holds each "
    "viewer's newest watches up to the history's length, one of M5 every training watch: targets/s compare, epochs do "
    "not.",
    f"Sampled: RecTools draws {NEGATIVES} titles uniformly for every position. M5 draws {NEGATIVES} for the whole "
    "batch, by popularity, corrects for it, and so has much less to multiply: that choice is part of what is compared.",
    "The row 'M5, what SASRec has' is without content vectors, scenarios, categories, watch intensity and ID dropout, "
    "and its softmax multiplies in float32; it still reads the dataset's user features. The row 'M5' takes bfloat16 "
    "for the softmax where the processor multiplies it. RecTools computes in float32.",
    "RecTools has its own defaults (Adam at 0.001, dropout 0.2; HSTU a softmax over cosines at temperature 1) and no "
    "loader process: to make a batch costs it 1 to 3 ms of a step of hundreds. HSTU gets the request's time, as M5 "
    "does. Profiled once, on 2 busy CPU cores, a step of SASRec with the full softmax at history 50 was 45% matrix "
    "products (by their operations mostly the logits and their gradients), 11% copies and 6% log-softmax with its "
    "gradient; at history 200 it was 19%, 13% and 19%. With negatives for every position 30% were products and 16% "
    "gathered and scattered the negatives' rows.",
]
QUALITY_NOTE = (
    "Quality: the clock runs over training alone on both sides. Nothing is validated or saved in it, and the weights "
    "at its end are measured. M5's learning rates follow a cosine over that time; RecTools' is constant. The test "
    "reads all that came before, the validation watch included; titles seen before are no candidates. A title that "
    "RecTools has not met in training is never in its lists; for M5 it is a candidate."
)


@dataclass
class Found:
    """Of one model at one history and loss; what was not measured stays empty."""

    model: str
    history: int
    loss: str
    rates: list[float] = field(default_factory=list)  # targets/s of every turn
    epoch_targets: int = 0
    peak: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


class Lists:
    """A peer's lists as a row of `m5.evaluate`: place r of K scores K + 1 - r, a title that is not listed 0.

    Args:
        name: of the row.
        dataset: whose test events are asked for, one a viewer at most.
        user, title, rank: int64, one entry for every listed title; ranks from 1.
    """

    def __init__(self, name: str, dataset: PreparedDataset, user: np.ndarray, title: np.ndarray, rank: np.ndarray):
        order = np.argsort(user, kind="stable")
        self.name, self.dataset = name, dataset
        self.user, self.title = user[order], title[order]
        self.value = (rank.max(initial=0) + 1 - rank[order]).astype(np.float32)

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] test events -> float32 [B, N]."""
        viewer = self.dataset.user_of(event_index)
        score_BN = np.zeros((len(viewer), self.dataset.manifest.n_titles), dtype=np.float32)
        first, end = np.searchsorted(self.user, viewer), np.searchsorted(self.user, viewer, side="right")
        for row, part in enumerate(map(slice, first, end)):
            score_BN[row, self.title[part]] = self.value[part]
        return score_BN


# ---- the systems -------------------------------------------------------------------------------------------------


def overrides(model: str, *, history: int, loss: str, threads: int, device: str) -> list[str]:
    """M5's settings beyond the preset."""
    return [
        f"name={model}",
        f"model.width={WIDTH}",
        f"model.blocks={BLOCKS}",
        f"model.heads={HEADS}",
        f"sequences.history={history}",
        f"sequences.requests={history}",
        f"sequences.sequences={SEQUENCES}",
        f"training.threads={threads}",
        f"training.device={device}",
        "training.stall_seconds=null",
        *LOSSES[loss][0],
        *(PLAIN if model == "m5-plain" else ()),
    ]


def peer_settings(*, history: int, loss: str) -> dict[str, Any]:
    """Of the constructors of RecTools' models."""
    shape = {"n_factors": WIDTH, "n_blocks": BLOCKS, "n_heads": HEADS, "session_max_len": history}
    return shape | {"batch_size": SEQUENCES} | LOSSES[loss][1]


def export_events(dataset: PreparedDataset, path: Path) -> None:
    """All events in the dataset's order, for the peers."""
    names = ("title", "timestamp", "split")
    np.savez(
        path,
        user=np.repeat(np.arange(dataset.manifest.n_users), np.diff(dataset.offsets)),
        **{name: np.asarray(dataset.event_array(name), dtype=np.int64) for name in names},
    )


def start(model: str, *, history: int, loss: str, options: argparse.Namespace, data: Path, folder: Path) -> Line:
    """A system in its process, ready to train."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = partial(Line, log=folder / f"{model}-{history}-{loss}.log", threads=options.threads)
    if model in PEERS:
        settings = peer_settings(history=history, loss=loss)
        said = {"events": str(folder / "events.npz"), "model": model, "device": device, "threads": options.threads}
        return line(options.peer_python, "benchmarks.peers_rectools", start=said | {"settings": settings})
    said = {"data": str(data), "out": str(folder / f"{model}-{history}-{loss}"), "preset": "ml1m"}
    wanted = overrides(model, history=history, loss=loss, threads=options.threads, device=device)
    wanted += ["model.content=[]"] if options.smoke and model == "m5" else []  # the tiny dataset has no vectors
    return line(sys.executable, "benchmarks.peers_m5", start=said | {"overrides": wanted})


# ---- the two parts -----------------------------------------------------------------------------------------------


def measure_speed(found: list[Found], options: argparse.Namespace, data: Path, folder: Path) -> None:
    """Turns of all models at one history and loss; fills `rates`, `epoch_targets` and `peak`."""
    with ExitStack() as stack:
        lines = []
        for row in found:
            begin = partial(start, options=options, data=data, folder=folder)
            lines.append(begin(row.model, history=row.history, loss=row.loss))
            stack.callback(lines[-1].close)
            row.epoch_targets = lines[-1].described["epoch_targets"]
            row.versions = lines[-1].described.get("versions", {})
        for line in lines:
            line.ask("steps", skip=0, batches=1)
        for _ in range(options.repeats):
            for row, line in zip(found, lines, strict=True):
                answer = line.ask("steps", skip=SKIP, batches=options.batches)
                row.rates.append(answer["targets"] / answer["seconds"])
                row.peak = answer["peak"]


def measure_quality(found: list[Found], options: argparse.Namespace, data: Path, folder: Path) -> None:
    """Train all models at one history and loss, one after another, then evaluate them; fills `metrics`."""
    dataset, scorers = PreparedDataset(data), []
    for row in found:
        line = start(row.model, history=row.history, loss=row.loss, options=options, data=data, folder=folder)
        with ExitStack() as stack:
            stack.callback(line.close)
            row.trained = line.ask("train", minutes=options.minutes)
            scorers.append(scorer_of(row, line, dataset, folder))
    measured = evaluate(dataset, scorers)["models"]
    for row in found:
        row.metrics = measured[row.model]["overall"]


def scorer_of(row: Found, line: Line, dataset: PreparedDataset, folder: Path) -> Scorer:
    """What has been trained, as a row of `m5.evaluate`."""
    if row.model not in PEERS:
        return Predictor.load(folder / f"{row.model}-{row.history}-{row.loss}")
    path = folder / f"lists-{row.model}.npz"
    line.ask("recommend", k=LISTED, out=str(path))
    with np.load(path) as lists:
        return Lists(row.model, dataset, lists["user"], lists["title"], lists["rank"])


# ---- the page ----------------------------------------------------------------------------------------------------


def as_row(found: Found) -> dict[str, Any]:
    row: dict[str, Any] = {"model": MODELS[found.model], "history": found.history, "loss": found.loss}
    if found.rates:
        seconds = [found.epoch_targets / rate for rate in found.rates]
        row |= {"targets/s": Spread.of(found.rates), "targets of an epoch": found.epoch_targets}
        row |= {"s/epoch": Spread.of(seconds), "peak RSS, GB": found.peak / GB}
    if found.metrics:
        row |= {"trained, s": found.trained["seconds"], "batches": found.trained["batches"]}
        row |= {"NDCG@10": f"{found.metrics['ndcg@10']:.4f}", "HR@10": f"{found.metrics['hr@10']:.4f}"}
        row |= {"95% of NDCG@10": "{:.4f} - {:.4f}".format(*found.metrics["ci"]["ndcg@10"])}
        row |= {"HR@200": f"{found.metrics['hr@200']:.4f}"}
    return row


def table(found: list[Found]) -> list[dict[str, Any]]:
    """Rows with the same columns; '-' where a model was not measured."""
    rows = [as_row(each) for each in found]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def promises(found: list[Found]) -> list[Promise]:
    """M5 against SASRec at every history and loss that both have; speed as the median of the turns' ratios."""
    made = []
    place = {(row.model, row.history, row.loss): row for row in found}
    for (model, history, loss), peer in place.items():
        ours = place.get(("m5", history, loss))
        if model != "sasrec" or ours is None:
            continue
        where = f"history {history}, {loss}"
        if ours.rates and peer.rates:
            ratio = statistics.median(a / b for a, b in zip(ours.rates, peer.rates, strict=True))
            made.append(Promise(f"M5's targets/s over SASRec's, {where}", ratio, FASTER, at_least=True))
        if ours.metrics and peer.metrics:
            more = ours.metrics["ndcg@10"] - peer.metrics["ndcg@10"]
            made.append(Promise(f"M5's NDCG@10 less SASRec's, {where}", more, 1e-4, at_least=True))
    return made


def draw(axes: Any, found: list[Found]) -> None:
    """Bars of targets/s, or of NDCG@10 where speed was not measured."""
    speed = any(row.rates for row in found)
    groups = list(dict.fromkeys((row.history, row.loss) for row in found))
    models = list(dict.fromkeys(row.model for row in found))
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        mine = [row for row in found if row.model == model]
        height = [statistics.median(row.rates) if speed else row.metrics["ndcg@10"] for row in mine]
        x = [groups.index((row.history, row.loss)) + width * (index - (len(models) - 1) / 2) for row in mine]
        axes.bar(x, height, width, label=MODELS[model])
    axes.set_xticks(range(len(groups)), [f"history {history}\n{loss}" for history, loss in groups])
    axes.set_ylabel("targets/s" if speed else "NDCG@10")
    axes.legend()


# ---- the command -------------------------------------------------------------------------------------------------


def smoke_dataset(folder: Path) -> Path:
    """A tiny synthetic world, prepared."""
    from data_prep.prepare import prepare_dataset
    from data_prep.sources.synthetic import generate
    from data_prep.sources.tables import load

    spec = load(generate(folder / "raw", users=60, titles=200, events=600, posters=False))
    prepare_dataset(spec, folder / "data", split="leave-last-out")
    return folder / "data"


def check(options: argparse.Namespace, data: Path) -> PreparedDataset:
    """The dataset, if it is one that the comparison can be made on.

    Raises:
        ConfigError, DataError: it is not, or the peers are not installed.
    """
    if set(options.models) & set(PEERS) and not options.peer_python.is_file():
        raise ConfigError(
            f"{options.peer_python} does not exist. Install RecTools: python3.11 -m venv .venv-peers, then "
            ".venv-peers/bin/python -m pip install -r requirements/peers.txt"
        )
    dataset = PreparedDataset(data)
    if dataset.manifest.split.kind != "leave-last-out":
        raise DataError(f"{data} was prepared with another split: use `m5 prepare ... --split leave-last-out`.")
    return dataset


def shrink(options: argparse.Namespace) -> None:
    """Sizes for --smoke; the peer takes part only where it is installed."""
    here = ("m5", "sasrec") if options.peer_python.is_file() else ("m5",)
    options.models = [model for model in options.models if model in here] or ["m5"]
    options.history, options.loss = [8], options.loss[:1]
    options.repeats, options.batches, options.minutes = 1, 2, 0.01


def measure(options: argparse.Namespace) -> Report:
    # Not resolved: by its link to the interpreter it is that environment's.
    options.peer_python = options.peer_python.absolute()
    if options.minutes <= 0:
        raise ConfigError("--minutes must be more than 0")
    if options.smoke:
        shrink(options)
    elif options.data is None:
        raise ConfigError(
            "--data is missing. Prepare MovieLens-1M first: "
            "m5 prepare movielens ml-1m.zip --titles titles.parquet --split leave-last-out --out data-ml1m"
        )
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = (smoke_dataset(folder) if options.smoke else options.data).absolute()
        export_events(check(options, data), folder / "events.npz")
        try:
            for history, loss in product(options.history, options.loss):
                rows = [Found(model, history, loss) for model in options.models]
                if options.only != "quality":
                    measure_speed(rows, options, data, folder)
                if options.only != "speed" and loss == options.loss[0]:
                    measure_quality(rows, options, data, folder)
                found += [row for row in rows if row.rates or row.metrics]
        except Ended as error:
            raise DataError(str(error)) from None
    return Report(
        title="M5 beside RecTools",
        rows=table(found),
        notes=[*NOTES, *([QUALITY_NOTE] if options.only != "speed" else [])],
        promises=promises(found),
        plot=partial(draw, found=found),
        spread_over=""
        if options.only == "speed"
        else f"{options.repeats} turns of speed; quality is of one training a row",
        details={"peer_versions": next((row.versions for row in found if row.versions), {})},
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="MovieLens-1M, prepared with --split leave-last-out")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peers/bin/python"), help="has RecTools")
    parser.add_argument("--only", choices=["speed", "quality"], help="one of the two parts")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--history", type=positive, nargs="+", default=[50, 200], help="default: 50 200")
    parser.add_argument(
        "--loss", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="quality trains with the first only"
    )
    parser.add_argument("--batches", type=positive, default=20, help="of a turn (default 20)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for quality (default 20)")


def main(argv: list[str] | None = None) -> int:
    return run(__spec__.name, __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
