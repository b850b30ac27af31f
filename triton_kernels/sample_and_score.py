"""Sampling and scoring rows in two launches: one read of the logits, and a decision a row.

``row_chunks`` leaves a few numbers a chunk; ``row_choices`` combines them and, where a token is
drawn, reads the one chunk again that it lies in. Between them, with filters, ``row_supports`` finds
their thresholds in a second read, and the noisiest entries and the entropy of what they leave.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from .devices import architecture, on_device_of
from .row_decision import decide
from .row_launches import CONFIGURATIONS, RowCall, launch_chunks, row_call, rows_of
from .rows import Place, as_rows, edits_at, locate, row_at, two
from .vocabulary import plain


@triton.jit(do_not_specialize=["place", "changes", "numbers", "keys"])
def row_choices(
    rows,
    place,
    changes,
    numbers,
    keys,
    stats,
    search,
    tokens,
    confidences,
    lses,
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
    """tokens, confidences, lses [rows] of a row a program; -1, -inf, -inf where none is read."""
    r = tl.program_id(0)
    b, i, _inside, line, read = locate(rows, place, r)
    chosen = tl.full([], -1, tl.int64)
    sure, log = tl.full([], float("-inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    if read:
        row = row_at(rows, place, b, line)
        token, sure, log, good = decide(
            rows,
            numbers,
            keys,
            stats,
            search,
            row,
            changes,
            edits_at(changes, place, b, i, line),
            r,
            b,
            i,
            SAMPLER,
            CONFIDENCE,
            TEMPERED,
            FILTERED,
            JOINT,
            HAS_TEMPERED,
            PER_REQUEST,
            CHUNK,
            BLOCK_C,
        )
        chosen = tl.where(good, token, -1).to(tl.int64)
    tl.store(tokens + r, chosen)
    tl.store(confidences + r, sure)
    tl.store(lses + r, log)


def sample_and_score(
    logits: Tensor, row_index: Tensor | None, probs: bool, *sampling: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., V] or [rows, V] with row_index [...] -> tokens, confidence, lse [...]."""
    shape = logits.shape[:-1] if row_index is None else row_index.shape
    device = logits.device
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    confidence = torch.empty(shape, dtype=torch.float32, device=device)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    count = tokens.numel()
    if count == 0:
        return tokens, confidence, lse
    call = call_of(logits, row_index, probs, count, *sampling)
    with on_device_of(logits):
        launch_chunks(call, count, None)
        launch(
            row_choices,
            (count,),
            **choice_arguments(call, tokens, confidence, lse),
            **CONFIGURATIONS[("choose", call.key, architecture(logits))],
        )
    return tokens, confidence, lse


def call_of(
    logits: Tensor, row_index: Tensor | None, probs: bool, count: int, *sampling: Any
) -> RowCall:
    if row_index is None:
        x = as_rows(logits)
        R, num_rows = x.shape[1], x.shape[1]
    else:
        x = logits
        R, num_rows = (row_index.shape[-1] if row_index.dim() > 1 else 1), x.shape[0]
    place = Place(plain(R), plain(num_rows), *two(row_index), *NOTHING_MASKED)
    return row_call(rows_of(x), place, count, *sampling, probs=probs)


NOTHING_MASKED = (None, 0, 0, None, 0, 0, 0, 0, 0, None, 0, 0, 0, 0)


def choice_arguments(
    call: RowCall, tokens: Tensor, confidence: Tensor, lse: Tensor
) -> dict[str, Any]:
    return dict(
        rows=call.rows,
        place=call.place,
        changes=call.changes,
        numbers=call.numbers,
        keys=call.keys,
        stats=call.stats,
        search=call.search,
        tokens=tokens,
        confidences=confidence,
        lses=lse,
        **call.options,
    )
