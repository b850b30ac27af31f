"""Writes the rows' K/V into their cache slots: rotate (RoPE), divide by the scale, scatter.

RoPE: Su et al., "RoFormer" (2021), section 3.4.2: the pair (x1, x2) turned by its angle is
(x1 cos - x2 sin, x1 sin + x2 cos).
"""

import torch
from torch import Tensor

from .attention import scale_argument
from .memo import remember_last
from .numbers import compute_dtype
from .slots import Writes, plan_writes, slots_of, write


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    q: Tensor | None,
    k_scale: float,
    k_scale_tensor: Tensor | None,
    v_scale: float,
    v_scale_tensor: Tensor | None,
) -> Tensor:
    """k, v [B, N, Hkv, D] into positions [B, N]; returns q [B, N, Hq, D] rotated, or size 0."""
    B, N, Hkv, _ = k.shape
    rotated = k
    q_out = k.new_empty(0) if q is None else q.clone(memory_format=torch.contiguous_format)
    if cos is not None and sin is not None:
        rotated = rotate(k, cos, sin, interleaved)
        if q is not None:
            q_out = rotate(q, cos, sin, interleaved).to(q.dtype)
    if B * N == 0 or k_cache.shape[0] * k_cache.shape[1] == 0:
        return q_out

    writes = writes_of(positions, block_table, *k_cache.shape[:2])
    k_rows = encode(rotated, scale_argument(k_scale, k_scale_tensor, B, Hkv), k_cache.dtype)
    v_rows = encode(v, scale_argument(v_scale, v_scale_tensor, B, Hkv), v_cache.dtype)
    write(k_cache, writes, k_rows.flatten(0, 1))
    write(v_cache, writes, v_rows.flatten(0, 1))
    return q_out


@remember_last
def writes_of(
    positions: Tensor, block_table: Tensor | None, num_pages: int, page_size: int
) -> Writes:
    """Which row goes to which slot: the same for all layers of a forward pass."""
    return plan_writes(slots_of(positions, block_table, num_pages, page_size), page_size)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first R dims of x [B, N, H, D] by cos, sin [B, N, R/2], in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    x, cos, sin = x.to(dtype), cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]
    R = 2 * cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    if interleaved:  # pairs (2i, 2i + 1)
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
    else:  # pairs (i, i + R/2)
        x1, x2 = turned.chunk(2, -1) if R else (turned, turned)
    pair = (x1 * cos - x2 * sin, x1 * sin + x2 * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)


def encode(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """x / scale in the cache's dtype; fp8 saturates to its largest finite value, NaN stays."""
    if isinstance(scale, Tensor):
        x = x.to(compute_dtype(x.dtype)) / scale[:, None, :, None]
    elif scale != 1.0:
        x = x.to(compute_dtype(x.dtype)) / scale
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.to(compute_dtype(x.dtype)).clamp(-largest, largest)
    return x.to(dtype)
