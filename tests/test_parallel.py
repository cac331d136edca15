"""Sharding changes nothing: 2 and 4 ranks equal 1 rank, and one sharded step equals a plain one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.invariance import difference, train_some, whole
from m5.assemble import build_model, initial_rows, rows_per_seed
from m5.config import ConfigError, RunConfig
from m5.data.loader import Loader
from m5.library_warnings import silence_known
from m5.model.multi_scenario_mixing import expert_table_shape
from m5.parallel import World, training_state, whole_state, world
from m5.predict import Predictor
from m5.train import Trainer, training_model
from tests import reference
from tests.world import tiny_config, write_world

STEPS = 4
DROPS = ("model.dropout=0.2", "model.id_dropout=0.2", "model.scenario_dropout=0.2")
PAPER = ("model.attention=bidirectional", "sequences.requests=1", "model.mlm_weight=0.5", "model.mlm_share=0.3")
# All with rights, chance left on, and batches of seven: ranks get unequal parts.
VARIANTS = {
    "smoe": DROPS,
    "sampled": (*DROPS, "candidates.kind=sampled", "candidates.count=10", "model.score=dot"),
    "in-batch": (*DROPS, "candidates.kind=in-batch"),
    "masked titles": (*DROPS, *PAPER, "candidates.kind=sampled", "candidates.count=10"),
    "fewer sequences than ranks": (*DROPS, "sequences.sequences=3"),
    "pipeline": (*DROPS, "training.pipeline=true"),
    "compiled": (*DROPS, "training.compile=true"),
    "mmoe": ("model.mixing=mmoe",),
    "id only": ("model.content=[]",),
    "table-wise": ("sharding.default=table_wise", "sharding.tables={title: row_wise}"),
}
MASKED = ("model.attention=bidirectional", "sequences.requests=1", "model.mlm_weight=0.5", "model.mlm_share=0.05")


def few_steps(config: RunConfig, place: World) -> dict:
    """First tables, and losses, gradients, sums of the tables' optimizer and weights of the first steps."""
    trainer = Trainer(config, place)
    first = whole(training_state(trainer.model, trainer.stepper.optimizer, trainer.stepper.dense))
    return {"first": first} | train_some(config, place, STEPS)


def variant_config(folder: Path, name: str) -> RunConfig:
    return tiny_config(folder / "data", folder / "run", "sequences.sequences=7", *VARIANTS[name])


def _rank(rank: int, size: int, folder: Path) -> None:
    """What each of the processes runs."""
    silence_known()
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    place = World(rank, size, torch.device("cpu"))
    names = [name for name in VARIANTS if size == 2 or name != "compiled"]  # compiling takes long
    answers = {name: few_steps(variant_config(folder, name), place) for name in names}
    if size == 2:
        masked = tiny_config(folder / "data", folder / "run", "sequences.sequences=4", *MASKED)
        answers["masked"] = few_steps(masked, place)["loss"]["loss"]
        run = tiny_config(folder / "data", folder / "two", "training.epochs=2")
        answers["metrics"] = Trainer(run, place).run()
        answers["refused"] = refusals(folder, place)
    if rank == 0:
        torch.save(answers, folder / f"{size}.pt")
    dist.destroy_process_group()


def refusals(folder: Path, place: World) -> dict[str, str]:
    """What this rank is told where ranks were given different things, or one of them cannot go on."""
    told = {}
    other = tiny_config(folder / "data", folder / "run", f"optimizer.lr=0.00{1 + place.rank}")
    unknown = tiny_config(folder / "data", folder / "run", "sharding.tables={titel: row_wise}")
    (folder / "foreign").mkdir(exist_ok=True)
    (folder / "foreign" / "thesis.tex").touch()
    foreign = tiny_config(folder / "data", folder / "foreign")
    for name, config in {"settings": other, "table": unknown, "folder": foreign}.items():
        try:
            Trainer(config, place).run()
        except ConfigError as error:
            told[name] = str(error)
    everyone: list = [None] * place.size
    dist.all_gather_object(everyone, told)
    assert everyone[0] == everyone[1]
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    write_world(folder / "data", users=30, rights=True)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[int, dict]:
    """All variants on two and on four processes, started once."""
    for size in (2, 4):
        multiprocessing.spawn(_rank, args=(size, folder), nprocs=size)
    return {size: torch.load(folder / f"{size}.pt") for size in (2, 4)}


@pytest.fixture(scope="module")
def two_ranks(ranks: dict[int, dict]) -> dict:
    return ranks[2]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_any_number_of_ranks_trains_the_same(folder: Path, ranks: dict[int, dict], name: str, size: int) -> None:
    """Same first values; same losses, gradients, optimizer sums and weights afterwards, with the real optimizers."""
    if name not in ranks[size]:
        pytest.skip("compiled on two ranks only")
    with world("cpu") as place:
        alone = few_steps(variant_config(folder, name), place)
    others = ranks[size][name]
    assert difference(alone["first"], others["first"]) == (0.0, "")
    assert len(alone["loss"]["loss"]) == STEPS
    for quantity, tolerance in (("loss", 1e-5), ("gradients", 1e-4)):
        found, where = difference(alone[quantity], others[quantity])
        assert found < tolerance, f"{quantity}: {where}"
    for key, value in alone["weights"].items():
        # A hundredth of AdamW's steps here: a weight that has hardly moved yet is nearly all rounding.
        torch.testing.assert_close(others["weights"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    moved = [key for key, value in alone["weights"].items() if not torch.equal(value, alone["first"][key])]
    assert any("experts_" in key for key in moved) == (name != "mmoe")
    assert any(key.endswith("title.weight") for key in moved)


def test_what_ranks_cannot_agree_on_is_refused_on_all(two_ranks: dict) -> None:
    told = two_ranks["refused"]
    assert "optimizer.lr is 0.001 on rank 0 and 0.002 on rank 1" in told["settings"]
    assert "no table titel. Tables: title, age" in told["table"]
    assert "not a run of m5" in told["folder"]


def test_ranks_without_a_masked_title_go_on(two_ranks: dict) -> None:
    """Few titles are masked, so some rank has none in some step: its missing loss term must not stop the others."""
    assert len(two_ranks["masked"]) == STEPS
    assert torch.isfinite(two_ranks["masked"]).all()


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
    first, rows = rows_per_seed(4) - 3, 6
    whole = initial_rows("title", 0, rows_per_seed(4) + 5, 4, seed=0, expert=None)
    part = initial_rows("title", first, rows, 4, seed=0, expert=None)
    assert torch.equal(part, whole[first : first + rows])
    assert not torch.equal(part, initial_rows("title", first, rows, 4, seed=1, expert=None))
    assert not torch.equal(part, initial_rows("age", first, rows, 4, seed=0, expert=None))


def test_first_values_of_experts() -> None:
    """W_1 of std 1 / sqrt(I), a zero bias, W_2 a tenth of 1 / sqrt(H); also where a shard starts inside an expert."""
    input_width, output_width, hidden = 100, 50, 64
    expert = input_width, input_width + 1 + output_width, hidden
    height, width = expert_table_shape(input_width=input_width, hidden=hidden, output_width=output_width)
    assert height * width == expert[1] * hidden and width > hidden
    rows = initial_rows("experts_id_region", 0, 2 * height, width, seed=0, expert=expert)
    first, bias, second = rows[:height].view(-1, hidden).split([input_width, 1, output_width])
    assert float(first.std()) == pytest.approx(1 / 100**0.5, rel=0.05)
    assert not bias.any()
    assert float(second.std()) == pytest.approx(0.1 / 64**0.5, rel=0.05)
    tail = initial_rows("experts_id_region", height - 7, height, width, seed=0, expert=expert)
    assert torch.equal(tail, rows[height - 7 : 2 * height - 7])
