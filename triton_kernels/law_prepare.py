"""Works out a verification's laws: chunks' numbers in one read, filters' thresholds in another.

Launches: ``chunk_laws``, with top-k, top-p or min-p ``law_floors.row_floors``, with a reduced
vocabulary ``index_vocab``. See ``law_rows``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .devices import architecture, table_of
from .histograms import leave_counts
from .law_arguments import CHUNK, LawRows, Numbers, Pair, law_rows, numbers_of, pair
from .law_floors import row_floors
from .law_rows import place, raw_chunk, row_bits, temperature_of
from .numerics import power_of_two
from .static_call import StaticCall
from .supports import chunks_to_narrow, counts_of, row_scratch
from .thresholds import sought
from .vocabulary import chunks_a_program, leave, number, scale_of, top_of, weights

CONFIGURATIONS = configurations.load("law_prepare")


@triton.jit
def row_chunks(law, numbers, at, count, count_of, stride_count, more, per, CHUNK: tl.constexpr):
    """Each chunk's top, sum and argmax, and with top-k or top-p its histogram, of row ``at`` where
    i < count[b] + more."""
    b, i = at // law.R, at % law.R
    limit = tl.maximum(number(count, count_of, stride_count, b), 0) + more
    at, row, _present, inside = place(law, b, i)
    if inside & (i < limit):
        bits = row_bits(law, b, i)
        temperature = temperature_of(numbers, b)
        scale = scale_of(temperature)
        if law.floors is not None:
            own = row_scratch(law.search, at)
            k, share = sought(numbers, b, law.V)
            searched = ((k > 0) | (share < 1)) & (temperature > 0)
            if tl.program_id(1) == 0:
                tl.store(own, 0)
        first = tl.program_id(1) * per
        for c in range(first, tl.minimum(first + per, law.C)):
            x = raw_chunk(law, row, bits, c * CHUNK, CHUNK)
            if law.PROBS:
                x = tl.where(x >= 0, x, float("nan"))
                top, best = top_of(x, c * CHUNK, CHUNK)
                total = tl.sum(x, 0)
            else:
                top, best = top_of(x, c * CHUNK, CHUNK)
                total = tl.sum(weights(x, top, scale), 0)
            leave(law.stats + at * 3 * law.C, c, law.C, top, total, best)
            if law.floors is not None:  # noqa: SIM102 (known at compile time)
                if searched:
                    leave_counts(counts_of(own, law.C, c), x, top)


@triton.jit(do_not_specialize=["rows", "per", "count"])
def chunk_laws(
    law, numbers, more, draft, draft_numbers, draft_more,
    count, count_of, stride_count, rows, per, arrivals, HAS_DRAFT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """``row_chunks`` of the first law's ``rows`` rows, and then of the draft's, if there is one.

    ``arrivals`` int32 [B] are set to 0, for a kernel that counts its programs.
    """
    at = tl.program_id(0)
    if arrivals is not None:  # noqa: SIM102
        if (tl.program_id(1) == 0) & (at < rows) & (at % law.R == 0):
            tl.store(arrivals + at // law.R, 0)
    if not HAS_DRAFT:  # up to Triton 3.6 a tuple with a None may not be compared with None
        row_chunks(law, numbers, at, count, count_of, stride_count, more, per, CHUNK)
    else:
        if at < rows:
            row_chunks(law, numbers, at, count, count_of, stride_count, more, per, CHUNK)
        else:
            row_chunks(
                draft, draft_numbers, at - rows, count, count_of, stride_count, draft_more,
                per, CHUNK,
            )  # fmt: skip


@triton.jit
def index_vocab(vocab, firsts, Vd, target_C, CHUNK: tl.constexpr):
    """firsts[c]: columns whose token lies before chunk c; firsts[target_C + 1]: 1 if ids ascend."""
    c = tl.program_id(0)
    below = tl.zeros([CHUNK], tl.int32)
    for start in range(0, Vd, CHUNK):
        j = start + tl.arange(0, CHUNK)
        ids = tl.load(vocab + j, mask=j < Vd, other=0)
        if c <= target_C:
            below += tl.where((j < Vd) & (ids < c * CHUNK), 1, 0)
        else:
            following = tl.load(vocab + j + 1, mask=j + 1 < Vd, other=0)
            below += tl.where((j + 1 < Vd) & (following <= ids), 1, 0)
    count = tl.sum(below, 0)
    if c > target_C:
        count = tl.where(count == 0, 1, 0)
    tl.store(firsts + c, count)


def prepare(
    law: LawRows,
    numbers: Numbers,
    batch: int,
    count: Pair,
    more: int,
    draft: LawRows | None = None,
    draft_numbers: Numbers | None = None,
    draft_more: int = 0,
    arrivals: Tensor | None = None,
) -> None:
    """Works out every row i < count[b] + more of a law, and of a draft's: one launch, two with
    filters, and one more with a reduced vocabulary."""
    rows = batch * law.R
    all_rows = rows + (batch * draft.R if draft is not None else 0)
    if all_rows == 0:
        return
    arch = architecture(law.x)
    chunks = max(law.C, draft.C if draft is not None else 0)
    per = chunks_a_program(all_rows, chunks)
    counts = dict(zip(("count", "count_of", "stride_count"), pair(*count)))
    first = dict(law=law, numbers=numbers, more=more)
    second = dict(draft=draft, draft_numbers=draft_numbers, draft_more=draft_more)
    launch(
        chunk_laws, (all_rows, -(-chunks // per)),
        **first, **second, **counts, rows=rows, per=per, arrivals=arrivals,
        HAS_DRAFT=draft is not None, **CONFIGURATIONS[("chunks", arch)],
    )  # fmt: skip
    if draft is not None:
        prepare_vocab(draft)
        if draft.floors is not None and law.floors is None:
            first, rows = dict(zip(first, second.values())), batch * draft.R
            second = dict.fromkeys(second)
            all_rows = rows
        elif draft.floors is None:
            second, all_rows = dict.fromkeys(second), rows
    if first["law"].floors is not None:  # type: ignore[union-attr]
        blocks = dict(
            BLOCK_C=power_of_two(first["law"].C),
            DRAFT_BLOCK_C=power_of_two(chunks),
            HAS_DRAFT=second["draft"] is not None,
        )
        per = chunks_to_narrow(all_rows, chunks)
        launch(
            row_floors, (all_rows, -(-chunks // per)),
            **first, **second, **counts, rows=rows, per=per, **blocks,
            **CONFIGURATIONS[("floors", arch)],
        )  # fmt: skip


def prepare_vocab(law: LawRows) -> None:
    """Where a reduced vocabulary's columns lie in the target's."""
    if law.vocab is not None:
        grid = (law.target_C + 2,)
        entry = CONFIGURATIONS[("vocab", architecture(law.x))]
        launch(index_vocab, grid, law.vocab, law.firsts, law.V, law.target_C, **entry)


def example(
    dtype: torch.dtype,
    *,
    probs: bool = False,
    filtered: bool = False,
    allowed: bool = False,
    index: bool = False,
    reduced: bool = False,
    odd: bool = False,
    wide: bool = False,
) -> tuple[LawRows, Numbers]:
    """A law as real calls have it, on no device: for static reports. The widest of common
    vocabularies has 262144 tokens."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, R, V = 8, 5, 32000 if reduced else 262144 if wide else 128256
    width = V + 1 if odd else V
    x = empty(B * R, width, dtype=dtype) if index else empty(B, R, width, dtype=dtype)
    x = x[..., 1:] if odd else x
    of = empty(B) if filtered else None
    numbers = numbers_of((1.0, empty(B)), (0, of), (1.0, of), (0.0, of))
    law = law_rows(
        None if probs else x,
        x if probs else None,
        empty(B, R, dtype=torch.int32) if index else None,
        empty(B, R, -(-V // 32), dtype=torch.int32) if allowed else None,
        *(B, R, filtered),
        empty(V, dtype=torch.int64) if reduced else None,
        128256,
    )
    return law, numbers


STATIC = (  # a covering set of what laws can be
    (torch.bfloat16, dict()),
    (torch.bfloat16, dict(filtered=True, allowed=True, index=True)),
    (torch.float16, dict(filtered=True)),
    (torch.float32, dict(filtered=True, index=True)),
    (torch.float32, dict(probs=True, allowed=True)),
    (torch.float32, dict(probs=True, reduced=True)),
    (torch.bfloat16, dict(reduced=True, filtered=True)),
    (torch.bfloat16, dict(odd=True, filtered=True)),
    (torch.bfloat16, dict(wide=True, filtered=True)),
)


def describe(dtype: torch.dtype, options: dict[str, bool]) -> str:
    return " ".join([str(dtype).removeprefix("torch."), *options])


PAIRS: tuple[tuple[torch.dtype, dict[str, bool], dict[str, bool], bool], ...] = (
    # (dtype, the target's options, the draft's, arrivals counted): what one launch prepares
    (torch.bfloat16, dict(), dict(), False),
    (torch.bfloat16, dict(), dict(), True),
    (torch.bfloat16, dict(filtered=True, allowed=True, index=True), dict(filtered=True), True),
    (torch.float16, dict(filtered=True), dict(reduced=True, filtered=True), False),
    (torch.float32, dict(probs=True), dict(probs=True, index=True), True),
)


def static_calls(arch: str) -> Iterator[StaticCall]:
    table = table_of(arch)

    def calls(first: dict[str, Any], second: dict[str, Any], **rows: Any) -> Iterator[StaticCall]:
        given = dict(**first, **second, count=4, count_of=None, stride_count=0, rows=40)
        given["HAS_DRAFT"] = second["draft"] is not None
        counted = torch.empty(8, dtype=torch.int32, device="meta") if rows.pop("counted") else None
        dtype = rows.pop("dtype")
        chunks = dict(given, per=1, arrivals=counted)
        yield StaticCall(chunk_laws, ("chunks", table), chunks, dtype, **rows)
        if first["law"].floors is not None:
            draft = second["draft"]
            blocks = dict(
                BLOCK_C=power_of_two(first["law"].C),
                DRAFT_BLOCK_C=power_of_two(max(first["law"].C, draft.C if draft else 0)),
                per=1,
            )
            yield StaticCall(row_floors, ("floors", table), dict(given, **blocks), dtype, **rows)

    nobody = dict(draft=None, draft_numbers=None, draft_more=0)
    for dtype, options in STATIC:
        law, numbers = example(dtype, **options)
        rows: dict[str, Any] = dict(
            streamed=CHUNK * dtype.itemsize,
            aligned=not options.get("odd", False),
            note=describe(dtype, options),
        )
        first = dict(law=law, numbers=numbers, more=1)
        yield from calls(first, nobody, dtype=dtype, counted=False, **rows)
        if law.vocab is not None:
            given = dict(vocab=law.vocab, firsts=law.firsts, Vd=law.V, target_C=law.target_C)
            yield StaticCall(index_vocab, ("vocab", table), given, torch.int64, note=rows["note"])
    for dtype, options, others, counted in PAIRS:
        law, numbers = example(dtype, **options)
        draft, draft_numbers = example(dtype, **others)
        note = f"{describe(dtype, options)} draft {' '.join(others)}" + " counted" * counted
        yield from calls(
            dict(law=law, numbers=numbers, more=1),
            dict(draft=draft, draft_numbers=draft_numbers, draft_more=0),
            dtype=dtype, counted=counted, note=note, streamed=CHUNK * dtype.itemsize,
        )  # fmt: skip
