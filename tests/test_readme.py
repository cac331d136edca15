"""Every command of the README is run, in order, against worlds that are small enough for a test."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from data_prep.spec import read_spec
from m5.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("m5", "data_prep", "tune", "benchmarks")
SIZES = {"users": 1100, "titles": 120, "events": 6600}  # as many digits in the ids as in README's world
QUICK = (
    "training.epochs=1",
    "training.threads=1",
    "training.validation_targets=50",
    "sequences.sequences_per_epoch=64",
    "model.width=16",
    "model.blocks=1",
    "model.expert_hidden=16",
    "model.mixing_width=16",
)
# Those of them that the search's space does not vary and the search does not decide.
FIXED = ("training.epochs", "training.validation_targets", "sequences.sequences_per_epoch")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """README's commands, comments aside, in order."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def small(words: list[str]) -> list[str]:
    """The same command at the size of a test."""
    words = list(words)
    for name, size in SIZES.items():
        if words[:2] == ["m5", "synth"] and f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = str(size)
    if words[:2] == ["m5", "tune"]:
        return [*words, "search.trials=2", "search.seeds=1", *(one for one in QUICK if one.split("=")[0] in FIXED)]
    if words[:2] == ["m5", "compare"]:
        # `all` is in test_literature.py, system by system.
        return [*words[: words.index("all")], "ease", "popularity", *words[words.index("all") + 1 :], "--seconds", "2"]
    return [*words, *QUICK] if "train" in words[:2] or "m5.train" in words else words


def write_movielens(folder: Path) -> None:
    """Stand-ins for the files that README's MovieLens commands name."""
    generator = np.random.default_rng(0)
    movies, users = 30, 20
    ratings = [
        f"{user + 1}::{movie + 1}::{generator.integers(1, 6)}::{1000 * user + 10 * place}"
        for user in range(users)
        for place, movie in enumerate(generator.permutation(movies)[:12])
    ]
    lines = {
        "ratings": ratings,
        "users": [f"{user + 1}::{'FM'[user % 2]}::25::1::{10000 + 4000 * user:05d}" for user in range(users)],
        "movies": [f"{movie + 1}::Film {movie + 1} (1999)::Drama|Comedy" for movie in range(movies)],
    }
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for name, text in lines.items():
            archive.writestr(f"ml-1m/{name}.dat", "\n".join(text) + "\n")
    pd.DataFrame(
        {
            "movie_id": range(1, movies + 1),
            "description": [f"A story of {movie} friends." for movie in range(movies)],
            "actors": [[f"Actor {movie % 5}", f"Actor {movie % 7}"] for movie in range(movies)],
        }
    ).to_parquet(folder / "titles.parquet", index=False)
    with tarfile.open(folder / "posters.tar", "w") as archive:
        for movie in range(1, movies):
            picture = io.BytesIO()
            Image.new("RGB", (32, 48), (8 * movie, 255 - 8 * movie, 90)).save(picture, "JPEG")
            member = tarfile.TarInfo(f"{movie}.jpg")
            member.size = len(picture.getvalue())
            archive.addfile(member, io.BytesIO(picture.getvalue()))


def write_globo(folder: Path) -> None:
    from data_prep.sources.globo import ROLES

    generator = np.random.default_rng(0)
    columns = {column: generator.integers(0, 20, 600) for column in ROLES.values()}
    columns[ROLES["timestamp"]] = 1_507_000_000_000 + 1000 * np.arange(600)
    pd.DataFrame(columns).to_parquet(folder / "clicks.parquet", index=False)


class Service:
    """`m5 serve` in a process of its own, on a port that is free."""

    def __init__(self, options: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "m5.cli", "serve", *options, "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        self.url = re.search(r"http://\S+/", self.process.stdout.readline())[0]

    def ask(self, curl: list[str]) -> dict:
        """What README's call of curl would get."""
        path = curl[2].partition("/")[2]
        header, body = (curl[curl.index(option) + 1] for option in ("-H", "-d"))
        request = urllib.request.Request(self.url + path, body.encode(), dict([header.split(": ")]))
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == -signal.SIGTERM  # it ends well, then as the signal would have it


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M5_CACHE", str(tmp_path / "cache"))
    for folder in ("docs/plans", "tune/spaces"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "docs/title.json", tmp_path / "docs")
    write_movielens(tmp_path)
    write_globo(tmp_path)
    ran, service = set(), None
    for words in commands():
        if words[:2] == ["m5", "serve"]:
            service = Service(words[2:])
            ran.add("serve")
        elif words[0] == "curl":
            assert service is not None
            assert len(service.ask(words)["titles"]) == 5
        elif words[0] == "m5":
            # A comparison of two runs may well find one of them worse.
            assert main(small(words)[1:]) in ((0, 4) if "--against" in words else (0,)), shlex.join(words)
            ran.add(words[1])
        elif words[0] == "torchrun":
            program = [sys.executable, "-m", "torch.distributed.run", *small(words)[1:]]
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            subprocess.run(program, check=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
        elif words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), words
        else:
            assert words == ["source", ".venv/bin/activate"]
    assert {"doctor", "synth", "prepare", "encode", "graph", "train", "evaluate", "recommend", "plan"} <= ran
    assert {"tune", "report", "compare", "export", "serve"} <= ran
    assert service is not None
    service.end()
    assert (tmp_path / "runs/two-ranks/best/weights.safetensors").is_file()


def test_the_example_of_dataset_yaml_is_one(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "dataset.yaml").write_text(example)
    spec = read_spec(tmp_path / "dataset.yaml")
    assert spec.rights is not None
    assert set(spec.rights.scenario_columns) == set(yaml.safe_load(example)["events"]["scenario"])


def test_every_file_has_its_line() -> None:
    (tree,) = blocks("text")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                names = (path.name, path.relative_to(ROOT / package).as_posix())
                assert any(re.search(rf"(^|[\s]){re.escape(name)}[\s,]", tree) for name in names), path
    for name in re.findall(r"^  ([\w/]+\.(?:py|md))", tree, flags=re.MULTILINE):
        assert any((ROOT / package / name).is_file() for package in PACKAGES), name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target.partition("#")[0]).exists(), target
