"""The benchmark of histories finds the attention of a step."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.history import Recorder


def test_attention_is_recorded_with_its_settings():
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    with Recorder() as recorder:
        attended = functional.scaled_dot_product_attention(2 * query, query, query, is_causal=True)
        torch.matmul(attended, attended.transpose(-1, -2))
    ((arguments, settings),) = recorder.calls
    assert settings == {"is_causal": True}
    assert all(value.is_leaf and value.requires_grad for value in arguments)
    torch.testing.assert_close(functional.scaled_dot_product_attention(*arguments, **settings), attended)
