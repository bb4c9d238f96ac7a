"""Nobody reads a loaded block before it is there: slots poisoned until their load changes nothing."""

import pytest
import torch

from rheo_offload import offload
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import greedy, prompt, sparse_config


def poisoned(cache, *, copy=True):
    """Poison what is about to be loaded, and its parts, ahead of every `attend_fetch`; the list grows by its slots."""
    ops, loads = cache.executor.ops, []
    real = ops.attend_fetch

    def attend_fetch(q, k_pool, v_pool, ids, hits, late, lens, src, dst, at, count, host, pool, *rest, **kw):
        slots = dst[: int(count)].long()
        pool[slots] = float("nan")
        loads.extend(slots.tolist())
        _, splits, parts, lses = rest
        parts[splits:], lses[splits:] = float("nan"), 0.0
        count = count if copy else torch.zeros_like(count)
        real(q, k_pool, v_pool, ids, hits, late, lens, src, dst, at, count, host, pool, *rest, **kw)

    ops.attend_fetch = attend_fetch
    return loads


@pytest.mark.parametrize("method", ["mean_key", "quest"])
def test_a_late_load_changes_nothing(method):
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(method, execution={"graph": "off"}))
    ids = prompt(300)
    expected = greedy(model, ids)
    cache = model.rheo.new_cache(max_length=400)
    model.rheo.prefill(cache, ids[:, :-1])
    loads = poisoned(cache)
    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)
    assert loads


def test_without_the_load_the_test_would_fail():
    """The poison is able to show: skipping the copy leaves NaN in the result."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(execution={"graph": "off"}))
    ids = prompt(300)
    cache = model.rheo.new_cache(max_length=400)
    model.rheo.prefill(cache, ids[:, :-1])
    poisoned(cache, copy=False)
    cache.executor.cache.drop_blocks()
    with torch.no_grad():
        logits = model(
            ids[:, -1:], position_ids=torch.tensor([[299]], device=DEVICE), past_key_values=cache
        ).logits
    assert torch.isnan(logits).any()
