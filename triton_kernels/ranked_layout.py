"""What a call of ranked attention's sizes, strides and static numbers say to its two kernels."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts import FORMS
from .numerics import LOG2E
from .ranked_steps import HEADER

_LOG2E, _HEADER = LOG2E.value, HEADER.value
Layout = tuple[torch.Size, tuple[int, ...]] | None


class Fixed(NamedTuple):
    """What a call's sizes, strides and static numbers say; see ``fixed_of``."""

    out: tuple[int, ...]  # shapes
    lse: tuple[int, ...]
    lists: int  # entries
    words: int
    plan_key: tuple[str, int, int, int]
    plan_grid: int
    attend_grid: int
    both: dict[str, Any]  # arguments of both kernels, and of each alone
    plan: dict[str, Any]
    attend: dict[str, Any]


@lru_cache(maxsize=256)  # a model's layers have one layout; working it out costs 12 us
def fixed_of(
    BM: int,
    BN: int,
    B: int,
    Nq: int,
    Nk: int,
    total: int,
    Hq: int,
    q: tuple[torch.Size, tuple[int, ...]],
    k: tuple[torch.Size, tuple[int, ...]],
    v: tuple[torch.Size, tuple[int, ...]],
    q_rank: Layout,
    k_rank: Layout,
    mask: Layout,
    positions: Layout,
    table: Layout,
    num_tokens: Layout,
    cache_seqlens: Layout,
    k_scale_tensor: Layout,
    v_scale_tensor: Layout,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    mask_dtype: torch.dtype | None,
    packed_keys: bool,
    strict: bool,
    softmax_scale: float,
    softcap: float,
    window_size: int,
    k_scale: float,
    v_scale: float,
    return_lse: bool,
) -> Fixed:
    packed, (Hkv, Dv), D = len(q[0]) == 3, v[0][-2:], q[0][-1]
    tiles_q, tiles_k = -(-Nq // BM), -(-Nk // BN)
    slots = B * tiles_q
    if packed:
        slots = min(slots, total // BM + B)
    form = 0 if mask_dtype is None else 1 if mask_dtype == torch.bool else 2
    stride_qr, stride_kr, stride_at, stride_mask = map(by_row, (q_rank, k_rank, positions, mask))
    if packed:
        stride_mask = (0, 0 if mask is None else mask[1][0])
    both = dict(
        batch=B,
        total_q=total,
        total_k=k[0][0] if packed_keys else 0,
        longest_q=Nq,
        longest_k=Nk,
        num_pages=k[0][0],
        slots=slots,
        tiles_q=tiles_q,
        tiles_k=tiles_k,
        window=max(window_size, 0),
        stride_queries=last_stride(num_tokens),
        stride_keys=last_stride(cache_seqlens),
        stride_qr_b=stride_qr[0],
        stride_qr_n=stride_qr[1],
        stride_kr_b=stride_kr[0],
        stride_kr_n=stride_kr[1],
        stride_table=0 if table is None else table[1][0],
        stride_page=1 if table is None else table[1][1],
        stride_at_b=stride_at[0],
        stride_at_n=stride_at[1],
        stride_lse_h=(total if packed else Nq) if return_lse else 0,
        PAGE_SIZE=0 if table is None else max(k[0][1], 1),
        STRICT=strict,
        WINDOWED=window_size >= 0,
        MASK=form,
    )
    scale, factor, cap = scales(softmax_scale, softcap, k_scale, k_scale_tensor is not None)
    stride_q, stride_k, stride_v = (x[1] if len(x[1]) == 4 else (0, *x[1]) for x in (q, k, v))
    ks, vs = by_head(k_scale_tensor), by_head(v_scale_tensor)
    attend_numbers = dict(
        scale=scale,
        factor=factor,
        cap=cap,
        v_factor=v_scale,
        stride_q_b=stride_q[0],
        stride_q_n=stride_q[1],
        stride_q_h=stride_q[2],
        stride_k_b=stride_k[0],
        stride_k_n=stride_k[1],
        stride_k_h=stride_k[2],
        stride_v_b=stride_v[0],
        stride_v_n=stride_v[1],
        stride_v_h=stride_v[2],
        stride_out_b=0 if packed else Nq * Hq * Dv,
        stride_lse_b=0 if packed or not return_lse else Hq * Nq,
        stride_ks_b=ks[0],
        stride_ks_h=ks[1],
        stride_vs_b=vs[0],
        stride_vs_h=vs[1],
        HEADS=Hq,
        DV=Dv,
        GROUP=Hq // Hkv,
        D=D,
        BLOCK_D=block_of(D),
        BLOCK_DV=block_of(Dv),
        CAPPED=softcap > 0,
        K_FORM=FORMS.get(k_dtype, 0),
        V_FORM=FORMS.get(v_dtype, 0),
    )
    rows = q[0][:-2]
    return Fixed(
        out=(*rows, Hq, Dv),
        lse=(*rows[:-1], Hq, rows[-1]) if return_lse else (0,),
        lists=slots * (tiles_k + _HEADER) + total,
        words=slots * tiles_k * BM * -(-BN // 32) if form else 0,
        plan_key=("plan", BM, BN, int(form > 0)),
        plan_grid=slots + -(-total // BM),
        attend_grid=slots * Hq,
        both=both,
        plan=dict(
            stride_mask_b=stride_mask[0],
            stride_mask_n=stride_mask[1],
            heads=Hq,
            width=Hq * Dv,
        ),
        attend=attend_numbers,
    )


def scales(
    softmax_scale: float, softcap: float, k_scale: float, by_tensor: bool
) -> tuple[float, float | None, float]:
    """What ``attention_steps`` multiplies scores by: (scale > 0 into base 2, factor, cap)."""
    raw = softmax_scale * k_scale
    if softcap > 0:
        return softcap * _LOG2E, 1.0 if by_tensor else None, raw / softcap
    if not by_tensor and raw > 0:
        return raw * _LOG2E, None, 0.0
    return _LOG2E, raw, 0.0


def block_of(D: int) -> int:
    return max(16, 1 << max(D - 1, 0).bit_length())


def layout(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride())


def by_row(x: Layout) -> tuple[int, int]:
    """Strides of [B|1, N, ...], or of packed [total]."""
    if x is None:
        return 0, 0
    if len(x[0]) == 1:
        return 0, x[1][0]
    return (x[1][0] if x[0][0] > 1 else 0), x[1][1]


def by_head(x: Layout) -> tuple[int, int]:
    """Strides of a scale: 0-d, [Hkv] or [B, Hkv]."""
    if x is None or not x[0]:
        return 0, 0
    return (x[1][0] if len(x[0]) == 2 else 0), x[1][-1]


def last_stride(x: Layout) -> int:
    return 0 if x is None or not x[0] else x[1][0]
