"""The second read of a filtered row: what lies about a threshold, and then the threshold itself.

``histograms.brackets`` says between which values top-k's and top-p's thresholds lie. ``narrow``
reads chunks once: of each it leaves what lies above a bracket, counted and weighed, and the entries
inside (it has a file of its own, ``narrowing``). ``resolve``, by the row's last program, has the
threshold from those alone, and what each chunk keeps. Where a bracket does not hold its threshold,
or a chunk has more entries inside than there is room for, it searches the row itself; so supports
are exact whatever the histograms say.

Scratch of a row, in words of 32 bits: HEADER of the row, FIELDS numbers a chunk, histograms,
candidates of two brackets and, where they are asked for, the candidates' tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .histograms import WORDS
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
from .vocabulary import INFINITY, admitted, weights

HEADER = tl.constexpr(16)
# in the header, after the number of arrivals; the last one is a bracket that holds the floor and is
# known whole, or -1
FLOOR, MASS, KNOWN = (tl.constexpr(n) for n in range(1, 4))
# of a chunk: the mass that all filters keep; where one program reads all, the first read's top and
# sum; then of each bracket what lies above it (its mass, what of that min-p keeps, how many entries
# it is), how many lie inside, and of what min-p keeps above it the energy and the noisiest entry
FIELDS = tl.constexpr(20)  # 17 of them in use
KEPT, TOP, SUM, BRACKET = (tl.constexpr(n) for n in range(4))
ABOVE, ABOVE_KEPT, COUNT, INSIDE, ENERGY, NOISIEST, TOKEN = (tl.constexpr(n) for n in range(7))
OF_BRACKET = tl.constexpr(7)


class Scratch(NamedTuple):
    """Of the filters of some rows."""

    words: Any  # int32 [rows, size]
    size: Any
    apart: Any = tl.constexpr(False)  # that one program's search is a function of its own


def scratch_of(rows: int, C: int, device: torch.device, *, tokens: bool = False) -> Scratch:
    """``tokens``: with room for those of the candidates."""
    size = int(HEADER) + C * (int(FIELDS) + int(WORDS) + (4 if tokens else 2) * int(CANDIDATES))
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
def tokens_of(own, C, s):
    """Pointer to their tokens."""
    return own + HEADER + C * (s * CANDIDATES + (FIELDS + WORDS + 2 * CANDIDATES))


@triton.jit
def bracket_words(own, C, FIELD: tl.constexpr, s):
    """Pointer to one int32 of each chunk about bracket s."""
    return own + HEADER + C * (s * OF_BRACKET + (BRACKET + FIELD))


@triton.jit
def bracket_field(own, C, FIELD: tl.constexpr, s):
    """The same, fp32."""
    return bracket_words(own, C, FIELD, s).to(tl.pointer_type(tl.float32))


@triton.jit
def sum_of(own, C, FIELD: tl.constexpr, s, BLOCK_C: tl.constexpr):
    """A number of bracket s over all chunks."""
    c = tl.arange(0, BLOCK_C)
    return tl.sum(tl.load(bracket_field(own, C, FIELD, s) + c, mask=c < C, other=0.0))


@triton.jit
def inside_of(own, C, s):
    """Pointer to how many entries of each chunk lie inside bracket s."""
    return bracket_words(own, C, INSIDE, s)


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
        kept += tl.load(bracket_field(own, C, ABOVE_KEPT, s) + c, mask=c < C, other=0.0)
        for n in range(tl.cdiv(most_inside(own, C, s, BLOCK_C), SLOTS)):
            inside = inside_of(own, C, s)
            x = candidate_tile(values_of(own, C, s), inside, C, n, -INFINITY, BLOCK_C, SLOTS)
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
    tl.store(own + KNOWN, tl.where(by_p | by_k, s, -1))
    return floor, total


@triton.jit
def surviving(x, top, scale, floor, least):
    """e(v) of what all filters leave."""
    e = weights(x, top, scale)
    e = tl.where(x >= floor, e, 0.0)
    return tl.where(e >= least, e, 0.0)
