"""Ranked attention, for prefill and cross attention: the public function and its binding."""

from typing import Any

import torch
from torch import Tensor

from . import attention_arguments as arguments
from . import attention_data as data
from . import binding
from .backends import choose, triton_kernels, unavailable
from .reference import ranked_attention as reference
from .replay import replayed
from .validation import (
    checking,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_shape,
    expect_tensor,
)

HAS = ("reference", "triton")


@replayed
def ranked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_rank: Tensor | None = None,
    k_rank: Tensor | None = None,
    mask: Tensor | None = None,
    strict: bool = False,
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where a query sees a key iff the key's rank is at most its own, and a mask agrees.

    **The cache is never written**, unlike in ``flash_attn_with_kvcache``: ``write_kv`` does that.

    ``out_i = softmax(scale * q_i K_{j : k_rank_j <= q_rank_i}^T) V_{j : ...}`` (block-causal masks
    of BD3-LM, Arriola et al., ICLR 2025; wavefronts and groups of visual decoders; prefill and
    cross attention). ``pydecode.ranks`` makes the common ranks. The rank ``ranks.PAD`` (2**31 - 1)
    is padding: such a key is seen by nobody, such a query sees nothing. What no ranks can say (a
    tree behind its context, packed documents, any mask of another library) a ``mask`` says, of any
    number of queries and keys; a query then sees a key iff both the ranks and the mask let it.

    Args:
        q: [B, Nq, Hq, D], fp16, bf16, fp32 or fp64, any number of rows. Packed: [total_q, Hq, D]
            with ``cu_seqlens_q`` and ``max_seqlen_q``.
        k: [B, Nk, Hkv, D]; or packed [total_k, Hkv, D] with ``cu_seqlens_k`` and ``max_seqlen_k``;
            or paged [num_pages, page_size, Hkv, D] with ``block_table`` (key j is the cached
            position j). q and k may be packed independently. q's dtype, or fp8 e4m3/e5m2 with
            scales. Any strides but the last.
        v: the same with head dim Dv, which may differ from D.
        q_rank: int32 [B|1, Nq], packed [total_q].
        k_rank: int32 [B|1, Nk], packed [total_k]; paged: its width Nk is at most the table's.
            Both ranks may be None where there is a mask, which then decides alone.
        mask: bool [B|1, Nq, Nk], or packed int64 [B|1, Nq, ceil(Nk/64)] (bit j of row i: query i
            sees key j; bits past Nk say nothing). Packed queries: [total_q, Nk], or [total_q,
            ceil(Nk/64)], where column j is the request's own key j and Nk is ``max_seqlen_k`` if
            keys are packed too. Either is read as it is, never converted. Any strides but the last.
        strict: visible iff k_rank < q_rank.
        cache_seqlens: int or [B] int32/int64, valid keys of a paged or padded batch; None: all Nk.
        block_table: [B, max_pages] int32/int64. A page id outside the pool contributes nothing.
        num_tokens: int or [B], valid queries; later ones give out 0, lse -inf. None: all Nq.
        positions: [B, Nq] (packed [total_q]), absolute positions, for the window only.
        softmax_scale: default D**-0.5. softcap: s <- softcap * tanh(s / softcap); 0: none.
        window_size: W >= 1: of the keys that its rank lets it see, query i keeps those with index
            j > position(i) - W, where position(i) is ``positions`` or, with the last query at the
            last key as in FlashAttention, i + (keys - queries) of its request.
        sinks: [Hq], a logit a head added to the denominator (after softcap) and to lse.
        k_scale, v_scale: number or fp32 0-d, [Hkv] or [B, Hkv]: value = stored * scale.
        cu_seqlens_q, cu_seqlens_k: [B+1] int32/int64.
        out: the result goes here, and is returned.

    Returns:
        out [B, Nq, Hq, Dv] in q's dtype (packed [total_q, Hq, Dv]); with ``return_lse`` also lse
        [B, Hq, Nq] (packed [Hq, total_q]), natural log, fp32 (fp64 for fp64 inputs). A query that
        sees no key gives 0 and -inf (with sinks: lse = sink); padding gives 0 and -inf.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or number that does not fit.
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> q, kv = torch.randn(1, 6, 4, 16), torch.randn(1, 6, 2, 16)
    >>> ranks = pydecode.ranks.block_causal(6, block=2)
    >>> pydecode.ranked_attention(q, kv, kv, q_rank=ranks, k_rank=ranks).shape
    torch.Size([1, 6, 4, 16])
    """
    q = arguments.expect_query(q)
    total = None
    if cu_seqlens_q is None:
        expect_dim("q", q, 4, "[B, Nq, Hq, D]")
        B, Nq = q.shape[:2]
    else:
        names = ("q", "cu_seqlens_q", "max_seqlen_q")
        B, Nq = arguments.packed_sizes(names, q, cu_seqlens_q, max_seqlen_q)
        total = q.shape[0]
    if q_rank is None and k_rank is None:
        if mask is None:
            raise ValueError("q_rank: expected ranks, or a mask, got neither")
        if strict:
            raise ValueError("strict: expected False without ranks")
        Nk = _num_keys(k, mask, block_table, cu_seqlens_k)
        same = q.new_zeros(max(Nq if total is None else total, Nk), dtype=torch.int32)
        q_rank = same[None, :Nq] if total is None else same[:total]
        k_rank = same[None, :Nk] if cu_seqlens_k is None else same[:Nk]
    _expect_ranks("q_rank", q_rank, q, (B, Nq) if total is None else (total,))
    k, v, Hkv, Dv, Nk = _expect_keys(
        *(q, k, v, k_rank, B, block_table, cache_seqlens, cu_seqlens_k, max_seqlen_k)
    )
    if mask is not None:
        arguments.key_mask(mask, B, Nq, Nk, total, q.device)
    sizes = arguments.Sizes(B, Nq, q.shape[-2], Hkv, q.shape[-1], Dv, Nk, total)
    arguments.expect_positions(positions, sizes, q.device)
    keys = arguments.lengths("cache_seqlens", cache_seqlens, B, q.device, default=Nk, high=Nk)
    tail = arguments.tail(
        *(sizes, q.device, num_tokens, positions, softmax_scale, softcap, window_size, sinks),
        *(k_scale, v_scale),
    )
    if checking():
        length = data.check_lengths("cache_seqlens", keys, B, q, Nk)
        data.check_lengths("num_tokens", tail[:2], B, q, Nq)
        data.check_table(block_table, length, *k.shape[:2])
        data.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], Nq)
        data.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], Nk)
    args = (
        *(q, k, v, q_rank, k_rank, mask, bool(strict), *keys, block_table, *tail),
        *(cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0, return_lse),
        choose("ranked_attention", backend, HAS, q, q.shape[-1], Dv),
    )
    return arguments.deliver(_op, _op_out, _run, args, Dv, out, return_lse)


def _expect_keys(
    q: Tensor,
    k: Any,
    v: Any,
    k_rank: Any,
    B: int,
    block_table: Any,
    cache_seqlens: Any,
    cu_seqlens_k: Any,
    max_seqlen_k: Any,
) -> tuple[Tensor, Tensor, int, int, int]:
    """Padded, paged or packed keys: k, v, Hkv, Dv and Nk."""
    Hq, D = q.shape[-2:]
    names = ("k", "v")
    if cu_seqlens_k is None:
        k, v, Hkv, Dv, capacity = arguments.expect_cache(q, k, v, block_table, B, Hq, D, names)
        if block_table is None:
            _expect_ranks("k_rank", k_rank, q, (B, capacity))
            return k, v, Hkv, Dv, capacity
        k_rank = expect_tensor("k_rank", k_rank)
        Nk = k_rank.shape[-1] if k_rank.dim() else 0
        _expect_ranks("k_rank", k_rank, q, (B, Nk))
        if Nk > capacity:
            raise ValueError(f"k_rank: expected at most the table's {capacity} keys, got {Nk}")
        return k, v, Hkv, Dv, Nk
    if block_table is not None or cache_seqlens is not None:
        raise ValueError("cu_seqlens_k: expected None with block_table or cache_seqlens")
    k, v = expect_tensor("k", k), expect_tensor("v", v)
    batch, Nk = arguments.packed_sizes(
        ("k", "cu_seqlens_k", "max_seqlen_k"), k, cu_seqlens_k, max_seqlen_k
    )
    if batch != B:
        raise ValueError(f"cu_seqlens_k: expected B+1 = {B + 1} entries, got {batch + 1}")
    expect_dim("v", v, 3, "[total_k, Hkv, Dv]")
    _expect_ranks("k_rank", k_rank, q, (k.shape[0],))
    # the checks of a cache of one request
    k, v, Hkv, Dv, _ = arguments.expect_cache(q, k[None], v[None], None, 1, Hq, D, names)
    return k[0], v[0], Hkv, Dv, Nk


def _num_keys(k: Any, mask: Any, block_table: Any, cu_seqlens_k: Any) -> int:
    """How many keys there are where no ranks say so; what does not fit is found by the checks."""
    k, mask = expect_tensor("k", k), expect_tensor("mask", mask)
    if cu_seqlens_k is not None:
        return k.shape[0] if k.dim() else 0
    Nk = k.shape[1] if k.dim() > 1 else 0
    if block_table is not None:
        table = expect_tensor("block_table", block_table)
        Nk *= table.shape[-1] if table.dim() else 0
        if mask.dtype == torch.bool and mask.dim():  # a mask may be narrower than the table
            Nk = mask.shape[-1]
    return Nk


def _expect_ranks(name: str, rank: Any, q: Tensor, shape: tuple[int, ...]) -> None:
    """int32 [B|1, N], or packed [total]."""
    rank = expect_tensor(name, rank)
    expect_dtype(name, rank, (torch.int32,))
    expect_device(name, rank, q.device)
    symbols = "[B|1, N]" if len(shape) == 2 else "[total]"
    if rank.dim() == 2 and len(shape) == 2 and rank.shape[0] == 1:
        shape = (1, shape[1])
    expect_shape(name, rank, shape, symbols)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    if backend == "reference":
        return reference.ranked_attention(*args)
    if backend == "triton":
        return triton_kernels("ranked_attention").ranked_attention(*args)
    raise unavailable("ranked_attention", backend, HAS)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return arguments.fake_outputs(q, v.shape[-1], return_lse=args[-2])


_op = binding.bind("ranked_attention", _run, _fake)
_op_out = binding.bind_out("ranked_attention", arguments.run_into(_run))
