"""Merging attention states in one launch, whatever the number of parts and wherever they lie."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .devices import on_device_of
from .numerics import LOG2E, power_of_two
from .static_call import StaticCall
from .vocabulary import plain

CONFIGURATIONS = configurations.load("merge_states")


@triton.jit
def log_weight(temperatures, scales, stride_temperature, stride_scale, m, natural):
    """What part m's log-sum-exp is multiplied by, to natural logarithms."""
    weight = natural
    if temperatures is not None:
        weight *= tl.load(temperatures + m * stride_temperature).to(tl.float32)
    if scales is not None:
        weight *= tl.load(scales + m * stride_scale).to(tl.float32)
    return weight


@triton.jit
def place(b, k, n, h, strides, m: tl.constexpr):
    """Offset of (b, k, n, h) in part m."""
    at = b * strides[4 * m] + k * strides[4 * m + 1]
    return at + n * strides[4 * m + 2] + h * strides[4 * m + 3]


@triton.jit
def lse_place(b, k, n, h, strides, m: tl.constexpr):
    """``place`` by strides that change with N, and so come as ``plain`` ones."""
    at = b * (strides[4 * m] >> 2) + k * (strides[4 * m + 1] >> 2)
    return at + n * (strides[4 * m + 2] >> 2) + h * (strides[4 * m + 3] >> 2)


@triton.jit(do_not_specialize=["parts", "rows", "N", "K"])
def merge(
    outs,
    lses,
    out_strides,
    lse_strides,
    temperatures,
    scales,
    stride_temperature,
    stride_scale,
    merged,
    merged_strides,
    out,
    lse,
    parts,
    rows,
    H,
    N,
    K,
    natural,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[row] = sum over m of softmax(l)_m outs[m][row], of ROWS rows (b, k, n, h).

    outs, lses: tuples of PARTS pointers, PARTS a power of two, of which ``parts`` count.
    out_strides, lse_strides: of all parts in a row, of b, k, n, h. out and lse are contiguous.
    merged: None, or bytes by b, k, n that are 0 where out and lse are those of part 0.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = row < rows
    h, n = (row % H).to(tl.int64), (row // H % N).to(tl.int64)
    batch = row // H // N
    k, b = (batch % K).to(tl.int64), (batch // K).to(tl.int64)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    for m in tl.static_range(PARTS):
        at = lse_place(b, k, n, h, lse_strides, m)
        l = tl.load(lses[m] + at, mask=real & (row * 0 + m < parts), other=float("-inf"))
        if parts > m:
            weight = log_weight(temperatures, scales, stride_temperature, stride_scale, m, natural)
            l = tl.where(l == float("-inf"), l, l * weight)
        top = tl.maximum(top, l, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)

    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for m in tl.static_range(PARTS):
        at = lse_place(b, k, n, h, lse_strides, m)
        l = tl.load(lses[m] + at, mask=real & (row * 0 + m < parts), other=float("-inf"))
        seen = l != float("-inf")
        if parts > m:
            weight = log_weight(temperatures, scales, stride_temperature, stride_scale, m, natural)
            l = tl.where(seen, l * weight, l)
        p = tl.exp2((l - base) * LOG2E)
        total += p
        at = place(b, k, n, h, out_strides, m)
        # what saw nothing is not read: it may be NaN
        mask = seen[:, None] & (d < D)[None, :]
        part = tl.load(outs[m] + at[:, None] + d[None, :], mask=mask, other=0.0)
        acc += p[:, None] * part.to(tl.float32)

    acc = tl.where((total == 0)[:, None], 0.0, acc / total[:, None])
    result = acc.to(out.dtype.element_ty)
    log = (base + tl.log(total)) / natural
    if merged is not None:
        at = lse_place(b, k, n, h * 0, merged_strides, 0)
        kept = real & (tl.load(merged + at, mask=real, other=1) == 0)
        at = lse_place(b, k, n, h, lse_strides, 0)
        log = tl.where(kept, tl.load(lses[0] + at, mask=kept, other=0.0), log)
        at = place(b, k, n, h, out_strides, 0)
        mask = kept[:, None] & (d < D)[None, :]
        first = tl.load(outs[0] + at[:, None] + d[None, :], mask=mask, other=0.0)
        result = tl.where(mask, first, result)
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + at, result, mask=real[:, None] & (d < D)[None, :])
    if tl.program_id(1) == 0:
        place_of_lse = ((b * K + k) * H + h) * N + n
        tl.store(lse + place_of_lse, log, mask=real)


def merge_states(
    outs: list[Tensor],
    lses: list[Tensor],
    temperatures: Tensor | None,
    scales: Tensor | None,
    mask: Tensor | None,
    log_base: float,
) -> tuple[Tensor, Tensor]:
    """outs M of [..., N, H, D], lses M of [..., H, N] -> out [..., N, H, D], lse [..., H, N]."""
    first = outs[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    lse = torch.empty(lses[0].shape, dtype=torch.float32, device=first.device)
    if lse.numel() == 0:
        return out, lse
    if lse.numel() > 2**31 - 2**12:
        raise ValueError(f"outs: expected at most 2**31 rows (N H) a part, got {lse.numel()}")
    D = first.shape[-1]
    entry = CONFIGURATIONS[(block_of(D),)]
    grid = (-(-lse.numel() // entry["ROWS"]), max(1, -(-D // entry["BLOCK_D"])))
    given = arguments(outs, lses, temperatures, scales, mask, log_base, out, lse)
    with on_device_of(first):
        launch(merge, grid, **given, **entry)
    return out, lse


def block_of(D: int) -> int:
    """Head dims that one program does; wider heads take several."""
    return min(256, max(16, power_of_two(D)))


def arguments(
    outs: list[Tensor],
    lses: list[Tensor],
    temperatures: Tensor | None,
    scales: Tensor | None,
    mask: Tensor | None,
    log_base: float,
    out: Tensor,
    lse: Tensor,
) -> dict[str, Any]:
    """The kernel's arguments. The tuples are filled up to a power of two, which bounds how many
    binaries a changing number of parts makes.
    """
    parts = len(outs)
    fill = power_of_two(parts) - parts
    outs, lses = [*outs, *outs[:1] * fill], [*lses, *lses[:1] * fill]
    shape = out.shape
    return dict(
        outs=tuple(outs),
        lses=tuple(lses),
        out_strides=tuple(s for x in outs for s in four(x.stride()[:-1])),
        lse_strides=tuple(
            plain(s) for x in lses for s in four((*x.stride()[:-2], x.stride(-1), x.stride(-2)))
        ),
        temperatures=temperatures,
        scales=scales,
        stride_temperature=0 if temperatures is None else temperatures.stride(0),
        stride_scale=0 if scales is None else scales.stride(0),
        merged=None if mask is None else mask.view(torch.uint8),
        merged_strides=tuple(map(plain, (0,) * 4 if mask is None else four((*mask.stride(), 0)))),
        out=out,
        lse=lse,
        parts=parts,
        rows=lse.numel(),
        H=shape[-2],
        N=shape[-3],
        K=shape[-4] if len(shape) == 5 else 1,
        natural=math.log(log_base),
        D=shape[-1],
        PARTS=len(outs),
    )


def four(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of (n, h), (b, n, h) or (b, k, n, h), as those of (b, k, n, h)."""
    if len(strides) == 4:
        return strides
    return (*strides[:-2], 0, *strides[-2:]) if len(strides) == 3 else (0, 0, *strides)


def static_calls(arch: str) -> Iterator[StaticCall]:
    def call(
        parts: int,
        D: int,
        dtype: torch.dtype,
        *,
        weighed: bool = False,
        masked: bool = False,
        step: int = 0,
    ) -> StaticCall:
        outs = torch.empty(parts, 8, 64, 32, D + step, dtype=dtype, device="meta")[..., :D]
        lses = torch.empty(parts, 8, 32, 64, device="meta")
        weights = torch.empty(parts, device="meta") if weighed else None
        out, lse = torch.empty(outs.shape[1:], dtype=dtype, device="meta"), lses[0]
        mask = torch.empty(8, 64, dtype=torch.bool, device="meta") if masked else None
        given = arguments(list(outs), list(lses), weights, weights, mask, math.e, out, lse)
        key = (block_of(D),)
        note = f"{str(dtype).removeprefix('torch.')} M={parts} D={D}"
        note += " odd stride" * bool(step) + " masked" * masked
        entry = CONFIGURATIONS[key]
        bytes_ = entry["ROWS"] * entry["BLOCK_D"] * dtype.itemsize if block_of(D) == D else 0
        return StaticCall(merge, key, given, dtype, streamed=bytes_, aligned=step == 0, note=note)

    for D in (16, 32, 64, 128, 256):
        yield call(2, D, torch.bfloat16)
    yield call(8, 128, torch.bfloat16, weighed=True)
    yield call(4, 128, torch.float32)
    yield call(3, 80, torch.float16)
    yield call(2, 512, torch.float16)
    yield call(2, 64, torch.float16, step=1)
    for D in (16, 128, 256):
        yield call(2, D, torch.bfloat16, masked=True)
