"""The titles table -> one row a title, in the owner's order, and the users table -> one row a viewer with events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.raw_table import RawTable, quote
from data_prep.spec import DatasetSpec
from m5.schema import ALWAYS, Vocabulary


def natural_order(values: list[str]) -> list[str]:
    """Sort numbers as numbers and all else as text."""
    return sorted(values, key=int) if all(v.lstrip("-").isdecimal() for v in values) else sorted(values)


def _metadata_sql(table: RawTable, column: str) -> str:
    """SQL: a list of distinct, trimmed, non-empty strings in their order, from a list column or a joined string."""
    if table.is_list(column):
        parts = f"{quote(column)}::VARCHAR[]"
    else:
        text = table.text(column)
        joined = table.one_row(f"bool_or(contains({text}, '|'))")[0]
        parts = f"string_split({text}, {'chr(124)' if joined else 'chr(44)'})"
    trimmed = f"list_filter(list_transform({parts}, lambda x: trim(x)), lambda x: x <> '')"
    return f"coalesce(list_filter({trimmed}, lambda x, i: list_position({trimmed}, x) = i), [])"


def read_titles(table: RawTable, spec: DatasetSpec) -> tuple[pd.DataFrame, Vocabulary]:
    """Create `title_index` (title_id, code) and read the catalogue.

    Returns:
        The frame of titles.parquet without train_count and cold, and the category vocabulary.
    """
    titles = spec.titles
    connection = table.connection
    identifier = table.identifier(titles.id)
    text = {
        "title_id": identifier,
        "title": f"coalesce({table.text(titles.title)}, {identifier})" if titles.title else identifier,
        "description": f"coalesce({table.text(titles.description)}, '')" if titles.description else "''",
        "category": table.text(titles.category) if titles.category else "NULL::VARCHAR",
        "artwork": f"coalesce({table.text(titles.artwork)}, '')" if titles.artwork else "''",
        "released": f"coalesce(floor({table.moment(titles.released)})::BIGINT, {ALWAYS})"
        if titles.released
        else f"{ALWAYS}",
    }
    columns = [f"{sql} AS {quote(name)}" for name, sql in text.items()]
    columns += [f"{_metadata_sql(table, column)} AS {quote('metadata_' + column)}" for column in titles.metadata]
    connection.execute(f"CREATE TABLE titles AS SELECT {', '.join(columns)} FROM {table.scan}")
    connection.execute("CREATE TABLE title_index AS SELECT title_id, rowid::INTEGER AS code FROM titles")
    arrow = connection.sql("SELECT * FROM titles ORDER BY rowid").to_arrow_table()
    lists = {f"metadata_{column}": arrow[f"metadata_{column}"].to_pylist() for column in titles.metadata}
    frame = arrow.drop_columns(list(lists)).to_pandas()
    categories = Vocabulary(name="category", values=tuple(natural_order(frame["category"].dropna().unique().tolist())))
    codes = {value: code for code, value in enumerate(categories.values, start=1)}
    frame["category"] = frame["category"].map(codes).fillna(0).astype(np.int32)
    frame["released"] = frame["released"].astype(np.int64)
    frame["artwork"] = [str(spec.resolve(Path(path))) if path else "" for path in frame["artwork"]]
    for name, values in lists.items():
        frame[name.removeprefix("metadata_")] = values
    return frame, categories


def read_users(table: RawTable | None, spec: DatasetSpec, user_ids: np.ndarray) -> tuple[pd.DataFrame, list[str]]:
    """Raw features of the users in `user_ids` (object [U]), row by row; None where missing. And notes."""
    frame = pd.DataFrame({"user_id": user_ids})
    if table is None or spec.users is None:
        return frame, []
    columns = [f"{table.text(name)} AS {quote(name)}" for name in spec.users.features]
    picked = ", ".join([f"{table.identifier(spec.users.id)} AS user_id", *columns])
    raw = table.connection.sql(f"SELECT {picked} FROM {table.scan}").df()
    present = raw["user_id"].isin(user_ids)
    notes = []
    if not present.all():
        notes.append(f"{int((~present).sum()):,} users of {table.path.name} have no events kept and were left out.")
    absent = int((~frame["user_id"].isin(raw["user_id"])).sum())
    if absent:
        notes.append(f"{absent:,} users with events are not in {table.path.name}: their features are unknown.")
    merged = frame.merge(raw, on="user_id", how="left", validate="one_to_one")
    return merged.astype(object).where(merged.notna(), None), notes
