"""`m5 recommend RUN --all-users --out FOLDER`: the best titles of every user of the dataset, as a Parquet dataset.

Users are cut into parts of PART; a part is one file, written beside its place and renamed, so what is there is whole
and is not made again. Under torchrun each rank takes every world-size-th part; ranks need not hear of each other.

Every user asks at the dataset's end, in the scenario and context of their last event. Dimension legend in `m5.batch`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from m5.best import read_record
from m5.data.sequences import age_bucket
from m5.eligibility import Eligibility
from m5.model.multi_modal_embedding import START
from m5.predict import CPU_SEQUENCES, GPU_SEQUENCES, Predictor
from m5.recommend import best_titles, key_columns, latest_time
from m5.schema import DataError
from m5.serving.export import title_rows
from m5.serving.tower import UserTower
from m5.serving.viewer import TowerInput

PART = 8_192  # users in a file
SETUP = "_recommendations.json"  # readers of Parquet datasets pass over names that begin so
SCORED = 2**25  # scores held at a time


@dataclass(frozen=True)
class Setup:
    """What the files of one folder have in common; another setup may not be mixed in."""

    weights_sha256: str
    dataset: str
    users: int
    k: int
    scenario: dict[str, int]
    filter_seen: bool
    part: int = PART


class UserEncoder:
    """Users of the dataset -> the tower's input, whole arrays at a time.

    Args:
        predictor: whose dataset and model are meant.
        scenario: vocabulary indices by name, in place of those of the users' last events.
    """

    def __init__(self, predictor: Predictor, scenario: dict[str, int]):
        self.builder, self.config = predictor.builder, predictor.config
        self.dataset, self.manifest = predictor.dataset, predictor.dataset.manifest
        self.scenario, self.at = scenario, latest_time(predictor.dataset)
        cold_N = torch.from_numpy(predictor.builder.cold.copy())
        self.id_ND, self.cg_ND = title_rows(predictor.model, cold_N.to(predictor.device))
        self.category = torch.from_numpy(np.append(predictor.builder.category, -1)).to(predictor.device)
        self.device = predictor.device

    def __call__(self, user: np.ndarray) -> TowerInput:
        """int64 [B] users -> input of B sequences."""
        builder, history = self.builder, self.config.sequences.history
        last = self.dataset.offsets[user + 1]
        start = np.maximum(self.dataset.offsets[user], last - history)
        length_B = last - start + 1
        column_L = np.arange(int(length_B.max(initial=1)))
        behaviour_BL = (column_L > 0) & (column_L < length_B[:, None])
        event_BL = np.where(behaviour_BL, start[:, None] + column_L - 1, 0)
        title_BL = torch.from_numpy(np.where(behaviour_BL, builder.title[event_BL], builder.n_titles + START))
        title_BL = title_BL.to(torch.int64).to(self.device)
        parts = []
        if self.config.model.subsidiary:
            until_BL = np.full(event_BL.shape, self.at)
            if self.config.model.attention == "causal":
                following_BL = behaviour_BL & (column_L < length_B[:, None] - 1)
                until_BL = np.where(following_BL, builder.timestamp[np.where(following_BL, event_BL + 1, 0)], self.at)
            parts.append(age_bucket(until_BL - builder.timestamp[event_BL]))
            parts += [values[event_BL] for values in builder.intensity]
        masked = [np.where(behaviour_BL, part, 0).astype(np.int64) for part in parts]
        shape = (*event_BL.shape, 0)
        return TowerInput(
            id_BLD=self.id_ND[title_BL],
            cg_BLD=self.cg_ND[title_BL] if self.cg_ND is not None else None,
            category_BL=self.category[title_BL.clamp(max=builder.n_titles)],
            subsidiary_BLX=self._tensor(np.stack(masked, -1) if masked else np.zeros(shape, dtype=np.int64)),
            length_B=self._tensor(length_B),
            feature_BX=self._tensor(self._features(user)),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def scenarios(self, user: np.ndarray) -> np.ndarray:
        """int64 [B, M] in the manifest's order: of the last event, 0 where a user has none."""
        columns = []
        for name, values in zip(self.builder.all_scenarios, self.builder.scenario, strict=True):
            given = self.scenario.get(name)
            columns.append(self._latest(values, user) if given is None else np.full(len(user), given))
        return np.stack(columns, 1).astype(np.int64) if columns else np.zeros((len(user), 0), dtype=np.int64)

    def _latest(self, values: np.ndarray, user: np.ndarray) -> np.ndarray:
        first, last = self.dataset.offsets[user], self.dataset.offsets[user + 1]
        return np.where(last > first, values[np.maximum(last - 1, 0)] if len(values) else 0, 0)

    def _features(self, user: np.ndarray) -> np.ndarray:
        builder = self.builder
        visible = self.scenarios(user)[:, : len(builder.scenario_names)]
        columns = [values[user] for values in builder.user_features]
        columns += [self._latest(values, user) for values in builder.context]
        return np.concatenate([*(column[:, None] for column in columns), visible], axis=1).astype(np.int64)


class Lists:
    """The best playable titles of users.

    Args:
        predictor: the trained model.
        setup: k, scenario, filter_seen.
    """

    def __init__(self, predictor: Predictor, setup: Setup):
        self.predictor, self.setup = predictor, setup
        self.encoder = UserEncoder(predictor, setup.scenario)
        self.tower = UserTower(predictor.model).eval()
        self.key_QN = key_columns(predictor)
        self.eligibility = Eligibility.from_dataset(predictor.dataset, predictor.device)
        self.title_ids = predictor.dataset.titles["title_id"].to_numpy()
        self.user_ids = predictor.dataset.users["user_id"].to_numpy()

    @torch.inference_mode()
    def of(self, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] users -> int64 [B, k] titles, -1 behind the last playable one, and their float32 scores."""
        encoder, device = self.encoder, self.predictor.device
        query_BQ, _ = self.tower(*encoder(user))
        score_BN = query_BQ @ self.key_QN
        if self.eligibility is not None:
            scenario_BM = torch.from_numpy(encoder.scenarios(user)).to(device)
            at_B = torch.full((len(user),), encoder.at, device=device)
            score_BN.masked_fill_(~self.eligibility.mask(scenario_BM, at_B), -torch.inf)
        if self.setup.filter_seen:
            offsets = encoder.dataset.offsets
            count = offsets[user + 1] - offsets[user]
            row = np.repeat(np.arange(len(user)), count)
            place = (
                np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(offsets[user], count)
            )
            seen = np.asarray(encoder.builder.title[place], dtype=np.int64)
            score_BN[torch.from_numpy(row).to(device), torch.from_numpy(seen).to(device)] = -torch.inf
        found = best_titles(score_BN, self.setup.k)
        return found.title_BR, found.score_BR

    def table(self, user: np.ndarray) -> pa.Table:
        """Columns user_id (string), title_id (list of strings, best first) and score (list of floats)."""
        sequences = CPU_SEQUENCES if self.predictor.device.type == "cpu" else GPU_SEQUENCES
        step = max(1, min(sequences, SCORED // max(1, len(self.title_ids))))
        # Users of alike histories together: padding is work, too.
        order = np.argsort(np.diff(self.encoder.dataset.offsets)[user], kind="stable")
        lists: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(user)
        for first in range(0, len(user), step):
            places = order[first : first + step]
            for place, title, score in zip(places, *self.of(user[places]), strict=True):
                lists[place] = title[title >= 0], score[title >= 0]
        titles = pa.array([self.title_ids[title].tolist() for title, _ in lists], pa.list_(pa.string()))
        scores = pa.array([score.tolist() for _, score in lists], pa.list_(pa.float32()))
        return pa.table(
            {"user_id": pa.array(self.user_ids[user].tolist(), pa.string()), "title_id": titles, "score": scores}
        )


class Written(NamedTuple):
    """What one rank has done: users, and seconds for them, the model loaded before; peak memory in bytes."""

    users: int
    seconds: float
    memory: int
    gpu_memory: int

    def __str__(self) -> str:
        gpu = f", of the GPU {self.gpu_memory / 2**30:.2f} GB" if self.gpu_memory else ""
        return (
            f"{self.users:,} users in {self.seconds:.1f} s, {self.users / self.seconds:,.0f} users/s, "
            f"peak memory {self.memory / 2**30:.2f} GB{gpu}"
        )


def recommend_all(run: Path, out: Path, *, scenario: dict[str, int], k: int, filter_seen: bool) -> Written:
    """Write what is missing of the lists of all users; this rank's share of it.

    Args:
        run: folder of `m5 train`.
        out: folder of the part files; may hold some already.
        scenario: vocabulary indices by name, in place of those of the users' last events.

    Returns:
        What was written; no users where nothing was missing.

    Raises:
        DataError: no trained run, or `out` holds recommendations of another setup or something else.
    """
    predictor = Predictor.load(run, own_device())
    manifest = predictor.dataset.manifest
    weights = read_record(run)["weights_sha256"]
    setup = Setup(weights, manifest.content_hash, manifest.n_users, k, scenario, filter_seen)
    _claim(out, setup)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = range(rank, -(-setup.users // PART), ranks)
    for part in own:
        for left in out.glob(f".{part_name(part)}.*"):  # a killed run's
            left.unlink(missing_ok=True)
    missing = [part for part in own if not (out / part_name(part)).is_file()]
    if not missing:
        print(f"{out}: everything is there already", file=sys.stderr)
        return Written(0, 0.0, 0, 0)
    lists, done, began = Lists(predictor, setup), 0, time.monotonic()
    for part, user in parts(missing, setup.users):
        _write(lists.table(user), out / part_name(part))
        done += len(user)
        rate = done / (time.monotonic() - began)
        print(f"rank {rank}: part {part}, {done:,} users, {rate:,.0f} users/s", file=sys.stderr, flush=True)
    on_gpu = predictor.device.type == "cuda"
    return Written(
        users=done,
        seconds=time.monotonic() - began,
        memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        gpu_memory=torch.cuda.max_memory_allocated(predictor.device) if on_gpu else 0,
    )


def own_device() -> str:
    """This rank's GPU, where there are GPUs: ranks of a node share them evenly."""
    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"


def _write(table: pa.Table, path: Path) -> None:
    """A whole file on disk, or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parts(numbers: list[int], users: int) -> Iterator[tuple[int, np.ndarray]]:
    """Part numbers -> the users of each."""
    for number in numbers:
        yield number, np.arange(number * PART, min((number + 1) * PART, users))


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _claim(out: Path, setup: Setup) -> None:
    """Leave the setup in `out`, or see that it is the same. Of ranks that start together, the first leaves it, whole.

    Raises:
        DataError: `out` is a file, holds something else, or recommendations of another setup.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file, and --out names a folder. Choose another.")
    path, text, beginning = out / SETUP, json.dumps(asdict(setup), indent=1), f".{SETUP}."
    foreign = out.is_dir() and any(not entry.name.startswith(beginning) for entry in out.iterdir())
    if foreign and not path.is_file():
        raise DataError(f"{out} is not empty, and holds no recommendations. Choose another --out.")
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f"{beginning}{uuid.uuid4().hex}"
        try:
            temporary.write_text(text)
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if path.read_text() != text:
        raise DataError(
            f"{out} holds recommendations of another run, k, scenario or --keep-seen. Choose another --out, or remove "
            "it."
        )
