"""Branch attention in Triton: the decode kernel, whose rows see their own branch alone."""

from torch import Tensor

from .decode_attention import decode_attention


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
    """q [B, K, L, Hq, D] -> out [B, K, L, Hq, Dv], lse [B, K, Hq, L]."""
    return decode_attention(
        *(q, k_cache, v_cache, k, v),
        None,
        (causal, causal_tensor),
        (cache_seqlens, cache_seqlens_tensor),
        (replace_at, replace_at_tensor),
        (cache_starts, cache_starts_tensor),
        (num_branches, num_branches_tensor),
        block_table,
        (num_tokens, num_tokens_tensor),
        *(positions, softmax_scale, softcap, window_size, sinks),
        (k_scale, k_scale_tensor),
        (v_scale, v_scale_tensor),
        *(None, 0, return_lse),
        block=True,
    )
