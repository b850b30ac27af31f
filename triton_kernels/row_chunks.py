"""The first launch of ``sample_and_score``, ``unmask`` and ``soft_embed``: one read of the rows.

Each chunk of each row that is read leaves up to ``FIELDS`` numbers in scratch [rows, FIELDS, C]:
the first three as ``vocabulary.leave`` does, the others where an option asks for them.
"""

import triton
import triton.language as tl

from . import configurations
from .gumbel import Gumbel, noisiest_of_chunk
from .histograms import leave_counts
from .law_rows import temperature_of
from .numerics import LOG2E
from .rows import edits_at, locate, offset_of, position_of, row_at, seed_of
from .supports import counts_of, row_scratch
from .thresholds import sought
from .vocabulary import (
    INFINITY,
    Edits,
    admitted,
    energy_of,
    leave,
    scale_of,
    top_of,
    weights,
)

CONFIGURATIONS = configurations.load("row_kernels")
CHUNK = 4096
FIELDS = tl.constexpr(8)
# besides top, sum of e at temperature 1, and argmax
TEMPERED_SUM, SECOND, ENERGY = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
NOISY, NOISY_AT = tl.constexpr(6), tl.constexpr(7)


@triton.jit(do_not_specialize=["place", "changes", "numbers", "keys", "per"])
def row_chunks(
    rows,
    place,
    changes,
    numbers,
    keys,
    stats,
    search,
    finished,
    per,
    HAS_TEMPERED: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_ENERGY: tl.constexpr,
    ENERGY_TEMPERED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_SEARCH: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Numbers of ``per`` chunks of result program_id(0)'s row. ``finished``: None, or [B] counters
    of the last launch, which are set to 0; ``search``: None, or where ``row_supports`` finds its
    counters, set to 0, and the chunks' histograms."""
    r = tl.program_id(0)
    b, i, _inside, line, read = locate(rows, place, r)
    if finished is not None:  # noqa: SIM102
        if (r % (place.R >> 2) == 0) & (tl.program_id(1) == 0):
            tl.store(finished + b, 0)
    if read:
        row = row_at(rows, place, b, line)
        begin = edits_at(changes, place, b, i, line)
        edits = Edits(
            changes.allowed, begin[0], changes.bias_ids, begin[1], changes.bias, begin[2],
            changes.num_bias >> 2, changes.exclude, changes.exclude_ids, begin[3],
            changes.num_excluded, changes.log,
        )  # fmt: skip
        temperature = temperature_of(numbers, b)
        scale = scale_of(temperature)
        if HAS_SEARCH:
            words = row_scratch(search, r)
            k, share = sought(numbers, b, rows.V)
            searched = ((k > 0) | (share < 1)) & (temperature >= 0)
            if tl.program_id(1) == 0:
                tl.store(words, 0)
        line_stats = stats + r.to(tl.int64) * FIELDS * rows.C
        first = tl.program_id(1) * per
        for c in range(first, tl.minimum(first + per, rows.C)):
            start = c * CHUNK
            x = admitted(row, edits, start, rows.V, CHUNK)
            top, best = top_of(x, start, CHUNK)
            e = weights(x, top, LOG2E)
            leave(line_stats, c, rows.C, top, tl.sum(e, 0), best)
            if HAS_SEARCH:  # noqa: SIM102 (known at compile time)
                if searched:
                    leave_counts(counts_of(words, rows.C, c), x, top)
            own = line_stats + c
            if HAS_SECOND:
                at = start + tl.arange(0, CHUNK)
                second = tl.max(tl.where(at == best, -INFINITY, x), 0)
                tl.store(own + SECOND * rows.C, second)
            if HAS_ENERGY and not ENERGY_TEMPERED:
                tl.store(own + ENERGY * rows.C, energy_of(x, e, top, LOG2E))
            if HAS_TEMPERED:
                e_t = weights(x, top, scale)
                tl.store(own + TEMPERED_SUM * rows.C, tl.sum(e_t, 0))
                if HAS_ENERGY and ENERGY_TEMPERED:
                    tl.store(own + ENERGY * rows.C, energy_of(x, e_t, top, scale))
            if HAS_NOISE:
                seed, offset = seed_of(keys, b, PER_REQUEST), offset_of(keys, b)
                gumbel = Gumbel(seed, offset, position_of(keys, b, i), temperature)
                value, at_value = noisiest_of_chunk(x, top, gumbel, start, CHUNK)
                tl.store(own + NOISY * rows.C, value)
                where = (own + NOISY_AT * rows.C).to(tl.pointer_type(tl.int32))
                tl.store(where, at_value)
