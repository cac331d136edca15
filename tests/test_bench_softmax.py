"""The losses that the benchmark of the softmax measures are those that it names."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.softmax import Case, loss_of, operands


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_softmax_measured_is_the_softmax_over_its_candidates(kind):
    case = Case(kind, "float32", titles=40, requests=12, width=8, negatives=15)
    given = operands(case, torch.device("cpu"))
    logits_PC = given.query_PQ @ given.key_CQ.T
    # A target that is no negative is a candidate of its own request alone.
    column_C = torch.arange(len(given.key_CQ))
    foreign_PC = (column_C >= len(given.negative_C)) & (column_C != given.target_P.unsqueeze(-1))
    expected = functional.cross_entropy(logits_PC.masked_fill(foreign_PC, -torch.inf), given.target_P, reduction="sum")
    torch.testing.assert_close(loss_of(case, given)(), expected)
    assert foreign_PC.any() == (kind == "sampled")
    if kind == "full":
        torch.testing.assert_close(loss_of(case._replace(kind="cross_entropy"), given)(), expected)
