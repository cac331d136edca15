"""Recommendations of all users: the lists that the run gives one by one, in files that can be gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from m5.cli import main
from m5.predict import Predictor
from m5.recommend import best_titles, known_viewer, recommend_titles
from m5.serving import offline
from m5.serving.export import Options, export
from m5.serving.offline import own_device, part_name
from m5.serving.retriever import Ask, Retriever
from m5.viewer import Viewer
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


def parts_in(out: Path) -> list[str]:
    """Files but the setup, hidden ones too."""
    return sorted(path.name for path in out.iterdir() if offline.SETUP not in path.name)


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
    shown = capsys.readouterr().out
    assert shown.startswith(f"{out}: 40 users in ") and " users/s, peak memory " in shown
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


def test_ranks_share_the_parts(run: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, so that each is seen to write its own."""
    recommend(run, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, written in (("0", [0, 2]), ("1", [0, 1, 2])):
        monkeypatch.setenv("RANK", rank)
        assert recommend(run, tmp_path / "two") == 0
        assert parts_in(tmp_path / "two") == [part_name(part) for part in written]
    assert lists(tmp_path / "two") == lists(tmp_path / "one")


def test_ranks_may_start_together(run: Path, tmp_path: Path, small_parts: None) -> None:
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


def test_every_rank_of_a_machine_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert own_device() == "cuda:3"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert own_device() == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert own_device() == "cpu"


# ---- kills and mistakes ----------------------------------------------------------------------------------------------


def test_what_a_killed_run_has_left_is_taken_away(run: Path, tmp_path: Path, small_parts: None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for left in ("._recommendations.json.12ab", f".{part_name(1)}.4242"):
        (out / left).write_text("half")
    assert recommend(run, out) == 2  # a part without a setup is none of ours
    (out / f".{part_name(1)}.4242").unlink()
    assert recommend(run, out) == 0
    (out / part_name(1)).rename(out / f".{part_name(1)}.4242")
    assert recommend(run, out) == 0
    assert parts_in(out) == [part_name(part) for part in range(3)]


def test_a_part_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(table: object, file: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("pyarrow.parquet.write_table", failing)
    with pytest.raises(OSError, match="the disk is full"):
        recommend(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_recommendations.json"]


def test_mistakes_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert recommend(run, tmp_path / "file") == 2
    assert "is a file, and --out names a folder" in capsys.readouterr().err
    assert main(["recommend", str(run), "--user", "u3", "--out", str(tmp_path / "lists")]) == 2
    assert "--out belongs to --all-users" in capsys.readouterr().err
    assert not (tmp_path / "lists").exists()


# ---- order ---------------------------------------------------------------------------------------------------------


def test_equal_scores_are_ordered_by_title() -> None:
    score_BN = torch.zeros(3, 5000)
    score_BN[1, 4000] = 1
    score_BN[2, 2:] = -torch.inf
    found = best_titles(score_BN, 4)
    assert found.title_BR.tolist() == [[0, 1, 2, 3], [4000, 0, 1, 2], [0, 1, -1, -1]]
    assert found.score_BR.tolist() == [[0] * 4, [1, 0, 0, 0], [0, 0, -np.inf, -np.inf]]
    assert best_titles(score_BN[:, :3], 5).title_BR[0].tolist() == [0, 1, 2, -1, -1]


def test_titles_that_tie_come_in_one_order_everywhere(tmp_path: Path) -> None:
    """Without content all cold titles, 26 to 29, have the row of the unknown title."""
    run = write_run(tmp_path, "model.content=[]", rights=False)
    predictor = Predictor.load(run, "cpu")
    retriever = Retriever(export(run, tmp_path / "artifact", Options(program=False)))
    assert main(["recommend", str(run), "--all-users", "--out", str(tmp_path / "out"), "-k", "30", "--keep-seen"]) == 0
    cold = {f"t{n}" for n in range(26, 30)}
    for user, titles in lists(tmp_path / "out").items():
        viewer = known_viewer(predictor.dataset, user)
        (answer,) = retriever.recommend([Ask(viewer, 30, filter_seen=False)])
        alone = [item.title_id for item in recommend_titles(predictor, viewer, k=30, filter_seen=False)]
        assert [title for title in titles if title in cold] == sorted(cold)
        assert titles == alone == [retriever.title_ids[title] for title in answer.title]


def test_a_kind_of_intensity_that_a_viewer_lacks_is_given_for_none(run: Path) -> None:
    predictor, title = Predictor.load(run, "cpu"), np.array([3, 8])
    lacking = Viewer(title, np.array([0, 9]), 10**7)
    nothing = Viewer(title, np.array([0, 9]), 10**7, intensity={"seconds": np.full(2, np.nan, dtype=np.float32)})
    assert recommend_titles(predictor, lacking, k=9) == recommend_titles(predictor, nothing, k=9)
