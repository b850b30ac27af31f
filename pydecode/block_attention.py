"""Block attention over a block KV-cache: the public function, its checks and its binding."""

from typing import Any

from torch import Tensor

from . import attention_arguments as arguments
from . import attention_data as data
from . import binding
from .backends import choose, triton_kernels, unavailable
from .reference import block_attention as reference
from .replay import replayed
from .validation import checking

HAS = ("reference", "triton")


@replayed
def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    replace_at: int | Tensor | None = None,
    cache_starts: int | Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | Tensor | None = None,
    block_table: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_size: int | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a bidirectional block of L rows over a block KV-cache.

    **The cache is never written**, unlike in ``flash_attn_with_kvcache``: ``write_kv`` does that.

    Row i sees the cached positions [cache_starts, cache_seqlens) less the hole
    [replace_at, replace_at + L), and the block itself:
    ``out_i = softmax(scale * q_i [K_prefix, K_suffix, K_block]^T) [V_prefix, V_suffix, V_block]``
    (the dual cache of Fast-dLLM, Wu et al., 2025, arXiv 2505.22618, section 3.2: fresh k and v
    stand in for the stale ones without a copy). The block starts at ``replace_at``, or at
    ``cache_seqlens`` without a hole. A causal request (one that commits) sees of the cache only
    what lies before the block's start, and of the block only rows <= i.

    Args:
        q: [B, L, Hq, D], fp16, bf16, fp32 or fp64; L up to 1024. Packed: [total, Hq, D].
        k_cache: [num_pages, page_size, Hkv, D] with a ``block_table``, else [B, S, Hkv, D]; q's
            dtype, or fp8 e4m3/e5m2 with scales. Any strides but the last (HND is a view).
        v_cache: the same with head dim Dv, which may differ from D.
        k, v: [B, L, Hkv, D] and [B, L, Hkv, Dv], the block's own keys and values, never scaled;
            None: they already lie in the cache from the block's start on, and are read there once.
        cache_seqlens: int or [B] int32/int64, cached lengths. None: the whole cache (then k and v
            or ``replace_at`` must be given).
        replace_at: int or [B], where the block stands in for cached keys; a negative entry or
            None: no hole. The hole is clipped to the cache; in a ragged or packed batch it is as
            wide as the request's own number of valid rows.
        cache_starts: int or [B], first cached position that is seen (left padding).
        mask: packed int64 [B|1, L, ceil(L/64)] (bit j of row i: i sees row j), or bool [B|1, L, L],
            or None (all rows of the block see each other). Packed batch:
            [total, ceil(max_seqlen_q/64)], or bool [total, max_seqlen_q]. Not with ``causal``.
        causal: bool, or bool 0-d or [B]: which requests are causal.
        block_table: [B, max_pages] int32/int64. A page id outside the pool contributes nothing.
        num_tokens: int or [B], valid rows of a ragged batch; later rows are seen by nobody and
            give out 0, lse -inf.
        positions: [B, L] (packed: [total]), absolute positions, for the window only.
        softmax_scale: default D**-0.5. softcap: s <- softcap * tanh(s / softcap); 0: none.
        window_size: W >= 1: a bidirectional block sees cached keys in [start - W, start), none
            after it, and all of itself; a causal row i cached keys at positions > start + i - W.
            With ``positions``, row i of either sees cached keys at positions > positions[b,i] - W
            and below start.
        sinks: [Hq], a logit a head added to the denominator (after softcap) and to lse.
        k_scale, v_scale: number or fp32 0-d, [Hkv] or [B, Hkv]: value = stored * scale.
        cu_seqlens_q: [B+1] int32/int64 and ``max_seqlen_q``: a packed batch.
        out: the result goes here, and is returned.

    Returns:
        out [B, L, Hq, Dv] in q's dtype (packed [total, Hq, Dv]); with ``return_lse`` also lse
        [B, Hq, L] (packed [Hq, total]), natural log, fp32 (fp64 for fp64 inputs). A row that sees
        no key gives 0 and -inf (with sinks: lse = sink).

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or number that does not fit.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> q, kv = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 2, 16)
    >>> cache = torch.randn(1, 32, 2, 16)
    >>> out = pydecode.block_attention(q, cache, cache, kv, kv, cache_seqlens=32, replace_at=8)
    >>> written = cache.clone()
    >>> written[:, 8:12] = kv  # what the hole saves
    >>> torch.allclose(out, pydecode.block_attention(q, written, written, replace_at=8), atol=1e-5)
    True
    """
    rows = arguments.rows_over_cache(
        q, k_cache, v_cache, k, v, block_table, cu_seqlens_q, max_seqlen_q
    )
    q, k_cache, v_cache, k, v, sizes = rows
    if k is None and cache_seqlens is None and replace_at is None:
        raise ValueError(
            "cache_seqlens: expected lengths when k, v and replace_at are None, got None"
        )
    if isinstance(mask, str):
        raise ValueError(f"mask: expected a tensor or None (see causal=True), got {mask!r}")
    packed = arguments.packed_mask(mask, sizes, q.device)[0]
    causal_pair = arguments.causal_of(causal, sizes.B, q.device)
    if packed is not None and (causal_pair[0] or causal_pair[1] is not None):
        raise ValueError("mask, causal: expected at most one of them, got both")
    arguments.expect_positions(positions, sizes, q.device)
    place = arguments.block_place(cache_seqlens, replace_at, cache_starts, sizes, q.device)
    tail = arguments.tail(
        *(sizes, q.device, num_tokens, positions, softmax_scale, softcap, window_size, sinks),
        *(k_scale, v_scale),
    )
    if checking():
        data.check_context_data(rows, block_table, tail[:2], *place, cu_seqlens_q=cu_seqlens_q)
    args = (
        *(q, k_cache, v_cache, k, v, packed, *causal_pair),
        *(*place[0], *place[1], *place[2], block_table, *tail),
        *(cu_seqlens_q, max_seqlen_q or 0, return_lse),
        choose("block_attention", backend, HAS, q, sizes.D, sizes.Dv),
    )
    return arguments.deliver(_op, _op_out, _run, args, sizes.Dv, out, return_lse)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.block_attention(*args)
    if backend == "triton":
        return triton_kernels("block_attention").block_attention(*args)
    raise unavailable("block_attention", backend, HAS)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return arguments.fake_outputs(q, v_cache.shape[-1], return_lse=args[-2])


_op = binding.bind("block_attention", _run, _fake)
_op_out = binding.bind_out("block_attention", arguments.run_into(_run))
