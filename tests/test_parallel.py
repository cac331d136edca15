"""Sharding changes nothing: 2 ranks equal 1 rank, and one sharded step equals a plain one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from m5.assemble import ROWS_PER_SEED, build_model, initial_rows
from m5.config import RunConfig
from m5.data.loader import Loader
from m5.parallel import World, whole_state, world
from m5.predict import Predictor
from m5.train import Trainer, training_model
from tests import reference
from tests.world import tiny_config, write_world

STEPS = 4
# Everything that draws per request or per element is off: ranks share only what is drawn once per batch.
VARIANTS = {
    "smoe": ("model.id_dropout=0.3",),
    "sampled": ("candidates.kind=sampled", "candidates.count=10", "model.id_dropout=0.2", "model.score=dot"),
    "mmoe": ("model.mixing=mmoe",),
    "id only": ("model.content=[]",),
}
MASKED = ("model.attention=bidirectional", "sequences.requests=1", "model.mlm_weight=0.5", "model.mlm_share=0.05")


def few_steps(config: RunConfig, place: World) -> dict:
    """First tables, losses summed over the ranks, and all weights after some steps of plain gradient descent.

    Adam would blow rounding differences of vanishing gradients up to full steps.
    """
    trainer = Trainer(config, place)
    stepper = trainer.stepper
    stepper.optimizer = torch.optim.SGD(stepper.dense.values(), lr=config.optimizer.lr)
    first = {name: value.clone() for name, value in whole_state(trainer.model, place.device).items()}
    losses: list[float] = []
    trainer.model.train()
    for batch in Loader(trainer.builder, seed=0, epoch=0, rank=place.rank, world_size=place.size):
        losses.append(stepper.step(batch, 1.0).loss)
        if len(losses) == STEPS:
            break
    return {"first": first, "losses": losses, "last": whole_state(trainer.model, place.device)}


def variant_config(folder: Path, name: str) -> RunConfig:
    return tiny_config(folder / "data", folder / "run", "sequences.sequences=7", "optimizer.lr=0.1", *VARIANTS[name])


def _rank(rank: int, folder: Path, results: Path) -> None:
    """What each of the two processes runs."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}.store", rank=rank, world_size=2)
    place = World(rank, 2, torch.device("cpu"))
    answers = {name: few_steps(variant_config(folder, name), place) for name in VARIANTS}
    masked = tiny_config(folder / "data", folder / "run", "sequences.sequences=4", *MASKED)
    answers["masked"] = few_steps(masked, place)["losses"]
    run = tiny_config(folder / "data", folder / "two", "training.epochs=2")
    answers["metrics"] = Trainer(run, place).run()
    if rank == 0:
        torch.save(answers, results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    write_world(folder / "data", users=30, rights=True)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict:
    """All variants on two processes, started once."""
    results = folder / "two_ranks.pt"
    multiprocessing.spawn(_rank, args=(folder, results), nprocs=2)
    return torch.load(results)


def assert_states_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(folder: Path, two_ranks: dict, name: str) -> None:
    """Same first values of all tables, same losses, same weights afterwards."""
    with world("cpu") as place:
        alone = few_steps(variant_config(folder, name), place)
    assert_states_close(alone["first"], two_ranks[name]["first"], tolerance=0)
    assert len(alone["losses"]) == STEPS
    assert alone["losses"] == pytest.approx(two_ranks[name]["losses"], rel=1e-4)
    assert_states_close(alone["last"], two_ranks[name]["last"], tolerance=2e-4)
    moved = [key for key, value in alone["first"].items() if not torch.equal(value, alone["last"][key])]
    assert any("experts_" in key for key in moved) == (name != "mmoe")
    assert any(key.endswith("title.weight") for key in moved)


def test_ranks_without_a_masked_title_go_on(two_ranks: dict) -> None:
    """Few titles are masked, so some rank has none in some step: its missing loss term must not stop the others."""
    assert len(two_ranks["masked"]) == STEPS
    assert all(torch.isfinite(torch.tensor(two_ranks["masked"])))


def test_a_run_of_two_ranks_leaves_a_checkpoint_for_one(folder: Path, two_ranks: dict) -> None:
    model = Predictor.load(folder / "two", "cpu")
    assert model.key_NQ.shape == (30, 32)
    with world("cpu") as place:
        metrics = Trainer(tiny_config(folder / "data", folder / "one", "training.epochs=2"), place).run()
    assert two_ranks["metrics"].keys() == metrics.keys()
    assert two_ranks["metrics"]["ndcg@10"] == pytest.approx(metrics["ndcg@10"], abs=0.05)


@pytest.mark.parametrize("name", ["smoe", "sampled"])
def test_sharded_equals_plain_after_one_step(folder: Path, name: str) -> None:
    """One step against autograd through plain tables, plain gradients and a row-wise Adagrad in loops."""
    config = variant_config(folder, name)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"clip": 1e9})})
    with world("cpu") as place:
        trainer = Trainer(config, place)
        plain = training_model(trainer.dataset, config, build_model(trainer.dataset, config))
        plain.model.load_state_dict(whole_state(trainer.model, place.device))
        batch = next(iter(Loader(trainer.builder, seed=0, epoch=0)))
        loss, _ = plain(batch)
        (loss / batch.request_P.numel()).backward()
        assert trainer.stepper.step(batch, 1.0).loss == pytest.approx(float(loss), rel=1e-5)
        dense = dict(plain.named_parameters())
        compared = 0
        for key, parameter in trainer.stepper.dense.items():
            torch.testing.assert_close(parameter.grad, dense[key].grad, rtol=1e-4, atol=1e-6, msg=key)
            compared += 1
        after = whole_state(trainer.model, place.device)
        for key, parameter in plain.model.named_parameters():
            if "embeddings." not in key:
                continue
            rate = config.optimizer.expert_lr if "experts_" in key else config.optimizer.table_lr
            expected, _ = reference.row_wise_adagrad(
                parameter.detach().double(), torch.zeros(len(parameter)), parameter.grad.double(), rate
            )
            torch.testing.assert_close(after[key].double(), expected, rtol=1e-4, atol=1e-4, msg=key)
            compared += 1
    assert compared == len(dense)


def test_first_rows_do_not_depend_on_the_cut() -> None:
    first, rows = ROWS_PER_SEED - 3, 6
    whole = initial_rows("title", 0, ROWS_PER_SEED + 5, 4, seed=0, expert=None)
    part = initial_rows("title", first, rows, 4, seed=0, expert=None)
    assert torch.equal(part, whole[first : first + rows])
    assert not torch.equal(part, initial_rows("title", first, rows, 4, seed=1, expert=None))
    assert not torch.equal(part, initial_rows("age", first, rows, 4, seed=0, expert=None))


def test_first_values_of_experts() -> None:
    """W_1 of std 1 / sqrt(I), a zero bias, W_2 a tenth of 1 / sqrt(H); also where a shard starts inside an expert."""
    input_width, output_width, hidden = 100, 50, 64
    height = input_width + 1 + output_width
    rows = initial_rows("experts_id_region", 0, 2 * height, hidden, seed=0, expert=(input_width, height))
    first, bias, second = rows[:height].split([input_width, 1, output_width])
    assert float(first.std()) == pytest.approx(1 / 100**0.5, rel=0.05)
    assert not bias.any()
    assert float(second.std()) == pytest.approx(0.1 / 64**0.5, rel=0.05)
    tail = initial_rows("experts_id_region", height - 7, height, hidden, seed=0, expert=(input_width, height))
    assert torch.equal(tail, rows[height - 7 : 2 * height - 7])
