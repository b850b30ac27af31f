"""The r least sure committed tokens become masks again: one launch, a program a request."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .ancestors import ascending
from .attention_steps import number_of
from .devices import on_device_of
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("remask")
NOBODY = tl.constexpr(1 << 33)  # past every committed token's key


@triton.jit
def keys_of(tokens, scores, i, L, stride_token, stride_score, mask_id, BLOCK: tl.constexpr):
    """Least sure first: NaN, then by score; masks are nobody. 33 bits."""
    o = i + tl.arange(0, BLOCK)
    at = o.to(tl.int64)
    token = tl.load(tokens + at * stride_token, mask=o < L, other=0)
    score = tl.load(scores + at * stride_score, mask=o < L, other=0).to(tl.float32)
    key = ascending(score).to(tl.int64) + 0x80000001
    key = tl.where(score == score, key, 0)
    return tl.where((o < L) & (token != mask_id), key, NOBODY), token, o


@triton.jit(
    do_not_specialize=[
        *("r", "L", "mask_id", "stride_r"),
        *("stride_token_b", "stride_token", "stride_score_b", "stride_score"),
    ]
)
def mask_least(
    tokens,
    scores,
    r,
    result,
    L,
    mask_id,
    stride_r,
    stride_token_b,
    stride_token,
    stride_score_b,
    stride_score,
    BLOCK: tl.constexpr,
):
    """tokens, scores [B, L] -> result [B, L], contiguous."""
    b = tl.program_id(0).to(tl.int64)
    count = number_of(r, b, stride_r)
    tokens += b * stride_token_b
    scores += b * stride_score_b

    # the count-th smallest key, bit by bit; with too few of them it ends past all
    last = tl.zeros([], tl.int64)
    for bit in range(33):
        tried = last + (tl.full([], 1, tl.int64) << (32 - bit))
        fewer = tl.zeros([], tl.int32)
        for i in range(0, L, BLOCK):
            key, _, _ = keys_of(tokens, scores, i, L, stride_token, stride_score, mask_id, BLOCK)
            fewer += tl.sum((key < tried).to(tl.int32))
        last = tl.where(fewer < count, tried, last)
    fewer = tl.zeros([], tl.int32)
    for i in range(0, L, BLOCK):
        key, _, _ = keys_of(tokens, scores, i, L, stride_token, stride_score, mask_id, BLOCK)
        fewer += tl.sum((key < last).to(tl.int32))

    # all before it, and of its equals the first by position
    room = count - fewer
    for i in range(0, L, BLOCK):
        key, token, o = keys_of(tokens, scores, i, L, stride_token, stride_score, mask_id, BLOCK)
        tie = (key == last).to(tl.int32)
        chosen = (key < last) | ((tie == 1) & (tl.cumsum(tie, 0) <= room))
        room -= tl.sum(tie)
        tl.store(result + b * L + o, tl.where(chosen & (count > 0), mask_id, token), mask=o < L)


def remask(tokens: Tensor, scores: Tensor, r: int, r_tensor: Tensor | None, mask_id: int) -> Tensor:
    """tokens, scores [B, L] -> tokens [B, L]."""
    B, L = tokens.shape
    result = torch.empty(B, L, dtype=tokens.dtype, device=tokens.device)
    if B * L:
        given = arguments(tokens, scores, r, r_tensor, mask_id, result)
        with on_device_of(tokens):
            launch(mask_least, (B,), **given, **CONFIGURATIONS[key_of(L)])
    return result


def key_of(L: int) -> tuple[int]:
    """Entries that are looked at together."""
    return (256 if L <= 256 else 1024 if L <= 1024 else 4096,)


def arguments(
    tokens: Tensor, scores: Tensor, r: int, r_tensor: Tensor | None, mask_id: int, result: Tensor
) -> dict[str, Any]:
    per_request = r_tensor is not None and r_tensor.dim() > 0
    return dict(
        tokens=tokens,
        scores=scores,
        r=r if r_tensor is None else r_tensor,
        result=result,
        L=tokens.shape[1],
        mask_id=mask_id,
        stride_r=r_tensor.stride(0) if per_request else 0,  # type: ignore[union-attr]
        stride_token_b=tokens.stride(0),
        stride_token=tokens.stride(1),
        stride_score_b=scores.stride(0),
        stride_score=scores.stride(1),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for key in CONFIGURATIONS:
        L = key[0]  # type: ignore[index]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for r in (None, empty(8)):
                made = arguments(empty(8, L), empty(8, L, dtype=dtype), 4, r, 9, empty(8, L))
                note = f"{str(dtype).removeprefix('torch.')}{'' if r is None else ', r a request'}"
                yield StaticCall(mask_least, key, made, dtype, note=note)
