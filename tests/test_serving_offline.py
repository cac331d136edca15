"""Recommendations of all users: the lists that the run gives one by one, in files that can be gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from m5.cli import main
from m5.predict import Predictor
from m5.recommend import known_viewer, recommend_titles
from m5.serving import offline
from m5.serving.offline import part_name
from tests.serving import write_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("offline"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "PART", 16)


def recommend(run: Path, out: Path, *more: str) -> int:
    return main(["recommend", str(run), "--all-users", "--out", str(out), "-k", "5", *more])


def lists(out: Path) -> dict[str, list[str]]:
    frame = pd.read_parquet(out)
    return dict(zip(frame["user_id"], map(list, frame["title_id"]), strict=True))


@pytest.mark.parametrize("more", [(), ("--keep-seen",), ("--scenario", "region=r2")])
def test_every_user_gets_what_they_would_get_alone(run: Path, tmp_path: Path, small_parts: None, more) -> None:
    assert recommend(run, tmp_path / "out", *more) == 0
    found, predictor = lists(tmp_path / "out"), Predictor.load(run)
    assert sorted(path.name for path in (tmp_path / "out").glob("part-*")) == [part_name(part) for part in range(3)]
    assert list(found) == predictor.dataset.users["user_id"].tolist()
    for user, titles in found.items():
        viewer = known_viewer(predictor.dataset, user)
        if "--scenario" in more:
            viewer.scenario["region"] = 2
        expected = recommend_titles(predictor, viewer, k=5, filter_seen="--keep-seen" not in more)
        assert titles == [item.title_id for item in expected], user


def test_what_is_there_is_not_made_again(run: Path, tmp_path: Path, small_parts: None, capsys) -> None:
    out = tmp_path / "out"
    recommend(run, out)
    whole = lists(out)
    kept = (out / part_name(0)).stat().st_mtime_ns
    (out / part_name(1)).unlink()
    assert recommend(run, out) == 0
    assert lists(out) == whole and (out / part_name(0)).stat().st_mtime_ns == kept
    capsys.readouterr()
    assert recommend(run, out) == 0
    assert "everything is there already" in capsys.readouterr().err


def test_other_recommendations_are_not_mixed_in(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    recommend(run, out)
    assert recommend(run, out, "--keep-seen") == 2
    assert "another run, k, scenario or --keep-seen" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert recommend(run, tmp_path / "mine") == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert main(["recommend", str(run), "--all-users"]) == 2
    assert "--all-users needs --out" in capsys.readouterr().err


def test_ranks_share_the_parts(run: Path, tmp_path: Path, small_parts: None) -> None:
    recommend(run, tmp_path / "one")
    arguments = ["recommend", str(run), "--all-users", "--out", str(tmp_path / "two"), "-k", "5"]
    program = f"from m5.cli import main; from m5.serving import offline; offline.PART = 16; exit(main({arguments}))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}
        )
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert lists(tmp_path / "two") == lists(tmp_path / "one")
