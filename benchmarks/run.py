"""`m5 bench`: the benchmarks by name."""

from __future__ import annotations

import ast
import difflib
import importlib
from pathlib import Path

from m5.config import ConfigError

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name -> first line of its docstring, read from the source: nothing is imported for a list."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def run_benchmark(name: str | None, argv: list[str]) -> int:
    """Run one; without a name, list them.

    Raises:
        ConfigError: there is none of that name.
    """
    known = benchmarks()
    if name is None:
        for known_name, line in known.items():
            print(f"{known_name:16} {line}")
        return 0
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"there is no benchmark '{name}'.{hint} `m5 bench` lists them.")
    return importlib.import_module(f"benchmarks.{name}").main(argv)
