"""Onboarding: a title gets the vectors that a preparation with it in the catalogue gives; mistakes, by their field."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_prep.graph_encoder import GraphEncoder
from data_prep.graphsage import build_graph
from data_prep.image_encoder import encode_images
from data_prep.new_title import check_title, read_title, rights_rows
from data_prep.onboard import Onboarding, encode_title
from data_prep.text_encoder import encode_text
from m5.schema import ALWAYS, DataError, Encoder, Manifest, PreparedDataset, Split, Vocabulary
from tests.titles import WORDS, paint, write_dataset, write_tiny_bert

WARM, COLD = 40, 6
THEMES = WORDS[5:12]
IMAGES = {"model": "test_resnet", "weights": "random", "image_size": 32, "device": "cpu"}
SOMETHING_NEW = {
    "title_id": "new",
    "title": "storm",
    "description": "a quiet harbour",
    "metadata": {"genres": ["genre 1"], "actors": ["actor 1.0", "in one title", "nobody's"]},
}


@dataclass
class Catalogue:
    """Titles of four genres: words, colours and actors follow the genre. The last COLD have no training event."""

    folder: Path
    bert: str

    def titles(self) -> dict[str, list]:
        rng = np.random.default_rng(0)
        genre = np.arange(WARM + COLD) % 4
        words = [" ".join(rng.permutation([THEMES[g], THEMES[g + 1], *THEMES])[:4]) for g in genre]
        colours = [tuple(int(c) for c in rng.integers(0, 80, 3) + 150 * (np.arange(3) == g)) for g in genre]
        pictures = [paint(self.folder / f"{row}.png", colour) for row, colour in enumerate(colours)]
        cold = [row >= WARM for row in range(WARM + COLD)]
        return {"title": words, "description": words[::-1], "artwork": pictures, "cold": cold}

    def metadata(self) -> dict[str, list[list[str]]]:
        rng = np.random.default_rng(1)
        genre = np.arange(WARM + COLD) % 4
        actors = [[f"actor {g}.{i}" for i in rng.permutation(4)[:2]] for g in genre]
        actors[0].append("in one title")
        actors[1].append("in one of them")
        actors[WARM].append("in one of them")
        return {"genres": [[f"genre {g}"] for g in genre], "actors": actors}

    def prepared(self, name: str, with_new: bool = False) -> Path:
        """The dataset; with the new title at its end as one that nobody has watched."""
        titles, metadata = self.titles(), self.metadata()
        if with_new:
            additional = {"title": "storm", "description": "a quiet harbour", "cold": True}
            additional["artwork"] = paint(self.folder / "new.png", (200, 30, 90))
            for key, value in additional.items():
                titles[key].append(value)
            for kind, values in SOMETHING_NEW["metadata"].items():
                metadata[kind].append(values)
        data = write_dataset(self.folder / name, titles, metadata)
        cache = self.folder / "cache"
        encode_text(data, model=self.bert, cache=cache, device="cpu")
        encode_images(data, **IMAGES, cache=cache)
        build_graph(data, dim=8, epochs=2, device="cpu")
        return data


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("onboard")
    return Catalogue(folder, str(write_tiny_bert(folder)))


@pytest.fixture(scope="module")
def data(catalogue: Catalogue) -> Path:
    return catalogue.prepared("data")


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def as_new(dataset: PreparedDataset, row: int) -> dict[str, object]:
    title = dataset.titles.iloc[row]
    metadata = {kind: list(title[kind]) for kind in dataset.manifest.metadata}
    return {"title_id": "new", "title": title["title"], "description": title["description"], "metadata": metadata}


def encode_rows(data: Path, rows: range) -> tuple[dict[str, np.ndarray], list[str]]:
    dataset, warnings = PreparedDataset(data), []
    onboarding = Onboarding(data, device="cpu", warn=warnings.append)
    titles = [check_title(as_new(dataset, row), dataset.manifest) for row in rows]
    found = onboarding.encode(titles, [Path(dataset.titles["artwork"].iloc[row]) for row in rows])
    return {kind: np.stack([one[kind] for one in found]) for kind in found[0]}, warnings


# ---- vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image", "graph"])
def test_titles_without_training_events_get_the_prepared_vector(data: Path, kind: str) -> None:
    rows = range(WARM, WARM + COLD)
    found, warnings = encode_rows(data, rows)
    np.testing.assert_allclose(found[kind], PreparedDataset(data).content(kind)[rows], atol=2e-6)
    assert warnings == []


def test_titles_with_training_events_get_nearly_the_prepared_vector(data: Path) -> None:
    """They now hear their values of one title, too, which are they themselves; and values still hear them."""
    found, _ = encode_rows(data, range(WARM))
    cosine = (found["graph"] * PreparedDataset(data).content("graph")[:WARM]).sum(1)
    alone = np.arange(WARM) < 2
    np.testing.assert_allclose(cosine[~alone], 1, atol=1e-5)
    assert (cosine[alone] > 0.95).all()
    assert (cosine[alone] < 0.99999).all()


def test_a_new_title_gets_what_a_preparation_with_it_gives(catalogue: Catalogue, data: Path) -> None:
    """Also of an actor who is in one title of the training period, and so in no graph without the new title."""
    with_new = PreparedDataset(catalogue.prepared("with-new", with_new=True))
    without = PreparedDataset(data)
    assert "in one title" not in np.load(data / "metagraph.npz")["1_values"]
    assert "in one title" in np.load(with_new.folder / "metagraph.npz")["1_values"]
    warnings: list[str] = []
    found = encode_title(data, SOMETHING_NEW, catalogue.folder / "new.png", device="cpu", warn=warnings.append)
    assert {kind: vector.dtype for kind, vector in found.items()} == dict.fromkeys(
        ("text", "image", "graph"), np.float32
    )
    for kind in ("text", "image", "graph"):
        np.testing.assert_allclose(found[kind], with_new.content(kind)[-1], atol=2e-6)
        np.testing.assert_array_equal(with_new.content(kind)[:-1][:WARM], without.content(kind)[:WARM])
    assert warnings == [
        "new: metadata.actors: 1 of 3 values are not known from the training period and are ignored: nobody's."
    ]


def test_whatever_is_missing(data: Path) -> None:
    def encode(**fields: object) -> tuple[dict[str, np.ndarray], list[str]]:
        warnings: list[str] = []
        return encode_title(data, {"title_id": "new", **fields}, device="cpu", warn=warnings.append), warnings

    bare, warnings = encode(metadata={"genres": [" genre 2", "genre 2 ", ""]}, category="opera")
    assert not bare["text"].any() and not bare["image"].any()
    np.testing.assert_allclose(np.linalg.norm(bare["graph"]), 1, rtol=1e-5)
    assert warnings == [
        "new: it has neither a title nor a description.",
        "new: category: opera is not known (none are) and is ignored.",
    ]
    text, _ = encode(description="storm")
    np.testing.assert_allclose([np.linalg.norm(text[kind]) for kind in ("text", "graph")], 1, rtol=1e-5)
    genre, _ = encode(description="storm", metadata={"genres": ["genre 0"]})
    other, _ = encode(description="storm", metadata={"genres": ["genre 1"]})
    np.testing.assert_array_equal(text["text"], genre["text"])
    assert np.abs(genre["graph"] - other["graph"]).max() > 0.01
    with pytest.raises(DataError, match="nothing to place it by"):
        encode(metadata={"actors": ["nobody's"]})


def test_without_shared_metadata_or_without_content(tmp_path: Path, catalogue: Catalogue) -> None:
    titles = {"title": ["storm", "night", "quiet harbour"]}
    alone = write_dataset(tmp_path / "text", titles, {"actors": [["x"], ["y"], []]})
    encode_text(alone, model=catalogue.bert, cache=tmp_path / "cache", device="cpu")
    build_graph(alone, dim=4)
    warnings: list[str] = []
    found = encode_title(alone, as_new(PreparedDataset(alone), 2), device="cpu", warn=warnings.append)
    np.testing.assert_allclose(found["graph"], PreparedDataset(alone).content("graph")[2], atol=1e-6)
    title = {"title_id": "new", "title": "storm", "metadata": {"actors": ["x"]}}
    encode_title(alone, title, device="cpu", warn=warnings.append)
    assert warnings == [
        "new: metadata.actors is ignored (x): no title of the training period shares a value of this kind with another "
        "title, so the content graph does without it."
    ]
    warnings.clear()
    metadata = {"genres": [["g"], ["g"], ["h"], ["h"], ["g"]]}
    bare = write_dataset(
        tmp_path / "bare", {"title": ["t0", "t1", "t2", "t3", "t4"], "cold": [False] * 4 + [True]}, metadata
    )
    build_graph(bare, dim=4, epochs=2)
    rows, _ = GraphEncoder.load(bare).encode({}, [{"genres": ["g"]}, {"genres": ["h"]}])
    np.testing.assert_allclose(rows[0], PreparedDataset(bare).content("graph")[4], atol=1e-6)
    title = {"title_id": "new", "title": "storm", "metadata": {"genres": ["g"]}}
    found = encode_title(bare, title, catalogue.folder / "0.png", device="cpu", warn=warnings.append)
    assert list(found) == ["graph"]
    assert warnings == ["new: the dataset has no artwork, so the poster is ignored."]


# ---- what is there, and what is not ---------------------------------------------------------------------------


def test_a_dataset_of_an_earlier_version(copy: Path) -> None:
    (copy / "content" / "image.safetensors").unlink()
    title = {"title_id": "new", "title": "storm"}
    assert encode_title(copy, title, device="cpu")["text"].any()
    with pytest.raises(DataError, match=r"image\.safetensors is missing.*`m5 encode"):
        encode_title(copy, title, Path(PreparedDataset(copy).titles["artwork"].iloc[0]), device="cpu")
    (copy / "content" / "graph.safetensors").unlink()
    with pytest.raises(DataError, match=r"graph\.safetensors is missing.*Run `m5 graph .*data` again"):
        encode_title(copy, title, device="cpu")
    assert PreparedDataset(copy).content("graph").shape == (WARM + COLD, 16)


def changed_record(data: Path, kind: str, **changes: object) -> None:
    manifest = Manifest.read(data)
    record = manifest.encoders[kind].model_copy(update=changes)
    manifest.model_copy(update={"encoders": manifest.encoders | {kind: record}}).write(data)


@pytest.mark.parametrize("kind", ["text", "image", "graph"])
def test_vectors_that_were_written_anew(copy: Path, kind: str) -> None:
    changed_record(copy, kind, sha256="other")
    with pytest.raises(DataError, match=r"graph\.safetensors belongs to other vectors .*m5 graph"):
        encode_title(copy, SOMETHING_NEW, device="cpu")


def test_a_damaged_file(copy: Path) -> None:
    path = copy / "content" / "graph.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        encode_title(copy, SOMETHING_NEW, device="cpu")


def test_a_dataset_without_content(tmp_path: Path) -> None:
    bare = write_dataset(tmp_path / "bare", {"title": ["storm"]})
    with pytest.raises(DataError, match="has no content graph"):
        encode_title(bare, SOMETHING_NEW, device="cpu")


def test_weights_that_are_not_to_be_had(copy: Path, tmp_path: Path) -> None:
    poster = Path(PreparedDataset(copy).titles["artwork"].iloc[0])
    changed_record(copy, "image", weights="ours.pth")
    with pytest.raises(DataError, match=r"a file named ours\.pth.*--image-weights"):
        encode_title(copy, SOMETHING_NEW, poster, device="cpu")
    with pytest.raises(DataError, match="not weights of test_resnet"):
        (tmp_path / "ours.pth").write_bytes(b"no weights")
        encode_title(copy, SOMETHING_NEW, poster, image_weights=str(tmp_path / "ours.pth"), device="cpu")
    changed_record(copy, "text", model=str(tmp_path / "moved"))
    with pytest.raises(DataError, match="moved"):
        encode_title(copy, SOMETHING_NEW, device="cpu")


def test_other_text_weights_are_refused(copy: Path, catalogue: Catalogue, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(catalogue.bert, tmp_path / "bert"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"text was encoded by .* their vectors do not fit.*--text"):
        encode_title(copy, SOMETHING_NEW, text=str(other), device="cpu")


def test_posters_that_are_none(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        encode_title(data, SOMETHING_NEW, tmp_path / "absent.jpg", device="cpu")
    (tmp_path / "broken.jpg").write_text("this is no picture")
    with pytest.raises(DataError, match="no readable image"):
        encode_title(data, SOMETHING_NEW, tmp_path / "broken.jpg", device="cpu")


# ---- TITLE.json ----------------------------------------------------------------------------------------------

SERVICE = Manifest(
    source="tests",
    name="service",
    n_users=0,
    n_titles=0,
    n_events=0,
    n_cold_titles=0,
    split=Split(kind="time"),
    split_counts={},
    categories=Vocabulary(name="category", values=("movie", "series")),
    scenarios=(Vocabulary(name="region", values=("BR", "US")), Vocabulary(name="plan", values=("ads", "premium"))),
    metadata=("genres", "actors"),
    rights_scenarios=("region", "plan"),
    encoders={"graph": Encoder(model="GraphSAGE", weights="trained", dim=8)},
)


def test_a_title_as_json(tmp_path: Path) -> None:
    record = {
        "title_id": "t9",
        "released": "1970-01-02",
        "metadata": {"genres": [" drama", "", "drama", "noir"]},
        "rights": [
            {"region": "US", "plan": "*", "start": "1970-01-01T01:00:00+01:00", "end": 86_400.5},
            {"region": None},
        ],
    }
    (tmp_path / "title.json").write_text(json.dumps(record))
    title = read_title(tmp_path / "title.json", SERVICE)
    assert (title.title_id, title.title, title.category, title.released) == ("t9", "", None, 86_400)
    assert title.metadata == {"genres": ("drama", "noir")}
    rows = rights_rows(title, SERVICE)
    assert rows.to_dict("list") == {"region": [2, 0], "plan": [0, 0], "start": [0, ALWAYS], "end": [86_400, -ALWAYS]}
    assert [str(kind) for kind in rows.dtypes] == ["int32", "int32", "int64", "int64"]
    assert len(rights_rows(check_title({"title_id": "t9"}, SERVICE), SERVICE)) == 0


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ([], "the file: Input should be"),
        ({}, "title_id is missing"),
        ({"title_id": ""}, "title_id: String should have at least 1 character"),
        ({"title_id": 7}, "title_id: Input should be a valid string"),
        ({"title_id": "t", "descripton": "x"}, "unknown field descripton (did you mean description?)"),
        ({"title_id": "t", "poster": "x"}, "unknown field poster (known: title_id, title,"),
        ({"title_id": "t", "released": "soon"}, "released: no date and time, e.g."),
        ({"title_id": "t", "released": True}, "released: Input should be a valid integer"),
        ({"title_id": "t", "released": 1_700_000_000_000}, "released: too large for seconds since the epoch"),
        ({"title_id": "t", "metadata": {"genres": "drama"}}, "metadata.genres: Input should be a valid tuple"),
        (
            {"title_id": "t", "metadata": {"genre": ["drama"]}},
            "metadata.genre: the dataset has no such kind (did you mean",
        ),
        ({"title_id": "t", "rights": [{"start": 2, "end": 1}]}, "rights.0: the end is not after the start"),
        ({"title_id": "t", "rights": [{"country": "US"}]}, "rights.0.country: rights do not depend on this scenario"),
        ({"title_id": "t", "rights": [{}, {"region": "us"}]}, "rights.1.region: 'us' is not known from the training"),
        ({"title_id": "", "title": 1}, "title_id: String should have at least 1 character; title: Input should be"),
    ],
)
def test_mistakes_are_told_by_field(record: object, told: str) -> None:
    with pytest.raises(DataError) as raised:
        check_title(record, SERVICE, "title.json")
    assert str(raised.value).startswith("title.json: ")
    assert told in str(raised.value)


def test_rights_of_a_dataset_without_any() -> None:
    free = SERVICE.model_copy(update={"rights_scenarios": None})
    with pytest.raises(DataError, match="every title may be played by everyone"):
        check_title({"title_id": "t", "rights": [{}]}, free)


@pytest.mark.parametrize(("content", "told"), [(None, "does not exist"), ("{", "is no JSON")])
def test_files_that_are_none(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "title.json").write_text(content)
    with pytest.raises(DataError, match=told):
        read_title(tmp_path / "title.json", SERVICE)
