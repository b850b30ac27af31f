"""Block attention in Triton: the decode kernel, with a hole and a start in the cache."""

from torch import Tensor

from .decode_attention import decode_attention


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
    return decode_attention(
        *(q, k_cache, v_cache, k, v, mask),
        (causal, causal_tensor),
        (cache_seqlens, cache_seqlens_tensor),
        (replace_at, replace_at_tensor),
        (cache_starts, cache_starts_tensor),
        (1, None),
        block_table,
        (num_tokens, num_tokens_tensor),
        *(positions, softmax_scale, softcap, window_size, sinks),
        (k_scale, k_scale_tensor),
        (v_scale, v_scale_tensor),
        *(cu_seqlens_q, max_seqlen_q, return_lse),
        block=True,
    )
