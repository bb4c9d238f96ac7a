"""Gather the figures of a run from the places where they were counted."""

from collections.abc import Sequence

import numpy as np
import torch

from rheo_offload.cache.device_pool import TRAFFIC
from rheo_offload.metrics.stats import Stats
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.types import LayerSpec


def collect_stats(cache: RheoCache, specs: Sequence[LayerSpec]) -> Stats:
    """Add up a cache's counters since it was made, and the times of its last run. Waits for the device."""
    ex, clock = cache.executor, cache.clock
    kv = ex.cache
    counters = torch.zeros(5, dtype=torch.int64)
    chosen = heads = 0
    blocks_read = dict.fromkeys(TRAFFIC, 0)
    for layer in kv.full.values():
        here = layer.counters.sum((0, 1)).cpu()
        counters += here
        if not ex.is_dense(layer):
            chosen, heads = chosen + int(here[0]), heads + layer.spec.num_kv_heads
        for purpose, blocks in zip(TRAFFIC, layer.traffic.tolist(), strict=True):
            blocks_read[purpose] += blocks * layer.layout.block_bytes
    selected, hits, forced, forced_hits, evictions = counters.tolist()
    audited, (audited_logits, kl_mean, kl_max) = ex.audit.per_layer(), ex.audit.logit_kl()
    gaps = np.array(clock.gaps) * 1e3
    seconds = clock.last - clock.first if clock.first is not None else 0.0
    token_bytes = sum(2 * s.num_kv_heads * s.head_dim for s in specs) * kv.dtype.itemsize
    offloaded = sum(x.spec.num_kv_heads * x.layout.block_bytes for x in kv.full.values()) // kv.block_size
    return Stats(
        prompt_tokens=clock.prompt_tokens,
        new_tokens=clock.generated,
        decode_steps=ex.decode_steps,
        ttft_ms=(clock.first - clock.started) * 1e3 if clock.first is not None else None,
        itl_p50_ms=float(np.percentile(gaps, 50)) if len(gaps) else None,
        itl_p95_ms=float(np.percentile(gaps, 95)) if len(gaps) else None,
        decode_tps=(clock.generated - clock.rows) / seconds if seconds else None,
        hit_rate=hits / selected if selected else None,
        hit_rate_unforced=(hits - forced_hits) / (selected - forced) if selected > forced else None,
        selected_blocks=selected,
        selected_blocks_mean=chosen / (heads * ex.row_steps) + 1 if heads and ex.row_steps else None,
        miss_blocks=selected - hits,
        evicted_blocks=evictions,
        h2d_bytes=blocks_read["loaded"],
        warm_h2d_bytes=blocks_read["warmed"],
        prefill_h2d_bytes=blocks_read["prefill"],
        streamed_h2d_bytes=blocks_read["streamed"],
        audit_h2d_bytes=blocks_read["audited"],
        d2h_bytes=kv.tokens_written * offloaded,
        captured_mass_mean=float(np.mean([a.captured_mass_mean for a in audited])) if audited else None,
        captured_mass_min=min(a.captured_mass_min for a in audited) if audited else None,
        output_error_mean=float(np.mean([a.output_error_mean for a in audited])) if audited else None,
        output_error_max=max(a.output_error_max for a in audited) if audited else None,
        logit_kl_mean=kl_mean,
        logit_kl_max=kl_max,
        audited_logits=audited_logits,
        layers=tuple(audited),
        raised_budgets={i: ex.raised.blocks_of(kv.full[i], ex.policy) for i in ex.raised.layers},
        audited_steps=ex.audit.steps,
        device_kv_bytes=kv.device_bytes,
        dense_kv_bytes=sum(kv.lengths) * token_bytes,
        host_kv_bytes=kv.host_bytes,
        capacity_blocks=kv.capacity,
        block_budget=ex.policy.block_budget,
    )
