"""The load list: copy missed blocks from the host to their pool slots."""

from torch import Tensor


def gather(
    load_src: Tensor,
    load_dst: Tensor,
    load_count: Tensor,
    host_blocks: Tensor,
    pool_blocks: Tensor,
    loaded_total: Tensor,
) -> None:
    """Copy host block `load_src[i]` to pool slot `load_dst[i]` for `i < load_count[0]`.

    Args:
        load_src: int32 [max_loads], `page * Hkv + head`; entries from `load_count` on may hold anything.
        load_dst: int32 [max_loads], slots, all different.
        load_count: int32 [1].
        host_blocks: [P, Hkv, E], host memory, a block contiguous.
        pool_blocks: [L, E], written in place.
        loaded_total: int64 [1], grows by `load_count`.
    """
    count, num_kv_heads = int(load_count[0]), host_blocks.shape[1]
    src = load_src[:count].long().to(host_blocks.device)
    blocks = host_blocks[src // num_kv_heads, src % num_kv_heads]
    pool_blocks[load_dst[:count].long()] = blocks.to(pool_blocks.device)
    loaded_total += count
