"""The `m5` commands on raw tables: synth, prepare, encode, graph."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m5.cli_options import add_command, add_world_sizes


def add_synth(commands) -> None:
    parser = add_command(commands, "synth", _synth, "write a synthetic streaming world as raw tables, with its truth")
    add_world_sizes(parser)
    parser.add_argument("--no-posters", action="store_true", help="draw no artwork")
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw tables")


def add_prepare(commands) -> None:
    parser = commands.add_parser("prepare", help="raw tables to a prepared dataset: every stage, cached")
    sources = parser.add_subparsers(title="sources", required=True, metavar="SOURCE")
    tables = add_command(sources, "tables", _prepare_tables, "your own Parquet or CSV tables, described by a YAML file")
    tables.add_argument("path", type=Path, help="dataset.yaml")
    movielens = add_command(sources, "movielens", _prepare_movielens, "MovieLens: the official zip or its folder")
    movielens.add_argument("path", type=Path, help="ml-100k, ml-1m, ml-latest, ml-20m or ml-25m, zip or folder")
    movielens.add_argument("--titles", type=Path, help="Parquet with descriptions and metadata by movie id")
    movielens.add_argument("--posters", type=Path, help="folder or tar of <movie id>.jpg")
    movielens.add_argument(
        "--hold-out-newest",
        type=float,
        metavar="SHARE",
        help="of the titles, e.g. 0.05: training never sees them, and leave-last-out asks for them",
    )
    globo = add_command(sources, "globo", _prepare_globo, "the Globo.com click log")
    globo.add_argument("path", type=Path, help="clicks.parquet")
    for source in (tables, movielens, globo):
        source.add_argument("--split", choices=["time", "leave-last-out"], default="time")
        _add_encoder_options(source)
        source.add_argument("--out", type=Path, required=True, help="folder of the prepared dataset")


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", help="BERT-like model: hub name or local folder (default: the bundled MiniLM)")
    parser.add_argument("--image", default="resnet50", help="timm model (default: resnet50)")
    parser.add_argument("--image-weights", default="hub", help="hub, random or a file (default: hub)")


def add_stages(commands) -> None:
    encode = add_command(commands, "encode", _encode, "encode text and artwork of a prepared dataset again")
    encode.add_argument("data", type=Path)
    _add_encoder_options(encode)
    graph = add_command(commands, "graph", _graph, "build the metagraph and pre-train content embeddings again")
    graph.add_argument("data", type=Path)


def _synth(options: argparse.Namespace) -> None:
    from data_prep.sources.synthetic import generate

    generate(
        out=options.out,
        users=options.users,
        titles=options.titles,
        events=options.events,
        seed=options.seed,
        posters=not options.no_posters,
    )
    print(f"wrote {options.out}; next: m5 prepare tables {options.out}/dataset.yaml --out DATA")


def _prepare(options: argparse.Namespace, spec) -> None:
    from data_prep.prepare import prepare_all

    prepare_all(
        spec,
        options.out,
        text=options.text,
        image=options.image,
        image_weights=options.image_weights,
        split=options.split,
    )
    print(f"wrote {options.out}; next: m5 train --preset default --data {options.out} --out RUN")


def _prepare_tables(options: argparse.Namespace) -> None:
    from data_prep.sources.tables import load

    _prepare(options, load(options.path))


def _prepare_movielens(options: argparse.Namespace) -> None:
    from data_prep.sources.movielens import load
    from m5.schema import DataError

    if options.hold_out_newest is not None and options.split != "leave-last-out":
        raise DataError(
            "--hold-out-newest needs --split leave-last-out: a held-out title is the last that its viewers watch. With "
            "the time split, titles launched after the training period are cold by themselves."
        )
    with _raw_folder(options.out) as work:
        _prepare(options, load(options.path, work, options.titles, options.posters, options.hold_out_newest))


def _prepare_globo(options: argparse.Namespace) -> None:
    from data_prep.sources.globo import load

    with _raw_folder(options.out) as work:
        _prepare(options, load(options.path, work))


@contextmanager
def _raw_folder(out: Path) -> Iterator[Path]:
    """Where a source writes its common tables; kept, because the prepared dataset points at posters there.

    What a failed first preparation has put there is taken away. A folder that no preparation made is refused: its
    files would be overwritten.
    """
    from data_prep.write import refuse_foreign_folder
    from m5.schema import DataError

    refuse_foreign_folder(out)
    folder = out.with_name(f"{out.name}-raw")
    existed, mark = folder.exists(), folder / ".m5-raw"
    if existed and not mark.is_file() and (folder.is_file() or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and was not written by m5, so it is not overwritten. Choose another --out: the source's "
            "tables go to a folder of that name with -raw behind it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield folder
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _encode(options: argparse.Namespace) -> None:
    from data_prep.image_encoder import encode_images
    from data_prep.text_encoder import encode_text

    encode_text(options.data, model=options.text)
    encode_images(options.data, model=options.image, weights=options.image_weights)


def _graph(options: argparse.Namespace) -> None:
    from data_prep.graphsage import build_graph

    build_graph(options.data)
