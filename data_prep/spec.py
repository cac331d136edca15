"""`dataset.yaml`: which columns of a user's own tables play which role.

    name: my-service                                    # optional, shown in reports
    events: {path: events.csv, user: user_id, title: title_id, timestamp: ts, intensity: {seconds: watch_s},
             scenario: [region, plan], context: [device], duplicates: drop}
    users:  {path: users.parquet, id: user_id, features: [age_band]}
    titles: {path: titles.parquet, id: title_id, title: name, description: text, category: kind,
             metadata: [genres, actors], artwork: poster, released: launch_date}
    rights: {path: rights.parquet, title: title_id, region: region, plan: plan, start: from, end: to}

Only `events` (path, user, title, timestamp) and `titles` (path, id) are required. Paths, and the paths in the artwork
column, are relative to dataset.yaml. A path may be a glob of Parquet files or of CSV files.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m5.schema import TITLE_COLUMNS, DataError

RESERVED = ("title", "start", "end", "path")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EventsSpec(_Section):
    """The watch log: one row an event."""

    path: Path
    user: str
    title: str
    timestamp: str = Field(description="Seconds, milliseconds, or a date and time (UTC where no zone is given).")
    intensity: dict[str, str] = Field(default_factory=dict, description="Kind -> column, e.g. seconds: watch_s.")
    scenario: tuple[str, ...] = Field(default=(), description="Columns of events, or else of users, e.g. region, plan.")
    context: tuple[str, ...] = Field(default=(), description="Columns of events about the request, e.g. device.")
    duplicates: Literal["error", "drop"] = Field(
        default="error", description="Rows with the same user, title and timestamp: refuse, or keep the first."
    )


class UsersSpec(_Section):
    """Optional: one row a viewer."""

    path: Path
    id: str
    features: tuple[str, ...] = ()


class TitlesSpec(_Section):
    """The catalogue: one row a title, also those never watched."""

    path: Path
    id: str
    title: str | None = Field(default=None, description="Display name; the id where not given.")
    description: str | None = None
    category: str | None = Field(default=None, description="Coarse behaviour category, e.g. series, movie, live.")
    metadata: tuple[str, ...] = Field(default=(), description='List columns, or strings separated by "|" or ",".')
    artwork: str | None = Field(default=None, description="Path of the poster.")
    released: str | None = Field(default=None, description="Date or timestamp of the launch on the service.")


class RightsSpec(_Section):
    """Optional: which scenario may play a title, and when. Further keys name scenarios: `region: region_column`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    path: Path
    title: str
    start: str | None = None
    end: str | None = None

    @property
    def scenario_columns(self) -> dict[str, str]:
        """Scenario name -> column of the rights table."""
        return dict(self.model_extra or {})


class DatasetSpec(_Section):
    """The whole file. `source` and `notes` are filled in by the sources that write their own tables."""

    events: EventsSpec
    titles: TitlesSpec
    users: UsersSpec | None = None
    rights: RightsSpec | None = None
    name: str = "dataset"
    truth: Path | None = Field(default=None, description="Written by the synthetic world: copied to DATA/truth.npz.")
    source: str = "tables"
    notes: tuple[str, ...] = Field(default=(), description="Decisions of the source, copied to the manifest.")
    folder: Path = Field(default=Path("."), description="What relative paths are relative to: dataset.yaml's folder.")

    @model_validator(mode="after")
    def _names_can_be_columns(self) -> DatasetSpec:
        lists = {
            "events.intensity": tuple(self.events.intensity),
            "events.scenario": self.events.scenario,
            "events.context": self.events.context,
            "users.features": self.users.features if self.users else (),
            "titles.metadata": self.titles.metadata,
        }
        taken = {"users.features": ("user_id",), "titles.metadata": TITLE_COLUMNS}
        for key, names in lists.items():
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{key} names {', '.join(repeated)} twice")
            if any("/" in name for name in names):
                raise ValueError(f"{key}: a name with a slash cannot be a file name; rename the column")
            clash = sorted(set(names) & set(taken.get(key, ())))
            if clash:
                raise ValueError(f"{key}: {', '.join(clash)} is the name of a column of ours; rename the column")
        return self

    @model_validator(mode="after")
    def _rights_name_scenarios(self) -> DatasetSpec:
        reserved = sorted(set(self.events.scenario) & set(RESERVED))
        if reserved:
            raise ValueError(f"events.scenario: {reserved} would clash with the rights table's own keys; rename them")
        for name, column in (self.rights.scenario_columns if self.rights else {}).items():
            if name not in self.events.scenario or not isinstance(column, str):
                raise ValueError(
                    f"rights.{name}: {column!r} must name a column, and {name!r} must be one of events.scenario "
                    f"{list(self.events.scenario)}"
                )
        return self

    def resolve(self, path: Path) -> Path:
        """Absolute form of a path of this file."""
        return (self.folder / path).absolute()


def _problem(error: dict[str, Any]) -> str:
    """One sentence for one pydantic complaint, with the close name where a key is unknown."""
    place = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        section = error["loc"][0] if len(error["loc"]) > 1 else None
        sections: dict[str, type[_Section]] = {
            "events": EventsSpec,
            "users": UsersSpec,
            "titles": TitlesSpec,
            "rights": RightsSpec,
        }
        known = list(sections.get(str(section), DatasetSpec).model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {place}" + (f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})")
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if error["loc"] else message


def read_spec(path: Path) -> DatasetSpec:
    """Read `dataset.yaml`.

    Raises:
        DataError: the file does not exist, is not YAML, or has missing or unknown keys.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist. It should be a dataset.yaml that names the tables and their columns.")
    try:
        record = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} is empty or not a mapping; it needs at least the keys events and titles.")
    for internal in ("source", "folder"):
        if internal in record:
            raise DataError(f"{path}: unknown key {internal}. Remove it.")
    try:
        return DatasetSpec.model_validate(
            {"name": path.absolute().parent.name, **record, "folder": path.absolute().parent}
        )
    except ValidationError as error:
        problems = "; ".join(_problem(dict(part)) for part in error.errors())
        raise DataError(f"{path}: {problems}. The form of the file is described in data_prep/spec.py.") from error
