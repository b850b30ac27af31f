"""Packing bool masks into 64-bit words, in one launch."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .devices import on_device_of
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("pack_mask")


@triton.jit(do_not_specialize=["rows", "words", "M"])
def pack(
    mask, packed, rows, words, M, N, stride_l, stride_m, stride_n, ROWS: tl.constexpr
):  # fmt: skip
    """packed [rows, words] of mask [rows / M, M, N], bytes that are 0 or not. N is specialised:
    where it is a multiple of 16, 16 bytes are under one condition and loaded at once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1)
    bit = tl.arange(0, 64)
    j = word * 64 + bit
    at = (row // M).to(tl.int64) * stride_l + (row % M).to(tl.int64) * stride_m
    inside = (row < rows)[:, None] & (j < N)[None, :]
    x = tl.load(mask + at[:, None] + j.to(tl.int64)[None, :] * stride_n, mask=inside, other=0)
    bits = (x != 0).to(tl.int64) << bit.to(tl.int64)[None, :]
    tl.store(packed + row.to(tl.int64) * words + word, tl.sum(bits, 1), mask=row < rows)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [..., M, N] -> int64 [..., M, ceil(N/64)]."""
    N = mask.shape[-1]
    shape = (*mask.shape[:-1], -(-N // 64))
    packed = torch.empty(shape, dtype=torch.int64, device=mask.device)
    if packed.numel():
        entry = CONFIGURATIONS[()]
        rows = packed.numel() // shape[-1]
        with on_device_of(mask):
            grid = (-(-rows // entry["ROWS"]), shape[-1])
            launch(pack, grid, **arguments(mask, packed), **entry)
    return packed


def arguments(mask: Tensor, packed: Tensor) -> dict[str, Any]:
    M, N = mask.shape[-2:]
    flat = (mask if mask.dim() == 3 else mask.reshape(-1, M, N)).view(torch.uint8)
    words = packed.shape[-1]
    return dict(
        mask=flat,
        packed=packed,
        rows=packed.numel() // words,
        words=words,
        M=M,
        N=N,
        stride_l=flat.stride(0),
        stride_m=flat.stride(1),
        stride_n=flat.stride(2),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def call(N: int, note: str, transposed: bool = False) -> StaticCall:
        mask = torch.empty(8, N, N, dtype=torch.bool, device="meta")
        packed = torch.empty(8, N, -(-N // 64), dtype=torch.int64, device="meta")
        made = arguments(mask.mT if transposed else mask, packed)
        wide = N % 16 == 0 and not transposed
        bytes_ = CONFIGURATIONS[()]["ROWS"] * 64 if wide else 0
        return StaticCall(
            pack, (), made, torch.uint8, streamed=bytes_, aligned=N % 16 == 0, note=note
        )

    yield call(64, "N=64")
    yield call(65, "odd N")
    yield call(128, "transposed", True)
