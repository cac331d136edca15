"""The command line: the forms that others build on, exit codes, and one paragraph instead of a trace."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m5.cli import main, parse
from m5.config import ConfigError
from m5.schema import DataError


@pytest.mark.parametrize(
    "line",
    [
        "doctor",
        "synth --users 5000 --titles 1000 --events 200000 --seed 0 --out RAW",
        "prepare tables RAW/dataset.yaml --out DATA",
        "prepare movielens PATH --titles T.parquet --posters DIR --split leave-last-out --out DATA",
        "prepare globo CLICKS.parquet --out DATA --text MODEL --image MODEL --image-weights random",
        "encode DATA",
        "graph DATA",
        "train --preset P --data DATA --out RUN model.width=128 training.epochs=2",
        "evaluate RUN",
        "evaluate RUN --json FILE",
        "recommend RUN --user U",
        "recommend RUN --history 'title;title' --scenario region=US plan=ads -k 20",
        "demo",
    ],
)
def test_every_form_of_the_command_line_parses(line: str) -> None:
    assert callable(parse(shlex.split(line)).command)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "trian --data DATA --out RUN",
        "train --data DATA",
        "train --data DATA --out RUN --widht 3",
        "graph DATA model.width=1",
        "recommend RUN",
        "recommend RUN --user U --history T",
        "recommend RUN --user U -k 0",
        "synth --users -5 --out RAW",
        "synth --users many --out RAW",
        "prepare movielens PATH --split random --out DATA",
    ],
)
def test_a_wrong_form_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse(shlex.split(line))
    assert refusal.value.code == 2
    assert "usage: m5" in capsys.readouterr().err


def test_overrides_may_stand_between_options() -> None:
    options = parse(shlex.split("train model.width=8 --preset P a.b=1 c.d=2 --data DATA --out RUN e.f=3"))
    assert options.overrides == ["model.width=8", "a.b=1", "c.d=2", "e.f=3"]


def test_starting_is_cheap() -> None:
    """`m5 --help` and `m5 doctor` work where torch is broken: nothing heavy is imported before a command runs."""
    heavy = "{'torch', 'torchrec', 'pandas', 'transformers', 'data_prep'}"
    program = f"import sys, m5.cli; m5.cli.build_parser(); sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def raising(error: BaseException):
    def command(*arguments: Any, **settings: Any) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("events.csv: column ts is missing."), "events.csv: column ts is missing."),
        (ConfigError("there is no setting 'model.widht'."), "model.widht"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "RUN/x"), "RUN/x: No such file or directory."),
        (PermissionError(errno.EACCES, "Permission denied", "RUN"), "Check the permissions"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_2(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("m5.recommend.recommend", raising(error))
    assert main(["recommend", "RUN", "--user", "u"]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.startswith("m5: ")
    assert printed.count("\n") == 1


def test_interrupting_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("m5.recommend.recommend", raising(KeyboardInterrupt()))
    assert main(["recommend", "RUN", "--user", "u"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("CUDA error"), OSError(errno.EIO, "Input/output error")])
def test_bugs_keep_their_trace(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m5.recommend.recommend", raising(error))
    with pytest.raises(type(error)):
        main(["recommend", "RUN", "--user", "u"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prepare tables nowhere/dataset.yaml --out DATA", "nowhere/dataset.yaml"),
        ("prepare movielens ml-1m.zip --out DATA", "ml-1m.zip"),
        ("prepare globo clicks.parquet --out DATA", "clicks.parquet"),
        ("synth --titles 3 --out RAW", "titles"),
        ("encode DATA", "not a prepared dataset"),
        ("graph DATA", "not a prepared dataset"),
        ("train --data DATA --out RUN", "not a prepared dataset"),
        ("train --preset fast --data DATA --out RUN", "no preset 'fast'"),
        ("train --data DATA --out RUN model.widht=3", "Did you mean model.width"),
        ("evaluate RUN", "RUN"),
        ("evaluate RUN --row other", "NAME=VALUE"),
        ("recommend RUN --user U", "not a run"),
        ("recommend RUN --user U --scenario region", "NAME=VALUE"),
    ],
)
def test_real_mistakes_leave_nothing_behind(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_recommendation(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}
    monkeypatch.setattr("m5.recommend.recommend", lambda run, **settings: received.update(settings, run=run))
    assert main(["recommend", "RUN", "--history", "a;b", "--scenario", "region=US", "plan=ads", "-k", "5"]) == 0
    assert received == {
        "run": Path("RUN"),
        "user": None,
        "history": "a;b",
        "scenario": {"region": "US", "plan": "ads"},
        "k": 5,
        "filter_seen": True,
    }
    main(["recommend", "RUN", "--user", "u", "--keep-seen"])
    assert received["filter_seen"] is False


@pytest.mark.parametrize(("option", "expected"), [([], None), (["--keep-seen"], False), (["--filter-seen"], True)])
def test_options_reach_the_evaluation(
    option: list[str], expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}
    monkeypatch.setattr(
        "m5.evaluate_run.evaluate_run", lambda run, json, **settings: received.update(settings, json=json)
    )
    assert main(["evaluate", "RUN", "--json", "F", "--row", "m5-mlp=OTHER", *option]) == 0
    assert received["json"] == Path("F")
    assert received["rows"] == {"m5-mlp": Path("OTHER")}
    assert received["filter_seen"] is expected
