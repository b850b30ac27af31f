"""A tree's nodes and coins, and a node's rows, for the tree rules."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import philox
from .draws import coin
from .histograms import leave_counts
from .law_rows import (
    chunk_weights,
    draft_chunk,
    draft_token,
    least_of,
    place,
    raw_chunk,
    row_bits,
    temperature_of,
    token_log,
    token_weight,
)
from .narrowing import narrow
from .supports import KEPT, SUM, TOP, counts_of, field_of, resolve, row_scratch
from .thresholds import sought
from .vocabulary import (
    INFINITY,
    NO_TOKEN,
    Edits,
    as_scalar,
    crossing,
    drawn,
    number,
    rescale,
    scale_of,
    top_of,
    weights,
)

ACCEPT, RESAMPLE = philox.ACCEPT, philox.RESAMPLE


class Tree(NamedTuple):
    """Drafted trees, and what their walks note, as kernels see them."""

    tokens: Any  # int [B, T]
    parents: Any  # int [B|1, T]
    records: Any  # fp32 [B, T, FIELDS]
    stride_token_b: Any
    stride_token: Any
    stride_parent_b: Any  # 0 where requests share them, as ``plain`` has it
    stride_parent: Any
    count_of: Any  # nodes after the root, or None: the kernel's ``count``
    stride_count: Any


class Coins(NamedTuple):
    """What ``draws.coin`` needs."""

    draws: Any
    seed: Any
    offset: Any
    positions: Any


class Row(NamedTuple):
    """One row of a law; ``weight_chunk`` and ``weight_at`` give e(v), p = e / mass."""

    x: Any  # pointer
    bits: Any  # where its grammar's bits begin
    top: Any
    scale: Any
    floor: Any
    least: Any
    only: Any  # >= 0: all mass on that token of the target's vocabulary
    mass: Any  # sum of e
    Z: Any  # without filters


# ---- the tree and its coins ---------------------------------------------------------------------


@triton.jit
def last_node(tree, count, b):
    """Nodes after this one do not exist."""
    limit = as_scalar(number(count, tree.count_of, tree.stride_count, b), tl.int64)
    return tl.maximum(limit, 0)


@triton.jit
def read_nodes(tree, b, T, V, limit, BLOCK_T: tl.constexpr):
    """(index, token, parent) of all nodes; -1 for the root's, and where a node cannot exist."""
    i = tl.arange(0, BLOCK_T)
    at = i.to(tl.int64)
    tokens = tree.tokens + b * tree.stride_token_b + at * tree.stride_token
    parents = tree.parents + b * (tree.stride_parent_b >> 2) + at * tree.stride_parent
    x = tl.load(tokens, mask=i < T, other=-1).to(tl.int64)
    parent = tl.load(parents, mask=i < T, other=-1).to(tl.int64)
    there = (i > 0) & (i <= limit) & (x >= 0) & (x < V) & (parent >= 0) & (parent < i)
    return i, tl.where(there, x, -1).to(tl.int32), tl.where(there, parent, -1).to(tl.int32)


@triton.jit
def following(kids, i, last, BLOCK_T: tl.constexpr):
    """The first of ``kids`` (int32 marks) after ``last``; BLOCK_T if there is none."""
    return tl.min(tl.where((kids > 0) & (i > last), i, BLOCK_T), 0)


@triton.jit
def token_of(tree, b, child):
    at = tree.tokens + b * tree.stride_token_b + child.to(tl.int64) * tree.stride_token
    return tl.load(at).to(tl.int32)


@triton.jit
def node_coin(coins, b, node):
    """The coin of a node's accept test."""
    at = node.to(tl.int64)
    return coin(ACCEPT, coins.draws, coins.seed, coins.offset, coins.positions, b, at, at, at >= 0)


@triton.jit
def last_coin(coins, b, T):
    """The last token's: column T, index -1."""
    column, none = as_scalar(T, tl.int64), tl.full([], -1, tl.int64)
    return coin(
        RESAMPLE, coins.draws, coins.seed, coins.offset, coins.positions, b, column, none, none < 0
    )


# ---- rows ---------------------------------------------------------------------------------------


@triton.jit
def read_row(law, numbers, b, i, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row i of request b read whole: (Row, masses of its chunks, argmax, present, good).

    The chunks' numbers are those of ``law_prepare``, combined as there, but never leave the
    program, unless filters read the row again. A row that is not there is not read.
    """
    _at, row, present, inside = place(law, b, i)
    bits = row_bits(law, b, i)
    temperature = temperature_of(numbers, b)
    scale = scale_of(temperature)
    o_c = tl.arange(0, BLOCK_C)
    nothing = 0.0 if law.PROBS else -INFINITY
    tops = tl.zeros([BLOCK_C], tl.float32) + nothing
    sums = tl.zeros([BLOCK_C], tl.float32)
    bests = tl.zeros([BLOCK_C], tl.int32) + NO_TOKEN
    if law.SEARCHED:
        own = row_scratch(law.search, b)
        k, share = sought(numbers, b, law.V)
        searched = ((k > 0) | (share < 1)) & (temperature > 0)
    for c in range(0, tl.where(inside, law.C, 0)):
        x = raw_chunk(law, row, bits, c * CHUNK, CHUNK)
        if law.PROBS:
            x = tl.where(x >= 0, x, float("nan"))
        top, best = top_of(x, c * CHUNK, CHUNK)
        if law.PROBS:
            total = tl.sum(x, 0)
        else:
            total = tl.sum(weights(x, top, scale), 0)
        tops = tl.where(o_c == c, top, tops)
        sums = tl.where(o_c == c, total, sums)
        bests = tl.where(o_c == c, best, bests)
        if law.SEARCHED:
            tl.store(field_of(own, law.C, TOP) + c, top)
            tl.store(field_of(own, law.C, SUM) + c, total)
            if searched:
                leave_counts(counts_of(own, law.C, c), x, top)
    number_ = tops == tops
    top = tl.max(tl.where(number_, tops, nothing), 0)
    best = tl.min(tl.where(tops == top, bests, NO_TOKEN), 0)
    broken = tl.max(tl.where(number_, 0, 1), 0)
    masses = sums
    if not law.PROBS:
        masses = sums * rescale(tops, top, scale)
    Z = tl.sum(masses, 0)
    good = inside & (broken == 0) & (Z > 0) & (Z < INFINITY) & (temperature >= 0)
    floor = tl.full([], float("-inf"), tl.float32)
    mass = Z
    least = least_of(numbers, b)
    if law.SEARCHED:  # noqa: SIM102 (known at compile time)
        if good & (temperature > 0):
            if law.search.apart:
                floor, mass = kept_apart(
                    law, numbers, b, row, bits, own, top, Z, scale, least, CHUNK, BLOCK_C
                )
            else:
                floor, mass = kept_of(
                    law, numbers, b, row, bits, own, top, Z, scale, least, CHUNK, BLOCK_C
                )
            masses = tl.load(field_of(own, law.C, KEPT) + o_c, mask=o_c < law.C, other=0.0)
    only = tl.full([], -1, tl.int32)
    if law.vocab is None:
        only = tl.where(temperature == 0, best, only)
    elif temperature == 0:
        only = id_of(law, best, good)
    mass = tl.where(temperature == 0, 1.0, mass)
    return Row(row, bits, top, scale, floor, least, only, mass, Z), masses, best, present, good


@triton.jit
def kept_of(
    law, numbers, b, row, bits, own, top, Z, scale, least,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(floor, mass) of ``supports.resolve`` for a row of which ``own`` holds the first read's."""
    PART: tl.constexpr = CHUNK // 2 if law.search.apart else CHUNK  # fewer registers
    k, share = sought(numbers, b, law.V)
    tops, sums = field_of(own, law.C, TOP), field_of(own, law.C, SUM)
    tl.debug_barrier()  # what threads have written, others read
    k_low, k_high, p_low, p_high = narrow(
        row, Edits(law.allowed, bits), law.V, law.C, own, tops, sums, numbers, top, Z, scale,
        least, k, share,
        0, law.C, False, CHUNK, PART,
    )  # fmt: skip
    tl.debug_barrier()
    floor, mass = resolve(
        row, Edits(law.allowed, bits), law.V, law.C, own, top, Z, scale, least, k, share,
        k_low, k_high, p_low, p_high, False, CHUNK, PART, BLOCK_C,
    )  # fmt: skip
    tl.debug_barrier()
    return floor, mass


@triton.jit(noinline=True)
def kept_apart(
    law, numbers, b, row, bits, own, top, Z, scale, least,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``kept_of`` where the registers of a walk and of a search together are too many."""
    return kept_of(law, numbers, b, row, bits, own, top, Z, scale, least, CHUNK, BLOCK_C)


@triton.jit
def id_of(law, column, good):
    """The target's id of a column of a reduced vocabulary; NO_TOKEN where it has none."""
    token = tl.load(law.vocab + column, mask=good, other=-1).to(tl.int64)
    return tl.where((token >= 0) & (token < NO_TOKEN), token, NO_TOKEN).to(tl.int32)


@triton.jit
def target_chunk(p, row, start, CHUNK: tl.constexpr):
    """e(v) of a chunk of the target's law."""
    return chunk_weights(
        p, row.x, row.bits, start, row.top, row.scale, row.floor, row.least, -1, CHUNK
    )


@triton.jit
def target_at(p, row, token):
    return token_weight(
        p, row.x, row.bits, token, row.top, row.scale, row.floor, row.least, -1
    )  # fmt: skip


@triton.jit
def proposal_chunk(q, row, start, CHUNK: tl.constexpr):
    """q(v) of a chunk of the target's vocabulary."""
    e = draft_chunk(q, row.x, start, row.top, row.scale, row.floor, row.least, -1, CHUNK)
    one = tl.where(start + tl.arange(0, CHUNK) == row.only, 1.0, 0.0)
    return tl.where(row.only >= 0, one, e / row.mass)


@triton.jit
def proposal_at(q, row, token, CHUNK: tl.constexpr):
    e = draft_token(q, row.x, token, row.top, row.scale, row.floor, row.least, -1, CHUNK)
    return tl.where(row.only >= 0, tl.where(token == row.only, 1.0, 0.0), e / row.mass)


@triton.jit
def log_of(p, row, token):
    """log p(token) without filters."""
    return token_log(p, row.x, row.bits, token, row.top, row.scale, row.Z)


@triton.jit
def drawn_chunk(masses, u, C, BLOCK_C: tl.constexpr):
    """(chunk of the draw, the mass before it, u times all)."""
    c, before, target = crossing(masses, u, BLOCK_C)
    return tl.minimum(c, C - 1), before, target


@triton.jit
def draw_plain(p, P, masses, u, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """A token of p itself."""
    c, before, target = drawn_chunk(masses, u, p.C, BLOCK_C)
    return drawn(target_chunk(p, P, c * CHUNK, CHUNK), before, target, c * CHUNK, CHUNK)


@triton.jit
def draw_whole(p, P, u, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """A token of p, whose chunks' masses are not at hand."""
    o_c = tl.arange(0, BLOCK_C)
    masses = tl.zeros([BLOCK_C], tl.float32)
    for c in range(p.C):
        masses = tl.where(o_c == c, tl.sum(target_chunk(p, P, c * CHUNK, CHUNK), 0), masses)
    return draw_plain(p, P, masses, u, CHUNK, BLOCK_C)
