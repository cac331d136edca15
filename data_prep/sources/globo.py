"""Source `globo`: the click log of the Globo.com news portal (Moreira et al., 2018; academic use).

Takes the whole log as one Parquet file, or a folder of the published hourly CSV files, with the columns user_id,
click_article_id, click_timestamp (milliseconds), click_environment, click_deviceGroup, click_os, click_country,
click_region and click_referrer_type. The region is the scenario; device, environment, operating system and referrer
are context of the request. There is no text, artwork, category or watch intensity.

A reader's repeated clicks on one article (1.3% of the log) tell nothing new to matching: the first is kept.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import duckdb

from data_prep.raw_table import disk_full_as_oserror, literal, quote
from data_prep.spec import DatasetSpec, EventsSpec, TitlesSpec
from m5.schema import DataError

ROLES = {  # ours -> the log's
    "user_id": "user_id",
    "title_id": "click_article_id",
    "timestamp": "click_timestamp",
    "region": "click_region",
    "device": "click_deviceGroup",
    "environment": "click_environment",
    "os": "click_os",
    "referrer": "click_referrer_type",
}
CONTEXTS = ("device", "environment", "os", "referrer")


def _scan(path: Path) -> str:
    """SQL of the log."""
    if path.is_dir():
        files = sorted(path.rglob("*.csv"))
        if not files:
            raise DataError(f"{path} holds no CSV files. Give the folder of hourly click files, or one Parquet file.")
        return f"read_csv([{', '.join(map(literal, files))}], header=true)"
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the click log as a Parquet file, or the folder of its CSV files.")
    return f"read_parquet({literal(path)})" if path.suffix == ".parquet" else f"read_csv({literal(path)}, header=true)"


def load(path: Path, work: Path) -> DatasetSpec:
    """Write the common tables of the click log into `work`.

    Raises:
        DataError: no such file, one that cannot be read, or a missing column.
    """
    path, work = Path(path), Path(work).absolute()
    scan = _scan(path)
    work.mkdir(parents=True, exist_ok=True)
    with disk_full_as_oserror(work), duckdb.connect() as connection:
        try:
            columns = [row[0] for row in connection.sql(f"DESCRIBE SELECT * FROM {scan}").fetchall()]
        except duckdb.Error as error:
            raise DataError(
                f"{path} cannot be read: {' '.join(str(error).split())[:300]} Download it again."
            ) from error
        for column in ROLES.values():
            if column not in columns:
                near = difflib.get_close_matches(column, columns, n=1)
                hint = f" (there is {near[0]})" if near else ""
                raise DataError(
                    f"{path} has no column {column}{hint}. Its columns are: {', '.join(columns)}. Is it the log?"
                )
        picked = ", ".join(f"{quote(column)} AS {quote(name)}" for name, column in ROLES.items())
        connection.execute(f"CREATE TABLE clicks AS SELECT {picked} FROM {scan}")
        connection.execute(
            "CREATE TABLE kept AS SELECT * FROM clicks "
            'QUALIFY row_number() OVER (PARTITION BY user_id, title_id ORDER BY "timestamp", clicks.rowid) = 1'
        )
        clicks, kept = connection.sql("SELECT (SELECT count(*) FROM clicks), (SELECT count(*) FROM kept)").fetchall()[0]
        events, titles = literal(work / "events.parquet"), literal(work / "titles.parquet")
        connection.execute(
            f'COPY (SELECT * FROM kept ORDER BY "timestamp", user_id, title_id) TO {events} (FORMAT parquet)'
        )
        connection.execute(f"COPY (SELECT DISTINCT title_id FROM kept ORDER BY 1) TO {titles} (FORMAT parquet)")
    return DatasetSpec(
        name="globo",
        source="globo",
        folder=work,
        events=EventsSpec(
            path=Path("events.parquet"),
            user="user_id",
            title="title_id",
            timestamp="timestamp",
            scenario=("region",),
            context=CONTEXTS,
        ),
        titles=TitlesSpec(path=Path("titles.parquet"), id="title_id"),
        notes=(
            f"{clicks - kept:,} of {clicks:,} clicks repeat an earlier click on the same article and were dropped.",
        ),
    )
