"""Tree attention in Triton: the decode kernel, with a tree's context."""

from torch import Tensor

from .decode_attention import decode_attention


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
    return decode_attention(
        *(q, k_cache, v_cache, k, v, mask),
        (causal, None),
        (cache_seqlens, cache_seqlens_tensor),
        *((-1, None), (0, None), (1, None)),  # no hole, no start, no branches
        block_table,
        (num_tokens, num_tokens_tensor),
        *(positions, softmax_scale, softcap, window_size, sinks),
        (k_scale, k_scale_tensor),
        (v_scale, v_scale_tensor),
        *(cu_seqlens_q, max_seqlen_q, return_lse),
        block=False,
    )
