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
from .memo import remember_last
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
    context, local, valid = rows_and_context(
        *(B, N, q.device, mask, causal, cache_seqlens, cache_seqlens_tensor, num_tokens),
        *(num_tokens_tensor, ragged, positions, window_size),
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
        local,
        valid,
        rows_at=context.stop,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
    )
    return unpad_packed(cu_seqlens_q, total, return_lse, out, lse)


@remember_last
def rows_and_context(
    B: int,
    N: int,
    device: torch.device,
    mask: Tensor | None,
    causal: bool,
    cache_seqlens: int,
    cache_seqlens_tensor: Tensor | None,
    num_tokens: int,
    num_tokens_tensor: Tensor | None,
    ragged: bool,
    positions: Tensor | None,
    window_size: int,
) -> tuple[Context, Tensor, Tensor | None]:
    """The context, who sees whom among the rows [B|1, N, N], and which rows are valid [B, N]."""
    length = per_request(cache_seqlens, cache_seqlens_tensor, B, device, torch.int64)
    i = torch.arange(N, device=device)
    valid = None
    if ragged or num_tokens < N:
        valid = i < per_request(num_tokens, num_tokens_tensor, B, device, torch.int64)[:, None]
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
    return Context(stop=length, lowest=lowest), local, valid
