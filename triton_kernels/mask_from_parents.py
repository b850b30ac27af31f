"""The ancestor mask of a tree in one launch: a program a tree and word of the mask."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .ancestors import bits_of_path, entry_of, links
from .devices import on_device_of
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("mask_from_parents")


@triton.jit(do_not_specialize=["T", "words", "stride_b", "stride_t"])
def mask_rows(
    parents, mask, T, words, stride_b, stride_t, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
):
    """mask [trees, T, words]: bit i of a row is its own or an ancestor's."""
    b, word = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    jump, _ = links(parents + b * stride_b, i, i < T, stride_t)
    own = tl.full([BLOCK], 1, tl.int64) << (i % 64)
    bits = bits_of_path(tl.where(i // 64 == word, own, 0), jump, ROUNDS)
    tl.store(mask + (b * T + i) * words + word, bits, mask=i < T)


def mask_from_parents(parents: Tensor) -> Tensor:
    """parents [..., T] -> packed int64 [..., T, ceil(T/64)]."""
    T = parents.shape[-1]
    entry = entry_of("mask_from_parents", CONFIGURATIONS, T)
    shape = (*parents.shape, -(-T // 64))
    mask = torch.empty(shape, dtype=torch.int64, device=parents.device)
    if mask.numel():
        flat = parents if parents.dim() == 2 else parents.reshape(-1, T)
        with on_device_of(parents):
            grid = (flat.shape[0], shape[-1])
            launch(mask_rows, grid, **arguments(flat, mask), **entry)
    return mask


def arguments(parents: Tensor, mask: Tensor) -> dict[str, Any]:
    """parents [trees, T]."""
    return dict(
        parents=parents,
        mask=mask,
        T=parents.shape[1],
        words=mask.shape[-1],
        stride_b=parents.stride(0),
        stride_t=parents.stride(1),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    for key in CONFIGURATIONS:
        for dtype in (torch.int32, torch.int64):
            T = key[0]
            parents = torch.empty(8, T, dtype=dtype, device="meta")
            mask = torch.empty(8, T, T // 64, dtype=torch.int64, device="meta")
            note = str(dtype).removeprefix("torch.")
            yield StaticCall(mask_rows, key, arguments(parents, mask), dtype, note=note)
