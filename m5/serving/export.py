"""`m5 export`: a trained run -> an artifact (`m5.serving.artifact`)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor

from m5.assemble import table_sizes
from m5.best import read_record
from m5.eligibility import Eligibility
from m5.folders import holding, recover, replacing
from m5.model.m5 import M5
from m5.model.multi_modal_embedding import UNKNOWN
from m5.predict import Predictor
from m5.recommend import known_viewer, latest_time
from m5.schema import DataError, PreparedDataset
from m5.serving import artifact as files
from m5.serving.artifact import Artifact, ArtifactManifest
from m5.serving.card import model_card
from m5.serving.index import IndexKind, build_index
from m5.serving.rights import RightsMasks
from m5.serving.scan import quantised
from m5.serving.tower import UserTower, export_program

POSTER_SIZE = (200, 300)  # pixels, at most
PROJECTED = 4096  # titles whose content is projected at a time
PATIENCE = 30.0  # seconds that one waits for another who writes the same artifact


@dataclass(frozen=True)
class Options:
    """What may be left out of an artifact, or put in.

    Attributes:
        int8: keys as int8 with a scale a title: a quarter of their size on disk. In memory they are float32 again.
        posters: whether to take the titles' artwork, made small.
        viewers: how many users' histories to take, to look at on the page: those with most events.
        program: whether to write the user tower as a program.
        index: whose state to take along; one that takes long to build is then ready when a service starts.
        drop_onboarded: whether an artifact may be replaced that holds titles which `m5 onboard` has added.
    """

    int8: bool = False
    posters: bool = True
    viewers: int = 0
    program: bool = True
    index: IndexKind | None = None
    drop_onboarded: bool = False


def export(run: Path, out: Path, options: Options = Options()) -> Artifact:
    """Write the artifact of RUN's best checkpoint; what `out` held before stays until the new one is whole.

    Args:
        run: folder of `m5 train`.
        out: folder of the artifact.
        options: what goes in.

    Returns:
        The artifact as it was read back, every checksum compared.

    Raises:
        ConfigError: another process writes to `out`.
        DataError: no trained run, or `out` is something else than an artifact, or holds titles that would be lost.
    """
    files.refuse_foreign(out)
    predictor = Predictor.load(run, "cpu")
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with one_writer(out):
        added = onboarded(out)
        if added and not options.drop_onboarded:
            raise DataError(
                f"{out} holds {added:,} titles that `m5 onboard` has added; {run} does not know them, so they would be "
                "lost. Choose another --out, or give --drop-onboarded and onboard them again."
            )
        with replacing(out) as folder:
            _write(folder, run, predictor, options)
        return Artifact(out)


@contextmanager
def one_writer(artifact: Path) -> Iterator[None]:
    """One `m5 export` or `m5 onboard` at a time, from reading an artifact to replacing it.

    The lock is a file beside the artifact, .NAME.lock, since the folder itself is another one afterwards.

    Raises:
        ConfigError: another still writes to it after PATIENCE seconds.
    """
    place = artifact.resolve()
    message = f"{artifact} is in use: another `m5 export` or `m5 onboard` writes to it. Try again when that has ended."
    with holding(place.with_name(f".{place.name}.lock"), message, PATIENCE):
        recover(place)
        yield


def onboarded(folder: Path) -> int:
    """How many titles `m5 onboard` has added to an artifact; 0 where there is none that can be read."""
    try:
        record = json.loads((folder / files.MANIFEST).read_text())
        return int(record["n_titles"]) - int(record["n_trained"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _write(folder: Path, run: Path, predictor: Predictor, options: Options) -> None:
    """All files of the artifact."""
    manifest = _manifest(run, predictor, options)
    _write_weights(folder, predictor, options)
    eligibility = Eligibility.from_dataset(predictor.dataset)
    if eligibility is not None:
        rights = RightsMasks.compiled(eligibility, manifest.n_titles)
        save_numpy(rights.arrays(), folder / files.RIGHTS)
        manifest = manifest.model_copy(update={"rights": rights.header.model_dump(mode="json")})
    if options.index is not None:
        keys = stored_again(predictor.key_NQ, options.int8)
        save_numpy(build_index(keys, options.index).state(), folder / files.INDEX)
    if options.posters:
        write_posters(folder / files.POSTERS, [poster_bytes(path) for path in poster_files(predictor.dataset)])
    if options.viewers:
        viewers = _viewers(predictor.dataset, options.viewers, manifest.history)
        (folder / files.VIEWERS).write_text(json.dumps(viewers))
    if options.program:
        tower = UserTower(predictor.model).eval()
        program = export_program(tower, width=manifest.model.width, history=manifest.history)
        torch.export.save(program, folder / files.PROGRAM)
    (folder / files.CARD).write_text(model_card(manifest))
    files.seal(folder, manifest)


def _manifest(run: Path, predictor: Predictor, options: Options) -> ArtifactManifest:
    dataset, config, record = predictor.dataset, predictor.config, read_record(run)
    manifest = dataset.manifest
    content = predictor.model.embedding.content
    return ArtifactManifest(
        name=config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        n_titles=manifest.n_titles,
        n_trained=manifest.n_titles,
        content_width=content.content.shape[1] if content is not None else 0,
        tables=table_sizes(dataset, config),
        model=config.model,
        sequences=config.sequences,
        seed=config.seed,
        categories=manifest.categories,
        scenarios=manifest.scenarios,
        contexts=manifest.contexts,
        user_features=manifest.user_features,
        intensities=manifest.intensities,
        keys="int8" if options.int8 else "float32",
        index=options.index,
        now=latest_time(dataset),
        dataset={
            "name": manifest.name,
            "content_hash": manifest.content_hash,
            "users": manifest.n_users,
            "titles": manifest.n_titles,
            "events": manifest.n_events,
            "content": record["content"],
            "notes": list(manifest.notes),
            **_origin(record),
        },
        weights_sha256=record["weights_sha256"],
        metrics=_metrics(run, record),
        versions={name: _version(name) for name in ("m5-matching", "torch", "torchrec", "numpy")},
    )


def _metrics(run: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Validation's, and the test split's where RUN was evaluated with these weights."""
    found: dict[str, Any] = {"valid": record["valid"]}
    report = run / "evaluation.json"
    if report.is_file():
        evaluation = json.loads(report.read_text())
        if evaluation.get("checkpoint", {}).get("weights_sha256") == record["weights_sha256"]:
            mine = next(iter(evaluation["models"].values()))
            found["test"] = {name: mine[name] for name in ("overall", "scenarios", "cold")}
            found["test"]["settings"] = evaluation["settings"]
    return found


def _origin(record: dict[str, Any]) -> dict[str, Any]:
    """Where an `m5 adapt` got its weights, that folder aside, and for which scenario values none were trained."""
    if "adapted" not in record:
        return {}
    adapted = {name: value for name, value in record["adapted"].items() if name != "run"}
    return {"adapted": adapted, "untrained": record["untrained"]}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _write_weights(folder: Path, predictor: Predictor, options: Options) -> None:
    model, builder = predictor.model, predictor.builder
    id_ND, cg_ND = title_rows(model, torch.from_numpy(builder.cold.copy()))
    n_titles = builder.n_titles
    arrays = {"id_ND": id_ND[:n_titles], "special_id": id_ND[n_titles:]}
    if cg_ND is not None:
        arrays |= {"cg_ND": cg_ND[:n_titles], "special_cg": cg_ND[n_titles:]}
    arrays |= stored_keys(predictor.key_NQ, options.int8)
    save_file({name: array.contiguous() for name, array in arrays.items()}, folder / files.TITLES)
    state = {key: value for key, value in model.state_dict().items() if key != "tables.embeddings.title.weight"}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / files.MODEL)
    wanted = ["title_id", "title", "description", "category", "released", "cold", "train_count"]
    predictor.dataset.titles[wanted].to_parquet(folder / files.TITLE_TABLE, index=False)


@torch.inference_mode()
def title_rows(model: M5, cold_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """float32 [N + 3, D] ID and CG embeddings as behaviours meet them: a cold title has the row of the unknown ID."""
    id_ND = model.tables.get_parameter("embeddings.title.weight").detach().float().clone()
    n_titles = len(cold_N)
    id_ND[:n_titles][cold_N] = id_ND[n_titles + UNKNOWN]
    content = model.embedding.content
    if content is None:
        return id_ND, None
    return id_ND, torch.cat([content(part) for part in torch.arange(len(id_ND)).split(PROJECTED)])


def stored_keys(key_NQ: Tensor, int8: bool) -> dict[str, Tensor]:
    """Keys as an artifact holds them: float32, or int8 with one scale a title (the largest element is 127)."""
    if not int8:
        return {"key_NQ": key_NQ}
    key8_NQ, scale_N = quantised(key_NQ.numpy())
    return {"key_NQ": torch.from_numpy(key8_NQ), "scale_N": torch.from_numpy(scale_N)}


def stored_again(key_NQ: Tensor, int8: bool) -> np.ndarray:
    """float32 [N, Q]: the keys as they are read back from an artifact."""
    stored = stored_keys(key_NQ, int8)
    return (stored["key_NQ"].float() * stored["scale_N"].unsqueeze(-1) if int8 else key_NQ).numpy()


def poster_files(dataset: PreparedDataset) -> list[Path | None]:
    """Path of every title's artwork, None where it has none or the file is gone."""
    paths = [dataset.folder / name if name else None for name in dataset.titles["artwork"].fillna("")]
    return [path if path is not None and path.is_file() else None for path in paths]


def write_posters(target: Path, made: list[bytes]) -> None:
    """All posters in one file, empty ones for titles that have none; no file where there is none at all."""
    if not any(made):
        return
    offsets = np.cumsum([0, *map(len, made)], dtype=np.int64)
    save_numpy({"bytes": np.frombuffer(b"".join(made), dtype=np.uint8), "offsets": offsets}, target)


def poster_bytes(path: Path | None) -> bytes:
    """The artwork as a small JPEG, empty where there is none that can be read."""
    from PIL import Image

    if path is None:
        return b""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * POSTER_SIZE[0], 2 * POSTER_SIZE[1]))
            small = image.convert("RGB")
            small.thumbnail(POSTER_SIZE)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=82)
            return buffer.getvalue()
    except (OSError, ValueError, Image.DecompressionBombError):
        return b""


def _viewers(dataset: PreparedDataset, count: int, history: int) -> list[dict[str, Any]]:
    """Bodies of `POST /v1/recommend` for the users with most events, titles and values by their ids."""
    manifest, ids = dataset.manifest, dataset.titles["title_id"].tolist()
    most = np.argsort(-np.diff(dataset.offsets), kind="stable")[:count]
    bodies = []
    for row in most:
        viewer = known_viewer(dataset, str(dataset.users["user_id"].iloc[int(row)]))
        recent = range(max(0, len(viewer.title) - history), len(viewer.title))
        watched = []
        for place in recent:
            given = {kind: float(values[place]) for kind, values in viewer.intensity.items()}
            watched.append(
                {
                    "title_id": ids[viewer.title[place]],
                    "timestamp": int(viewer.timestamp[place]),
                    "intensity": {kind: value for kind, value in given.items() if not np.isnan(value)},
                }
            )
        named = {
            group: {v.name: v.values[indices[v.name] - 1] for v in vocabularies if indices.get(v.name)}
            for group, vocabularies, indices in (
                ("scenario", manifest.scenarios, viewer.scenario),
                ("context", manifest.contexts, viewer.context),
                ("user", manifest.user_features, viewer.user),
            )
        }
        bodies.append({"history": watched, "timestamp": viewer.at, **named})
    return bodies
