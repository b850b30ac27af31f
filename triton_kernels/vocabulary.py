"""A row of logits in chunks: what every kernel on vocabularies shares.

A row is cut into chunks of ``CHUNK`` entries, whatever the batch. Each leaves a few numbers, of
which ``row_of`` makes the row's: so a row's bits depend on nothing but the row.

Law of a row: p(v) = e(v) / Z with e(v) = exp((x(v) - top) / T). In base 2: e = exp2((x - top) s),
s = log2(e) / T (``scale_of``). A row with +inf shares its mass among those entries; a NaN makes
``top`` NaN, and a row with nothing allowed -inf: neither is good.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import LOG2E

INFINITY = tl.constexpr(float("inf"))
LARGEST, SMALLEST = tl.constexpr(3.4028234663852886e38), tl.constexpr(1.1754943508222875e-38)
NO_TOKEN = tl.constexpr(2147483647)


def chunks_a_program(rows: int, chunks: int) -> int:
    """One while that leaves no processor idle, then a few, to start fewer programs."""
    return max(1, min(8, rows * chunks // 1024))


def plain(value: int) -> int:
    """An int that Triton does not specialise on, read as ``x >> 2``."""
    return 4 * value + 2


@triton.jit
def load_chunk(row, start, V, fill, CHUNK: tl.constexpr):
    """Entries [start, start + CHUNK) of a row as fp32; past V: ``fill``. Whole chunks have no mask,
    for one would split the loads."""
    at = start + tl.arange(0, CHUNK)
    if start + CHUNK <= V:
        x = tl.load(row + at).to(tl.float32)
    else:
        x = tl.load(row + at, mask=at < V, other=fill).to(tl.float32)
    return x


class Edits(NamedTuple):
    """What changes a row's logits before all else: tensors, and where the row's own entries begin.

    Kernels make it where they use it: up to Triton 3.6 no function may return a None.
    """

    allowed: Any  # int32 bits, or None
    allowed_at: Any = 0
    bias_ids: Any = None  # [num_bias], or None
    ids_at: Any = 0
    bias: Any = None
    bias_at: Any = 0
    num_bias: Any = 0
    exclude: Any = ()  # ids, part of the binary: a model's own
    exclude_ids: Any = None  # [num_excluded], or None
    excluded_at: Any = 0
    num_excluded: Any = 0
    log: Any = None  # not None: entries are probabilities, read as their logarithms


@triton.jit
def edited(x, edits, start, V, fill, CHUNK: tl.constexpr):
    """Entries x of a chunk: bias added, then ``fill`` where excluded or not allowed."""
    at = start + tl.arange(0, CHUNK)
    if edits.bias_ids is not None:
        total = tl.zeros([CHUNK], tl.float32)
        for n in range(edits.num_bias):
            hit = at == tl.load(edits.bias_ids + edits.ids_at + n)
            more = tl.load(edits.bias + edits.bias_at + n).to(tl.float32)
            total = tl.where(hit, total + more, total)
        x += total
    for n in tl.static_range(len(edits.exclude)):
        x = tl.where(at == edits.exclude[n], fill, x)
    if edits.exclude_ids is not None:
        for n in range(edits.num_excluded):
            x = tl.where(at == tl.load(edits.exclude_ids + edits.excluded_at + n), fill, x)
    if edits.allowed is not None:
        word = tl.load(edits.allowed + edits.allowed_at + at // 32, mask=at < V, other=0)
        x = tl.where((word >> (at % 32)) & 1 == 1, x, fill)
    return tl.where(at < V, x, fill)


@triton.jit
def admitted(row, edits, start, V, CHUNK: tl.constexpr):
    """A chunk of logits as the law sees it."""
    x = load_chunk(row, start, V, float("-inf"), CHUNK)
    if edits.log is not None:
        x = tl.log(x)
    return edited(x, edits, start, V, float("-inf"), CHUNK)


@triton.jit
def scale_of(temperature):
    """log2(e) / T; T = 0 (greedy) counts as 1. Neither 0 nor infinite, whose products are NaN."""
    t = tl.where(temperature > 0, temperature, 1.0)
    return tl.maximum(tl.minimum(LOG2E / t, LARGEST), SMALLEST)


@triton.jit
def top_of(x, start, CHUNK: tl.constexpr):
    """(largest entry, NaN if there is one; its lowest index) of a chunk."""
    at = start + tl.arange(0, CHUNK)
    number = x == x
    top = tl.max(tl.where(number, x, -INFINITY), 0)
    best = tl.min(tl.where(x == top, at, NO_TOKEN), 0)
    broken = tl.max(tl.where(number, 0, 1), 0)
    return tl.where(broken > 0, float("nan"), top), best


@triton.jit
def weights(x, top, scale):
    """e(v) of entries x: 1 at the top, also where it is +inf; 0 at -inf."""
    e = tl.where(x == top, 1.0, tl.exp2((x - top) * scale))
    return tl.where(x > -INFINITY, e, 0.0)


@triton.jit
def energy_of(x, e, top, scale):
    """Sum of e(v) log2 e(v): the entropy, but for the mass."""
    return tl.sum(tl.where((e > 0) & (x < top), e * ((x - top) * scale), 0.0), 0)


@triton.jit
def rescale(tops, top, scale):
    """What a chunk's sum is worth when the row's top is ``top``."""
    return weights(tops, top, scale)


@triton.jit
def leave(stats, c, C, top, total, best):
    """A chunk's numbers, in the row's [3, C]: tops, sums, argmaxes."""
    tl.store(stats + c, top)
    tl.store(stats + C + c, total)
    tl.store((stats + 2 * C + c).to(tl.pointer_type(tl.int32)), best)


@triton.jit
def chunk_numbers(stats, C, nothing, BLOCK_C: tl.constexpr):
    """(tops, sums, argmaxes) of a row's chunks; past C tops are ``nothing``."""
    c = tl.arange(0, BLOCK_C)
    tops = tl.load(stats + c, mask=c < C, other=nothing)
    sums = tl.load(stats + C + c, mask=c < C, other=0.0)
    bests = (stats + 2 * C).to(tl.pointer_type(tl.int32)) + c
    return tops, sums, tl.load(bests, mask=c < C, other=NO_TOKEN)


@triton.jit
def row_of(stats, scale, C, BLOCK_C: tl.constexpr):
    """(top, Z, argmax) of a row; ``top`` is NaN where a chunk's is, and then Z is 0."""
    t, s, a = chunk_numbers(stats, C, float("-inf"), BLOCK_C)
    number = t == t
    top = tl.max(tl.where(number, t, -INFINITY), 0)
    best = tl.min(tl.where(t == top, a, NO_TOKEN), 0)
    broken = tl.max(tl.where(number, 0, 1), 0)
    Z = tl.sum(s * rescale(t, top, scale), 0)
    top = tl.where(broken > 0, float("nan"), top)
    return top, tl.where(broken > 0, 0.0, Z), best


@triton.jit
def crossing(masses, u, BLOCK: tl.constexpr):
    """Inverse CDF over a vector: (the first i with cumsum(m)[i] > u sum(m), the mass before it).

    Where rounding leaves no such i, the last with m > 0; BLOCK if there is none.
    """
    i = tl.arange(0, BLOCK)
    c = tl.cumsum(masses, 0)
    total = tl.max(c, 0)
    target = u * total
    first = tl.min(tl.where(c > target, i, BLOCK), 0)
    last = tl.max(tl.where(masses > 0, i, -1), 0)
    first = tl.where(last < 0, BLOCK, tl.minimum(first, last))
    before = tl.max(tl.where(i < first, c, 0.0), 0)
    return first, before, target


@triton.jit
def drawn(w, before, target, start, CHUNK: tl.constexpr):
    """The token of a chunk of weights w where before + cumsum(w) first exceeds target, or the last
    one with w > 0."""
    at = start + tl.arange(0, CHUNK)
    c = before + tl.cumsum(w, 0)
    first = tl.min(tl.where((c > target) & (w > 0), at, NO_TOKEN), 0)
    last = tl.max(tl.where(w > 0, at, -1), 0)
    return tl.where(first == NO_TOKEN, last, first)


@triton.jit
def number(value, tensor, stride, b):
    """A pair of the schema, for request b: the tensor wins."""
    if tensor is not None:
        return tl.load(tensor + b * stride)
    else:  # a plain return after the branch would be compiled too
        return value


@triton.jit
def as_scalar(value, dtype: tl.constexpr):
    """A number of any kind, also one that the binary holds, as a scalar of ``dtype``."""
    return (tl.zeros([], dtype) + value).to(dtype)
