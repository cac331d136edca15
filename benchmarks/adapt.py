"""A new region or plan joins a trained model: zero-shot, adapted and fully retrained, leaving out one value at a time.

For every value of a scenario a model is trained on the dataset as it was before that value (`benchmarks.left_out`) and
then asked the value's test requests on the whole dataset: with the value unknown to it (index 0), with `m5 adapt`'s
zero-shot blend, and adapted by `m5 adapt`. One more training, on everything, is what a service would get that trains
again. All have the same settings; candidates are the titles that the viewer may play and has not watched, as in
`m5 evaluate`.

    m5 bench adapt --data DATA --preset demo training.epochs=2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.harness import Promise, Report, run
from benchmarks.left_out import without
from data_prep.graphsage import build_graph
from m5.adapt import MAY_CHANGE, Start, adapt, starting_point
from m5.assemble import build_model
from m5.carry_over import State
from m5.config import ConfigError, RunConfig, load_config
from m5.data.sequences import BatchBuilder
from m5.evaluate import in_scenario, rank_rows
from m5.metrics import bootstrap_intervals, gains, hits
from m5.predict import Predictor
from m5.schema import TRAIN, PreparedDataset
from m5.train import train
from m5.zero_shot import with_row

T = TypeVar("T")
UNKNOWN, BLEND, ADAPTED, RETRAINED = "unknown", "zero-shot blend", "adapted", "retrained"
ROWS = (UNKNOWN, BLEND, ADAPTED, RETRAINED)
SAMPLES = 2000  # of the bootstrap over viewers
SMOKE = ("model.width=16", "model.blocks=1", "model.expert_hidden=16", "model.mixing_width=16", "training.epochs=1")


@dataclass(frozen=True)
class Answers:
    """One value's test requests, answered by the four rows.

    Attributes:
        value: that was left out, or "all" for all of them together.
        events: of the value in the training period.
        user: int64 [R].
        ndcg, hr: by row, float64 [R], NDCG@10 and HR@50.
        seconds: by row.
        blend: what the value began as.
        fit: share of the content vectors' variance that was carried over.
    """

    value: str
    events: int
    user: np.ndarray
    ndcg: dict[str, np.ndarray]
    hr: dict[str, np.ndarray]
    seconds: dict[str, float]
    blend: dict[str, float]
    fit: float

    def gap(self) -> float | None:
        """Share of what a retraining gains over the unknown value that adaptation gains, too; None: it gains none."""
        unknown, adapted, retrained = (self.ndcg[row].mean() for row in (UNKNOWN, ADAPTED, RETRAINED))
        return float((adapted - unknown) / (retrained - unknown)) if retrained > unknown else None

    def better(self, row: str, than: str) -> tuple[float, float]:
        """95% interval of the difference in NDCG@10 between two rows, request by request."""
        difference = {"d": self.ndcg[row] - self.ndcg[than]}
        return bootstrap_intervals(difference, self.user, samples=SAMPLES, seed=0)["d"]


def timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def predictor(dataset: PreparedDataset, config: RunConfig, state: State, name: str) -> Predictor:
    model = build_model(dataset, config)
    model.load_state_dict(state)
    found = Predictor(model, BatchBuilder(dataset, config), config, torch.device("cpu"))
    found.name = name
    return found


def as_unknown(start: Start, dataset: PreparedDataset, config: RunConfig) -> State:
    """The carried-over weights with the unknown value's rows in place of the new value's."""
    state, vocabulary = dict(start.state), _vocabulary(dataset, start.name)
    unknown, everything = np.zeros(1, dtype=np.int64), np.ones(1)
    value, hidden = vocabulary.index(start.value), config.model.expert_hidden
    with_row(state, start.name, value, unknown, everything, hidden=hidden)
    return state


def _vocabulary(dataset: PreparedDataset, name: str):
    return next(vocabulary for vocabulary in dataset.manifest.scenarios if vocabulary.name == name)


def answered(options: argparse.Namespace, folder: Path, value: str, retrained: Predictor, seconds: float) -> Answers:
    """Train without a value, adapt, and ask."""
    dataset, name = retrained.dataset, options.scenario
    without(dataset, name, value, folder / "data")
    if "graph" in dataset.manifest.encoders:
        build_graph(folder / "data")
    config = settings(options, folder / "data", folder / "run")
    _, before = timed(lambda: train(config))
    start, blending = timed(lambda: starting_point(folder / "run", name, value, dataset))
    new, given = folder / "new", adaptation_overrides(options)
    _, adapting = timed(lambda: adapt(folder / "run", (name, value), dataset.folder, new, given))
    adapted = Predictor.load(new, "cpu")
    adapted.name = ADAPTED
    scorers = [
        predictor(dataset, config, as_unknown(start, dataset, config), UNKNOWN),
        predictor(dataset, config, start.state, BLEND),
        adapted,
        retrained,
    ]
    found = rank_rows(dataset, scorers, within=(name, value), filter_seen=config.training.filter_seen)
    trained = in_scenario(dataset, name, value) & (np.asarray(dataset.event_array("split")) == TRAIN)
    ranks = {row.scorer.name: row.rank for row in found.rows}
    return Answers(
        value=value,
        events=int(trained.sum()),
        user=found.requests.user,
        ndcg={row: gains(rank, 10) for row, rank in ranks.items()},
        hr={row: hits(rank, 50) for row, rank in ranks.items()},
        seconds=dict(zip(ROWS, (before, blending, adapting, seconds), strict=True)),
        blend=start.blend,
        fit=start.origin["adapted"]["content_fit"],
    )


def together(answers: list[Answers]) -> Answers:
    """All values' requests; a viewer of two regions is one viewer, and seconds and events are added up."""
    return Answers(
        value="all",
        events=sum(one.events for one in answers),
        user=np.concatenate([one.user for one in answers]),
        ndcg={row: np.concatenate([one.ndcg[row] for one in answers]) for row in ROWS},
        hr={row: np.concatenate([one.hr[row] for one in answers]) for row in ROWS},
        seconds={row: sum(one.seconds[row] for one in answers) for row in ROWS},
        blend={},
        fit=min(one.fit for one in answers),
    )


def table(answers: list[Answers], name: str) -> list[dict[str, Any]]:
    rows = []
    for one in answers:
        gap = one.gap()
        for row in ROWS:
            values = {"ndcg": one.ndcg[row], "hr": one.hr[row]}
            interval = bootstrap_intervals(values, one.user, samples=SAMPLES, seed=0)
            rows.append(
                {
                    name: one.value,
                    "row": row,
                    "NDCG@10": f"{one.ndcg[row].mean():.4f} ({interval['ndcg'][0]:.4f} - {interval['ndcg'][1]:.4f})",
                    "HR@50": f"{one.hr[row].mean():.4f} ({interval['hr'][0]:.4f} - {interval['hr'][1]:.4f})",
                    "of the gap": f"{gap:.0%}" if gap is not None and row == ADAPTED else "",
                    "seconds": f"{one.seconds[row]:.1f}" if one.value != "all" and row != UNKNOWN else "",
                    "requests": f"{len(one.user):,}",
                }
            )
    return rows


def settings(options: argparse.Namespace, data: Path, out: Path) -> RunConfig:
    own = [f"training.threads={options.threads}", "training.max_minutes=null", *(SMOKE if options.smoke else ())]
    return load_config(options.preset, [*own, *options.overrides], data, out)


def adaptation_overrides(options: argparse.Namespace) -> list[str]:
    """Those of the overrides that `m5 adapt` may change, so that all trainings have the same; the others are RUN's."""
    free = {f"{section}.{name}" for section, names in MAY_CHANGE.items() for name in names}
    own = [f"training.threads={options.threads}", *(SMOKE if options.smoke else ()), *options.overrides]
    return [override for override in own if override.partition("=")[0] in free]


def measure(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        folder = Path(work)
        if options.data is None and not options.smoke:
            raise ConfigError("--data DATA is needed: a prepared dataset with a scenario of two values or more.")
        data = options.data if options.data is not None else small_world(folder / "small")
        return measured(options, PreparedDataset(data), folder)


def measured(options: argparse.Namespace, dataset: PreparedDataset, folder: Path) -> Report:
    name = options.scenario
    vocabularies = {vocabulary.name: vocabulary for vocabulary in dataset.manifest.scenarios}
    if name not in vocabularies:
        raise ConfigError(f"{dataset.folder} has no scenario '{name}'. Its scenarios: {', '.join(vocabularies)}.")
    values = tuple(options.values or vocabularies[name].values[: 2 if options.smoke else None])
    if foreign := [value for value in values if value not in vocabularies[name].values]:
        raise ConfigError(f"{dataset.folder} has no {name}={foreign[0]}: {', '.join(vocabularies[name].values)}.")
    if vocabularies[name].size < 3:
        raise ConfigError(f"{name} has one value; without it none is left to begin with.")
    config = settings(options, dataset.folder, folder / "retrained")
    _, seconds = timed(lambda: train(config))
    retrained = Predictor.load(config.out, "cpu")
    retrained.name = RETRAINED
    answers = [answered(options, folder / value, value, retrained, seconds) for value in values]
    everybody = together(answers)
    return Report(
        title=f"A new {name} joins {dataset.manifest.name}: each left out in turn",
        rows=table([*answers, everybody], name),
        notes=notes(answers, everybody, config, dataset),
        promises=[
            Promise(
                f"upper end of the 95% interval of adapted - {than}, NDCG@10, the least of all values",
                min(one.better(ADAPTED, than)[1] for one in answers),
                limit=0.0,
                at_least=True,
            )
            for than in (UNKNOWN, BLEND)
        ],
        plot=lambda axes: draw(axes, [*answers, everybody]),
        spread_over="one training a row; intervals are over viewers, by bootstrap",
        details={"blend": {one.value: one.blend for one in answers}, "gap": {one.value: one.gap() for one in answers}},
    )


def notes(answers: list[Answers], everybody: Answers, config: RunConfig, dataset: PreparedDataset) -> list[str]:
    blends = "; ".join(
        f"{one.value} ({one.events:,} training events) as "
        + " + ".join(f"{share:.2f} {other}" for other, share in sorted(one.blend.items(), key=lambda item: -item[1]))
        for one in answers
    )
    low, high = everybody.better(ADAPTED, BLEND)
    below, above = everybody.better(RETRAINED, ADAPTED)
    return [
        f"The blends: {blends}.",
        f"All requests together: adapted - {BLEND} {low:+.4f} to {high:+.4f}, retrained - adapted {below:+.4f} to "
        f"{above:+.4f} NDCG@10 (95%). 'Of the gap' is (adapted - unknown) / (retrained - unknown), in NDCG@10.",
        "Seconds: of the blend everything but the training before; of 'adapted' the command whole, its validations "
        "included; of 'retrained' the one training that all values share. Training without a value took "
        f"{', '.join(f'{one.value} {one.seconds[UNKNOWN]:.0f} s' for one in answers)}.",
        f"Preset {config.preset}, {config.training.epochs} epochs each, the checkpoint chosen on validation. Without a "
        "value, vocabularies, intensity buckets and GraphSAGE are learned anew, as a service would have had them; a "
        f"linear map found {min(one.fit for one in answers):.1%} of the content vectors' variance at least. Titles "
        "that no other value's viewers had watched in the training period have an ID embedding in the last row alone.",
        f"Dataset: {dataset.manifest.name}, content hash {dataset.manifest.content_hash[:12]}.",
        *dataset.manifest.notes,
    ]


def draw(axes: Any, answers: list[Answers]) -> None:
    """NDCG@10 of the four rows beside each other, value by value."""
    place, width = np.arange(len(answers)), 0.8 / len(ROWS)
    for number, row in enumerate(ROWS):
        heights = [one.ndcg[row].mean() for one in answers]
        ends = [bootstrap_intervals({"n": one.ndcg[row]}, one.user, samples=SAMPLES, seed=0)["n"] for one in answers]
        errors = np.abs(np.array(ends).T - np.array(heights))
        axes.bar(place + (number - 1.5) * width, heights, width, yerr=errors, label=row)
    axes.set_xticks(place, [one.value for one in answers])
    axes.set_ylabel("NDCG@10")
    axes.legend(fontsize="small")


def small_world(folder: Path) -> Path:
    """A synthetic service without posters, for --smoke."""
    from data_prep.prepare import prepare_all, silent
    from data_prep.sources.synthetic import generate
    from data_prep.sources.tables import load

    generate(out=folder / "raw", users=200, titles=200, events=3000, seed=0, posters=False)
    prepare_all(load(folder / "raw" / "dataset.yaml"), folder / "data", progress=silent)
    return folder / "data"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="prepared dataset")
    parser.add_argument("--scenario", default="region", help="whose values are left out (default: region)")
    parser.add_argument("--values", nargs="+", help="which of them (default: all)")
    parser.add_argument("--preset", default="demo", help="of all trainings: name or YAML file (default: demo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. training.epochs=2")


def main(argv: list[str] | None = None) -> int:
    return run(__spec__.name if __spec__ else __name__, __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
