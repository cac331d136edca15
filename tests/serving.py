"""A trained run and its artifact in miniature, and services that answer from it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from m5.serving.artifact import Artifact
from m5.serving.export import Options, export
from m5.serving.run import listen
from m5.serving.service import Settings, build_app
from m5.train import train
from tests.world import tiny_config, write_world

NOW = 400 * 86_400 // 4
BODY = {
    "history": [{"title_id": "t1"}, {"title_id": "t5", "intensity": {"seconds": 900}}],
    "scenario": {"region": "r1"},
}


def write_run(folder: Path, *overrides: str, **world) -> Path:
    """A run of one epoch on a world with rights and two posters: RUN, its dataset beside it."""
    dataset = write_world(folder / "data", **({"users": 40, "rights": True} | world))
    artwork = [""] * dataset.manifest.n_titles
    for title, colour in ((0, "red"), (1, "blue")):
        path = folder / f"{colour}.png"
        Image.new("RGB", (400, 600), colour).save(path)
        artwork[title] = str(path)
    artwork[2] = str(folder / "gone.png")
    dataset.titles.assign(artwork=artwork).to_parquet(folder / "data" / "titles.parquet")
    train(tiny_config(folder / "data", folder / "run", "training.epochs=1", *overrides))
    return folder / "run"


VIEWERS = Options(viewers=3)


def write_artifact(folder: Path, *overrides: str, options: Options = VIEWERS, **world) -> Artifact:
    return export(write_run(folder, *overrides, **world), folder / "artifact", options)


# ---- services ----------------------------------------------------------------------------------------------------


def client_of(artifact: Path, **changes: Any) -> TestClient:
    """Of a service in this process, whose clock stands at `NOW`."""
    settings = Settings(**{"clock": lambda: float(NOW)} | changes)
    return TestClient(build_app(artifact, settings), raise_server_exceptions=False)


@contextlib.contextmanager
def served(artifact: Path, **changes: Any) -> Iterator[str]:
    """Address of a service on a port of this machine, in a thread."""
    listener = listen("127.0.0.1", 0)
    app = build_app(artifact, Settings(**changes))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield wait_for(f"http://127.0.0.1:{listener.getsockname()[1]}/")
    finally:
        server.should_exit = True
        thread.join()


def wait_for(address: str) -> str:
    """The address, once somebody answers there."""

    def answers() -> bool:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"{address}v1/health", timeout=60).close()
            return True
        return False

    until(answers)
    return address


def until(true: Callable[[], bool]) -> None:
    """Wait for it, a minute at most."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return json.load(answer)


def recommend(site: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer; raises where it is none."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{site}v1/recommend", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
