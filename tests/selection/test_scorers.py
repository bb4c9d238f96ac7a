"""The block scorers against what their papers say, written out in plain fp64: the same scores, the same blocks."""

import pytest
import torch

from rheo_offload import offload
from rheo_offload.ops import kernels_for
from rheo_offload.selection.policy import make_policy, make_selector
from rheo_offload.types import AttentionCall
from tests.helpers.homes import DEVICE, poison
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerance import assert_close
from tests.test_end_to_end import greedy, prompt, sparse_config

# id: method, parameters
SCORERS = {
    "quest": ("quest", {}),
    "quest-pages": ("quest", {"page_size": 8}),
    "lserve": ("lserve", {"page_size": 4}),
    "lserve-16": ("lserve", {}),
    "moba": ("moba", {}),
    "moba-mean": ("moba", {"group_by": "mean"}),
    "arkvale": ("arkvale", {}),
    "arkvale-own-sets": ("arkvale", {"shared_by": "kv_head"}),
    "arkvale-max": ("arkvale", {"digest": "cuboid-max"}),
    "arkvale-centroid": ("arkvale", {"digest": "centroid"}),
}
HOMES = {"reference": "cpu", "numba": "cpu", "triton": DEVICE}
# home, KV heads, query heads of each, ties
SHAPES = [
    ("reference", 1, 4, False),
    ("reference", 2, 2, True),
    ("numba", 2, 2, False),
    ("numba", 1, 4, True),
    ("numba", 2, 1, True),
    ("triton", 2, 2, True),
]
C, SINK, RECENT, BUDGET = 32, 1, 2, 7
SCALE = (
    0.25  # a power of two: integer keys and queries have exact scores, so that ties are ties in every home
)


# ---- what the papers say -------------------------------------------------------------------------------------------


def bound(q, high, low) -> torch.Tensor:
    """Quest's: the largest q . k of any key between `low` and `high` [..., D]."""
    return torch.maximum(q * high, q * low).sum(-1)


def plain_values(method, params, q, blocks) -> torch.Tensor:
    """One query head's value of every block of keys [closed, C, D]."""
    if method in ("quest", "lserve"):
        pages = blocks.unflatten(1, (-1, params.get("page_size", 16 if method == "lserve" else C)))
        return bound(q, pages.amax(2), pages.amin(2)).amax(1)
    if method == "moba" or params.get("digest") == "centroid":
        return blocks.mean(1) @ q
    high, low = blocks.amax(1), blocks.amin(1)
    if params.get("digest", "cuboid-mean") == "cuboid-mean":
        centre = (high + low) / 2
        radius = (blocks - centre[:, None]).abs().mean(1)
        high, low = centre + radius, centre - radius
    return bound(q, high, low)


def plain_scores(method, params, q, keys) -> torch.Tensor:
    """Scores [Hkv, closed blocks] of a row: q [Hq, D], keys [Hkv, T, D], fp64."""
    closed = keys.shape[1] // C * C
    if not closed:
        return torch.zeros(len(keys), 0, dtype=torch.float64)
    values = [
        torch.stack([plain_values(method, params, head, k[:closed].unflatten(0, (-1, C))) for head in group])
        for k, group in zip(keys, q.unflatten(0, (len(keys), -1)), strict=True)
    ]
    each = torch.stack(values)  # [Hkv, G, closed]
    if method == "arkvale" and params.get("shared_by", "layer") == "layer":
        return each.mean((0, 1)).expand(len(keys), -1)
    by_mean = method == "arkvale" or params.get("group_by") == "mean"
    return each.mean(1) if by_mean else each.amax(1)


def plain_blocks(scores, num_tokens, query_blocks) -> list[int]:
    """Forced blocks and the best of the others, ties to the lower id; scores of one (row, head) by block."""
    blocks = -(-num_tokens // C)
    if blocks <= BUDGET:
        return list(range(blocks))
    forced = {*range(SINK), *range(blocks - RECENT, blocks)}
    rest = sorted(set(range(blocks)) - forced, key=lambda n: (-float(scores[n]), n))
    return sorted(forced | set(rest[:query_blocks]))


# ---- inputs --------------------------------------------------------------------------------------------------------


def draw(*shape, ties: bool, seed: int) -> torch.Tensor:
    """Normal numbers, or with `ties` integers of which a block and a later one are made equal by the caller."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


def keys_of(lengths, num_heads, dim, ties):
    """Keys [Hkv, T, D] of each row; with ties blocks 2, 5 and 8 of a row are the same."""
    rows = [draw(num_heads, n, dim, ties=ties, seed=10 + i) for i, n in enumerate(lengths)]
    for keys in rows if ties else ():
        for n in (5, 8):
            if keys.shape[1] >= (n + 1) * C:
                keys[:, n * C : (n + 1) * C] = keys[:, 2 * C : 3 * C]
    return rows


def stored(ops, selector, rows, device):
    """Summaries of rows [Hkv, T, D] by host page, made in chunks that end anywhere; everything else is NaN."""
    num_heads, _, dim = rows[0].shape
    num_blocks = max(-(-k.shape[1] // C) for k in rows) + 1
    pages = torch.randperm(len(rows) * num_blocks).view(len(rows), -1) + 1
    table = torch.full((len(rows), num_blocks), -1, dtype=torch.int32)
    host = torch.full((len(rows) * num_blocks + 1, num_heads, C, dim), torch.nan)
    summary = torch.full((len(host), num_heads, selector.summary_width(C), dim), torch.nan, device=device)
    for b, keys in enumerate(rows):
        for n, block in enumerate(keys.split(C, 1)):
            table[b, n] = pages[b, n]
            host[pages[b, n], :, : block.shape[1]] = block
    host = host.pin_memory() if device == "cuda" else host
    for b, keys in enumerate(rows):
        for first, end in ((0, 45), (45, 101), (101, keys.shape[1])):
            chunk = keys[None, :, first:end].to(device)
            if chunk.shape[2]:
                start = torch.tensor([first], dtype=torch.int32, device=device)
                ops.summarize_chunk(
                    chunk,
                    start,
                    table[b : b + 1].to(device),
                    host,
                    summary,
                    summary_kind=selector.summary_kind,
                )
    return summary, table.to(device)


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("home", "heads", "group", "ties"), SHAPES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_equals_the_plain_method(scorer, home, heads, group, ties):
    """Scores and selected blocks of ragged rows: many blocks with an open one, all of them full, one block, none."""
    method, params = SCORERS[scorer]
    device, dim = HOMES[home], 16
    ops, selector = kernels_for(torch.device(device), home), make_selector(method, params, block_size=C)
    rows = keys_of([13 * C + 5, 10 * C, C, 9], heads, dim, ties)
    q = draw(len(rows), heads * group, dim, ties=ties, seed=3)
    summary, table = stored(ops, selector, rows, device)
    lens = torch.tensor([k.shape[1] for k in rows], dtype=torch.int32, device=device)
    scores = poison(len(rows), heads, table.shape[1], dtype=torch.float32, device=device)
    selector.score(
        ops, q.to(device), summary, table, lens, None, None, scores, softmax_scale=SCALE, block_size=C
    )
    selected = poison(len(rows), heads, BUDGET, dtype=torch.int32, device=device)
    count = poison(len(rows), heads, dtype=torch.int32, device=device)
    query_blocks = BUDGET - SINK - RECENT
    ops.select(
        scores, None, lens, selected, count, block_size=C, sink_blocks=SINK, recent_blocks=RECENT,
        query_blocks=query_blocks, agnostic_blocks=0, heat_decay=1.0, normalise="none",
    )  # fmt: skip
    for b, keys in enumerate(rows):
        truth = SCALE * plain_scores(method, params, q[b].double(), keys.double())
        closed = truth.shape[1]
        assert_close(scores[b, :, :closed], truth, None, torch.float32)
        assert (scores[b, :, closed:] == -torch.inf).all(), "an open block has no score"
        for h in range(heads):
            got = [n for n in selected[b, h].tolist() if n >= 0]
            assert got == plain_blocks(truth[h], keys.shape[1], query_blocks), f"row {b}, head {h}"


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_step_selects_the_best_blocks(scorer, share):
    """A prompt in chunks, then decode steps across block borders: forced blocks and the best by the plain method."""
    method, params = SCORERS[scorer]
    config = sparse_config(
        method,
        cache={"block_size": C},
        selection={
            "token_budget": BUDGET * C,
            "recent_blocks": RECENT,
            "query_agnostic_share": share,
            "params": params,
        },
        audit={"every": 0},
    )
    model = offload(tiny_model("llama", device=DEVICE), config)
    lengths, steps = [13 * C - 2, 4 * C + 7], 4
    ex = model.rheo._make_executor(2, lengths[0] + steps, torch.float32, torch.device(DEVICE))
    rows = [list(keys_of(lengths, 2, 16, False)) for _ in range(2)]  # by layer
    for b, length in enumerate(lengths):
        for first, end in ((0, 3 * C + 1), (3 * C + 1, length)):
            ex.begin_prefill(slice(b, b + 1), [first], end - first)
            for layer, keys in enumerate(rows):
                chunk = keys[b][None, :, first:end].to(DEVICE)
                q = draw(1, 4, end - first, 16, ties=False, seed=layer).to(DEVICE)
                ex.forward(layer, AttentionCall(q, chunk, chunk, SCALE))
    policy = make_policy(
        selector=ex.selector, block_budget=BUDGET, sink_blocks=SINK, recent_blocks=RECENT,
        query_agnostic_share=share, heat_decay=0.98,
    )  # fmt: skip
    for step in range(steps):
        ex.begin_decode()
        for layer, keys in enumerate(rows):
            new = draw(2, 2, 1, 16, ties=False, seed=100 + 2 * step + layer)
            q = draw(2, 4, 1, 16, ties=False, seed=200 + 2 * step + layer)
            ex.forward(layer, AttentionCall(q.to(DEVICE), new.to(DEVICE), new.to(DEVICE), SCALE))
            rows[layer] = [torch.cat((k, new[b]), 1) for b, k in enumerate(keys)]
            selected = ex.workspace_of(ex.cache.full[layer]).selected_blocks
            for b, k in enumerate(rows[layer]):
                truth = plain_scores(method, params, q[b, :, 0].double(), k.double())
                for h in range(2):
                    best = plain_blocks(truth[h], k.shape[1], policy.query_blocks)
                    got = [n for n in selected[b, h].tolist() if n >= 0]
                    assert set(best) <= set(got) and len(got) == min(BUDGET, -(-k.shape[1] // C))
                    assert share > 0 or got == best
    ex.cache.check_integrity()


@pytest.mark.parametrize("scorer", SCORERS)
def test_full_budget_equals_stock(scorer):
    method, params = SCORERS[scorer]
    model, ids = tiny_model("llama", device=DEVICE), prompt(150)
    expected = greedy(model, ids)
    selection = {"params": params, "query_agnostic_share": 0.5}
    offload(
        model,
        sparse_config(method, 6, cache={"block_size": C}, selection=selection | {"token_budget": 6 * C}),
    )
    assert torch.equal(greedy(model, ids), expected)


@pytest.mark.parametrize("method", ["quest", "moba", "arkvale", "lserve"])
def test_composes_with_dense_layers_and_the_audit(method):
    """One layer sparse, one dense: the sparse one is audited and misses, the dense one is whole."""
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config(method, selection={"dense_layers": [1]}, audit={"every": 3}))
    greedy(model, prompt(300))
    stats = model.rheo.stats()
    assert stats.miss_blocks > 0 and stats.streamed_h2d_bytes > 0
    assert 0 < stats.captured_mass_min <= stats.captured_mass_mean < 1


def test_arkvale_shares_its_blocks_within_a_layer():
    for shared_by, same in (("layer", True), ("kv_head", False)):
        model = tiny_model("llama", device=DEVICE)
        offload(model, sparse_config("arkvale", selection={"params": {"shared_by": shared_by}}))
        cache = model.rheo.new_cache(max_length=330)
        greedy(model, prompt(300), past_key_values=cache)
        ex = cache.executor
        selected = ex.workspace_of(ex.cache.full[1]).selected_blocks
        assert torch.equal(selected[:, 0], selected[:, 1]) == same
