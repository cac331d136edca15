"""A new region or plan joins a trained model: zero-shot, adapted and fully retrained, leaving out one value at a time.

For every value of a scenario a model is trained on the dataset as it was before that value (`benchmarks.left_out`) and
then asked the value's test requests on the whole dataset: with the value unknown to it (index 0), with `m5 adapt`'s
zero-shot blend, and adapted by `m5 adapt`. One more training, on everything, is what a service would get that trains
again. All trainings have the same preset and overrides, but for what `m5 adapt` has of its own (`m5.adapt.SETTINGS`);
candidates are the titles that the viewer may play and has not watched, as in `m5 evaluate`.

What viewers of all other values lose is measured, too: their test requests, answered by the run on the dataset without
the value, and by the adapted run on the whole one, whose bucket boundaries and content vectors were learned anew.

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
BEFORE, AFTER = "all others, before", "all others, after"
CLEAR = 1e-4  # NDCG@10; an adaptation that changes nothing gains exactly 0
SAMPLES = 2000  # of the bootstrap over viewers
SMOKE = ("model.width=16", "model.blocks=1", "model.expert_hidden=16", "model.mixing_width=16", "training.epochs=1")


@dataclass(frozen=True)
class Asked:
    """The same requests, answered by several rows.

    Attributes:
        user: int64 [R].
        ndcg, hr: by row, float64 [R], NDCG@10 and HR@50.
    """

    user: np.ndarray
    ndcg: dict[str, np.ndarray]
    hr: dict[str, np.ndarray]

    @classmethod
    def of(cls, user: np.ndarray, ranks: dict[str, np.ndarray]) -> Asked:
        """int64 [R] and, by row, float64 [R] ranks of the targets."""
        ndcg = {row: gains(rank, 10) for row, rank in ranks.items()}
        return cls(user, ndcg, {row: hits(rank, 50) for row, rank in ranks.items()})

    @classmethod
    def together(cls, parts: list[Asked]) -> Asked:
        """All of their requests; a viewer in two of them is one viewer."""
        ndcg, hr = (
            {row: np.concatenate([getattr(part, metric)[row] for part in parts]) for row in parts[0].ndcg}
            for metric in ("ndcg", "hr")
        )
        return cls(np.concatenate([part.user for part in parts]), ndcg, hr)

    def gain(self, row: str, over: str) -> tuple[float, float]:
        """95% interval of what a row has more in NDCG@10 than another, request by request."""
        difference = {"d": self.ndcg[row] - self.ndcg[over]}
        return bootstrap_intervals(difference, self.user, samples=SAMPLES, seed=0)["d"]


@dataclass(frozen=True)
class Answers:
    """What leaving one value out has shown.

    Attributes:
        value: that was left out, or "all" for all of them together.
        events: of the value in the training period.
        own: the value's test requests, answered by the four rows.
        others: those of all other values, before the adaptation and after it.
        seconds: by row.
        blend: what the value began as.
        fit: share of the content vectors' variance that was carried over.
    """

    value: str
    events: int
    own: Asked
    others: Asked
    seconds: dict[str, float]
    blend: dict[str, float]
    fit: float

    def gap(self) -> float | None:
        """Share of what a retraining gains over the unknown value that adaptation gains, too; None: it gains none."""
        unknown, adapted, retrained = (self.own.ndcg[row].mean() for row in (UNKNOWN, ADAPTED, RETRAINED))
        return float((adapted - unknown) / (retrained - unknown)) if retrained > unknown else None


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
    state, vocabulary = dict(start.state), dataset.manifest.scenario(start.name)
    unknown, everything = np.zeros(1, dtype=np.int64), np.ones(1)
    value, hidden = vocabulary.index(start.value), config.model.expert_hidden
    with_row(state, start.name, value, unknown, everything, hidden=hidden)
    return state


def answered(options: argparse.Namespace, folder: Path, value: str, retrained: Predictor, seconds: float) -> Answers:
    """Train without a value, adapt, and ask."""
    dataset, name = retrained.dataset, options.scenario
    left = without(dataset, name, value, folder / "data")
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
    return Answers(
        value=value,
        events=int(trained.sum()),
        own=Asked.of(found.requests.user, {row.scorer.name: row.rank for row in found.rows}),
        others=all_others(left, Predictor.load(folder / "run", "cpu"), dataset, adapted, (name, value)),
        seconds=dict(zip(ROWS, (before, blending, adapting, seconds), strict=True)),
        blend=start.blend,
        fit=start.origin["adapted"]["content_fit"],
    )


def all_others(
    left: PreparedDataset, run: Predictor, dataset: PreparedDataset, adapted: Predictor, scenario: tuple[str, str]
) -> Asked:
    """Test requests of all values but one: by the run on the dataset without it, by the adapted run on the whole."""
    seen = run.config.training.filter_seen
    before = rank_rows(left, [run], filter_seen=seen)
    after = rank_rows(dataset, [adapted], filter_seen=seen)
    keep = ~in_scenario(dataset, *scenario)[after.requests.event]
    same = before.requests.target, after.requests.target[keep]
    assert np.array_equal(*same), "leaving a value out takes its own events away, and leaves all others in their order"
    return Asked.of(before.requests.user, {BEFORE: before.rows[0].rank, AFTER: after.rows[0].rank[keep]})


def together(answers: list[Answers]) -> Answers:
    """All values' requests; seconds and events are added up."""
    return Answers(
        value="all",
        events=sum(one.events for one in answers),
        own=Asked.together([one.own for one in answers]),
        others=Asked.together([one.others for one in answers]),
        seconds={row: sum(one.seconds[row] for one in answers) for row in ROWS},
        blend={},
        fit=min(one.fit for one in answers),
    )


def table(answers: list[Answers], name: str) -> list[dict[str, Any]]:
    rows = []
    for one in answers:
        gap = one.gap()
        for asked, row in [*((one.own, row) for row in ROWS), (one.others, BEFORE), (one.others, AFTER)]:
            values = {"ndcg": asked.ndcg[row], "hr": asked.hr[row]}
            interval = bootstrap_intervals(values, asked.user, samples=SAMPLES, seed=0)
            rows.append(
                {
                    name: one.value,
                    "row": row,
                    "NDCG@10": f"{asked.ndcg[row].mean():.4f} ({interval['ndcg'][0]:.4f} - {interval['ndcg'][1]:.4f})",
                    "HR@50": f"{asked.hr[row].mean():.4f} ({interval['hr'][0]:.4f} - {interval['hr'][1]:.4f})",
                    "of the gap": f"{gap:.0%}" if gap is not None and row == ADAPTED else "",
                    "seconds": f"{one.seconds[row]:.1f}" if one.value != "all" and row in ROWS[1:] else "",
                    "requests": f"{len(asked.user):,}",
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
                f"lower end of the 95% interval of adapted - {than}, NDCG@10, all values together",
                everybody.own.gain(ADAPTED, than)[0],
                limit=CLEAR,
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
    low, high = everybody.own.gain(ADAPTED, BLEND)
    below, above = everybody.own.gain(RETRAINED, ADAPTED)
    least, most = everybody.others.gain(AFTER, BEFORE)
    return [
        f"The blends: {blends}.",
        f"All requests together: adapted - {BLEND} {low:+.4f} to {high:+.4f}, retrained - adapted {below:+.4f} to "
        f"{above:+.4f} NDCG@10 (95%). 'Of the gap' is (adapted - unknown) / (retrained - unknown), in NDCG@10.",
        f"Requests of all other values, after - before: {least:+.4f} to {most:+.4f} NDCG@10 (95%). What differs "
        "for them are bucket boundaries and content vectors, learned anew with the value, and watches in it of viewers "
        "who have other values, too.",
        "Seconds: of the blend everything but the training before; of 'adapted' the command whole, its validations "
        "included; of 'retrained' the one training that all values share. Training without a value took "
        f"{', '.join(f'{one.value} {one.seconds[UNKNOWN]:.0f} s' for one in answers)}.",
        f"Preset {config.preset}, {config.training.epochs} epochs from the start, the best checkpoint on validation. "
        "Without a value, vocabularies, intensity buckets and GraphSAGE are learned anew, as a service would have had "
        f"them; a linear map found {min(one.fit for one in answers):.1%} of the content vectors' variance at least. "
        "Titles that no other value's viewers had watched in the training period have an ID embedding in the last row "
        "alone.",
        f"Dataset: {dataset.manifest.name}, content hash {dataset.manifest.content_hash[:12]}.",
        *dataset.manifest.notes,
    ]


def draw(axes: Any, answers: list[Answers]) -> None:
    """NDCG@10 of the four rows beside each other, value by value."""
    place, width = np.arange(len(answers)), 0.8 / len(ROWS)
    for number, row in enumerate(ROWS):
        heights = [one.own.ndcg[row].mean() for one in answers]
        ends = [
            bootstrap_intervals({"n": one.own.ndcg[row]}, one.own.user, samples=SAMPLES, seed=0)["n"] for one in answers
        ]
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
