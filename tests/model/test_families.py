"""Every supported family against the stock model: greedy tokens at full budget are equal, in fp32.

Each is run twice: everything resident, and with every unpinned block dropped before each step.
"""

import pytest
import torch

from rheo_offload import RheoConfig, offload, restore
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import FAMILIES, tiny_model

NEW = 16
LENGTHS = (75, 41, 12)  # ragged: crosses blocks and windows, one prompt shorter than a block


def config(**selection):
    return RheoConfig.from_dict(
        {
            "cache": {"block_size": 16, "host_memory": "64MiB"},
            "selection": {"token_budget": 256, "recent_blocks": 2} | selection,
            "prefill": {"chunk_tokens": 32},
            "audit": {"every": 4},
        }
    )


def batch(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(3, 97, (n,), generator=generator)
        mask[row, -n:] = 1
    return ids.to(DEVICE), mask.to(DEVICE)


def greedy(model, ids, mask, **kwargs):
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **kwargs)[
        :, ids.shape[1] :
    ]


def stock_tokens(model, ids, mask):
    return greedy(model, ids, mask)


def drop_before_every_step(model):
    """Make every forward begin by dropping what is neither sink nor tail."""

    def before(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and not cache.is_empty and kwargs["input_ids"].shape[1] == 1:
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                cache.executor.cache.check_integrity()  # which reads the device
            cache.executor.cache.drop_blocks()

    return model.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_stock(family):
    model = tiny_model(family, device=DEVICE)
    ids, mask = batch()
    expected = stock_tokens(model, ids, mask)
    offload(model, config())
    assert torch.equal(greedy(model, ids, mask), expected), "everything resident"
    for row, n in enumerate(LENGTHS):
        alone = greedy(model, ids[row : row + 1, -n:], mask[row : row + 1, -n:])
        assert torch.equal(alone, expected[row : row + 1]), f"row {row} alone"
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids, mask), expected), "dropped before each step"
    hook.remove()
    if family != "mistral-sliding":
        stats = model.rheo.stats()
        assert stats.miss_blocks > 0 and stats.h2d_bytes > 0
        assert stats.captured_mass_mean == pytest.approx(1.0, abs=1e-5)
    restore(model)
    assert torch.equal(stock_tokens(model, ids, mask), expected), "after restore"


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_of_padded_batch_equals_stock(family):
    """A plain padded forward and hand-fed steps on one cache, without `generate`: logits equal to eager's."""
    model = tiny_model(family, device=DEVICE)
    ids, mask = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    steps = torch.randint(3, 97, (len(LENGTHS), 4), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    every = torch.cat([ids, steps], 1)
    every_mask = torch.cat([mask, torch.ones_like(steps)], 1)
    with torch.no_grad():
        truth = model(
            input_ids=every, attention_mask=every_mask, position_ids=(every_mask.cumsum(1) - 1).clamp(min=0)
        ).logits
        offload(model, config())
        cache = model.rheo.new_cache()
        got = [
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        ]
        for i in range(steps.shape[1]):
            n = ids.shape[1] + i + 1
            got.append(
                model(
                    input_ids=steps[:, i : i + 1],
                    attention_mask=every_mask[:, :n],
                    position_ids=(every_mask[:, :n].cumsum(1) - 1)[:, -1:],
                    past_key_values=cache,
                ).logits
            )
    real = every_mask.bool()
    assert torch.allclose(torch.cat(got, 1)[real], truth[real], atol=2e-4, rtol=1e-4)
    cache.executor.cache.check_integrity()
