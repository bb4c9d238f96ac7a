"""The promises of the runtime on tiny fp32 models, through `generate`."""

import pytest
import torch

from rheo_offload import CacheError, NonFiniteError, RheoConfig, RheoError, offload, restore
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch, drop_before_every_step

BLOCK = 16
METHODS = ("mean_key", "infllm_v2", "nsa_select", "quest", "moba", "arkvale", "lserve", "streaming", "full")


def sparse_config(method="mean_key", budget_blocks=6, **groups):
    values = {
        "cache": {"block_size": BLOCK, "host_memory": "64MiB", "device_memory": "floor"},
        "selection": {
            "method": method,
            "token_budget": budget_blocks * BLOCK,
            "recent_blocks": 2 if method != "streaming" else budget_blocks - 1,
        },
        "prefill": {"chunk_tokens": 48},
        "audit": {"every": 4},
    }
    for group, keys in groups.items():
        values[group] = values.get(group, {}) | keys
    return RheoConfig.from_dict(values)


def prompt(tokens=300, rows=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, tokens), generator=generator).to(DEVICE)


def greedy(model, ids, new=24, **kwargs):
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


@pytest.fixture
def llama():
    return tiny_model("llama", device=DEVICE)


@pytest.mark.parametrize("method", METHODS)
def test_eviction_changes_speed_only(llama, method):
    """Far more context than budget: the tokens do not depend on what happened to be resident."""
    ids = prompt()
    offload(llama, sparse_config(method))
    calm = greedy(llama, ids)
    stats = llama.rheo.stats()
    hook = drop_before_every_step(llama)
    assert torch.equal(greedy(llama, ids), calm)
    hook.remove()
    dropped = llama.rheo.stats()
    if method == "full":
        assert stats.streamed_h2d_bytes > 0, "the history does not fit the pool"
        return
    assert dropped.miss_blocks > stats.miss_blocks
    if method != "streaming":
        assert stats.evicted_blocks > 0 and stats.miss_blocks > 0, "blocks were evicted and loaded again"
        assert 0 < stats.captured_mass_min <= stats.captured_mass_mean < 1
    block_bytes = 2 * BLOCK * 16 * 4
    for s in (stats, dropped):
        assert s.h2d_bytes == s.miss_blocks * block_bytes
        assert s.selected_blocks >= s.miss_blocks


def test_full_method_equals_stock_beyond_the_pool(llama):
    ids = prompt()
    expected = greedy(llama, ids)
    offload(llama, sparse_config("full"))
    assert torch.equal(greedy(llama, ids), expected)


def test_dense_layers_keep_everything(llama):
    """With every layer dense, a small budget changes nothing."""
    ids = prompt()
    expected = greedy(llama, ids)
    offload(llama, sparse_config(selection={"dense_layers": [0, 1]}))
    assert torch.equal(greedy(llama, ids), expected)


def test_ragged_sparse_batch_equals_each_alone(llama):
    ids, mask = batch((260, 90, 7))
    offload(llama, sparse_config())
    together = greedy(llama, ids, attention_mask=mask)[:, ids.shape[1] :]
    for row, n in enumerate((260, 90, 7)):
        alone = greedy(llama, ids[row : row + 1, -n:])[:, n:]
        assert torch.equal(alone[0], together[row]), f"row {row}"


def test_chunk_size_does_not_matter(llama):
    """Heat starts from the last chunk's queries, so it is left out; everything else is exact."""
    ids = prompt(200)
    no_heat = {"query_agnostic_share": 0.0}
    offload(llama, sparse_config(selection=no_heat))
    expected = greedy(llama, ids)
    restore(llama)
    offload(llama, sparse_config(selection=no_heat, prefill={"chunk_tokens": 7}))
    assert torch.equal(greedy(llama, ids), expected)


def test_decode_tail_goes_through_the_decode_path(llama):
    ids = prompt(120)
    expected = greedy(llama, ids)
    offload(llama, sparse_config(budget_blocks=16))
    assert torch.equal(greedy(llama, ids, decode_tail_tokens=20), expected)
    assert llama.rheo.stats().decode_steps == 20 + 23


# Where sampled steps can be replayed (on a GPU) they draw numbers of their own; elsewhere transformers' loop draws.
STOCK_DRAWS = {} if DEVICE == "cpu" else {"execution": {"graph": "off"}}


def test_sampling_equals_stock_with_the_same_seed(llama):
    ids = prompt(60)
    options = dict(max_new_tokens=16, do_sample=True, temperature=0.8, top_p=0.9, top_k=20)
    torch.manual_seed(7)
    expected = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
    offload(llama, sparse_config(budget_blocks=16, **STOCK_DRAWS))
    torch.manual_seed(7)
    assert torch.equal(llama.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)


def test_num_return_sequences_share_the_prompt(llama):
    ids, mask = batch((70, 33))
    options = dict(max_new_tokens=12, do_sample=True, num_return_sequences=3, attention_mask=mask)
    torch.manual_seed(7)
    expected = llama.generate(ids, **options)
    offload(llama, sparse_config(budget_blocks=16, **STOCK_DRAWS))
    torch.manual_seed(7)
    assert torch.equal(llama.generate(ids, **options), expected)


def test_sampled_tokens_are_among_those_the_stock_model_may_draw(llama):
    """Two prompts, three draws each: they follow the seed, differ from row to row, and respect the top-k."""
    ids, mask = batch((70, 33))
    options = dict(max_new_tokens=12, do_sample=True, num_return_sequences=3, temperature=0.8, top_k=4)
    offload(llama, sparse_config(budget_blocks=16))
    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        drawn.append(llama.generate(ids, attention_mask=mask, **options))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len({tuple(row) for row in drawn[0].tolist()}) == 6
    restore(llama)
    mask = torch.cat([mask.repeat_interleave(3, 0), torch.ones_like(drawn[0][:, 70:])], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = llama(drawn[0], attention_mask=mask, position_ids=positions).logits[:, 69:-1]
    chosen = logits.gather(2, drawn[0][:, 70:, None])
    rank = (logits > chosen + 1e-4).sum(2)  # how many tokens are likelier
    assert int(rank.max()) < 4
    assert len(rank.unique()) > 2, "and not always the likeliest"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beam_search_equals_stock(family):
    model = tiny_model(family, device=DEVICE)
    ids, mask = batch((70, 33))
    options = dict(max_new_tokens=20, num_beams=3, do_sample=False, attention_mask=mask)
    expected = model.generate(ids, **options)
    offload(model, sparse_config(budget_blocks=16))
    assert torch.equal(model.generate(ids, **options), expected)


def test_multi_turn_on_one_cache(llama):
    first, more = prompt(90), prompt(30, seed=9)
    offload(llama, sparse_config(budget_blocks=16))
    cache = llama.rheo.new_cache()
    answer = greedy(llama, first, past_key_values=cache)
    turn = torch.cat([answer, more], 1)
    again = greedy(llama, turn, past_key_values=cache)
    restore(llama)
    assert torch.equal(again, greedy(llama, turn))


def test_prompt_lookup_decoding_crops(llama):
    """Assisted decoding verifies several tokens at once and crops what was refused."""
    ids = prompt(20).repeat(1, 5)
    expected = greedy(llama, ids)
    offload(llama, sparse_config(budget_blocks=16))
    assert torch.equal(greedy(llama, ids, prompt_lookup_num_tokens=4), expected)


@pytest.mark.parametrize("tokens", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1])
def test_short_prompts(llama, tokens):
    ids = prompt(tokens)
    expected = greedy(llama, ids)
    offload(llama, sparse_config())
    assert torch.equal(greedy(llama, ids), expected)


def test_zero_new_tokens_only_reads(llama):
    ids = prompt(40)
    offload(llama, sparse_config())
    assert torch.equal(greedy(llama, ids, new=0), ids)


def test_cache_of_unknown_length_grows(llama):
    """Tables made for a short row are replaced when it outgrows them, and nothing is lost."""
    ids = prompt(1500 // 3)
    expected = greedy(llama, ids, new=8)
    offload(llama, sparse_config(budget_blocks=64))
    cache = llama.rheo.new_cache(max_length=32)
    assert torch.equal(greedy(llama, ids, new=8, past_key_values=cache), expected)
    assert cache.executor.cache.max_blocks >= 500 // BLOCK


def test_nothing_leaks_between_requests(llama):
    """Dirty pools and reused pages: a run after another request equals the same run on a fresh model."""
    ids = prompt(200)
    offload(llama, sparse_config())
    expected = greedy(llama, ids)
    for seed in (11, 12):
        greedy(llama, prompt(260, rows=2, seed=seed))
    assert torch.equal(greedy(llama, ids), expected)


def test_pages_return_when_a_cache_dies(llama):
    offload(llama, sparse_config())
    greedy(llama, prompt(200))
    store = llama.rheo._store
    assert store.pages_in_use > 0
    llama.rheo.stats()
    llama.rheo._last = None
    assert store.pages_in_use == 0


def test_restore_gives_everything_back(llama):
    ids = prompt(50)
    expected = greedy(llama, ids)
    before = llama.config._attn_implementation
    offload(llama, sparse_config())
    greedy(llama, ids)
    restore(llama)
    restore(llama)
    assert llama.config._attn_implementation == before and not hasattr(llama, "rheo")
    assert torch.equal(greedy(llama, ids), expected)


def test_forward_without_a_cache_is_exact(llama):
    ids, mask = batch((40, 25))
    with torch.no_grad():
        truth = llama(ids, attention_mask=mask, use_cache=False).logits
        offload(llama, sparse_config())
        got = llama(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(got[mask.bool()], truth[mask.bool()], atol=1e-4)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_foreign_caches_are_refused(llama):
    from transformers import DynamicCache

    offload(llama, sparse_config())
    with pytest.raises(CacheError, match="DynamicCache"):
        greedy(llama, prompt(20), past_key_values=DynamicCache())
    other = tiny_model("llama", seed=1, device=DEVICE)
    offload(other, sparse_config())
    with pytest.raises(CacheError, match="another model"):
        greedy(llama, prompt(20), past_key_values=other.rheo.new_cache())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(cache_implementation="static"), "cache_implementation"),
        (dict(prefill_chunk_size=16), "prefill.chunk_tokens"),
    ],
)
def test_options_that_cannot_work_are_refused(llama, bad, message):
    offload(llama, sparse_config())
    with pytest.raises(RheoError, match=message):
        greedy(llama, prompt(20), **bad)


def test_right_padding_is_refused(llama):
    ids, mask = batch((40, 25))
    offload(llama, sparse_config())
    with pytest.raises(CacheError, match="left padding"):
        greedy(llama, ids.flip(1), attention_mask=mask.flip(1))


def test_too_long_for_the_model(llama):
    offload(llama, sparse_config())
    with pytest.raises(RheoError, match="12 more than the 512"):
        greedy(llama, prompt(500))
    greedy(llama, prompt(500), new=14, allow_longer=True)


def test_host_memory_is_refused_before_the_first_token(llama):
    offload(llama, sparse_config(cache={"host_memory": "64KiB"}))
    with pytest.raises(RheoError, match="host"):
        greedy(llama, prompt(300))
    assert llama.rheo._store.pages_in_use == 0
    greedy(llama, prompt(20), new=2)


def test_non_finite_logits_name_the_step(llama):
    offload(llama, sparse_config())
    calls = torch.zeros((), dtype=torch.int64, device=DEVICE)  # counted by replayed steps too

    def spoil(module, args, output):
        calls.add_(1)
        return torch.where(calls > 12, torch.nan, output)

    # the prompt is one call
    with llama.lm_head.register_forward_hook(spoil), pytest.raises(NonFiniteError, match="new token 12;"):
        greedy(llama, prompt(20))


def test_a_forward_that_died_poisons_its_cache(llama):
    """A cache whose layers disagree is refused, not used."""
    offload(llama, sparse_config())
    cache = llama.rheo.new_cache()
    greedy(llama, prompt(40), new=2, past_key_values=cache)

    def die(module, args):
        raise RuntimeError("interrupted")

    handle = llama.model.layers[1].register_forward_pre_hook(die)
    token = prompt(1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="interrupted"):
        llama(token, past_key_values=cache)
    handle.remove()
    with torch.no_grad(), pytest.raises(CacheError, match="new cache"):
        llama(token, past_key_values=cache)
