"""Controlled selection: blocks fixed in advance, with everything else of a step, scoring included, as it is.

The configured method scores into a scratch buffer, so that its cost is paid; then `decide` ranks by scores that were
given: 1 for the wanted blocks, 0 for the others. Sink and recent blocks are forced as always.

    Frozen     random blocks, drawn once; `forced_misses` makes a share of them absent again before every step
    Recorded   what a real model selected, step by step
    Flat       no control at all: the method's own selection, made without an index

All of it can be captured: the step counter, the miss rate and the ids are device memory.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.recorded import Recording
from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.execution.executor import Executor

MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
LOW = 0xFFFFFFFF


class GivenScores:
    """One layer's method: scores like `inner`, and leaves the scores that count to whoever owns them."""

    name = "given"
    query_aware = True
    score_kind = "given"
    normalise = "none"

    def __init__(self, inner: Any, scratch: Tensor) -> None:
        self.inner, self.scratch = inner, scratch
        self.summary_kind, self.summary_width = inner.summary_kind, inner.summary_width

    def score(
        self, ops: Any, q: Tensor, *tensors: Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Pay for the scores of `inner`; the last of `tensors`, the given scores, stays as it is."""
        self.inner.score(
            ops, q, *tensors[:-1], self.scratch, softmax_scale=softmax_scale, block_size=block_size
        )


class Controlled(ABC):
    """Takes the selection of an executor over; subclasses fill `scores` [layers, B, Hkv, N]."""

    scores: Tensor

    def install(self, executor: Executor) -> None:
        """Put the given scores in place of the method's, for all rows and offloaded layers (none of them dense)."""
        kv, policy = executor.cache, self.policy_for(executor)
        layers = list(kv.full.values())
        heads = layers[0].spec.num_kv_heads
        self.scores = torch.zeros(len(layers), kv.rows, heads, kv.max_blocks, device=kv.device)
        selector = GivenScores(executor.selector, torch.empty_like(self.scores[0]))
        place = {layer.spec.layer_idx: i for i, layer in enumerate(layers)}
        shared = executor.workspace_of
        own: dict[tuple[int, int], Any] = {}

        def workspace_of(layer: FullLayer) -> Any:
            key = layer.spec.layer_idx, layer.rows
            if key not in own:
                own[key] = copy.copy(shared(layer))
                own[key].block_scores = self.scores[place[key[0]], : layer.rows]
            return own[key]

        executor.selector, executor.policy = selector, policy  # type: ignore[assignment]
        executor.index = None  # the given scores are of all blocks
        executor.workspace_of = workspace_of  # type: ignore[method-assign]
        self.fill(executor)

    def policy_for(self, executor: Executor) -> Any:
        """Return the policy: all that is not forced is chosen by the given scores."""
        policy = executor.policy
        chosen = policy.block_budget - policy.sink_blocks - policy.recent_blocks
        return replace(policy, query_blocks=chosen, agnostic_blocks=0)

    @abstractmethod
    def fill(self, executor: Executor) -> None:
        """Write the first scores."""

    def prologue(self, rows: int) -> None:  # noqa: B027  (most need nothing)
        """Launch what a step needs ahead of its forward."""

    def release(self) -> None:
        """Let the cache and its memory go."""
        self.__dict__.pop("scores", None)


class Flat:
    """The configured method, ranking all blocks whatever `selection.index` says."""

    def install(self, executor: Executor) -> None:
        """Take the index away; nothing has been launched yet."""
        executor.index = None

    def prologue(self, rows: int) -> None:
        """Launch nothing."""

    def release(self) -> None:
        """Hold nothing."""


class Frozen(Controlled):
    """The same random blocks in every step, of its own for every layer, row and KV head."""

    def __init__(self, *, forced_misses: bool = False, seed: int = 7) -> None:
        """Args: forced_misses: prepare `set_miss_rate`; the step then pays for the drop at any rate, 0 included."""
        self.forced_misses, self.seed = forced_misses, seed
        self.ids: Tensor
        """int32 [layers, B, Hkv, K]: the chosen blocks, ascending."""

    def fill(self, executor: Executor) -> None:
        kv, policy = executor.cache, executor.policy
        first = policy.sink_blocks
        end = kv.blocks_of(min(kv.lengths)) - policy.recent_blocks
        if end - first < policy.query_blocks:
            raise ValueError(
                f"{policy.query_blocks} blocks cannot be drawn from {max(0, end - first)}: the context is too short"
            )
        generator = torch.Generator(kv.device).manual_seed(self.seed)
        ids = []
        for scores in self.scores:
            draw = torch.rand(*scores.shape[:2], end - first, generator=generator, device=kv.device)
            chosen = first + draw.topk(policy.query_blocks, -1).indices.sort(-1).values
            scores.scatter_(-1, chosen, 1.0)
            ids.append(chosen.int())
        self.ids = torch.stack(ids)
        self._layers = list(kv.full.values())
        # Of the selected blocks, tail excluded, as the counters count; only the chosen ones can be dropped
        self._scale = (policy.block_budget - 1) / max(1, policy.query_blocks)
        self.rate = torch.zeros(1, device=kv.device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=kv.device)

    def release(self) -> None:
        super().release()
        self._layers = []

    def set_miss_rate(self, rate: float) -> None:
        """Make this share of the selected blocks (tail excluded) miss from the next step on.

        Raises:
            ValueError: more than the chosen blocks make up.
        """
        if rate * self._scale > 1:
            raise ValueError(
                f"a miss rate of {rate} is more than the {1 / self._scale:.2f} that is not forced"
            )
        self.rate.fill_(rate * self._scale)

    def prologue(self, rows: int) -> None:
        if not self.forced_misses:
            return
        self.steps += 1
        for salt, (layer, ids) in enumerate(zip(self._layers, self.ids, strict=True)):
            drop_chosen(ids[:rows], layer.slot_of[:rows], layer.block_in, self.steps, self.rate, salt)


class Recorded(Controlled):
    """What a real model selected: sink and recent blocks are the run's own, all others the recording's.

    Rows must be at least as long as the recorded text. `install` also sets the heat, so that `Executor.warm` fills the
    pools as they were at the start of the recording.
    """

    def __init__(self, recording: Recording, steps: int) -> None:
        """Args: steps: how many will be played; later ones repeat the last."""
        self.recording, self.num_steps = recording, steps

    def policy_for(self, executor: Executor) -> Any:
        meta, policy = self.recording.meta, executor.policy
        if (
            self.recording.block_budget != policy.block_budget
            or meta["block_size"] != executor.cache.block_size
        ):
            raise ValueError(
                f"the recording has {self.recording.block_budget} blocks of {meta['block_size']} tokens, the run "
                f"{policy.block_budget} of {executor.cache.block_size}"
            )
        if min(executor.cache.lengths) < self.recording.context_blocks * executor.cache.block_size:
            raise ValueError(f"rows must hold the {self.recording.context_blocks} blocks of the recording")
        sink, recent = meta["sink_blocks"], meta["recent_blocks"]
        chosen = policy.block_budget - sink - recent
        return replace(policy, sink_blocks=sink, recent_blocks=recent, query_blocks=chosen, agnostic_blocks=0)

    def fill(self, executor: Executor) -> None:
        kv, policy, recording = executor.cache, executor.policy, self.recording
        layers, rows, heads = self.scores.shape[:3]
        chosen = recording.base[..., policy.sink_blocks : policy.block_budget - policy.recent_blocks]
        device = kv.device
        self.chosen = torch.from_numpy(chosen.reshape(-1, chosen.shape[-1]).astype("int64")).to(device)
        index = recording.index_map(layers, heads, rows, self.num_steps)
        self.index = torch.from_numpy(index).to(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        order = torch.from_numpy(recording.start_order.astype("int64")).to(device)
        streams = torch.from_numpy(recording.stream_map(layers, heads, rows)).to(device).long()
        falling = torch.arange(order.shape[1], 0, -1, device=device, dtype=torch.float32)
        for layer, stream in zip(kv.full.values(), streams, strict=True):
            layer.heat.zero_()
            layer.heat.scatter_(-1, order[stream], falling.expand(*stream.shape, -1))

    def prologue(self, rows: int) -> None:
        """Write the scores of this step for all layers, in a few launches."""
        index = self.index.index_select(0, self.at)[0, :, :rows].long()
        self.scores[:, :rows].zero_()
        self.scores[:, :rows].scatter_(-1, self.chosen[index], 1.0)
        self.at += 1
        self.at.clamp_(max=self.num_steps - 1)


# grid (B * Hkv,); one program drops among the chosen blocks of a (row, head)
@triton.jit
def drop_kernel(
    ids, slot_of, block_in, steps, rate, salt, stride_ob, stride_oh, HKV: tl.constexpr, K: tl.constexpr,
    K_P: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, K_P)
    m_k = o_k < K
    b_id = tl.load(ids + i_row * K + o_k, mask=m_k, other=0)
    p_slot = slot_of + i_row // HKV * stride_ob + i_row % HKV * stride_oh + b_id
    b_slot = tl.load(p_slot, mask=m_k, other=-1)
    x = (tl.load(steps) * 1048583 + salt * 65537 + i_row) * 2053 + b_id.to(tl.int64)
    x = (x * 0x9E3779B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE3D) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    m_drop = m_k & (b_slot >= 0) & (x.to(tl.float32) * (1.0 / 4294967296.0) < tl.load(rate))
    tl.store(p_slot, tl.full([K_P], -1, tl.int32), mask=m_drop)
    tl.store(block_in + b_slot, tl.full([K_P], -1, tl.int32), mask=m_drop)


def drop_chosen(
    ids: Tensor, slot_of: Tensor, block_in: Tensor, steps: Tensor, rate: Tensor, salt: int
) -> None:
    """Make a random share of the chosen blocks absent, as an eviction would. Never waits; can be captured.

    Which ones is a hash of step, salt, row, head and block, the same on every device.

    Args:
        ids: int32 [B, Hkv, K], contiguous.
        slot_of: int32 [B, Hkv, N], written in place.
        block_in: int32 [L], written in place.
        steps: int64 [1], number of this step.
        rate: fp32 [1], share of the ids that is dropped.
        salt: tells layers apart.
    """
    rows, heads, count = ids.shape
    if ids.is_cuda:
        drop_kernel[(rows * heads,)](
            ids, slot_of, block_in, steps, rate, salt, slot_of.stride(0), slot_of.stride(1),
            HKV=heads, K=count, K_P=triton.next_power_of_2(count),
        )  # fmt: skip
        return
    drop_on_host(ids, slot_of, block_in, steps, rate, salt)


def drop_on_host(
    ids: Tensor, slot_of: Tensor, block_in: Tensor, steps: Tensor, rate: Tensor, salt: int
) -> None:
    """Do what `drop_kernel` does, in plain torch."""
    rows, heads, _ = ids.shape
    row = torch.arange(rows * heads).view(rows, heads, 1)
    x = (steps * 1048583 + salt * 65537 + row) * 2053 + ids
    x = (x * MIX[0]) & LOW
    x = ((x ^ (x >> 15)) * MIX[1]) & LOW
    x = ((x ^ (x >> 13)) * MIX[2]) & LOW
    x = x ^ (x >> 16)
    slots = slot_of.gather(-1, ids.long())
    drop = (slots >= 0) & (x.float() * (1.0 / 4294967296.0) < rate)
    block_in[slots[drop].long()] = -1
    slot_of.scatter_(-1, ids.long(), torch.where(drop, -1, slots))
