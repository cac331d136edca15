"""The service among strangers: limits, keys, rates, hang-ups, and ten thousand requests of people who mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from m5.serving import service as module
from m5.serving.limits import ApiKeys, Limits, RateLimit
from m5.serving.retriever import Answer, Ask, Retriever
from m5.serving.service import LEAST_BURST, Settings, build_app
from tests.serving import BODY, NOW, client_of, recommend, served, until, write_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    write_artifact(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with client_of(folder / "artifact") as client:
        yield client


# ---- requests of every kind --------------------------------------------------------------------------------------


def hostile(generator: np.random.Generator) -> tuple[str, str, dict[str, Any]]:
    """A request that nobody of good will would make: method, path, what httpx sends."""
    texts = [
        "",
        "\x00",
        "../../etc/passwd",
        "%00",
        "💥" * 50,
        "<script>alert(1)</script>",
        "'; DROP TABLE titles",
        "t1",
    ]
    numbers: list[Any] = [0, -1, 10**30, -(10**30), 2**63, 1.5, True, None, "7", [], {}, 1e308]

    def pick(values):
        return values[int(generator.integers(len(values)))]

    def junk(depth: int = 0) -> Any:
        kind = int(generator.integers(5 if depth < 4 else 2))
        if kind == 0:
            return pick(texts)
        if kind == 1:
            return pick(numbers)
        if kind == 2:
            return [junk(depth + 1) for _ in range(int(generator.integers(4)))]
        return {pick([*texts, *BODY, "k", "exclude", "timestamp", "title_id"]): junk(depth + 1) for _ in range(3)}

    path = pick(
        ["/v1/recommend", "/v1/recommend/batch", "/v1/titles/{}/similar", "/v1/titles/{}/poster", "/{}", "/v1/titles"]
    )
    method = pick(["POST", "POST", "POST", "GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
    path = path.replace("{}", pick(["%00", "..%2f..%2fetc%2fpasswd", "t1", "%ff%fe", "a" * 3000, "%F0%9F%92%A5"]))
    choice = int(generator.integers(6))
    if choice == 0:
        return method, path, {"content": generator.bytes(int(generator.integers(300)))}
    if choice == 1:
        # Text that is nearly right: a valid body with a few bytes changed.
        text = bytearray(json.dumps(BODY | {"k": 3, "explain": True}).encode())
        for _ in range(int(generator.integers(1, 4))):
            text[int(generator.integers(len(text)))] = int(generator.integers(256))
        return method, path, {"content": bytes(text), "headers": {"content-type": "application/json"}}
    if choice == 2:
        content = pick(
            [
                b"[" * 50_000,
                b'{"k":NaN}',
                b'{"k":1e999}',
                b'{"history":[{"title_id":"\\ud800"}]}',
                b"\xef\xbb\xbf{}",
                b"null",
            ]
        )
        return method, path, {"content": content, "headers": {"content-type": "application/json"}}
    if choice == 3:
        body = BODY | {pick([*BODY, "k", "exclude", "timestamp", "context", "user", "explain", "x"]): junk()}
        return method, path, {"json": {"requests": [body]} if path.endswith("batch") else body}
    if choice == 4:
        changes = [
            {"timestamp": pick([2**40, -(2**40)])},
            {"history": [{"title_id": "t1", "timestamp": pick([2**40, -(2**40)])}] * 3},
        ]
        return "POST", "/v1/recommend", {"json": BODY | pick(changes) | {"explain": bool(generator.integers(2))}}
    query = {pick(["k", "scenario", "q", "limit", "zz"]): pick([*texts, "region:r1", "region:", ":", "1000000", "-1"])}
    return method, path, {"params": query}


def test_ten_thousand_hostile_requests(client: TestClient, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    secrets = (str(folder), "Traceback", "site-packages", "m5/serving")
    statuses: dict[int, int] = {}
    with caplog.at_level(logging.ERROR):
        for _ in range(10_000):
            method, path, content = hostile(generator)
            answer = client.request(method, path, **content)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (method, path, str(content)[:300])
            assert not any(secret in answer.text for secret in secrets), (method, path, answer.text[:300])
    assert {200, 404, 405, 422} <= statuses.keys()
    assert not caplog.records
    assert client.post("/v1/recommend", json=BODY).status_code == 200


CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


def examine(operation, mode: GenerationMode) -> int:
    """Requests of one route that the schema allows, or forbids, each answered as the schema promises; how many."""
    tried = 0

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate(checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
        check()
    return tried


def test_schemathesis_finds_nothing(folder: Path) -> None:
    app = build_app(folder / "artifact", Settings(clock=lambda: float(NOW)))
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert len(operations) == 10
    assert all(examine(operation, GenerationMode.POSITIVE) for operation in operations)
    assert sum(examine(operation, GenerationMode.NEGATIVE) for operation in operations) > 80


def test_a_fault_of_ours_tells_nothing_of_the_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("secret of /home/me")

    monkeypatch.setattr(module.api, "to_answer", broken)
    with client_of(folder / "artifact") as client:
        answer = client.post("/v1/recommend", json=BODY)
    assert (answer.status_code, answer.json()) == (500, {"detail": "internal error"})


# ---- connections of every kind -----------------------------------------------------------------------------------


HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: m5\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: 2\r\n\r\n{}"
HOSTILE_BYTES = [
    b"",
    b"\r\n\r\n\r\n",
    b"\x00" * 1_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x80" * 300,  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: m5\r\n\r\n",
    b"GET " + b"/a" * 100_000 + b" HTTP/1.1\r\nHost: m5\r\n\r\n",
    b"GET /v1/info HTTP/1.1\r\nHost: m5\r\nX-Large: " + b"a" * 300_000 + b"\r\n\r\n",
    b"GET /v1/info HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 20_000 + b"\r\n",
    b"GET /v1/info HTTP/1.1\r\nHost m5\r\n\r\n",
    b"GET /v1/info HTTP/1.1\r\nHost: m5\r\n",
    HEAD + b"Content-Length: -5\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nContent-Length: 200\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    HEAD + b'Content-Length: 500\r\n\r\n{"history": [{"titl',
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65_536 + b"\r\n" * 40,
    HEAD + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n",
    WHOLE * 40,
    WHOLE + b"garbage",
]


def connected(site: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(site.rstrip("/").rpartition(":")[2])), timeout=60)


def test_bad_framing_huge_headers_and_hang_ups_do_not_end_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(folder / "artifact", clock=lambda: float(NOW)) as site, caplog.at_level(logging.ERROR):
        for sent in HOSTILE_BYTES:
            for leave in ("half", "at once", "reset"):
                with contextlib.suppress(ConnectionError), connected(site) as line:
                    line.sendall(sent)
                    if leave == "half":
                        line.shutdown(socket.SHUT_WR)
                        received = b"".join(iter(lambda: line.recv(2**16), b""))
                        assert b"HTTP/1.1 5" not in received and b"Traceback" not in received
                    elif leave == "reset":
                        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert recommend(site, BODY)["titles"]
    # uvicorn does not tell requests sent one behind the other that their connection is gone: they write to it.
    assert not [record for record in caplog.records if "handler is closed" not in str(record.exc_info)]


def test_the_model_does_not_work_for_those_who_have_hung_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let, batches, real = threading.Event(), [], Retriever.recommend

    def slow(self: Retriever, asks: list[Ask]) -> list[Answer]:
        batches.append(len(asks))
        assert let.wait(60)
        return real(self, asks)

    def measured(site: str, text: str) -> bool:
        with urllib.request.urlopen(f"{site}metrics", timeout=60) as answer:
            return text in answer.read().decode().splitlines()

    text = json.dumps(BODY).encode()
    with served(folder / "artifact", clock=lambda: float(NOW)) as site:
        monkeypatch.setattr(Retriever, "recommend", slow)
        lines = []
        for _ in range(6):
            lines.append(connected(site))
            lines[-1].sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(text), text))
            until(lambda: batches == [1])
        until(lambda: measured(site, "m5_waiting 5.0"))
        for line in lines[1:]:
            line.close()
        until(lambda: measured(site, 'm5_requests_total{route="/v1/recommend",status="499"} 5.0'))
        let.set()
        assert lines[0].recv(100).startswith(b"HTTP/1.1 200")
        lines[0].close()
        assert recommend(site, BODY)["titles"]
    assert batches == [1, 1]


# ---- limits ------------------------------------------------------------------------------------------------------


def test_large_bodies_are_refused_with_and_without_a_length(folder: Path) -> None:
    with client_of(folder / "artifact", largest_body=2_000) as client:
        assert client.post("/v1/recommend", content=b"x" * 2_001).status_code == 413
        assert client.post("/v1/recommend", content=iter([b"x" * 1_500] * 2)).status_code == 413
        assert client.post("/v1/recommend", json=BODY).status_code == 200


def test_api_keys(folder: Path) -> None:
    with client_of(folder / "artifact", api_keys=["one", "two"]) as client:

        def status(path: str = "/v1/info", **headers: str) -> int:
            return client.get(path, headers=headers).status_code

        assert status() == status(Authorization="Bearer three") == status(Authorization="Bearer ") == 401
        assert status(**{"X-API-Key": "one"}) == status(Authorization="Bearer two") == 200
        assert status("/v1/health") == status("/v1/ready") == status("/metrics") == 200
        assert status("/v1/titles/t0/poster") == 401


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    keys = ApiKeys(["a", "bb", "ccc"])
    monkeypatch.setattr("m5.serving.limits.hmac.compare_digest", lambda x, y: compared.append(len(x)) or x == y)
    assert [keys.accepts(given) for given in (b"a", b"ccc", b"dddd", b"")] == [True, True, False, False]
    assert compared == [32] * 12


def test_a_rate_is_a_bucket_that_fills_again() -> None:
    now = [0.0]
    rate = RateLimit(2.0, burst=4, clock=lambda: now[0])
    assert [rate.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert rate.wait("b") == 0
    now[0] = 0.5
    assert [rate.wait("a") for _ in range(2)] == [0, 0.5]
    now[0] = 100.0
    assert [rate.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]


def test_whoever_was_let_in_may_owe_tokens() -> None:
    now = [0.0]
    rate = RateLimit(2.0, burst=4, clock=lambda: now[0])
    rate.charge("stranger", 9)  # of whom nothing is known
    assert rate.wait("a") == 0
    rate.charge("a", 9)
    assert rate.wait("a") == (1 + 6) / 2
    now[0] = 3.5
    assert rate.wait("a") == 0
    nobody = RateLimit(None, burst=4)
    nobody.charge("a", 9)
    assert nobody.wait("a") == 0


def test_too_many_requests_of_a_client_are_refused(folder: Path) -> None:
    with client_of(folder / "artifact", rate=0.001) as client:
        answers = [client.get("/v1/info") for _ in range(LEAST_BURST + 1)]  # enough for the page to come up
        assert [answer.status_code for answer in answers] == [200] * LEAST_BURST + [429]
        assert int(answers[-1].headers["retry-after"]) > 100
        assert client.get("/v1/health").status_code == 200


def test_a_batch_costs_a_token_a_viewer(folder: Path) -> None:
    with client_of(folder / "artifact", rate=0.001) as client:
        assert client.post("/v1/recommend/batch", json={"requests": [BODY] * 30}).status_code == 200
        refused = client.get("/v1/info")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 1000 * (30 - LEAST_BURST)


def test_a_key_that_nobody_asks_for_makes_no_new_client(folder: Path) -> None:
    with client_of(folder / "artifact", rate=0.001) as client:
        statuses = [
            client.get("/v1/info", headers={"X-API-Key": f"made up {n}"}).status_code for n in range(LEAST_BURST + 1)
        ]
        assert statuses == [200] * LEAST_BURST + [429]
    with client_of(folder / "artifact", rate=0.001, api_keys=["one", "two"]) as client:
        statuses = [
            client.get("/v1/info", headers={"X-API-Key": key}).status_code
            for key in ("one", "two")
            for _ in range(LEAST_BURST + 1)
        ]
        assert statuses == ([200] * LEAST_BURST + [429]) * 2


def test_no_key_is_kept_in_clear() -> None:
    async def nothing(*arguments: Any) -> None:
        pass

    rate = RateLimit(1.0, burst=5)
    limits = Limits(nothing, keys=ApiKeys(["secret"]), rate=rate, largest=10)
    scope = {"type": "http", "path": "/v1/info", "headers": [(b"x-api-key", b"secret")], "client": ("10.0.0.1", 5)}
    asyncio.run(limits(scope, nothing, nothing))
    assert list(rate._buckets) == [hashlib.sha256(b"secret").hexdigest()]


@pytest.mark.parametrize("where", ["mounted", "behind a prefix", "behind a prefix that was taken off"])
def test_keys_are_asked_for_wherever_the_service_hangs(folder: Path, where: str) -> None:
    app = build_app(folder / "artifact", Settings(clock=lambda: float(NOW), api_keys=["one"]))
    if where == "mounted":
        client, prefix = TestClient(Starlette(routes=[Mount("/m5", app)])), "/m5"
    else:
        client, prefix = TestClient(app, root_path="/m5"), "" if where.endswith("off") else "/m5"

    def status(path: str, **headers: str) -> int:
        return client.get(prefix + path, headers=headers).status_code

    for path in ("/v1/info", "/v1/viewers", "/v1/titles", "/v1/titles/t0/poster", "/v1/titles/t0/similar", "/v2/x"):
        assert status(path) == 401
    assert client.post(f"{prefix}/v1/recommend", json=BODY).status_code == 401
    assert status("/v1/info", **{"X-API-Key": "one"}) == 200
    for path in ("/v1/health", "/v1/ready", "/metrics", "/", "/page/page.js", "/openapi.json"):
        assert status(path) == 200
