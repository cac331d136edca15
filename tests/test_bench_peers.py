"""The comparison with RecTools: what is counted, that both sides answer the same requests, what is promised."""

from __future__ import annotations

import importlib.util
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peers_line import Ended, Line
from m5.config import ConfigError, load_config
from m5.evaluate import evaluate
from m5.schema import TEST, TRAIN, VALID, DataError, PreparedDataset
from tests.world import write_world

PEER_PYTHON = Path(__file__).parents[1] / ".venv-peers/bin/python"
HISTORY = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return write_world(tmp_path_factory.mktemp("peers") / "data", users=40, titles=300, split="leave-last-out")


def test_lists_are_measured_by_the_places_in_them(world: PreparedDataset) -> None:
    event = np.flatnonzero(world.event_array("split") == TEST)
    user, target = world.user_of(event), np.asarray(world.event_array("title"))[event]
    # Every viewer's list has two titles: the target stands first, second, or not in it.
    place = np.arange(len(event)) % 3 + 1
    other = (target + 1) % world.manifest.n_titles
    title = np.stack([np.where(place == 1, target, other), np.where(place == 2, target, other)], axis=1)
    rank = np.tile([1, 2], (len(event), 1))
    shuffled = np.random.default_rng(0).permutation(title.size)
    lists = peers.Lists("lists", world, *(x.ravel()[shuffled] for x in (np.repeat(user[:, None], 2, 1), title, rank)))

    # A seen title leaves the list, so look at lists as they are.
    overall = evaluate(world, [lists], filter_seen=False, bootstrap=0)["models"]["lists"]["overall"]

    first, second = (place == 1).sum(), (place == 2).sum()
    assert overall["hr@10"] == pytest.approx((first + second) / len(event))
    assert overall["ndcg@10"] == pytest.approx((first + second / np.log2(3)) / len(event))


def test_a_viewer_without_a_list_counts_as_a_miss(world: PreparedDataset) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    overall = evaluate(world, [peers.Lists("none", world, nothing, nothing, nothing)], bootstrap=0)["models"]["none"]
    assert overall["overall"]["ndcg@10"] == 0


@pytest.mark.parametrize("model", ["m5", "m5-plain"])
@pytest.mark.parametrize("loss", list(peers.LOSSES))
def test_both_sides_have_the_same_shape(model: str, loss: str) -> None:
    config = load_config(
        "ml1m", peers.overrides(model, history=50, loss=loss, threads=2, device="cpu"), Path("data"), Path("out")
    )
    theirs = peers.peer_settings(history=50, loss=loss)
    ours = (config.model.width, config.model.blocks, config.model.heads, config.sequences.history)
    assert ours == (theirs["n_factors"], theirs["n_blocks"], theirs["n_heads"], theirs["session_max_len"])
    assert config.sequences.sequences == theirs["batch_size"]
    assert (config.candidates.kind == "full") == (theirs["loss"] == "softmax")
    if loss == "sampled":
        assert config.candidates.count == theirs["n_negatives"]


def test_promises_compare_turn_by_turn_and_only_what_both_have() -> None:
    def found(model: str, rates: list[float], ndcg: float | None = None, history: int = 50) -> peers.Found:
        return peers.Found(model, history, "softmax", rates=rates, metrics={} if ndcg is None else {"ndcg@10": ndcg})

    made = peers.promises(
        [found("m5", [40, 4, 36], 0.2), found("sasrec", [10, 1, 12], 0.2), found("m5", [1], history=200)]
    )
    speed, quality = made
    assert speed.value == 4 and speed.kept  # of 4, 4 and 3, while the ratio of the medians is 3.6
    assert quality.value == 0 and not quality.kept  # equal is not higher


def test_rows_have_the_same_columns() -> None:
    rows = peers.table(
        [
            peers.Found("m5", 50, "softmax", rates=[100.0], epoch_targets=1000),
            peers.Found(
                "sasrec",
                50,
                "softmax",
                trained={"seconds": 1.0, "batches": 3},
                metrics={"ndcg@10": 0.1, "hr@10": 0.2, "hr@200": 0.3, "ci": {"ndcg@10": (0.0, 0.2)}},
            ),
        ]
    )
    assert list(rows[0]) == list(rows[1])
    assert rows[0]["s/epoch"].median == 10 and rows[0]["NDCG@10"] == "-" and rows[1]["targets/s"] == "-"


def test_mistakes_are_told(tmp_path: Path) -> None:
    options = peers.argparse.Namespace(models=["m5", "sasrec"], peer_python=tmp_path / "python")
    with pytest.raises(ConfigError, match="Install RecTools"):
        peers.check(options, tmp_path)
    write_world(tmp_path / "data")
    options.models = ["m5"]
    with pytest.raises(DataError, match="leave-last-out"):
        peers.check(options, tmp_path / "data")


def test_a_process_that_fails_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(Ended, match=r"benchmarks\.nothing ended with 1: .*No module named benchmarks\.nothing"):
        Line(sys.executable, "benchmarks.nothing", tmp_path / "log", 1, {})


needs_the_peer = pytest.mark.skipif(not PEER_PYTHON.is_file(), reason=f"needs RecTools in {PEER_PYTHON}")


@needs_the_peer
def test_the_peer_trains_on_the_training_watches_and_reads_all_before_the_test(
    world: PreparedDataset, tmp_path: Path
) -> None:
    peers.export_events(world, tmp_path / "events.npz")
    settings = peers.peer_settings(history=HISTORY, loss="softmax") | {"n_factors": 16, "batch_size": 1000}
    told = {"events": str(tmp_path / "events.npz"), "model": "sasrec", "device": "cpu", "threads": 1}
    line = Line(PEER_PYTHON, "benchmarks.peers_rectools", tmp_path / "log", 1, told | {"settings": settings})
    try:
        answer = line.ask("steps", skip=1, batches=2)
        line.ask("recommend", k=peers.LISTED, out=str(tmp_path / "lists.npz"))
    finally:
        line.close()
    split, title = np.asarray(world.event_array("split")), np.asarray(world.event_array("title"))
    user = world.user_of(np.arange(len(split)))
    trained = np.bincount(user[split == TRAIN], minlength=world.manifest.n_users)
    targets = int(np.maximum(0, np.minimum(trained, HISTORY + 1) - 1).sum())
    # A batch holds all viewers: the clock has seen each target once a batch.
    assert line.described["epoch_targets"] == targets
    assert answer["targets"] == 2 * targets and answer["batches"] == 2
    with np.load(tmp_path / "lists.npz") as lists:
        listed = set(zip(lists["user"].tolist(), lists["title"].tolist(), strict=True))
    watched = set(zip(user[split != TEST].tolist(), title[split != TEST].tolist(), strict=True))
    asked, answered = set(user[split == TEST].tolist()), {viewer for viewer, _ in listed}
    # Only viewers whose few watches RecTools has not trained on go without a list.
    assert {viewer for viewer in asked if trained[viewer] >= 2} <= answered <= asked
    assert not listed & watched
    # Titles of validation watches are listed for others: it is the viewer's own that keep them away.
    assert set(title[split == VALID].tolist()) & {t for _, t in listed}


def test_the_peers_side_imports_nothing_of_m5() -> None:
    for name in ("benchmarks.peers_rectools", "benchmarks.peers_line", "benchmarks"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        words = chain.from_iterable(line.split()[:2] for line in Path(spec.origin).read_text().splitlines())
        assert not {word for word in words if word == "m5" or word.startswith("m5.")}, name
