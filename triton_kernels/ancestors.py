"""Walks towards a tree's root by doubling: after r rounds a node knows its 2^r nearest ancestors.

A parent counts if it precedes its child (0 <= parent < own index); any other ends the walk, so the
node is a root. Roots point at themselves, which neither or, minimum nor a sum of 0 minds; so no
walk can cycle or leave the tree.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..backends import BackendUnavailable


@triton.jit
def links(parents, i, inside, stride):
    """Each node's parent, itself for a root, and whether it has one."""
    parent = tl.load(parents + i.to(tl.int64) * stride, mask=inside, other=-1).to(tl.int64)
    linked = (parent >= 0) & (parent < i)
    return tl.where(linked, parent, i).to(tl.int32), linked


@triton.jit
def bits_of_path(bits, jump, ROUNDS: tl.constexpr):
    """The or of every node's and all its ancestors' bits."""
    for _ in tl.static_range(ROUNDS):
        bits |= tl.gather(bits, jump, 0)
        jump = tl.gather(jump, jump, 0)
    return bits


@triton.jit
def smallest(keys, k, BITS: tl.constexpr):
    """The k-th smallest (from 1) of int64 keys in [0, 2^BITS), bit by bit; larger keys are none."""
    found = tl.zeros([], tl.int64)
    for i in range(BITS):
        tried = found + (tl.full([], 1, tl.int64) << (BITS - 1 - i))
        found = tl.where(tl.sum((keys < tried).to(tl.int32)) < k, tried, found)
    return found


@triton.jit
def ascending(x):
    """fp32 as an int32 of the same order, where -0 is 0; NaN is anything."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def entry_of(op: str, table: Mapping[Any, dict[str, Any]], n: int) -> dict[str, Any]:
    """The entry for trees of n nodes, which one program holds: n has a limit."""
    found = table.get((max(64, triton.next_power_of_2(n)),))
    if found is None:
        largest = max(key[0] for key in table if isinstance(key[0], int))
        raise BackendUnavailable(
            f"{op}: 'triton' cannot run this call: trees of up to {largest} nodes, got {n}"
        )
    return found
