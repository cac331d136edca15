"""`TITLE.json`: a title that is not in the catalogue yet, as `m5 onboard` takes it.

    {"title_id": "t2001", "title": "Harbour Lights", "description": "A pilot comes home to a harbour in a storm.",
     "category": "movie", "released": "2026-11-27T18:00:00Z",
     "metadata": {"genres": ["drama"], "actors": ["Ana Sousa", "Tom Reed"]},
     "rights": [{"region": "US", "plan": "*", "start": "2026-11-27", "end": "2027-11-27"}]}

Only title_id is required. Metadata kinds, categories and the scenarios of rights are the dataset's own. In a rights
row, "*" or no key is any value, and a window without start or end is open; moments are dates, times (UTC where no zone
is given), or seconds since the epoch.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from data_prep.raw_table import LARGEST_SECONDS
from m5.schema import ALWAYS, DataError, Manifest


def _moment(value: Any) -> Any:
    """Seconds since the epoch of a date, a time or a number; None as it is."""
    if isinstance(value, str):
        try:
            given = datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError("no date and time, e.g. 2026-11-27T18:00:00Z, and no seconds since the epoch") from None
        return math.floor((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp())
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > LARGEST_SECONDS:
        raise ValueError("too large for seconds since the epoch; is it in milliseconds?")
    return math.floor(value) if isinstance(value, float) and math.isfinite(value) else value


Moment = Annotated[int | None, Field(strict=True), BeforeValidator(_moment)]
Text = Annotated[str, Field(max_length=100_000)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RightsRow(_Section):
    """Who may play the title, and when; further keys are scenarios of the dataset."""

    model_config = ConfigDict(frozen=True, extra="allow")

    start: Moment = None
    end: Moment = None

    @model_validator(mode="after")
    def _in_order(self) -> RightsRow:
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError("the end is not after the start")
        return self


class NewTitle(_Section):
    """The whole file."""

    title_id: Annotated[str, Field(min_length=1, max_length=1000)]
    title: Text = Field("", description="Display name.")
    description: Text = ""
    category: str | None = Field(None, description="Coarse behaviour category, e.g. series, movie, live.")
    released: Moment = Field(None, description="When it is launched on the service; none: always there.")
    metadata: dict[str, tuple[Text, ...]] = Field(default_factory=dict, description="Kind -> values.")
    rights: tuple[RightsRow, ...] = ()

    @model_validator(mode="after")
    def _tidy(self) -> NewTitle:
        for kind, values in self.metadata.items():
            self.metadata[kind] = tuple(dict.fromkeys(tidy for value in values if (tidy := value.strip())))
        return self


def _problem(error: Mapping[str, Any]) -> str:
    """One sentence for one complaint of pydantic's."""
    place = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), NewTitle.model_fields, n=1)
        known = f"did you mean {close[0]}?" if close else f"known: {', '.join(NewTitle.model_fields)}"
        return f"unknown field {place} ({known})"
    if error["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"


def check_title(record: Any, manifest: Manifest, source: str = "the title") -> NewTitle:
    """A title as JSON gives it, checked against the dataset that it is to join.

    Args:
        record: what the module describes.
        manifest: of the dataset.
        source: what a mistake is told of, e.g. the file's name.

    Raises:
        DataError: mistakes, each by its field: a wrong type, an unknown field, metadata kind or scenario, or a rights
            value that the dataset does not know.
    """
    try:
        title = NewTitle.model_validate(record)
    except ValidationError as error:
        problems = [_problem(dict(one)) for one in error.errors()]
        raise DataError(f"{source}: {'; '.join(problems)}. data_prep/new_title.py describes the form.") from None
    problems = []
    for kind in title.metadata:
        if kind not in manifest.metadata:
            close = difflib.get_close_matches(kind, manifest.metadata, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(manifest.metadata) or 'none'}"
            problems.append(f"metadata.{kind}: the dataset has no such kind ({hint})")
    problems += _wrong_rights(title, manifest)
    if problems:
        raise DataError(f"{source}: {'; '.join(problems)}. Correct or remove them.")
    return title


def _wrong_rights(title: NewTitle, manifest: Manifest) -> list[str]:
    if title.rights and manifest.rights_scenarios is None:
        return ["rights: the dataset has no rights table, so every title may be played by everyone"]
    vocabularies = {vocabulary.name: vocabulary for vocabulary in manifest.scenarios}
    problems = []
    for row, right in enumerate(title.rights):
        for name, value in (right.model_extra or {}).items():
            if name not in (manifest.rights_scenarios or ()):
                shown = ", ".join(manifest.rights_scenarios or ()) or "none"
                problems.append(f"rights.{row}.{name}: rights do not depend on this scenario; they do on {shown}")
            elif value not in (None, "*") and value not in vocabularies[name].values:
                shown = ", ".join(vocabularies[name].values[:20])
                problems.append(f"rights.{row}.{name}: {value!r} is not known from the training period; known: {shown}")
    return problems


def read_title(path: Path, manifest: Manifest) -> NewTitle:
    """Read TITLE.json; `check_title` says the rest.

    Raises:
        DataError: no such file, no JSON, or the mistakes of `check_title`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist. It should be a JSON file that describes one title.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}.") from None
    return check_title(record, manifest, path.name)


def rights_rows(title: NewTitle, manifest: Manifest) -> pd.DataFrame:
    """The title's rights as rights.parquet has them, but for the column `title`.

    Args:
        title: checked against the same manifest.
        manifest: of a dataset with rights.

    Returns:
        int32 columns of the scenarios (0 = any), start and end (int64 seconds). No row: it may be played nowhere.
    """
    vocabularies = {vocabulary.name: vocabulary for vocabulary in manifest.scenarios}
    rows = [
        {
            name: vocabularies[name].index((right.model_extra or {}).get(name))
            for name in manifest.rights_scenarios or ()
        }
        | {
            "start": ALWAYS if right.start is None else right.start,
            "end": -ALWAYS if right.end is None else right.end,
        }
        for right in title.rights
    ]
    frame = pd.DataFrame(rows, columns=[*(manifest.rights_scenarios or ()), "start", "end"])
    return frame.astype(dict.fromkeys(manifest.rights_scenarios or (), np.int32) | {"start": np.int64, "end": np.int64})
