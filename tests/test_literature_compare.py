"""`m5 compare` when things go wrong or are changed between calls: what is refused, retried, told, and left running."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.literature import compare as comparison
from benchmarks.literature import ease, job, mind
from benchmarks.literature import m5 as own
from benchmarks.literature.job import Setup, record_of
from benchmarks.literature.paired import against_m5, viewers
from benchmarks.literature.processes import Terminated, each_apart, stoppable, why_it_ended
from benchmarks.literature.system import CannotFeed, System
from benchmarks.literature.systems import MODULES, SHORT_HISTORY, chosen
from m5.cli import main
from m5.config import ConfigError
from m5.resume import LOCK, locked
from m5.schema import TEST, TRAIN, VALID, DataError, PreparedDataset
from tests import workers
from tests.handmade import write_handmade

DAY = 86_400


def world(folder: Path, users: int = 30) -> PreparedDataset:
    generator = np.random.default_rng(0)
    plan = [TRAIN] * 6 + [VALID, TEST]
    histories = [
        [(int(title), DAY * place, split) for place, (title, split) in enumerate(zip(titles, plan, strict=True))]
        for titles in (generator.permutation(12)[:8] + 12 * (user % 2) for user in range(users))
    ]
    return write_handmade(folder, histories, titles=24)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return world(tmp_path / "d").folder


def setup_of(data: Path, **settings: Any) -> Setup:
    values: dict[str, Any] = {"preset": "default", "history": 8, "seconds": 3.0, "trials": 2, "seeds": 1}
    values |= {"filter_seen": True, "validation_targets": 50, "max_targets": None} | settings
    return Setup(data=str(data), content_hash=PreparedDataset(data).manifest.content_hash, **values)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Systems run in this process, M5 does not; returned is which ran in each call."""
    ran: list[list[str]] = []

    def run(names: list[str], setup: Setup, folder: Path, jobs: int) -> dict[str, dict[str, Any]]:
        ran.append(list(names))
        return {name: record_of(name, setup, folder) for name in names}

    monkeypatch.setattr(comparison, "_run", run)
    monkeypatch.setattr(comparison, "chosen", lambda names: list(names))
    return ran


def compare(data: Path, out: Path, *systems: str, **settings: Any) -> int:
    return comparison.compare(data=data, out=out, systems=list(systems), **({"trials": 1, "seeds": 1} | settings))


class Constant:
    """Scores every title with one value."""

    def __init__(self, value: float, titles: int):
        self.name, self.value, self.titles = "ease", value, titles

    def score(self, event_index: np.ndarray) -> np.ndarray:
        return np.full((len(event_index), self.titles), self.value, dtype=np.float32)


def replaced(monkeypatch: pytest.MonkeyPatch, fit: Any, *settings: dict[str, Any]) -> None:
    made = System("ease", "t", "s", "b", "d", settings, fit, by_chance=False)
    monkeypatch.setattr(job, "system", lambda name: made)


# ---- what a record says ----------------------------------------------------------------------------------------


def test_a_trial_of_nan_is_below_all_others(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda data, settings, seed, seconds: Constant(settings["v"], 24), {"v": np.nan}, {"v": 1.0})
    record = record_of("ease", setup_of(data), tmp_path)
    assert record["chosen"] == {"v": 1.0}
    assert record["tuning"][0]["ndcg@10"] is None
    assert "with NaN" in record["tuning"][0]["failed"]
    assert "seeds" in record


def test_what_diverges_has_failed_and_is_not_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, lambda *arguments: Constant(np.nan, 24), {})
    record = record_of("ease", setup_of(data), tmp_path)
    assert record["failed"].startswith("ValueError: no setting could be validated; the first: row 'ease' scored")
    fits = iter([Constant(1.0, 24), Constant(np.nan, 24)])
    replaced(monkeypatch, lambda *arguments: next(fits), {})
    assert "with NaN" in record_of("ease", setup_of(data), tmp_path)["failed"]


def test_only_what_cannot_be_fed_is_skipped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*arguments: Any) -> None:
        raise CannotFeed("no posters")

    replaced(monkeypatch, lacking, {})
    assert record_of("ease", setup_of(data), tmp_path)["skipped"] == "no posters"


@pytest.mark.parametrize("name", ["svd", "peng"])
def test_one_viewer_is_too_few_for_singular_vectors(name: str, tmp_path: Path) -> None:
    one = world(tmp_path / "one", users=1)
    assert "at least two viewers" in record_of(name, setup_of(one.folder), tmp_path)["skipped"]


def test_every_fit_pays_for_its_matrix_and_parameters_are_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: list[bool] = []
    fit = ease.SYSTEM.fit

    def watched(given: Any, *rest: Any) -> Any:
        cached.append("interactions" in vars(given))
        return fit(given, *rest)

    replaced(monkeypatch, watched, *ease.SYSTEM.settings)
    record = record_of("ease", setup_of(data), tmp_path)
    assert cached == [False, False, False]  # two trials and a training
    assert record["cost"]["parameters"] == 24 * 24 - 24
    monkeypatch.undo()
    assert record_of("item-knn", setup_of(data), tmp_path)["cost"]["parameters"] > 0


def test_a_record_says_how_it_was_made(data: Path, tmp_path: Path) -> None:
    made = record_of("popularity", setup_of(data), tmp_path)["made"]
    assert set(made) == {"date", "commit", "cpu", "versions", "threads", "load"}
    assert made["threads"] >= 1 and "torch" in made["versions"]


def test_the_line_of_a_system_has_the_deviation_of_the_page() -> None:
    cost = {"train_seconds": 2.0}
    seeds = [{"overall": {"ndcg@10": value}} for value in (0.1, 0.2, 0.6)]
    # sqrt((.2^2 + .1^2 + .3^2) / 2) = .2646
    assert comparison.told({"name": "als", "cost": cost, "seeds": seeds}) == (
        "als: NDCG@10 0.3000 ± 0.2646 over 3 seeds, 2 s of training each"
    )
    assert comparison.told({"name": "ease", "cost": cost, "seeds": seeds[:1]}) == (
        "ease: NDCG@10 0.1000 with one seed, 2 s of training each"
    )


def test_m5_ends_its_steps_early_enough(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building takes 3 s, a validation 4: of 50 s are left 49 less 7 gone, 4 for the last and 3 for reading it."""
    clock = [100.0]
    monkeypatch.setattr(own.time, "monotonic", lambda: clock[0])

    def build(self: Any, config: Any, place: Any, beat: Any) -> None:
        self.config = config
        clock[0] += 3

    def validate(self: Any) -> None:
        clock[0] += 4

    monkeypatch.setattr(own.Trainer, "__init__", build)
    monkeypatch.setattr(own.Trainer, "validate", validate)
    config = own.load_config("default", ["training.max_minutes=9"], data, data / "run")
    timed = own.TimedTrainer(config, None, None, began=100.0, seconds=50.0)  # type: ignore[arg-type]
    assert 60 * timed.config.training.max_minutes == pytest.approx(50 * 0.98 - 7 - 4 - 3)
    assert 60 * own.TimedTrainer(config, None, None, began=0.0, seconds=50.0).config.training.max_minutes == 5  # type: ignore[arg-type]


# ---- the next call ---------------------------------------------------------------------------------------------


def test_what_was_skipped_is_tried_again(
    data: Path, tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*arguments: Any) -> None:
        raise CannotFeed("no posters")

    with monkeypatch.context() as without:
        without.setattr(job, "_measured", lacking)
        assert compare(data, tmp_path / "c", "ease") == 0
    assert compare(data, tmp_path / "c", "ease") == 0
    assert here == [["ease"], ["ease"]]
    assert "seeds" in json.loads((tmp_path / "c" / "systems" / "ease.json").read_text())


def test_a_failed_system_stays_on_the_page(
    data: Path, tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    with monkeypatch.context() as broken:
        broken.setattr(job, "_measured", lambda *arguments: 1 / 0)
        assert compare(data, out, "ease") == 1
    assert compare(data, out, "popularity") == 1
    assert here == [["ease"], ["popularity"]]
    assert "ease: failed: ZeroDivisionError: division by zero" in (out / "compare.md").read_text()


def test_exit_is_1_where_m5_has_no_result(
    data: Path, tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*arguments: Any) -> None:
        raise CannotFeed("nothing")

    monkeypatch.setattr(job, "_measured", lacking)
    monkeypatch.setattr(comparison, "_refuse_without_content", lambda *arguments: None)
    assert compare(data, tmp_path / "c", "m5") == 1


def test_vectors_that_m5_needs_are_missed_before_anything_runs(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no graph vectors, which M5's preset asks for"):
        compare(data, tmp_path / "c", "ease")
    assert not (tmp_path / "c").exists()


def test_other_vectors_and_other_threads_are_refused_and_another_path_is_not(
    data: Path, tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 4)
    (data / "content").mkdir(exist_ok=True)
    np.save(data / "content" / "text.npy", np.zeros((24, 2), np.float32))
    out = tmp_path / "c"
    assert compare(data, out, "ease", jobs=2) == 0
    (tmp_path / "elsewhere").symlink_to(data)
    assert compare(tmp_path / "elsewhere", out, "ease", jobs=2) == 0
    with pytest.raises(ConfigError, match=r"with threads=2, not 1 \(it follows from --jobs"):
        compare(data, out, "ease", jobs=4)
    np.save(data / "content" / "text.npy", np.ones((24, 2), np.float32))
    with pytest.raises(ConfigError, match=r"with content=text [0-9a-f]{16}, not text [0-9a-f]{16}"):
        compare(data, out, "ease", jobs=2)


def test_vectors_that_change_meanwhile_are_noticed(
    data: Path, tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["text 1", "text 2"])
    monkeypatch.setattr(comparison, "_content", lambda dataset: next(digests))
    with pytest.raises(DataError, match="was written anew while systems ran"):
        compare(data, tmp_path / "c", "ease")
    assert not (tmp_path / "c" / "compare.json").exists()


def test_ranks_of_other_requests_are_refused(data: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out, folder = tmp_path / "c", tmp_path / "c" / "systems"
    assert compare(data, out, "ease") == 0
    with np.load(folder / "requests.npz") as archive:
        arrays = dict(archive)
    # The same number of requests, of other events.
    np.savez(folder / "requests.npz", **(arrays | {"event": arrays["event"][::-1]}))
    with pytest.raises(DataError, match=r"ease.npz holds the ranks of other requests than .*requests.npz. Remove"):
        compare(data, out, "ease", "popularity")
    # Where no result remains, neither do the requests.
    (folder / "ease.json").unlink()
    assert compare(data, out, "ease") == 0
    with np.load(folder / "requests.npz") as archive:
        assert np.array_equal(archive["event"], arrays["event"])
    (folder / "ease.npz").unlink()
    with pytest.raises(DataError, match=r"ease.npz is missing"):
        compare(data, out, "ease")


def test_what_is_in_the_way_is_told(data: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "c"
    out.mkdir()
    (out / "systems").write_text("")
    with pytest.raises(ConfigError, match="systems is a file"):
        compare(data, out, "ease")
    (out / "systems").unlink()
    (out / "compare.md").write_text("my own notes")
    with pytest.raises(ConfigError, match=r"compare.md exists and is no result of `m5 compare`"):
        compare(data, out, "ease")
    assert (out / "compare.md").read_text() == "my own notes"
    (out / "compare.md").unlink()
    assert compare(data, out, "ease") == 0
    (out / "systems" / "ease.json").write_text("{")
    with pytest.raises(DataError, match=r"ease.json is damaged. Remove it, and ease runs again"):
        compare(data, out, "ease")


def test_one_comparison_at_a_time(data: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "c"
    out.mkdir()
    with locked(out / LOCK, "comparison"), pytest.raises(ConfigError, match="is in use: another comparison"):
        compare(data, out, "ease")
    assert here == []
    assert compare(data, out, "ease") == 0


def test_names_may_have_commas_and_all_wins() -> None:
    assert chosen(["svd,ease"]) == chosen(["svd", "ease"]) == ["m5", "ease", "svd"]
    assert chosen(["all", "svd"]) == chosen(["all,svd"]) == list(MODULES)
    with pytest.raises(ConfigError, match="no 'sasrek'"):
        chosen(["all", "sasrek"])


def test_what_the_page_says_of_short_histories_is_so() -> None:
    from benchmarks.literature import comirec

    assert mind.HISTORY == comirec.HISTORY == SHORT_HISTORY


# ---- few viewers -----------------------------------------------------------------------------------------------


def ranks(folder: Path, name: str, rank: float, user: np.ndarray) -> None:
    which = {"user": user, "event": np.arange(len(user))}
    np.savez(folder / f"{name}.npz", rank_SR=np.full((1, len(user)), rank, np.float32), **which)
    rows = np.arange(len(user))
    np.savez(folder / "requests.npz", **which, **{"slice/overall": rows, "slice/none": rows[:0]})


@pytest.mark.parametrize(("users", "better"), [(1, None), (4, None), (8, "m5")])
def test_clear_takes_viewers_enough(users: int, better: str | None, tmp_path: Path) -> None:
    """M5 is ahead at all of 200 requests; four viewers give no p below 2^-4, eight 2^-8."""
    user = np.arange(200) % users
    ranks(tmp_path, "m5", 1, user)
    ranks(tmp_path, "ease", 2, user)
    found = against_m5(tmp_path, ["ease"])["ease"]["overall"]
    assert found["difference"] == pytest.approx(1 - 1 / np.log2(3))
    assert found["better"] == better
    assert (found["low"] is None) == (users == 1)
    assert viewers(tmp_path) == {"overall": users}
    ranks(tmp_path, "m5", 3, user)
    assert against_m5(tmp_path, ["ease"])["ease"]["overall"]["better"] == (None if better is None else "ease")


# ---- processes -------------------------------------------------------------------------------------------------


def test_a_killed_process_is_no_end_of_the_others(tmp_path: Path) -> None:
    assert dict(each_apart(workers.work, ["killed", "well"], (tmp_path,), jobs=1)) == {
        "killed": -signal.SIGKILL,
        "well": 0,
    }
    assert (tmp_path / "well").is_file()
    assert why_it_ended(-signal.SIGKILL) == "its process was killed, most likely for memory"
    assert why_it_ended(-signal.SIGSEGV) == "its process was ended by SIGSEGV"
    assert why_it_ended(3) == "its process ended with code 3"


def test_a_killed_system_has_failed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(data)
    (tmp_path / "svd.json").write_text(json.dumps({"name": "svd", "setup": {}, "skipped": "of an earlier call"}))

    def apart(*arguments: Any, **settings: Any) -> Any:
        yield "svd", -9
        record_of("popularity", setup, tmp_path)
        yield "popularity", 0

    monkeypatch.setattr(comparison, "each_apart", apart)
    records = comparison._run(["svd", "popularity"], setup, tmp_path, 1)
    assert records["svd"]["failed"] == "its process was killed, most likely for memory"
    assert json.loads((tmp_path / "svd.json").read_text()) == records["svd"]
    assert "seeds" in records["popularity"]


def wait_for(true: Any) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(folder: Path) -> bool:
    number = int((folder / "long").read_text())
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_closing_kills_what_runs(tmp_path: Path) -> None:
    with closing(each_apart(workers.work, ["well", "long"], (tmp_path,), jobs=2)) as ended:
        assert next(ended) == ("well", 0)
        wait_for((tmp_path / "long").is_file)
    assert gone(tmp_path)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=workers.parent, args=(tmp_path,))
    parent.start()
    wait_for((tmp_path / "long").is_file)
    parent.kill()
    parent.join()
    wait_for(lambda: gone(tmp_path))


def test_sigterm_is_told_and_exits_with_143(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(comparison, "_run", run)
    monkeypatch.setattr(comparison, "_refuse_without_content", lambda *arguments: None)
    words = ["compare", "--data", str(data), "--out", str(tmp_path / "c"), "--systems", "ease"]
    assert main(words) == 143
    assert f"Finished systems are in {tmp_path / 'c' / 'systems'}: the same command goes on." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_says_that_the_same_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), stoppable("the same command goes on"):
        raise KeyboardInterrupt
    assert "the same command goes on" in capsys.readouterr().err
    assert Terminated.signal == 15
