"""What chance decides in a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Draws(NamedTuple):
    """What chance decides in a training batch: drawn for the batch of all ranks, then cut to this rank's part.

    Every rank draws the same numbers in the same order, so that a batch is the same however many ranks share it.

    Attributes:
        lost_N: bool, titles that lose their ID embedding.
        negative, log_q: this rank's slice of the negatives, ascending, and their log expected number of draws.
        forget_PM: bool, scenario values that the model does not see.
        masked_BL: bool, behaviours hidden for the masked-language-model loss.
        key_B: int32, dropout keys.
        ranks_P, ranks_Q: requests and masked behaviours of every rank.
        longest_slice: negatives of the rank that has most of them.
    """

    lost_N: np.ndarray
    negative: np.ndarray
    log_q: np.ndarray
    forget_PM: np.ndarray
    masked_BL: np.ndarray
    key_B: np.ndarray
    ranks_P: tuple[int, ...]
    ranks_Q: tuple[int, ...]
    longest_slice: int

    @classmethod
    def nothing(cls, sequences: int, scenario_shape: tuple[int, ...], n_titles: int, catalogue: bool) -> Draws:
        """For evaluation: all is seen and nothing dropped; the candidates are the whole catalogue, or none.

        Args:
            sequences: B.
            scenario_shape: (P, M).
        """
        negative = np.arange(n_titles if catalogue else 0)
        return cls(
            lost_N=np.zeros(n_titles, dtype=bool),
            negative=negative,
            log_q=np.zeros(len(negative)),
            forget_PM=np.zeros(scenario_shape, dtype=bool),
            masked_BL=np.zeros((1, 1), dtype=bool),
            key_B=np.zeros(sequences, dtype=np.int32),
            ranks_P=scenario_shape[:1],
            ranks_Q=(0,),
            longest_slice=len(negative),
        )
