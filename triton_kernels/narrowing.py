"""The second read of a filtered row: of each chunk what lies above a bracket, and what inside.

A row op may ask for more of what filters leave: its noisiest entry, its energy. Then those of the
entries above a bracket are left too, and candidates keep their tokens; ``row_survivors`` puts the
two together.
"""

import triton
import triton.language as tl

from .gumbel import larger_of, noisiest_of_chunk
from .histograms import brackets
from .supports import (
    ABOVE,
    ABOVE_KEPT,
    COUNT,
    ENERGY,
    INSIDE,
    NOISIEST,
    TOKEN,
    bracket_field,
    bracket_words,
    counts_of,
    tokens_of,
    values_of,
)
from .thresholds import CANDIDATES
from .vocabulary import INFINITY, NO_TOKEN, admitted, energy_of, rescale, weights


@triton.jit
def narrow(
    row, edits, V, C, own, tops, sums, numbers, top, Z, scale, least, k, share, first, last,
    JOINT: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    gumbel=None, HAS_NOISE: tl.constexpr = False, HAS_ENERGY: tl.constexpr = False,
):  # fmt: skip
    """Reads chunks first .. last - 1, PART of one at a time; returns ``histograms.brackets``.

    tops, sums: pointers to the first read's of all chunks, the latter under ``scale``.
    """
    counts = counts_of(own, C, 0)
    k_low, k_high, p_low, p_high = brackets(counts, tops, C, V, top, Z, scale, k, share, JOINT)
    lowest = tl.minimum(k_low, p_low)
    unfiltered = (k == 0) & (share == 1) & (least == 0)
    FIRST: tl.constexpr = 1 if numbers.top_k is None else 0
    bracket = FIRST
    if HAS_NOISE or HAS_ENERGY:
        # the first read has left neither: no chunk is taken as it was. Without any threshold both
        # brackets are all there is, and top-p's suffices
        unfiltered = k < 0
        bracket = tl.where(k > 0, FIRST, 1)
    for c in range(first, last):
        chunk_top = tl.load(tops + c)
        if unfiltered | (chunk_top < lowest):
            # all of the chunk is kept, or nothing
            mass = tl.where(unfiltered, tl.load(sums + c) * rescale(chunk_top, top, scale), 0.0)
            none = tl.zeros([], tl.int32)
            for s in tl.static_range(2):
                leave_bracket(own + c, C, s, mass, mass, none, none)
                leave_more(own + c, C, s, 0.0, -INFINITY, none, HAS_NOISE, HAS_ENERGY)
        else:
            for s in range(bracket, 2):
                narrow_chunk(
                    row, edits, V, C, own, top, scale, least, c, s,
                    tl.where(s == 0, k_low, p_low), tl.where(s == 0, k_high, p_high), CHUNK, PART,
                    gumbel, HAS_NOISE, HAS_ENERGY,
                )  # fmt: skip
    return k_low, k_high, p_low, p_high


@triton.jit
def narrow_chunk(
    row, edits, V, C, own, top, scale, least, c, s, low, high,
    CHUNK: tl.constexpr, PART: tl.constexpr,
    gumbel, HAS_NOISE: tl.constexpr, HAS_ENERGY: tl.constexpr,
):  # fmt: skip
    """What a chunk has to do with bracket s."""
    mass, left = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    count, inside = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    energy, largest = tl.zeros([], tl.float32), tl.full([], float("-inf"), tl.float32)
    token = tl.full([], NO_TOKEN, tl.int32)
    if low < INFINITY:
        found = values_of(own, C, s) + c * CANDIDATES
        if HAS_NOISE:
            tokens = tokens_of(own, C, s) + c * CANDIDATES
        for start in range(c * CHUNK, tl.minimum((c + 1) * CHUNK, V), PART):
            x = admitted(row, edits, start, V, PART)
            e = tl.where(x >= high, weights(x, top, scale), 0.0)
            mass += tl.sum(e, 0)
            e = tl.where(e >= least, e, 0.0)
            left += tl.sum(e, 0)
            if HAS_ENERGY:
                energy += energy_of(x, e, top, scale)
            if HAS_NOISE:  # noqa: SIM102 (known at compile time)
                if tl.max(e, 0) > 0:
                    noisy = tl.where(e > 0, x, -INFINITY)
                    value, at = noisiest_of_chunk(noisy, top, gumbel, start, PART)
                    largest, token = larger_of(largest, token, value, at)
            count += tl.sum(tl.where(x >= high, 1, 0), 0)
            within = tl.where((x >= low) & (x < high), 1, 0)
            more = tl.sum(within, 0)
            if more > 0:
                slot = inside + tl.cumsum(within, 0) - 1
                room = (within > 0) & (slot < CANDIDATES)
                tl.store(found + slot, x, mask=room)
                if HAS_NOISE:
                    tl.store(tokens + slot, start + tl.arange(0, PART), mask=room)
            inside += more
    leave_bracket(own + c, C, s, mass, left, count, inside)
    leave_more(own + c, C, s, energy, largest, token, HAS_NOISE, HAS_ENERGY)


@triton.jit
def leave_bracket(here, C, s, mass, kept, count, inside):
    """A chunk's numbers about bracket s; ``here`` is the row's scratch, moved on by the chunk."""
    tl.store(bracket_field(here, C, ABOVE, s), mass)
    tl.store(bracket_field(here, C, ABOVE_KEPT, s), kept)
    tl.store(bracket_field(here, C, COUNT, s), count.to(tl.float32))
    tl.store(bracket_words(here, C, INSIDE, s), inside)


@triton.jit
def leave_more(
    here, C, s, energy, value, token, HAS_NOISE: tl.constexpr, HAS_ENERGY: tl.constexpr
):  # fmt: skip
    """What is asked for of the entries above bracket s that min-p keeps."""
    if HAS_ENERGY:
        tl.store(bracket_field(here, C, ENERGY, s), energy)
    if HAS_NOISE:
        tl.store(bracket_field(here, C, NOISIEST, s), value)
        tl.store(bracket_words(here, C, TOKEN, s), token)
