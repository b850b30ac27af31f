"""EAGLE-2's rerank in one launch: a program takes one request's whole beam."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .ancestors import ascending, bits_of_path, entry_of, links, smallest
from .devices import on_device_of
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("dynamic_tree")


@triton.jit(
    do_not_specialize=[
        *("M", "T", "words", "stride_score_b", "stride_score", "stride_token_b", "stride_token"),
        *("stride_parent_b", "stride_parent"),
    ]
)
def rerank(
    scores,
    tokens,
    parents,
    new_parents,
    depths,
    mask,
    choice,
    M,
    T,
    words,
    stride_score_b,
    stride_score,
    stride_token_b,
    stride_token,
    stride_parent_b,
    stride_parent,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The T best of a beam's M entries: new_parents, depths, choice [B, T], mask [B, T, words]."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < M
    parent, linked = links(parents + b * stride_parent_b, i, inside, stride_parent)
    column = i.to(tl.int64)
    token = tl.load(tokens + b * stride_token_b + column * stride_token, mask=inside, other=-1)
    score = tl.load(scores + b * stride_score_b + column * stride_score, mask=inside, other=0)
    value = score.to(tl.float32)
    value = tl.where(value != value, float("-inf"), value)
    value = tl.where(i == 0, float("inf"), value)

    # along each path: is all of it there, its least value, its length
    there = (inside & ((i == 0) | (linked & (token >= 0)))).to(tl.int32)
    depth, jump = linked.to(tl.int32), parent
    for _ in tl.static_range(ROUNDS):
        there = tl.minimum(there, tl.gather(there, jump, 0))
        value = tl.minimum(value, tl.gather(value, jump, 0))
        depth += tl.gather(depth, jump, 0)
        jump = tl.gather(jump, jump, 0)

    # the T best: those there first, then the largest values, then the lowest indices
    key = 0x7FFFFFFF - ascending(value).to(tl.int64) + ((1 - there).to(tl.int64) << 32)
    key = tl.where(inside, key, tl.full([], 1, tl.int64) << 33)
    last = smallest(key, T, 33)
    room = T - tl.sum((key < last).to(tl.int32))
    tie = key == last
    chosen = (key < last) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))

    # their places in the tree: by index, absent ones last
    real = chosen & (there == 1)
    absent = chosen & (there == 0)
    num_real = tl.sum(real.to(tl.int32))
    place = tl.where(
        real, tl.cumsum(real.to(tl.int32), 0), num_real + tl.cumsum(absent.to(tl.int32), 0)
    )
    place -= 1
    above = tl.gather(place, parent, 0)
    at = b * T + place
    tl.store(choice + at, column, mask=chosen)
    tl.store(new_parents + at, tl.where(real & (i > 0), above, -1).to(tl.int64), mask=chosen)
    tl.store(depths + at, tl.where(real, depth, 0).to(tl.int64), mask=chosen)

    # what they see: a real node's ancestors are all chosen, an absent one is alone
    walk = tl.where(real, parent, i)
    own = tl.full([BLOCK], 1, tl.int64) << (place % 64)
    for word in range(words):
        bits = tl.where(chosen & (place // 64 == word), own, 0)
        bits = bits_of_path(bits, walk, ROUNDS)
        tl.store(mask + at * words + word, bits, mask=chosen)


def dynamic_tree(
    scores: Tensor, tokens: Tensor, parents: Tensor, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores, tokens, parents [B, M] -> parents, depths [B, T], mask [B, T, W], choice [B, T]."""
    B, M = scores.shape
    entry = entry_of("dynamic_tree", CONFIGURATIONS, M)
    shapes = ((B, num_nodes), (B, num_nodes), (B, num_nodes, -(-num_nodes // 64)), (B, num_nodes))
    results = tuple(torch.empty(s, dtype=torch.int64, device=scores.device) for s in shapes)
    if B:
        given = arguments(scores, tokens, parents, *results)
        with on_device_of(scores):
            launch(rerank, (B,), **given, **entry)
    return results  # type: ignore[return-value]


def arguments(
    scores: Tensor,
    tokens: Tensor,
    parents: Tensor,
    new_parents: Tensor,
    depths: Tensor,
    mask: Tensor,
    choice: Tensor,
) -> dict[str, Any]:
    return dict(
        scores=scores,
        tokens=tokens,
        parents=parents,
        new_parents=new_parents,
        depths=depths,
        mask=mask,
        choice=choice,
        M=scores.shape[1],
        T=choice.shape[1],
        words=mask.shape[2],
        stride_score_b=scores.stride(0),
        stride_score=scores.stride(1),
        stride_token_b=tokens.stride(0),
        stride_token=tokens.stride(1),
        stride_parent_b=parents.stride(0) if parents.shape[0] > 1 else 0,
        stride_parent=parents.stride(1),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, T = 8, 60
    for key in CONFIGURATIONS:
        for dtype, index in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
            beam = [empty(B, key[0], dtype=d) for d in (dtype, index, index)]
            made = arguments(*beam, empty(B, T), empty(B, T), empty(B, T, 1), empty(B, T))
            note = str(dtype).removeprefix("torch.")
            yield StaticCall(rerank, key, made, dtype, note=note)
