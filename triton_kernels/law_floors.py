"""The second launch of filtered verifications: thresholds of top-k and top-p in one more read."""

import triton
import triton.language as tl

from .law_rows import least_of, place, read_law, row_bits, temperature_of
from .narrowing import narrow
from .supports import resolve, row_scratch
from .thresholds import sought
from .vocabulary import Edits, number, scale_of


@triton.jit
def row_floor(
    law, numbers, at, count, count_of, stride_count, more, per,
    CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Thresholds of top-k and top-p, and what all filters leave of Z, of row ``at``: by ``per``
    chunks a program, of which the last one to be done has them."""
    b, i = at // law.R, at % law.R
    limit = tl.maximum(number(count, count_of, stride_count, b), 0) + more
    at, row, _present, inside = place(law, b, i)
    temperature = temperature_of(numbers, b)
    first = tl.program_id(1) * per
    if inside & (i < limit) & (first < law.C):
        bits = row_bits(law, b, i)
        scale = scale_of(temperature)
        top, Z, _best, good = read_law(law, at, scale, BLOCK_C)
        floor = tl.full([], float("-inf"), tl.float32)
        mass = Z
        last = tl.program_id(1) == 0
        if good & (temperature > 0):  # greedy requests have no use for thresholds
            own = row_scratch(law.search, at)
            tops = law.stats + at * 3 * law.C
            k, share = sought(numbers, b, law.V)
            least = least_of(numbers, b)
            k_low, k_high, p_low, p_high = narrow(
                row, Edits(law.allowed, bits), law.V, law.C, own, tops, tops + law.C, numbers,
                top, Z, scale, least,
                k, share, first, tl.minimum(first + per, law.C), False, CHUNK, PART,
            )  # fmt: skip
            # all stores of this program come before the count, all others' before what follows it
            tl.debug_barrier()
            others = tl.atomic_add(own, 1, sem="acq_rel")
            last = others == tl.cdiv(law.C, per) - 1
            if last:
                tl.debug_barrier()
                floor, mass = resolve(
                    row, Edits(law.allowed, bits), law.V, law.C, own, top, Z, scale, least,
                    k, share,
                    k_low, k_high, p_low, p_high, False, CHUNK, PART, BLOCK_C,
                )  # fmt: skip
        if last:
            tl.store(law.floors + 2 * at, floor)
            tl.store(law.floors + 2 * at + 1, mass)


@triton.jit(do_not_specialize=["rows", "count", "per"])
def row_floors(
    law, numbers, more, draft, draft_numbers, draft_more, count, count_of, stride_count, rows, per,
    HAS_DRAFT: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK_C: tl.constexpr,
    DRAFT_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``row_floor`` of the rows of one law or two."""
    at = tl.program_id(0)
    if not HAS_DRAFT:  # up to Triton 3.6 a tuple with a None may not be compared with None
        row_floor(law, numbers, at, count, count_of, stride_count, more, per, CHUNK, PART, BLOCK_C)
    else:
        if at < rows:
            row_floor(
                law, numbers, at, count, count_of, stride_count, more, per, CHUNK, PART, BLOCK_C
            )
        else:
            row_floor(
                draft, draft_numbers, at - rows, count, count_of, stride_count, draft_more, per,
                CHUNK, PART, DRAFT_BLOCK_C,
            )  # fmt: skip
