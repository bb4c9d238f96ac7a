"""Random schedules on a real cache: tables stay consistent, clocks agree, pages come and go with their rows."""

import random

import pytest
import torch

from rheo_offload import CacheError, offload
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import sparse_config

ROWS = 3


def drawn(seed):
    return torch.randint(3, 97, (ROWS, 1), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def step(model, cache, ids):
    positions = torch.tensor(cache.executor.cache.lengths, device=DEVICE)[:, None]
    with torch.no_grad():
        return model(ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def fresh(model, tokens=40):
    ids = torch.randint(3, 97, (ROWS, tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    cache = model.rheo.new_cache(max_length=300)
    model.rheo.prefill(cache, ids, mask)
    return cache


@pytest.mark.parametrize("seed", [1, 2])
def test_random_schedule_keeps_the_tables_consistent(seed):
    """Steps, drops, beam-like reorders and crops in random order; a full budget makes dense logits the truth."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(budget_blocks=20))
    cache, rng = fresh(model), random.Random(seed)
    kv = cache.executor.cache
    origin, tokens = (
        torch.arange(ROWS),
        drawn(0)[:, :0],
    )  # which prompt each row began with, what was fed since
    for number in range(40):
        action = rng.choice(["step", "step", "step", "drop", "reorder", "crop"])
        if action == "step":
            step(model, cache, drawn(number))
            tokens = torch.cat([tokens, drawn(number)], 1)
        elif action == "drop":
            kv.drop_blocks(rng.random())
        elif action == "reorder":
            source = [rng.randrange(ROWS) for _ in range(ROWS)]
            cache.reorder_rows(source)
            origin, tokens = origin[source], tokens[source]
        elif tokens.shape[1] > 3:
            cache.crop(-3)
            tokens = tokens[:, :-3]
        kv.check_integrity()
    logits = step(model, cache, drawn(999))
    kv.check_integrity()
    # the same tokens, step by step, in a new cache that had none of the rest
    twin = fresh(model)
    twin.reorder_rows(origin.tolist())
    for ids in tokens.split(1, dim=1):
        step(model, twin, ids)
    assert torch.allclose(step(model, twin, drawn(999)), logits, atol=1e-4)


def test_forks_share_closed_pages_and_copy_the_open_one():
    """Rows 1 and 2 become row 0: two closed pages are shared, each has its own open page, closing frees all."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    cache = fresh(model, tokens=40)
    kv = cache.executor.cache
    cache.reorder_rows([0, 0, 0])
    used = [pages[:3] for pages in kv.pages]
    assert used[0][:2] == used[1][:2] == used[2][:2]
    assert len({pages[2] for pages in used}) == ROWS
    assert [kv.store.refcount(p) for p in used[0]] == [3, 3, 1]
    a = step(model, cache, drawn(1)[:1].expand(ROWS, 1))
    assert torch.allclose(a, a[:1].expand_as(a), atol=1e-5)
    kv.check_integrity()
    store = kv.store
    cache.close()
    assert store.pages_in_use == 0


def test_crop_of_a_shared_page_copies_it_first():
    """Row 1 shares row 0's closed block; cropping reopens it, and writing to one must not touch the other."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(budget_blocks=20))
    cache = fresh(model, tokens=48)
    cache.reorder_rows([0, 0, 0])
    cache.crop(-5)
    kv = cache.executor.cache
    assert len({pages[2] for pages in kv.pages}) == ROWS
    before = step(model, cache, drawn(3)[:1].expand(ROWS, 1))
    assert torch.allclose(before, before[:1].expand_as(before), atol=1e-5)
    kv.check_integrity()


@pytest.mark.parametrize("tokens", [-1, 1000])
def test_crop_beyond_the_row_is_refused(tokens):
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    cache = fresh(model)
    with pytest.raises(CacheError):
        cache.executor.cache.crop(tokens)
    cache.executor.cache.check_integrity()


def test_crop_beyond_a_sliding_window_is_refused():
    model = offload(tiny_model("gemma3", device=DEVICE), sparse_config())
    cache = fresh(model, tokens=200)
    with pytest.raises(CacheError, match="window"):
        cache.crop(-60)
    cache.executor.cache.check_integrity()
