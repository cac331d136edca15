"""The rights table -> title index, scenario indices (0 = any) and windows in seconds."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_prep.raw_table import RawTable, quote
from data_prep.spec import RightsSpec
from data_prep.validate import unreadable_moment
from m5.schema import ALWAYS, DataError, Vocabulary


def _read(table: RawTable, spec: RightsSpec) -> pd.DataFrame:
    """Rows with the title's index (null where unknown), raw scenario values (null = any), start and end."""
    table.require(title=spec.title, start=spec.start, end=spec.end, **spec.scenario_columns)
    checks = [unreadable_moment(table, column) for column in (spec.start, spec.end) if column is not None]
    if table.run(checks) == 0:
        raise DataError(
            f"{table.path}: the rights table has no rows. List the rights, or remove `rights` from dataset.yaml."
        )
    columns = [f"{table.identifier(spec.title)} AS title_id"]
    for name, column in spec.scenario_columns.items():
        columns.append(f"nullif({table.text(column)}, '*') AS {quote('scenario_' + name)}")
    for name, moment, bound in (("start", spec.start, ALWAYS), ("end", spec.end, -ALWAYS)):
        given = f"floor({table.moment(moment)})::BIGINT" if moment is not None else "NULL"
        columns.append(f"coalesce({given}, {bound}) AS {quote(name)}")
    rows = f"SELECT {', '.join(columns)} FROM {table.scan}"
    return table.connection.sql(f"SELECT t.code, r.* FROM ({rows}) r LEFT JOIN title_index t USING (title_id)").df()


def scenarios_of(spec: RightsSpec, vocabularies: dict[str, Vocabulary]) -> tuple[str, ...]:
    """The scenarios that the rights table names, in the dataset's order."""
    return tuple(name for name in vocabularies if name in spec.scenario_columns)


def map_rights(
    table: RawTable, spec: RightsSpec, vocabularies: dict[str, Vocabulary], seen: dict[str, list[str]], n_titles: int
) -> tuple[pd.DataFrame, list[str]]:
    """Index the rights table.

    Args:
        table: the raw rights.
        spec: its columns' roles.
        vocabularies: scenario name -> vocabulary of the training period.
        seen: scenario name -> values of all events. A value that occurs only after the training period has no index:
            its rows are left out (viewers there get what "any" rows allow), not widened to "any".
        n_titles: size of the catalogue.

    Returns:
        The frame of rights.parquet, and notes.

    Raises:
        DataError: a scenario value of no event, an end that is not after its start, or no title known.
    """
    raw = _read(table, spec)
    notes = []
    backwards = raw["end"] <= raw["start"]
    if backwards.any():
        raise DataError(
            f"{table.path}, columns {spec.start!r} and {spec.end!r}: {int(backwards.sum()):,} of {len(raw):,} rows "
            f"end before they start, for example title {raw.loc[backwards, 'title_id'].iloc[0]}. Swap or correct them."
        )
    unknown = raw["code"].isna()
    if unknown.all():
        raise DataError(
            f"{table.path}, column {spec.title!r}: none of its {len(raw):,} rows names a title of the titles table "
            f"(for example {raw['title_id'].iloc[0]}). Check that the column holds the same ids."
        )
    if unknown.any():
        notes.append(f"{int(unknown.sum()):,} rights rows of titles outside the catalogue were left out.")
    frame, dropped = pd.DataFrame({"title": raw["code"]}), unknown.to_numpy()
    for name in scenarios_of(spec, vocabularies):
        column = spec.scenario_columns[name]
        values = raw["scenario_" + name]
        strange = values.notna() & ~values.isin(seen[name])
        if strange.any():
            raise DataError(
                f"{table.path}, column {column!r}: {int(strange.sum()):,} of {len(raw):,} rows have a {name} that no "
                f"event has, for example {values[strange].iloc[0]!r} (events have: {', '.join(seen[name][:20])}). "
                'Correct the spelling, use "*" or an empty cell for any, or remove these rows.'
            )
        codes = {value: code for code, value in enumerate(vocabularies[name].values, start=1)}
        late = (values.notna() & ~values.isin(list(codes))).to_numpy()
        if late.any():
            notes.append(f"{int(late.sum()):,} rights rows of a {name} without training events were left out.")
            dropped = dropped | late
        frame[name] = values.map(codes).fillna(0).astype(np.int32)
    frame["start"], frame["end"] = raw["start"].astype(np.int64), raw["end"].astype(np.int64)
    frame = frame[~dropped].astype({"title": np.int32})
    frame = frame.sort_values(list(frame.columns), ignore_index=True)
    nowhere = n_titles - frame["title"].nunique()
    if nowhere:
        notes.append(f"{nowhere:,} of {n_titles:,} titles have no rights row: they are not playable anywhere.")
    return frame, notes
