"""The second read of a filtered row: what lies about a threshold, and then the threshold itself.

``histograms.brackets`` says between which values top-k's and top-p's thresholds lie. ``narrow``
reads chunks once: of each it leaves what lies above a bracket, counted and weighed, and the entries
inside. ``resolve``, by the row's last program, has the threshold from those alone, and what each
chunk keeps. Where a bracket does not hold its threshold, or a chunk has more entries inside than
there is room for, it searches the row itself; so supports are exact whatever the histograms say.

Scratch of a row, in words of 32 bits: HEADER of the row, FIELDS numbers a chunk, histograms, and
candidates of two brackets.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .histograms import WORDS, brackets
from .thresholds import (
    CANDIDATES,
    TILE,
    Source,
    candidate_tile,
    least_share,
    lowest_kept,
    search_limits,
    weight_from,
)
from .vocabulary import INFINITY, admitted, rescale, weights

HEADER = tl.constexpr(16)
FLOOR, MASS = tl.constexpr(1), tl.constexpr(2)  # in the header, after the number of arrivals
# of a chunk: the mass that all filters keep; where one program reads all, the first read's top and
# sum; then of each bracket what lies above it (its mass, what of that min-p keeps, how many entries
# it is), and how many lie inside
FIELDS = tl.constexpr(16)  # 11 of them in use
KEPT, TOP, SUM, BRACKET = (tl.constexpr(n) for n in range(4))
ABOVE, ABOVE_KEPT, COUNT, INSIDE = (tl.constexpr(n) for n in range(4))


class Scratch(NamedTuple):
    """Of the filters of some rows."""

    words: Any  # int32 [rows, size]
    size: Any
    apart: Any = tl.constexpr(False)  # that one program's search is a function of its own


def scratch_of(rows: int, C: int, device: torch.device) -> Scratch:
    size = int(HEADER) + C * (int(FIELDS) + int(WORDS) + 2 * int(CANDIDATES))
    return Scratch(torch.empty((rows, size), dtype=torch.int32, device=device), size)


def chunks_to_narrow(rows: int, chunks: int) -> int:
    """That a program takes: each works out the brackets anew, so no more programs than keep the
    processors busy."""
    return max(1, min(chunks, rows * chunks // 256))


@triton.jit
def row_scratch(scratch, at):
    """Pointer to a row's words."""
    return scratch.words + at.to(tl.int64) * scratch.size


@triton.jit
def field_of(own, C, FIELD: tl.constexpr):
    """Pointer to one fp32 number of each chunk."""
    return (own + HEADER + C * FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def counts_of(own, C, c):
    """Pointer to a chunk's histogram."""
    return (own + HEADER + C * FIELDS + c * WORDS).to(tl.pointer_type(tl.uint16))


@triton.jit
def values_of(own, C, s):
    """Pointer to the candidates of bracket s."""
    values = own + HEADER + C * (s * CANDIDATES + (FIELDS + WORDS))
    return values.to(tl.pointer_type(tl.float32))


@triton.jit
def narrow(
    row, edits, V, C, own, tops, sums, numbers, top, Z, scale, least, k, share, first, last,
    JOINT: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Reads chunks first .. last - 1, PART of one at a time; (the brackets): see above.

    tops, sums: pointers to the first read's of all chunks, the latter under ``scale``.
    """
    counts = counts_of(own, C, 0)
    k_low, k_high, p_low, p_high = brackets(counts, tops, C, V, top, Z, scale, k, share, JOINT)
    lowest = tl.minimum(k_low, p_low)
    unfiltered = (k == 0) & (share == 1) & (least == 0)
    FIRST: tl.constexpr = 1 if numbers.top_k is None else 0
    for c in range(first, last):
        chunk_top = tl.load(tops + c)
        here = field_of(own, C, 0) + c
        if unfiltered | (chunk_top < lowest):
            # all of the chunk is kept, or nothing
            mass = tl.where(unfiltered, tl.load(sums + c) * rescale(chunk_top, top, scale), 0.0)
            none = tl.zeros([], tl.int32)
            leave_bracket(here, C, 0, mass, mass, none, none)
            leave_bracket(here, C, 1, mass, mass, none, none)
        else:
            for s in range(FIRST, 2):
                narrow_chunk(
                    row, edits, V, C, own, top, scale, least, c, s,
                    tl.where(s == 0, k_low, p_low), tl.where(s == 0, k_high, p_high), CHUNK, PART,
                )  # fmt: skip
    return k_low, k_high, p_low, p_high


@triton.jit
def narrow_chunk(
    row, edits, V, C, own, top, scale, least, c, s, low, high,
    CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What a chunk has to do with bracket s."""
    mass, left = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    count, inside = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    if low < INFINITY:
        found = values_of(own, C, s) + c * CANDIDATES
        for start in range(c * CHUNK, tl.minimum((c + 1) * CHUNK, V), PART):
            x = admitted(row, edits, start, V, PART)
            e = tl.where(x >= high, weights(x, top, scale), 0.0)
            mass += tl.sum(e, 0)
            left += tl.sum(tl.where(e >= least, e, 0.0), 0)
            count += tl.sum(tl.where(x >= high, 1, 0), 0)
            within = tl.where((x >= low) & (x < high), 1, 0)
            more = tl.sum(within, 0)
            if more > 0:
                slot = inside + tl.cumsum(within, 0) - 1
                tl.store(found + slot, x, mask=(within > 0) & (slot < CANDIDATES))
            inside += more
    leave_bracket(field_of(own, C, 0) + c, C, s, mass, left, count, inside)


@triton.jit
def leave_bracket(here, C, s, mass, kept, count, inside):
    tl.store(here + C * (4 * s + (BRACKET + ABOVE)), mass)
    tl.store(here + C * (4 * s + (BRACKET + ABOVE_KEPT)), kept)
    tl.store(here + C * (4 * s + (BRACKET + COUNT)), count.to(tl.float32))
    whole = here.to(tl.pointer_type(tl.int32))
    tl.store(whole + C * (4 * s + (BRACKET + INSIDE)), inside)


@triton.jit
def sum_of(own, C, FIELD: tl.constexpr, s, BLOCK_C: tl.constexpr):
    """A number of bracket s over all chunks."""
    c = tl.arange(0, BLOCK_C)
    return tl.sum(tl.load(field_of(own, C, BRACKET + FIELD) + 4 * s * C + c, mask=c < C, other=0.0))


@triton.jit
def inside_of(own, C, s):
    """Pointer to how many entries of each chunk lie inside bracket s."""
    return own + HEADER + C * (BRACKET + INSIDE) + 4 * s * C


@triton.jit
def most_inside(own, C, s, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    return tl.max(tl.load(inside_of(own, C, s) + c, mask=c < C, other=0), 0)


@triton.jit
def resolve(
    row, edits, V, C, own, top, Z, scale, least, k, share, k_low, k_high, p_low, p_high,
    JOINT: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(floor, mass): entries x >= floor survive top-k and top-p, of whose mass all filters keep so
    much; the chunks' go to KEPT. All chunks of the row have been narrowed.

    Counts above 2**24 would be rounded, as fp32: no vocabulary has them.
    """
    SLOTS: tl.constexpr = TILE // BLOCK_C if BLOCK_C < TILE else 1
    none = tl.full([], float("-inf"), tl.float32)
    floor, left = none, Z
    for s in range(2):
        by_mass = s == 1
        if tl.where(by_mass, share < 1, k > 0):
            # top-k counts entries, top-p weighs what top-k has left of them
            bound = tl.where(by_mass, least_share(share, left), k.to(tl.float32))
            least_weight = tl.where(by_mass, 0.0, 1.0)
            within = tl.where(by_mass, floor, none)
            if JOINT:
                within = none
            mass, count = sum_of(own, C, ABOVE, s, BLOCK_C), sum_of(own, C, COUNT, s, BLOCK_C)
            above = tl.where(by_mass, mass, count)

            # does the bracket hold the threshold, and are all entries inside at hand?
            low, high = tl.where(by_mass, p_low, k_low), tl.where(by_mass, p_high, k_high)
            found, inside = values_of(own, C, s), inside_of(own, C, s)
            most = most_inside(own, C, s, BLOCK_C)
            tiles = tl.cdiv(most, SLOTS)
            source = Source(row, V, found, inside, C, most < 0, tiles)
            among = weight_from(source, edits, top, scale, within, least_weight, BLOCK_C, SLOTS)
            holds = (most <= CANDIDATES) & (within <= high) & (above < bound)
            holds = holds & (above + among >= bound)
            tiles = tl.where(holds, tiles, tl.cdiv(V, BLOCK_C * SLOTS))
            source = Source(row, V, found, inside, C, holds == 0, tiles)

            # exp2(-64) of all entries is below every rounding
            lowest = tl.where(by_mass, top - 64.0 / scale, none)
            low_key, high_key = search_limits(holds, low, high, lowest, top)
            above = tl.where(holds, above, 0.0)
            at = lowest_kept(
                source, edits, top, scale, within, least_weight, above, bound, low_key, high_key,
                BLOCK_C, SLOTS,
            )  # fmt: skip
            floor = tl.maximum(floor, at)
            if not JOINT:
                left = tl.where(holds, mass, 0.0)
                left += weight_from(source, edits, top, scale, floor, 0.0, BLOCK_C, SLOTS)

    # what each chunk keeps: of a bracket about the floor that is known whole, or read again
    c = tl.arange(0, BLOCK_C)
    by_p = (p_low <= floor) & (floor <= p_high) & (most_inside(own, C, 1, BLOCK_C) <= CANDIDATES)
    by_k = (k_low <= floor) & (floor <= k_high) & (most_inside(own, C, 0, BLOCK_C) <= CANDIDATES)
    s = tl.where(by_p, 1, 0)
    kept = tl.zeros([BLOCK_C], tl.float32)
    if by_p | by_k:
        above = field_of(own, C, BRACKET + ABOVE_KEPT) + 4 * s * C
        kept += tl.load(above + c, mask=c < C, other=0.0)
        for n in range(tl.cdiv(most_inside(own, C, s, BLOCK_C), SLOTS)):
            x = candidate_tile(values_of(own, C, s), inside_of(own, C, s), C, n, BLOCK_C, SLOTS)
            kept += tl.sum(surviving(x, top, scale, floor, least), 1)
    else:
        for start in range(0, V, PART):
            x = admitted(row, edits, start, V, PART)
            mass = tl.sum(surviving(x, top, scale, floor, least), 0)
            kept += tl.where(c == start // CHUNK, mass, 0.0)
    total = tl.sum(kept, 0)
    tl.store(field_of(own, C, KEPT) + c, kept, mask=c < C)
    header = own.to(tl.pointer_type(tl.float32))
    tl.store(header + FLOOR, floor)
    tl.store(header + MASS, total)
    return floor, total


@triton.jit
def surviving(x, top, scale, floor, least):
    """e(v) of what all filters leave."""
    e = weights(x, top, scale)
    e = tl.where(x >= floor, e, 0.0)
    return tl.where(e >= least, e, 0.0)
