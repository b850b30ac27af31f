"""Host-side checks and conversions that the attention ops share."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import binding
from .reference.numbers import compute_dtype
from .trees.masks import pack_bits
from .validation import (
    FLOATS,
    FP8,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_last_contiguous,
    expect_shape,
    expect_tensor,
    number,
    static_number,
)

Pair = tuple[int, Tensor | None]  # a number that a server changes, as the schemas have it
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
    q: Tensor,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    B: int,
    Hq: int,
    D: int,
    names: tuple[str, str] = ("k_cache", "v_cache"),
) -> tuple[Tensor, Tensor, int, int, int]:
    """Checks the cache; returns it with Hkv, Dv and its capacity in positions."""
    k_cache, v_cache = expect_tensor(names[0], k_cache), expect_tensor(names[1], v_cache)
    paged = block_table is not None
    symbols = "[num_pages, page_size, Hkv, D]" if paged else "[B, S, Hkv, D]"
    expect_dim(names[0], k_cache, 4, symbols)
    first, S, Hkv, _ = k_cache.shape
    shape = (first if paged else B, S, Hkv, D)
    expect_shape(names[0], k_cache, shape, f"{symbols} (q has B = {B}, D = {D})")
    expect_dim(names[1], v_cache, 4, symbols.replace("D]", "Dv]"))
    Dv = v_cache.shape[-1]
    expect_shape(names[1], v_cache, (first, S, Hkv, Dv), symbols.replace("D]", "Dv]"))
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q: expected Hq a multiple of Hkv = {Hkv}, got Hq = {Hq}")
    for name, x in zip(names, (k_cache, v_cache)):
        expect_dtype(name, x, (q.dtype, *FP8), "as q has")
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


def packed_sizes(
    names: tuple[str, str, str], x: Tensor, cu_seqlens: Any, max_seqlen: Any
) -> tuple[int, int]:
    """B and the longest length of a packed batch: x [total, H, D], cu_seqlens [B+1]."""
    name, cu_name, max_name = names
    expect_dim(name, x, 3, f"[total, H, D] (packed, because {cu_name} is given)")
    cu_seqlens = expect_tensor(cu_name, cu_seqlens)
    expect_dim(cu_name, cu_seqlens, 1, "[B+1]")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{cu_name}: expected B+1 entries, got none")
    expect_index(cu_name, cu_seqlens, cu_seqlens.shape, "[B+1]", x.device)
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"{max_name}: expected an int >= 0 with {cu_name}, got {max_seqlen!r}")
    return cu_seqlens.shape[0] - 1, max_seqlen


class Rows(NamedTuple):
    """Checked tensors of a call over a cache, and its sizes."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    sizes: Sizes


def rows_over_cache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    block_table: Any,
    cu_seqlens_q: Any = None,
    max_seqlen_q: Any = None,
) -> Rows:
    """Checks q [B, N, Hq, D] (or packed), its rows' own k and v, and the cache that they see."""
    met = metadata(q, k_cache, v_cache, k, v, block_table, cu_seqlens_q, max_seqlen_q)
    if met is not None and (sizes := _passed.get(met)) is not None:
        return Rows(q, k_cache, v_cache, k, v, sizes)
    q = expect_query(q)
    total = None
    if cu_seqlens_q is None:
        expect_dim("q", q, 4, "[B, N, Hq, D]")
        B, N = q.shape[:2]
    else:
        names = ("q", "cu_seqlens_q", "max_seqlen_q")
        B, N = packed_sizes(names, q, cu_seqlens_q, max_seqlen_q)
        total = q.shape[0]
    expect_num_rows(N)
    Hq, D = q.shape[-2:]
    k_cache, v_cache, Hkv, Dv, capacity = expect_cache(q, k_cache, v_cache, block_table, B, Hq, D)
    symbols = "[B, N," if total is None else "[total,"
    k, v = own_rows(q, k, v, Hkv, Dv, symbols)
    sizes = Sizes(B, N, Hq, Hkv, D, Dv, capacity, total)
    remember(met, sizes)
    return Rows(q, k_cache, v_cache, k, v, sizes)


def branches_over_cache(
    q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, block_table: Any
) -> Rows:
    """Checks q [B, K, L, Hq, D], its branches' own k and v, and the cache that they see."""
    met = metadata(q, k_cache, v_cache, k, v, block_table)
    if met is not None and (sizes := _passed.get(met)) is not None:
        return Rows(q, k_cache, v_cache, k, v, sizes)
    q = expect_query(q)
    expect_dim("q", q, 5, "[B, K, L, Hq, D]")
    B, K, L, Hq, D = q.shape
    expect_num_rows(K * L)
    k_cache, v_cache, Hkv, Dv, capacity = expect_cache(q, k_cache, v_cache, block_table, B, Hq, D)
    expect_tensor("k", k)
    expect_tensor("v", v)
    k, v = own_rows(q, k, v, Hkv, Dv, "[B, K, L,")
    sizes = Sizes(B, L, Hq, Hkv, D, Dv, capacity, None)
    remember(met, sizes)
    return Rows(q, k_cache, v_cache, k, v, sizes)


_passed: dict[tuple[Any, ...], Sizes] = {}  # what the two above have found in order: q's dim tells


def remember(met: tuple[Any, ...] | None, sizes: Sizes) -> None:
    if met is not None:
        if len(_passed) >= 4096:
            _passed.clear()
        _passed[met] = sizes


def metadata(*given: Any) -> tuple[Any, ...] | None:
    """All that checks of shapes read, to know a call of the same again: a third of the time.

    None where a call is traced (its sizes are no numbers then), for subclasses of tensors and for
    inputs that require grad, which are detached.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    met: list[Any] = []
    for x in given:
        if type(x) is Tensor:
            if x.requires_grad:
                return None
            met += (x.shape, x.stride(), x.dtype, x.device)
        elif x is None or type(x) is int:
            met.append(x)
        else:
            return None
    return tuple(met)


def own_rows(
    q: Tensor, k: Any, v: Any, Hkv: int, Dv: int, symbols: str
) -> tuple[Tensor | None, Tensor | None]:
    """k and v of the rows in flight, both or neither."""
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one of them")
    if k is None:
        return None, None
    rows = q.shape[:-2]
    k = expect_rows("k", k, q, (*rows, Hkv, q.shape[-1]), f"{symbols} Hkv, D]")
    return k, expect_rows("v", v, q, (*rows, Hkv, Dv), f"{symbols} Hkv, Dv]")


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
    else:
        shared = mask.dim() == 3 and mask.shape[0] == 1
        expect_shape("mask", mask, (1 if shared else B, N, width), f"[B|1, N, {what}]")
    return (pack_bits(mask) if mask.dtype == torch.bool else mask), False


def key_mask(mask: Any, B: int, Nq: int, Nk: int, total: int | None, device: torch.device) -> None:
    """A mask of queries by keys, bool or packed int64; ``total``: of a packed batch, else None."""
    mask = expect_tensor("mask", mask)
    expect_dtype("mask", mask, (torch.bool, torch.int64))
    expect_device("mask", mask, device)
    width, what = (Nk, "Nk") if mask.dtype == torch.bool else (-(-Nk // 64), "ceil(Nk/64)")
    if total is not None:
        expect_shape("mask", mask, (total, width), f"[total_q, {what}]")
    else:
        shared = mask.dim() == 3 and mask.shape[0] == 1
        expect_shape("mask", mask, (1 if shared else B, Nq, width), f"[B|1, Nq, {what}]")
    expect_last_contiguous("mask", mask)


def softmax_scale_of(softmax_scale: Any, D: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(D) if D else 1.0
    if isinstance(softmax_scale, Tensor):
        raise TypeError("softmax_scale: expected a number, got a tensor")
    return static_number("softmax_scale", softmax_scale)


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
    if scale.dim() > 2 or tuple(scale.shape) != (B, Hkv)[2 - scale.dim() :]:
        raise ValueError(
            f"{name}: expected a number, 0-d, [Hkv] = [{Hkv}] or [B, Hkv] = [{B}, {Hkv}], "
            f"got shape {list(scale.shape)}"
        )
    expect_dtype(name, scale, (torch.float32,))
    expect_device(name, scale, device)
    return 1.0, scale.detach()


def lengths(
    name: str,
    value: Any,
    B: int,
    device: torch.device,
    default: int,
    high: int,
    low: int = 0,
) -> Pair:
    """A length (or start, or count) as the schema's pair; None is ``default``.

    A Python number is known on the host, so one outside [low, high] is an error; a tensor's entry
    outside them is bad device data, which is harmless.
    """
    if value is None:
        return default, None
    pair = number(name, value, B, device, kind=int)
    if pair[1] is None and not low <= pair[0] <= high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {pair[0]}")
    return pair


def block_place(
    cache_seqlens: Any, replace_at: Any, cache_starts: Any, sizes: Sizes, device: torch.device
) -> tuple[Pair, Pair, Pair]:
    """Where a block lies in its cache: the pairs of cache_seqlens, replace_at and cache_starts."""
    B, capacity = sizes.B, sizes.capacity
    return (
        lengths("cache_seqlens", cache_seqlens, B, device, default=capacity, high=capacity),
        lengths("replace_at", replace_at, B, device, default=-1, high=capacity, low=-1),
        lengths("cache_starts", cache_starts, B, device, default=0, high=capacity),
    )


def causal_of(causal: Any, B: int, device: torch.device) -> tuple[bool, Tensor | None]:
    """``causal`` as the schema's pair: None and bool, or bool 0-d or [B]."""
    if causal is None or isinstance(causal, bool):
        return bool(causal), None
    causal = expect_tensor("causal", causal)
    expect_dtype("causal", causal, (torch.bool,))
    if causal.dim():
        expect_shape("causal", causal, (B,), "[B]")
    expect_device("causal", causal, device)
    return False, causal


def tail(
    sizes: Sizes,
    device: torch.device,
    num_tokens: Any,
    positions: Tensor | None,
    softmax_scale: Any,
    softcap: Any,
    window_size: Any,
    sinks: Any,
    k_scale: Any,
    v_scale: Any,
) -> tuple[Any, ...]:
    """The arguments that every attention op's schema has in this order, num_tokens to v_scale."""
    if sizes.total is not None and num_tokens is not None:
        raise ValueError("num_tokens: expected None with cu_seqlens_q, which has the lengths")
    expect_sinks(sinks, sizes.Hq, device)
    return (
        *lengths("num_tokens", num_tokens, sizes.B, device, sizes.N, sizes.N),
        positions,
        softmax_scale_of(softmax_scale, sizes.D),
        softcap_of(softcap),
        window_of(window_size),
        sinks,
        *cache_scale("k_scale", k_scale, sizes.B, sizes.Hkv, device),
        *cache_scale("v_scale", v_scale, sizes.B, sizes.Hkv, device),
    )


def expect_positions(positions: Any, sizes: Sizes, device: torch.device) -> None:
    if positions is not None:
        if sizes.total is not None:
            expect_index("positions", positions, (sizes.total,), "[total]", device)
        else:
            expect_index("positions", positions, (sizes.B, sizes.N), "[B, N]", device)


# ---- results ------------------------------------------------------------------------------------


def fake_outputs(q: Tensor, Dv: int, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Empty (out, lse): q [..., rows, Hq, D] gives out [..., rows, Hq, Dv], lse [..., Hq, rows]."""
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if return_lse else (0,)
    return q.new_empty((*q.shape[:-1], Dv)), q.new_empty(shape, dtype=compute_dtype(q.dtype))


def deliver(
    op: Any,
    op_out: Any,
    run: Callable[..., tuple[Tensor, Tensor]],
    args: tuple[Any, ...],
    Dv: int,
    out: Any,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Ends an attention op: calls it, into ``out`` where that is given."""
    q = args[0]
    if out is None:
        out, lse = binding.call(op, run, *args)
    else:
        result = expect_tensor("out", out)
        expect_shape("out", result, (*q.shape[:-1], Dv), "q's shape with Dv")
        expect_dtype("out", result, (q.dtype,))
        expect_device("out", result, q.device)
        expect_last_contiguous("out", result)
        lse = fake_outputs(q, Dv, return_lse)[1]
        binding.call(op_out, run_into(run), *args, out_out=result, out_lse=lse)
    return (out, lse) if return_lse else out


def run_into(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """``<op>.out`` of a ``run`` that makes its results afresh."""

    def run_out(*args: Any, out_out: Tensor, out_lse: Tensor) -> None:
        results = run(*args)
        out_out.copy_(results[0])
        out_lse.copy_(results[1])

    return run_out
