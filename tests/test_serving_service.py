"""The service: right answers, rights that hold, one clock, metrics, and the command that starts it."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from m5.cli import main
from m5.config import ConfigError
from m5.serving import api
from m5.serving.artifact import Artifact
from m5.serving.batching import Batcher, Busy
from m5.serving.retriever import Ask, Retriever
from m5.serving.run import listen, read_keys
from m5.viewer import Viewer
from tests.serving import BODY, NOW, client_of, write_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    write_artifact(folder)
    return folder


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


def test_the_k_of_others_changes_no_answer(folder: Path) -> None:
    """An index that looks at more titles for a larger k finds better ones."""
    retriever = Retriever(Artifact(folder / "artifact"), "ivfpq")
    index: Any = retriever.index
    index.worth, index.reranked = 0, 1  # it searches, few as the titles are, and scores few again
    generator = np.random.default_rng(0)
    watched = [generator.choice(30, 3, replace=False) for _ in range(12)]
    asks = [Ask(Viewer(title, np.arange(3), NOW), k) for title in watched for k in (1, 2, 20)]
    for ask, answer in zip(asks, retriever.recommend(asks), strict=True):
        (alone,) = retriever.recommend([ask])
        assert answer.title.tolist() == alone.title.tolist()
        assert answer.eligible == alone.eligible


def test_the_k_of_a_batch_have_a_bound(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_TITLES", 40)
    many = client.post("/v1/recommend/batch", json={"requests": [BODY | {"k": 20}] * 3})
    assert many.status_code == 422 and "40" in many.json()["mistakes"][0]["what"]
    assert client.post("/v1/recommend/batch", json={"requests": [BODY | {"k": 20}] * 2}).status_code == 200


def test_words_are_made_and_titles_searched_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop = []

    def watch(where: Any, name: str) -> None:
        real = getattr(where, name)

        def watched(*arguments: Any) -> Any:
            try:
                on_loop.append(asyncio.get_running_loop() is not None)
            except RuntimeError:
                on_loop.append(False)
            return real(*arguments)

        monkeypatch.setattr(where, name, watched)

    for where, name in ((api, "to_answer"), (api, "to_similar"), (Retriever, "find")):
        watch(where, name)
    assert client.post("/v1/recommend", json=BODY | {"explain": True}).status_code == 200
    assert client.post("/v1/recommend/batch", json={"requests": [BODY] * 3}).status_code == 200
    assert client.get("/v1/titles/t5/similar").status_code == 200
    assert client.get("/v1/titles", params={"q": "title"}).status_code == 200
    assert on_loop == [False] * 6


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


def test_similar_titles_of_another_time(client: TestClient) -> None:
    def found(**when: int) -> set[str]:
        answer = client.get("/v1/titles/t5/similar", params={"k": 30, "scenario": "region:r1", **when})
        return {title["title_id"] for title in answer.json()["titles"]}

    everything = {f"t{n}" for n in range(30)} - {"t5"}
    assert found() == found(timestamp=NOW) == everything - {"t29"}  # whose window has passed
    assert found(timestamp=0) == everything


def test_ids_are_as_long_as_a_title_may_have(client: TestClient) -> None:
    for length, status in ((1_000, 200), (1_001, 422)):
        answer = client.post("/v1/recommend", json=BODY | {"exclude": ["i" * length]})
        assert answer.status_code == status


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/recommend/batch", "/v1/titles/t5/similar", "explained"])
def test_a_full_queue_refuses_whatever_needs_the_model(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def full(self: Batcher, count: int) -> None:
        raise Busy

    def full_but_for_the_first(self: Batcher, count: int) -> None:
        monkeypatch.setattr(Batcher, "_admit", full)

    monkeypatch.setattr(Batcher, "_admit", full_but_for_the_first if path == "explained" else full)
    if path.endswith("similar"):
        answer = client.get(path)
    else:
        body = {"requests": [BODY]} if path.endswith("batch") else BODY | {"explain": path == "explained"}
        answer = client.post("/v1/recommend" if path == "explained" else path, json=body)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"


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


def test_titles_are_searched_in_whatever_case(client: TestClient) -> None:
    def found(words: str, limit: int = 100) -> list[str]:
        return [title["title_id"] for title in client.get("/v1/titles", params={"q": words, "limit": limit}).json()]

    assert found("TITLE 2") == found("tItLe 2") == ["t2", *(f"t{n}" for n in range(20, 30))]
    assert found("") == [f"t{n}" for n in range(30)]
    assert found("", 3) == ["t0", "t1", "t2"] and found("nothing of the kind") == []


def test_posters_behind_a_key_are_no_business_of_shared_caches(client: TestClient, folder: Path) -> None:
    assert client.get("/v1/titles/t0/poster").headers["cache-control"] == "public, max-age=3600"
    with client_of(folder / "artifact", api_keys=["one"]) as guarded:
        poster = guarded.get("/v1/titles/t0/poster", headers={"X-API-Key": "one"})
    assert poster.headers["cache-control"] == "private, max-age=3600"


def test_metrics_count_by_route_and_not_by_path(client: TestClient) -> None:
    client.get("/v1/titles/strange/similar")
    client.get("/wp-admin/setup.php")
    text = client.get("/metrics").text
    assert 'm5_requests_total{route="/v1/titles/{title_id}/similar",status="404"}' in text
    assert 'm5_requests_total{route="other",status="404"}' in text
    assert "strange" not in text and "wp-admin" not in text
    assert "m5_batch_size_count" in text and 'm5_artifact{digest="' in text


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


def test_a_service_that_could_not_start_leaves_the_log_as_it_was(folder: Path) -> None:
    log = logging.getLogger("m5.serve")
    before = log.handlers, log.propagate, log.level
    assert main(["serve", str(folder / "run"), "--port", "0"]) == 2
    assert (log.handlers, log.propagate, log.level) == before and log.propagate


def test_what_is_loaded_is_kept_from_the_garbage_collector(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: frozen.append(gc.get_freeze_count()))
    try:
        assert main(["serve", str(folder / "artifact"), "--port", "0"]) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 100_000


def test_keys_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\n\n one \ntwo\n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(tmp_path / "keys")
