"""Several turns, forks, crops and odd batches on one cache: each scenario once went wrong without a word."""

import pytest
import torch

from rheo_offload import CacheError, DeviceMemoryError, offload, restore
from rheo_offload.config import resolve_auto
from rheo_offload.model import offload as offload_module
from rheo_offload.model.prefill import prefill_rows
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config


@pytest.fixture
def llama():
    return tiny_model("llama", device=DEVICE)


def poison_free_slots(cache):
    """Whatever no block owns holds NaN, so that reading it shows."""
    for layer in cache.executor.cache.full.values():
        layer.pool_blocks[layer.block_in == -1] = torch.nan


def test_a_second_turn_that_outgrows_the_tables(llama):
    """Turn 1 ends inside a block. Turn 2 grows the tables, which drops the pool; the open block's first tokens are
    in the host store only, and must not be taken for resident."""
    first, more = prompt(90), prompt(100, seed=9)
    offload(llama, sparse_config(budget_blocks=24))
    cache = llama.rheo.new_cache(max_length=114)
    turn = torch.cat([greedy(llama, first, past_key_values=cache), more], 1)
    blocks = cache.executor.cache.max_blocks
    grow = cache.executor.cache.grow

    def grow_poisoned(*args):
        grow(*args)
        poison_free_slots(cache)

    cache.executor.cache.grow = grow_poisoned
    again = greedy(llama, turn, past_key_values=cache)
    assert cache.executor.cache.max_blocks > blocks
    cache.executor.cache.check_integrity()
    restore(llama)
    assert torch.equal(again, greedy(llama, turn))


def test_a_turn_after_a_reorder(llama):
    """Row 1 becomes row 0 with an open block that is nowhere resident for it; the next turn is a chunk."""
    ids, more = prompt(90, rows=2), prompt(30, rows=2, seed=5)
    offload(llama, sparse_config(budget_blocks=24))
    cache = llama.rheo.new_cache(max_length=200)
    llama.rheo.prefill(cache, ids)
    cache.reorder_rows([0, 0])
    poison_free_slots(cache)
    turn = torch.cat([ids[[0, 0]], more], 1)
    got = greedy(llama, turn, past_key_values=cache)
    restore(llama)
    assert torch.equal(got, greedy(llama, turn))


def test_a_decode_tail_longer_than_a_row(llama):
    """Eight tail tokens, a row of three: padding must never be fed as tokens."""
    ids, mask = batch((40, 3))
    expected = greedy(llama, ids, attention_mask=mask)
    offload(llama, sparse_config(budget_blocks=16))
    assert torch.equal(greedy(llama, ids, attention_mask=mask, decode_tail_tokens=8), expected)


def test_growth_counts_what_it_gives_back(llama, monkeypatch):
    """The device is full with the old pool: growing is possible all the same, because that pool goes first."""
    offload(llama, sparse_config(cache={"device_memory": "auto"}))
    config = resolve_auto(llama.rheo.config, context_len_tokens=600, device_type="cuda")
    monkeypatch.setattr(offload_module, "device_free_bytes", lambda device: 0)
    args = (config, 1, 40, 6, 1, torch.float32, torch.device("cpu"))
    with pytest.raises(DeviceMemoryError):
        llama.rheo._capacity(*args, 0)
    assert llama.rheo._capacity(*args, 2 << 30) == 40


def test_a_crop_over_several_shared_blocks(llama):
    """Two rows share ten pages; both go back 100 tokens and then say different things."""
    ids = prompt(160)
    offload(llama, sparse_config(budget_blocks=24))
    cache = llama.rheo.new_cache(max_length=300)
    llama.rheo.prefill(cache, ids.repeat(2, 1))
    cache.reorder_rows([0, 0])
    cache.crop(-100)
    kv = cache.executor.cache
    kv.check_integrity()
    assert [kv.store.refcount(p) for p in kv.pages[0][:3]] == [2, 2, 2]
    assert not set(kv.pages[0][3:]) & set(kv.pages[1][3:]), "pages behind the new end are each row's own"
    turn = torch.cat([ids[:, :60].repeat(2, 1), prompt(60, rows=2, seed=8)], 1)
    got = greedy(llama, turn, past_key_values=cache)
    restore(llama)
    assert torch.equal(got, greedy(llama, turn))


def test_crops_add_up_against_a_window():
    """The ring holds 48 tokens for a window of 24: going back 20 twice is 40 and more than it kept."""
    model = offload(tiny_model("gemma3", device=DEVICE), sparse_config())
    cache = model.rheo.new_cache(max_length=300)
    model.rheo.prefill(cache, prompt(200))
    cache.crop(-20)
    with pytest.raises(CacheError, match="40 tokens"):
        cache.crop(-20)
    cache.executor.cache.check_integrity()


def test_pages_for_every_sequence_are_held_before_the_first_token(llama):
    offload(llama, sparse_config())
    cache = llama.rheo.new_cache(max_length=300)
    ids = prompt(100).repeat(4, 1)
    prefill_rows(llama, cache, ids, None, chunk_tokens=48, repeats=4)
    assert [len(pages) for pages in cache.executor.cache.pages] == [-(-300 // BLOCK)] * 4


def test_a_cache_of_unknown_length_is_sized_by_its_first_prompt(llama):
    offload(llama, sparse_config())
    cache = llama.rheo.new_cache()
    llama.rheo.prefill(cache, prompt(500))
    assert cache.executor.cache.max_blocks == -(-(500 + 1024) // BLOCK)


def test_beams_are_not_counted_as_tokens(llama):
    offload(llama, sparse_config())
    greedy(llama, prompt(50), new=10, num_beams=3)
    assert llama.rheo.stats().new_tokens == 10


def test_padding_after_the_end_is_not_counted(llama):
    """A row that ends early is padded by the loop; those are no tokens."""
    ids = prompt(50, rows=2)
    offload(llama, sparse_config(budget_blocks=16))
    free = greedy(llama, ids, new=10)
    stop = int(free[0, 53])
    made = greedy(llama, ids, new=10, eos_token_id=stop)[:, 50:]
    assert llama.rheo.stats().new_tokens == int((made != 0).sum()) < 20


def test_figures_belong_to_their_cache(llama):
    offload(llama, sparse_config())
    first = llama.rheo.new_cache(max_length=100)
    greedy(llama, prompt(50), new=10, past_key_values=first)
    greedy(llama, prompt(30), new=4)
    assert llama.rheo.stats(first).new_tokens == 10 and llama.rheo.stats().new_tokens == 4
    assert (
        llama.rheo.stats(first).d2h_bytes == 59 * 2 * 2 * 2 * 16 * 4
    )  # tokens x layers x (K, V) x heads x D x 4


def test_a_mask_of_another_length_is_refused_in_decode(llama):
    offload(llama, sparse_config())
    cache = llama.rheo.new_cache(max_length=100)
    ids = prompt(50)
    llama.rheo.prefill(cache, ids)
    with torch.no_grad(), pytest.raises(CacheError, match=r"\[1, 51\], not \[1, 40\]"):
        llama(ids[:, -1:], past_key_values=cache, attention_mask=torch.ones(1, 40, device=DEVICE))


def test_no_new_tokens_for_several_sequences(llama):
    offload(llama, sparse_config())
    ids = prompt(50)
    out = llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=0, num_return_sequences=3, do_sample=True
    )
    assert torch.equal(out, ids.repeat(3, 1))


def test_no_page_is_held_whose_summary_has_no_place(llama, monkeypatch):
    """Another cache holds the low pages; the device has no memory for the summaries of the high ones."""
    offload(llama, sparse_config())
    small = llama.rheo.new_cache(max_length=64)
    llama.rheo.prefill(small, prompt(20))
    large = llama.rheo.new_cache(max_length=400)
    llama.rheo.prefill(large, prompt(300))
    kv = small.executor.cache
    kv.release_row(0)
    filler = kv.store.allocate(4)
    in_use, version = kv.store.pages_in_use, kv.version

    def full(max_pages):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as short:
        short.setattr(kv.full[1], "cover_pages", full)
        with pytest.raises(torch.OutOfMemoryError):
            kv.reserve([60])
    assert kv.pages[0] == [] and kv.store.pages_in_use == in_use
    assert kv.version > version, "the summaries of the first layer have moved all the same"
    kv.reserve([60])
    assert all(layer.summary.shape[0] > max(kv.pages[0]) for layer in kv.full.values())
    kv.store.release(filler)
