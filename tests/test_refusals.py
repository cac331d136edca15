"""What must not be overwritten, mixed up or silently ignored is refused, in one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from m5.best import read_record
from m5.cli import main
from m5.config import ConfigError, load_config
from m5.predict import Predictor
from m5.schema import DataError, PreparedDataset
from m5.train import train
from tests.world import tiny_config, write_world


def config_of(*overrides: str, preset: str = "default") -> None:
    load_config(preset, list(overrides), Path("data"), Path("run"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("out=elsewhere",), "there is no setting 'out'"),
        (("model.width=[",), "is not a value"),
        (("candidates.count=5",), "has an effect only with candidates.kind=sampled"),
        (("model.mixing=mlp", "optimizer.expert_lr=0.5"), "has an effect only with model.mixing=smoe"),
        (("model.mlm_share=0.5",), "has an effect only with model.mlm_weight above 0"),
    ],
)
def test_overrides_that_cannot_be_meant(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- model", "expected settings by section"),
        ("model: 3", "expected settings by section"),
        ("model: [", "is not valid YAML"),
        ("data: here", "give --data and --out instead"),
    ],
)
def test_presets_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_of(preset=str(tmp_path / "own.yaml"))


def test_cuda_without_a_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    write_world(tmp_path / "data")
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        train(tiny_config(tmp_path / "data", tmp_path / "run", "training.device=cuda"))


def test_a_run_is_not_read_beside_other_content_vectors(tmp_path: Path) -> None:
    dataset = write_world(tmp_path / "data")
    train(tiny_config(tmp_path / "data", tmp_path / "run", "training.epochs=1"))
    Predictor.load(tmp_path / "run")
    path = dataset.folder / "content" / "graph.npy"
    np.save(path, np.load(path)[:, ::-1])
    with pytest.raises(DataError, match=r"trained on other content vectors .*graph"):
        Predictor.load(tmp_path / "run")


def test_a_run_of_another_model_is_told(tmp_path: Path) -> None:
    write_world(tmp_path / "data")
    train(tiny_config(tmp_path / "data", tmp_path / "run", "training.epochs=1"))
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "expert_hidden: 8\n" in text
    config.write_text(text.replace("expert_hidden: 8\n", "expert_hidden: 16\n"))
    with pytest.raises(DataError, match="another version of the model"):
        Predictor.load(tmp_path / "run")


def test_damaged_records_are_told(tmp_path: Path) -> None:
    write_world(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        PreparedDataset(tmp_path / "data")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "checkpoint.json").write_text("{")
    with pytest.raises(DataError, match=r"checkpoint\.json is damaged"):
        read_record(tmp_path)


def test_synth_keeps_its_hands_off_other_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "events.csv").write_text("kept")
    arguments = ["synth", "--users", "50", "--titles", "200", "--events", "300", "--no-posters"]
    assert main([*arguments, "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "events.csv").read_text() == "kept"
    assert main([*arguments, "--out", str(tmp_path / "world")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "world")]) == 0, "an earlier world may be replaced"
    assert main([*arguments, "--seed", "-1", "--out", str(tmp_path / "other")]) == 2


def test_sources_keep_their_hands_off_other_folders(tmp_path: Path) -> None:
    raw = tmp_path / "data-raw"
    raw.mkdir()
    (raw / "events.parquet").write_text("kept")
    assert main(["prepare", "globo", str(tmp_path / "clicks.parquet"), "--out", str(tmp_path / "data")]) == 2
    assert (raw / "events.parquet").read_text() == "kept"
