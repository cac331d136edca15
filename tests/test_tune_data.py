"""The dataset of a search by URL: copied once a node, whole or not at all."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from m5.config import ConfigError
from m5.schema import PreparedDataset
from tests.world import write_world
from tune import data as tune_data
from tune.data import local_dataset


class Requests(SimpleHTTPRequestHandler):
    """Serves a folder and keeps what was asked for."""

    asked: list[str]

    def log_message(self, *arguments: object) -> None:
        type(self).asked.append(self.path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("M5_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_world(tmp_path / "prepared", rights=True)
    return tmp_path / "prepared"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """URL of `tmp_path`, and the paths that were asked for."""
    handler = type("Handler", (Requests,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", handler.asked
        serving.shutdown()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*") if path.is_dir()]


def test_a_folder_is_read_where_it_is(dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_dataset(str(dataset)) == dataset.resolve()
    monkeypatch.chdir(dataset.parent)
    assert local_dataset("prepared") == dataset.resolve()
    assert not cache.exists()


@pytest.mark.parametrize("end", ["", "/"])
def test_a_file_url_is_copied_whole_and_once(dataset: Path, cache: Path, end: str) -> None:
    copy = local_dataset(f"file://{dataset}{end}")
    assert copies(cache) == [copy]
    assert contents(copy) == contents(dataset)
    assert PreparedDataset(copy).manifest.n_users == 12
    before = copy.stat().st_mtime_ns
    (dataset / "titles.parquet").unlink()  # so that another copy would show
    assert local_dataset(f"file://{dataset}{end}") == copy
    assert (copy.stat().st_mtime_ns, copies(cache)) == (before, [copy])


def test_a_server_is_asked_for_the_manifest_alone_the_second_time(
    dataset: Path, cache: Path, server: tuple[str, list[str]]
) -> None:
    url, asked = server
    copy = local_dataset(f"{url}/prepared")
    assert contents(copy) == contents(dataset)
    assert "/prepared/events/title.npy" in asked
    asked.clear()
    assert local_dataset(f"{url}/prepared") == copy
    assert asked == ["/prepared/manifest.json"]
    assert copies(cache) == [copy]


@pytest.mark.parametrize("protocol", ["file", "http", "memory"])
def test_another_content_is_another_copy(
    protocol: str, dataset: Path, cache: Path, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    url = {"file": f"file://{dataset}", "http": f"{server[0]}/prepared", "memory": "memory://prepared"}[protocol]

    def upload(folder: Path) -> None:
        if protocol == "memory":
            memory.put(f"{folder}/", "/prepared/", recursive=True)
        elif folder != dataset:
            for path in folder.rglob("*"):
                if path.is_file():
                    path.rename(dataset / path.relative_to(folder))

    try:
        upload(dataset)
        first = local_dataset(url)
        write_world(tmp_path / "again", rights=True, seed=1)
        (tmp_path / "again/content/added.npy").write_bytes(b"new")  # a listing from before does not have it
        wanted = contents(tmp_path / "again")
        upload(tmp_path / "again")
        second = local_dataset(url)
    finally:
        if memory.exists("/prepared"):
            memory.rm("/prepared", recursive=True)
    assert second != first
    assert contents(second) == wanted
    assert sorted(copies(cache)) == sorted([first, second])
    assert PreparedDataset(first).manifest.content_hash != PreparedDataset(second).manifest.content_hash


HALF = """
import sys, time, fsspec
from tune.data import local_dataset

class Slow(fsspec.get_filesystem_class("file")):
    def get_file(self, source, target, **options):
        if source.endswith("users.parquet"):
            print("half", flush=True)
            time.sleep(600)
        return super().get_file(source, target, **options)

fsspec.register_implementation("file", Slow, clobber=True)
local_dataset(sys.argv[1])
"""


def test_a_killed_copy_is_not_used_and_holds_up_nobody(dataset: Path, cache: Path) -> None:
    url = f"file://{dataset}"
    killed = subprocess.Popen([sys.executable, "-c", HALF, url], stdout=subprocess.PIPE, text=True)
    try:
        assert killed.stdout is not None and killed.stdout.readline() == "half\n"
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    (half,) = copies(cache)
    assert half.suffix == ".writing"
    (half / "left-over").write_text("of an earlier content")
    began = time.monotonic()
    copy = local_dataset(url)
    assert time.monotonic() - began < 5
    assert copies(cache) == [copy]
    assert contents(copy) == contents(dataset)


def test_processes_of_a_node_make_one_copy(dataset: Path, cache: Path) -> None:
    command = "import sys; from tune.data import local_dataset; print(local_dataset(sys.argv[1]))"
    started = [
        subprocess.Popen([sys.executable, "-c", command, f"file://{dataset}"], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert [str(path) for path in copies(cache)] == list(said)


def test_a_dataset_that_changes_while_it_is_copied_is_refused(
    dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tune_data._manifest

    def read_then_change(*arguments: object) -> bytes:
        manifest = read(*arguments)
        (dataset / "manifest.json").write_bytes(manifest.replace(b"tiny", b"TINY"))
        return manifest

    with monkeypatch.context() as patch:
        patch.setattr(tune_data, "_manifest", read_then_change)
        with pytest.raises(ConfigError, match="was changed while it was copied"):
            local_dataset(f"file://{dataset}")
    assert [path for path in copies(cache) if path.suffix != ".writing"] == []
    assert local_dataset(f"file://{dataset}").is_dir()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nope://bucket/prepared", r"--data nope://bucket/prepared: Protocol not known: nope. Known are e\.g\. s3://"),
        ("file://{tmp}/nothing", r"is no prepared dataset: it has no manifest\.json"),
        ("memory://nothing", r"is no prepared dataset: it has no manifest\.json"),
        ("{server}/nothing", r"is no prepared dataset: it has no manifest\.json"),
        ("http://127.0.0.1:1/prepared", r"manifest\.json cannot be read: .*127\.0\.0\.1"),
    ],
)
def test_what_is_no_dataset_is_refused(
    url: str, complaint: str, tmp_path: Path, cache: Path, server: tuple[str, list[str]]
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        local_dataset(url.format(tmp=tmp_path, server=server[0]))
    assert not cache.exists()


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_package_is_named(protocol: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(ConfigError, match=rf"--data {protocol}://.*[Ii]nstall {package} .*, on every node\."):
        local_dataset(f"{protocol}://bucket/prepared")
