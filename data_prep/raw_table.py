"""One raw CSV or Parquet table, read through DuckDB: its columns' types, SQL for ids, numbers and times, and checks.

Everything is counted in SQL; no row passes through Python.
"""

from __future__ import annotations

import difflib
import errno
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from m5.schema import DataError

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".csv.zst")
FLOATS = ("FLOAT", "DOUBLE", "DECIMAL")
INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
# A number above this is not in seconds (it would be the year 11476), but in milliseconds (from 1979 on). The bound
# leaves room for 9999-12-31 in seconds, a common way to write "for ever".
LARGEST_SECONDS = 3e11
LARGEST_NUMBER = "1e24"  # nanoseconds of any date fit; so do float32 intensities


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: object) -> str:
    """An SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"


@contextmanager
def disk_full_as_oserror(folder: Path) -> Iterator[None]:
    """DuckDB's ways of saying that the disk is full, as the OSError (ENOSPC) that the rest of Python raises."""
    try:
        yield
    except duckdb.Error as error:
        if "No space left" in str(error) or "max_temp_directory_size" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise


@contextmanager
def connect(folder: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB database on disk in `folder`, which spills what does not fit into `memory_limit` (such as "3GB").

    Raises:
        OSError: ENOSPC, where the disk is full.
    """
    with disk_full_as_oserror(folder), duckdb.connect(str(folder / "prepare.duckdb")) as connection:
        connection.execute(f"SET memory_limit={literal(memory_limit)}")
        connection.execute(f"SET temp_directory={literal(folder / 'spill')}")
        connection.execute("SET TimeZone='UTC'")
        connection.execute("SET enable_progress_bar=false")
        yield connection


@dataclass(frozen=True)
class Check:
    """Rows for which `predicate` holds are a mistake; `example` is the SQL of what to show of one of them."""

    predicate: str
    column: str
    problem: str
    example: str
    remedy: str


class RawTable:
    """A table of the user's, by role.

    Args:
        connection: where to run the queries.
        path: a CSV or Parquet file, or a glob of them.
        role: "events", "users", "titles" or "rights", for the messages.

    Raises:
        DataError: no such file, an unknown kind of file, or one that cannot be read.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path, role: str):
        self.connection, self.path, self.role = connection, path, role
        files = sorted(glob.glob(str(path)))
        if not files:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"{role}: the file {path} does not exist.{hint} Correct {role}.path in dataset.yaml.")
        listed = "[" + ", ".join(map(literal, files)) + "]"
        name = path.name.lower()
        if name.endswith(PARQUET):
            self.scan = f"read_parquet({listed}, union_by_name=true)"
        elif name.endswith(TEXT):
            # All columns as text: the messages below then show the raw value, and "007" stays an id.
            self.scan = f"read_csv({listed}, all_varchar=true, header=true, union_by_name=true)"
        else:
            raise DataError(f"{role}: {path} is neither Parquet {PARQUET} nor CSV {TEXT}. Convert or rename it.")
        try:
            described = connection.sql(f"DESCRIBE SELECT * FROM {self.scan}").fetchall()
        except duckdb.Error as error:
            raise self._unreadable(error) from error
        self.types = {row[0]: str(row[1]) for row in described}

    def _unreadable(self, error: duckdb.Error) -> DataError:
        reason = " ".join(str(error).split())[:300]
        return DataError(f"{self.role}: {self.path} cannot be read: {reason} Correct or rewrite the file.")

    def require(self, **columns: str | None) -> None:
        """Refuse columns that the table does not have; keys are their roles in dataset.yaml.

        Raises:
            DataError: naming the missing column, the close names, and the columns there are.
        """
        for key, column in columns.items():
            if column is not None and column not in self.types:
                near = difflib.get_close_matches(column, list(self.types), n=2, cutoff=0.5)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise DataError(
                    f"{self.path}: {self.role}.{key} names the column {column!r}, which the table does not have.{hint} "
                    f"Its columns are: {', '.join(self.types)}. Correct dataset.yaml or the table."
                )

    def is_list(self, column: str) -> bool:
        return self.types[column].endswith("]")

    def text(self, column: str) -> str:
        """SQL: the value as text, NULL where empty. Whole floats lose their ".0": pandas writes ids beside gaps so."""
        name, kind = quote(column), self.types[column]
        if kind.startswith(FLOATS):
            whole = f"{name} = trunc({name}) AND abs({name}) < 9e15"
            return (
                f"CASE WHEN isnan({name}::DOUBLE) THEN NULL WHEN {whole} THEN {name}::BIGINT::VARCHAR "
                f"ELSE {name}::VARCHAR END"
            )
        return f"nullif(trim({name}::VARCHAR), '')"

    def identifier(self, column: str) -> str:
        """SQL: an id as text; NULL where missing, empty or "nan"."""
        value = self.text(column)
        return f"CASE WHEN lower({value}) IN ('nan', 'null', 'none') THEN NULL ELSE {value} END"

    def number(self, column: str) -> str:
        """SQL: the value as a double; NULL where missing, not a number, or too large for seconds or float32."""
        value = f"{quote(column)}::DOUBLE" if self._is_number(column) else f"TRY_CAST({self.text(column)} AS DOUBLE)"
        return f"CASE WHEN abs({value}) < {LARGEST_NUMBER} THEN {value} END"

    def given(self, column: str) -> str:
        """SQL: the value is neither missing nor "nan"."""
        if self._is_number(column):
            return f"NOT isnan({quote(column)}::DOUBLE)"  # NULL, and so false, where missing
        return f"{self.text(column)} IS NOT NULL AND lower({self.text(column)}) <> 'nan'"

    def _is_number(self, column: str) -> bool:
        """Its values are doubles or integers, for which the detour through text costs more than all the checks.

        FLOAT and DECIMAL take it, as a double of 0.1 is not that of the 32-bit 0.1.
        """
        return self.types[column] in ("DOUBLE", *INTEGERS)

    def moment(self, column: str) -> str:
        """SQL: seconds since the epoch (UTC) of a date, a time, or a number in any unit; NULL where unparsable.

        A number in milliseconds, micro- or nanoseconds is told by its size.
        """
        name, kind = quote(column), self.types[column]
        if self.is_clock(column):
            return f"epoch({name})" if "ZONE" in kind else f"epoch({name}::TIMESTAMP)"
        value = self.number(column)
        seconds = (
            f"CASE WHEN abs({value}) > {LARGEST_SECONDS}::DOUBLE * 1e6 THEN {value} / 1e9 "
            f"WHEN abs({value}) > {LARGEST_SECONDS}::DOUBLE * 1e3 THEN {value} / 1e6 "
            f"WHEN abs({value}) > {LARGEST_SECONDS}::DOUBLE THEN {value} / 1e3 ELSE {value} END"
        )
        if kind == "VARCHAR":
            return f"coalesce({seconds}, epoch(TRY_CAST({self.text(column)} AS TIMESTAMPTZ)))"
        return seconds

    def beyond_seconds(self, column: str) -> str:
        """SQL: the value is a number that is not in seconds."""
        return f"coalesce(abs({self.number(column)}) > {LARGEST_SECONDS}::DOUBLE, false)"

    def is_clock(self, column: str) -> bool:
        """The column holds dates or times, not numbers or text."""
        return self.types[column].startswith(("TIMESTAMP", "DATE"))

    def one_row(self, *expressions: str, where: str = "true") -> tuple:
        """The only row of an aggregate query over the table."""
        query = f"SELECT {', '.join(expressions)} FROM {self.scan} WHERE {where}"
        try:
            return self.connection.sql(query).fetchall()[0]
        except duckdb.Error as error:
            raise self._readable_or_raise(error) from error

    def _readable_or_raise(self, error: duckdb.Error) -> Exception:
        return (
            error if isinstance(error, (duckdb.OutOfMemoryException, duckdb.IOException)) else self._unreadable(error)
        )

    def run(self, checks: list[Check]) -> int:
        """Make all the checks in one pass; returns the number of rows.

        Raises:
            DataError: for the first check that finds rows.
        """
        rows, *counts = self.one_row("count(*)", *(f"count(*) FILTER (WHERE {check.predicate})" for check in checks))
        for check, count in zip(checks, counts, strict=True):
            if count:
                # Looked for only now: in the first pass it would be worked out for every row.
                example = self.one_row(f"any_value({check.example})", where=check.predicate)[0]
                raise DataError(
                    f"{self.path}, column {check.column!r}: {count:,} of {rows:,} rows {check.problem}, for example "
                    f"{example}. {check.remedy}"
                )
        return rows

    def refuse_repeated(self, column: str) -> None:
        """Refuse an id that has several rows.

        Raises:
            DataError: with the number of such ids and an example.
        """
        value = self.identifier(column)
        repeated = f"SELECT {value} AS id, count(*) AS n FROM {self.scan} GROUP BY 1 HAVING n > 1"
        count, example = self.connection.sql(
            f"SELECT count(*), min(id || ' (' || n || ' rows)') FROM ({repeated})"
        ).fetchall()[0]
        if count:
            raise DataError(
                f"{self.path}, column {column!r}: {count:,} ids have more than one row, for example {example}. "
                f"Keep one row for each of the {self.role}."
            )
