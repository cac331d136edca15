"""What is known of each trial, in files that anything can read: DIR/records/0007.json.

They, and the folders of the trials' own trainings, are all that a search keeps. Ray's state is not needed to go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from m5.config import ConfigError
from m5.folders import holding

Role = Literal["search", "preset", "winner"]
Status = Literal["waiting", "running", "finished", "stopped", "failed"]
PRESET = "0000"  # the trial with the preset's own settings
ENDED = ("finished", "stopped", "failed")
TARGETS_PER_SECOND, MEMORY = "targets_per_second", "peak_memory_gb"


@dataclass
class Record:
    """One trial.

    Attributes:
        name: also of its files, e.g. "0007"; "preset-2" and "winner-2" are of the trainings on several seeds.
        role: part of the search, or of those trainings.
        values: of the space's settings that it has, by dotted name.
        seed: of its training.
        status: waiting, running, finished (trained to its end), stopped (early, by the scheduler) or failed.
        attempts: how often it was begun.
        reasons: why attempts failed, oldest first.
        history: its validations, as in its metrics.jsonl, with "targets_per_second" and "peak_memory_gb".
        seconds: of training, by its own clock.
        node: Ray's id of the node where it ran last.
        began_at: when its last attempt was begun, in seconds since 1970.
    """

    name: str
    role: Role
    values: dict[str, Any]
    seed: int
    status: Status = "waiting"
    attempts: int = 0
    reasons: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    node: str = ""
    began_at: float = 0.0

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def best(self, metric: str) -> dict[str, float] | None:
        """The validation whose weights the training keeps: the first of the highest."""
        return max(self.history, key=lambda row: row[metric], default=None)


class Folder:
    """DIR of a search. One search at a time: `opened` holds its lock.

    Attributes:
        path: DIR.
        records: by name, in the order of their beginnings.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, Record] = {}

    def run(self, record: Record) -> Path:
        """The folder of its training."""
        return self.path / ("trials" if record.role == "search" else "seeds") / record.name

    def note(self, record: Record, kind: Literal["said", "placement"]) -> Path:
        """Where a trial's process says why it ends, or where its ranks are; see `tune.trial.work`."""
        return self.path / "records" / f"{record.name}.{kind}"

    def of(self, role: Role) -> list[Record]:
        return [record for record in self.records.values() if record.role == role]

    def write(self, record: Record) -> None:
        self.records[record.name] = record
        write_whole(self.path / "records" / f"{record.name}.json", json.dumps(asdict(record), indent=1))

    def renew(self, record: Record) -> None:
        """Write a record in place of an earlier one of its name, whose training is removed."""
        shutil.rmtree(self.run(record), ignore_errors=True)
        self.write(record)

    def forget(self, record: Record) -> None:
        """Remove a record and its training."""
        shutil.rmtree(self.run(record), ignore_errors=True)
        (self.path / "records" / f"{record.name}.json").unlink(missing_ok=True)
        del self.records[record.name]

    def read(self) -> None:
        for path in sorted((self.path / "records").glob("*.json")):
            try:
                self.records[path.stem] = Record(**json.loads(path.read_text()))
            except (ValueError, TypeError):
                raise ConfigError(f"{path} is damaged. Remove it, and its trial is run again.") from None


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, finds the earlier text or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def opened(path: Path, identity: dict[str, Any], resume: bool) -> Iterator[Folder]:
    """A search's folder, new or, with `resume`, as it was left.

    Raises:
        ConfigError: DIR is something else, belongs to another search, is in use, or holds one that nobody gave up.
    """
    asked = path / "search.json"
    folder = Folder(path)
    if path.exists() and not asked.is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not a search of m5; choose another --out.")
    path.mkdir(parents=True, exist_ok=True)
    with holding(path / ".lock", f"{path} is in use: another search writes to it. Choose another --out."):
        if asked.is_file():
            folder.read()
            if not resume:
                ended = sum(record.ended for record in folder.of("search"))
                raise ConfigError(
                    f"{path} holds a search with {ended} ended trials. Go on with it by --resume, or choose another "
                    "--out."
                )
            # Through JSON, as what was written was: tuples come back as lists.
            before, now = json.loads(asked.read_text()), json.loads(json.dumps(identity))
            if different := list(differences(before, now)):
                raise ConfigError(f"cannot resume {path}: {'; '.join(different[:3])}. Choose another --out.")
        else:
            write_whole(asked, json.dumps(identity, indent=1))
        yield folder


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What has changed between two nested mappings, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {json.dumps(before)} and is {json.dumps(now)}"


def read_history(run: Path) -> list[dict[str, float]]:
    """Validations in a run's metrics.jsonl; a line that a killed process has not finished is left out."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.pop("kind") == "valid":
            rows.append(row)
    return rows
