"""What only a GPU can show: NCCL, TorchRec's pipeline on streams, bfloat16, compiled towers, page-locked staging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.invariance import difference, train_some
from m5.parallel import World, world
from m5.predict import Predictor
from m5.train import train
from tests.world import tiny_config, write_world

pytestmark = pytest.mark.gpu
CUDA = ("training.device=cuda", "model.dropout=0.2", "model.id_dropout=0.1", "sequences.sequences=7")
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "data"
    write_world(folder, users=60, rights=True)
    return folder


def steps_on(place: World, data: Path, *overrides: str) -> dict:
    result = train_some(tiny_config(data, data.parent / "run", *CUDA, *overrides), place, STEPS)
    return {quantity: {key: value.cpu() for key, value in tensors.items()} for quantity, tensors in result.items()}


def test_a_gpu_trains_what_a_cpu_trains(data: Path) -> None:
    """Dropout and all other chance included: it follows from keys, not from the device's generator."""
    with world("cpu") as place:
        expected = steps_on(place, data, "training.device=cpu")
    with world("cuda") as place:
        found = steps_on(place, data, "training.pipeline=false")
    for quantity, tolerance in (("loss", 1e-4), ("gradients", 1e-2), ("weights", 1e-2)):
        assert difference(expected[quantity], found[quantity])[0] < tolerance, quantity


def test_the_pipeline_changes_nothing(data: Path) -> None:
    with world("cuda") as place:
        plain, pipelined = (steps_on(place, data, f"training.pipeline={on}") for on in ("false", "true"))
    for quantity, tolerance in (("loss", 1e-5), ("weights", 1e-3)):
        assert difference(plain[quantity], pipelined[quantity])[0] < tolerance, quantity


@pytest.mark.parametrize(
    "overrides", [("training.autocast=true",), ("training.compile=true",)], ids=["bf16", "compile"]
)
def test_faster_ways_stay_close(data: Path, overrides: tuple[str, ...]) -> None:
    with world("cuda") as place:
        plain, other = steps_on(place, data), steps_on(place, data, *overrides)
    assert difference(plain["loss"], other["loss"])[0] < 0.02


def test_a_run_and_its_resumption(data: Path, tmp_path: Path) -> None:
    """Checkpoints through page-locked memory; the predictor reads what training has left."""
    settings = (*CUDA, "training.epochs=2", "training.checkpoint_every=2")
    metrics = train(tiny_config(data, tmp_path / "run", *settings))
    assert train(tiny_config(data, tmp_path / "run", *settings), resume="yes") == metrics
    assert torch.isfinite(Predictor.load(tmp_path / "run", "cuda").key_NQ).all()
