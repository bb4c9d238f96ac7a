"""Inputs and the check shared by the tests of the three scorers."""

import torch
from torch import Tensor

from tests.helpers.homes import poison
from tests.helpers.tolerance import assert_close


def score_inputs(B, Hkv, G, D, C, N, W, seq_lens, dtype, *, minmax=False) -> dict[str, Tensor]:
    """Random queries and summaries on scattered host pages; every unfinished or unused summary is NaN."""
    pages = torch.randperm(B * N + 2)[: B * N].reshape(B, N) + 1
    host_table = torch.full((B, N), -1, dtype=torch.int32)
    summary = torch.full((B * N + 4, Hkv, W, D), float("nan"), dtype=dtype)
    unit = C if minmax else C // W
    for b, seq_len in enumerate(seq_lens):
        host_table[b, : -(-seq_len // C)] = pages[b, : -(-seq_len // C)]
        for u in range(seq_len // unit):
            if minmax:
                pairs = torch.randn(Hkv, W // 2, 2, D).sort(dim=2, descending=True).values
                summary[pages[b, u]] = pairs.flatten(1, 2).to(dtype)
            else:
                summary[pages[b, u // W], :, u % W] = torch.randn(Hkv, D).to(dtype)
    q = (2 * torch.randn(B, Hkv * G, D)).to(dtype)
    return {
        "q": q,
        "summary": summary,
        "host_table": host_table,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
    }


def run_score(fn, device, inputs, *, block_size, softmax_scale, **kw) -> Tensor:
    """Run a scorer over NaN-poisoned scratch and output; returns block_scores."""
    q, summary, host_table, seq_lens = (t.to(device) for t in inputs.values())
    (rows, blocks), heads, units = host_table.shape, summary.shape[1], host_table.shape[1] * summary.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = poison(rows, q.shape[1], units, dtype=wide, device=device)
    scores = poison(rows, heads, blocks, dtype=wide, device=device)
    arrivals = torch.zeros(rows, heads, dtype=torch.int32, device=device)
    fn(
        q, summary, host_table, seq_lens, logits, arrivals, scores,
        softmax_scale=softmax_scale, block_size=block_size, **kw,
    )  # fmt: skip
    assert not arrivals.any(), "the counters are left at zero for the next call"
    return scores


def check_score(fn, device, reference, inputs, **kw) -> Tensor:
    """Compare a home with the reference run in fp64 on the CPU; returns that truth."""
    exact = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = run_score(reference, "cpu", exact, **kw)
    same = run_score(reference, "cpu", inputs, **kw)
    assert_close(run_score(fn, device, inputs, **kw), truth, same, inputs["q"].dtype)
    return truth
