"""From a row's chunk numbers to a token, a confidence and the log-sum-exp: one row a program."""

import triton
import triton.language as tl

from .gumbel import Gumbel, largest_of, perturbed
from .law_rows import least_of, temperature_of
from .numerics import LN2, LOG2E
from .philox import DRAFT, RANDOM_CONFIDENCE, uniform
from .row_chunks import ENERGY, FIELDS, NOISY, NOISY_AT, SECOND, TEMPERED_SUM
from .row_survivors import survivors
from .rows import entry, offset_of, position_of, seed_of
from .supports import FLOOR, KEPT, field_of, row_scratch, surviving
from .vocabulary import (
    INFINITY,
    NO_TOKEN,
    Edits,
    admitted,
    chunk_numbers,
    crossing,
    drawn,
    rescale,
    row_of,
    scale_of,
    weights,
)

# SAMPLER and CONFIDENCE of the kernels
SAMPLERS = {"greedy": 0, "inverse_cdf": 1, "gumbel": 2}
CONFIDENCES = {"probability": 0, "margin": 1, "neg_entropy": 2, "random": 3}
INVERSE_CDF, GUMBEL = tl.constexpr(1), tl.constexpr(2)
PROBABILITY, MARGIN, NEG_ENTROPY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def field(stats, FIELD: tl.constexpr, C, nothing, BLOCK_C: tl.constexpr):
    """One number of each chunk."""
    c = tl.arange(0, BLOCK_C)
    return tl.load(stats + FIELD * C + c, mask=c < C, other=nothing)


@triton.jit
def draw_of(keys, seed, offset, position, b, i):
    """The row's uniform number in [0, 1]; a caller's NaN is 0."""
    if keys.uniforms is None:
        u = uniform(DRAFT, seed, offset, position, tl.zeros([], tl.int64))
    else:
        at = keys.uniforms + b * (keys.stride_uniforms_b >> 2) + i * (keys.stride_uniforms_l >> 2)
        u = tl.load(at).to(tl.float32)
        u = tl.where(u > 0, tl.minimum(u, 1.0), 0.0)
    return u


@triton.jit
def decide(
    rows,
    numbers,
    keys,
    stats,
    search,
    row,
    changes,
    begin,
    r,
    b,
    i,
    SAMPLER: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    FILTERED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_TEMPERED: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(token, confidence, lse, whether the row has a law) of a row that was read."""
    HAS_NOISE: tl.constexpr = FILTERED and SAMPLER == GUMBEL
    HAS_ENERGY: tl.constexpr = FILTERED and TEMPERED and CONFIDENCE == NEG_ENTROPY
    C, V = rows.C, rows.V
    edits = Edits(
        changes.allowed, begin[0], changes.bias_ids, begin[1], changes.bias, begin[2],
        changes.num_bias >> 2, changes.exclude, changes.exclude_ids, begin[3],
        changes.num_excluded, changes.log,
    )  # fmt: skip
    line = stats + r.to(tl.int64) * FIELDS * C
    temperature = temperature_of(numbers, b)
    scale = scale_of(temperature)
    top, Z, best = row_of(line, LOG2E, C, BLOCK_C)
    lse = tl.where((top > -INFINITY) & (top < INFINITY), top + tl.log(Z), top)
    good = (top > -INFINITY) & (temperature >= 0)
    token = best
    confidence = tl.full([], float("-inf"), tl.float32)
    if good:
        seed, offset = seed_of(keys, b, PER_REQUEST), offset_of(keys, b)
        position = position_of(keys, b, i)
        tops, sums, _ = chunk_numbers(line, C, float("-inf"), BLOCK_C)
        o_c = tl.arange(0, BLOCK_C)
        if HAS_TEMPERED:
            sums = field(line, TEMPERED_SUM, C, 0.0, BLOCK_C)

        # the law that is sampled from: what its chunks weigh
        masses = sums * rescale(tops, top, scale)
        floor, least = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
        energy = tl.zeros([], tl.float32)
        if FILTERED:
            needed = temperature > 0
            if TEMPERED:
                needed = temperature >= 0
            if needed:
                own = row_scratch(search, r)
                masses = tl.load(field_of(own, C, KEPT) + o_c, mask=o_c < C, other=0.0)
                floor = tl.load(own.to(tl.pointer_type(tl.float32)) + FLOOR)
                least = least_of(numbers, b)
                if HAS_NOISE or HAS_ENERGY:
                    noisy, energy = survivors(
                        row, edits, V, C, own, masses, top, scale, floor, least,
                        Gumbel(seed, offset, position, temperature),
                        HAS_NOISE, HAS_ENERGY, CHUNK, BLOCK_C,
                    )  # fmt: skip
                    if HAS_NOISE:
                        token = tl.where(temperature > 0, noisy, token)
        left = tl.sum(masses, 0)

        # the token
        if SAMPLER == GUMBEL and not FILTERED:
            values = field(line, NOISY, C, float("-inf"), BLOCK_C)
            values = perturbed(tops, top, temperature, values)
            places = (line + NOISY_AT * C).to(tl.pointer_type(tl.int32)) + o_c
            _largest, noisy = largest_of(values, tl.load(places, mask=o_c < C, other=NO_TOKEN))
            token = tl.where(temperature > 0, noisy, token)
        if SAMPLER == INVERSE_CDF:  # noqa: SIM102
            if temperature > 0:
                u = draw_of(keys, seed, offset, position, b, i)
                c, before, target = crossing(masses, u, BLOCK_C)
                x = admitted(row, edits, c * CHUNK, V, CHUNK)
                e = surviving(x, top, scale, floor, least)
                token = drawn(e, before, target, c * CHUNK, CHUNK)

        # how sure the model is: under the law sampled from, or that of the logits as they are
        sharpness, mass = scale, left
        if not TEMPERED:
            sharpness, mass = scale_of(tl.full([], 1.0, tl.float32)), Z
        if CONFIDENCE == PROBABILITY:
            confidence = weights(entry(row, edits, token), top, sharpness) / mass
        elif CONFIDENCE == MARGIN:
            seconds = field(line, SECOND, C, float("-inf"), BLOCK_C)
            x = tl.max(tl.where(o_c == best // CHUNK, seconds, tops), 0)
            if TEMPERED:
                e = surviving(x, top, sharpness, floor, least)
            else:
                e = weights(x, top, sharpness)
            confidence = (1.0 - e) / mass
        elif CONFIDENCE == NEG_ENTROPY:
            if not HAS_ENERGY:
                sums_of = chunk_sums(line, C, HAS_TEMPERED and TEMPERED, BLOCK_C)
                energy = merged_energy(line, tops, sums_of, top, sharpness, C, BLOCK_C)
            confidence = energy * LN2 / mass - tl.log(mass)
        else:
            index = tl.zeros([], tl.int64)
            confidence = uniform(RANDOM_CONFIDENCE, seed, offset, position, index)
    return token, confidence, lse, good


@triton.jit
def chunk_sums(stats, C, AT_TEMPERATURE: tl.constexpr, BLOCK_C: tl.constexpr):
    if AT_TEMPERATURE:
        sums = field(stats, TEMPERED_SUM, C, 0.0, BLOCK_C)
    else:
        sums = field(stats, 1, C, 0.0, BLOCK_C)
    return sums


@triton.jit
def merged_energy(stats, tops, sums, top, scale, C, BLOCK_C: tl.constexpr):
    """Sum of e(v) log2 e(v) of a row; each chunk's is against its own top."""
    energies = field(stats, ENERGY, C, 0.0, BLOCK_C)
    w = rescale(tops, top, scale)
    shift = tl.where(tops == top, 0.0, (tops - top) * scale)
    return tl.sum(tl.where(w > 0, w * (energies + sums * shift), 0.0), 0)
