"""The second launch of filtered row ops: thresholds of ``row_chunks``' rows in one more read."""

import triton
import triton.language as tl

from .gumbel import Gumbel
from .law_rows import least_of, temperature_of
from .narrowing import narrow
from .numerics import LOG2E
from .row_chunks import FIELDS, TEMPERED_SUM
from .rows import edits_at, locate, offset_of, position_of, row_at, seed_of
from .supports import resolve, row_scratch
from .thresholds import sought
from .vocabulary import INFINITY, Edits, rescale, row_of, scale_of


@triton.jit(do_not_specialize=["place", "changes", "numbers", "keys", "per"])
def row_supports(
    rows,
    place,
    changes,
    numbers,
    keys,
    stats,
    search,
    per,
    TEMPERED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_TEMPERED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_ENERGY: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What the filters keep of row program_id(0), left in ``search``: ``per`` chunks a program, of
    which the last one to be done resolves the thresholds. HAS_NOISE, HAS_ENERGY: for
    ``row_survivors``; without the former ``keys`` is None."""
    r = tl.program_id(0)
    b, i, _inside, line, read = locate(rows, place, r)
    if read:
        V, C = rows.V, rows.C
        row, begin = row_at(rows, place, b, line), edits_at(changes, place, b, i, line)
        edits = Edits(
            changes.allowed, begin[0], changes.bias_ids, begin[1], changes.bias, begin[2],
            changes.num_bias >> 2, changes.exclude, changes.exclude_ids, begin[3],
            changes.num_excluded, changes.log,
        )  # fmt: skip
        temperature = temperature_of(numbers, b)
        scale = scale_of(temperature)
        tops = stats + r.to(tl.int64) * FIELDS * C
        top, Z, _best = row_of(tops, LOG2E, C, BLOCK_C)
        sums = tops + C
        if HAS_TEMPERED:
            sums = tops + C * TEMPERED_SUM
            c = tl.arange(0, BLOCK_C)
            masses = rescale(tl.load(tops + c, mask=c < C, other=float("-inf")), top, scale)
            Z = tl.sum(tl.load(sums + c, mask=c < C, other=0.0) * masses, 0)
        needed = temperature > 0
        if TEMPERED:
            needed = temperature >= 0
        if needed & (top > -INFINITY):
            own = row_scratch(search, r)
            k, share = sought(numbers, b, V)
            least = least_of(numbers, b)
            first = tl.program_id(1) * per
            gumbel = None
            if HAS_NOISE:
                seed, offset = seed_of(keys, b, PER_REQUEST), offset_of(keys, b)
                gumbel = Gumbel(seed, offset, position_of(keys, b, i), temperature)
            k_low, k_high, p_low, p_high = narrow(
                row, edits, V, C, own, tops, sums, numbers, top, Z, scale, least, k, share,
                first, tl.minimum(first + per, C), JOINT, CHUNK, PART,
                gumbel, HAS_NOISE, HAS_ENERGY,
            )  # fmt: skip
            # all stores of this program come before the count, all others' before what follows it
            tl.debug_barrier()
            others = tl.atomic_add(own, 1, sem="acq_rel")
            if others == tl.cdiv(C, per) - 1:
                tl.debug_barrier()
                resolve(
                    row, edits, V, C, own, top, Z, scale, least, k, share,
                    k_low, k_high, p_low, p_high, JOINT, CHUNK, PART, BLOCK_C,
                )  # fmt: skip
