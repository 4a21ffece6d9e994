"""The suite's own pace."""

import os

import pytest
import torch


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="tests run one after another here"
)
def test_workers_side_by_side_have_one_thread_each():
    """Two each, on two cores, made the suite ten times slower."""
    assert torch.get_num_threads() == 1
