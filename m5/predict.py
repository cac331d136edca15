"""A trained model that answers: scores of all titles for the requests of the dataset or for an ad-hoc viewer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m5.assemble import build_model
from m5.batch import Batch
from m5.best import load_weights, refuse_other_content
from m5.config import RunConfig
from m5.data.sequences import BatchBuilder
from m5.model.m5 import M5, Scores
from m5.schema import DataError, PreparedDataset

# Per forward pass. On a CPU what its caches hold: at history 100, 64 sequences take a quarter less time each than 256.
CPU_SEQUENCES, GPU_SEQUENCES = 64, 256


class Predictor:
    """The bare model with its dataset; a `Scorer` for `m5.evaluate`.

    Args:
        model: unsharded, with its weights.
        builder: makes its batches.
        config: of the run.
        device: where the model is.
    """

    def __init__(self, model: M5, builder: BatchBuilder, config: RunConfig, device: torch.device):
        self.model = model.eval()
        self.builder, self.config, self.device = builder, config, device
        self.dataset, self.name = builder.dataset, config.name

    @classmethod
    def load(cls, run: Path, device: str | torch.device | None = None) -> Predictor:
        """The best-on-validation checkpoint of RUN.

        Raises:
            ConfigError: RUN is no run.
            DataError: it has no checkpoint, or was trained on another dataset or by another version of the model.
        """
        config = RunConfig.read(Path(run) / "config.yaml")
        dataset = PreparedDataset(config.data)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        weights = load_weights(Path(run), dataset.manifest)
        refuse_other_content(Path(run), dataset, config.model.content)
        model = build_model(dataset, config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise DataError(f"{run} was trained by another version of the model: train it again.") from error
        return cls(model.to(target), BatchBuilder(dataset, config), config, target)

    def update(self, state: dict[str, Tensor]) -> None:
        """Take new weights over and forget the keys made from the old ones."""
        self.model.load_state_dict(state)
        self.__dict__.pop("key_NQ", None)

    @cached_property
    @torch.inference_mode()
    def key_NQ(self) -> Tensor:
        """float32 [N, Q]: [E^ID ; E^CG] of every title, cold ones through the row of titles without ID embedding."""
        return self.model(self.builder.catalogue().to(self.device)).key_CQ

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Scores:
        return self.model(batch.to(self.device))

    def batches(self, event_index: np.ndarray):
        """Batches of one request per target event, in order."""
        sequences = CPU_SEQUENCES if self.device.type == "cpu" else GPU_SEQUENCES
        for first in range(0, len(event_index), sequences):
            events = np.asarray(event_index[first : first + sequences], dtype=np.int64)
            yield self.builder.build(self.builder.windows_before(events), None)

    def score(self, event_index: np.ndarray) -> Tensor:
        """Scores of all titles at the requests that the target events answer.

        Args:
            event_index: int64 [B], places in `events/*.npy`; only earlier events of the same user are read, and the
                target's own time, scenario and context.

        Returns:
            float32 [B, N] inner products.
        """
        queries = [self.forward(batch).query_PQ for batch in self.batches(event_index)]
        return torch.cat(queries) @ self.key_NQ.T
