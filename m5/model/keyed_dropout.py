"""Dropout whose mask is a function of a key, not of a random state.

Every sequence of a batch has a key, drawn from (seed, epoch, batch); a position's key follows from its sequence's. So
one rank or eight, a run that was resumed, and a pipeline that looks ahead all drop the same elements, and there is no
random state to keep. On a CPU it is also faster than drawing from a generator, which can use one thread only.

    h_i  = mix(key_x XOR column_i)           a 32-bit integer hash, one for four neighbouring columns
    y_xd = x_xd * [byte d mod 4 of h >= t] / (1 - t / 256),   t = round(256 p)

The hash is the xor-shift-multiply finaliser of MurmurHash3's kind; our decision. Dimension legend in `m5.batch`; X any
leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GOLDEN = 0x9E3779B9 - 2**32  # 2^32 / golden ratio as int32: consecutive positions get far-apart keys
MULTIPLIERS = (0x2C1B3C6D, 0x297A2D39)


def mix(value: Tensor) -> Tensor:
    """int32 -> int32, every bit of the result depending on every bit of the value; arithmetic wraps around."""
    value = value ^ ((value >> 16) & 0xFFFF)
    for multiplier in MULTIPLIERS:
        value = value * multiplier
        value = value ^ ((value >> 15) & 0x1FFFF)
    return value


def position_keys(draw_B: Tensor, length: int) -> Tensor:
    """int32 [B] keys of the sequences -> int32 [B, L] keys of their positions."""
    position_L = torch.arange(length, dtype=torch.int32, device=draw_B.device)
    return mix(draw_B.unsqueeze(-1) + position_L * GOLDEN)


class KeyedDropout(nn.Module):
    """Zeroes elements in training and scales the rest up; the identity in evaluation.

    Args:
        p: probability in 0 <= p < 1; rounded to 256ths, at least one of them when it is not 0.
        width: of the last dimension.
    """

    column: Tensor

    def __init__(self, p: float, width: int):
        super().__init__()
        self.threshold = min(255, max(1, round(256 * p))) if p else 0
        self.width = width
        self.register_buffer("column", torch.empty(0, dtype=torch.int32), persistent=False)
        self.salt(0)

    def salt(self, salt: int) -> None:
        """Tell this module's masks from those of others that get the same keys."""
        number = torch.arange(-(-self.width // 4), dtype=torch.int64, device=self.column.device)
        self.column = mix((number * 0x9E3779B1 + salt * 0x85EBCA6B).to(torch.int32))

    def forward(self, x_XD: Tensor, key_X: Tensor | None) -> Tensor:
        """[..., D] and int32 [...] -> [..., D]; the key may be None in evaluation or where p is 0."""
        if not self.training or not self.threshold:
            return x_XD
        assert key_X is not None, "dropout in training needs the keys of the batch"
        byte_XD = mix(key_X.unsqueeze(-1) ^ self.column).view(torch.int8)[..., : self.width]
        return (x_XD * (byte_XD >= self.threshold - 128)).mul_(256 / (256 - self.threshold))
