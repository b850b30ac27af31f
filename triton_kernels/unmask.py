"""One step of unmasking in two launches: one read of the masked rows, then a decision a row, after
which the last row of each request to be done commits for all of them. With filters ``row_supports``
comes between them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from .commit import empty_results, results_of, window_place
from .commit_rules import commit_window, rule_of
from .devices import architecture, on_device_of
from .row_decision import decide
from .row_launches import CONFIGURATIONS, RowCall, launch_chunks, row_call, rows_of
from .rows import edits_at, locate, row_at

NUM_RULE = 16  # of the schema's arguments, from ``rule`` to ``max_commit``


@triton.jit(do_not_specialize=["place", "changes", "numbers", "keys", "rule", "results"])
def unmask_rows(
    rows,
    place,
    changes,
    numbers,
    keys,
    stats,
    search,
    finished,
    rule,
    results,
    SAMPLER: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    FILTERED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_TEMPERED: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    RULE: tl.constexpr,
    STRICT: tl.constexpr,
    PROPOSED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Position program_id(0) of the windows. ``finished`` [B], zeroed by the launch before, counts
    the positions of a request that are done."""
    r = tl.program_id(0)
    b, i, inside, line, read = locate(rows, place, r)
    if inside:
        own = b * (place.L >> 2) + i
        tl.store(results.committed + own, read.to(tl.uint8))
        if read:
            row = row_at(rows, place, b, line)
            token, sure, _, good = decide(
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
            where = b * (results.stride_proposals_b >> 2) + i * (results.stride_proposals_l >> 2)
            tl.store(results.proposals + where, tl.where(good, token, -1).to(tl.int64))
            tl.store(results.confidence + own, tl.where(good, sure, float("nan")))

    # all stores of this program come before the count, all others' before what follows it
    tl.debug_barrier()
    others = tl.atomic_add(finished + b, 1, sem="acq_rel")
    if others == (place.R >> 2) - 1:
        tl.debug_barrier()
        commit_window(
            place, rule, keys, results, b, RULE, STRICT, PER_REQUEST, PROPOSED, BLOCK, BLOCK_L
        )


def unmask(
    tokens: Tensor,
    logits: Tensor,
    mask_id: int,
    masked: Tensor | None,
    shift: int,
    window_start: int,
    window_start_tensor: Tensor | None,
    window_length: int,
    external_score: Tensor | None,
    *arguments: Any,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tokens [B, L], logits [B, L|length|length+1, V] -> tokens, committed, counts, confidence,
    proposals. ``into``: the results' own memory, contiguous but for the tokens."""
    *arguments, return_proposals = arguments  # type: ignore[assignment]
    rule, sampling = arguments[:NUM_RULE], arguments[NUM_RULE:]
    B, L = tokens.shape
    R = L if window_length < 0 else min(window_length, L)
    *made, proposals = into or (*empty_results(B, L, tokens.device), None)
    if return_proposals and proposals is not None:
        own = returned = proposals
    else:  # where rows leave their tokens
        own = torch.empty((B, L), dtype=torch.int64, device=tokens.device)
        returned = own if return_proposals else own.new_empty(0)
    if B * R == 0:
        _nothing(tokens, made, own)
        return (*made, returned)  # type: ignore[return-value]
    lines = lines_of(logits.shape[1], L, window_length, shift)
    place = window_place(
        tokens, masked, mask_id, window_start, window_start_tensor, window_length, R, lines
    )
    call = unmask_call(logits, place, B * R, mask_id, rule[0], *sampling)
    numbers, options = rule_of(*rule, external=external_score, coins=None)
    results = results_of(*made, own, rule[0])
    finished = torch.empty((B,), dtype=torch.int32, device=tokens.device)
    with on_device_of(logits):
        launch_chunks(call, B * R, finished)
        launch(
            unmask_rows,
            (B * R,),
            **unmask_arguments(call, finished, numbers, results, options, return_proposals),
            **CONFIGURATIONS[("unmask", call.key, architecture(logits))],
        )
    return (*made, returned)  # type: ignore[return-value]


def _nothing(tokens: Tensor, made: Any, proposals: Tensor) -> None:
    """An empty window."""
    made[0].copy_(tokens)
    proposals.copy_(tokens)
    for x in made[1:4]:
        x.zero_()
    made[4].fill_(-torch.inf)


def lines_of(num_rows: int, L: int, length: int, shift: int) -> tuple[int, int, int]:
    """(rows of logits a request, by how many they are shifted, whether they begin with the
    window)."""
    if num_rows == L:
        return num_rows, shift, 0
    # length + 1 rows start one earlier, so the shift is in them
    return num_rows, shift if num_rows == length else 0, 1


def unmask_call(
    logits: Tensor, place: Any, count: int, mask_id: int, rule: str, *sampling: Any
) -> RowCall:
    *filters, order, confidence, tempered, exclude_ids = sampling[:12]
    if rule in ("entropy", "entropy_bound"):
        confidence = "neg_entropy"
    return row_call(
        rows_of(logits),
        place,
        count,
        *filters,
        order,
        confidence,
        tempered,
        [*exclude_ids, mask_id],
        *sampling[12:],
    )


def unmask_arguments(
    call: RowCall,
    finished: Tensor,
    rule: Any,
    results: Any,
    options: dict[str, Any],
    proposed: bool,
) -> dict[str, Any]:
    return dict(
        rows=call.rows,
        place=call.place,
        changes=call.changes,
        numbers=call.numbers,
        keys=call.keys,
        stats=call.stats,
        search=call.search,
        finished=finished,
        rule=rule,
        results=results,
        PROPOSED=proposed,
        **call.options,
        **options,
    )
