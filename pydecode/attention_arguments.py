"""Host-side checks and conversions that the attention ops share."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .trees.masks import pack_bits
from .validation import (
    FLOATS,
    FP8,
    data_at_most,
    data_range,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_last_contiguous,
    expect_shape,
    expect_tensor,
    number,
)

MAX_ROWS = 1024  # rows in flight: one packed mask row is at most 16 words


class Sizes(NamedTuple):
    """Sizes of one call; for a packed batch N is max_seqlen_q and total is q's first dimension."""

    B: int
    N: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    capacity: int
    total: int | None  # None: not packed


def expect_query(q: Any) -> Tensor:
    q = expect_tensor("q", q)
    expect_dtype("q", q, FLOATS)
    expect_last_contiguous("q", q)
    return q


def expect_cache(
    q: Tensor, k_cache: Any, v_cache: Any, block_table: Any, B: int, Hq: int, D: int
) -> tuple[Tensor, Tensor, int, int, int]:
    """Checks the cache; returns it with Hkv, Dv and its capacity in positions."""
    k_cache, v_cache = expect_tensor("k_cache", k_cache), expect_tensor("v_cache", v_cache)
    paged = block_table is not None
    symbols = "[num_pages, page_size, Hkv, D]" if paged else "[B, S, Hkv, D]"
    expect_dim("k_cache", k_cache, 4, symbols)
    first, S, Hkv, Dk = k_cache.shape
    expect_shape("k_cache", k_cache, (first if paged else B, S, Hkv, D), symbols)
    expect_dim("v_cache", v_cache, 4, symbols.replace("D]", "Dv]"))
    Dv = v_cache.shape[-1]
    expect_shape("v_cache", v_cache, (first, S, Hkv, Dv), symbols.replace("D]", "Dv]"))
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q: expected Hq a multiple of Hkv = {Hkv}, got Hq = {Hq}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect_dtype(name, x, (q.dtype, *FP8))
        expect_device(name, x, q.device)
        expect_last_contiguous(name, x)
    if not paged:
        return k_cache, v_cache, Hkv, Dv, S
    expect_table(block_table, B, q.device)
    return k_cache, v_cache, Hkv, Dv, S * block_table.shape[1]


def expect_table(block_table: Any, B: int, device: torch.device) -> None:
    expect_tensor("block_table", block_table)
    expect_dim("block_table", block_table, 2, "[B, max_pages]")
    expect_index("block_table", block_table, (B, block_table.shape[1]), "[B, max_pages]", device)


def expect_rows(name: str, x: Any, q: Tensor, shape: tuple[int, ...], symbols: str) -> Tensor:
    """k or v of the rows in flight."""
    x = expect_tensor(name, x)
    expect_shape(name, x, shape, symbols)
    expect_dtype(name, x, (q.dtype,))
    expect_device(name, x, q.device)
    expect_last_contiguous(name, x)
    return x


def packed_sizes(q: Tensor, cu_seqlens_q: Any, max_seqlen_q: Any) -> tuple[int, int]:
    """B and N of a packed batch: q [total, Hq, D], cu_seqlens_q [B+1]."""
    expect_dim("q", q, 3, "[total, Hq, D] (packed, because cu_seqlens_q is given)")
    cu_seqlens_q = expect_tensor("cu_seqlens_q", cu_seqlens_q)
    expect_dim("cu_seqlens_q", cu_seqlens_q, 1, "[B+1]")
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q: expected B+1 entries, got none")
    expect_index("cu_seqlens_q", cu_seqlens_q, cu_seqlens_q.shape, "[B+1]", q.device)
    if isinstance(max_seqlen_q, bool) or not isinstance(max_seqlen_q, int) or max_seqlen_q < 0:
        raise ValueError(
            f"max_seqlen_q: expected an int >= 0 with cu_seqlens_q, got {max_seqlen_q!r}"
        )
    return cu_seqlens_q.shape[0] - 1, max_seqlen_q


def expect_num_rows(N: int) -> None:
    if N > MAX_ROWS:
        raise ValueError(f"q: expected at most {MAX_ROWS} rows in flight, got {N}")


def packed_mask(mask: Any, sizes: Sizes, device: torch.device) -> tuple[Tensor | None, bool]:
    """``mask`` as (packed int64 or None, causal)."""
    if mask is None:
        return None, False
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask: expected a tensor, "causal" or None, got {mask!r}')
        return None, True
    mask = expect_tensor("mask", mask)
    expect_dtype("mask", mask, (torch.bool, torch.int64))
    expect_device("mask", mask, device)
    B, N, total = sizes.B, sizes.N, sizes.total
    width, what = (N, "N") if mask.dtype == torch.bool else (-(-N // 64), "ceil(N/64)")
    if total is not None:
        what = what.replace("N", "max_seqlen_q")
        expect_shape("mask", mask, (total, width), f"[total, {what}]")
    elif mask.dim() != 3 or tuple(mask.shape) not in ((B, N, width), (1, N, width)):
        raise ValueError(
            f"mask: expected shape [B|1, N, {what}] = [{B}|1, {N}, {width}], got {list(mask.shape)}"
        )
    return (pack_bits(mask) if mask.dtype == torch.bool else mask), False


def softmax_scale_of(softmax_scale: Any, D: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(D) if D else 1.0
    return float(number("softmax_scale", softmax_scale, None, torch.device("cpu"))[0])


def softcap_of(softcap: Any) -> float:
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool) or not softcap >= 0:
        raise ValueError(f"softcap: expected a number >= 0 (0: none), got {softcap!r}")
    return float(softcap)


def window_of(window_size: Any) -> int:
    """The window as an int; None and -1 mean none."""
    if window_size is None or window_size == -1:
        return -1
    if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
        raise ValueError(
            f"window_size: expected an int >= 1 (cached keys that a row sees), None or -1 (none), "
            f"got {window_size!r}"
        )
    return window_size


def expect_sinks(sinks: Any, Hq: int, device: torch.device) -> None:
    if sinks is not None:
        sinks = expect_tensor("sinks", sinks)
        expect_shape("sinks", sinks, (Hq,), "[Hq]")
        expect_dtype("sinks", sinks, FLOATS)
        expect_device("sinks", sinks, device)


def cache_scale(
    name: str, scale: Any, B: int, Hkv: int, device: torch.device
) -> tuple[float, Tensor | None]:
    """k_scale or v_scale as the schema's pair: a number, or fp32 0-d, [Hkv] or [B, Hkv]."""
    if scale is None:
        return 1.0, None
    if not isinstance(scale, Tensor):
        return number(name, scale, None, device)
    if tuple(scale.shape) not in ((), (Hkv,), (B, Hkv)):
        raise ValueError(
            f"{name}: expected a number, 0-d, [Hkv] = [{Hkv}] or [B, Hkv] = [{B}, {Hkv}], "
            f"got shape {list(scale.shape)}"
        )
    expect_dtype(name, scale, (torch.float32,))
    expect_device(name, scale, device)
    return 1.0, scale.detach()


def lengths(
    name: str, value: Any, B: int, device: torch.device, default: int
) -> tuple[int, Tensor | None]:
    """A length (or start, or count) as the schema's pair; None is ``default``."""
    if value is None:
        return default, None
    return number(name, value, B, device, kind=int)


def expect_positions(positions: Any, sizes: Sizes, device: torch.device) -> None:
    if positions is not None:
        if sizes.total is not None:
            expect_index("positions", positions, (sizes.total,), "[total]", device)
        else:
            expect_index("positions", positions, (sizes.B, sizes.N), "[B, N]", device)


def outputs(q: Tensor, sizes: Sizes, out: Any, return_lse: bool) -> tuple[Tensor, Tensor]:
    """The result tensors of an out= call: ``out`` as given, lse fresh (size 0 if not asked for)."""
    out = expect_tensor("out", out)
    packed = sizes.total is not None
    expect_shape("out", out, (*q.shape[:-1], sizes.Dv), "q's shape with Dv")
    expect_dtype("out", out, (q.dtype,))
    expect_device("out", out, q.device)
    shape = (sizes.Hq, sizes.total) if packed else (sizes.B, sizes.Hq, sizes.N)
    return out, new_lse(q, shape if return_lse else (0,))


def new_lse(q: Tensor, shape: Any) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(shape, dtype=dtype)


def fake_outputs(q: Tensor, Dv: int, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Fake (out, lse) of an attention op: q [B, N, Hq, D], or packed [total, Hq, D]."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], Dv)), new_lse(q, shape if return_lse else (0,))


def check_context_data(
    cache_seqlens: Tensor | None,
    capacity: int,
    block_table: Tensor | None,
    num_pages: int,
    page_size: int,
) -> None:
    """``pydecode.checks(True)``: lengths within the cache, page ids within the pool."""
    if cache_seqlens is None:
        return
    data_range("cache_seqlens", cache_seqlens, 0, capacity + 1)
    if block_table is not None and block_table.numel():
        first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
        used = first < cache_seqlens.expand(block_table.shape[0])[:, None]
        data_range("block_table", block_table, 0, num_pages, used)


def check_cu_seqlens(name: str, cu_seqlens: Tensor | None, total: int) -> None:
    """``pydecode.checks(True)``: monotone from 0 to total."""
    if cu_seqlens is not None:
        data_range(name, cu_seqlens, 0, total + 1)
        data_at_most(name, cu_seqlens[:-1] - cu_seqlens[1:], 0, "expected no descent")
