"""`m5 demo`: the whole main job on the synthetic world, from raw tables to an artifact that a service answers from."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from m5.config import load_config
from m5.schema import PreparedDataset

VIEWERS = 12
CONTROLS = {"m5-id-only": ["model.content=[]"], "m5-mlp": ["model.mixing=mlp"]}


def run_demo(folder: Path, *, users: int = 5000, titles: int = 1000, events: int = 200_000, seed: int = 0) -> None:
    """Generate, prepare, encode, train M5 and two controls, evaluate, recommend, export; all of it goes below `folder`.

    Args:
        folder: e.g. runs/demo; the evaluation is left in its run, m5/evaluation.json, where the artifact finds it.
        users, titles, events, seed: of the synthetic world.
    """
    from data_prep.prepare import prepare_all
    from data_prep.sources.synthetic import generate
    from data_prep.sources.tables import load
    from m5.evaluate_run import evaluate_run
    from m5.serving.export import Options, export
    from m5.train import train

    folder.mkdir(parents=True, exist_ok=True)
    raw, data = folder / "raw", folder / "data"
    began = time.monotonic()

    def stage(text: str) -> None:
        print(f"\n[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    stage(f"a synthetic streaming world: {users:,} viewers, {titles:,} titles, {events:,} events")
    generate(out=raw, users=users, titles=titles, events=events, seed=seed)
    stage("prepare: validate, encode text and artwork, pre-train the metagraph's embeddings")
    prepare_all(load(raw / "dataset.yaml"), data, image_weights="random")
    runs: dict[str, list[str]] = {"m5": [], **CONTROLS}
    for name, overrides in runs.items():
        stage(f"train {name}")
        train(load_config("demo", [f"name={name}", f"seed={seed}", *overrides], data, folder / name), resume="over")
    stage("evaluate on the test period, which training has not seen")
    evaluate_run(folder / "m5", rows={name: folder / name for name in CONTROLS})
    stage("recommendations for one viewer on two plans")
    recommend_on_plans(folder / "m5")
    stage("export what a service needs, with some viewers to look at")
    export(folder / "m5", folder / "artifact", Options(viewers=VIEWERS, drop_onboarded=True))
    stage(f"done; the results are in {folder / 'm5' / 'evaluation.json'}")
    print(f"\nTo see it answer, with posters:  {command()} serve {folder / 'artifact'} --now dataset", file=sys.stderr)


def command() -> str:
    """How this program is called from where the reader is: `m5` may not be on their PATH."""
    return "m5" if shutil.which("m5") else os.path.relpath(Path(sys.executable).parent / "m5")


def recommend_on_plans(run: Path, *, k: int = 8) -> None:
    """Print what the most active test viewer gets on the first and on the last plan."""
    from m5.predict import Predictor
    from m5.recommend import known_viewer, print_viewer
    from m5.viewer import Viewer

    predictor = Predictor.load(run)
    dataset: PreparedDataset = predictor.dataset
    plan = dataset.manifest.scenario("plan")
    viewer = known_viewer(dataset, dataset.users["user_id"].iloc[int(np.argmax(np.diff(dataset.offsets)))])
    for value in (plan.values[0], plan.values[-1]):
        scenario = viewer.scenario | {"plan": plan.index(value)}
        print_viewer(predictor, Viewer(**{**vars(viewer), "scenario": scenario}), k=k)
