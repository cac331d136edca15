"""Source `movielens`: the official zip or folder of MovieLens 100K, 1M, ml-latest(-small), 10M, 20M, 25M or 32M.

What MovieLens does not have is stood in for, and called a stand-in wherever it is reported:
- watch intensity: the rating;
- region (100K and 1M): the US Census region of the zip code's first digit. The digits 0 and 1 are the Northeast, 2, 3
  and 7 the South, 4, 5 and 6 the Midwest, 8 and 9 the West. This puts Delaware into the Northeast, West Virginia and
  Virginia rightly, but Kentucky (4) and Montana (5) into the Midwest. Military (09) and Puerto Rico (006-009) codes,
  00000 and anything that is not a US zip code are unknown;
- plan (100K and 1M): the viewer's age band, a proxy only;
- category: the first genre folded into action, comedy, drama, family and other.

Ties of time keep the order of the ratings file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import duckdb
import pandas as pd

from data_prep.raw_table import disk_full_as_oserror, literal
from data_prep.sources.held_out import hold_out_newest
from data_prep.spec import DatasetSpec, EventsSpec, TitlesSpec, UsersSpec
from m5.schema import DataError

LAYOUTS = {  # ratings file -> the other files of that layout
    "u.data": ("u.item", "u.user"),
    "ratings.dat": ("movies.dat", "users.dat"),
    "ratings.csv": ("movies.csv",),
}
OPTIONAL = ("users.dat",)  # 10M has none
REGIONS = dict(
    zip("0123456789", ["Northeast"] * 2 + ["South"] * 2 + ["Midwest"] * 3 + ["South"] + ["West"] * 2, strict=True)
)
NOT_A_STATE = r"^(?:09|00[6-9]|00000)"
AGE_EDGES = [0, 18, 25, 35, 45, 50, 56, 200]
AGE_BANDS = ["under-18", "18-24", "25-34", "35-44", "45-49", "50-55", "56-and-over"]
OCCUPATIONS_1M = [
    "other",
    "educator",
    "artist",
    "clerical",
    "student",
    "service",
    "doctor",
    "executive",
    "farmer",
    "homemaker",
    "k12-student",
    "lawyer",
    "programmer",
    "retired",
    "sales",
    "scientist",
    "self-employed",
    "engineer",
    "tradesman",
    "unemployed",
    "writer",
]
GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
FOLDED = {
    **dict.fromkeys(
        ["Action", "Adventure", "Western", "War", "Sci-Fi", "Thriller", "Mystery", "Crime", "Film-Noir", "IMAX"],
        "action",
    ),
    "Comedy": "comedy",
    **dict.fromkeys(["Drama", "Romance"], "drama"),
    **dict.fromkeys(["Animation", "Children", "Children's", "Musical", "Fantasy"], "family"),
}
METADATA = ("genres", "actors", "directors", "writers", "countries", "languages", "studios", "decade")
ID_COLUMNS = ("movie_id", "movieId", "show_id", "title_id", "id")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
NOTES_OF_VIEWERS: tuple[str, ...] = (
    "region is the US Census region of the zip code's first digit; age_band is a proxy for a plan.",
    "rating stands in for watch intensity.",
)


def _extract(path: Path, work: Path) -> tuple[Path, str]:
    """The folder with the ratings file, taken out of the zip where it is one, and the ratings file's name."""
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Give the zip or folder of a MovieLens data set, as GroupLens offers it."
        )
    if path.is_dir():
        for name in LAYOUTS:
            found = sorted(path.rglob(name))
            if found:
                return found[0].parent, name
        raise DataError(f"{path} holds none of {', '.join(LAYOUTS)}. Give the folder that GroupLens's zip unpacks to.")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is neither a folder nor a zip file. Give the zip or folder of a MovieLens data set.")
    folder = work / "official"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path) as archive:
        if damaged := _damaged_member(archive):
            raise DataError(f"{path}: its member {damaged} is damaged. Download the archive again.")
        members = {PurePosixPath(name).name: name for name in archive.namelist() if not name.endswith("/")}
        for name, others in LAYOUTS.items():
            if name in members:
                for wanted in (name, *others):
                    if wanted in members:
                        with archive.open(members[wanted]) as source, (folder / wanted).open("wb") as target:
                            shutil.copyfileobj(source, target, 1 << 22)
                return folder, name
    raise DataError(f"{path} holds none of {', '.join(LAYOUTS)}: it is not a MovieLens zip.")


def _damaged_member(archive: zipfile.ZipFile) -> str | None:
    """Name of the first member that cannot be read whole, or None."""
    try:
        return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return str(error)


def _need(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{folder} has no {name}, which this MovieLens layout needs. Unpack the official zip again.")
    return path


def _write_events(path: Path, out: Path) -> None:
    """Ratings in the file's order -> user_id, title_id, rating, timestamp."""
    columns = "{'user_id': 'BIGINT', 'title_id': 'BIGINT', 'rating': 'FLOAT', 'ts': 'BIGINT'}"
    delimiter, header = {"u.data": ("\t", False), "ratings.dat": ("::", False), "ratings.csv": (",", True)}[path.name]
    form = f"delim={literal(delimiter)}, header={header}, quote='', escape=''"
    reader = f"read_csv({literal(path)}, {form}, columns={columns})"
    with disk_full_as_oserror(out.parent), duckdb.connect() as connection:
        try:
            connection.execute(f"COPY (SELECT * FROM {reader}) TO {literal(out)} (FORMAT parquet)")
        except (duckdb.ConversionException, duckdb.InvalidInputException) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{path} cannot be read as MovieLens ratings: {reason} Unpack the official zip again."
            ) from error


def _split_lines(path: Path, separator: str, names: list[str]) -> pd.DataFrame:
    """A small latin-1 table with a separator of any length and no quoting."""
    lines = pd.Series(path.read_text(encoding="latin-1").splitlines())
    frame = lines[lines != ""].str.split(separator, expand=True, regex=False)
    if frame.shape[1] < len(names) or frame[len(names) - 1].isna().any():
        raise DataError(f"{path}: a line has fewer than {len(names)} fields. Unpack the official zip again.")
    return frame.iloc[:, : len(names)].set_axis(names, axis=1)


def _read_movies(folder: Path, ratings: str) -> pd.DataFrame:
    """title_id, name, genres (joined by "|")."""
    if ratings == "u.data":
        flags = [f"genre_{genre}" for genre in GENRES_100K]
        frame = _split_lines(_need(folder, "u.item"), "|", ["title_id", "name", "date", "video", "url", *flags])
        genres = [
            "|".join(genre for genre, flag in zip(GENRES_100K, row, strict=True) if flag == "1" and genre != "unknown")
            for row in frame[flags].to_numpy()
        ]
        return frame[["title_id", "name"]].assign(genres=genres)
    if ratings == "ratings.dat":
        return _split_lines(_need(folder, "movies.dat"), "::", ["title_id", "name", "genres"])
    frame = pd.read_csv(_need(folder, "movies.csv"), dtype=str, keep_default_na=False)
    frame = frame.set_axis(["title_id", "name", "genres"], axis=1)
    return frame.assign(genres=frame["genres"].replace("(no genres listed)", ""))


def _write_users(folder: Path, ratings: str, out: Path) -> bool:
    """user_id, gender, age_band, occupation, region; False where the layout has no users."""
    if ratings == "u.data":
        names, path, separator = ["user_id", "age", "gender", "occupation", "zip"], _need(folder, "u.user"), "|"
    elif (folder / "users.dat").is_file() and ratings == "ratings.dat":
        names, path, separator = ["user_id", "gender", "age", "occupation", "zip"], folder / "users.dat", "::"
    else:
        return False
    frame = _split_lines(path, separator, names)
    if separator == "::":
        names_by_code = dict(enumerate(OCCUPATIONS_1M))
        frame["occupation"] = pd.to_numeric(frame["occupation"], errors="coerce").map(names_by_code)
    age = pd.to_numeric(frame["age"], errors="coerce")
    broken = age.isna() | frame["occupation"].isna()
    if broken.any():
        raise DataError(
            f"{path}: {int(broken.sum())} rows have an age or occupation that is none of the official codes, for "
            f"example user {frame['user_id'][broken].iloc[0]}. Give GroupLens's own file."
        )
    frame["age_band"] = pd.cut(age.astype(int), AGE_EDGES, right=False, labels=AGE_BANDS).astype(str)
    american = frame["zip"].str.match(r"^\d{5}") & ~frame["zip"].str.match(NOT_A_STATE)
    frame["region"] = frame["zip"].str[0].map(REGIONS).where(american)
    frame[["user_id", "gender", "age_band", "occupation", "region"]].to_parquet(out, index=False)
    return True


def _extract_posters(posters: Path, work: Path) -> Path:
    """A folder of `<movie id>.jpg`; a tar is unpacked once into `work`."""
    if posters.is_dir():
        return posters.absolute()
    if not posters.is_file() or not tarfile.is_tarfile(posters):
        raise DataError(f"--posters {posters} is neither a folder nor a tar file of <movie id>.jpg.")
    stat = posters.stat()
    stamp = hashlib.sha256(f"{posters.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder, unfinished = work / f"posters-{stamp}", work / f"posters-{stamp}.unfinished"
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with tarfile.open(posters) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                source = archive.extractfile(member) if member.isfile() and name.lower().endswith(IMAGES) else None
                if source is not None:
                    (unfinished / name).write_bytes(source.read())
        unfinished.rename(folder)
    return folder.absolute()


def _join_metadata(movies: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Add the columns of a titles table: description, the metadata kinds it has, and year."""
    if not path.is_file():
        raise DataError(f"--titles {path} does not exist. Give a Parquet table with one row a movie.")
    try:
        extra = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise DataError(f"--titles {path} is no Parquet table ({str(error).splitlines()[0]}).") from None
    key = next((name for name in ID_COLUMNS if name in extra), None)
    if key is None:
        raise DataError(
            f"{path}: no movie id column: it has none of {', '.join(ID_COLUMNS)}. Its columns are: {', '.join(extra)}."
        )
    kept = [name for name in ("description", "year", *METADATA) if name in extra]
    extra = extra.assign(title_id=extra[key].astype(str))[["title_id", *kept]].rename(columns={"genres": "own_genres"})
    repeated = extra["title_id"].duplicated()
    if repeated.any():
        example = extra.loc[repeated, "title_id"].iloc[0]
        raise DataError(
            f"{path}, column {key!r}: {int(repeated.sum())} ids have more than one row, for example {example}."
        )
    joined = movies.merge(extra, on="title_id", how="left", validate="one_to_one")
    for name in joined.columns.intersection([*METADATA, "own_genres"]):
        joined[name] = [
            list(value) if isinstance(value, (list, tuple)) or hasattr(value, "tolist") else []
            for value in joined[name]
        ]
    return joined


def _write_titles(movies: pd.DataFrame, titles: Path | None, posters: Path | None, out: Path) -> tuple[str, ...]:
    """The titles table; returns its metadata kinds."""
    movies = movies.assign(
        category=movies["genres"].str.split("|").str[0].map(FOLDED).fillna("other"),
        year=movies["name"].str.extract(r"\((\d{4})\)\s*$", expand=False),
        genres=[[genre for genre in joined.split("|") if genre] for joined in movies["genres"]],
    )
    if titles is not None:
        joined = _join_metadata(movies.rename(columns={"year": "official_year"}), titles)
        if "own_genres" in joined:
            joined["genres"] = [
                own or official for own, official in zip(joined["own_genres"], joined["genres"], strict=True)
            ]
        given = (
            pd.to_numeric(joined["year"], errors="coerce")
            if "year" in joined
            else pd.Series(float("nan"), joined.index)
        )
        movies = joined.assign(year=given.fillna(pd.to_numeric(joined["official_year"], errors="coerce")))
    year = pd.to_numeric(movies["year"], errors="coerce")
    movies["decade"] = [f"{int(value) // 10 * 10}s" if pd.notna(value) else None for value in year]
    if posters is not None:
        files = {
            entry.name.rsplit(".", 1)[0]: entry.path
            for entry in os.scandir(posters)
            if entry.name.lower().endswith(IMAGES)
        }
        movies["artwork"] = movies["title_id"].map(files)
        if movies["artwork"].isna().all():
            raise DataError(f"--posters {posters}: no file is named after a movie id (<movie id>.jpg).")
    metadata = tuple(name for name in METADATA if name in movies)
    optional = [name for name in ("description", "artwork") if name in movies]
    movies = movies.assign(year=year)  # no column of the dataset's; `hold_out_newest` reads it
    movies[["title_id", "name", "category", "year", *optional, *metadata]].to_parquet(out, index=False)
    return metadata


def load(
    path: Path,
    work: Path,
    titles: Path | None = None,
    posters: Path | None = None,
    hold_out: float | None = None,
) -> DatasetSpec:
    """Write the common tables of a MovieLens data set into `work`.

    Args:
        path: the official zip or folder.
        work: folder for the tables and unpacked posters. The prepared dataset's artwork column points into it.
        titles: optional Parquet table: a movie id (movie_id, movieId, show_id, title_id or id), description, year, and
            any of the metadata kinds genres, actors, directors, writers, countries, languages, studios, as lists.
        posters: optional folder or tar of `<movie id>.jpg`.
        hold_out: share of the titles, the newest ones, that training never sees: `data_prep.sources.held_out` has the
            protocol, which is for the split `leave-last-out`.

    Raises:
        DataError: a file is missing or not of the official form, or the share is out of range.
    """
    work = Path(work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    folder, ratings = _extract(Path(path), work)
    _write_events(folder / ratings, work / "events.parquet")
    viewers = _write_users(folder, ratings, work / "users.parquet")
    images = _extract_posters(Path(posters), work) if posters is not None else None
    movies = _read_movies(folder, ratings)
    metadata = _write_titles(movies, Path(titles) if titles is not None else None, images, work / "titles.parquet")
    notes = NOTES_OF_VIEWERS if viewers else NOTES_OF_VIEWERS[1:]
    if hold_out is not None:
        notes = (*notes, hold_out_newest(work / "events.parquet", work / "titles.parquet", hold_out))
    return DatasetSpec(
        name=Path(path).stem,
        source="movielens",
        folder=work,
        events=EventsSpec(
            path=Path("events.parquet"),
            user="user_id",
            title="title_id",
            timestamp="ts",
            intensity={"rating": "rating"},
            scenario=("region", "age_band") if viewers else (),
        ),
        users=UsersSpec(path=Path("users.parquet"), id="user_id", features=("gender", "occupation", "age_band"))
        if viewers
        else None,
        titles=TitlesSpec(
            path=Path("titles.parquet"),
            id="title_id",
            title="name",
            description="description" if titles is not None else None,
            category="category",
            metadata=metadata,
            artwork="artwork" if posters is not None else None,
        ),
        notes=notes,
    )
