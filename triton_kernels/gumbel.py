"""The Gumbel sampler: of a row's entries the one whose logit and noise together are the largest."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .philox import DRAFT, chunk_gumbel, gumbel_at
from .vocabulary import INFINITY, LARGEST, NO_TOKEN, SMALLEST


class Gumbel(NamedTuple):
    """What the noise of a row depends on, and the temperature that it is added at."""

    seed: Any
    offset: Any
    position: Any
    temperature: Any


@triton.jit
def perturbed(x, top, temperature, noise):
    """(x - top) / T + g; only the top has noise added to 0 where x or T is infinite."""
    t = tl.where(temperature > 0, temperature, 1.0)
    inverse = tl.maximum(tl.minimum(1.0 / t, LARGEST), SMALLEST)
    value = tl.where(x == top, 0.0, (x - top) * inverse)
    return tl.where(x > -INFINITY, value + noise, -INFINITY)


@triton.jit
def noisiest(x, top, temperature, noise, start, CHUNK: tl.constexpr):
    """(largest perturbed value less the top, its lowest index) of a chunk."""
    value = perturbed(x, top, temperature, noise)
    return largest_of(value, start + tl.arange(0, CHUNK))


@triton.jit
def noisiest_of_chunk(x, top, gumbel, start, CHUNK: tl.constexpr):
    """``noisiest`` of the chunk's own noise."""
    noise = chunk_gumbel(DRAFT, gumbel.seed, gumbel.offset, gumbel.position, start, CHUNK)
    return noisiest(x, top, gumbel.temperature, noise, start, CHUNK)


@triton.jit
def noisiest_at(x, tokens, top, gumbel):
    """``noisiest`` of entries x that lie anywhere: of these tokens."""
    noise = gumbel_at(DRAFT, gumbel.seed, gumbel.offset, gumbel.position, tokens)
    return largest_of(perturbed(x, top, gumbel.temperature, noise), tokens)


@triton.jit
def largest_of(value, tokens):
    """(largest of a vector of values, its lowest token)."""
    largest = tl.max(value, 0)
    return largest, tl.min(tl.where(value == largest, tokens, NO_TOKEN), 0)


@triton.jit
def larger_of(value, token, other, other_token):
    """The larger value with its token; of equal ones the lower token."""
    better = (other > value) | ((other == value) & (other_token < token))
    return tl.where(better, other, value), tl.where(better, other_token, token)
