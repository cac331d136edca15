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
    parser.add_argument("--int8", action="store_true", help="the titles' keys as int8, a quarter of the memory")
    parser.add_argument("--no-posters", action="store_true", help="leave the titles' artwork out")
    parser.add_argument("--index", choices=INDEX_KINDS[1:], help="take the built index along; hnsw is slow to build")
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
    text = "a title launched a minute ago joins an artifact by its text, artwork and metadata"
    parser = add_command(commands, "onboard", _onboard, text)
    parser.add_argument("title", type=Path, metavar="TITLE.json", help="its form: data_prep/new_title.py")
    parser.add_argument("poster", type=Path, nargs="?", metavar="POSTER.jpg")
    parser.add_argument("--artifact", type=Path, required=True, help="a service that answers from it takes it over")
    parser.add_argument("--data", type=Path, required=True, help="the prepared dataset that the run was trained on")
    parser.add_argument("--image-weights", metavar="FILE", help="where the dataset's artwork was encoded with a file's")


def _onboard(options: argparse.Namespace) -> None:
    from data_prep.new_title import read_title, rights_rows
    from data_prep.onboard import encode_title
    from m5.schema import ALWAYS, PreparedDataset
    from m5.serving.artifact import Artifact
    from m5.serving.onboard import LaunchedTitle, add_titles, grants, joined_content, refuse_known, refuse_other_dataset

    artifact, dataset = Artifact(options.artifact), PreparedDataset(options.data)
    refuse_other_dataset(artifact, dataset)
    title = read_title(options.title, dataset.manifest)
    refuse_known(artifact, [title.title_id])
    vectors = encode_title(options.data, title, options.poster, image_weights=options.image_weights)
    rights = rights_rows(title, dataset.manifest) if dataset.manifest.rights_scenarios is not None else None
    launched = LaunchedTitle(
        title_id=title.title_id,
        title=title.title or title.title_id,
        description=title.description,
        category=dataset.manifest.categories.index(title.category),
        content_G=joined_content(artifact, vectors),
        released=ALWAYS if title.released is None else title.released,
        grants=grants(rights, title.released, dataset.manifest),
        poster=options.poster,
    )
    add_titles(options.artifact, [launched])
    if rights is not None and not len(rights):
        print(f"m5: {title.title_id} has no rights, so nobody may play it: give it `rights`.", file=sys.stderr)
    print(f"{options.artifact}: {title.title_id} is title {artifact.manifest.n_titles + 1:,}; services take it over")


def _export(options: argparse.Namespace) -> None:
    from m5.serving.export import Options, export

    chosen = Options(
        int8=options.int8, posters=not options.no_posters, viewers=max(0, options.viewers), index=options.index
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
