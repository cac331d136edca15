"""Cold titles for a data set that has none: the newest titles are taken out of training, and become what is asked for.

A public rating data set has ratings of nearly every title in every viewer's first days, so `leave-last-out` asks for
titles that everybody has seen before. The protocol here, on the events before any split:

1. Of the titles that somebody has watched, the newest `share` are held out: by their year, and within a year by when
   they were first watched, the latest first. Titles without a year stay.
2. A viewer's *request* is their last watch of a held-out title before which they had watched at least two titles that
   are not held out. All other events of held-out titles are dropped.
3. A viewer with a request loses all events after it, so that it is their last event; viewers without one keep all their
   events of titles that are not held out.

`leave-last-out` then makes the requests test events, each after a history without any held-out title, and gives the
event before to validation, which is none of a held-out title either. The other viewers' last events are test events of
titles known from training. No held-out title has an event of training or validation.

Which titles these are, newest first, is left beside the events in held_out.parquet: title_id, and `newer`, the share of
the watched titles that are newer. So a setting can be chosen on the older ones (`m5 bench cold --skip-newest 0.05`) and
then be measured on the newest, once (`--newest 0.05`).
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from data_prep.raw_table import disk_full_as_oserror, literal
from m5.schema import DataError

HELD_OUT = "held_out.parquet"
LEAST_HISTORY = 2  # with the request, what leave-last-out wants of a viewer to give them a test event

_NEWEST = """
CREATE TABLE newest AS SELECT title_id, (row_number() OVER by_age - 1) / {watched} AS newer FROM (
    SELECT e.title_id, any_value(t.year) AS year, min(e.ts) AS first FROM events e
    JOIN titles t ON t.title_id = e.title_id::VARCHAR WHERE t.year IS NOT NULL GROUP BY e.title_id
) WINDOW by_age AS (ORDER BY year DESC, first DESC, title_id DESC) ORDER BY newer LIMIT {count}
"""
_MARKED = """
CREATE TABLE marked AS SELECT *, count(*) FILTER (WHERE NOT held) OVER w AS known, row_number() OVER w AS step FROM (
    SELECT e.*, n.title_id IS NOT NULL AS held FROM events e LEFT JOIN newest n USING (title_id)
) WINDOW w AS (PARTITION BY user_id ORDER BY ts, place ROWS UNBOUNDED PRECEDING)
"""
_ASKED = (
    "CREATE TABLE asked AS SELECT user_id, max(step) AS last FROM marked WHERE held AND known >= {least} GROUP BY ALL"
)
_KEPT = """
SELECT m.* EXCLUDE (place, held, known, step) FROM marked m LEFT JOIN asked a USING (user_id)
WHERE CASE WHEN held THEN step = last ELSE last IS NULL OR step < last END ORDER BY place
"""


def hold_out_newest(events: Path, titles: Path, share: float) -> str:
    """Apply the protocol of the module to a source's tables, in place, and leave HELD_OUT beside the events.

    Args:
        events: Parquet with user_id, title_id, ts and more; ties of time keep the order of its rows.
        titles: Parquet with title_id and year.
        share: of the watched titles.

    Returns:
        A note for the manifest.

    Raises:
        DataError: the share is not between 0 and 1, or no viewer is left with a request.
        OSError: ENOSPC, where the disk is full.
    """
    if not 0 < share < 1:
        raise DataError(f"--hold-out-newest {share}: give a share of the titles between 0 and 1, e.g. 0.05.")
    unfinished = events.with_name(f".{events.name}.writing")
    with disk_full_as_oserror(events.parent), duckdb.connect() as connection:
        scan = f"read_parquet({literal(events)}, file_row_number=true)"
        connection.execute(
            f"CREATE TABLE events AS SELECT * EXCLUDE (file_row_number), file_row_number AS place FROM {scan}"
        )
        connection.execute(f"CREATE VIEW titles AS SELECT title_id, year FROM read_parquet({literal(titles)})")
        watched, before = connection.sql("SELECT count(DISTINCT title_id), count(*) FROM events").fetchall()[0]
        count = round(share * watched)
        connection.execute(_NEWEST.format(count=count, watched=watched))
        connection.execute(_MARKED)
        connection.execute(_ASKED.format(least=LEAST_HISTORY))
        held, requests = connection.sql(
            "SELECT (SELECT count(*) FROM newest), (SELECT count(*) FROM asked)"
        ).fetchall()[0]
        if not requests:
            raise DataError(
                f"--hold-out-newest {share}: of {watched:,} titles {held:,} are held out, and no viewer has watched "
                f"one of them after {LEAST_HISTORY} others, so nothing could be asked for. Hold out a larger share."
            )
        order = "SELECT title_id::VARCHAR AS title_id, newer FROM newest ORDER BY newer"
        connection.execute(f"COPY ({order}) TO {literal(events.with_name(HELD_OUT))} (FORMAT parquet)")
        connection.execute(f"COPY ({_KEPT}) TO {literal(unfinished)} (FORMAT parquet)")
        after = connection.sql(f"SELECT count(*) FROM read_parquet({literal(unfinished)})").fetchall()[0][0]
    unfinished.replace(events)
    return (
        f"the newest {held:,} of {watched:,} watched titles are held out of training: one of them is the last event of "
        f"{requests:,} viewers; {before - after:,} of {before:,} events were dropped (data_prep/sources/held_out.py)."
    )
