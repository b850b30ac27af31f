"""Branch attention: K candidate blocks over one cached context, blind to each other.

Self Speculative Decoding (SSD, arXiv 2510.04147) and FreeDave verify several future states of a
block in one forward: prefix and suffix are shared, and each state is a block of its own.
"""

import torch
from torch import Tensor

from .attention import attend_cached, cache_of
from .block_attention import block_context
from .numbers import per_request


def branch_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    causal_tensor: Tensor | None,
    cache_seqlens: int,
    cache_seqlens_tensor: Tensor | None,
    replace_at: int,
    replace_at_tensor: Tensor | None,
    cache_starts: int,
    cache_starts_tensor: Tensor | None,
    num_branches: int,
    num_branches_tensor: Tensor | None,
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
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, K, L, Hq, D] -> out [B, K, L, Hq, Dv], lse [B, K, Hq, L]: one block of K * L rows."""
    B, K, L, Hq, _ = q.shape
    row = torch.arange(K * L, device=q.device)
    branch, i = row // max(L, 1), row % max(L, 1)
    count = per_request(num_tokens, num_tokens_tensor, B, q, torch.int64)
    branches = per_request(num_branches, num_branches_tensor, B, q, torch.int64)
    is_causal = per_request(causal, causal_tensor, B, q, torch.bool)
    context, start = block_context(
        per_request(cache_seqlens, cache_seqlens_tensor, B, q, torch.int64),
        per_request(replace_at, replace_at_tensor, B, q, torch.int64),
        per_request(cache_starts, cache_starts_tensor, B, q, torch.int64),
        count,
        is_causal,
        i,
        None if positions is None else positions.expand(B, K, L).reshape(B, K * L),
        window_size,
    )
    out, lse = attend_cached(
        q.reshape(B, K * L, Hq, q.shape[-1]),
        cache_of(
            *(k_cache, v_cache, block_table, B),
            *(k_scale, k_scale_tensor, v_scale, v_scale_tensor),
        ),
        k.reshape(B, K * L, *k.shape[3:]),
        v.reshape(B, K * L, *v.shape[3:]),
        context,
        (branch[:, None] == branch) & (~is_causal[:, None, None] | (i[:, None] >= i)),
        (branch < branches[:, None]) & (i < count[:, None]),
        rows_at=start,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
    )
    out = out.view(B, K, L, Hq, v.shape[-1])
    if not return_lse:
        return out, lse.new_empty(0)
    lse = lse.view(B, Hq, K, L).transpose(1, 2)
    return out, lse.clone(memory_format=torch.contiguous_format)
