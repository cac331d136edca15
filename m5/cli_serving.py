"""The commands from a trained run to an answering service."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from m5.cli_options import add_command, count

INDEX_KINDS = ("exact", "int8", "hnsw", "ivfpq")


def add_export(commands) -> None:
    parser = add_command(commands, "export", _export, "a trained run -> an artifact, all that a service needs")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT", help="an earlier artifact is replaced")
    parser.add_argument("--int8", action="store_true", help="the titles' keys as int8: a quarter of their size on disk")
    parser.add_argument("--no-posters", action="store_true", help="leave the titles' artwork out")
    parser.add_argument("--index", choices=INDEX_KINDS[1:], help="take the built index along; hnsw is slow to build")
    parser.add_argument("--drop-onboarded", action="store_true", help="also replace an artifact with onboarded titles")
    parser.add_argument(
        "--viewers",
        type=int,
        default=0,
        metavar="N",
        help="histories of the N most active users, to look at on the page (default: 0; personal data)",
    )


def add_serve(commands) -> None:
    parser = add_command(commands, "serve", _serve, "answer requests by HTTP, with a page at /")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--index", choices=INDEX_KINDS, default="exact", help="default: exact")
    parser.add_argument(
        "--compile", action="store_true", help="the model as machine code: faster; needs a C++ compiler"
    )
    parser.add_argument("--threads", type=count, help="of the model (default: all cores)")
    parser.add_argument("--largest-batch", type=count, default=64, help="requests in a pass of the model (default: 64)")
    parser.add_argument("--queue", type=count, default=2048, help="requests that may wait (default: 2048)")
    parser.add_argument("--rate", type=float, metavar="R", help="requests per second of a client (default: no limit)")
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="accepted keys, one a line (default: all may ask)"
    )
    parser.add_argument(
        "--now", choices=("clock", "dataset"), default="clock", help="what time it is where a request does not say"
    )


def add_onboard(commands) -> None:
    text = "titles launched a minute ago join an artifact by their text, artwork and metadata"
    parser = add_command(commands, "onboard", _onboard, text)
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="TITLE.json (its form: data_prep/new_title.py), its POSTER.jpg behind it; or several of them",
    )
    parser.add_argument("--artifact", type=Path, required=True, help="a service that answers from it takes it over")
    parser.add_argument("--data", type=Path, required=True, help="the prepared dataset that the run was trained on")
    parser.add_argument("--text", metavar="FOLDER", help="the text encoder, where the one of the dataset has moved")
    parser.add_argument("--image-weights", metavar="FILE", help="where the dataset's artwork was encoded with a file's")


def _with_posters(files: list[Path]) -> list[tuple[Path, Path | None]]:
    """Titles' JSON files, each with the poster that is named behind it."""
    from m5.config import ConfigError

    pairs: list[tuple[Path, Path | None]] = []
    for file in files:
        if file.suffix.lower() == ".json":
            pairs.append((file, None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], file)
        else:
            raise ConfigError(f"{file}: a poster stands behind the TITLE.json that it belongs to, one for a title.")
    return pairs


def _onboard(options: argparse.Namespace) -> None:
    from data_prep.new_title import read_title, rights_rows
    from data_prep.onboard import Onboarding
    from m5.schema import ALWAYS, PreparedDataset
    from m5.serving.artifact import Artifact
    from m5.serving.card import doubt_of_new_titles
    from m5.serving.onboard import LaunchedTitle, add_titles, grants, joined_content, refuse_known, refuse_other_dataset

    files = _with_posters(options.files)
    artifact, dataset = Artifact(options.artifact), PreparedDataset(options.data)
    refuse_other_dataset(artifact, dataset)
    titles = [read_title(path, dataset.manifest) for path, _ in files]
    refuse_known(artifact, [title.title_id for title in titles])
    if doubt := doubt_of_new_titles(artifact.manifest):
        print(f"m5: {doubt}", file=sys.stderr)
    onboarding = Onboarding(options.data, text=options.text, image_weights=options.image_weights)
    vectors = onboarding.encode(titles, [poster for _, poster in files])
    launched = []
    for title, own, (_, poster) in zip(titles, vectors, files, strict=True):
        rights = rights_rows(title, dataset.manifest) if dataset.manifest.rights_scenarios is not None else None
        launched.append(
            LaunchedTitle(
                title_id=title.title_id,
                title=title.title or title.title_id,
                description=title.description,
                category=dataset.manifest.categories.index(title.category),
                content_G=joined_content(artifact, own),
                released=ALWAYS if title.released is None else title.released,
                grants=grants(rights, title.released, dataset.manifest),
                poster=poster,
            )
        )
    grown = add_titles(options.artifact, launched, weights=artifact.manifest.weights_sha256)
    for place, one in enumerate(launched, start=1 + grown.manifest.n_titles - len(launched)):
        if not one.grants:
            print(f"m5: {one.title_id} has no rights, so nobody may play it: give it `rights`.", file=sys.stderr)
        print(f"{options.artifact}: {one.title_id} is title {place:,}; services take it over")


def _export(options: argparse.Namespace) -> None:
    from m5.serving.export import Options, export

    chosen = Options(
        int8=options.int8,
        posters=not options.no_posters,
        viewers=max(0, options.viewers),
        index=options.index,
        drop_onboarded=options.drop_onboarded,
    )
    artifact = export(options.run, options.out, chosen)
    size = sum(path.stat().st_size for path in artifact.folder.iterdir())
    print(f"{options.out}: {artifact.manifest.n_titles:,} titles, {size / 2**20:.1f} MB; what it is: card.md in it")
    print(f"next: m5 serve {options.out}")


def _serve(options: argparse.Namespace) -> int:
    from m5.serving.run import serve

    return serve(
        options.artifact,
        host=options.host,
        port=options.port,
        index=options.index,
        compiled=options.compile,
        threads=options.threads,
        largest_batch=options.largest_batch,
        queue=options.queue,
        rate=options.rate,
        api_keys=options.api_keys,
        now=options.now,
    )
