"""What a call of the decode kernel is launched with, as far as shapes and strides tell it.

Nothing here reads a pointer or device data, so a plan serves every later call of the same shapes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configurations
from .decode_kernel import Shape
from .layouts import FORMS, odd
from .numerics import INTERPRETED, power_of_two

CONFIGURATIONS = configurations.load("decode_attention")
LOG2E = 1.4426950408889634
Pair = tuple[Any, Tensor | None]  # a number, as the schemas have it
Key = tuple[str, int, int, str, str]
CLEAR = ("clear", 32)


def key_of(
    dtype: torch.dtype,
    m: int,
    d: int,
    page: int,
    arch: str,
    rich: bool = False,
    single: bool = False,
) -> Key:
    """(dtype's kind, M, head dim, architecture, how). How: "whole" if a tile's keys lie in one
    page, else "gather"; "rich" calls need more registers than the tiles of those two leave, and
    "odd" ones (single: read by single elements) have an address for each. Their tiles are of 16
    rows; on sm_90 more than 16 of halves have 64, which is the least that wgmma takes."""
    d = max(power_of_two(d), 64)
    how = "odd" if single else "rich" if rich else "whole" if page % 64 == 0 else "gather"
    if dtype == torch.float32:
        return "fp32", 16, d, arch, "gather" if how == "rich" else how
    if single:
        return "half", 64 if m > 16 and arch == "sm_90" else 16, d, arch, how
    m = 16 if m <= 16 else 64 if m <= 64 or rich else 128
    return "half", m, d, arch, how


def splits_of(rows: int, group: int, num_kv_heads: int, block_m: int) -> int:
    """Parts of the context, by what never changes with the batch: M tiles first fill a GPU of
    about 128 SMs, then splits; each split writes and reads all rows once more in fp32."""
    tiles = num_kv_heads * -(-rows * group // block_m)
    wanted = min(128 // tiles, 256 // rows, 16)
    return 1 << max(wanted, 1).bit_length() - 1


def rows_to_warm(
    most: int, group: int, num_kv_heads: int, d: int, dtype: torch.dtype, arch: str
) -> list[int]:
    """The fewest numbers of rows whose calls run all binaries that up to ``most`` rows need."""
    found: dict[tuple[Key, int], int] = {}
    for rows in range(1, most + 1):
        for page, rich in ((64, False), (16, False), (16, True)):
            key = key_of(dtype, rows * group, d, page, arch, rich)
            parts = splits_of(rows, group, num_kv_heads, CONFIGURATIONS[key]["BM"])
            found.setdefault((key, parts), rows)
    return sorted(set(found.values()))


class Plan(NamedTuple):
    """``decode[grid](*pointers, *rest, **CONFIGURATIONS[key])``, then what is left to do."""

    key: Key
    entry: dict[str, Any]  # the table's, when the plan was made
    grid: tuple[int]
    rest: tuple[Any, ...]
    S: Shape
    shape: tuple[int, ...]
    dtype: torch.dtype
    lse_shape: tuple[int, ...] | None
    parts: int  # (row, head) pairs times splits; 0: no splits
    combine_grid: tuple[int]
    combine_entry: dict[str, Any]
    combine_rest: tuple[Any, ...]


def make_plan(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    mask: Tensor | None, positions: Tensor | None, block_table: Tensor | None,
    cu_seqlens_q: Tensor | None, causal: Pair, numbers: tuple[Pair, ...],
    k_scale: Pair, v_scale: Pair, softmax_scale: float, softcap: float, window_size: int,
    max_seqlen_q: int, return_lse: bool, block: bool, arch: str, splits: int | None = None,
) -> Plan:  # fmt: skip
    """``numbers``: length, hole, first, count, branches. ``splits``: other than its own choice."""
    Hq, D = q.shape[-2:]
    num_pages, page_size, Hkv, Dv = v_cache.shape
    branched, packed, G = q.dim() == 5, cu_seqlens_q is not None, Hq // Hkv
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    per_branch = max_seqlen_q if packed else q.shape[-3]
    rows = per_branch * (q.shape[1] if branched else 1)
    paged = block_table is not None
    single = any(odd(x) for x in (q, k_cache, v_cache, k, v) if x is not None)
    rich = window_size >= 0 or k_cache.dtype in FORMS or v_cache.dtype in FORMS
    rich |= max(D, Dv) > 128 and (packed or branched or k is None)
    page = page_size if paged else 0
    key = key_of(q.dtype, rows * G, max(D, Dv), page, arch, rich, single)
    entry = CONFIGURATIONS[key]
    splits = splits or splits_of(rows, G, Hkv, entry["BM"])
    m_tiles = -(-rows * G // entry["BM"])
    S = Shape(
        HKV=Hkv, G=G, D=D, DV=Dv, PAGE=page_size if paged else 1,
        K_FORM=FORMS.get(k_cache.dtype, 0), V_FORM=FORMS.get(v_cache.dtype, 0),
        K_POINTER=k_scale[1] is not None, V_POINTER=v_scale[1] is not None,
        BLOCK=block, BRANCHED=branched, CAUSAL=causal[0], WINDOWED=window_size >= 0,
        CAPPED=softcap > 0, SIGN=(softmax_scale > 0) - (softmax_scale < 0), SPLITS=splits,
        BLOCK_D=max(power_of_two(D), 16), BLOCK_DV=max(power_of_two(Dv), 16),
    )  # fmt: skip
    scale = abs(softmax_scale) if S.SIGN else 1.0
    size = q.numel() // D
    clears = packed and splits == 1
    end = CLEAR if clears else ("combine", S.BLOCK_DV)
    combine_entry = CONFIGURATIONS[end]
    combine_rest: tuple[Any, ...] = (rows, q.shape[0], batch, Hq, Dv, S.BLOCK_DV)
    if not clears:
        combine_rest = (size, rows, per_branch, q.shape[0], batch, Hq, Dv, splits, S.BLOCK_DV)
    return Plan(
        key=key,
        entry=entry,
        grid=(batch * Hkv * splits * m_tiles,),
        rest=(
            LOG2E * (softcap if softcap > 0 else scale),
            scale / softcap if softcap > 0 else 0.0,
            *(rows, per_branch, q.shape[0], num_pages),
            *(block_table.shape[1] if block_table is not None else page_size, m_tiles, window_size),
            block_table.stride(0) if block_table is not None else 0,
            *_mask_strides(mask),
            *_position_strides(positions, packed, branched),
            (
                *(0 if x is None or x.dim() == 0 else x.stride(0) for _, x in numbers),
                0 if causal[1] is None or causal[1].dim() == 0 else causal[1].stride(0),
                *(*_scale_strides(k_scale), *_scale_strides(v_scale)),
                *_row_strides(q, packed),
                *(*k_cache.stride()[:3], *v_cache.stride()[:3]),
                *(_row_strides(k, packed) if k is not None else (0, 0, 0, 0)),
                *(_row_strides(v, packed) if v is not None else (0, 0, 0, 0)),
            ),
            S,
        ),
        S=S,
        shape=(*q.shape[:-1], Dv),
        # the interpreter's cast to bf16 cuts off, so it hands out fp32
        dtype=torch.float32 if INTERPRETED and q.dtype == torch.bfloat16 else q.dtype,
        lse_shape=(*q.shape[:-3], Hq, q.shape[-3]) if return_lse else None,
        parts=size * splits if splits > 1 else 0,
        combine_grid=(-(-(q.shape[0] if clears else size) // combine_entry["BLOCK"]),),
        combine_entry=combine_entry,
        combine_rest=combine_rest,
    )


def _row_strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """Of [B, (K,) N, H, D] as (b, c, n, h); packed [total, H, D]."""
    strides = x.stride()
    if packed:
        return 0, 0, *strides[:2]
    return strides[:4] if x.dim() == 5 else (strides[0], 0, *strides[1:3])


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    return mask.stride(0) if mask.dim() == 3 and mask.shape[0] > 1 else 0, mask.stride(-2)


def _position_strides(at: Tensor | None, packed: bool, branched: bool) -> tuple[int, int, int]:
    """Of [B, N], [B, K|1, N] or packed [total] as (b, c, n)."""
    if at is None:
        return 0, 0, 0
    strides = at.stride()
    if packed:
        return 0, 0, strides[0]
    if branched:
        return strides[0], strides[1] if at.shape[1] > 1 else 0, strides[2]
    return strides[0], 0, strides[1]


def _scale_strides(pair: Pair) -> tuple[int, int]:
    """Of a cache's scale, along requests and heads."""
    if pair[1] is None:
        return 0, 0
    return ((0, 0), (0, *pair[1].stride()), pair[1].stride())[pair[1].dim()]
