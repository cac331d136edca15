"""Raw events -> arrays sorted by user, then time: the joins and the one big sort, out of core in DuckDB."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np

from data_prep.raw_table import RawTable, quote
from data_prep.spec import DatasetSpec
from data_prep.validate import scenario_home
from m5.schema import DataError

ROWS_PER_BATCH = 500_000


@dataclass
class Sequences:
    """The events of all users, sorted by user, then timestamp, then original row; arrays lie in `folder` as .npy.

    `codes` are positions in `values` plus one, 0 where missing, and cover all events: vocabularies of the training
    period are cut from them later.
    """

    folder: Path
    user_ids: np.ndarray  # object [U]
    offsets: np.ndarray  # int64 [U + 1]
    n_events: int
    values: dict[str, list[str]] = field(default_factory=dict)  # "scenario_region" -> raw values
    notes: list[str] = field(default_factory=list)

    def array(self, name: str) -> np.ndarray:
        """int32, int64 or float32 [T], memory-mapped for reading and writing."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r+")


def stage_events(events: RawTable, users: RawTable | None, spec: DatasetSpec) -> None:
    """Create `staged` (ids as text, seconds, intensities, scenarios, contexts) and the view `ordered` over it.

    `ordered` adds `position`, the original row, and the scenarios that only the users table knows.
    """
    columns = [
        f"{events.identifier(spec.events.user)} AS user_id",
        f"{events.identifier(spec.events.title)} AS title_id",
        f"floor({events.moment(spec.events.timestamp)})::BIGINT AS moment",
    ]
    columns += [
        f"{events.number(column)}::FLOAT AS {quote('intensity_' + kind)}"
        for kind, column in spec.events.intensity.items()
    ]
    homes = {name: scenario_home(spec, events, users, name) for name in spec.events.scenario}
    columns += [f"{events.text(name)} AS {quote('scenario_' + name)}" for name, home in homes.items() if home is events]
    columns += [f"{events.text(name)} AS {quote('context_' + name)}" for name in spec.events.context]
    # The insertion order is the original row order (DuckDB keeps it), so rowid breaks ties of time.
    events.connection.execute(f"CREATE TABLE staged AS SELECT {', '.join(columns)} FROM {events.scan}")
    of_users = [name for name, home in homes.items() if home is users]
    picked, join = "", ""
    if of_users and users is not None and spec.users is not None:
        spread = ", ".join(f"{users.text(name)} AS {quote('scenario_' + name)}" for name in of_users)
        users.connection.execute(
            f"CREATE TABLE viewers AS SELECT {users.identifier(spec.users.id)} AS user_id, {spread} FROM {users.scan}"
        )
        picked = "".join(f", v.{quote('scenario_' + name)}" for name in of_users)
        join = "LEFT JOIN viewers v USING (user_id)"
    events.connection.execute(f"CREATE VIEW ordered AS SELECT s.*, s.rowid AS position{picked} FROM staged s {join}")


def index_users(connection: duckdb.DuckDBPyConnection, min_events: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Create `user_index` (user_id, code) over the users with at least `min_events` events, in natural order of ids.

    Returns:
        object [U] user ids, int64 [U + 1] offsets of their events, and notes.
    """
    connection.execute(
        "CREATE TABLE counts AS SELECT user_id, count(*) AS n, TRY_CAST(user_id AS HUGEINT) AS number "
        "FROM staged GROUP BY user_id"
    )
    connection.execute(
        "CREATE TABLE user_index AS SELECT user_id, n, (row_number() OVER (ORDER BY "
        "CASE WHEN (SELECT count(number) = count(*) FROM counts) THEN number END, user_id) - 1)::INTEGER AS code "
        f"FROM counts WHERE n >= {int(min_events)}"
    )
    kept = connection.sql("SELECT user_id, n FROM user_index ORDER BY code").fetchnumpy()
    users, events = connection.sql(
        f"SELECT count(*), coalesce(sum(n), 0) FROM counts WHERE n < {int(min_events)}"
    ).fetchall()[0]
    notes = [f"{users:,} users with fewer than {min_events} events were left out ({events:,} events)."] if users else []
    offsets = np.concatenate([[0], np.cumsum(kept["n"], dtype=np.int64)]).astype(np.int64)
    return np.asarray(kept["user_id"], dtype=object), offsets, notes


def refuse_unknown_titles(events: RawTable, titles: RawTable, spec: DatasetSpec) -> None:
    """Raises DataError where an event's title is not in `title_index`."""
    count, unknown, example, total = events.connection.sql(
        "SELECT count(*) FILTER (WHERE t.code IS NULL), count(DISTINCT s.title_id) FILTER (WHERE t.code IS NULL), "
        "min(s.title_id) FILTER (WHERE t.code IS NULL), count(*) FROM staged s LEFT JOIN title_index t USING (title_id)"
    ).fetchall()[0]
    if count:
        raise DataError(
            f"{events.path}, column {spec.events.title!r}: {count:,} of {total:,} rows are events of {unknown:,} "
            f"titles that {titles.path} (column {spec.titles.id!r}) does not list, for example {example}. Add these "
            "titles to the titles table, or remove their events."
        )


def settle_duplicates(events: RawTable, spec: DatasetSpec) -> list[str]:
    """Refuse rows with the same user, title and second, or keep the first of each where the spec says so."""
    connection = events.connection
    # Grouping all events by their ids would take several times the memory of their hashes. Rows that share a hash are
    # few, and only they are compared.
    connection.execute(
        "CREATE TABLE suspects AS SELECT user_id, title_id, moment, rowid AS position FROM staged "
        "WHERE hash(user_id, title_id, moment) IN (SELECT h FROM "
        "(SELECT hash(user_id, title_id, moment) AS h, count(*) AS n FROM staged GROUP BY h) WHERE n > 1)"
    )
    extra, example = connection.sql(
        "SELECT coalesce(sum(n - 1), 0), min('user ' || user_id || ', title ' || title_id || ', timestamp ' || moment "
        "|| ' (' || n || ' rows)') FROM (SELECT user_id, title_id, moment, count(*) AS n FROM suspects "
        "GROUP BY user_id, title_id, moment HAVING n > 1)"
    ).fetchall()[0]
    if not extra:
        return []
    if spec.events.duplicates == "error":
        raise DataError(
            f"{events.path}, columns {spec.events.user!r}, {spec.events.title!r}, {spec.events.timestamp!r}: "
            f"{extra:,} rows repeat another row's user, title and timestamp, for example {example}. Remove them, or "
            "set `duplicates: drop` under events in dataset.yaml to keep the first row of each."
        )
    connection.execute(
        "DELETE FROM staged WHERE rowid IN (SELECT position FROM suspects "
        "QUALIFY row_number() OVER (PARTITION BY user_id, title_id, moment ORDER BY position) > 1)"
    )
    return [f"{extra:,} duplicate events (same user, title and timestamp) were dropped."]


def _dictionary(connection: duckdb.DuckDBPyConnection, column: str) -> list[str]:
    """Create the table `values_<column>` (value, code from 1) over all events; returns the values in code order."""
    name = quote("values_" + column)
    connection.execute(
        f"CREATE TABLE {name} AS WITH distinct_values AS (SELECT DISTINCT {quote(column)} AS value FROM ordered "
        f"WHERE {quote(column)} IS NOT NULL) SELECT value, (row_number() OVER (ORDER BY CASE WHEN (SELECT "
        "count(TRY_CAST(value AS HUGEINT)) = count(*) FROM distinct_values) THEN TRY_CAST(value AS HUGEINT) END, value)"
        ")::INTEGER AS code FROM distinct_values"
    )
    return [row[0] for row in connection.sql(f"SELECT value FROM {name} ORDER BY code").fetchall()]


def sort_events(connection: duckdb.DuckDBPyConnection, spec: DatasetSpec, folder: Path, min_events: int) -> Sequences:
    """Sort by (user, timestamp, original row) and stream the columns into .npy files in `folder`."""
    user_ids, offsets, notes = index_users(connection, min_events)
    n_events = int(offsets[-1])
    sequences = Sequences(folder, user_ids, offsets, n_events, notes=notes)
    picked: dict[str, tuple[str, type[np.generic]]] = {}
    picked |= {"title": ("t.code", np.int32), "timestamp": ("s.moment", np.int64)}
    for kind in spec.events.intensity:
        picked[f"intensity_{kind}"] = (f"s.{quote('intensity_' + kind)}", np.float32)
    joins = "JOIN user_index u USING (user_id) JOIN title_index t USING (title_id)"
    coded = [f"scenario_{name}" for name in spec.events.scenario] + [f"context_{name}" for name in spec.events.context]
    for position, column in enumerate(coded):
        sequences.values[column] = _dictionary(connection, column)
        joins += f" LEFT JOIN {quote('values_' + column)} d{position} ON s.{quote(column)} = d{position}.value"
        picked[column] = (f"coalesce(d{position}.code, 0)", np.int32)
    columns = ", ".join(f"{sql} AS {quote(name)}" for name, (sql, _) in picked.items())
    query = f"SELECT {columns} FROM ordered s {joins} ORDER BY u.code, s.moment, s.position"
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(n_events,))
        for name, (_, dtype) in picked.items()
    }
    written = 0
    for batch in connection.sql(query).to_arrow_reader(ROWS_PER_BATCH):
        for name, values in zip(batch.schema.names, batch.columns, strict=True):
            # A missing intensity is a null, which a float column turns into NaN.
            arrays[name][written : written + batch.num_rows] = values.to_numpy(zero_copy_only=False)
        written += batch.num_rows
    assert written == n_events, f"the joins kept {written} of {n_events} events"
    for array in arrays.values():
        array.flush()
    return sequences
