"""`m5 doctor`: which triples match, and what it says about an installation that is broken."""

from __future__ import annotations

import json

import pytest

from m5 import doctor


@pytest.mark.parametrize(
    ("torch", "torchrec", "cuda", "cpu"),
    [
        ("2.13.0+cpu", "1.8.0", None, "1.8.0"),
        ("2.13.0", "1.8.0", "1.8.0", None),
        ("2.11.0+cu130", "1.6.1", "1.6.0", None),
    ],
)
def test_tried_triples_match(torch: str, torchrec: str, cuda: str | None, cpu: str | None) -> None:
    finding = doctor.check_triple(torch, torchrec, cuda, cpu)
    assert finding.remedy == ""
    assert finding.found.endswith("they match")


@pytest.mark.parametrize(
    ("torch", "torchrec", "cuda", "cpu", "remedy"),
    [
        ("2.13.0", "1.8.0", "1.8.0", "1.8.0", "overwrite each other"),
        ("2.13.0", "1.6.1", None, "1.8.0", "needs torchrec 1.8.0 and fbgemm 1.8.0"),
        ("2.11.0", "1.6.1", "1.8.0", None, "needs torchrec 1.6.1 and fbgemm 1.6.0"),
        ("2.9.0", "1.8.0", None, "1.8.0", "has not been tried"),
        ("2.13.0", None, None, "1.8.0", "make install"),
        ("2.13.0", "1.8.0", None, None, "make install"),
        (None, "1.8.0", None, "1.8.0", "make install"),
    ],
)
def test_other_triples_have_a_remedy(
    torch: str | None, torchrec: str | None, cuda: str | None, cpu: str | None, remedy: str
) -> None:
    assert remedy in doctor.check_triple(torch, torchrec, cuda, cpu).remedy


def test_this_installation_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.report(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    found = {finding["what"]: finding["found"] for finding in report["findings"]}
    assert report["ok"]
    assert found["embedding lookup"] == "works"
    assert found["torch / torchrec / fbgemm"].endswith("they match")


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("timm", "torch") else real(name))
    assert doctor.report() == 1
    printed = capsys.readouterr().out
    assert "timm: Install the pinned set" in printed
    assert "embedding lookup" not in printed  # nothing is tried with a torch that is not there


def test_gpu_set_is_asked_for_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor, "installed", lambda name: "1.8.0" if name == "fbgemm-gpu-cpu" else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = next(finding for finding in doctor.check_hardware() if finding.what == "GPU")
    assert "CPU set" in gpu.remedy
