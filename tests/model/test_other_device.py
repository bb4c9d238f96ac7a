"""A model on a GPU that is not the current one: Triton and graph captures would look at the current one."""

from contextlib import contextmanager

import pytest
import torch

from rheo_offload import Engine, offload, restore
from rheo_offload.ops import kernels_for
from tests.engine.test_engine import TIGHT, ids_of, params
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import greedy, prompt, sparse_config


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_ops_run_with_their_device_as_the_current_one(monkeypatch, current, entered):
    seen = []

    @contextmanager
    def device(which):
        seen.append(which.index)
        yield

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    out = torch.empty(1, 2)
    kernels_for(torch.device("cuda", 1), "reference").gated_act(torch.ones(1, 4), out, act="silu")
    assert seen == entered and torch.allclose(out, torch.nn.functional.silu(torch.ones(1, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_gives_the_stock_models_tokens():
    """A model on the current GPU is captured first: torch makes its stream for captures there, once."""
    assert torch.cuda.current_device() == 0
    sparse = []
    for device in ("cuda:0", "cuda:1"):
        model = tiny_model("llama", device=device)
        ids = prompt(150).to(device)
        expected = greedy(model, ids)[0, 150:].tolist()
        offload(model, sparse_config(budget_blocks=16, audit={"every": 0}))
        assert greedy(model, ids)[0, 150:].tolist() == expected
        with Engine(model, max_rows=2, max_context_tokens=256) as engine:
            assert engine.generate([ids_of(150), ids_of(90, seed=4)], params(24))[0] == expected
            assert engine.stepper.runner.captured
        offload(restore(model), sparse_config(**TIGHT))
        sparse.append(greedy(model, ids)[0, 150:].tolist())
        assert model.rheo.stats().miss_blocks > 0, "blocks came over the link"
    assert sparse[0] == sparse[1] and torch.cuda.current_device() == 0
