"""Of the entries that filters leave: the noisiest one, and the energy of all of them.

The second read has left of each chunk what lies certainly above a bracket, and the candidates in
it; so where ``supports.resolve`` knows a bracket whole that holds the floor, nothing is read again.
Elsewhere the row is, but for its chunks that keep nothing.
"""

import triton
import triton.language as tl

from .gumbel import larger_of, largest_of, noisiest_at, noisiest_of_chunk
from .supports import (
    ENERGY,
    KNOWN,
    NOISIEST,
    TOKEN,
    bracket_field,
    bracket_words,
    inside_of,
    most_inside,
    sum_of,
    surviving,
    tokens_of,
    values_of,
)
from .thresholds import TILE, candidate_tile
from .vocabulary import INFINITY, NO_TOKEN, admitted, energy_of


@triton.jit
def survivors(
    row, edits, V, C, own, masses, top, scale, floor, least, gumbel,
    HAS_NOISE: tl.constexpr, HAS_ENERGY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(the noisiest token, the energy) of x >= floor with e >= least; each where it is asked for.

    masses [BLOCK_C]: what each chunk keeps.
    """
    s = tl.load(own + KNOWN)
    if s >= 0:
        token, energy = gathered(
            own, C, s, top, scale, floor, least, gumbel, HAS_NOISE, HAS_ENERGY, BLOCK_C
        )
    else:
        token, energy = read_again(
            row, edits, V, C, masses, top, scale, floor, least, gumbel,
            HAS_NOISE, HAS_ENERGY, CHUNK, BLOCK_C,
        )  # fmt: skip
    return token, energy


@triton.jit
def gathered(
    own, C, s, top, scale, floor, least, gumbel,
    HAS_NOISE: tl.constexpr, HAS_ENERGY: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From what chunks have left of bracket s."""
    SLOTS: tl.constexpr = TILE // BLOCK_C if BLOCK_C < TILE else 1
    SIZE: tl.constexpr = BLOCK_C * SLOTS
    c = tl.arange(0, BLOCK_C)
    energy, largest = tl.zeros([], tl.float32), tl.full([], float("-inf"), tl.float32)
    token = tl.full([], NO_TOKEN, tl.int32)
    if HAS_ENERGY:
        energy += sum_of(own, C, ENERGY, s, BLOCK_C)
    if HAS_NOISE:
        noisy = tl.load(bracket_field(own, C, NOISIEST, s) + c, mask=c < C, other=-INFINITY)
        tokens = tl.load(bracket_words(own, C, TOKEN, s) + c, mask=c < C, other=NO_TOKEN)
        largest, token = largest_of(noisy, tokens)
    inside = inside_of(own, C, s)
    for n in range(tl.cdiv(most_inside(own, C, s, BLOCK_C), SLOTS)):
        x = candidate_tile(values_of(own, C, s), inside, C, n, -INFINITY, BLOCK_C, SLOTS)
        x = tl.reshape(x, [SIZE])
        e = surviving(x, top, scale, floor, least)
        if HAS_ENERGY:
            energy += energy_of(x, e, top, scale)
        if HAS_NOISE:
            at = candidate_tile(tokens_of(own, C, s), inside, C, n, NO_TOKEN, BLOCK_C, SLOTS)
            x = tl.where(e > 0, x, -INFINITY)
            value, first = noisiest_at(x, tl.reshape(at, [SIZE]), top, gumbel)
            largest, token = larger_of(largest, token, value, first)
    return token, energy


@triton.jit
def read_again(
    row, edits, V, C, masses, top, scale, floor, least, gumbel,
    HAS_NOISE: tl.constexpr, HAS_ENERGY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the chunks that keep something."""
    o_c = tl.arange(0, BLOCK_C)
    energy, largest = tl.zeros([], tl.float32), tl.full([], float("-inf"), tl.float32)
    token = tl.full([], NO_TOKEN, tl.int32)
    for c in range(C):
        if tl.max(tl.where(o_c == c, masses, 0.0), 0) > 0:
            x = admitted(row, edits, c * CHUNK, V, CHUNK)
            e = surviving(x, top, scale, floor, least)
            if HAS_ENERGY:
                energy += energy_of(x, e, top, scale)
            if HAS_NOISE:
                x = tl.where(e > 0, x, -INFINITY)
                value, first = noisiest_of_chunk(x, top, gumbel, c * CHUNK, CHUNK)
                largest, token = larger_of(largest, token, value, first)
    return token, energy
