"""One batch: what the model reads and what the loss compares it with.

Dimension legend (suffixes of tensor names, here and in `m5.model`):
    B examples   L behaviours (padded)   T behaviours (jagged: all of the batch)   P requests (supervised positions)
    N titles of the catalogue   C candidates   K behaviour categories   M scenario dimensions   E experts   D width
    G requests of all ranks together (P of one rank)   J situations: the distinct ones among the requests
    S distinct combinations of subsidiary features

Position 0 of every sequence is a *start* position that stands for "before the first behaviour", so that a viewer
without history is an ordinary example. A *request* is a position whose next watch is to be predicted: its scenario,
context and time are those of that next watch, never of the past behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


class ByCategory(NamedTuple):
    """Behaviours sorted by category: int64 flat positions order_T of those that have one, and how many of each."""

    order_T: Tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Batch(Pipelineable):
    """Tensors of one batch; integers are int64 unless said otherwise.

    Attributes:
        sparse: keys `history` [T], `candidates` [C], `intensity_*`/`age` [S], `user_*`/`scenario_*`/`context_*` [J]
            and their row numbers in the sharded tables. One bag per key: only the values are used.
        experts: keys `{id,cg}_<scenario>`; the table rows of the experts owned by the scenario values present. None
            where the mixing layer owns none.
        title_BL: title of each behaviour; the start position and padding hold N.
        subsidiary_BL: which of the S combinations of subsidiary features a behaviour has; 0 at padding too.
        category_BL: behaviour category; -1 at the start position and at padding.
        history_T: flat position (b * L + l) of every behaviour, start positions included, padding not.
        length_B: number of positions, the start included.
        request_P: flat position of every request.
        category_T: flat positions of the behaviours that have a category, sorted by it.
        situation_P: which of the J situations a request has. A situation is a distinct combination of user features,
            context and scenario values as the model sees them; requests of one viewer share theirs, and what depends on
            nothing else is computed once (as RecD does it for whole features, arXiv 2211.05239).
        target_P: title that was watched next.
        candidate_C: titles whose keys are looked up: this rank's slice of the negatives, ascending, then those of the
            rank's own targets that are not in it. With one rank the slice is all negatives.
        log_q_C: float32, one per negative of the slice, so it may be shorter than candidate_C: log expected number of
            draws, 0 for the full catalogue.
        positive_P: place of each request's target in candidate_C.
        scenario_PM: vocabulary index of each request's scenario values as the model sees them (0 where dropped).
        rights_PM: the same as they are; rights never forget where a viewer is.
        order_MP: per scenario dimension the requests, sorted by their value of it.
        timestamp_P: time of the request in seconds.
        event_P: index of the target event in the dataset's arrays, -1 for an ad-hoc request.
        masked_Q: flat positions whose title was hidden for the masked-language-model loss.
        masked_place_Q: place of the hidden titles in candidate_C.
        draw_B: int32 key of each sequence's dropout (see `m5.model.keyed_dropout`).
        ranks_P, ranks_Q: how many requests and how many masked titles every rank has in this global batch.
        longest_slice: negatives of the rank that has most of them.
        category_sizes: how many behaviours each of the K categories has.
        group_sizes: per scenario dimension how many requests have each of the values present in `experts`.
    """

    sparse: KeyedJaggedTensor
    experts: KeyedJaggedTensor | None
    title_BL: Tensor
    subsidiary_BL: Tensor
    category_BL: Tensor
    history_T: Tensor
    length_B: Tensor
    request_P: Tensor
    category_T: Tensor
    situation_P: Tensor
    target_P: Tensor
    candidate_C: Tensor
    log_q_C: Tensor
    positive_P: Tensor
    scenario_PM: Tensor
    rights_PM: Tensor
    order_MP: Tensor
    timestamp_P: Tensor
    event_P: Tensor
    masked_Q: Tensor
    masked_place_Q: Tensor
    draw_B: Tensor
    ranks_P: tuple[int, ...]
    ranks_Q: tuple[int, ...]
    longest_slice: int
    category_sizes: tuple[int, ...]
    group_sizes: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | KeyedJaggedTensor)
        }
        return replace(self, **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor | KeyedJaggedTensor):
                value.record_stream(stream)

    @property
    def negative_C(self) -> Tensor:
        """This rank's slice of the negatives: the first of `candidate_C`."""
        return self.candidate_C[: self.log_q_C.numel()]

    @property
    def by_category(self) -> ByCategory:
        return ByCategory(self.category_T, self.category_sizes)

    @property
    def size(self) -> tuple[int, int]:
        """(B, L)."""
        return self.title_BL.shape[0], self.title_BL.shape[1]


def jagged(features: dict[str, Tensor]) -> KeyedJaggedTensor:
    """Row numbers by key -> KeyedJaggedTensor with one bag per key (stride 1)."""
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.cat(list(features.values())),
        lengths=torch.tensor([values.numel() for values in features.values()], dtype=torch.int64),
        stride=1,
    )
