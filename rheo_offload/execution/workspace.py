"""Buffers of a decode step, allocated once and shared by all layers (layers run one after another)."""

import copy

import torch

from rheo_offload.ops import of_kernels
from rheo_offload.selection.index import Groups


class SelectionLists:
    """What a selection is written to: the blocks, where they are, and the load list of those that are missing."""

    def __init__(self, rows: int, num_kv_heads: int, block_budget: int, device: torch.device) -> None:
        def ints(*shape: int) -> torch.Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        self.selected_blocks = ints(rows, num_kv_heads, block_budget)
        self.num_selected = ints(rows, num_kv_heads)
        self.hit_slots = ints(rows, num_kv_heads, block_budget)
        self.miss_slots = ints(rows, num_kv_heads, block_budget)
        self.load_src = ints(rows * num_kv_heads * block_budget)
        self.load_dst = ints(rows * num_kv_heads * block_budget)
        self.load_at = ints(rows * num_kv_heads * block_budget)
        self.load_count = torch.zeros(1, dtype=torch.int32, device=device)


class DecodeWorkspace(SelectionLists):
    """Scratch for one geometry: rows x KV heads x query heads x head dim, N blocks, S selected, groups opened or none.

    `out_parts` holds the estimated remainder first (`estimate_splits`, with `selection.remainder`), then the partials
    of the hits (`hit_splits`), then those of the loaded misses.
    """

    def __init__(
        self,
        *,
        rows: int,
        num_kv_heads: int,
        num_q_heads: int,
        head_dim: int,
        max_blocks: int,
        block_budget: int,
        block_bytes: int,
        summary_width: int,
        estimates: bool,
        device: torch.device,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(rows, num_kv_heads, block_budget, device)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.key = (num_kv_heads, num_q_heads, head_dim, max_blocks, block_budget, summary_width)
        self.groups = groups
        candidates = groups.candidates if groups else max_blocks
        self.logits = floats(rows, num_q_heads, candidates * max(summary_width, 1))
        self.arrivals = torch.zeros(rows, num_kv_heads, dtype=torch.int32, device=device)
        self.block_scores = floats(rows, num_kv_heads, candidates)
        if groups is not None:
            self.group_scores = floats(rows, num_kv_heads, 2, -(-max_blocks // groups.group_blocks))
            self.open_groups = torch.full(
                (rows, num_kv_heads, groups.listed), -1, dtype=torch.int32, device=device
            )
            self.num_open = torch.zeros(rows, num_kv_heads, dtype=torch.int32, device=device)
        heads = rows * num_kv_heads
        self.hit_splits: int = of_kernels("launch", "attend_splits")(heads, block_budget, device)
        self.estimate_splits: int = (
            of_kernels("launch", "estimate_splits")(heads, max_blocks, device) if estimates else 0
        )
        parts = self.estimate_splits + self.hit_splits
        parts += of_kernels("launch", "late_parts")(block_budget, block_bytes)
        self.out_parts = floats(parts, rows, num_q_heads, head_dim)
        self.lse_parts = floats(parts, rows, num_q_heads)
        self.lse = floats(rows, num_q_heads)

    @property
    def estimated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of the estimated remainder: out [T, B, Hq, D] and lse [T, B, Hq]."""
        return self.out_parts[: self.estimate_splits], self.lse_parts[: self.estimate_splits]

    @property
    def attended(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of what is attended to: those of the hits, then those of the loaded misses."""
        return self.out_parts[self.estimate_splits :], self.lse_parts[self.estimate_splits :]

    def lse_of_selected(self) -> torch.Tensor:
        """Return the lse [B, Hq] of the keys that were attended to, without what was estimated."""
        if not self.estimate_splits:
            return self.lse
        estimated = torch.logsumexp(self.estimated[1], 0)
        return self.lse + torch.log1p(-torch.exp(estimated - self.lse).clamp(max=1.0))

    def with_lists(self, selected_blocks: torch.Tensor, num_selected: torch.Tensor) -> "DecodeWorkspace":
        """Return this workspace with lists of its own, for layers whose selection outlives their turn."""
        other = copy.copy(self)
        other.selected_blocks, other.num_selected = selected_blocks, num_selected
        return other


class RingWorkspace:
    """Which block sits in each slot of a sliding layer's rings, refreshed once per step for all layers of a shape."""

    def __init__(
        self,
        *,
        rows: int,
        num_kv_heads: int,
        num_q_heads: int,
        head_dim: int,
        ring_blocks: int,
        device: torch.device,
    ) -> None:
        self.slots = torch.arange(rows * num_kv_heads * ring_blocks, dtype=torch.int32, device=device).view(
            rows, num_kv_heads, ring_blocks
        )
        self.index = torch.arange(ring_blocks, dtype=torch.int32, device=device)
        self.block_ids = torch.full_like(self.slots, -1)
        self.block_slots = torch.full_like(self.slots, -1)
        splits = of_kernels("launch", "attend_splits")(rows * num_kv_heads, ring_blocks, device)
        self.out_parts = torch.zeros(splits, rows, num_q_heads, head_dim, device=device)
        self.lse_parts = torch.zeros(splits, rows, num_q_heads, device=device)

    def refresh(self, seq_lens: torch.Tensor, block_size: int) -> None:
        """Compute the newest block whose number is congruent to each ring slot; -1 where there is none yet."""
        tail = ((seq_lens - 1) // block_size)[:, None, None]
        ids = tail - (tail - self.index) % self.index.numel()
        self.block_ids.copy_(ids.expand_as(self.block_ids))
        self.block_slots.copy_(torch.where(ids >= 0, self.slots, -1))


class RoundsWorkspace:
    """Dense attention in rounds: which blocks each round stages and where its partial goes."""

    def __init__(self, staging: torch.Tensor, *, num_q_heads: int, head_dim: int, max_blocks: int) -> None:
        """Args: staging [rows, Hkv, M, E]; M blocks are staged per round."""
        rows, heads, count, _ = staging.shape
        device = staging.device
        self.staging = staging
        self.slots = torch.arange(rows * heads * count, dtype=torch.int32, device=device).view(
            rows, heads, count
        )
        self.firsts = range(0, max_blocks, count)
        numbers = torch.arange(count, dtype=torch.int32, device=device).expand(rows, heads, count)
        self.block_ids = [(first + numbers).contiguous() for first in self.firsts]
        self.out_parts = torch.zeros(len(self.firsts), rows, num_q_heads, head_dim, device=device)
        self.lse_parts = torch.zeros(len(self.firsts), rows, num_q_heads, device=device)
