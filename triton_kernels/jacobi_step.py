"""One Jacobi iteration's bookkeeping in one launch, a program a request."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .attention_steps import clamp, number_of
from .devices import on_device_of
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("jacobi_step")


@triton.jit(
    do_not_specialize=[
        *("num_valid", "n", "stride_valid"),
        *("stride_draft_b", "stride_draft", "stride_target_b", "stride_target"),
    ]
)
def step(
    draft,
    target,
    num_valid,
    num_accepted,
    next_draft,
    converged,
    n,
    stride_valid,
    stride_draft_b,
    stride_draft,
    stride_target_b,
    stride_target,
    BLOCK: tl.constexpr,
):
    """draft, target [B, n]; next_draft [B, n] is contiguous."""
    b = tl.program_id(0).to(tl.int64)
    last = clamp(number_of(num_valid, b, stride_valid), 1, n).to(tl.int32) - 1
    draft += b * stride_draft_b
    target += b * stride_target_b

    # the run of rows whose guess of the next token is what the model says
    accepted = last
    i = tl.zeros([], tl.int32)
    while i < accepted:
        o = i + tl.arange(0, BLOCK)
        inside = o < last
        at = o.to(tl.int64)
        guess = tl.load(draft + (at + 1) * stride_draft, mask=inside, other=0).to(tl.int64)
        said = tl.load(target + at * stride_target, mask=inside, other=0).to(tl.int64)
        wrong = tl.min(tl.where(inside & (guess != said), o, last))
        accepted = tl.minimum(accepted, wrong)
        i += BLOCK
    tl.store(num_accepted + b, accepted)
    tl.store(converged + b, (accepted == last).to(tl.uint8))

    # what the model says after the run, the last valid word repeated
    for j in range(0, n, BLOCK):
        o = j + tl.arange(0, BLOCK)
        at = tl.minimum(accepted + o.to(tl.int64), last)
        said = tl.load(target + at * stride_target, mask=o < n, other=0)
        tl.store(next_draft + b * n + o, said.to(next_draft.dtype.element_ty), mask=o < n)


def jacobi_step(
    draft: Tensor, target: Tensor, num_valid: int, num_valid_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """draft, target [B, n] -> num_accepted [B] int32, next_draft [B, n], converged bool [B]."""
    B, n = draft.shape
    make = torch.empty if n else torch.zeros  # without rows all have converged at 0
    num_accepted = make(B, dtype=torch.int32, device=draft.device)
    next_draft = torch.empty(B, n, dtype=draft.dtype, device=draft.device)
    converged = (torch.empty if n else torch.ones)(B, dtype=torch.bool, device=draft.device)
    if B * n:
        results = (num_accepted, next_draft, converged)
        given = arguments(draft, target, num_valid, num_valid_tensor, *results)
        with on_device_of(draft):
            launch(step, (B,), **given, **CONFIGURATIONS[()])
    return num_accepted, next_draft, converged


def arguments(
    draft: Tensor,
    target: Tensor,
    num_valid: int,
    num_valid_tensor: Tensor | None,
    num_accepted: Tensor,
    next_draft: Tensor,
    converged: Tensor,
) -> dict[str, Any]:
    per_request = num_valid_tensor is not None and num_valid_tensor.dim() > 0
    return dict(
        draft=draft,
        target=target,
        num_valid=num_valid if num_valid_tensor is None else num_valid_tensor,
        num_accepted=num_accepted,
        next_draft=next_draft,
        converged=converged.view(torch.uint8),
        n=draft.shape[1],
        stride_valid=num_valid_tensor.stride(0) if per_request else 0,  # type: ignore[union-attr]
        stride_draft_b=draft.stride(0),
        stride_draft=draft.stride(1),
        stride_target_b=target.stride(0),
        stride_target=target.stride(1),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for dtype in (torch.int64, torch.int32):
        for valid in (None, empty(8, dtype=torch.int32)):
            draft, converged = empty(8, 64, dtype=dtype), empty(8, dtype=torch.bool)
            accepted = empty(8, dtype=torch.int32)
            made = arguments(draft, empty(8, 64), 64, valid, accepted, draft, converged)
            note = f"{str(dtype).removeprefix('torch.')} {'all' if valid is None else 'ragged'}"
            yield StaticCall(step, (), made, dtype, note=note)
