"""Shared by all tests: one thread, no hub, GPU tests skipped with a reason, real data by M5_DATA."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Commands set the threads of their process, and sums are rounded by them: the next test has one again."""
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def m5_data() -> Path:
    """Folder with ml-1m/ and globo/."""
    folder = os.environ.get("M5_DATA")
    if not folder:
        pytest.skip("needs real data: set M5_DATA to the folder that has ml-1m/ml-1m.zip")
    return Path(folder)
