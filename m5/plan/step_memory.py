"""What one step holds, found by running the real model on the CPU for small real batches.

The bytes that a step keeps are sums of products of the batch's sizes (positions, requests, candidates, ...), because
attention and the candidate softmax make no quadratic matrix, and interests are summed up chunk by chunk. So a few
runs at small sizes, with the described model's own widths, determine the coefficients, and any batch follows. The
looked-up rows stand in for the tables, which therefore cost nothing, however long they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec import EmbeddingCollection, JaggedTensor, KeyedJaggedTensor

from m5.assemble import Inputs, assemble
from m5.batch import Batch, jagged
from m5.config import RunConfig
from m5.data.sequences import BatchBuilder
from m5.model.m5 import M5, Scores
from m5.model.multi_interest_extraction import chunked
from m5.model.multi_scenario_mixing import expert_table_shape
from m5.plan.description import Dataset
from m5.plan.stand_in import StandIn, whole_histories

PROBES = 28


@dataclass(frozen=True)
class Sizes:
    """Sizes of one rank's batch, all that its memory depends on.

    Attributes:
        sequences: B.
        positions: B x L, padding included.
        behaviours: T, padding left out.
        chunks: sequences are cut into as many when their interests are summed up.
        pairs: of behaviours of one chunk.
        combinations: S of subsidiary features.
        requests: P.
        situations: J.
        candidates: C, the rank's slice of the negatives and its own targets besides.
        titles: distinct titles among behaviours and candidates: each is projected once.
        expert_values: scenario values present, summed over the scenario dimensions.
        masked: titles hidden for the masked-language-model loss.
    """

    sequences: float
    positions: float
    behaviours: float
    chunks: float
    pairs: float
    combinations: float
    requests: float
    situations: float
    candidates: float
    titles: float
    expert_values: float
    masked: float

    def row(self) -> list[float]:
        """What bytes are a sum of. Sequences are left to chunks: few bytes belong to a sequence as such."""
        return [1.0, *(getattr(self, field.name) for field in fields(self) if field.name != "sequences")]

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        B, L = batch.size
        present = sum(len(column.unique()) for column in batch.scenario_PM.T) if batch.experts is not None else 0
        titles = torch.cat([batch.title_BL.flatten(), batch.candidate_C]).unique()
        chunks, length = chunked(L)
        return cls(
            sequences=B,
            positions=B * L,
            behaviours=len(batch.history_T),
            chunks=B * chunks,
            pairs=B * chunks * length**2,
            combinations=int(batch.subsidiary_BL.max()) + 1,
            requests=len(batch.request_P),
            situations=max((len(batch.sparse[key].values()) for key in _of_situations(batch)), default=1),
            candidates=len(batch.candidate_C),
            titles=len(titles),
            expert_values=present,
            masked=len(batch.masked_Q),
        )


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one rank's step, the model's tables and dense weights, and the loss, left out.

    Attributes:
        batch: the batch's tensors.
        kept: what the forward pass keeps for the backward pass.
        peak: most that is alive at a time in forward and backward, `kept` included.
    """

    batch: float
    kept: float
    peak: float


class StepMemory:
    """Bytes of a step as a function of its sizes.

    The peak is a maximum over the step's operators, so it is not linear in the sizes; but what is alive after any one
    operator is, and every probe runs the same operators in the same order.

    Args:
        dataset: described.
        config: the run; reads model, sequences and training.autocast.
    """

    def __init__(self, dataset: Dataset, config: RunConfig):
        rows, batches, histories, kept = [], [], [], []
        generator = np.random.default_rng(1)
        for stand_in, requests in _probes(dataset, config):
            batch, model = batch_and_model(stand_in, config, requests)
            batch = with_situations(batch, int(generator.integers(2, len(batch.request_P) + 2)))
            step = measure(model, batch, autocast=config.training.autocast)
            sizes_of_probe = Sizes.of(batch)
            rows.append(sizes_of_probe.row())
            batches.append(step.batch)
            kept.append(step.kept)
            histories.append(step.live)
        measured = np.column_stack([batches, kept, np.array(histories, dtype=np.float64)])
        sizes = np.array(rows)
        self._coefficients, *_ = np.linalg.lstsq(sizes, measured, rcond=None)
        error = np.abs(sizes @ self._coefficients - measured)[:, 1:].max(0) / measured[:, 1:].max()
        # Anything but rounding would mean that the model's memory has come to depend on something else.
        assert error.max() < 0.01, f"the memory of a step is not linear in its sizes: off by {error.max():.1%}"
        # Scenario values decide how many operators there are, so the probes all have as many. A value more is one
        # expert more a branch, kept for the backward pass and given a gradient of its size.
        self._values = sizes_of_probe.expert_values
        self._autocast = config.training.autocast
        self._expert_elements, self._expert_width = 0, 1
        if config.model.mixing == "smoe":
            expert_rows, self._expert_width = expert_table_shape(
                input_width=config.model.mixing_width,
                hidden=config.model.expert_hidden,
                output_width=config.model.width,
            )
            self._expert_elements = expert_rows * self._expert_width * (2 if config.model.content else 1)

    def __call__(self, sizes: Sizes) -> StepBytes:
        elements = (sizes.expert_values - self._values) * self._expert_elements
        row = np.array(replace(sizes, expert_values=self._values).row())
        batch, kept, *live = (float(value) for value in row @ self._coefficients)
        batch += 8 * elements / self._expert_width  # its row numbers
        # Looked-up rows and their gradients are float32; under autocast it is a narrow copy of them that is kept.
        kept += (2 if self._autocast else 4) * elements
        peak = max(live) + (10 if self._autocast else 8) * elements
        return StepBytes(batch, kept, max(kept, peak))


def _probes(dataset: Dataset, config: RunConfig) -> Iterator[tuple[StandIn, int]]:
    """Small datasets whose sizes vary independently, and how many requests a sequence makes."""
    generator = np.random.default_rng(0)
    most = max(2, min(24, config.sequences.history))
    for seed in range(PROBES):
        lengths = generator.integers(most // 2, most + 1, int(generator.integers(3, 12)))
        stand_in = StandIn(
            dataset,
            lengths=lengths,
            titles=int(generator.integers(60, 300)),
            cold=int(generator.integers(0, 50)),
            # Nothing but the unknown value, which is then present in every batch.
            values=0,
            seed=seed,
        )
        yield stand_in, min(config.sequences.requests, int(generator.integers(most // 2, most + 1)))


def batch_and_model(stand_in: StandIn, config: RunConfig, requests: int) -> tuple[Batch, M5]:
    """One batch of all users and the model for it, whose tables are a source of random rows."""
    # Every warm title is a candidate, whatever the run draws: their number is what varies here.
    full = {"candidates": type(config.candidates)(), "model": config.model}
    probe = config.model_copy(update=full)
    builder = BatchBuilder(stand_in, probe)
    batch = builder.build(whole_histories(builder, requests), np.random.default_rng(0))
    with torch.device("cpu"):
        model = assemble(Inputs.of(stand_in, probe), probe, table_device="meta")
    return batch, with_rows_for_tables(model).train()


def _of_situations(batch: Batch) -> list[str]:
    """Keys of the features that are looked up once per situation."""
    return [key for key in batch.sparse.keys() if key.startswith(("user_", "context_", "scenario_"))]  # noqa: SIM118


def with_situations(batch: Batch, count: int) -> Batch:
    """The batch with `count` situations, of which no request has but those that it had."""
    features = {key: part.values() for key, part in batch.sparse.to_dict().items()}
    features |= {key: features[key][:1].repeat(count) for key in _of_situations(batch)}
    return replace(batch, sparse=jagged(features), situation_P=batch.situation_P.clamp(max=count - 1))


class _Rows(nn.Module):
    """Stands in for a sharded collection: random rows for every value, as leaves that get a gradient."""

    def __init__(self, collection: EmbeddingCollection):
        super().__init__()
        self.width = {name: t.embedding_dim for t in collection.embedding_configs() for name in t.feature_names}

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return {
            key: JaggedTensor(
                values=torch.randn(len(part.values()), self.width[key], requires_grad=True), lengths=part.lengths()
            )
            for key, part in features.to_dict().items()
        }


def with_rows_for_tables(model: M5) -> M5:
    """The model with its tables, which may be on `meta`, replaced by a source of random rows."""
    model.tables = _Rows(model.tables)  # type: ignore[assignment]
    if model.experts is not None:
        model.experts = _Rows(model.experts)  # type: ignore[assignment]
    return model


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages made inside and still alive; `history` has them after every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.history: list[int] = []
        self._seen: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            # An operator that writes in place, or returns a view, makes nothing new.
            if storage._cdata not in before and self._seen.get(storage._cdata) is not storage:
                self._seen[storage._cdata] = storage
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.history.append(self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def kept_for_backward(model: nn.Module, batch: Batch) -> Iterator[list[int]]:
    """Collects the bytes of every storage that autograd keeps, each once; not the model's nor the batch's own."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), *batch_tensors(batch)]}
    seen: set[int] = set()
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # What is kept is not freed meanwhile, so no other storage can come to have its address.
        if storage._cdata not in own and storage._cdata not in seen:
            seen.add(storage._cdata)
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def batch_tensors(batch: Batch) -> list[Tensor]:
    tensors: list[Tensor] = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, KeyedJaggedTensor):
            tensors += [value.values(), value.lengths()]
    return tensors


@dataclass(frozen=True)
class Measured:
    """Bytes of one run: the batch, what was kept for backward, and what was alive after every operator."""

    batch: int
    kept: int
    live: list[int]


def measure(model: M5, batch: Batch, *, autocast: bool) -> Measured:
    """Run forward and backward once, with a gradient of ones for every score, and count.

    The dense weights' gradients are among what is alive; they come late and are small.
    """
    live = LiveBytes()
    with live:
        with kept_for_backward(model, batch) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = _outputs(model(batch))
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    model.zero_grad(set_to_none=True)
    size = sum(tensor.numel() * tensor.element_size() for tensor in batch_tensors(batch))
    return Measured(size, sum(kept), live.history)


def _outputs(scores: Scores) -> list[Tensor]:
    return [tensor for tensor in (scores.query_PQ, scores.key_CQ, scores.interests.h_BLD) if tensor.requires_grad]
