"""Shared test set-up: where Triton runs, seeds, and the `gpu` and `slow` markers."""

import os

import torch

# Triton decides at decoration time whether a kernel is interpreted, so this must come before any kernel import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    torch.set_num_threads(
        min(2, os.cpu_count() or 1) if not torch.cuda.is_available() else torch.get_num_threads()
    )


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)
