"""Tree attention over a cached context: the public function, its checks and its binding."""

from typing import Any

from torch import Tensor

from . import attention_arguments as arguments
from . import attention_data as data
from . import binding
from .backends import choose, triton_kernels, unavailable
from .reference import tree_attention as reference
from .replay import replayed
from .validation import checking

HAS = ("reference", "triton")


@replayed
def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: Tensor | str | None = None,
    cache_seqlens: int | Tensor | None = None,
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
    """Attention of N rows in flight (a draft tree, chain or window) over a cached context.

    **The cache is never written**, unlike in ``flash_attn_with_kvcache``: ``write_kv`` does that.

    Row i sees every cached key of its request and, among the rows in flight, those that ``mask``
    says: ``out_i = softmax(scale * q_i [K_cache, K_{j : mask_ij}]^T) [V_cache, V_j]``
    (SpecInfer, Miao et al., ASPLOS 2024, section 4.2; Medusa, Cai et al., ICML 2024, section 2.2).

    Args:
        q: [B, N, Hq, D], fp16, bf16, fp32 or fp64; N up to 1024. Packed: [total, Hq, D].
        k_cache: [num_pages, page_size, Hkv, D] with a ``block_table``, else [B, S, Hkv, D]; q's
            dtype, or fp8 e4m3/e5m2 with scales. Any strides but the last (HND is a view).
        v_cache: the same with head dim Dv, which may differ from D.
        k, v: [B, N, Hkv, D] and [B, N, Hkv, Dv], the rows' own keys and values, never scaled;
            None: they already lie in the cache at ``cache_seqlens[b] + i``. A place outside the
            cache is seen by nobody; before its start, too, so that with more rows than keys
            ``keys - rows`` is the right length.
        mask: packed int64 [B|1, N, ceil(N/64)] (bit j of row i: i sees row j; see ``trees``), or
            bool [B|1, N, N], or "causal", or None (all rows see each other). Packed batch:
            [total, ceil(max_seqlen_q/64)], or bool [total, max_seqlen_q].
        cache_seqlens: int or [B] int32/int64, context lengths without the rows in flight.
            None: the whole cache (then k and v must be given).
        block_table: [B, max_pages] int32/int64. A page id outside the pool contributes nothing.
        num_tokens: int or [B], valid rows of a ragged batch; later rows are seen by nobody and
            give out 0, lse -inf.
        positions: [B, N] (packed: [total]), absolute positions, for the window only.
        softmax_scale: default D**-0.5. softcap: s <- softcap * tanh(s / softcap); 0: none.
        window_size: W >= 1: row i sees cached keys at positions > position(i) - W, where
            position(i) is ``positions`` or cache_seqlens[b] + (i if causal, the number of i's
            ancestors for a mask, 0 for None). Among rows in flight the mask alone decides.
        sinks: [Hq], a logit a head added to the denominator (after softcap) and to lse.
        k_scale, v_scale: number or fp32 0-d, [Hkv] or [B, Hkv]: value = stored * scale.
        cu_seqlens_q: [B+1] int32/int64 and ``max_seqlen_q``: a packed batch.
        out: the result goes here, and is returned.

    Returns:
        out [B, N, Hq, Dv] in q's dtype (packed [total, Hq, Dv]); with ``return_lse`` also lse
        [B, Hq, N] (packed [Hq, total]), natural log, fp32 (fp64 for fp64 inputs). A row that sees
        no key gives 0 and -inf (with sinks: lse = sink).

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or number that does not fit.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> q, kv = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 2, 16)
    >>> cache = torch.randn(1, 32, 2, 16)
    >>> out = pydecode.tree_attention(q, cache, cache, kv, kv, mask="causal", cache_seqlens=20)
    >>> out.shape
    torch.Size([1, 3, 4, 16])
    """
    rows = arguments.rows_over_cache(
        q, k_cache, v_cache, k, v, block_table, cu_seqlens_q, max_seqlen_q
    )
    q, k_cache, v_cache, k, v, sizes = rows
    if k is None and cache_seqlens is None:
        raise ValueError("cache_seqlens: expected lengths when k and v are None, got None")
    packed, causal = arguments.packed_mask(mask, sizes, q.device)
    arguments.expect_positions(positions, sizes, q.device)
    length = arguments.lengths(
        *("cache_seqlens", cache_seqlens, sizes.B, q.device),
        default=sizes.capacity,
        high=sizes.capacity,
    )
    tail = arguments.tail(
        *(sizes, q.device, num_tokens, positions, softmax_scale, softcap, window_size, sinks),
        *(k_scale, v_scale),
    )
    if checking():
        data.check_context_data(rows, block_table, tail[:2], length, cu_seqlens_q=cu_seqlens_q)
    args = (
        *(q, k_cache, v_cache, k, v, packed, causal, *length, block_table, *tail),
        *(cu_seqlens_q, max_seqlen_q or 0, return_lse),
        choose("tree_attention", backend, HAS, q, sizes.D, sizes.Dv),
    )
    return arguments.deliver(_op, _op_out, _run, args, sizes.Dv, out, return_lse)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.tree_attention(*args)
    if backend == "triton":
        return triton_kernels("tree_attention").tree_attention(*args)
    raise unavailable("tree_attention", backend, HAS)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return arguments.fake_outputs(q, v_cache.shape[-1], return_lse=args[-2])


_op = binding.bind("tree_attention", _run, _fake)
_op_out = binding.bind_out("tree_attention", arguments.run_into(_run))
