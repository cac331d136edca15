"""Every benchmark runs, for a few seconds and at tiny sizes, and leaves its page. Nothing here asserts on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Promise, Report, Spread
from benchmarks.run import benchmarks, run_benchmark
from m5.config import ConfigError

ROOT = Path(__file__).parents[1]
# These are older than the harness, take minutes at any size, and have tests of their own.
WITHOUT_SMOKE = {"checkpoint_cost", "invariance", "soak", "table_memory"}
WITH_SMOKE = sorted(set(benchmarks()) - WITHOUT_SMOKE)


def test_all_that_the_readme_promises_are_there() -> None:
    promised = {"step", "loader", "embedding", "smoe", "softmax", "history", "encode", "graph", "evaluate", "prepare"}
    assert promised | {"ladder", "scaling", "peers", "roofline"} <= set(WITH_SMOKE)


@pytest.mark.parametrize("name", WITH_SMOKE)
def test_smoke(name: str, tmp_path: Path) -> None:
    """In a process of its own: benchmarks set threads, start ranks and import much."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "M5_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--out", str(tmp_path / "out"), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page, record = next((tmp_path / "out").glob("*.md")), next((tmp_path / "out").glob("*.json"))
    assert f"benchmarks.{name} --smoke" in page.read_text()
    found = json.loads(record.read_text())
    assert found["rows"] and found["machine"]["versions"]["torch"]
    assert found["promises"] == []  # tiny sizes say nothing about speed
    assert next((tmp_path / "out").glob("*.png")).stat().st_size > 5_000


# ---- the harness ---------------------------------------------------------------------------------------------


def test_spread() -> None:
    assert Spread.of(range(11)) == Spread(5, 1.0, 9.0)
    assert Spread.rate(100, [1, 2, 4]).median == 50


def test_works_take_turns() -> None:
    turns: list[str] = []
    taken = harness.in_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=2, warm_up=0)
    assert turns == ["a", "b", "a", "b"]
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(("value", "at_least", "code"), [(2.0, True, 0), (0.5, True, 1), (2.0, False, 1)])
def test_a_broken_promise_is_told_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, at_least: bool, code: int
) -> None:
    def measure(options) -> Report:
        assert options.repeats == 3
        return Report("title", [{"what": "x", "value": Spread(1, 0, 2)}], promises=[Promise("p", value, 1.0, at_least)])

    given = ["--out", str(tmp_path), "--repeats", "3"]
    assert harness.run("benchmarks.tried", "doc", measure, given) == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)
    assert ("MISSED" in next(tmp_path.glob("*.md")).read_text()) == bool(code)
    assert harness.run("benchmarks.tried", "doc", measure, [*given, "--smoke"]) == 0


def test_a_users_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(options) -> Report:
        raise ConfigError("model.width must be so and so.")

    assert harness.run("benchmarks.tried", "doc", measure, ["--out", str(tmp_path)]) == 2
    assert "model.width must be so and so." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_figures_are_short() -> None:
    assert harness.cell(Spread(1234.5, 0.0123, 2)) == "1,234 (0.0123 - 2)"
    assert (harness.cell("x"), harness.cell(7), harness.cell(True)) == ("x", "7", "True")


def test_bench_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(None, []) == 0
    assert "softmax" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Did you mean softmax"):
        run_benchmark("sofmax", [])
