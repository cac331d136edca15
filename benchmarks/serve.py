"""The service under load: requests/s and latency of `m5 serve`, asked by another process over real connections.

    m5 bench serve --artifact ARTIFACT

Clients hold a connection each and ask again as soon as they have an answer (a closed loop), so requests/s and latency
belong to their number. Bodies are the artifact's own viewers (export with --viewers), or random histories where it has
none. Client and service share the machine: what the client needs is the service's loss.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cold import small_run
from benchmarks.harness import Promise, Report, Spread, run
from benchmarks.options import positive
from m5.schema import DataError
from m5.serving.artifact import Artifact
from m5.serving.export import Options, export
from m5.serving.run import listen

HISTORY = 50
READY_SECONDS = 120
ROUTE = b"POST /v1/recommend HTTP/1.1\r\nHost: m5\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """One request over an open connection: status and body."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


async def client(port: int, requests: list[bytes], until: float, taken: list[float], failed: list[int]) -> None:
    """Ask until then; seconds of every answer go to `taken`, statuses other than 200 to `failed`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := time.perf_counter()) < until:
        status, _ = await ask(reader, writer, random.choice(requests))
        taken.append(time.perf_counter() - began)
        if status != 200:
            failed.append(status)
    writer.close()


async def load(port: int, requests: list[bytes], clients: int, seconds: float) -> tuple[list[float], list[int]]:
    taken: list[float] = []
    failed: list[int] = []
    until = time.perf_counter() + seconds
    await asyncio.gather(*(client(port, requests, until, taken, failed) for _ in range(clients)))
    return taken, failed


def bodies(artifact: Artifact, k: int, generator: np.random.Generator) -> list[bytes]:
    """Requests as they go over the wire."""
    viewers: list[dict[str, Any]] = artifact.viewers
    if not viewers:
        ids = artifact.titles["title_id"].tolist()
        viewers = [
            {
                "history": [{"title_id": ids[title]} for title in generator.integers(0, len(ids), HISTORY)],
                "scenario": {
                    v.name: v.values[int(generator.integers(len(v.values)))] for v in artifact.manifest.scenarios
                },
                "timestamp": artifact.manifest.now,
            }
            for _ in range(64)
        ]
    texts = [json.dumps(viewer | {"k": k}).encode() for viewer in viewers]
    return [ROUTE % (len(text), text) for text in texts]


def started(artifact: Path, index: str, threads: int) -> tuple[subprocess.Popen, int]:
    """`m5 serve` in a process of its own, once it is ready; and its port."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    command = [sys.executable, "-m", "m5.cli", "serve", str(artifact), "--port", str(port), "--index", index]
    service = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and service.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"GET /v1/ready HTTP/1.1\r\nHost: m5\r\nConnection: close\r\n\r\n")
                if b" 200 " in connection.recv(64):
                    return service, port
        except OSError:
            time.sleep(0.1)
    service.kill()
    raise DataError(f"{artifact}: the service did not become ready within {READY_SECONDS} s.")


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("P50, ms", "P99, ms"):
        axes.plot([row["requests/s"].median for row in rows], [row[name].median for row in rows], "o-", label=name[:3])
    axes.set(xlabel="requests/s", ylabel="ms", ylim=(0, None))
    axes.legend()


def measure(options: argparse.Namespace) -> Report:
    if options.artifact is not None:
        return measured(options, options.artifact)
    if not options.smoke:
        raise DataError("--artifact is missing: what `m5 export` wrote.")
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(Path(folder))
        return measured(options, export(run, Path(folder) / "artifact", Options(program=False)).folder)


def measured(options: argparse.Namespace, folder: Path) -> Report:
    artifact = Artifact(folder)
    requests = bodies(artifact, options.k, np.random.default_rng(0))
    seconds = 0.5 if options.smoke else options.seconds
    service, port = started(folder, options.index, options.threads)
    rows, refused = [], 0
    try:
        asyncio.run(load(port, requests, 4, seconds / 4))
        for clients in options.clients:
            rates, halves, tails = [], [], []
            for _ in range(1 if options.smoke else options.repeats):
                taken, failed = asyncio.run(load(port, requests, clients, seconds))
                rates.append(len(taken) / seconds)
                halves.append(1e3 * float(np.quantile(taken, 0.5)))
                tails.append(1e3 * float(np.quantile(taken, 0.99)))
                refused += len(failed)
            rows.append(
                {
                    "clients": clients,
                    "requests/s": Spread.of(rates),
                    "P50, ms": Spread.of(halves),
                    "P99, ms": Spread.of(tails),
                }
            )
    finally:
        service.terminate()
        service.wait(30)
    manifest = artifact.manifest
    notes = [
        f"Artifact: {manifest.n_titles:,} titles, width {manifest.model.width}, {manifest.model.blocks} blocks, "
        f"histories of up to {manifest.history}; index `{options.index}`, k = {options.k}, {options.threads} threads "
        "of the model.",
        "Client and service share the machine's cores. A closed loop: every client waits for its answer.",
    ]
    promises = [Promise("requests that were not answered with 200", refused, 0)]
    return Report("The service under load", rows, notes, promises, plot=lambda axes: draw(axes, rows))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifact", type=Path, help="what `m5 export` wrote")
    parser.add_argument("--index", default="exact", help="as of `m5 serve` (default: exact)")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 32], help="at a time (default: 1 8 32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of every measurement (default: 5)")
    parser.add_argument("-k", type=positive, default=20, help="titles asked for (default: 20)")


def main(argv: list[str] | None = None) -> int:
    return run("benchmarks.serve", __doc__ or "", measure, argv, arguments, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
