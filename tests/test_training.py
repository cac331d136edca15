"""Training: every branch of the configuration learns, a run leaves what it promises, mistakes are told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from m5 import best
from m5.best import load_weights, read_record, save_weights
from m5.config import ConfigError, RunConfig, load_config
from m5.data.loader import Loader
from m5.data.sequences import Windows
from m5.evaluate import evaluate
from m5.parallel import whole_state, world
from m5.predict import Predictor
from m5.schema import DataError, PreparedDataset
from m5.train import Schedule, Trainer, train
from tests.world import tiny_config, write_world

BIDIRECTIONAL = ("model.attention=bidirectional", "sequences.requests=1", "sequences.sequences=32")
DROPS = ("model.dropout=0.1", "model.id_dropout=0.1", "model.scenario_dropout=0.1")
BRANCHES = {
    "default": (),
    "all content": ("model.content=[graph, text, image]", *DROPS),
    "no content": ("model.content=[]",),
    "no subsidiary": ("model.subsidiary=false",),
    "no categories": ("model.categories=false",),
    "no blocks": ("model.blocks=0",),
    "mmoe": ("model.mixing=mmoe", *DROPS),
    "mlp": ("model.mixing=mlp",),
    "dot": ("model.score=dot",),
    "sampled": ("candidates.kind=sampled", "candidates.count=10"),
    "precision auto": ("candidates.precision=auto",),
    "bfloat16 products": ("candidates.precision=bfloat16",),
    "autocast": ("training.autocast=true",),
    "bidirectional": BIDIRECTIONAL,
    "paper": (*BIDIRECTIONAL, "model.mlm_weight=0.2", "model.mlm_share=0.2"),
    "paper, sampled, no content": (
        *BIDIRECTIONAL,
        "model.mlm_weight=0.2",
        "candidates.kind=sampled",
        "candidates.count=10",
        "model.content=[]",
    ),
    "overlapping windows": ("sequences.requests=2", "optimizer.schedule=cosine", "optimizer.warmup_steps=3"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "data"
    write_world(folder, rights=True)
    return folder


def fit(trainer: Trainer, epochs: int) -> list[float]:
    """Mean loss per target of every epoch."""
    losses = []
    trainer.model.train()
    for epoch in range(epochs):
        total = targets = 0.0
        for batch in Loader(trainer.builder, seed=0, epoch=epoch):
            taken = trainer.stepper.step(batch, 1.0)
            total, targets = total + taken.loss, targets + taken.requests
        losses.append(total / targets)
    return losses


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_learns_and_can_be_evaluated(data: Path, tmp_path: Path, name: str) -> None:
    with world("cpu") as place:
        trainer = Trainer(tiny_config(data, tmp_path / "run", "optimizer.lr=0.01", *BRANCHES[name]), place)
        losses = fit(trainer, epochs=6)
        metrics, _ = trainer.validate()
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    assert 0 <= metrics["ndcg@10"] <= metrics["hr@10"] <= 1


@pytest.mark.parametrize("candidates", [("full",), ("sampled", "candidates.count=15")], ids=["full", "sampled"])
def test_ten_users_are_learnt_by_heart(tmp_path: Path, candidates: tuple[str, ...]) -> None:
    """HR@1 on the training targets near 1: data, model, loss and optimizers work together."""
    dataset = write_world(tmp_path / "data", users=12, longest=8, split="leave-last-out")
    kind, *count = candidates
    settings = (f"candidates.kind={kind}", *count, "optimizer.lr=0.01", "optimizer.table_lr=0.2")
    with world("cpu") as place:
        trainer = Trainer(tiny_config(tmp_path / "data", tmp_path / "run", *settings), place)
        fit(trainer, epochs=50)
        trainer.twin.update(whole_state(trainer.model, place.device))
        split = np.asarray(dataset.event_array("split"))
        user = np.repeat(np.arange(12), np.diff(dataset.offsets))
        last = np.array([np.flatnonzero((split == 0) & (user == u))[-1] for u in range(1, 12)])
        first = dataset.offsets[1:12]
        start = np.maximum(first, last - trainer.config.sequences.history)
        batch = trainer.builder.build(Windows(start, last, start), None)
        query_PQ = trainer.twin.forward(batch).query_PQ
        best_P = (query_PQ @ trainer.twin.key_NQ.T).argmax(-1)
    assert len(best_P) == len(batch.target_P) >= 25
    assert float((best_P == batch.target_P).float().mean()) > 0.95


# ---- a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A finished run and what `train` returned."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(data, folder, "training.epochs=4", "training.log_every=1", *DROPS)
    return folder, train(config)


def lines(run: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_run_leaves_its_files(run: tuple[Path, dict[str, float]], data: Path) -> None:
    folder, _ = run
    files = {".lock", "best", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == files
    assert {path.name for path in (folder / "best").iterdir()} == {"checkpoint.json", "weights.safetensors"}
    assert any((folder / "tensorboard").iterdir())
    config = RunConfig.read(folder / "config.yaml")
    assert config == tiny_config(data, folder, "training.epochs=4", "training.log_every=1", *DROPS)


def test_metrics_follow_the_steps_and_tell_the_models_health(run: tuple[Path, dict[str, float]]) -> None:
    folder, _ = run
    steps = lines(folder, "train")
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert [record["epoch"] for record in lines(folder, "valid")] == [0, 1, 2, 3]
    for record in steps:
        assert math.isfinite(record["loss"])
        assert record["targets_per_second"] > 0
        # Two shared experts and one for region and plan each; their mean gate weights add up to 1.
        load = [record[f"expert_load/id/{expert}"] for expert in range(4)]
        assert sum(load) == pytest.approx(1, abs=1e-5)
        assert 0 <= record["expert_entropy/id"] <= 1
        assert -1 <= record["interest_similarity"] <= 1
        assert 0 < record["gate/all"] < 1
    assert any(key.startswith("gate/region=r") for key in steps[0])


def test_best_checkpoint_is_the_best_validation(run: tuple[Path, dict[str, float]]) -> None:
    folder, returned = run
    validations = lines(folder, "valid")
    record = read_record(folder)
    assert record["valid"] == returned
    assert record["valid"]["ndcg@10"] == max(line["ndcg@10"] for line in validations)
    best = next(line for line in validations if line["ndcg@10"] == record["valid"]["ndcg@10"])
    assert (best["step"], best["epoch"]) == (record["step"], record["epoch"])


def test_predictor_measures_what_training_recorded(run: tuple[Path, dict[str, float]]) -> None:
    folder, returned = run
    predictor = Predictor.load(folder, "cpu")
    overall = evaluate(predictor.dataset, [predictor], split="valid", bootstrap=0)["models"]["m5"]["overall"]
    for metric, value in returned.items():
        assert overall[metric] == pytest.approx(value, abs=1e-6), metric


def test_same_seed_same_run(run: tuple[Path, dict[str, float]], data: Path, tmp_path: Path) -> None:
    folder, returned = run
    settings = ("training.epochs=4", "training.log_every=1", *DROPS)
    assert train(tiny_config(data, tmp_path / "again", *settings)) == returned
    losses = [[record["loss"] for record in lines(path, "train")] for path in (folder, tmp_path / "again")]
    assert losses[0] == losses[1]
    train(tiny_config(data, tmp_path / "other", "seed=1", *settings))
    assert losses[0] != [record["loss"] for record in lines(tmp_path / "other", "train")]


def test_training_stops_early_and_replaces_an_earlier_run(data: Path, tmp_path: Path) -> None:
    """Rates of zero length in effect: the second validation cannot be better, so patience 1 ends the run there."""
    still = ("optimizer.lr=1e-12", "optimizer.table_lr=1e-12", "optimizer.expert_lr=1e-12")
    settings = ("training.epochs=9", "training.patience=1", *still)
    (tmp_path / "run").mkdir()
    config = tiny_config(data, tmp_path / "run", *settings)
    for resume in ("no", "over"):
        train(config, resume=resume)
        assert [record["epoch"] for record in lines(tmp_path / "run", "valid")] == [0, 1]
    assert read_record(tmp_path / "run")["epoch"] == 0
    with pytest.raises(ConfigError, match=r"holds a finished training\. .*--restart"):
        train(config)


def test_evaluate_every(data: Path, tmp_path: Path) -> None:
    train(tiny_config(data, tmp_path / "run", "training.epochs=5", "training.evaluate_every=2"))
    assert [record["epoch"] for record in lines(tmp_path / "run", "valid")] == [1, 3, 4]


def test_a_foreign_folder_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    with pytest.raises(ConfigError, match="not a run of m5"):
        train(tiny_config(data, tmp_path / "thesis"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


# ---- what goes wrong -------------------------------------------------------------------------------------------


def test_checkpoint_of_another_dataset_is_refused(run: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    other = write_world(tmp_path / "data", seed=1).manifest
    with pytest.raises(DataError, match="was trained on a dataset with content hash"):
        load_weights(run[0], other)


def test_damaged_checkpoint_is_refused(run: tuple[Path, dict[str, float]], data: Path, tmp_path: Path) -> None:
    manifest = PreparedDataset(data).manifest
    state = load_weights(run[0], manifest)
    save_weights(tmp_path, state, manifest, {})
    assert all(torch.equal(value, state[name]) for name, value in load_weights(tmp_path, manifest).items())
    weights = tmp_path / "best" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        load_weights(tmp_path, manifest)


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(
    run: tuple[Path, dict[str, float]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = PreparedDataset(data).manifest
    state = load_weights(run[0], manifest)
    save_weights(tmp_path, state, manifest, {"step": 1})

    def full_disk(tensors, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(best, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tmp_path, state, manifest, {"step": 2})
    assert read_record(tmp_path)["step"] == 1
    assert load_weights(tmp_path, manifest).keys() == state.keys()


def test_a_run_without_checkpoint_says_so(data: Path, tmp_path: Path) -> None:
    tiny_config(data, tmp_path).write(tmp_path / "config.yaml")
    with pytest.raises(DataError, match="has no checkpoint"):
        Predictor.load(tmp_path, "cpu")
    with pytest.raises(ConfigError, match="is not a run"):
        Predictor.load(tmp_path / "nowhere", "cpu")


def test_non_finite_loss_ends_the_run(tmp_path: Path) -> None:
    write_world(tmp_path / "data")
    path = tmp_path / "data" / "content" / "graph.npy"
    np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(ConfigError, match=r"diverged: the loss is nan at step 0 .*lower optimizer\.lr"):
        train(tiny_config(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run" / "best").exists()


def test_missing_content_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    write_world(tmp_path / "data")
    (tmp_path / "data" / "content" / "graph.npy").unlink()
    with pytest.raises(DataError, match=r"graph\.npy is missing.*m5 graph"):
        train(tiny_config(tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize("part", ["train", "valid"])
def test_an_empty_split_is_told_before_training(tmp_path: Path, part: str) -> None:
    dataset = write_world(tmp_path / "data")
    counts = dataset.manifest.split_counts | {part: 0}
    dataset.manifest.model_copy(update={"split_counts": counts}).write(tmp_path / "data")
    with pytest.raises(DataError, match=r"no event lies in the (training|validation) period"):
        train(tiny_config(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unknown_metric_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.metric: String should match"):
        train(tiny_config(data, tmp_path / "run", "training.metric=hr@11"))


# ---- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=64", "there is no setting 'model.widht'. Did you mean model.width"),
        ("epochs=3", "there is no setting 'epochs'. Did you mean training.epochs"),
        ("model=64", "there is no setting 'model'"),
        ("model.width", "not of the form key.sub=value"),
        ("model.width=wide", "model.width: Input should be a valid integer"),
        ("model.width=6", "model.width: Input should be a multiple of 4"),
        ("model.width=36 ", ""),
        ("model.heads=5", "must be a multiple of 2 x model.heads=5"),
        ("model.mixing=moe", "model.mixing: Input should be 'smoe', 'mmoe' or 'mlp'"),
        ("model.content=[poster]", "model.content"),
        ("model.attention=bidirectional", "needs sequences.requests=1"),
        ("model.mlm_weight=0.2", "needs model.attention=bidirectional"),
        ("sequences.requests=101", "at most sequences.history"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0"),
        ("optimizer.accumulation=2", "steps inside every backward"),
        ("sharding.default=data_parallel", "Input should be 'auto', 'row_wise'"),
        ("sharding.tables={title: diagonal}", "Input should be 'row_wise'"),
        ("training.stall_seconds=0", "training.stall_seconds: Input should be greater than 0"),
        ("training.pipeline=sometimes", "training.pipeline"),
    ],
)
def test_wrong_settings_are_told(override: str, message: str, tmp_path: Path) -> None:
    if not message:
        assert load_config("default", [override], tmp_path, tmp_path).model.width == 36
        return
    with pytest.raises(ConfigError) as caught:
        load_config("default", [override], tmp_path, tmp_path)
    assert message in str(caught.value)
    assert override.strip() in str(caught.value)


def test_unknown_preset_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no preset 'papr'\. Presets: .*default.*paper"):
        load_config("papr", [], tmp_path, tmp_path)


@pytest.mark.parametrize("preset", ["default", "demo", "ml1m", "paper"])
def test_presets_are_valid_and_survive_being_written(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, ["seed=7"], tmp_path / "data", tmp_path / "run")
    assert (config.preset, config.seed) == (preset, 7)
    config.write(tmp_path / "config.yaml")
    assert RunConfig.read(tmp_path / "config.yaml") == config


def test_schedule_as_arithmetic(tmp_path: Path) -> None:
    settings = ("optimizer.warmup_steps=4", "optimizer.schedule=cosine", "optimizer.final_lr=0.1")
    config = tiny_config(tmp_path, tmp_path, *settings, "training.max_minutes=1")
    schedule = Schedule(config, total_steps=100)
    assert schedule.factor(0, 0) == pytest.approx(1 / 4)
    assert schedule.factor(50, 0) == pytest.approx(0.1 + 0.9 * 1 / 2)
    assert schedule.factor(100, 0) == pytest.approx(0.1)
    assert schedule.factor(10, 30) == pytest.approx(0.1 + 0.9 * 1 / 2)  # half the minute is over before half the steps
    assert schedule.progress(10, 600) == 1
    constant = Schedule(tiny_config(tmp_path, tmp_path, "optimizer.warmup_steps=4"), total_steps=100)
    assert [constant.factor(step, 0) for step in (1, 3, 99)] == [2 / 4, 1, 1]
