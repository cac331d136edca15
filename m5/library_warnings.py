"""Warnings of torch and TorchRec that a user of the command line can do nothing about.

Each is about an internal call of those libraries, seen with torch 2.13 and torchrec 1.8 and harmless there: the
planner's topology and storage reservation (we name the sharding ourselves), ShardedTensor's announced end (TorchRec 1.8
returns nothing else), and a renamed tracing flag. Everything else stays visible.
"""

from __future__ import annotations

import logging
import warnings

LOGGERS = ("torchrec.distributed.planner", "torch.fx._symbolic_trace")
MESSAGES = (
    ".*deprecating ShardedTensor.*",
    ".*HeuristicalStorageReservation.*",
    ".*`broadcast_buffers` is deprecated.*",
)


def silence_known() -> None:
    """Called by the command line once, before a command runs."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
