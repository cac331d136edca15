"""Which part may import which, and how long files and functions may be: read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for package in ("m5", "data_prep", "tune", "benchmarks") for path in (ROOT / package).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION = 410, 62
SHARED_WITH_DATA_PREP = {"m5.schema", "m5.config", "m5.folders", "m5.torchvision_shim"}
MAY_IMPORT_CLIENTS = {"m5/cli.py", "m5/cli_data.py", "m5/cli_serving.py", "m5/demo.py"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at module level) of every import; `from m5 import x` counts as m5.x."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if module in ("m5", "torch") else [module]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check() -> None:
    assert {"m5/train.py", "m5/model/m5.py", "data_prep/prepare.py"} <= {relative(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_follow_the_data(path: Path) -> None:
    name = relative(path)
    for module, at_top in imports(path):
        package = module.split(".")[0]
        if name.startswith("data_prep/") and package == "m5":
            assert any(module == m or module.startswith(f"{m}.") for m in SHARED_WITH_DATA_PREP), f"{name}: {module}"
        if name.startswith("m5/") and package in ("data_prep", "tune", "benchmarks"):
            assert name in MAY_IMPORT_CLIENTS, f"{name} imports {module}"
            assert not at_top, f"{name} must import {module} inside a function"
        if module.startswith("torchrec.distributed"):
            assert name in ("m5/parallel.py", "m5/planner_topology.py"), f"{name} imports {module}"
        if name.startswith("m5/model/"):
            assert not module.startswith(("m5.config", "torch.distributed")), f"{name} imports {module}"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring aside."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node) <= MAX_FUNCTION, f"{relative(path)}: {node.name} is too long"
