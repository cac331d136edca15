"""A search on a Ray cluster: two raylets on this machine's loopback, and the launcher's description of one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.test_tune_search import ROOT, records, write_space
from tests.world import write_world

RAY = Path(sys.executable).with_name("ray")


def test_the_launchers_cluster_is_one_by_rays_own_schema() -> None:
    config = yaml.safe_load((ROOT / "docker" / "ray-cluster.yaml").read_text())
    ready = prepare_config(config)
    validate_config(ready)
    assert ready["provider"]["type"] == "local"
    # Two workers and the head, all from the start: a search counts its nodes when it begins.
    assert ready["max_workers"] == 2
    commands = "\n".join([*config["head_start_ray_commands"], *config["worker_start_ray_commands"]])
    assert commands.count("RAY_AUTH_MODE=token") == 2


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def whole_tree(process: subprocess.Popen) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [*root.children(recursive=True), root]
    return []


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes, each with one core."""
    for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", "b" * 64), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    address = f"127.0.0.1:{free_port()}"
    # Not pytest's folder: a socket's path has about a hundred characters at most.
    folder = tempfile.mkdtemp(prefix="m5")
    common = ["--num-cpus", "1", "--node-ip-address", "127.0.0.1", "--block"]
    head = ["--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false", "--temp-dir", folder]
    started: list[subprocess.Popen] = []
    try:
        for arguments in (head, ["--address", address]):
            started.append(
                subprocess.Popen(
                    [RAY, "start", *arguments, *common], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
                )
            )
            wait_for_port(address)
        yield address
    finally:
        trees = [process for one in started for process in whole_tree(one)]
        for process in trees:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(trees, timeout=10)
        for one in started:
            one.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing answers at {address}")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_search_uses_both_nodes_and_data_by_url(cluster: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_world(data, users=120, rights=True, longest=30)
    space = write_space(
        tmp_path,
        {"optimizer.lr": {"loguniform": [1e-3, 1e-2]}},
        settings={"training.epochs": 30, "training.patience": 99},
        search={"trials": 4, "seeds": 0, "scheduler": "none"},
    )
    command = [
        sys.executable,
        "-m",
        "m5.cli",
        "tune",
        "--data",
        data.as_uri(),
        "--space",
        str(space),
        "--out",
        str(out),
    ]
    environment = os.environ | {"M5_CACHE": str(tmp_path / "cache")}
    deadline = time.monotonic() + 60
    done = subprocess.run(
        [*command, "--address", cluster], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    while "has no room" in done.stderr and time.monotonic() < deadline:
        time.sleep(1)  # the nodes have not joined yet
        done = subprocess.run(
            [*command, "--address", cluster, "--resume"], capture_output=True, text=True, cwd=ROOT, env=environment
        )
    assert done.returncode == 0, done.stderr
    found = records(out)
    assert [one["status"] for one in found.values()] == ["finished"] * 4
    assert len({one["node"] for one in found.values()} - {""}) == 2, "one node has done all the work"
    assert {"trials.parquet", "best.yaml", "report.html"} <= {path.name for path in out.iterdir()}
    (copy,) = [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    assert json.loads((copy / "manifest.json").read_text()) == json.loads((data / "manifest.json").read_text())
    # The cluster was there before the search, and is after it.
    wait_for_port(cluster)


@pytest.mark.parametrize(
    ("address", "variable", "said"),
    [
        ("127.0.0.1:{port}", "", "--address 127.0.0.1:{port}: no Ray cluster answers there"),
        ("ray://127.0.0.1:{port}", "", "--address ray://127.0.0.1:{port}: run m5 tune on a node of the cluster"),
        ("nonsense", "", "--address nonsense: the cluster cannot be joined"),
        # Without the variable, `auto` joins any cluster whose processes it sees: another test's.
        ("auto", "127.0.0.1:{port}", "--address 127.0.0.1:{port}: no Ray cluster answers there"),
    ],
)
def test_no_cluster_at_the_address_is_said(tmp_path: Path, address: str, variable: str, said: str) -> None:
    data = tmp_path / "data"
    write_world(data, users=30)
    space = write_space(tmp_path, {"optimizer.lr": {"loguniform": [1e-3, 1e-2]}})
    port = free_port()
    command = [sys.executable, "-m", "m5.cli", "tune", "--data", str(data), "--space", str(space)]
    command += ["--out", str(tmp_path / "out"), "--address", address.format(port=port)]
    environment = os.environ | {"RAY_ADDRESS": variable.format(port=port)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, env=environment)
    assert done.returncode == 2, done.stderr
    assert said.format(port=port) in done.stderr
