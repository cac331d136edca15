"""`m5 demo` from end to end: every row and scenario, and an artifact whose card tells how good it is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from m5.cli import main
from m5.serving.artifact import Artifact


@pytest.mark.slow
def test_the_demo_leaves_every_row_and_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("M5_CACHE", str(tmp_path / "cache"))
    demo = tmp_path / "demo"
    assert main(shlex.split(f"demo --users 150 --titles 150 --events 1500 --out {demo}")) == 0
    models = json.loads((demo / "m5" / "evaluation.json").read_text())["models"]
    assert set(models) == {"m5", "m5-id-only", "m5-mlp", "popularity", "item-knn", "ease", "oracle"}
    assert all(0 <= row["overall"]["ndcg@10"] <= row["overall"]["hr@10"] <= 1 for row in models.values())
    assert {"plan=ads", "plan=premium"} <= set(models["m5"]["scenarios"])
    shown = capsys.readouterr()
    assert "plan=ads" in shown.out
    assert "plan=premium" in shown.out
    artifact = Artifact(demo / "artifact")
    assert artifact.manifest.n_titles == 150 and len(artifact.viewers) == 12 and artifact.posters is not None
    card = (artifact.folder / "card.md").read_text()
    assert f"| test | {models['m5']['overall']['n']:,} |" in card and "| plan=ads |" in card
    assert shown.err.rstrip().endswith(f"serve {demo / 'artifact'} --now dataset")
