"""NSA's ranking of blocks, written out from keys, against a decode step through the whole data path."""

import pytest
import torch

from rheo_offload import offload
from rheo_offload.types import AttentionCall
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerance import assert_close
from tests.selection.test_scorers import BUDGET, RECENT, SCALE, SINK, draw, keys_of, plain_blocks
from tests.test_end_to_end import sparse_config

C, LENGTH, STRIDE = 32, 13 * 32 - 2, 16


def plain_scores(q, keys):
    """Scores [N] of one KV head: queries [G, D], keys [T, D], fp64, from windows of 32 tokens every 16."""
    starts = range(0, len(keys) - 2 * STRIDE + 1, STRIDE)
    means = torch.stack([keys[s : s + 2 * STRIDE].mean(0) for s in starts])
    weights = (SCALE * q @ means.T).softmax(-1).sum(0)
    scores = torch.full((-(-len(keys) // C),), -torch.inf, dtype=torch.float64)
    for weight, start in zip(weights, starts, strict=True):
        for n in {start // C, (start + 2 * STRIDE - 1) // C}:
            shared = min(start + 2 * STRIDE, (n + 1) * C) - max(start, n * C)
            scores[n] = max(float(scores[n]), 0.0) + float(weight) * shared / STRIDE
    return scores


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_step_selects_the_best_blocks(share):
    """A prompt in two chunks, then steps across a block border."""
    selection = {"token_budget": BUDGET * C, "recent_blocks": RECENT, "query_agnostic_share": share}
    config = sparse_config("nsa_select", cache={"block_size": C}, selection=selection, audit={"every": 0})
    model = offload(tiny_model("llama", device=DEVICE), config)
    ex = model.rheo._make_executor(1, LENGTH + 4, torch.float32, torch.device(DEVICE))
    keys = keys_of([LENGTH], 2, 16, False)[0]
    for first, end in ((0, 3 * C + 1), (3 * C + 1, LENGTH)):
        ex.begin_prefill(slice(0, 1), [first], end - first)
        chunk = keys[None, :, first:end].to(DEVICE)
        q = draw(1, 4, end - first, 16, ties=False, seed=1).to(DEVICE)
        for layer in range(2):
            ex.forward(layer, AttentionCall(q, chunk, chunk, SCALE))
    for step in range(4):
        ex.begin_decode()
        new, q = (
            draw(1, 2, 1, 16, ties=False, seed=100 + step),
            draw(1, 4, 1, 16, ties=False, seed=200 + step),
        )
        keys = torch.cat((keys, new[0]), 1)
        for layer in range(2):
            ex.forward(layer, AttentionCall(q.to(DEVICE), new.to(DEVICE), new.to(DEVICE), SCALE))
        ws = ex.workspace_of(ex.cache.full[1])
        for h in range(2):
            truth = plain_scores(q[0, 2 * h : 2 * h + 2, 0].double(), keys[h].double())
            exists = truth > -torch.inf
            assert_close(ws.block_scores[0, h, : len(truth)][exists], truth[exists], None, torch.float32)
            best = plain_blocks(truth, keys.shape[1], round((1 - share) * (BUDGET - SINK - RECENT)))
            got = [n for n in ws.selected_blocks[0, h].tolist() if n >= 0]
            assert set(best) <= set(got) and len(got) == BUDGET
            assert share > 0 or got == best
