"""Ranked attention: two launches, the plan of tiles and the attention itself.

``ranked_plan`` classifies every (tile of queries, tile of keys) of a request from the smallest and
the largest rank in each, or from the mask's bits, as skipped, full or partial, and leaves lists of
the latter two: it reads 4 bytes a key for a tile of queries, once for all heads. ``ranked_attend``
takes one head of one tile of queries through its two lists, so a skipped tile costs it nothing, not
even a test, and causal ranks end its loop at the diagonal. Only partial tiles compare ranks. No
rank is known to the host, so one binary serves causal, block-causal, bidirectional and other ranks.
A packed batch has total // BM + B tiles of queries at most, however long the longest may be; the
first kernel finds out whose each of them is.

Strides that 16 does not divide are right and slow: each element needs an address of its own, so
whatever the dtype tiles are 16 x 16 (the table's "odd"); on sm_90 more than 16 queries of halves
have 64 x 16, which is the least that wgmma takes.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backends import BackendUnavailable
from ..replay import launch
from . import configurations
from .devices import architecture, on_device_of, table_of
from .layouts import FORMS, dense, odd
from .numerics import INTERPRETED
from .ranked_attend import attend
from .ranked_layout import block_of, fixed_of, layout
from .ranked_plan import plan
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("ranked_attention")
_INTERPRETED = INTERPRETED.value
Call = tuple[Any, tuple, int, dict[str, Any]]


def ranked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rank: Tensor,
    k_rank: Tensor,
    mask: Tensor | None,
    strict: bool,
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
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, Hq, D] -> out [B, Nq, Hq, Dv], lse [B, Hq, Nq]; or packed, [total, Hq, D]."""
    out, lse, calls = launches(
        architecture(q),
        *(q, k, v, q_rank, k_rank, mask, strict, cache_seqlens, cache_seqlens_tensor),
        *(block_table, num_tokens, num_tokens_tensor, positions, softmax_scale, softcap),
        *(window_size, sinks, k_scale, k_scale_tensor, v_scale, v_scale_tensor, cu_seqlens_q),
        *(cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse),
    )
    with on_device_of(q):
        for kernel, key, grid, given in calls:
            launch(kernel, (grid,), **given, **CONFIGURATIONS[key])
    # the interpreter's cast to bf16 cuts off, so it hands out fp32
    return (out if out.dtype == q.dtype else out.to(q.dtype)), lse


def launches(
    arch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rank: Tensor,
    k_rank: Tensor,
    mask: Tensor | None,
    strict: bool,
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
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor, list[Call]]:
    """The results' memory, and the calls that fill it: kernel, table's key, grid, arguments."""
    shape, packed = q.shape, cu_seqlens_q is not None
    total = shape[0] if packed else 0
    B = shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    Nq = max_seqlen_q if packed else shape[1]
    Nk = k_rank.shape[-1] if cu_seqlens_k is None else max_seqlen_k
    key = key_of(
        *(q.dtype, k.dtype == v.dtype == q.dtype, max(shape[-1], v.shape[-1])),
        *(None if packed else Nq, arch, any(map(odd, (q, k, v)))),
    )
    entry = CONFIGURATIONS[key]
    fixed = fixed_of(
        *(entry["BM"], entry["BN"], B, Nq, Nk, total, shape[-2]),
        *(layout(q), layout(k), layout(v), layout(q_rank), layout(k_rank), layout(mask)),
        *(layout(positions), layout(block_table), layout(num_tokens_tensor)),
        *(layout(cache_seqlens_tensor), layout(k_scale_tensor), layout(v_scale_tensor)),
        *(k.dtype, v.dtype, None if mask is None else mask.dtype, cu_seqlens_k is not None),
        *(strict, softmax_scale, softcap, window_size, k_scale, v_scale, return_lse),
    )
    dtype = torch.float32 if _INTERPRETED and q.dtype == torch.bfloat16 else q.dtype
    out = q.new_empty(fixed.out, dtype=dtype)
    lse = torch.empty(fixed.lse, dtype=torch.float32, device=q.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse, []
    lists = torch.empty(fixed.lists, dtype=torch.int32, device=q.device)
    words = torch.empty(fixed.words, dtype=torch.int32, device=q.device) if fixed.words else None
    both = dict(
        out=out,
        lse=lse if return_lse else None,
        lists=lists,
        words=words,
        q_rank=q_rank,
        k_rank=k_rank,
        table=block_table,
        positions=positions if window_size >= 0 else None,
        queries=num_tokens if num_tokens_tensor is None else num_tokens_tensor,
        keys=cache_seqlens if cache_seqlens_tensor is None else cache_seqlens_tensor,
        cu_q=dense(cu_seqlens_q),
        cu_k=dense(cu_seqlens_k),
        **fixed.both,
    )
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    # rows of nobody, which the first kernel answers, are a packed batch's
    first = both | fixed.plan | (dict(mask=mask) if packed else dict(mask=mask, out=None, lse=None))
    calls: list[Call] = [(plan, fixed.plan_key, fixed.plan_grid, first)]
    if fixed.attend_grid:
        alone = dict(
            q=q,
            k=k.view(torch.uint8) if k.dtype in FORMS else k,
            v=v.view(torch.uint8) if v.dtype in FORMS else v,
            sinks=dense(sinks),
            k_scale=k_scale_tensor,
            v_scale=v_scale_tensor,
            **fixed.attend,
        )
        calls.append((attend, key, fixed.attend_grid, both | alone))
    return out, lse, calls


@cache
def key_of(
    dtype: torch.dtype, same: bool, head: int, queries: int | None, arch: str, odd: bool = False
) -> tuple[str, int, int, str]:
    """The table's key: dtypes (``same``: of the cache, too), queries in a tile, head dims, device.

    Nothing of the batch: the longest request of a packed one does not count (None).
    ``odd``: read by single elements, see ``layouts.odd``.
    """
    kind = "single" if dtype == torch.float32 else "half" if same else "bytes"
    kind = "odd" if odd else kind
    head = max(64, block_of(head))
    rows = sorted(k[1] for k in CONFIGURATIONS if (k[0], *k[2:]) == (kind, head, arch))
    if odd and dtype == torch.float32:
        rows = rows[:1]  # those of 64 are for wgmma
    if not rows:
        raise BackendUnavailable(
            f"ranked_attention: 'triton' has no proven configuration of {kind}, {head}, {arch}"
        )
    fits = [n for n in rows if queries is not None and n >= queries]
    return kind, fits[0] if fits else rows[-1], head, arch


def candidates(key: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Launch keywords that ``bench/tune.py`` may try for a key beside its own."""
    own = CONFIGURATIONS[key]
    if key[0] == "plan":
        for warps in (2, 4, 8, 16):
            yield own | {"num_warps": warps}
        return
    widths = [BN for BN in (16, 32, 64) if ("plan", own["BM"], BN, 0) in CONFIGURATIONS]
    for BN in widths:
        for warps in (4, 8):
            for stages in (2, 3, 4, 5, 6):
                yield own | {"BN": BN, "num_warps": warps, "num_stages": stages}


# ---- what is proven without a GPU ---------------------------------------------------------------


def static_calls(arch: str) -> Iterator[StaticCall]:
    from .ranked_static import examples, masked  # sizes as real models have them

    table = table_of(arch)
    seen = set()
    some = examples(whole=arch == table, few=arch == "sm_90")
    given = [(x, aligned, note, True) for x, aligned, note in some]
    if arch == table:
        given += [(x, True, note, False) for x, note in masked()]
    for x, aligned, note, both in given:
        try:
            calls = launches(table, **x)[2]
        except BackendUnavailable:  # what the table leaves out
            continue
        for kernel, key, _, arguments in calls:
            if kernel is plan:
                how = (key, *(value for name, value in arguments.items() if name.isupper()))
                how += tuple(getattr(value, "dtype", value is None) for value in arguments.values())
                if how not in seen:
                    seen.add(how)
                    yield StaticCall(plan, key, arguments, torch.int32, note=note)
            elif both:
                m = CONFIGURATIONS[key]["BM"]
                if arch == "sm_90":  # no small tile may hide HMMA there
                    m = x["max_seqlen_q"] or x["q"].shape[1]
                yield StaticCall(
                    attend, key, arguments, x["q"].dtype, m, aligned=aligned, note=note
                )
