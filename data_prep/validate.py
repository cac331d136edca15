"""What can be wrong with a user's tables, and what to do about it. Counted in SQL before anything is written."""

from __future__ import annotations

import time

from data_prep.raw_table import Check, RawTable, quote
from data_prep.spec import DatasetSpec, EventsSpec
from m5.schema import DataError


def _missing_id(table: RawTable, column: str, what: str) -> Check:
    return Check(
        predicate=f"{table.identifier(column)} IS NULL",
        column=column,
        problem=f"have no {what} (empty, null or NaN)",
        example="'an empty cell'",
        remedy="Fill the ids in, or remove these rows.",
    )


def _intensity_checks(table: RawTable, kind: str, column: str) -> list[Check]:
    raw, value = table.text(column), table.number(column)
    return [
        Check(
            predicate=f"{table.given(column)} AND {value} IS NULL",
            column=column,
            problem=f"hold no number ({kind})",
            example=raw,
            remedy="Write numbers, and leave the cell empty where the value is not known.",
        ),
        Check(
            predicate=f"{value} < 0",
            column=column,
            problem=f"are negative ({kind} of a watch cannot be below zero)",
            example=raw,
            remedy="Correct these values or leave them empty.",
        ),
    ]


def check_events(table: RawTable, spec: EventsSpec, now: float | None = None) -> tuple[int, list[str]]:
    """Check the watch log's own columns.

    Args:
        table: the events.
        spec: their columns' roles; scenario columns that the table lacks are checked with the users.
        now: seconds since the epoch; timestamps after it are refused. The present by default.

    Returns:
        The number of rows, and notes for the manifest.

    Raises:
        DataError: empty table, missing columns or ids, unparsable or future timestamps, bad intensities.
    """
    table.require(user=spec.user, title=spec.title, timestamp=spec.timestamp)
    table.require(**{f"intensity.{kind}": column for kind, column in spec.intensity.items()})
    for column in spec.context:
        table.require(context=column)
    now = time.time() if now is None else now
    raw, seconds = table.text(spec.timestamp), table.moment(spec.timestamp)
    checks = [
        _missing_id(table, spec.user, "user id"),
        _missing_id(table, spec.title, "title id"),
        Check(
            predicate=f"{seconds} IS NULL",
            column=spec.timestamp,
            problem="hold no timestamp that can be read",
            example=f"coalesce({raw}, 'an empty cell')",
            remedy="Write seconds or milliseconds since 1970, or dates such as 2024-05-01 20:15:00 (taken as UTC).",
        ),
        Check(
            predicate=f"{seconds} > {now}::DOUBLE",
            column=spec.timestamp,
            problem="lie in the future",
            example=f"{raw} || ' (read as ' || make_timestamp(({seconds} * 1e6)::BIGINT)::VARCHAR || ' UTC)'",
            remedy="Correct the clock or the unit (seconds and milliseconds are told apart by size), or remove them.",
        ),
    ]
    for kind, column in spec.intensity.items():
        checks += _intensity_checks(table, kind, column)
    rows = table.run(checks)
    if rows == 0:
        raise DataError(f"{table.path}: the events table has no rows. Give it at least a few events for every split.")
    notes = []
    if not table.is_clock(spec.timestamp):
        converted = table.one_row(f"count(*) FILTER (WHERE {table.beyond_seconds(spec.timestamp)})")[0]
        if converted:
            notes.append(f"{converted:,} of {rows:,} timestamps are not in seconds (by their size) and were converted.")
    return rows, notes


def check_titles(table: RawTable, spec: DatasetSpec) -> None:
    """Check the catalogue: columns, ids present and unique, readable release dates.

    Raises:
        DataError: for the first mistake found.
    """
    titles = spec.titles
    table.require(
        id=titles.id,
        title=titles.title,
        description=titles.description,
        category=titles.category,
        artwork=titles.artwork,
        released=titles.released,
    )
    for column in titles.metadata:
        table.require(metadata=column)
    checks = [_missing_id(table, titles.id, "title id")]
    if titles.released is not None:
        checks.append(unreadable_moment(table, titles.released))
    if table.run(checks) == 0:
        raise DataError(f"{table.path}: the titles table has no rows. It must list the catalogue.")
    table.refuse_repeated(titles.id)


def unreadable_moment(table: RawTable, column: str) -> Check:
    """A date that is given but cannot be read."""
    raw = f"{quote(column)}::VARCHAR" if table.is_clock(column) else table.text(column)
    return Check(
        predicate=f"{raw} IS NOT NULL AND {table.moment(column)} IS NULL",
        column=column,
        problem="hold no date or time that can be read",
        example=raw,
        remedy="Write seconds or milliseconds since 1970 or dates such as 2024-05-01, or leave the cell empty.",
    )


def check_users(table: RawTable, id_column: str, features: tuple[str, ...]) -> None:
    """Check the viewers' table: columns, ids present and unique.

    Raises:
        DataError: for the first mistake found.
    """
    table.require(id=id_column)
    for column in features:
        table.require(features=column)
    table.run([_missing_id(table, id_column, "user id")])
    table.refuse_repeated(id_column)


def scenario_home(spec: DatasetSpec, events: RawTable, users: RawTable | None, column: str) -> RawTable:
    """The table that has the scenario column: events, or else users.

    Raises:
        DataError: neither has it.
    """
    if column in events.types:
        return events
    if users is not None and column in users.types:
        return users
    try:
        events.require(scenario=column)
    except DataError as error:
        also = f" Nor does the users table {users.path}: {', '.join(users.types)}." if users is not None else ""
        raise DataError(f"{error}{also}") from None
    raise AssertionError("unreachable: require() refuses a column that is not in the table")
