"""`m5 serve`: the service on a port of this machine."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import uvicorn

from m5.config import ConfigError
from m5.serving.index import IndexKind
from m5.serving.service import Settings, build_app

GRACE = 10  # seconds that requests in flight get when the service is asked to end


def serve(
    artifact: Path,
    *,
    host: str,
    port: int,
    index: IndexKind = "exact",
    compiled: bool = False,
    threads: int | None = None,
    largest_batch: int = 64,
    queue: int = 2048,
    rate: float | None = None,
    api_keys: Path | None = None,
    now: Literal["clock", "dataset"] = "clock",
) -> int:
    """Answer until SIGTERM or Ctrl-C; requests in flight are answered first.

    Args:
        now: `dataset` stops the clock at the dataset's last event, where rights and releases are as they were then; a
            new artifact brings its own.

    Raises:
        DataError: no whole artifact.
        ConfigError: no keys in `api_keys`, a rate of 0, or a port that cannot be had.
    """
    if rate is not None and not rate > 0:
        raise ConfigError(f"--rate {rate:g}: give a number above 0, or leave it out for no limit.")
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        index=index,
        compiled=compiled,
        largest_batch=largest_batch,
        queue=queue,
        rate=rate,
        api_keys=read_keys(api_keys) if api_keys is not None else [],
        clock=time.time if now == "clock" else None,
    )
    listener = listen(host, port)
    with speaking():
        app = build_app(artifact, settings)
        # What is there stays, and the garbage collector need not go through it again and again: under load that stopped
        # all requests for a fifth of a second, about once a second.
        gc.collect()
        gc.freeze()
        address = f"[{host}]" if ":" in host else host
        listener.listen()  # who reads the next line may ask at once
        url = f"http://{address}:{listener.getsockname()[1]}/"
        print(f"answering at {url}  (the API: /openapi.json; Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Let the service's own log be seen meanwhile, whatever libraries have done with the root logger."""
    log = logging.getLogger("m5.serve")
    before = log.handlers, log.propagate, log.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


def read_keys(path: Path) -> list[str]:
    """Lines of a file, empty ones and comments aside.

    Raises:
        ConfigError: there is none, which would leave the service open.
    """
    keys = [line.strip() for line in path.read_text().splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-keys {path}: it holds no key.")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """The bound port, before the model is loaded: what cannot be had is told at once.

    Raises:
        ConfigError: it is taken, not allowed, or no port.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: this cannot be had ({error}). Choose another.") from None
    return listener
