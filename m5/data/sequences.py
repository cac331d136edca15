"""Prepared dataset -> batches: slices of the memory-mapped event arrays, no Python per event.

A *window* (start, last, first) of one user reads the events start .. last - 1 and asks for the events first .. last:
position 0 stands for "before the first behaviour", position p follows event start + p - 1 and requests event start + p.
Dimension legend in `m5.batch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m5.batch import Batch, jagged
from m5.config import RunConfig
from m5.data.arrays import by_category, columns, distinct_rows, sorted_by_value, sum_by_rank
from m5.data.draws import Draws
from m5.model.multi_modal_embedding import MASK, START, UNKNOWN
from m5.model.multi_scenario_mixing import expert_table_shape
from m5.schema import PreparedDataset

AGE_BUCKETS = 34


def age_bucket(seconds: np.ndarray) -> np.ndarray:
    """int64 seconds -> int64 1 + floor(log2(1 + seconds)), at most AGE_BUCKETS - 1; bucket 0 is the start position."""
    return np.minimum(1 + np.log2(1.0 + np.maximum(seconds, 0)), AGE_BUCKETS - 1).astype(np.int64)


@dataclass(frozen=True)
class Windows:
    """int64 arrays of event indices, one row a sequence; see the module's text."""

    start: np.ndarray
    last: np.ndarray
    first: np.ndarray

    def __getitem__(self, rows: np.ndarray | slice) -> Windows:
        return Windows(self.start[rows], self.last[rows], self.first[rows])

    def __len__(self) -> int:
        return len(self.start)


# One sequence that has its start position and no request: what a rank does in a batch of fewer sequences than ranks.
IDLE = Windows(start=np.zeros(1, dtype=np.int64), last=np.zeros(1, dtype=np.int64), first=np.ones(1, dtype=np.int64))


class Behaviours(NamedTuple):
    """What a user did and asks now, already as indices: an ad-hoc viewer, or rows cut from the dataset.

    Rows are sequences padded on the right; position 0 is the start. Shapes [B, L] and [B, L, columns].
    """

    title: np.ndarray
    intensity: np.ndarray
    age: np.ndarray
    length: np.ndarray


class Requests(NamedTuple):
    """Per request: flat position, sequence, target, time, scenario [P, M], context [P, .], user features [P, .]."""

    position: np.ndarray
    target: np.ndarray
    timestamp: np.ndarray
    scenario: np.ndarray
    context: np.ndarray
    user: np.ndarray
    event: np.ndarray


class Candidates(NamedTuple):
    """Titles, of which the first `len(log_q)` are negatives; `place[n]` is where title n stands, -1 = absent."""

    title: np.ndarray
    log_q: np.ndarray
    place: np.ndarray


class BatchBuilder:
    """Assembles batches for one model on one dataset.

    Args:
        dataset: the prepared dataset.
        config: the run; reads `model`, `candidates` and `sequences`.
    """

    def __init__(self, dataset: PreparedDataset, config: RunConfig):
        manifest = dataset.manifest
        self.dataset, self.config = dataset, config
        self.n_titles = manifest.n_titles
        self.title = dataset.event_array("title")
        self.timestamp = dataset.event_array("timestamp")
        self.intensities = manifest.intensities if config.model.subsidiary else ()
        self.intensity = [
            intensity.bucket(dataset.event_array(f"intensity_{intensity.name}")).astype(np.uint8)
            for intensity in self.intensities
        ]
        self.scenario_names = scenario_names(dataset, config)
        self.all_scenarios = tuple(vocabulary.name for vocabulary in manifest.scenarios)
        self.scenario = [dataset.event_array(f"scenario_{name}") for name in self.all_scenarios]
        self.context = [dataset.event_array(f"context_{v.name}") for v in manifest.contexts]
        self.user_features = [dataset.users[v.name].to_numpy(np.int64) for v in manifest.user_features]
        titles = dataset.titles
        self.cold = titles["cold"].to_numpy(bool)
        categories = titles["category"].to_numpy(np.int64)
        self.category = categories if config.model.categories else np.zeros_like(categories)
        self.n_categories = manifest.categories.size if config.model.categories else 1
        self.warm = np.flatnonzero(~self.cold)
        count = titles["train_count"].to_numpy(np.float64)
        weight = (count[self.warm] + 1) ** config.candidates.power
        self.sampling_probability = weight / weight.sum()
        self.target_share = count / max(1.0, count.sum())
        self.expert_rows, _ = expert_table_shape(
            input_width=config.model.mixing_width, hidden=config.model.expert_hidden, output_width=config.model.width
        )

    # ---- from the dataset ------------------------------------------------------------------------------------

    def windows_before(self, event: np.ndarray) -> Windows:
        """One window per target event: as much history as the model reads, one request."""
        user = self.dataset.user_of(event)
        start = np.maximum(self.dataset.offsets[user], event - self.config.sequences.history)
        return Windows(start, event, event)

    def _behaviours(self, windows: Windows) -> Behaviours:
        length = windows.last - windows.start + 1
        column_L = np.arange(int(length.max()))
        inside_BL = column_L < length[:, None]
        behaviour_BL = inside_BL & (column_L > 0)
        event_BL = np.where(behaviour_BL, windows.start[:, None] + column_L - 1, windows.start[:, None])
        title = np.where(behaviour_BL, self.title[event_BL], self.n_titles + START)
        intensity = np.stack([np.where(behaviour_BL, values[event_BL], 0) for values in self.intensity] or [title], -1)
        # The time that passes until the request: of each position (causal), or of the one request of the sequence.
        if self.config.model.attention == "causal":
            request_BL = np.where(inside_BL, windows.start[:, None] + column_L, windows.start[:, None])
        else:
            request_BL = np.broadcast_to(windows.last[:, None], event_BL.shape)
        age = np.where(behaviour_BL, age_bucket(self.timestamp[request_BL] - self.timestamp[event_BL]), 0)
        return Behaviours(title.astype(np.int64), intensity.astype(np.int64), age, length)

    def _requests(self, windows: Windows, length: int) -> Requests:
        position = np.arange(length)
        event_BL = windows.start[:, None] + position
        row, column = np.nonzero((event_BL >= windows.first[:, None]) & (event_BL <= windows.last[:, None]))
        event = event_BL[row, column]
        user = self.dataset.user_of(windows.last)[row]
        return Requests(
            position=row * length + column,
            target=self.title[event].astype(np.int64),
            timestamp=np.asarray(self.timestamp[event]),
            scenario=columns(self.scenario, event),
            context=columns(self.context, event),
            user=columns(self.user_features, user),
            event=event,
        )

    def build(
        self, windows: Windows, generator: np.random.Generator | None, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """Windows -> Batch.

        Args:
            windows: the sequences of all ranks; a rank takes each world_size-th. One that gets none builds a sequence
                without request, so that it takes part in the step.
            generator: draws candidates, dropped and masked titles for a training batch; None for evaluation, where
                nothing is dropped and no candidate is looked up, since a query needs none.
            rank, world_size: which part to build.
        """
        mine = windows[rank::world_size] if len(windows) > rank else IDLE
        behaviours = self._behaviours(mine)
        requests = self._requests(mine, behaviours.title.shape[1])
        draws = None if generator is None else self._draw(windows, generator, rank, world_size)
        return self.assemble(behaviours, requests, draws)

    # ---- chance ----------------------------------------------------------------------------------------------

    def _draw(self, windows: Windows, generator: np.random.Generator, rank: int, world_size: int) -> Draws:
        """All that chance decides in the batch of all ranks, cut to this rank's part."""
        model = self.config.model
        lost_N = generator.random(self.n_titles) < model.id_dropout
        negative, log_q = self._negatives(windows, generator)
        requests_B, length_B = windows.last - windows.first + 1, windows.last - windows.start + 1
        key_B = generator.integers(-(2**31), 2**31, len(windows), dtype=np.int32)
        forget_PM = generator.random((requests_B.sum(), len(self.all_scenarios))) < model.scenario_dropout
        column_L = np.arange(int(length_B.max()))
        masked_BL = np.zeros((len(windows), len(column_L)), dtype=bool)
        if model.mlm_weight:
            masked_BL = generator.random(masked_BL.shape) < model.mlm_share
            masked_BL &= (column_L > 0) & (column_L < length_B[:, None])
        masked_B = masked_BL.sum(1)
        rank_B = np.arange(len(windows)) % world_size
        mine_B = rank_B == rank
        place = np.array_split(np.arange(len(negative)), world_size)[rank]
        if mine_B.any():
            masked_BL = masked_BL[mine_B, : int(length_B[mine_B].max())]
        return Draws(
            lost_N=lost_N,
            negative=negative[place],
            log_q=log_q[place],
            forget_PM=forget_PM[np.repeat(mine_B, requests_B)],
            masked_BL=masked_BL if mine_B.any() else np.zeros((1, 1), dtype=bool),
            key_B=key_B[mine_B] if mine_B.any() else key_B[:1],
            ranks_P=sum_by_rank(requests_B, rank_B, world_size),
            ranks_Q=sum_by_rank(masked_B, rank_B, world_size),
            longest_slice=-(-len(negative) // world_size),
        )

    def _negatives(self, windows: Windows, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Titles, ascending, that all requests of all ranks are scored against, and their log Q.

        Q is the probability of a title to be among the negatives, since repeated draws count once. Cold titles are no
        negatives.
        """
        kind, count = self.config.candidates.kind, self.config.candidates.count
        if kind == "full":
            return self.warm, np.zeros(len(self.warm))
        if kind == "in-batch":
            requests = windows.last - windows.first + 1
            before = np.repeat(np.cumsum(requests) - requests, requests)
            event = np.arange(requests.sum()) - before + np.repeat(windows.first, requests)
            drawn = np.unique(self.title[event]).astype(np.int64)
            return drawn, np.log(-np.expm1(len(event) * np.log1p(-self.target_share[drawn])))
        drawn = np.unique(generator.choice(len(self.warm), count, p=self.sampling_probability))
        return self.warm[drawn], np.log(-np.expm1(count * np.log1p(-self.sampling_probability[drawn])))

    # ---- from indices ----------------------------------------------------------------------------------------

    def catalogue(self) -> Batch:
        """A batch whose candidates are all N titles, in order, for one request of a viewer without history."""
        nobody = Behaviours(
            title=np.full((1, 1), self.n_titles + START),
            intensity=np.zeros((1, 1, len(self.intensities)), dtype=np.int64),
            age=np.zeros((1, 1), dtype=np.int64),
            length=np.ones(1, dtype=np.int64),
        )
        return self.assemble(nobody, self.ad_hoc_request(0, {}, {}, {}), None, catalogue=True)

    def ad_hoc_request(
        self, timestamp: int, scenario: dict[str, int], context: dict[str, int], user: dict[str, int]
    ) -> Requests:
        """One request at position 0 of the one sequence; vocabulary indices by name, 0 where not given."""
        manifest = self.dataset.manifest

        def row(vocabularies, values: dict[str, int]) -> np.ndarray:
            return np.array([[values.get(v.name, 0) for v in vocabularies]], dtype=np.int64).reshape(1, -1)

        return Requests(
            position=np.zeros(1, dtype=np.int64),
            target=np.zeros(1, dtype=np.int64),
            timestamp=np.array([timestamp], dtype=np.int64),
            scenario=row(manifest.scenarios, scenario),
            context=row(manifest.contexts, context),
            user=row(manifest.user_features, user),
            event=np.full(1, -1),
        )

    def assemble(
        self, behaviours: Behaviours, requests: Requests, draws: Draws | None, catalogue: bool = False
    ) -> Batch:
        """Behaviours and requests as indices -> Batch; without draws for evaluation. `catalogue` explains the last."""
        B, L = behaviours.title.shape
        history = np.flatnonzero(np.arange(L) < behaviours.length[:, None])
        title = behaviours.title.copy()
        category = np.append(self.category, -1)[np.minimum(title, self.n_titles)]
        has_id = np.append(~self.cold, True)
        training = draws is not None
        draws = draws or Draws.nothing(B, requests.scenario.shape, self.n_titles, catalogue)
        masked = np.flatnonzero(draws.masked_BL)
        has_id[:-1] &= ~draws.lost_N
        scenario = np.where(draws.forget_PM, 0, requests.scenario)
        wanted = np.concatenate([requests.target, title.flat[masked]]) if training else draws.negative[:0]
        candidates = self._candidates(draws.negative, draws.log_q, wanted)
        hidden_title = title.flat[masked]
        title.flat[masked] = self.n_titles + MASK

        def table_row(titles: np.ndarray) -> np.ndarray:
            return np.where(has_id[np.minimum(titles, self.n_titles)], titles, self.n_titles + UNKNOWN)

        visible = scenario[:, : len(self.scenario_names)]
        sparse = {"history": table_row(title.flat[history]), "candidates": table_row(candidates.title)}
        subsidiary, features_S = self._subsidiary(behaviours, history)
        features_J, situation = self._situations(requests, visible)
        sparse |= features_S | features_J
        experts, order, group_sizes = self._experts(visible)
        category_order, category_sizes = by_category(category, self.n_categories)
        tensors = {
            "title_BL": title,
            "subsidiary_BL": subsidiary,
            "category_BL": category,
            "history_T": history,
            "length_B": behaviours.length,
            "request_P": requests.position,
            "category_T": category_order,
            "situation_P": situation,
            "target_P": requests.target,
            "candidate_C": candidates.title,
            "log_q_C": candidates.log_q.astype(np.float32),
            "positive_P": candidates.place[requests.target],
            "scenario_PM": visible,
            "rights_PM": requests.scenario,
            "order_MP": order,
            "timestamp_P": requests.timestamp,
            "event_P": requests.event,
            "masked_Q": masked,
            "masked_place_Q": candidates.place[hidden_title],
            "draw_B": draws.key_B,
        }
        return Batch(
            sparse=jagged({key: _tensor(rows) for key, rows in sparse.items()}),
            experts=experts,
            ranks_P=draws.ranks_P,
            ranks_Q=draws.ranks_Q,
            longest_slice=draws.longest_slice,
            category_sizes=category_sizes,
            group_sizes=group_sizes,
            **{key: _tensor(values) for key, values in tensors.items()},
        )

    def _subsidiary(self, behaviours: Behaviours, history: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """[B, L] which of the S combinations of subsidiary features each behaviour has, and their rows by table."""
        place = np.zeros(behaviours.title.shape, dtype=np.int64)
        if not self.config.model.subsidiary:
            return place, {}
        values = np.concatenate([behaviours.age[..., None], behaviours.intensity], axis=-1).reshape(place.size, -1)
        values = values[history]
        first, place.flat[history] = distinct_rows(values)
        keys = ["age", *(f"intensity_{intensity.name}" for intensity in self.intensities)]
        return place, {key: values[first, column] for column, key in enumerate(keys)}

    def _situations(self, requests: Requests, scenario: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Row numbers in the other feature tables, per situation, and each request's situation."""
        manifest = self.dataset.manifest
        keys = [f"user_{vocabulary.name}" for vocabulary in manifest.user_features]
        keys += [f"context_{vocabulary.name}" for vocabulary in manifest.contexts]
        keys += [f"scenario_{name}" for name in self.scenario_names]
        values = np.concatenate([requests.user, requests.context, scenario], axis=1)
        first, situation = distinct_rows(values)
        return {key: values[first, column] for column, key in enumerate(keys)}, situation

    def _candidates(self, negatives: np.ndarray, log_q: np.ndarray, wanted: np.ndarray) -> Candidates:
        """The negatives, then those `wanted` titles that are not among them."""
        place = np.full(self.n_titles, -1, dtype=np.int64)
        place[negatives] = np.arange(len(negatives))
        missing = np.unique(wanted[place[wanted] < 0])
        place[missing] = len(negatives) + np.arange(len(missing))
        return Candidates(np.concatenate([negatives, missing]), log_q, place)

    def _experts(self, scenario: np.ndarray):
        """Table rows of the experts owned by the values that occur; per dimension requests by value, and how many."""
        order = np.zeros(scenario.shape[::-1], dtype=np.int64)
        if self.config.model.mixing != "smoe" or not self.scenario_names:
            return None, order, ()
        branches = ("id", "cg") if self.config.model.content else ("id",)
        expert: dict[str, Tensor] = {}
        sizes = []
        for column, name in enumerate(self.scenario_names):
            values, counts, order[column] = sorted_by_value(scenario[:, column])
            sizes.append(tuple(counts.tolist()))
            expert[name] = _tensor((values[:, None] * self.expert_rows + np.arange(self.expert_rows)).ravel())
        keys = {f"{branch}_{name}": rows for branch in branches for name, rows in expert.items()}
        return jagged(keys), order, tuple(sizes)


def scenario_names(dataset: PreparedDataset, config: RunConfig) -> tuple[str, ...]:
    """Scenario dimensions that the model sees: all of the dataset's, or none for the scenario-blind control."""
    return () if config.model.mixing == "mlp" else tuple(v.name for v in dataset.manifest.scenarios)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
