"""The service: right answers, rights that hold, limits, reloads, and ten thousand requests of people who mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import threading
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
from starlette.testclient import TestClient

from m5.cli import main
from m5.config import ConfigError
from m5.serving import service as module
from m5.serving.artifact import Artifact
from m5.serving.batching import Batcher, Busy
from m5.serving.export import Options, export
from m5.serving.limits import ApiKeys, RateLimit
from m5.serving.reload import Current
from m5.serving.retriever import Answer, Ask, Retriever
from m5.serving.run import listen, read_keys
from m5.serving.service import Settings, build_app
from m5.viewer import Viewer
from tests.serving import write_artifact

NOW = 400 * 86_400 // 4
PLAIN = Options(program=False)
BODY = {
    "history": [{"title_id": "t1"}, {"title_id": "t5", "intensity": {"seconds": 900}}],
    "scenario": {"region": "r1"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    write_artifact(folder)
    return folder


def client_of(artifact: Path, **changes: Any) -> TestClient:
    return TestClient(build_app(artifact, Settings(clock=lambda: float(NOW), **changes)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with client_of(folder / "artifact") as client:
        yield client


# ---- answers -----------------------------------------------------------------------------------------------------


def test_a_recommendation(client: TestClient, folder: Path) -> None:
    answer = client.post("/v1/recommend", json=BODY | {"k": 5}).json()
    assert len(answer["titles"]) == 5
    scores = [title["score"] for title in answer["titles"]]
    assert scores == sorted(scores, reverse=True)
    ids = {title["title_id"] for title in answer["titles"]}
    assert not ids & {"t1", "t5"}
    # 30 titles, the last one's window has passed, two were watched.
    assert answer["eligible"] == 27
    assert answer["artifact"] == Artifact(folder / "artifact").digest[:12]
    assert answer["ignored"] == {"history": [], "exclude": [], "scenario": [], "context": [], "user": []}
    for title in answer["titles"]:
        assert title["id_score"] + title["cg_score"] == pytest.approx(title["score"], abs=1e-5)


def test_rights_seen_titles_and_exclusions_hold(client: TestClient) -> None:
    def ids(**changes: Any) -> set[str]:
        answer = client.post("/v1/recommend", json=BODY | {"k": 100} | changes).json()
        return {title["title_id"] for title in answer["titles"]}

    everything = {f"t{title}" for title in range(30)}
    assert ids() == everything - {"t1", "t5", "t29"}
    assert ids(filter_seen=False) == everything - {"t29"}
    assert ids(exclude=["t7", "t8"]) == everything - {"t1", "t5", "t7", "t8", "t29"}
    elsewhere = everything - {"t0", "t1", "t2", "t3", "t5", "t29"}
    assert ids(scenario={"region": "r2"}) == ids(scenario={}) == ids(scenario={"region": "Atlantis"}) == elsewhere
    assert ids(timestamp=0) == everything - {"t1", "t5"}


def test_what_is_not_known_is_told_by_its_place(client: TestClient) -> None:
    history = [{"title_id": "gone"}, {"title_id": "t1"}, {"title_id": "<script>"}]
    changes = {"history": history, "exclude": ["t3", "zz"], "scenario": {"region": "Atlantis", "plan": "ads"}}
    answer = client.post("/v1/recommend", json=BODY | changes).json()
    assert answer["ignored"] == {"history": [0, 2], "exclude": [1], "scenario": ["region"], "context": [], "user": []}
    assert "script" not in json.dumps(answer)


def test_scenario_context_and_strength_matter(client: TestClient) -> None:
    def first(**changes: Any) -> float:
        return client.post("/v1/recommend", json=BODY | changes).json()["titles"][0]["score"]

    strong = [{"title_id": "t1"}, {"title_id": "t5", "intensity": {"seconds": 9_000}}]
    found = {first(), first(scenario={"region": "r1", "plan": "ads"}), first(context={"device": "tv"})}
    old = [{"title_id": "t1", "timestamp": 0}, {"title_id": "t5", "timestamp": 9}]
    found |= {first(history=strong), first(user={"profile": "p3"}), first(history=old)}
    assert len(found) == 6


def test_behaviours_are_put_in_order_of_time(client: TestClient) -> None:
    watched = [{"title_id": f"t{n}", "timestamp": NOW - 1000 * n} for n in (4, 6, 8)]
    answers = [client.post("/v1/recommend", json=BODY | {"history": order}) for order in (watched, watched[::-1])]
    assert answers[0].json() == answers[1].json()


def test_a_batch_answers_as_single_requests_do(client: TestClient) -> None:
    bodies = [BODY | {"k": k, "history": BODY["history"][:length]} for k, length in ((1, 0), (30, 2), (7, 1))]
    batch = client.post("/v1/recommend/batch", json={"requests": bodies}).json()["answers"]
    for body, answer in zip(bodies, batch, strict=True):
        single = client.post("/v1/recommend", json=body).json()
        assert [title["title_id"] for title in answer["titles"]] == [title["title_id"] for title in single["titles"]]
        assert [t["score"] for t in answer["titles"]] == pytest.approx([t["score"] for t in single["titles"]], abs=1e-5)
    assert client.post("/v1/recommend/batch", json={"requests": [BODY | {"explain": True}]}).status_code == 422


def test_an_explanation_is_what_the_model_would_have_said_without(client: TestClient, folder: Path) -> None:
    body = {
        "history": [{"title_id": f"t{n}"} for n in (1, 5, 9)],
        "scenario": {"region": "r2"},
        "k": 30,
        "explain": True,
    }
    answer = client.post("/v1/recommend", json=body).json()
    retriever = Retriever(Artifact(folder / "artifact"))
    viewer = Viewer(np.array([1, 5, 9]), NOW - 86_400 * np.array([3, 2, 1]), NOW, scenario={"region": 2})
    checked = 0
    for title in answer["titles"]:
        key_Q = retriever.key_NQ[retriever.place[title["title_id"]]]
        for carried in title["because"]:
            without = viewer.without([1, 5, 9].index(retriever.place[carried["title_id"]]))
            query_BQ, _ = retriever.queries([viewer, without])
            drop = float((query_BQ[0] - query_BQ[1]) @ key_Q)
            assert carried["id_drop"] + carried["cg_drop"] == pytest.approx(drop, abs=1e-5) and drop > 0
            checked += 1
    assert checked > 20
    # Titles 0 .. 3 belong to region 1; of them t1 was watched.
    lost = [title["title_id"] for title in answer["taken_away"]]
    assert set(lost) <= {"t0", "t2", "t3", "t29"}
    assert all(title["score"] > answer["titles"][-1]["score"] for title in answer["taken_away"])


def test_similar_titles(client: TestClient, folder: Path) -> None:
    answer = client.get("/v1/titles/t5/similar", params={"k": 30, "scenario": "region:r2"}).json()["titles"]
    assert {title["title_id"] for title in answer} == {f"t{n}" for n in range(4, 29) if n != 5}
    key_NQ = Artifact(folder / "artifact").key_NQ
    unit_NQ = key_NQ / key_NQ.norm(dim=1, keepdim=True)
    cosine = float(unit_NQ[5] @ unit_NQ[int(answer[0]["title_id"][1:])])
    assert answer[0]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert client.get("/v1/titles/nothing/similar").status_code == 404
    assert client.get("/v1/titles/t5/similar", params={"scenario": "region"}).status_code == 422


def test_posters_titles_viewers_and_what_the_artifact_knows(client: TestClient) -> None:
    poster = client.get("/v1/titles/t0/poster")
    assert poster.headers["content-type"] == "image/jpeg" and poster.content.startswith(b"\xff\xd8")
    assert client.get("/v1/titles/t2/poster").status_code == 404
    assert [title["title_id"] for title in client.get("/v1/titles", params={"q": "title 2", "limit": 3}).json()] == [
        "t2",
        "t20",
        "t21",
    ]
    viewers = client.get("/v1/viewers").json()
    assert len(viewers) == 3
    assert client.post("/v1/recommend", json=viewers[0]).json()["titles"]
    info = client.get("/v1/info").json()
    assert info["scenario"] == {"region": ["r1", "r2", "r3"], "plan": ["ads", "premium"]}
    assert (info["titles"], info["now"], info["intensities"]) == (30, NOW, ["seconds"])


def test_metrics_count_by_route_and_not_by_path(client: TestClient) -> None:
    client.get("/v1/titles/strange/similar")
    client.get("/wp-admin/setup.php")
    text = client.get("/metrics").text
    assert 'm5_requests_total{route="/v1/titles/{title_id}/similar",status="404"}' in text
    assert 'm5_requests_total{route="other",status="404"}' in text
    assert "strange" not in text and "wp-admin" not in text
    assert "m5_batch_size_count" in text and 'm5_artifact{digest="' in text


# ---- strangers ---------------------------------------------------------------------------------------------------


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


def test_too_many_requests_of_a_client_are_refused(folder: Path) -> None:
    with client_of(folder / "artifact", rate=0.001) as client:
        answers = [client.get("/v1/info") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert int(answers[1].headers["retry-after"]) > 100
        assert client.get("/v1/health").status_code == 200


def test_keys_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\n\n one \ntwo\n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(tmp_path / "keys")


# ---- batches -----------------------------------------------------------------------------------------------------


class Slow:
    """Answers k with k, a batch at a time, when it is let."""

    def __init__(self) -> None:
        self.let, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def recommend(self, asks: list[Ask]) -> list[Answer]:
        self.batches.append([ask.k for ask in asks])
        self.begun.set()
        assert self.let.wait(20)
        if any(ask.k == 13 for ask in asks):
            raise ValueError("unlucky")
        return [Answer(np.array([ask.k]), *[np.zeros(1)] * 3, ask.k) for ask in asks]


def ask_for(k: int) -> Ask:
    return Ask(Viewer(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0), k)


def test_what_waits_while_the_model_is_busy_is_its_next_batch() -> None:
    async def run() -> tuple[Slow, list[int]]:
        batcher, slow = Batcher(largest=3, queue=6), Slow()
        first = asyncio.create_task(batcher.ask(slow, [ask_for(1)]))
        await asyncio.to_thread(slow.begun.wait, 20)
        others = [asyncio.create_task(batcher.ask(slow, [ask_for(k)])) for k in range(2, 8)]
        await asyncio.sleep(0)
        assert batcher.depth == 6
        with pytest.raises(Busy):
            await batcher.ask(slow, [ask_for(99)])
        slow.let.set()
        answers = [(await task)[0].eligible for task in [first, *others]]
        batcher.close()
        return slow, answers

    slow, answers = asyncio.run(run())
    assert slow.batches == [[1], [2, 3, 4], [5, 6, 7]]
    assert answers == [1, 2, 3, 4, 5, 6, 7]


def test_a_batch_that_fails_fails_alone() -> None:
    async def run() -> list[Any]:
        batcher, slow = Batcher(largest=2, queue=9), Slow()
        slow.let.set()
        tasks = [asyncio.create_task(batcher.ask(slow, [ask_for(k)])) for k in (13, 2, 3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert isinstance(first, ValueError) and isinstance(second, ValueError)
    assert third[0].eligible == 3


# ---- another artifact ----------------------------------------------------------------------------------------------


def test_a_new_artifact_is_taken_over_and_a_damaged_one_refused(folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    outcomes: list[str] = []
    current = Current(artifact, "exact", outcomes.append)
    old = current.retriever
    assert not current.look() and current.retriever is old
    # Damaged: the old one goes on, and says so.
    export(folder / "run", artifact, Options(int8=True, program=False))
    content = bytearray((artifact / "titles.safetensors").read_bytes())
    content[-1] ^= 1
    (artifact / "titles.safetensors").write_bytes(content)
    assert not current.look() and current.retriever is old
    assert current.refused and str(tmp_path) not in current.refused
    assert not current.look() and outcomes == ["refused"]
    # Whole: it answers from now on; who holds the old one still has all of it, posters too.
    export(folder / "run", artifact, Options(posters=False, program=False))
    assert current.look() and current.retriever is not old and current.refused is None
    assert outcomes == ["refused", "ok"]
    assert old.posters is not None and old.posters[0].startswith(b"\xff\xd8")
    shutil.rmtree(artifact)
    assert not current.look()
    assert current.retriever.recommend([ask_for(3)])[0].title.tolist()


def test_no_request_is_lost_around_a_reload(folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    export(folder / "run", artifact, PLAIN)
    with client_of(artifact, look_every=0.05) as client:
        digests, statuses = [], set()
        for number in range(400):
            if number in (100, 200):
                export(folder / "run", artifact, Options(int8=number == 100, program=False))
            answer = client.post("/v1/recommend", json=BODY)
            statuses.add(answer.status_code)
            digests.append(answer.json()["artifact"])
            if number > 200 and len(set(digests)) == 3:
                break
        assert statuses == {200}
        assert digests[0] != digests[-1] == Artifact(artifact).digest[:12]


# ---- the command -------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    assert main(["serve", str(folder / "artifact"), "--port", port]) == 2
    assert f"--port {port}: this cannot be had" in capsys.readouterr().err
    assert main(["serve", str(folder / "run"), "--port", "0"]) == 2
    assert "is no artifact" in capsys.readouterr().err
    assert main(["serve", str(folder / "artifact"), "--port", "0", "--rate", "0"]) == 2
    assert main(["serve", str(folder / "artifact"), "--port", "70000"]) == 2
