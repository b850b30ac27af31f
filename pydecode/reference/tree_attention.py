"""Tree attention: rows in flight see the whole context and, among themselves, what the mask says.

SpecInfer (Miao et al., ASPLOS 2024, section 4.2) and Medusa (Cai et al., ICML 2024, section 2.2):
out_i = softmax(q_i [K_context, K_rows : mask_i]^T) [V_context, V_rows].
"""

import torch
from torch import Tensor

from .attention import (
    Cache,
    Context,
    attend_cached,
    lengths_of,
    pad_packed,
    scale_argument,
    unpack_mask,
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
    """q [B, N, Hq, D] -> out [B, N, Hq, Dv], lse [B, Hq, N]; or packed, see ``_packed``."""
    if cu_seqlens_q is not None:
        return _packed(
            *(q, k_cache, v_cache, k, v, mask, causal, cache_seqlens, cache_seqlens_tensor),
            *(block_table, positions, softmax_scale, softcap, window_size, sinks),
            *(k_scale, k_scale_tensor, v_scale, v_scale_tensor, cu_seqlens_q, max_seqlen_q),
            return_lse,
        )
    B, N = q.shape[:2]
    Hkv = k_cache.shape[2]
    cache = Cache(
        k_cache,
        v_cache,
        block_table,
        scale_argument(k_scale, k_scale_tensor, B, Hkv),
        scale_argument(v_scale, v_scale_tensor, B, Hkv),
    )
    length = per_request(cache_seqlens, cache_seqlens_tensor, B, q, torch.int64)
    count = per_request(num_tokens, num_tokens_tensor, B, q, torch.int64)
    i = torch.arange(N, device=q.device)
    if mask is not None:
        local = unpack_mask(mask, N)
    else:
        local = (i[:, None] >= i if causal else torch.ones_like(i[:, None] >= i))[None]

    # the window: row i sees cached keys at positions > position(i) - window_size
    lowest = None
    if window_size >= 0:
        if positions is not None:
            at = positions.long()
        elif mask is not None:  # ancestors: the rows that row i sees, less itself
            at = length[:, None] + local.sum(-1) - local.diagonal(dim1=-2, dim2=-1).long()
        else:
            at = length[:, None] + (i if causal else torch.zeros_like(i))
        lowest = (at - window_size + 1).expand(B, N)

    ragged = num_tokens_tensor is not None or num_tokens < N
    out, lse = attend_cached(
        q,
        cache,
        k,
        v,
        Context(stop=length.clamp(max=cache.capacity), lowest=lowest),
        local,
        i < count[:, None] if ragged else None,
        rows_at=length,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
    )
    return out, lse if return_lse else lse.new_empty(0)


def _packed(
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
    positions: Tensor | None,
    softmax_scale: float,
    softcap: float,
    window_size: int,
    sinks: Tensor | None,
    k_scale: float,
    k_scale_tensor: Tensor | None,
    v_scale: float,
    v_scale_tensor: Tensor | None,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """A packed batch is the padded batch whose num_tokens are the lengths: q [total, Hq, D]."""
    total = q.shape[0]

    def pad(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad_packed(x, cu_seqlens_q, max_seqlen_q)

    out, lse = tree_attention(
        pad_packed(q, cu_seqlens_q, max_seqlen_q),
        k_cache,
        v_cache,
        pad(k),
        pad(v),
        pad(mask),
        causal,
        cache_seqlens,
        cache_seqlens_tensor,
        block_table,
        0,
        lengths_of(cu_seqlens_q, max_seqlen_q),
        pad(positions),
        softmax_scale,
        softcap,
        window_size,
        sinks,
        k_scale,
        k_scale_tensor,
        v_scale,
        v_scale_tensor,
        None,
        0,
        True,
    )
    out = unpad_packed(out, cu_seqlens_q, total, 0.0)
    if not return_lse:
        return out, lse.new_empty(0)
    return out, unpad_packed(lse.transpose(1, 2), cu_seqlens_q, total, -torch.inf).mT.contiguous()
