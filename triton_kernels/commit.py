"""The commit rules alone, in one launch: one request a program."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .commit_orders import MASKED, NAMES, Results, clipped_window
from .commit_rules import commit_window, rule_of
from .devices import architecture, on_device_of, table_of
from .rows import Place, keys_of, per_request, stride0, two
from .static_call import StaticCall
from .vocabulary import plain

CONFIGURATIONS = configurations.load("commit")


@triton.jit(do_not_specialize=["place", "rule", "keys", "results", "stride_b", "stride_l"])
def commit_scores(
    place,
    rule,
    keys,
    results,
    scores,
    stride_b,
    stride_l,
    RULE: tl.constexpr,
    STRICT: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Request program_id(0): flags and scores over the window, then the rule."""
    b = tl.program_id(0).to(tl.int64)
    low, high = clipped_window(place, b)
    for start in range(low, high, BLOCK_L):
        at = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        real = at < high
        token = tl.load(
            place.tokens + b * (place.stride_tokens_b >> 2) + at * (place.stride_tokens_l >> 2),
            mask=real,
            other=0,
        )
        where = b * (results.stride_proposals_b >> 2) + at * (results.stride_proposals_l >> 2)
        proposal = tl.load(results.proposals + where, mask=real, other=-1)
        score = tl.load(scores + b * stride_b + at * stride_l, mask=real, other=0.0)
        proposed = (proposal >= 0) & (proposal != place.mask_id)
        score = tl.where(proposed, score.to(tl.float32), float("nan"))
        own = b * (place.L >> 2) + at
        flags = tl.where(token == place.mask_id, MASKED, 0).to(tl.uint8)
        tl.store(results.committed + own, flags, mask=real)
        tl.store(results.confidence + own, score, mask=real)
    tl.debug_barrier()
    commit_window(place, rule, keys, results, b, RULE, STRICT, PER_REQUEST, False, BLOCK, BLOCK_L)


def commit(
    tokens: Tensor,
    proposals: Tensor,
    scores: Tensor,
    mask_id: int,
    window_start: int,
    window_start_tensor: Tensor | None,
    window_length: int,
    external_score: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tokens, proposals, scores [B, L] -> tokens, committed, counts, confidence."""
    *rule, seed, seed_tensor, offset, offset_tensor, positions, uniforms = arguments
    B, L = tokens.shape
    made = empty_results(B, L, tokens.device)
    if B == 0:
        return made
    place = window_place(
        tokens, None, mask_id, window_start, window_start_tensor, window_length, L, (L, 0, 0)
    )
    numbers, options = rule_of(*rule, external=external_score, coins=uniforms)
    results = results_of(*made, proposals, rule[0])
    keys = keys_of(seed, seed_tensor, offset, offset_tensor, positions, None)
    with on_device_of(tokens):
        launch(
            commit_scores,
            (B,),
            place=place,
            rule=numbers,
            keys=keys,
            results=results,
            scores=scores,
            stride_b=scores.stride(0),
            stride_l=scores.stride(1),
            PER_REQUEST=per_request(seed_tensor),
            **options,
            **CONFIGURATIONS[("commit", architecture(tokens))],
        )
    return made


def empty_results(
    B: int, L: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty((B, L), dtype=torch.int64, device=device),
        torch.empty((B, L), dtype=torch.bool, device=device),
        torch.empty((B,), dtype=torch.int32, device=device),
        torch.empty((B,), dtype=torch.int32, device=device),
        torch.empty((B, L), dtype=torch.float32, device=device),
    )


def results_of(
    tokens: Tensor,
    committed: Tensor,
    num_committed: Tensor,
    num_left: Tensor,
    confidence: Tensor,
    proposals: Tensor,
    rule: str,
) -> Results:
    runs = None
    if rule == "segments":
        runs = torch.empty(tokens.shape, dtype=torch.int32, device=tokens.device)
    return Results(
        *two(tokens),
        committed.view(torch.uint8),
        num_committed,
        num_left,
        confidence,
        *two(proposals),
        runs,
    )


def window_place(
    tokens: Tensor,
    masked: Tensor | None,
    mask_id: int,
    start: int,
    start_tensor: Tensor | None,
    length: int,
    R: int,
    lines: tuple[int, int, int],
) -> Place:
    """R: positions a request that the grid covers; lines: rows of logits a request, the shift, and
    whether they begin at the window's start."""
    L = tokens.shape[1]
    num_rows, shift, relative = lines
    return Place(
        plain(R),
        plain(num_rows),
        None,
        0,
        0,
        *two(tokens),
        *two(None if masked is None else masked.view(torch.uint8)),
        mask_id,
        plain(L),
        plain(start),
        start_tensor,
        stride0(start_tensor),
        plain(L if length < 0 else length),
        shift,
        relative,
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    B, L = 8, 256
    for rule in NAMES:
        made = empty_results(B, L, torch.device("meta"))
        place = window_place(made[0], None, 5, 0, None, -1, L, (L, 0, 0))
        pairs = (1, None, 0.9, None, 0.1, None, 1.0, None, 0.4, None, 0.0, None)
        numbers, options = rule_of(
            rule, *pairs, False, 1, -1, external=made[4] if rule == "external" else None, coins=None
        )
        given = dict(
            place=place,
            rule=numbers,
            keys=keys_of(0, None, 0, None, None, None),
            results=results_of(*made, made[0], rule),
            scores=made[4],
            stride_b=L,
            stride_l=1,
            PER_REQUEST=False,
            **options,
        )
        yield StaticCall(commit_scores, ("commit", table_of(arch)), given, torch.float32, note=rule)
