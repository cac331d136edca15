"""A trained run and its artifact in miniature."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from m5.serving.artifact import Artifact
from m5.serving.export import Options, export
from m5.train import train
from tests.world import tiny_config, write_world


def write_run(folder: Path, *overrides: str, **world) -> Path:
    """A run of one epoch on a world with rights and two posters: RUN, its dataset beside it."""
    dataset = write_world(folder / "data", **({"users": 40, "rights": True} | world))
    artwork = [""] * dataset.manifest.n_titles
    for title, colour in ((0, "red"), (1, "blue")):
        path = folder / f"{colour}.png"
        Image.new("RGB", (400, 600), colour).save(path)
        artwork[title] = str(path)
    artwork[2] = str(folder / "gone.png")
    dataset.titles.assign(artwork=artwork).to_parquet(folder / "data" / "titles.parquet")
    train(tiny_config(folder / "data", folder / "run", "training.epochs=1", *overrides))
    return folder / "run"


VIEWERS = Options(viewers=3)


def write_artifact(folder: Path, *overrides: str, options: Options = VIEWERS, **world) -> Artifact:
    return export(write_run(folder, *overrides, **world), folder / "artifact", options)
