"""Block attention: a bidirectional block over a cached context, with a hole where it is replaced.

Fast-dLLM (Wu et al., 2025, arXiv 2505.22618, section 3.2, the dual cache): the block's fresh K/V
stand in for the stale ones at its place, and prefix and suffix are read from the cache.
"""

import torch
from torch import Tensor

from .attention import (
    Context,
    attend_cached,
    cache_of,
    lengths_of,
    local_mask,
    pad_packed,
    unpad_packed,
)
from .numbers import per_request


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    causal_tensor: Tensor | None,
    cache_seqlens: int,
    cache_seqlens_tensor: Tensor | None,
    replace_at: int,
    replace_at_tensor: Tensor | None,
    cache_starts: int,
    cache_starts_tensor: Tensor | None,
    block_table: Tensor | None,
    num_tokens: int,
    num_tokens_tensor: Tensor | None,
    positions: Tensor | None,
    softmax_scale: float,
    softcap: float,
    window_size: int,
    sinks: Tensor | None,
    k_scale: float,
    k_scale_tensor: Tensor | None,
    v_scale: float,
    v_scale_tensor: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, L, Hq, D] -> out [B, L, Hq, Dv], lse [B, Hq, L]; packed q [total, Hq, D] likewise."""
    total, ragged = q.shape[0], num_tokens_tensor is not None
    if cu_seqlens_q is not None:  # the padded batch whose num_tokens are the lengths
        num_tokens_tensor, ragged = lengths_of(cu_seqlens_q, total, max_seqlen_q), True
    q, k, v, mask, positions = pad_packed(cu_seqlens_q, max_seqlen_q, q, k, v, mask, positions)
    B, L = q.shape[:2]
    count = per_request(num_tokens, num_tokens_tensor, B, q, torch.int64)
    is_causal = per_request(causal, causal_tensor, B, q, torch.bool)
    context, start = block_context(
        per_request(cache_seqlens, cache_seqlens_tensor, B, q, torch.int64),
        per_request(replace_at, replace_at_tensor, B, q, torch.int64),
        per_request(cache_starts, cache_starts_tensor, B, q, torch.int64),
        count,
        is_causal,
        torch.arange(L, device=q.device),
        positions,
        window_size,
    )
    out, lse = attend_cached(
        q,
        cache_of(
            *(k_cache, v_cache, block_table, B),
            *(k_scale, k_scale_tensor, v_scale, v_scale_tensor),
        ),
        k,
        v,
        context,
        local_mask(mask, is_causal, torch.arange(L, device=q.device)),
        torch.arange(L, device=q.device) < count[:, None] if ragged or num_tokens < L else None,
        rows_at=start,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
    )
    return unpad_packed(cu_seqlens_q, total, return_lse, out, lse)


def block_context(
    length: Tensor,
    replace_at: Tensor,
    cache_start: Tensor,
    count: Tensor,
    causal: Tensor,
    i: Tensor,
    positions: Tensor | None,
    window_size: int,
) -> tuple[Context, Tensor]:
    """What the rows of a block see of the cache, and where the block starts, [B].

    All [B], but i [N], a row's place in its block, and positions [B, N] or None. A bidirectional
    block sees [cache_start, length) without the hole [start, start + count), with a window only
    [start - window_size, start) of it; a causal one nothing at or past its start.
    """
    B, N = length.shape[0], i.shape[0]
    start = torch.where(replace_at >= 0, replace_at, length)
    before = causal | (window_size >= 0)
    stop = torch.where(before, torch.minimum(length, start), length)
    lowest = None
    if window_size >= 0:
        if positions is not None:
            lowest = positions.long() - window_size + 1
        else:
            row = torch.where(causal[:, None], i + 1, 0)
            lowest = start[:, None] + row - window_size
        lowest = lowest.expand(B, N)
    return Context(stop, cache_start, start, start + count, lowest), start
