"""A node's laws and what rejections leave of them, for the tree rules.

Nothing of a vocabulary's size is stored: a node's residual p' after some rejected children is told
by a few numbers a child (``record``), and worked out anew wherever an entry of it is needed, from
p, q and those numbers, in the order of the rejections:

    p' <- (a p' - q')+ / S, or p' as it was; without replacement q'(x) <- 0, q' <- q' / Q

``a`` is 1 but for traversal. A child's record also names the sibling that was tested after it.
"""

import triton
import triton.language as tl

from .tree_rows import drawn_chunk, proposal_at, proposal_chunk, target_at, target_chunk, token_of
from .vocabulary import drawn

FIELDS = tl.constexpr(4)  # of a record: a, S (negative: p' stayed), Q, another child (int32)


@triton.jit
def record(tree, b, T, child, a, S, Q, sibling):
    """Notes the rejection of ``child``, for all threads of the program."""
    at = tree.records + (b * T + child) * FIELDS
    tl.store(at, a)
    tl.store(at + 1, S)
    tl.store(at + 2, Q)
    tl.store((at + 3).to(tl.pointer_type(tl.int32)), sibling)
    tl.debug_barrier()


@triton.jit
def sibling_of(tree, b, T, child):
    """The child that was tested after this rejected one."""
    at = tree.records + (b * T + child) * FIELDS + 3
    return tl.load(at.to(tl.pointer_type(tl.int32)))


@triton.jit
def left_of(p, q, v, tree, b, T, head, count, WITHOUT: tl.constexpr):
    """(p', q') of the entries v, after ``count`` rejected children from ``head`` on."""
    child = head
    for _ in range(count):
        at = tree.records + (b * T + child) * FIELDS
        a, S = tl.load(at), tl.load(at + 1)
        p = tl.where(S < 0, p, tl.maximum(a * p - q, 0.0) / S)
        if WITHOUT:
            q = tl.where(v == token_of(tree, b, child), 0.0, q / tl.load(at + 2))
        child = sibling_of(tree, b, T, child)
    return p, q


@triton.jit
def laws_chunk(
    p, q, P, Q, tree, b, T, head, count, start, WITHOUT: tl.constexpr, CHUNK: tl.constexpr
):
    """(p', q') of a chunk."""
    v = start + tl.arange(0, CHUNK)
    b_p = target_chunk(p, P, start, CHUNK) / P.mass
    b_q = proposal_chunk(q, Q, start, CHUNK)
    return left_of(b_p, b_q, v, tree, b, T, head, count, WITHOUT)


@triton.jit
def laws_at(p, q, P, Q, tree, b, T, head, count, token, WITHOUT: tl.constexpr, CHUNK: tl.constexpr):
    """(p', q') of one token."""
    one_p = target_at(p, P, token) / P.mass
    one_q = proposal_at(q, Q, token, CHUNK)
    return left_of(one_p, one_q, token, tree, b, T, head, count, WITHOUT)


@triton.jit
def residual(
    p, q, P, Q, tree, b, T, head, count, a, token,
    WITHOUT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(masses of (a p' - q')+ a chunk, mass of q' less the token)."""
    o_c = tl.arange(0, BLOCK_C)
    masses = tl.zeros([BLOCK_C], tl.float32)
    rest = tl.zeros([CHUNK], tl.float32)
    for c in range(p.C):
        start = c * CHUNK
        b_p, b_q = laws_chunk(p, q, P, Q, tree, b, T, head, count, start, WITHOUT, CHUNK)
        masses = tl.where(o_c == c, tl.sum(tl.maximum(a * b_p - b_q, 0.0), 0), masses)
        if WITHOUT:
            v = start + tl.arange(0, CHUNK)  # a reduced vocabulary may have ids beyond the target's
            rest += tl.where((v == token) | (v >= p.V), 0.0, b_q)
    return masses, tl.sum(rest, 0)


@triton.jit
def draw_left(
    p, q, P, Q, tree, b, T, head, count, masses, u,
    WITHOUT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A token of p', whose chunks have these masses."""
    c, before, target = drawn_chunk(masses, u, p.C, BLOCK_C)
    b_p, _ = laws_chunk(p, q, P, Q, tree, b, T, head, count, c * CHUNK, WITHOUT, CHUNK)
    return drawn(b_p, before, target, c * CHUNK, CHUNK)
