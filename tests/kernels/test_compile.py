"""Every Triton kernel, compiled ahead of time for real architectures: it fits, no spills, wide loads.

Whether a kernel is interpreted or compiled is decided when its module is imported, so the compiling happens
in another process: this file run as a script. It calls the wrappers with tensors that have no memory (device
`meta`), so what is compiled is exactly what they would launch. No GPU is needed.
"""

import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}  # that one program may use, by compute capability

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN = {"softmax_scale": 0.1, "soft_cap": None, "window": None}


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape):
    return empty(*shape, dtype=torch.int32)


class World:
    """The tensors of one layer, named as in the contracts: 4 rows, 2 KV heads, N blocks of 64 tokens."""

    def __init__(self, D=128, G=4, dtype=BF16, W=4, N=512, bias=False):
        B, H, C, S, P, L = 4, 2, 64, 64, 2048, 1024
        self.q, self.k_new, self.chunk = (
            empty(B, H * G, D, dtype=dtype),
            empty(B, H, D, dtype=dtype),
            empty(B, H, 512, D),
        )
        self.q_chunk, self.kv_chunk = (
            empty(B, H * G, 512, D, dtype=dtype),
            empty(B, H, 1, 512, D, dtype=dtype),
        )
        self.ring = empty(B, H, 1024, D)
        self.pool_blocks, self.host_blocks = (
            empty(L, 2 * C * D, dtype=dtype),
            empty(P, H, 2 * C * D, dtype=dtype),
        )
        self.staging = empty(B, H, 32, 2 * C * D, dtype=dtype)
        self.k_pool, self.v_pool = self.pool_blocks.view(L, 2, C, D).unbind(1)
        self.k_host, self.v_host = self.host_blocks.view(P, H, 2, C, D).unbind(2)
        self.k_staged, self.v_staged = self.staging.view(B, H, 32, 2, C, D).unbind(3)
        # the trailer of a block: strided over blocks
        self.bias_new, self.bias_chunk = empty(B, H, dtype=dtype), empty(B, H, 512, dtype=dtype)
        self.logit_bias = {}
        self.bias_pool = empty(L, 2 * C * D + C, dtype=dtype)[:, -C:]
        if bias:
            self.logit_bias["bias_pool"] = self.bias_pool
        self.bias_host = empty(P, H, 2 * C * D + C, dtype=dtype)[..., -C:]
        self.bias_staged = empty(B, H, 32, 2 * C * D + C, dtype=dtype)[..., -C:]
        self.bias_weight, self.bias_scale = empty(H, H * D, dtype=dtype), empty(H, dtype=FP32)
        self.summary = empty(P, H, W, D, dtype=dtype)
        self.rows, self.step, self.load_count = ints(B), ints(1), ints(1)
        self.host_table, self.slot_of = ints(B, N), ints(B, H, N)
        self.block_in, self.last_used, self.slot_base, self.slot_count = (
            ints(L),
            ints(L),
            ints(B, H),
            ints(B, H),
        )
        self.selected, self.num_selected, self.slots = ints(B, H, S), ints(B, H), ints(B, H, S)
        self.scores, self.heat = empty(B, H, N, dtype=FP32), empty(B, H, N, dtype=FP32)
        self.logits = empty(B, H * G, N * W, dtype=FP32)
        self.loads, self.total = ints(B * H * S), empty(1, dtype=torch.int64)
        self.counters = empty(B, H, 5, dtype=torch.int64)
        self.parts, self.lse_parts = empty(8, B, H * G, D, dtype=FP32), empty(8, B, H * G, dtype=FP32)
        self.chunk_out, self.chunk_lse = empty(B, H * G, 512, D, dtype=FP32), empty(B, H * G, 512, dtype=FP32)

    def attend(self, **kw):
        ids = (self.selected, self.slots, self.rows)
        return (
            self.q,
            self.k_pool,
            self.v_pool,
            *ids,
            self.parts,
            self.lse_parts,
        ), PLAIN | self.logit_bias | kw

    def attend_centroids(self, **kw):
        means = (self.summary, self.summary, self.host_table, self.rows, self.selected)
        sizes = {"softmax_scale": 0.1, "soft_cap": None, "block_size": 64}
        return (self.q, *means, self.parts, self.lse_parts), sizes | kw

    def block_mass(self, **kw):
        args = (
            self.q,
            self.k_pool,
            self.selected,
            self.slots,
            self.rows,
            self.lse_parts[0],
            self.heat[:, :, :64],
        )
        return args, {"softmax_scale": 0.1, "soft_cap": None} | kw

    def merge(self):
        late = {"splits": 5, "late_slots": self.slots}
        return (self.parts, self.lse_parts, self.q[0, :, 0], self.q, self.lse_parts[0]), late

    def prefill_attention(self, *, staged=False, queries=512, bias=None, **kw):
        if bias:
            kw["bias"] = self.bias_chunk[:, :, None] if bias == "chunk" else self.bias_staged
        kv = (self.k_staged, self.v_staged) if staged else (self.kv_chunk, self.kv_chunk)
        chunk = (x[:, :, :queries] for x in (self.chunk_out, self.chunk_lse))
        return (self.q_chunk[:, :, :queries], *kv, self.rows, self.rows, self.rows, *chunk), PLAIN | kw

    def append(self, kind, *, bias=False, values=False):
        tables = (self.slot_of, self.block_in, self.last_used, self.slot_base, self.slot_count, self.step)
        pools = (self.k_host, self.v_host, self.k_pool, self.v_pool)
        summary = None if kind == "none" else self.summary
        args = (self.k_new, self.k_new, self.rows, self.host_table, *pools, *tables, summary, self.load_count)
        numbers = (
            dict(bias_new=self.bias_new, bias_host=self.bias_host, bias_pool=self.bias_pool) if bias else {}
        )
        means = {"value_summary": self.summary if values else None}
        return args, {"sink_blocks": 1, "summary_kind": kind} | means | numbers

    def append_numbers(self):
        new, host, pool = (x[..., None] for x in (self.bias_chunk, self.bias_host, self.bias_pool))
        return (new, new, self.rows, self.host_table, host, host, pool, pool, self.slot_of), {}

    def summarize_numbers(self, width):
        units = empty(*self.k_host.shape[:2], width, 1, dtype=FP32)
        new, host = self.bias_chunk[..., None], self.bias_host[..., None]
        return (new, self.rows, self.host_table, host, units), {"summary_kind": "mean"}

    def append_chunk(self):
        pools = (self.k_host, self.v_host, self.k_pool, self.v_pool)
        return (self.chunk, self.chunk, self.rows, self.host_table, *pools, self.slot_of), {}

    def summarize_chunk(self, kind):
        return (self.chunk, self.rows, self.host_table, self.k_host, self.summary), {"summary_kind": kind}

    def token_bias(self, queries=1):
        v, out = self.chunk[:, :, :queries], self.bias_chunk[:, :, :queries]
        return (v, self.bias_weight, self.bias_new[0], self.bias_scale, out), {}

    def rank_bias(self, pooling, width):
        tables = (self.rows, self.host_table, self.slot_of)
        units = empty(*self.k_host.shape[:2], width, dtype=FP32)
        sizes = {"block_size": self.k_host.shape[2], "pooling": pooling}
        return (*tables, self.bias_pool, units, self.heat), sizes

    def ring_append(self):
        return (self.chunk, self.chunk, self.rows, self.ring, self.ring), {}

    def gather(self):
        return (self.loads, self.loads, self.load_count, self.host_blocks, self.pool_blocks, self.total), {}

    def stage(self):
        tables = (self.rows, self.host_table, self.slot_of)
        return (0, *tables, self.host_blocks, self.pool_blocks, self.staging, self.total), {"block_size": 64}

    def score(self, **kw):
        args = (self.q, self.summary, self.host_table, self.rows, self.logits, self.num_selected, self.scores)
        return args, {"softmax_scale": 0.1, "block_size": 64} | kw

    def select(self, normalise, **rule):
        policy = {"sink_blocks": 1, "recent_blocks": 16, "query_blocks": 24, "agnostic_blocks": 23}
        args = (self.scores, self.heat, self.rows, self.selected, self.num_selected)
        return args, policy | {"block_size": 64, "heat_decay": 0.98, "normalise": normalise} | rule

    def resolve(self):
        tables = (
            self.host_table,
            self.slot_of,
            self.block_in,
            self.last_used,
            self.slot_base,
            self.slot_count,
            self.step,
        )
        lists = (self.slots, self.slots, self.loads, self.loads, self.loads, self.load_count, self.counters)
        limits = {"block_size": 64, "sink_blocks": 1, "recent_blocks": 16}
        return (self.selected, self.num_selected, self.rows, *tables, *lists), limits

    def sample(self, op="sample", dtype=BF16):
        """64 rows of the largest vocabulary in use."""
        longs, floats = empty(64, dtype=torch.int64), empty(64, dtype=FP32)
        logits, scratch = empty(64, 256000, dtype=dtype), empty(64, 384, dtype=torch.int64)
        rules = (longs, floats, ints(64), floats, longs) if op == "sample" else ()
        return (logits, *rules, scratch, longs, ints(64)), {}

    def decide(self, score, *, query=24, agnostic=23, normalise="sum", **rule):
        tables = (self.slot_of, self.block_in, self.last_used, self.slot_base, self.slot_count, self.step)
        scratch = (self.logits, self.num_selected, self.scores)
        lists = (self.slots, self.slots, self.loads, self.loads, self.loads, self.load_count, self.counters)
        args = (self.q, self.summary, self.heat, self.rows, self.host_table, *tables, *scratch)
        shares = {"sink_blocks": 1, "recent_blocks": 16, "query_blocks": query, "agnostic_blocks": agnostic}
        rest = {"softmax_scale": 0.1, "block_size": 64, "heat_decay": 0.98, "normalise": normalise}
        return (*args, self.selected, self.num_selected, *lists), {"score": score} | shares | rest | rule

    def decide_groups(self, groups):
        """`decide` among the candidates of as many open groups of 16 blocks."""
        args, kw = self.decide("mean")
        candidates = [empty(*t.shape[:2], 16 * groups, dtype=FP32) for t in (self.logits, self.scores)]
        args = list(args)
        for old, new in zip((self.logits, self.scores), candidates, strict=True):
            args[next(i for i, x in enumerate(args) if x is old)] = new
        lists = {"open_groups": ints(4, 2, groups), "num_open": ints(4, 2), "group_blocks": 16}
        return tuple(args), kw | lists

    def open_groups(self):
        rows, heads, blocks = self.slot_of.shape
        groups, dim = blocks // 16, self.q.shape[2]
        bounds = empty(rows, heads, groups, 2, dim, dtype=self.q.dtype)
        lists = (
            self.num_selected,
            empty(rows, heads, 2, groups, dtype=FP32),
            ints(rows, heads, 28),
            self.num_selected,
        )
        shares = dict(sink_groups=1, recent_groups=3, query_groups=16, agnostic_groups=8)
        args = (self.q, bounds, self.summary, self.heat, self.host_table, self.rows, *lists)
        return args, shares | {"block_size": 64, "group_blocks": 16}

    def attend_fetch(self, **kw):
        lists = (self.loads, self.loads, self.loads, self.load_count)
        blocks = (self.host_blocks, self.pool_blocks, self.total)
        selected = (self.k_pool, self.v_pool, self.selected, self.slots, self.slots, self.rows)
        return (
            self.q,
            *selected,
            *lists,
            *blocks,
            5,
            self.parts,
            self.lse_parts,
        ), PLAIN | self.logit_bias | kw

    def rms_norm(self, H, ahead=""):
        x, weight = empty(4, H), empty(H)
        more = {"residual": x} if ahead else {}
        more |= {"branch_weight": weight} if ahead == "sandwich" else {}
        return (x, weight, x), {"eps": 1e-5, "offset": int(ahead == "sandwich")} | more

    def rope(self, D, normed=False):
        qkv, angles = empty(4, 32 + 2 * 8, D), empty(4, D)
        weights = (empty(D), empty(D)) if normed else ()
        return (qkv[:, :32], qkv[:, 32:40], angles, angles, *weights), {"eps": 1e-6, "offset": 0}

    def gated_act(self, act):
        return (empty(4, 2 * 14336), empty(4, 14336)), {"act": act}

    def linear_few(self, N, K, *, add=False, dtype=BF16):
        return (empty(16, K, dtype=dtype), empty(N, K, dtype=dtype), empty(16, N, dtype=dtype)), {"add": add}


# name: op, its arguments, architectures, whether 16-byte loads are claimed
CASES = {
    "attend": ("attend", lambda: World().attend(), (80, 89, 90), True),
    "attend-d64-g8": ("attend", lambda: World(D=64, G=8).attend(), (90,), True),
    "attend-d80": ("attend", lambda: World(D=80, G=1).attend(), (80, 90), True),
    "attend-d256-window-cap": (
        "attend",
        lambda: World(D=256).attend(window=512, soft_cap=50.0),
        (80, 89, 90),
        True,
    ),
    "attend-bias": ("attend", lambda: World(bias=True).attend(), (90,), True),
    "attend-fp32": ("attend", lambda: World(dtype=FP32).attend(), (90,), True),
    "attend_centroids": ("attend_centroids", lambda: World(W=1).attend_centroids(), (80, 90), True),
    "attend_centroids-d256-cap": (
        "attend_centroids",
        lambda: World(D=256).attend_centroids(soft_cap=50.0),
        (80, 90),
        True,
    ),
    "attend_centroids-fp32": ("attend_centroids", lambda: World(dtype=FP32).attend_centroids(), (90,), True),
    "block_mass": ("block_mass", lambda: World().block_mass(), (80, 90), True),
    "block_mass-d256-cap": ("block_mass", lambda: World(D=256).block_mass(soft_cap=50.0), (80, 90), True),
    "block_mass-fp32": ("block_mass", lambda: World(dtype=FP32).block_mass(), (90,), True),
    "merge": ("merge", lambda: World().merge(), (80, 90), False),
    "prefill": ("prefill_attention", lambda: World().prefill_attention(), (80, 89, 90), True),
    "prefill-staged": ("prefill_attention", lambda: World().prefill_attention(staged=True), (90,), True),
    "prefill-d64": ("prefill_attention", lambda: World(D=64).prefill_attention(), (90,), True),
    "prefill-d96-few": ("prefill_attention", lambda: World(D=96).prefill_attention(queries=20), (90,), True),
    "prefill-d256-window-cap": (
        "prefill_attention",
        lambda: World(D=256).prefill_attention(window=512, soft_cap=50.0),
        (80, 89, 90),
        True,
    ),
    "prefill-bias": ("prefill_attention", lambda: World().prefill_attention(bias="chunk"), (80, 90), True),
    "prefill-staged-bias": (
        "prefill_attention",
        lambda: World().prefill_attention(staged=True, bias="staged"),
        (90,),
        True,
    ),
    "prefill-fp32": ("prefill_attention", lambda: World(dtype=FP32).prefill_attention(), (90,), True),
    "prefill-fp32-d256": (
        "prefill_attention",
        lambda: World(D=256, dtype=FP32).prefill_attention(),
        (89,),
        True,
    ),
    "append-none": ("append", lambda: World().append("none"), (90,), False),
    "append-mean": ("append", lambda: World().append("mean"), (80, 90), False),
    "append-minmax": ("append", lambda: World(W=2).append("minmax"), (90,), False),
    "append-minmax-pages": ("append", lambda: World(W=8).append("minmax"), (90,), False),
    "append-bias": ("append", lambda: World().append("mean", bias=True), (80, 90), False),
    "token_bias": ("token_bias", lambda: World().token_bias(), (80, 90), False),
    "token_bias-chunk": ("token_bias", lambda: World().token_bias(512), (90,), False),
    "rank_bias-windows": ("rank_bias", lambda: World().rank_bias("windows", 4), (80, 90), False),
    "rank_bias-median": ("rank_bias", lambda: World().rank_bias("median", 64), (80, 90), False),
    "append-cuboid": ("append", lambda: World(W=2).append("cuboid"), (80, 90), False),
    "append-values": ("append", lambda: World(W=1).append("mean", values=True), (80, 90), False),
    "append_chunk": ("append_chunk", lambda: World().append_chunk(), (80, 90), True),
    "append_chunk-bias": ("append_chunk", lambda: World().append_numbers(), (90,), False),
    "summarize_chunk-bias": ("summarize_chunk", lambda: World().summarize_numbers(4), (90,), False),
    "summarize_chunk-bias-tokens": ("summarize_chunk", lambda: World().summarize_numbers(64), (90,), False),
    "summarize_chunk-mean": ("summarize_chunk", lambda: World().summarize_chunk("mean"), (80, 90), False),
    "summarize_chunk-minmax": ("summarize_chunk", lambda: World(W=2).summarize_chunk("minmax"), (90,), False),
    "summarize_chunk-cuboid": (
        "summarize_chunk",
        lambda: World(W=2).summarize_chunk("cuboid"),
        (80, 90),
        False,
    ),
    "ring_append": ("ring_append", lambda: World().ring_append(), (80, 90), True),
    "gather": ("gather", lambda: World().gather(), (80, 90), True),
    "stage": ("stage", lambda: World().stage(), (80, 90), True),
    "score_mean": ("score_mean", lambda: World(W=1).score(), (80, 90), False),
    "score_windows": ("score_windows", lambda: World().score(), (80, 90), False),
    "score_windows-overlap": ("score_windows", lambda: World().score(pool="overlap"), (80, 90), False),
    "score_minmax": ("score_minmax", lambda: World(W=2).score(), (80, 90), False),
    "score_minmax-pages": ("score_minmax", lambda: World(W=8).score(), (80, 90), False),
    "score_minmax-mean": ("score_minmax", lambda: World(W=2).score(group_by="mean"), (80, 90), False),
    "select-sum": ("select", lambda: World().select("sum"), (80, 90), False),
    "select-softmax": ("select", lambda: World().select("softmax"), (90,), False),
    "select-mass": ("select", lambda: World().select("sum", rule="mass", limit=0.9), (80, 90), False),
    "select-margin": ("select", lambda: World().select("softmax", rule="margin", limit=5.0), (90,), False),
    "sample": ("sample", lambda: World().sample(), (80, 90), True),
    "sample-fp32": ("sample", lambda: World().sample(dtype=FP32), (80, 90), True),
    "sample-fp16": ("sample", lambda: World().sample(dtype=torch.float16), (90,), True),
    "sample_greedy": ("sample_greedy", lambda: World().sample("sample_greedy"), (80, 90), True),
    "resolve": ("resolve", lambda: World().resolve(), (80, 90), False),
    "rms_norm": ("rms_norm", lambda: World().rms_norm(4096), (80, 90), True),
    "rms_norm-residual": ("rms_norm", lambda: World().rms_norm(4096, "residual"), (80, 90), True),
    "rms_norm-sandwich": ("rms_norm", lambda: World().rms_norm(3584, "sandwich"), (80, 90), True),
    "rope": ("rope", lambda: World().rope(128), (80, 90), True),
    "rope-normed-d256": ("rope", lambda: World().rope(256, normed=True), (80, 90), True),
    "gated_act-silu": ("gated_act", lambda: World().gated_act("silu"), (80, 90), True),
    "gated_act-gelu": ("gated_act", lambda: World().gated_act("gelu_tanh"), (90,), True),
    # the shapes of Llama-3.1-8B, launched as the table says on sm_90
    "linear_few-qkv": ("linear_few", lambda: World().linear_few(6144, 4096), (80, 90), True),
    "linear_few-o": ("linear_few", lambda: World().linear_few(4096, 4096), (90,), True),
    "linear_few-gate_up": ("linear_few", lambda: World().linear_few(28672, 4096), (90,), True),
    "linear_few-down": ("linear_few", lambda: World().linear_few(4096, 14336, add=True), (80, 90), True),
    "linear_few-head": ("linear_few", lambda: World().linear_few(128256, 4096), (90,), True),
    "linear_few-odd": ("linear_few", lambda: World().linear_few(80, 136, add=True), (80, 90), False),
    "linear_few-fp32": ("linear_few", lambda: World().linear_few(4096, 4096, dtype=FP32), (89, 90), True),
    "decide-mean": ("decide", lambda: World(W=1).decide("mean"), (80, 90), True),
    "decide-mean-n256-g8": ("decide", lambda: World(W=1, N=256, G=8).decide("mean"), (90,), True),
    "decide-mean-n2048": ("decide", lambda: World(W=1, N=2048).decide("mean"), (80, 90), True),
    "decide-mean-n16384": ("decide", lambda: World(W=1, N=16384).decide("mean"), (90,), True),
    "decide-mean-groups": ("decide", lambda: World(W=1, N=4096).decide_groups(52), (80, 90), True),
    "open_groups": ("open_groups", lambda: World(W=1, N=4096).open_groups(), (80, 90), True),
    "open_groups-n32768": ("open_groups", lambda: World(W=1, N=32768).open_groups(), (90,), True),
    "open_groups-fp32": ("open_groups", lambda: World(W=1, N=4096, dtype=FP32).open_groups(), (90,), True),
    "decide-windows": ("decide", lambda: World().decide("windows"), (80, 90), True),
    "decide-minmax": ("decide", lambda: World(W=2).decide("minmax", normalise="softmax"), (80, 90), True),
    "decide-minmax-pages": (
        "decide",
        lambda: World(W=8).decide("minmax", normalise="softmax"),
        (80, 90),
        True,
    ),
    "decide-given": ("decide", lambda: World().decide("given"), (90,), False),
    "decide-mean-mass": ("decide", lambda: World(W=1).decide("mean", rule="mass", limit=0.9), (80, 90), True),
    "decide-mean-due": ("decide", lambda: World(W=1).decide("mean", due=ints(8)), (90,), True),
    "select-due": ("select", lambda: World().select("sum", due=ints(8)), (90,), False),
    "decide-given-threshold": (
        "decide",
        lambda: World().decide("given", rule="threshold", limit=0.002),
        (90,),
        False,
    ),
    "decide-none": (
        "decide",
        lambda: World().decide("none", query=0, agnostic=0, normalise="none"),
        (90,),
        False,
    ),
    "attend_fetch": ("attend_fetch", lambda: World().attend_fetch(), (80, 89, 90), True),
    "attend_fetch-d256-cap": (
        "attend_fetch",
        lambda: World(D=256).attend_fetch(soft_cap=50.0),
        (89, 90),
        True,
    ),
    "attend_fetch-bias": ("attend_fetch", lambda: World(bias=True).attend_fetch(), (90,), True),
    "attend_fetch-fp32": ("attend_fetch", lambda: World(dtype=FP32).attend_fetch(), (90,), True),
}


def compile_case(name: str, arch: int) -> list[dict]:
    """Compile what one call launches; runs in the process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # the key of the kernel caches
        get_current_stream=lambda device=0: 0,
    )
    triton.runtime.driver.set_active(driver)
    limits = SimpleNamespace(
        shared_memory_per_block_optin=SHARED_BYTES[arch], major=arch // 10, minor=arch % 10
    )
    torch.cuda.get_device_properties = lambda device=None: limits

    for cached in ("arch_of", "shared_bytes"):  # of the architecture compiled before in this process
        getattr(importlib.import_module("csrc_free_kernels.launch"), cached).cache_clear()

    compiled = []

    def compile_instead(kernel, grid):
        def launch(*args, **kwargs):
            if "UPCAST_DOT" in kwargs:  # set for tensors that are not on a GPU, which ours only pretend to be
                kwargs["UPCAST_DOT"] = False
            compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

        return launch

    JITFunction.__getitem__ = compile_instead
    op, arguments = CASES[name][:2]
    args, kwargs = arguments()
    getattr(importlib.import_module(f"csrc_free_kernels.gpu.{op}"), op)(*args, **kwargs)
    return [{"case": name, "arch": arch} | measure(kernel) for kernel in compiled]


def measure(kernel) -> dict:
    """Registers, spilled bytes, spills inside loops, shared memory and 16-byte loads of a kernel."""
    tools = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin"
    cubin = Path(os.environ["CUBIN_DIR"]) / f"{os.getpid()}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def run(tool, option):
        return subprocess.run(
            [tools / tool, option, cubin], capture_output=True, text=True, check=True
        ).stdout

    usage = run("cuobjdump", "-res-usage")
    wide = r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\.shared\.global"
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "loop_spills": loop_spills(run("nvdisasm", "-c")),
        "shared_bytes": kernel.metadata.shared,
        "wide_loads": len(re.findall(wide, kernel.asm["ptx"])),
    }


def loop_spills(assembly: str) -> int:
    """Local-memory accesses between a label and a branch back to it."""
    labels, spills, seen = {}, 0, 0
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = seen
        elif re.search(r"\b(STL|LDL)\b", line):
            seen += 1
        elif (branch := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and branch[1] in labels:
            spills += seen - labels[branch[1]]
    return spills


def attempt(job: tuple[str, int]) -> list[dict]:
    try:
        return compile_case(*job)
    except Exception as e:  # reported by the test of this case
        return [{"case": job[0], "arch": job[1], "error": f"{type(e).__name__}: {e}"}]


JOBS = [(name, arch) for name, case in CASES.items() for arch in case[2]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Everything compiled: once, by whichever worker of pytest-xdist comes first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers' own folders lie in one of this run
    file = folder / "compiled.json"
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not file.exists():
            file.write_text(compile_everything(tmp_path_factory.mktemp("cubin")))
    return json.loads(file.read_text())


def compile_everything(folder: Path) -> str:
    """Compile every case in another process; returns its results as JSON."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "CUBIN_DIR": str(folder)}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


# What the older compiler spills and the newer one does not: (local accesses in loops, bytes). Speed only, and not of
# the usual path: that loop of resolve runs on misses, and append keeps 8 bytes of its 56 registers' worth aside once.
SPILLS_OF_TRITON_3_6 = {("resolve", 80): (6, 8), ("append-cuboid", 80): (0, 8), ("attend_fetch", 80): (4, 24)}
# decide runs once through a long straight line, of which the assembler keeps some bytes in local memory rather than
# take more registers, never inside a loop. A row of a million tokens is 32 scores and 32 heats a thread.
KNOWN_SPILLS = {(name, arch): (0, 64) for name, arch in JOBS if CASES[name][0] == "decide"}
KNOWN_SPILLS |= {("decide-mean-n16384", 90): (0, 512)}
# A block under way in registers while another is attended to: 8 bytes too many where the matrix products take more.
KNOWN_SPILLS |= {("attend_fetch", 80): (2, 8), ("attend_fetch-d256-cap", 80): (2, 8)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), JOBS, ids=[f"{n}-sm{a}" for n, a in JOBS])
def test_compiles(results, name, arch):
    kernels = [r for r in results if (r["case"], r["arch"]) == (name, arch)]
    assert kernels
    known = KNOWN_SPILLS | (SPILLS_OF_TRITON_3_6 if version("triton").startswith("3.6.") else {})
    loop_spills, spill_bytes = known.get((name, arch), (0, 0))
    for kernel in kernels:
        assert "error" not in kernel, kernel["error"]
        assert kernel["shared_bytes"] <= SHARED_BYTES[arch], kernel
        assert kernel["loop_spills"] <= loop_spills, kernel
        if CASES[name][0] != "prefill_attention":  # wide heads spill around its loops
            assert kernel["spill_bytes"] <= spill_bytes, kernel
    if CASES[name][3]:
        assert any(kernel["wide_loads"] for kernel in kernels), kernels


if __name__ == "__main__":
    with ProcessPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        print(json.dumps([kernel for kernels in pool.map(attempt, JOBS) for kernel in kernels]))
