"""Ranked attention: a query sees a key iff the key's rank is at most its own.

One rule for prefill and cross attention: causal, block-causal (BD3-LM, Arriola et al., ICLR 2025,
section 3.2), bidirectional, padded, and visual groups and wavefronts are all tensors of ranks.
What no ranks can say, a mask says beside them.
"""

import torch
from torch import Tensor

from .attention import (
    attend,
    cache_of,
    context_pages,
    lengths_of,
    locate,
    pad_packed,
    read_context,
    scaled,
    unpack_mask,
    unpad_packed,
)
from .numbers import compute_dtype, per_request

PAD = 2**31 - 1  # the rank of padding
CHUNK = 512  # queries at a time, which bounds the matrix of scores


def ranked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rank: Tensor,
    k_rank: Tensor,
    mask: Tensor | None,
    strict: bool,
    cache_seqlens: int,
    cache_seqlens_tensor: Tensor | None,
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
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, Hq, D] -> out [B, Nq, Hq, Dv], lse [B, Hq, Nq]; or packed, [total, Hq, D]."""
    total = q.shape[0]
    if cu_seqlens_q is not None:  # the padded batch whose num_tokens are the lengths
        num_tokens_tensor = lengths_of(cu_seqlens_q, total, max_seqlen_q)
    if cu_seqlens_k is not None:
        cache_seqlens_tensor = lengths_of(cu_seqlens_k, k.shape[0], max_seqlen_k)
    q, q_rank, mask, positions = pad_packed(cu_seqlens_q, max_seqlen_q, q, q_rank, mask, positions)
    k, v, k_rank = pad_packed(cu_seqlens_k, max_seqlen_k, k, v, k_rank)
    B, Nq, Hq, _ = q.shape
    Nk = k_rank.shape[-1]
    q_rank, k_rank = q_rank.expand(B, Nq), k_rank.expand(B, Nk)
    queries = per_request(num_tokens, num_tokens_tensor, B, q, torch.int64).clamp(0, Nq)
    keys = per_request(cache_seqlens, cache_seqlens_tensor, B, q, torch.int64).clamp(0, Nk)
    row = torch.arange(Nq, device=q.device)
    if positions is None:  # the last query is at the last key
        positions = row + (keys - queries)[:, None]
    cache = cache_of(
        *(k, v, block_table, B),
        *(k_scale, k_scale_tensor, v_scale, v_scale_tensor),
    )

    dtype = compute_dtype(q.dtype)
    out = q.new_zeros(B, Nq, Hq, v.shape[-1])
    lse = q.new_full((B, Hq, Nq if return_lse else 0), -torch.inf, dtype=dtype)
    on_cpu = q.device.type == "cpu"
    for b in range(B):
        # on the CPU the lengths are free to read, so only valid queries and keys are touched
        m, n = (int(queries[b]), int(keys[b])) if on_cpu else (Nq, Nk)
        j = torch.arange(n, device=q.device)
        page = context_pages(n, b, block_table, *k.shape[:2])
        k_b = scaled(read_context(k, b, n, page).to(dtype), cache.k_scale, b, n)
        v_b = scaled(read_context(v, b, n, page).to(dtype), cache.v_scale, b, n)
        _, _, mapped = locate(j, b, block_table, *k.shape[:2])
        real = mapped & (j < keys[b])
        mask_b = None if mask is None else mask[b if mask.shape[0] > 1 else 0]
        for first in range(0, m, CHUNK):
            i = slice(first, min(first + CHUNK, m))
            rank_i, rank_j = q_rank[b, i, None], k_rank[b, :n]
            valid = (row[i] < queries[b]) & (q_rank[b, i] != PAD)
            sees = real & valid[:, None] & ((rank_j < rank_i) if strict else (rank_j <= rank_i))
            if mask_b is not None:
                bits = mask_b.dtype != torch.bool
                sees = sees & (unpack_mask(mask_b[i], n) if bits else mask_b[i, :n])
            if window_size >= 0:
                sees = sees & (j > positions[b, i, None].long() - window_size)
            out_i, lse_i = attend(
                q[b, i].to(dtype).transpose(0, 1),
                k_b.transpose(0, 1),
                v_b.transpose(0, 1),
                None if on_cpu and bool(sees.all()) else sees,
                softmax_scale=softmax_scale,
                softcap=softcap,
                sinks=sinks,
                return_lse=return_lse,
            )
            out[b, i] = torch.where(valid[:, None], out_i, 0.0).transpose(0, 1).to(q.dtype)
            if lse_i is not None:
                lse[b, :, i] = torch.where(valid, lse_i, -torch.inf)
    return unpad_packed(cu_seqlens_q, total, return_lse, out, lse)
