"""A title that joins an artifact: its key is what a cold title of the same content has, and rights hold for it."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from m5.cli import main
from m5.config import ConfigError
from m5.schema import DataError, PreparedDataset
from m5.serving.artifact import Artifact
from m5.serving.card import model_card
from m5.serving.export import Options, export, one_writer
from m5.serving.index import IndexKind
from m5.serving.onboard import LaunchedTitle, add_titles, grants, refuse_other_dataset
from m5.serving.retriever import Ask, Retriever
from m5.serving.rights import Grant
from m5.viewer import Viewer
from tests.serving import write_run
from tests.world import write_world

COLD = 27  # of the tiny world: watched after the training period only


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onboard")
    export(write_run(folder), folder / "artifact", Options(program=False))
    return folder


@pytest.fixture
def artifact(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "artifact", tmp_path / "artifact")
    return tmp_path / "artifact"


def launched(folder: Path, title_id: str = "new", **changes) -> LaunchedTitle:
    """A title with the content of a cold one."""
    content = np.load(folder / "data" / "content" / "graph.npy")[COLD]
    known = {"title": "New", "description": "", "category": 1, "content_G": content, "grants": [Grant()]}
    return LaunchedTitle(title_id, **(known | changes))


def test_it_scores_as_a_cold_title_of_its_content_does(folder: Path, artifact: Path) -> None:
    before = Retriever(Artifact(artifact))
    after = Retriever(add_titles(artifact, [launched(folder)]))
    assert after.manifest.n_titles == 31 and after.place["new"] == 30
    torch.testing.assert_close(after.key_NQ[30], before.key_NQ[COLD], atol=1e-6, rtol=0)
    torch.testing.assert_close(after.key_NQ[:30], before.key_NQ, atol=0, rtol=0)
    viewer = Viewer(np.array([3, 8]), np.array([0, 9]), 10**7, scenario={"region": 1})
    torch.testing.assert_close(after.queries([viewer])[0], before.queries([viewer])[0], atol=0, rtol=0)
    (answer,) = after.recommend([Ask(viewer, 100)])
    scores = dict(zip(answer.title.tolist(), answer.score.tolist(), strict=True))
    assert scores[30] == pytest.approx(scores[COLD], abs=1e-5)
    # It may be watched, too.
    assert np.isfinite(after.queries([Viewer(np.array([30]), np.array([5]), 9)])[0].numpy()).all()


def test_rights_hold_for_it(folder: Path, artifact: Path) -> None:
    grants = {"a": [Grant(start=1000, scenario={0: 2})], "b": [], "c": [Grant(end=500)]}
    titles = [launched(folder, name, grants=rows) for name, rows in grants.items()]
    retriever = Retriever(add_titles(artifact, titles))

    def playable(region: int, at: int) -> set[str]:
        (answer,) = retriever.recommend(
            [Ask(Viewer(np.zeros(0, int), np.zeros(0, int), at, scenario={"region": region}), 99)]
        )
        return {retriever.title_ids[title] for title in answer.title} & set(grants)

    assert playable(2, 999) == set() and playable(2, 1000) == {"a"} and playable(1, 1000) == set()
    assert playable(0, 499) == {"c"} and playable(0, 500) == set()


def playable(retriever: Retriever, at: int) -> set[str]:
    (answer,) = retriever.recommend([Ask(Viewer(np.zeros(0, int), np.zeros(0, int), at), 99)])
    return {retriever.title_ids[title] for title in answer.title}


def test_a_release_date_holds_where_there_were_no_rights(tmp_path: Path) -> None:
    run = write_run(tmp_path, rights=False)
    manifest = PreparedDataset(tmp_path / "data").manifest
    assert export(run, tmp_path / "artifact", Options(program=False)).rights is None
    always = launched(tmp_path, "a", grants=grants(None, None, manifest))
    later = launched(tmp_path, "b", grants=grants(None, 1000, manifest))
    known = {f"t{n}" for n in range(30)}
    assert add_titles(tmp_path / "artifact", [always]).rights is None  # always there: nothing is to be remembered
    retriever = Retriever(add_titles(tmp_path / "artifact", [later]))
    assert playable(retriever, 999) == {*known, "a"}
    assert playable(retriever, 1000) == {*known, "a", "b"}
    nobodys = add_titles(tmp_path / "artifact", [launched(tmp_path, "c", grants=[])])
    assert playable(Retriever(nobodys), 1000) == {*known, "a", "b"}


def test_posters_and_titles_follow(folder: Path, artifact: Path) -> None:
    grown = add_titles(artifact, [launched(folder, poster=folder / "blue.png"), launched(folder, "plain")])
    assert grown.posters is not None
    assert grown.posters[30] == grown.posters[1] != b"" and grown.posters[31] == b""
    assert grown.titles["title_id"].tolist()[30:] == ["new", "plain"]
    assert grown.titles["cold"].tolist()[30:] == [True, True]
    assert "2 of them added after training" in (artifact / "card.md").read_text()
    assert sorted(path.name for path in artifact.parent.iterdir()) == [".artifact.lock", "artifact"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (Options(int8=True, program=False), "int8"),
        (Options(index="int8", program=False), "int8"),
        (Options(index="hnsw", program=False), "hnsw"),
        (Options(index="ivfpq", program=False), "ivfpq"),
        (Options(index="hnsw", int8=True, program=False), "hnsw"),
    ],
)
def test_keys_in_int8_and_kept_indexes_grow(folder: Path, tmp_path: Path, options: Options, kind: IndexKind) -> None:
    export(folder / "run", tmp_path / "artifact", options)
    exact = Retriever(Artifact(folder / "artifact"))
    grown = Retriever(add_titles(tmp_path / "artifact", [launched(folder)]), kind)
    assert (grown.index.kind, grown.index.titles) == (kind, 31)
    viewer = Viewer(np.array([3, 8]), np.array([0, 9]), 10**7, scenario={"region": 1})
    (answer,) = grown.recommend([Ask(viewer, 100)])
    assert 30 in answer.title
    step = float(exact.key_NQ.abs().max()) / 127
    assert float((grown.key_NQ[30] - exact.key_NQ[COLD]).abs().max()) <= step


def test_what_cannot_join_is_refused_and_changes_nothing(folder: Path, artifact: Path, tmp_path: Path) -> None:
    digest = Artifact(artifact).digest
    with pytest.raises(DataError, match="has a title 't3' already"):
        add_titles(artifact, [launched(folder, "t3")])
    with pytest.raises(DataError, match="a title is added once"):
        add_titles(artifact, [launched(folder, "x"), launched(folder, "x")])
    with pytest.raises(DataError, match=r"of shape \(5,\), where the model reads 6"):
        add_titles(artifact, [launched(folder, content_G=np.zeros(5, dtype=np.float32))])
    with pytest.raises(DataError, match=r"nothing that the model reads \(graph\) is known of it"):
        add_titles(artifact, [launched(folder, content_G=np.zeros(6, dtype=np.float32))])
    with pytest.raises(DataError, match="exported from another run meanwhile"):
        add_titles(artifact, [launched(folder)], weights="other")
    assert Artifact(artifact).digest == digest
    other = write_world(tmp_path / "other", users=9)
    with pytest.raises(DataError, match="belongs to the dataset 'tiny', not to"):
        refuse_other_dataset(Artifact(artifact), other)
    moved = tmp_path / "moved"
    shutil.copytree(folder / "data", moved)
    np.save(moved / "content" / "graph.npy", np.load(moved / "content" / "graph.npy")[::-1])
    with pytest.raises(DataError, match="other vectors"):
        refuse_other_dataset(Artifact(artifact), PreparedDataset(moved))
    assert json.loads((artifact / "artifact.json").read_text())["n_titles"] == 30


# ---- one at a time, and what a kill leaves -------------------------------------------------------------------------


def test_two_at_once_wait_for_each_other(folder: Path, artifact: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        added = [pool.submit(add_titles, artifact, [launched(folder, name)]) for name in "abcd"]
    assert {one.exception() for one in added} == {None}
    assert sorted(Artifact(artifact).titles["title_id"].tolist()[30:]) == ["a", "b", "c", "d"]


def test_who_waits_too_long_is_refused(folder: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m5.serving.export.PATIENCE", 0)
    monkeypatch.chdir(artifact.parent)
    with one_writer(artifact):
        with pytest.raises(ConfigError, match=r"^artifact is in use: another `m5 export` or `m5 onboard` writes to it"):
            add_titles(Path("artifact"), [launched(folder)])
        with pytest.raises(ConfigError, match="is in use"):
            export(folder / "run", artifact, Options(program=False))
    assert add_titles(Path("artifact"), [launched(folder)]).manifest.n_titles == 31


def test_what_a_killed_one_has_left_is_recovered(folder: Path, artifact: Path) -> None:
    (artifact.parent / ".artifact.writing").mkdir()
    (artifact.parent / ".artifact.writing" / "half").touch()
    artifact.rename(artifact.with_name(".artifact.previous"))
    assert Artifact(artifact).manifest.n_titles == 30
    artifact.rename(artifact.with_name(".artifact.previous"))
    grown = add_titles(artifact, [launched(folder)])
    assert grown.manifest.n_titles == 31 and not (artifact / "half").exists()
    assert sorted(path.name for path in artifact.parent.iterdir()) == [".artifact.lock", "artifact"]


def test_an_artifact_behind_a_link(folder: Path, artifact: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(artifact)
    for title_id in ("a", "b"):
        add_titles(link, [launched(folder, title_id)])
    assert link.is_symlink()
    assert Artifact(artifact).manifest.n_titles == Artifact(link).manifest.n_titles == 32


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_takes_several_titles(
    folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    received: dict[str, object] = {}

    class Encoder:
        """Stands in for the text and artwork encoders, which the tiny world has none of."""

        def __init__(self, data: Path, **given: object):
            received.update(given)

        def encode(self, titles: list, posters: list) -> list[dict[str, np.ndarray]]:
            received["posters"] = posters
            return [{"graph": launched(folder).content_G}] * len(titles)

    monkeypatch.setattr("data_prep.onboard.Onboarding", Encoder)
    for title_id, rights in (("a", [{}]), ("b", [])):
        (tmp_path / f"{title_id}.json").write_text(json.dumps({"title_id": title_id, "rights": rights}))
    a, b, poster = (str(path) for path in (tmp_path / "a.json", tmp_path / "b.json", folder / "blue.png"))
    given = ["--artifact", str(artifact), "--data", str(folder / "data")]
    assert main(["onboard", poster, a, *given]) == 2
    assert "a poster stands behind the TITLE.json" in capsys.readouterr().err
    assert main(["onboard", a, poster, b, *given, "--text", "BERT"]) == 0
    assert received == {"text": "BERT", "image_weights": None, "posters": [folder / "blue.png", None]}
    shown = capsys.readouterr()
    assert "a is title 31" in shown.out and "b is title 32" in shown.out
    assert "b has no rights, so nobody may play it" in shown.err and "a has no rights" not in shown.err
    assert "Trained with model.id_dropout=0: titles added after training may hardly be found" in shown.err
    posters = Artifact(artifact).posters
    assert posters is not None and posters[30] != b"" == posters[31]


@pytest.mark.parametrize(("id_dropout", "doubted"), [(0.0, True), (0.01, True), (0.05, False), (0.2, False)])
def test_the_card_doubts_models_that_have_hardly_seen_such_titles(
    folder: Path, id_dropout: float, doubted: bool
) -> None:
    manifest = Artifact(folder / "artifact").manifest
    model = manifest.model.model_copy(update={"id_dropout": id_dropout})
    assert (f"model.id_dropout={id_dropout:g}" in model_card(manifest.model_copy(update={"model": model}))) == doubted
    without = manifest.model_copy(update={"model": model, "content_width": 0})
    assert "id_dropout" not in model_card(without)
