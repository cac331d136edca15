"""A long training with random kills beside an undisturbed one: `python -m benchmarks.soak --data DATA --out DIR`.

Both are the same `torchrun` job. In the second, a random rank is killed with -9 at random moments until --minutes have
passed; torchrun starts the ranks again, and they go on from the newest checkpoint. Every rank notes the events that it
trains on. At the end it is checked that in each epoch every training event was trained on exactly once on the way to
the final weights, that a step which had to be repeated was the same step, and whether the weights are those of the
undisturbed run. Exits with 1 where one of these fails.

Extra arguments are settings of the training, e.g. training.epochs=6.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import chaos
from m5.config import RunConfig, load_config
from m5.data.loader import Loader
from m5.library_warnings import silence_known
from m5.resume import Position
from m5.schema import TRAIN, PreparedDataset
from m5.step import Stepped
from m5.train import Schedule, Trainer, train

AUDIT = "audit"


class AuditedTrainer(Trainer):
    """A trainer that notes the events of every step."""

    def _steps(self, loader: Loader, schedule: Schedule, position: Position) -> Iterator[Stepped]:
        folder = self.config.out / AUDIT
        folder.mkdir(exist_ok=True)
        for taken in super()._steps(loader, schedule, position):
            # A name that no other step, rank or life of a rank has; renamed last, because kills come at any time.
            name = f"{position.epoch}-{position.step}-{self.place.rank}-{os.getpid()}"
            np.save(folder / f".{name}.npy", taken.batch.event_P.cpu().numpy())
            (folder / f".{name}.npy").rename(folder / f"{name}.npy")
            yield taken


def rank_main(arguments: list[str]) -> None:
    """What torchrun starts: `m5 train`, with notes."""
    preset, data, out, *overrides = arguments
    silence_known()
    config = load_config(preset, overrides, Path(data), Path(out))
    train(config, trainer=AuditedTrainer)


def audit(run: Path) -> dict[str, Any]:
    """Whether each epoch has trained on every training event once, and how many steps were repeated alike."""
    config = RunConfig.read(run / "config.yaml")
    dataset = PreparedDataset(config.data)
    expected = np.flatnonzero(np.asarray(dataset.event_array("split")) == TRAIN)
    versions: dict[tuple[int, int, int], list[np.ndarray]] = defaultdict(list)
    for path in (run / AUDIT).glob("[!.]*.npy"):
        epoch, step, rank, _ = (int(part) for part in path.stem.split("-"))
        versions[epoch, step, rank].append(np.load(path))
    epochs: dict[int, list[np.ndarray]] = defaultdict(list)
    for (epoch, _, _), events in versions.items():
        epochs[epoch].append(events[0])
    once = {epoch: np.array_equal(np.sort(np.concatenate(parts)), expected) for epoch, parts in epochs.items()}
    repeated = [events for events in versions.values() if len(events) > 1]
    return {
        "epochs": len(once),
        "events_an_epoch": len(expected),
        "every_event_once": all(once.values()) and len(once) == config.training.epochs,
        "steps": len({(epoch, step) for epoch, step, _ in versions}),
        "repeated": len(repeated),
        "repeated_alike": all(np.array_equal(events[0], other) for events in repeated for other in events[1:]),
    }


def weights_difference(first: Path, second: Path) -> dict[str, Any]:
    ours, theirs = (load_file(run / "best" / "weights.safetensors") for run in (first, second))
    largest = max(float((value - theirs[key]).abs().max()) for key, value in ours.items())
    return {"bitwise": all(torch.equal(value, theirs[key]) for key, value in ours.items()), "largest": largest}


def quality(run: Path) -> dict[str, float]:
    record = json.loads((run / "best" / "checkpoint.json").read_text())
    return {key: record["valid"][key] for key in ("hr@10", "ndcg@10", "hr@200")} | {"epoch": record["epoch"]}


def one_run(out: Path, options: argparse.Namespace, overrides: list[str], *, kills: bool) -> chaos.Outcome:
    generator = np.random.default_rng(options.seed)
    arguments = [options.preset, str(options.data), str(out), *overrides]
    outcome = chaos.run(
        ["--rank", *arguments],
        out,
        log=out.with_suffix(".log"),
        ranks=options.ranks,
        kills=10_000 if kills else 0,
        pause=lambda: float(generator.exponential(options.every)),
        seed=options.seed,
        limit=60 * options.limit,
        module="benchmarks.soak",
        stop_killing_after=60 * options.minutes,
    )
    print(f"{out.name}: exit code {outcome.code}, {outcome.seconds:.0f} s, {len(outcome.kills)} kills", flush=True)
    return outcome


def main(argv: list[str] | None = None) -> int:
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs and soak.json")
    parser.add_argument("--preset", default="ml1m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=30, help="kill until then")
    parser.add_argument("--every", type=float, default=60, help="mean seconds between progress and the next kill")
    parser.add_argument("--limit", type=float, default=120, help="minutes after which a run is given up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=["calm", "killed"], help="one of the two runs; the other one is there already"
    )
    options, overrides = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "load_at_start": os.getloadavg()[0],
    }
    path = options.out / "soak.json"
    if path.is_file() and options.only:
        report = json.loads(path.read_text()) | {"command": report["command"]}
    for name in ("calm", "killed"):
        if options.only in (None, name):
            outcome = one_run(options.out / name, options, overrides, kills=name == "killed")
            kills = [vars(kill) for kill in outcome.kills]
            report[name] = {"code": outcome.code, "seconds": outcome.seconds, "kills": kills}
            if outcome.code == 0:
                report[name] |= {"audit": audit(options.out / name), "valid": quality(options.out / name)}
            path.write_text(json.dumps(report, indent=1))
    if not all("audit" in report.get(name, {}) for name in ("calm", "killed")):
        return int(report[options.only]["code"] != 0) if options.only else 1
    report["weights"] = weights_difference(options.out / "calm", options.out / "killed")
    path.write_text(json.dumps(report, indent=1))
    print(json.dumps({key: report[key] for key in ("calm", "killed", "weights")}, indent=1))
    audits = [report[name]["audit"] for name in ("calm", "killed")]
    return int(
        not all(a["every_event_once"] and a["repeated_alike"] for a in audits) or not report["weights"]["bitwise"]
    )


if __name__ == "__main__":
    sys.exit(main())
