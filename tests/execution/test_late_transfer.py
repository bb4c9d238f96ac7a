"""Nobody reads a loaded block before the step has waited for it: a gather done only at `wait` changes nothing."""

import pytest
import torch

from rheo_offload import offload
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import greedy, prompt, sparse_config


class LateGather:
    """Poisons the slots about to be filled and copies only when somebody waits."""

    def __init__(self, executor):
        self.executor, self.copy, self.loads = executor, None, 0

    def start(self, copy):
        for layer in self.executor.cache.full.values():
            ws = self.executor.workspace_of(layer)
            slots = ws.load_dst[: int(ws.load_count)].long()
            if self.copy is None and layer is self.layer_of(copy):
                layer.pool_blocks[slots] = float("nan")
                self.loads += len(slots)
        self.copy = copy

    @staticmethod
    def layer_of(copy):
        cells = dict(zip(copy.__code__.co_freevars, (c.cell_contents for c in copy.__closure__), strict=True))
        return cells["layer"]

    def wait(self):
        self.copy()
        self.copy = None


@pytest.mark.parametrize("method", ["mean_key", "quest"])
def test_a_late_gather_changes_nothing(method):
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(method))
    ids = prompt(300)
    expected = greedy(model, ids)
    cache = model.rheo.new_cache(max_length=400)
    model.rheo.prefill(cache, ids[:, :-1])
    late = LateGather(cache.executor)
    cache.executor.gather = late
    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)
    assert late.loads > 0


def test_without_the_wait_the_test_would_fail():
    """The fake is able to fail: skipping the copy leaves NaN in the result."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    ids = prompt(300)
    cache = model.rheo.new_cache(max_length=400)
    model.rheo.prefill(cache, ids[:, :-1])
    late = LateGather(cache.executor)
    late.wait = lambda: setattr(late, "copy", None)
    cache.executor.gather = late
    cache.executor.cache.drop_blocks()
    with torch.no_grad():
        logits = model(
            ids[:, -1:], position_ids=torch.tensor([[299]], device=DEVICE), past_key_values=cache
        ).logits
    assert torch.isnan(logits).any()
