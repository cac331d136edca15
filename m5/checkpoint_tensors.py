"""A checkpoint's tensors: the copy that it is written from, and torch.distributed.checkpoint that writes and reads it.

Training goes on changing the tensors while they are written, so they are copied first. torch has stagers for that, too.
Here the ShardedTensors stay what they are, for the table of contents, and torch's planner is told to look the values up
in the copy: no second ShardedTensor has to be built, whose shards would be in main memory while their placement says
GPU, and the buffers serve again, with or without CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

State = Mapping[str, Tensor]
# A part of a tensor: its key, and the place of its first element in the whole tensor.
Part = tuple[str, tuple[int, ...]]


def local_parts(state: State) -> dict[Part, Tensor]:
    """The tensors that this rank holds: its shards of sharded ones, and plain ones whole."""
    parts: dict[Part, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                parts[key, tuple(shard.metadata.shard_offsets)] = shard.tensor.detach()
        else:
            parts[key, (0,) * value.ndim] = value.detach()
    return parts


class Staging:
    """Buffers in main memory, kept from one copy to the next: touching fresh pages takes longer than copying."""

    def __init__(self, device: torch.device):
        """
        Args:
            device: where the state lives. For CUDA the buffers are page-locked, so that copies run at the bus's speed.
        """
        self._device = device
        self._buffers: dict[Part, Tensor] = {}

    def copy(self, state: State) -> dict[Part, Tensor]:
        """Copy what this rank holds of `state`; the copy is valid until the next call.

        Returns:
            Tensors on the CPU by part, contiguous.
        """
        parts = local_parts(state)
        if {part: _kind(value) for part, value in parts.items()} != {
            part: _kind(value) for part, value in self._buffers.items()
        }:
            self._buffers = {}  # the old ones go before the new ones come
            cuda = self._device.type == "cuda"
            self._buffers = {
                part: torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda) for part, value in parts.items()
            }
        for part, value in parts.items():
            self._buffers[part].copy_(value, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._buffers


def _kind(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


class _StagedPlanner(dcp.DefaultSavePlanner):
    """torch's plan for saving, with the values taken from a copy."""

    def __init__(self, copy: Mapping[Part, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copy = copy

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of one part; torch asks for it when it writes."""
        assert index.offset is not None
        return self._copy[index.fqn, tuple(index.offset)]


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which tells a full disk as the system does."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # torch.save answers a failed write with a RuntimeError about its position in the archive; the system's
            # error hangs behind it, and would be lost on the way to the other ranks.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def save_tensors(state: State, copy: Mapping[Part, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write this rank's part of a state into `folder` (a collective call).

    Args:
        state: plain tensors and ShardedTensors; only their shapes and places are read.
        copy: their values, as `Staging.copy` returns them.
        folder: where every rank writes; torch makes files __RANK_NUMBER.distcp, and .metadata on the first rank.
        group: gloo group of all ranks.

    Raises:
        OSError, RuntimeError: what failed, on all ranks alike.
    """
    # Unsynced: every file is synced when it is described, after torch has closed it. Nothing to copy ahead: the values
    # are in main memory, and this thread would otherwise open a context on the first GPU, whichever is this rank's.
    writer = _Writer(folder, sync_files=False, per_thread_copy_ahead=0)
    with _unwrapped():
        dcp.save(dict(state), storage_writer=writer, planner=_StagedPlanner(copy), process_group=group)


def load_tensors(state: State, folder: Path, group: dist.ProcessGroup) -> None:
    """Fill the tensors of a state in place, each rank reading the parts that it holds (a collective call).

    Raises:
        OSError, RuntimeError: what failed, on all ranks alike.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _unwrapped():
        dcp.load(dict(state), storage_reader=dcp.FileSystemReader(folder), planner=planner, process_group=group)


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise what failed, not torch's CheckpointException around it: that one is no Exception, and hides an OSError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise (cause if isinstance(cause, Exception) else RuntimeError(f"rank {rank}: {cause!r}")) from error
