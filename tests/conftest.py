"""Shared test set-up: threads, where Triton runs, seeds, and the `gpu` and `slow` markers."""

import os

# Workers of pytest-xdist share the cores: with all of them for each worker, the suite takes many times as long. Set
# before torch and numba are imported, and for the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))

import torch

# Triton decides at decoration time whether a kernel is interpreted, so this must come before any kernel import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))  # torch may have been there before
    torch.set_num_threads(threads if torch.cuda.is_available() else min(2, threads))


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
