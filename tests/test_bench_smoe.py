"""What the benchmark of the mixture varies, and the arguments that it keeps."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from benchmarks.options import checked, positive
from benchmarks.smoe import made_scenarios
from benchmarks.workload import detached
from m5.config import ConfigError
from m5.model.multi_modal_embedding import Situations


def test_only_the_scenarios_differ_and_viewers_have_one_of_each():
    few, many = (made_scenarios(values, users=20, length=10, titles=50) for values in (2, 300))
    assert [vocabulary.size for vocabulary in many.manifest.scenarios] == [301, 301]
    assert few.manifest.contexts == many.manifest.contexts
    for name in few.arrays:
        assert np.array_equal(few.arrays[name], many.arrays[name]) != name.startswith("scenario_")
    region = many.arrays["scenario_region"].reshape(20, 10)
    assert (region == region[:, :1]).all()
    assert len(np.unique(region)) > 10


def test_detached_arguments_are_leaves_with_the_same_values():
    whole = torch.randn(3, 2, requires_grad=True)
    given = (Situations(2 * whole, whole.detach(), torch.arange(3)), [None, 4])
    (found, rest) = detached(given)
    assert isinstance(found, Situations) and rest == [None, 4]
    assert found.feature_JFD.is_leaf and found.feature_JFD.requires_grad and not found.scenario_JMD.requires_grad
    assert torch.equal(found.feature_JFD, 2 * whole)


def test_wrong_options_are_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="'0' is no whole number from 1"):
        positive("0")
    with pytest.raises(ConfigError, match=r"model\.mixing is what this benchmark varies"):
        checked(["model.width=8", "model.mixing=mlp"], ("model.mixing",))
    assert checked(["model.width=8"], ("model.mixing",)) == ["model.width=8"]
