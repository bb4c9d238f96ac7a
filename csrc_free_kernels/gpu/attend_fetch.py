"""Attend to what is resident; fetch what is missing meanwhile, and attend to it where it arrives.

One launch. Its first programs work through the load list: each has the next blocks under way from pinned host memory
while it attends to those that came before, which are still in the L2 cache. So the link is busy from the first moment
to the last and nobody waits for all loads. The other programs attend to the hits. Two launches on two streams cost
3 to 8 us a layer more: in a graph the second branch of a fork starts that much later.
"""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.attend import (
    attend_ranks,
    attend_sizes,
    attend_split,
    load_q,
    rank_present,
    store_part,
)
from csrc_free_kernels.gpu.gather import as_words
from csrc_free_kernels.launch import launch_of
from csrc_free_kernels.reference.merge import blocks_per_part

FETCHERS = (
    48  # programs that load. A PCIe 5 x16 link needs that many while they attend as well; more get in the way
)
WORDS_PER_THREAD = (
    32  # 4-byte words under way in registers; 64 spill, and twice the bytes under way get in the way
)


# Attention over the loads of one (row, KV head) from rank `at % S` on, PER_PART at most, into the part they share.
@triton.jit
def attend_part(
    p_q, p_k, p_v, p_ids, p_late, p_seq_lens, p_parts, p_lse_parts, at, softmax_scale, soft_cap, window,
    p_bias, bias_scale, stride_bias,
    stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih, stride_nb, stride_nh, stride_pt, stride_pb,
    stride_ph, stride_lt, stride_lb, stride_lh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, PER_PART: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_bh, rank = (at // S).to(tl.int64), at % S
    i_b, i_h = i_bh // H_KV, i_bh % H_KV
    o_s = tl.arange(0, BLOCK_S)
    b_slots = tl.load(p_late + i_b * stride_nb + i_h * stride_nh + o_s, mask=o_s < S, other=-1)
    b_ids = tl.load(p_ids + i_b * stride_ib + i_h * stride_ih + o_s, mask=o_s < S, other=0)
    seq_len = tl.load(p_seq_lens + i_b)
    b_q = load_q(p_q, i_b, i_h, stride_qb, stride_qh, G, D, BLOCK_G, BLOCK_D, UPCAST_DOT)
    b_word, b_rank = rank_present(b_ids, b_slots)
    num_blocks = tl.minimum(tl.max(b_rank, 0) - rank, PER_PART)
    b_o, b_lse = attend_ranks(
        b_q, p_k, p_v, b_word, b_rank, rank, num_blocks, seq_len, softmax_scale, soft_cap, window,
        p_bias, bias_scale, stride_bias,
        stride_k, stride_v, D, C, BLOCK_G, BLOCK_D, BLOCK_C, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
    )  # fmt: skip
    i_part = (rank // PER_PART).to(tl.int64)
    p_own, p_own_lse = (
        p_parts + i_part * stride_pt + i_b * stride_pb,
        p_lse_parts + i_part * stride_lt + i_b * stride_lb,
    )
    store_part(p_own, p_own_lse, b_o, b_lse, i_h, stride_ph, stride_lh, G, D, BLOCK_G, BLOCK_D)


# Works through the load list with PROGRAMS programs, those loads together that share a part.
@triton.jit
def fetch(
    p_q, p_k, p_v, p_ids, p_late, p_seq_lens, load_src, load_dst, load_at, load_count, p_host, p_pool, loaded_total,
    p_parts, p_lse_parts, softmax_scale, soft_cap, window,
    p_bias, bias_scale, stride_bias, stride_page, stride_head, stride_slot,
    stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih, stride_nb, stride_nh, stride_pt, stride_pb,
    stride_ph, stride_lt, stride_lb, stride_lh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, PER_PART: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ALL_S: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
    WORDS: tl.constexpr, TILE: tl.constexpr, LOADS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    count = tl.load(load_count)
    if tl.program_id(0) == 0:
        tl.store(loaded_total, tl.load(loaded_total) + count)
    o_load = tl.arange(0, LOADS)
    o_word = tl.arange(0, TILE)
    before = tl.full((), -1, tl.int32)  # whose loads were copied in the round before; -1: nobody's
    for i in range(tl.program_id(0), count + PROGRAMS, PROGRAMS):
        at = tl.load(load_at + i, mask=i < count, other=-1)
        # every load of the list starts a part, or belongs to one that an earlier load started
        at = tl.where((at >= 0) & (at % S % PER_PART == 0), at, -1)
        i_load = i + o_load
        b_at = tl.load(load_at + i_load, mask=(at >= 0) & (i_load < count) & (o_load < PER_PART), other=-1)
        m_load = (b_at // S == at // S) & (b_at >= 0)
        b_src = tl.load(load_src + i_load, mask=m_load, other=0)
        b_slot = tl.load(load_dst + i_load, mask=m_load, other=0).to(tl.int64)
        o_src = (b_src // H_KV).to(tl.int64) * stride_page + (b_src % H_KV) * stride_head
        m_word = m_load[:, None] & (o_word < WORDS)[None, :]
        b_tile = tl.load(p_host + o_src[:, None] + o_word[None, :], mask=m_word, other=0)
        if before >= 0:
            attend_part(
                p_q, p_k, p_v, p_ids, p_late, p_seq_lens, p_parts, p_lse_parts, before, softmax_scale, soft_cap,
                window, p_bias, bias_scale, stride_bias,
                stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih, stride_nb, stride_nh,
                stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh,
                H_KV, G, D, C, S, PER_PART, BLOCK_G, BLOCK_D, BLOCK_C, ALL_S, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
            )  # fmt: skip
        tl.store(p_pool + (b_slot * stride_slot)[:, None] + o_word[None, :], b_tile, mask=m_word)
        for o_rest in range(TILE, WORDS, TILE):  # of blocks that registers do not hold at once
            m_word = m_load[:, None] & (o_rest + o_word < WORDS)[None, :]
            b_tile = tl.load(p_host + o_src[:, None] + (o_rest + o_word)[None, :], mask=m_word, other=0)
            tl.store(
                p_pool + (b_slot * stride_slot)[:, None] + (o_rest + o_word)[None, :], b_tile, mask=m_word
            )
        tl.debug_barrier()  # what other threads of this program copied is read next
        before = at


# Grid (PROGRAMS + B * Hkv * T,), T splits of the hits. Shapes as in the contract; p_host [P, Hkv, WORDS] and p_pool
# [L, WORDS] are the blocks as words.
@triton.jit
def attend_fetch_kernel(
    p_q, p_k, p_v, p_ids, p_hits, p_late, p_seq_lens, load_src, load_dst, load_at, load_count, p_host, p_pool,
    loaded_total, p_parts, p_lse_parts, softmax_scale, soft_cap, window, p_bias, bias_scale, stride_bias, num_heads,
    stride_page, stride_head, stride_slot, stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih,
    stride_sb, stride_sh, stride_nb, stride_nh, stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    PER_PART: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, ALL_S: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
    WORDS: tl.constexpr, TILE: tl.constexpr, LOADS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < PROGRAMS:
        fetch(
            p_q, p_k, p_v, p_ids, p_late, p_seq_lens, load_src, load_dst, load_at, load_count, p_host, p_pool,
            loaded_total, p_parts + T * stride_pt, p_lse_parts + T * stride_lt, softmax_scale, soft_cap, window,
            p_bias, bias_scale, stride_bias,
            stride_page, stride_head, stride_slot, stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih,
            stride_nb, stride_nh, stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh,
            H_KV, G, D, C, S, PER_PART, BLOCK_G, BLOCK_D, BLOCK_C, ALL_S, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
            WORDS, TILE, LOADS, PROGRAMS,
        )  # fmt: skip
    else:
        i_program = tl.program_id(0) - PROGRAMS
        i_bh, i_t = (i_program % num_heads).to(tl.int64), i_program // num_heads
        i_b, i_h = i_bh // H_KV, i_bh % H_KV
        b_o, b_lse = attend_split(
            p_q, p_k, p_v, p_ids + i_b * stride_ib + i_h * stride_ih, p_hits + i_b * stride_sb + i_h * stride_sh,
            p_seq_lens, softmax_scale, soft_cap, window,
            p_bias, bias_scale, stride_bias, i_b, i_h, i_t, stride_qb, stride_qh, stride_k, stride_v,
            G, D, C, S, T, BLOCK_G, BLOCK_D, BLOCK_C, BLOCK_S, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
        )  # fmt: skip
        p_parts += i_t.to(tl.int64) * stride_pt + i_b * stride_pb
        p_lse_parts += i_t.to(tl.int64) * stride_lt + i_b * stride_lb
        store_part(p_parts, p_lse_parts, b_o, b_lse, i_h, stride_ph, stride_lh, G, D, BLOCK_G, BLOCK_D)


def attend_fetch(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    hit_slots: Tensor,
    late_slots: Tensor,
    seq_lens: Tensor,
    load_src: Tensor,
    load_dst: Tensor,
    load_at: Tensor,
    load_count: Tensor,
    host_blocks: Tensor,
    pool_blocks: Tensor,
    loaded_total: Tensor,
    splits: int,
    out_parts: Tensor,
    lse_parts: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias_pool: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Attend to the hits, copy the listed blocks to their slots, attend to them; `merge` joins the parts.

    Arguments as in `csrc_free_kernels/reference/attend_fetch.py`; `host_blocks` is pinned, its blocks a multiple of
    4 bytes, the last dim of q and out_parts is contiguous, as is the load list. One launch of a fixed grid on the
    current stream, no wait; the count is read on the device.
    """
    rows, num_kv_heads, width = block_ids.shape
    heads, host, pool = rows * num_kv_heads, as_words(host_blocks), as_words(pool_blocks)
    words, per_part = host.shape[2], blocks_per_part(width, len(out_parts) - splits)
    fetchers = launch_of("attend_fetch", q.device, heads).get("fetchers", FETCHERS)
    loads, sizes = triton.next_power_of_2(per_part), attend_sizes(q, k_pool, block_ids, splits)
    held = max(32, WORDS_PER_THREAD * 32 * sizes["num_warps"] // loads)
    attend_fetch_kernel[(fetchers + heads * splits,)](
        q, k_pool, v_pool, block_ids, hit_slots, late_slots, seq_lens, load_src, load_dst, load_at, load_count,
        host, pool, loaded_total, out_parts, lse_parts,
        softmax_scale, 1.0 if soft_cap is None else soft_cap, 0 if window is None else window,
        bias_pool, bias_scale, 0 if bias_pool is None else bias_pool.stride(0), heads,
        host.stride(0), host.stride(1), pool.stride(0), *q.stride()[:2], k_pool.stride(0), v_pool.stride(0),
        *block_ids.stride()[:2], *hit_slots.stride()[:2], *late_slots.stride()[:2], *out_parts.stride()[:3],
        *lse_parts.stride(), **sizes, PER_PART=per_part, ALL_S=triton.next_power_of_2(width), WORDS=words,
        TILE=min(held, triton.next_power_of_2(words)), LOADS=loads, PROGRAMS=fetchers,
        HAS_CAP=soft_cap is not None, HAS_WINDOW=window is not None, HAS_BIAS=bias_pool is not None,
    )  # fmt: skip
