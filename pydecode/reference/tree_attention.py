"""Tree attention: rows in flight see the whole context and, among themselves, what the mask says.

SpecInfer (Miao et al., ASPLOS 2024, section 4.2) and Medusa (Cai et al., ICML 2024, section 2.2):
out_i = softmax(q_i [K_context, K_rows : mask_i]^T) [V_context, V_rows].
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


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    causal: bool,
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
    max_seqlen_q: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, N, Hq, D] -> out [B, N, Hq, Dv], lse [B, Hq, N]; packed q [total, Hq, D] likewise."""
    total, ragged = q.shape[0], num_tokens_tensor is not None
    if cu_seqlens_q is not None:  # the padded batch whose num_tokens are the lengths
        num_tokens_tensor, ragged = lengths_of(cu_seqlens_q, total, max_seqlen_q), True
    q, k, v, mask, positions = pad_packed(cu_seqlens_q, max_seqlen_q, q, k, v, mask, positions)
    B, N = q.shape[:2]
    length = per_request(cache_seqlens, cache_seqlens_tensor, B, q, torch.int64)
    i = torch.arange(N, device=q.device)
    valid = None
    if ragged or num_tokens < N:
        valid = i < per_request(num_tokens, num_tokens_tensor, B, q, torch.int64)[:, None]
    local = local_mask(mask, causal, i)

    # the window: row i sees cached keys at positions > position(i) - window_size
    lowest = None
    if window_size >= 0:
        if positions is not None:
            at = positions.long()
        elif mask is not None:  # ancestors: the rows that row i sees, less itself
            seen = local if valid is None else local & valid[:, None]
            at = length[:, None] + seen.sum(-1) - seen.diagonal(dim1=-2, dim2=-1).long()
        else:
            at = length[:, None] + (i if causal else torch.zeros_like(i))
        lowest = (at - window_size + 1).expand(B, N)

    out, lse = attend_cached(
        q,
        cache_of(
            *(k_cache, v_cache, block_table, B),
            *(k_scale, k_scale_tensor, v_scale, v_scale_tensor),
        ),
        k,
        v,
        Context(stop=length, lowest=lowest),
        local,
        valid,
        rows_at=length,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
    )
    return unpad_packed(cu_seqlens_q, total, return_lse, out, lse)
