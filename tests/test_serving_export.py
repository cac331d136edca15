"""The artifact: it answers as the run does, holds no pickle, and a damaged one is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from m5.cli import main
from m5.predict import Predictor
from m5.recommend import recommend_titles
from m5.schema import DataError
from m5.serving.artifact import MANIFEST, MANIFEST_DIGEST, Artifact
from m5.serving.card import model_card
from m5.serving.export import Options, export
from m5.serving.onboard import LaunchedTitle, add_titles
from m5.serving.retriever import Ask, Retriever
from m5.serving.viewer import ViewerEncoder
from m5.viewer import Viewer
from tests.serving import write_artifact, write_run

KINDS = {
    "smoe": (),
    "mmoe": ("model.mixing=mmoe",),
    "scenario-blind": ("model.mixing=mlp",),
    "no content": ("model.content=[]",),
    "bare": ("model.subsidiary=false", "model.categories=false", "model.blocks=0"),
    "bidirectional": ("model.attention=bidirectional", "sequences.requests=1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    write_artifact(folder)
    return folder


def random_viewers(predictor: Predictor, count: int) -> list[Viewer]:
    """Histories from none to longer than the model reads; every third value unknown, some intensities not given."""
    generator, manifest = np.random.default_rng(1), predictor.dataset.manifest
    viewers = []
    for number in range(count):
        length = [0, 1, int(generator.integers(2, 12))][min(number % 4, 2)]
        seconds = generator.gamma(2, 900, length).astype(np.float32)
        seconds[generator.random(length) < 0.3] = np.nan

        def values(vocabularies) -> dict[str, int]:
            return {v.name: int(generator.integers(0, v.size)) for v in vocabularies if generator.random() < 0.67}

        viewers.append(
            Viewer(
                title=generator.integers(0, manifest.n_titles, length),
                timestamp=np.sort(generator.integers(0, 10**7, length)),
                at=10**7,
                intensity={"seconds": seconds},
                scenario=values(manifest.scenarios),
                context=values(manifest.contexts),
                user=values(manifest.user_features),
            )
        )
    return viewers


@pytest.mark.parametrize("kind", KINDS)
def test_exported_equals_eager(tmp_path: Path, kind: str) -> None:
    artifact = write_artifact(tmp_path, *KINDS[kind])
    predictor = Predictor.load(tmp_path / "run")
    retriever = Retriever(artifact)
    viewers = random_viewers(predictor, 40)
    query_BQ, gate_B = retriever.queries(viewers)
    # The run's own way, one viewer at a time, through the jagged batch.
    for viewer, query_Q, gate in zip(viewers, query_BQ, gate_B, strict=True):
        scores = predictor.forward(eager_batch(predictor, viewer))
        torch.testing.assert_close(query_Q, scores.query_PQ[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gate, scores.gate_P[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(artifact.key_NQ, predictor.key_NQ, atol=0, rtol=0)
    # The program that other runtimes load: one viewer, many viewers, nobody's history.
    program = torch.export.load(artifact.folder / "tower.pt2").module()
    encoder = ViewerEncoder(artifact)
    for part in (viewers, viewers[:1], viewers[3:4]):
        torch.testing.assert_close(program(*encoder(part))[0], retriever.queries(part)[0], atol=1e-5, rtol=0)


def eager_batch(predictor: Predictor, viewer: Viewer):
    from m5.recommend import _behaviours

    request = predictor.builder.ad_hoc_request(viewer.at, viewer.scenario, viewer.context, viewer.user)
    behaviours, position = _behaviours(predictor, viewer)
    return predictor.builder.assemble(behaviours, request._replace(position=position), None)


def test_an_artifact_recommends_what_the_run_recommends(folder: Path) -> None:
    predictor, retriever = Predictor.load(folder / "run"), Retriever(Artifact(folder / "artifact"))
    asked = 0
    for viewer in random_viewers(predictor, 60):
        expected = recommend_titles(predictor, viewer, k=10)
        (answer,) = retriever.recommend([Ask(viewer, 10)])
        assert [retriever.title_ids[title] for title in answer.title] == [item.title_id for item in expected]
        np.testing.assert_allclose(answer.score, [item.score for item in expected], atol=1e-5)
        np.testing.assert_allclose(answer.id_score + answer.cg_score, answer.score, atol=1e-5)
        asked += len(expected)
    assert asked > 300


def test_compiled_equals_eager(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    artifact = Artifact(folder / "artifact")
    viewers = random_viewers(Predictor.load(folder / "run"), 9)
    if shutil.which(os.environ.get("CXX", "g++")) is None:  # where Inductor looks, too
        pytest.skip("needs a C++ compiler")
    eager, fast = Retriever(artifact), Retriever(artifact, compiled=True)
    assert "could not be compiled" not in caplog.text
    for part in (viewers, viewers[:1]):
        torch.testing.assert_close(fast.queries(part)[0], eager.queries(part)[0], atol=1e-5, rtol=0)
    # Where there is no compiler, it runs uncompiled, and says so.
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", lambda *a, **k: 1 / 0)
    plain = Retriever(artifact, compiled=True)
    assert "could not be compiled (ZeroDivisionError" in caplog.text
    torch.testing.assert_close(plain.queries(viewers)[0], eager.queries(viewers)[0], atol=0, rtol=0)


def test_int8_keys_are_near(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    exact, small = export(run, tmp_path / "a"), export(run, tmp_path / "b", Options(int8=True))
    assert small.title_arrays["key_NQ"].dtype == torch.int8
    step_N1 = exact.key_NQ.abs().amax(-1, keepdim=True) / 127
    assert ((small.key_NQ - exact.key_NQ).abs() <= 0.5001 * step_N1).all()


def members(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """A file, and where it is a zip archive, as torch.save writes one too, whatever is in it."""
    yield name, content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for inner in archive.namelist():
                yield from members(f"{name}:{inner}", archive.read(inner))


def pickled(folder: Path) -> list[str]:
    """Names of what is a pickle by its name or by its first bytes (protocols 2 to 5), however deep it lies."""
    found = [one for path in sorted(folder.iterdir()) for one in members(path.name, path.read_bytes())]
    assert len(found) > 20
    heads = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
    return [name for name, content in found if name.endswith(".pkl") or content.startswith(heads)]


def test_nothing_is_pickled(folder: Path, tmp_path: Path) -> None:
    assert pickled(folder / "artifact") == []
    # The same program with what `export_program` takes away is found out.
    program = torch.export.load(folder / "artifact" / "tower.pt2")
    program.example_inputs = ((torch.zeros(1),) * 6, {})
    shutil.copytree(folder / "artifact", tmp_path / "artifact")
    torch.export.save(program, tmp_path / "artifact" / "tower.pt2")
    assert any("tower.pt2" in name and name.endswith(".pkl") for name in pickled(tmp_path / "artifact"))


def test_a_flipped_byte_anywhere_is_refused(folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = sorted(path.name for path in (folder / "artifact").iterdir())
    assert {"artifact.json", "model.safetensors", "titles.safetensors", "rights.safetensors", "tower.pt2"} <= {*names}
    for name in names:
        copy = tmp_path / name
        shutil.copytree(folder / "artifact", copy)
        content = bytearray((copy / name).read_bytes())
        content[int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            Artifact(copy)


def test_a_missing_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", MANIFEST_DIGEST):
        copy = tmp_path / name
        shutil.copytree(folder / "artifact", copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match="damaged or missing"):
            Artifact(copy)


def test_the_manifest_and_the_card_tell_what_the_model_is(folder: Path) -> None:
    manifest = Artifact(folder / "artifact").manifest
    assert (manifest.n_titles, manifest.history, manifest.content_width) == (30, 6, 6)
    assert manifest.dataset["name"] == "tiny"
    card = (folder / "artifact" / "card.md").read_text()
    for text in ("tiny-time-40-30-3-True-0", manifest.weights_sha256, "| validation |", "run `m5 evaluate` before"):
        assert text in card
    # No path of the machine that it was made on.
    everything = (folder / "artifact" / MANIFEST).read_text() + card
    assert str(folder) not in everything


def test_the_test_split_is_in_the_card_once_it_was_evaluated(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert main(["evaluate", str(run), "--no-references"]) == 0
    artifact = export(run, tmp_path / "artifact")
    card = (artifact.folder / "card.md").read_text()
    assert "| test |" in card and "| region=r1 |" in card and "validation, region" not in card
    assert "Test: all requests; titles that a viewer had watched before are no candidates." in card
    assert main(["evaluate", str(run), "--no-references", "--keep-seen", "--max-targets", "30"]) == 0
    card = model_card(export(run, tmp_path / "artifact").manifest)
    assert "a random part of the requests, at most 30 (`--max-targets`)" in card and "are candidates, too" in card


def test_scenarios_of_validation_are_in_the_card_where_there_is_no_test(folder: Path) -> None:
    manifest = Artifact(folder / "artifact").manifest
    valid = {"n": 900, "hr@10": 0.25, "ndcg@10": 0.125, "n/region=r1": 300, "ndcg@10/region=r1": 0.0625}
    card = model_card(manifest.model_copy(update={"metrics": {"valid": valid}}))
    assert "| validation | 900 | 0.2500 | 0.1250 | - | - |" in card
    assert "| validation, region=r1 | 300 | - | 0.0625 | - | - |" in card


def test_posters_are_small_and_missing_ones_empty(folder: Path) -> None:
    posters = Artifact(folder / "artifact").posters
    assert posters is not None
    assert posters[0].startswith(b"\xff\xd8") and 0 < len(posters[0]) < 5_000
    assert posters[0] != posters[1]
    assert posters[2] == posters[29] == posters[500] == b""


def test_only_an_artifact_is_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["export", str(folder / "run"), "--out", str(tmp_path / "mine")]) == 2
    assert "is no artifact" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    out = tmp_path / "artifact"
    assert main(["export", str(folder / "run"), "--out", str(out), "--no-posters"]) == 0
    assert main(["export", str(folder / "run"), "--out", str(out), "--viewers", "2"]) == 0
    assert "viewers.json" in json.loads((out / MANIFEST).read_text())["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".artifact.lock", "artifact", "mine"]
    assert main(["export", str(tmp_path / "mine"), "--out", str(tmp_path / "x")]) == 2


def test_without_a_viewer_asked_for_no_history_is_taken(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, options=Options())
    assert artifact.viewers == [] and not (artifact.folder / "viewers.json").exists()


def test_onboarded_titles_are_not_dropped_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = write_artifact(tmp_path, options=Options(program=False)).folder
    content = np.load(tmp_path / "data" / "content" / "graph.npy")
    add_titles(artifact, [LaunchedTitle(f"new{n}", "", "", 1, content[n]) for n in range(2)])
    again = ["export", str(tmp_path / "run"), "--out", str(artifact)]
    assert main(again) == 2
    assert "holds 2 titles that `m5 onboard` has added" in capsys.readouterr().err
    assert Artifact(artifact).manifest.n_titles == 32
    assert main([*again, "--drop-onboarded"]) == 0
    assert Artifact(artifact).manifest.n_titles == 30
