"""Greedy verification of chains and trees: the target's rows once, then a program a request.

The rule top_k takes the filters' second read for its thresholds, typical a second read for the
entropies, whose p needs the row's total first: a launch between. Target ids need one launch in all.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backends import BackendUnavailable
from ..replay import launch
from . import configurations
from .devices import architecture, on_device_of, table_of
from .greedy_kernels import RULES, Drafted, entropies, walk
from .law_arguments import LawRows, law_rows, numbers_of, pair
from .law_prepare import CHUNK, example, prepare
from .numerics import power_of_two
from .static_call import StaticCall
from .vocabulary import chunks_a_program, plain

CONFIGURATIONS = configurations.load("verify_greedy")


def verify_greedy(
    draft_tokens: Tensor,
    target: Tensor,
    parents: Tensor | None,
    num_drafts: int,
    num_drafts_tensor: Tensor | None,
    max_depth: int,
    rule: str,
    top_k: int,
    top_k_tensor: Tensor | None,
    distance: int,
    posterior_threshold: float,
    posterior_alpha: float,
    temperature: float,
    temperature_tensor: Tensor | None,
    row_index: Tensor | None,
    allowed: Tensor | None,
    first_match: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """draft_tokens [B, G | T], target rows [B, G+1 | T] -> tokens, num_accepted [B], path."""
    B, device = draft_tokens.shape[0], draft_tokens.device
    T = draft_tokens.shape[1] + (parents is None)
    width = T if max_depth < 0 else max_depth + 1
    tokens = torch.empty((B, width), dtype=torch.int64, device=device)
    path = torch.empty((B, width), dtype=torch.int32, device=device)
    num_accepted = torch.empty((B,), dtype=torch.int32, device=device)
    drafted = drafted_of(draft_tokens, parents, num_drafts_tensor, T, first_match)
    arch = architecture(draft_tokens)
    entry = CONFIGURATIONS.get((max(power_of_two(T), 64), arch))
    if entry is None:
        raise BackendUnavailable(
            "verify_greedy: 'triton' cannot run this call: trees of up to 1024 nodes, as one "
            f"program holds all of them, got {T}"
        )
    if B == 0:
        return tokens, num_accepted, path
    # other rules read the argmax alone, whatever the temperature
    heat = (temperature, temperature_tensor) if rule == "typical" else (1.0, None)
    kept = (max(top_k, 1), top_k_tensor) if rule == "top_k" else (0, None)
    numbers = numbers_of(heat, kept, (1.0, None), (0.0, None))
    ids = not target.is_floating_point()
    law = target_ids(target, row_index, T) if ids else None
    if law is None:
        law = law_rows(target, None, row_index, allowed, B, T, rule == "top_k")
    scratch = num_accepted
    if first_match:
        scratch = torch.empty((B, drafted.BLOCK.value), dtype=torch.int32, device=device)
    sums = None
    block_c = 1 if ids else power_of_two(law.C)
    with on_device_of(draft_tokens):
        if not ids:
            prepare(law, numbers, B, (num_drafts, num_drafts_tensor), 1)
        if rule == "typical":
            sums = torch.empty((B * T, law.C), dtype=torch.float32, device=device)
            per = chunks_a_program(B * T, law.C)
            launch(
                entropies, (B * T, -(-law.C // per)), law, numbers, drafted, sums, num_drafts, per,
                BLOCK_C=block_c, **CONFIGURATIONS[("entropies", arch)],
            )  # fmt: skip
        launch(
            walk, (B,), law._replace(search=None), numbers, drafted, sums, scratch,
            tokens, num_accepted, path, num_drafts, width, distance if rule == "distance" else 0,
            posterior_threshold, posterior_alpha, RULES.index(rule), ids, block_c,
            **entry,
        )  # fmt: skip
    return tokens, num_accepted, path


def drafted_of(
    draft_tokens: Tensor,
    parents: Tensor | None,
    count_of: Tensor | None,
    T: int,
    first_match: bool,
) -> Drafted:
    strides = (plain(0), 0)
    if parents is not None:
        strides = (plain(0 if parents.shape[0] == 1 else parents.stride(0)), parents.stride(1))
    return Drafted(
        draft_tokens,
        *draft_tokens.stride(),
        parents,
        *strides,
        *pair(0, count_of)[1:],
        T,
        tl.constexpr(max(power_of_two(T), 64)),
        tl.constexpr(first_match),
    )


def target_ids(target: Tensor, index: Tensor | None, rows: int) -> LawRows:
    """Ids [B, rows], or any [n] with an index, as rows of a law that nobody computes."""
    return LawRows(
        x=target,
        index=index,
        allowed=None,
        stats=None,
        floors=None,
        vocab=None,
        firsts=None,
        num_rows=plain(target.shape[0]),
        R=rows,
        V=0,
        C=0,
        target_C=0,
        stride_b=0 if index is not None else target.stride(0),
        stride_r=target.stride(-1),
        stride_index_b=0 if index is None else index.stride(0),
        stride_index_r=0 if index is None else index.stride(1),
        stride_allowed_b=0,
        stride_allowed_r=0,
        PROBS=tl.constexpr(False),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def calls(
        T: int, rule: str, *, ids: bool = False, more: bool = False, wide: bool = False
    ) -> Iterator[StaticCall]:
        B = 8
        dtype = torch.int64 if ids else torch.bfloat16
        options = dict(filtered=rule == "top_k", allowed=more, index=more, wide=wide)
        law, numbers = example(torch.bfloat16, **options)
        if ids:
            law = target_ids(empty(B, T, dtype=dtype), empty(B, T) if more else None, T)
        law = law._replace(R=T)
        count = empty(B) if more else None
        drafted = drafted_of(empty(B, T, dtype=torch.int64), empty(B, T), count, T, more)
        block_c = 1 if ids else power_of_two(law.C)
        sums = empty(B * T, law.C, dtype=torch.float32)
        common: dict[str, Any] = dict(
            target=law, numbers=numbers, drafted=drafted, count=T - 1, BLOCK_C=block_c,
            sums=sums if rule == "typical" else None,
        )  # fmt: skip
        note = f"{rule} T={T}" + " ids" * ids + " allowed index first_match" * more + " wide" * wide
        if rule == "typical":
            given = dict(common, per=2)
            streamed = 2 * CHUNK
            yield StaticCall(
                entropies, ("entropies", table_of(arch)), given, dtype, streamed=streamed, note=note
            )
        entry = max(power_of_two(T), 64)
        given = dict(
            common, target=law._replace(search=None), scratch=empty(B, entry),
            tokens=empty(B, T, dtype=torch.int64), num_accepted=empty(B), path=empty(B, T),
            width=9, distance=0, threshold=0.3, alpha=0.09, RULE=RULES.index(rule), IDS=ids,
        )  # fmt: skip
        yield StaticCall(walk, (entry, table_of(arch)), given, dtype, note=note)

    for T in (64, 128, 256, 512, 1024):
        yield from calls(T, "exact")
    yield from calls(64, "exact", ids=True)
    yield from calls(64, "distance", ids=True, more=True)
    for rule in ("exact", "top_k", "typical"):
        yield from calls(64, rule, more=True)
    for rule in ("top_k", "typical"):
        yield from calls(1024, rule, more=True)
        yield from calls(64, rule, more=True, wide=True)
