"""A search is checked before anything is started: its space, its settings, and the file that holds both."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from m5.cli import main
from m5.config import ConfigError, RunConfig, load_config
from tune.settings import read_plan
from tune.space import COMBINATIONS, Dice, field_types, read_space

RATE = {"loguniform": [1e-4, 1e-2]}
SPACES = sorted((Path(__file__).parents[1] / "tune" / "spaces").glob("*.yaml"))


def plan(tmp_path: Path, space: Any, *overrides: str, preset: str = "default", **sections: Any):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"space": space, **sections}))
    return read_plan(preset, file, list(overrides))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"model.widht": {"choice": [32]}}, r"there is no setting 'model\.widht'\. Did you mean model\.width"),
        ({"model.width": {"choices": [32]}}, "model.width: give one of choice, uniform, loguniform"),
        ({"model.width": {"choice": [32], "uniform": [32, 64]}}, "model.width: give one of"),
        ({"model.width": [32, 64]}, "model.width: give one of"),
        ({"model.width": {"choice": [32], "stepp": 2}}, "unknown key stepp; there are choice"),
        ({"model.width": {"choice": []}}, "at least one value"),
        ({"model.width": {"choice": [32, 32]}}, "has a value twice"),
        ({"model.width": {"choice": [32, 64], "step": 32}}, "step has no meaning beside choice"),
        ({"model.width": {"choice": ["wide", 64]}}, r'model\.width: "wide": .*integer'),
        ({"model.width": {"choice": [32, 33]}}, r"model\.width: 33: .*multiple of 4"),
        ({"model.mixing": {"choice": ["smoe", "moe"]}}, r"model\.mixing: \"moe\": .*'smoe'"),
        ({"model.mixing": {"uniform": [0, 1]}}, "model.mixing: uniform needs a setting that is a number"),
        ({"model.subsidiary": {"uniform": [0, 1]}}, "uniform needs a setting that is a number"),
        ({"model.dropout": {"uniform": [0.0, 1.5]}}, r"model\.dropout: 1\.5: .*less than 1"),
        ({"model.dropout": {"uniform": [0.5, 0.1]}}, r"0\.5 to 0\.1 is no range"),
        ({"model.dropout": {"uniform": [0.1, 0.1]}}, "is no range"),
        ({"model.dropout": {"uniform": [0.1]}}, "must be two numbers"),
        ({"model.dropout": {"uniform": [0.1, "much"]}}, "must be two numbers"),
        ({"model.dropout": {"uniform": [0.0, math.inf]}}, "must be two numbers"),
        ({"model.dropout": {"uniform": [False, True]}}, "must be two numbers"),
        ({"model.dropout": {"uniform": [0.0, 0.5], "step": 0.2}}, r"steps of 0\.2 do not reach 0\.5"),
        ({"model.dropout": {"uniform": [0.0, 0.5], "step": 0.6}}, r"step 0\.6 does not fit"),
        ({"model.blocks": {"uniform": [1, 2.5]}}, "is a whole number"),
        ({"optimizer.lr": {"choice": ["0.001", "0.002"]}}, r'lr: "0.001" is str, .* is float. YAML reads 1e-3 as text'),
        ({"model.blocks": {"choice": [True, 2]}}, r"blocks: true is bool, and the setting is int"),
        ({"model.dropout": {"choice": [0, 0.0]}}, "has a value twice"),
        ({"optimizer.lr": {"choice": [date(2024, 1, 1)]}}, "has a value that no setting takes, such as a date"),
        (
            {"model.mixing": {"choice": ["smoe", "mlp"]}, "optimizer.expert_lr": RATE | {"when": {"model.mixing": []}}},
            "when has no value under which it holds",
        ),
        ({"optimizer.lr": {"loguniform": [0, 0.1]}}, "loguniform begins above 0"),
        ({"optimizer.lr": {"loguniform": [1e-4, 1e-2], "step": 1e-4}}, "step has no meaning beside loguniform"),
        ({"seed": {"choice": [1, 2]}}, "seed is not searched: trials share one"),
        ({"training.metric": {"choice": ["hr@10"]}}, "training.metric is not searched"),
        ({}, "`space` must map settings"),
        ({"optimizer.expert_lr": RATE | {"when": {"model.mixing": "smoe"}}}, "`when` needs a `choice` of the space"),
        ({"optimizer.expert_lr": RATE | {"when": "smoe"}}, "when must map settings to values"),
        (
            {
                "model.mixing": {"choice": ["smoe", "mlp"]},
                "optimizer.expert_lr": RATE | {"when": {"model.mixing": "moe"}},
            },
            "is moe, which is none of its choices",
        ),
        (
            {
                "model.mixing": {"choice": ["smoe", "mlp"], "when": {"model.score": "dot"}},
                "model.score": {"choice": ["dot", "cosine"], "when": {"model.mixing": "mlp"}},
            },
            "round in a circle",
        ),
        # expert_lr has an effect with smoe alone: without a condition, mlp could never be tried.
        (
            {"model.mixing": {"choice": ["smoe", "mlp"]}, "optimizer.expert_lr": RATE},
            'mixing="mlp" is refused in every',
        ),
        # Ten combinations, all refused: the default history is 100.
        ({"sequences.requests": {"uniform": [101, 110]}}, "is refused in every combination"),
    ],
)
def test_a_mistake_in_the_space_is_said(tmp_path: Path, space: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        plan(tmp_path, space)
    assert "space.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "overrides", "said"),
    [
        ({"search": {"trails": 3}}, (), r"search\.trails"),
        ({"search": {"trials": 0}}, (), r"search\.trials"),
        ({"serach": {}}, (), "serach"),
        (
            {"settings": {"model.blokcs": 1}},
            (),
            "settings: there is no setting 'model.blokcs'. Did you mean model.blocks",
        ),
        ({"settings": {"model.blocks": -1}}, (), r"model\.blocks"),
        ({"settings": {"optimizer.lr": 0.1}}, (), "optimizer.lr is in the space .* and fixed"),
        ({"search": {"final": {"model.blokcs": 1}}}, (), "search.final: there is no setting 'model.blokcs'"),
        ({"search": {"final": {"optimizer.lr": 1.0}}}, (), "which the winner is to have as it was found"),
        ({"search": {"final": {"training.threads": 4}}}, (), "training.threads is decided by trial.cpus"),
        ({"search": {"final": {"model.blocks": -1}}}, (), "search.final: model.blocks"),
        ({}, ("optimizer.lr=0.1",), "optimizer.lr is in the space .* and fixed"),
        ({}, ("training.threads=4",), "training.threads is decided by trial.cpus"),
        ({}, ("search.trails=3",), "there is no 'search.trails'; search has search.trials"),
        ({}, ("search.trials=many",), r"search\.trials"),
        ({"search": None}, ("search.trials=4",), "`search` of the file holds no settings"),
        ({}, ("trial.gpus=0.5", "trial.ranks=2"), "ranks of one world cannot share a GPU"),
        ({"objective": {"kind": "pareto"}, "search": {"scheduler": "asha"}}, (), "ends trials by quality alone"),
        ({"objective": {"kind": "pareto", "measures": ["quality"]}}, (), "two or three"),
        ({"objective": {"tolerance": 0.1}}, (), "only with objective.kind=constrained"),
        ({"search": {"scheduler": "median", "reduction": 4}}, (), "only with search.scheduler=asha"),
        ({"search": {"sampler": "random", "random_trials": 4}}, (), "only with search.sampler=tpe"),
    ],
)
def test_a_mistake_in_the_search_is_said(tmp_path: Path, sections: dict, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, {"optimizer.lr": RATE}, *overrides, **sections)


def test_a_mistake_shows_before_torch_and_ray_are_imported(tmp_path: Path) -> None:
    """So that it shows in a second; and through the command line, with its exit code."""
    (tmp_path / "space.yaml").write_text("space: {model.widht: {choice: [32]}}")
    options = ["--data", "no", "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path / "out")]
    script = (
        "import sys; from m5.cli import main\n"
        f"code = main({['tune', *options]})\n"
        "assert not {'torch', 'ray', 'optuna'} & set(sys.modules), 'imported too early'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Did you mean model.width" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_or_no_yaml_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="does not exist; give a YAML file"):
        read_plan("default", tmp_path / "none.yaml", [])
    (tmp_path / "bad.yaml").write_text("space: {")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_plan("default", tmp_path / "bad.yaml", [])
    (tmp_path / "good.yaml").write_text("space: {optimizer.lr: {loguniform: [1e-4, 1e-2]}}")
    assert read_plan("default", tmp_path / "good.yaml", []).space.parameters["optimizer.lr"].low == 1e-4
    code = main(["tune", "--data", str(tmp_path), "--space", str(tmp_path / "good.yaml"), "--out", str(tmp_path / "o")])
    assert code == 2
    assert "manifest.json" in capsys.readouterr().err


CONDITIONAL = {
    "model.mixing": {"choice": ["smoe", "mlp"]},
    "optimizer.expert_lr": {"loguniform": [0.002, 0.2], "when": {"model.mixing": "smoe"}},
    "model.blocks": {"uniform": [1, 4]},
    "model.dropout": {"uniform": [0.0, 0.5], "step": 0.05},
    "model.content": {"choice": [["graph"], ["graph", "text"], []]},
}


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_what_is_drawn_lies_in_the_space_and_is_a_configuration(seed: int) -> None:
    space = read_space(CONDITIONAL, "here")
    values = space.draw(Dice(seed))
    assert ("optimizer.expert_lr" in values) == (values["model.mixing"] == "smoe")
    assert isinstance(values["model.blocks"], int)
    assert all(space.parameters[name].holds(value) for name, value in values.items())
    from m5.config import changed, preset_settings, validated

    config = validated(changed(preset_settings("default"), values | {"data": "d", "out": "o"}), "here")
    from m5.resume import all_settings

    assert space.of(all_settings(config)) == values


def test_values_outside_are_told_apart() -> None:
    space = read_space(CONDITIONAL, "here")
    dropout, blocks = space.parameters["model.dropout"], space.parameters["model.blocks"]
    assert all(dropout.holds(value) for value in (0.0, 6 * 0.05, 10 * 0.05))
    assert not any(dropout.holds(value) for value in (0.17, 0.55, "0.1", None))
    assert [blocks.holds(value) for value in (1, 4, 5)] == [True, True, False]
    assert (
        space.parameters["optimizer.expert_lr"].describe() == "loguniform from 0.002 to 0.2, when model.mixing is smoe"
    )


def test_combinations_that_are_refused_are_left_out_and_counted(tmp_path: Path) -> None:
    """Width 36 goes with two heads (36 = 9 x 4), not with eight."""
    made = plan(tmp_path, {"model.width": {"choice": [32, 36]}, "model.heads": {"choice": [2, 8]}})
    assert made.refused is not None
    assert made.refused.share == 1 / 4
    assert "model.width=36 must be a multiple of 2 x model.heads=8" in made.refused.example
    assert made.space.size() == 4


def test_a_large_space_is_looked_at_in_part(tmp_path: Path) -> None:
    made = plan(tmp_path, CONDITIONAL)
    assert made.refused is None
    assert made.space.size() is None
    assert len(list(made.space.combinations())) == COMBINATIONS


def test_a_trial_is_the_preset_with_its_values(tmp_path: Path) -> None:
    made = plan(
        tmp_path,
        {"optimizer.lr": RATE},
        "search.trials=7",
        "training.epochs=3",
        preset="demo",
        settings={"training.max_minutes": None, "training.epochs": 9},
        trial={"cpus": 2},
    )
    run = made.run({"optimizer.lr": 0.005}, seed=4, data="data", out=Path("out"))
    same = ["optimizer.lr=0.005", "seed=4", "training.epochs=3", "training.max_minutes=null"]
    assert run == load_config("demo", [*same, "training.threads=2", "training.device=cpu"], Path("data"), Path("out"))
    assert made.config.search.trials == 7
    assert isinstance(run, RunConfig)


def test_types_of_settings() -> None:
    assert field_types("model.blocks") == {int}
    assert field_types("training.max_minutes") == {float, type(None)}
    assert not field_types("model.mixing") & {int, float}


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_the_projects_own_spaces_are_in_order(path: Path) -> None:
    assert read_plan("demo" if path.stem == "demo" else "default", path, []).space.parameters
