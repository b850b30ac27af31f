"""Verification of a draft tree by rejection sampling: launches of ``tree_walk`` and ``traversal``.

From the root: one launch, with a reduced draft vocabulary a second. Leaf first: ``law_prepare`` for
both laws together (one launch, two with filters), then one.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations, law_prepare
from .devices import architecture, on_device_of
from .draws import Draws, draws_of
from .law_arguments import CHUNK, LawRows, Numbers, Pair, is_filtered, law_rows, numbers_of, pair
from .law_prepare import describe, prepare, prepare_vocab
from .numerics import power_of_two
from .static_call import StaticCall
from .supports import scratch_of
from .traversal import NUMBERS
from .traversal import leaf_first as leaf_first_kernel
from .tree_residuals import FIELDS
from .tree_rows import Tree
from .tree_walk import Outputs, walk
from .vocabulary import plain

CONFIGURATIONS = configurations.load("rejection_sample_tree")


def rejection_sample_tree(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor | None,
    draft_logits: Tensor | None,
    target_probs: Tensor | None,
    num_drafts: int,
    num_drafts_tensor: Tensor | None,
    row_index: Tensor | None,
    draft_row_index: Tensor | None,
    draft_vocab: Tensor | None,
    allowed: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    top_k: int,
    top_k_tensor: Tensor | None,
    top_p: float,
    top_p_tensor: Tensor | None,
    min_p: float,
    min_p_tensor: Tensor | None,
    draft_temperature: float,
    draft_temperature_tensor: Tensor | None,
    filter_draft: bool,
    rule: str,
    max_depth: int,
    threshold_single: float,
    threshold_acc: float,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: int,
    positions_tensor: Tensor | None,
    uniforms: Tensor | None,
    return_logprobs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens [B, max_depth+1], num_accepted [B], path [B, max_depth+1], logprobs or size 0."""
    B, T = draft_tokens.shape
    W, device = max_depth + 1, draft_tokens.device
    logprobs = torch.empty((B, W) if return_logprobs else 0, dtype=torch.float32, device=device)
    outputs = Outputs(
        torch.empty((B, W), dtype=torch.int64, device=device),
        torch.empty(B, dtype=torch.int32, device=device),
        torch.empty((B, W), dtype=torch.int32, device=device),
        logprobs if return_logprobs else None,
    )
    if not B:
        return outputs.tokens, outputs.num_accepted, outputs.path, logprobs

    # the laws; no filter acts on probabilities
    filters = (top_k, top_k_tensor), (top_p, top_p_tensor), (min_p, min_p_tensor)
    off: tuple[Pair, Pair, Pair] = (0, None), (1.0, None), (0.0, None)
    p_numbers = numbers_of(
        (temperature, temperature_tensor), *(off if target_logits is None else filters)
    )
    q_numbers = numbers_of(
        (draft_temperature, draft_temperature_tensor),
        *(filters if filter_draft and draft_logits is not None else off),
    )
    given = draft_logits if draft_logits is not None else draft_probs
    if given is None and rule != "target_only":
        rule = "delta"
    leaf_first = rule.startswith("traversal")
    p = law_rows(
        *(target_logits, target_probs, row_index, allowed, B, T),
        leaf_first and is_filtered(p_numbers),
    )
    q = None
    if rule not in ("delta", "target_only"):
        q = law_rows(
            *(draft_logits, draft_probs, draft_row_index, None, B, T),
            *(leaf_first and is_filtered(q_numbers), draft_vocab, p.V),
        )
    arch = architecture(draft_tokens)
    if not leaf_first:
        p, q = searched(p, p_numbers, B, arch), searched(q, q_numbers, B, arch)

    count = num_drafts, num_drafts_tensor
    arguments = shared_arguments(
        *(p, q, p_numbers, q_numbers, draft_tokens, parents, count),
        *(draws_of(seed_tensor, offset_tensor, positions_tensor, uniforms), outputs),
        *(max_depth, seed, offset, positions),
    )
    with on_device_of(draft_tokens):
        if q is not None and leaf_first:
            prepare(p, p_numbers, B, count, 1, q, q_numbers, 1)
            rows = torch.empty((B, 2, T, int(NUMBERS)), dtype=torch.float32, device=device)
            arguments = leaf_first_arguments(arguments, rows, rule)
            launch(leaf_first_kernel, (B,), **arguments, **CONFIGURATIONS[leaf_first_key(arch)])
        else:
            if q is not None:
                prepare_vocab(q)
            arguments = walk_arguments(arguments, rule, threshold_single, threshold_acc)
            launch(walk, (B,), **arguments, **CONFIGURATIONS[walk_key(arch, arguments)])
    return outputs.tokens, outputs.num_accepted, outputs.path, logprobs


def searched(law: LawRows | None, numbers: Numbers, batch: int, arch: str) -> LawRows | None:
    """With the scratch in which a walk, one row after another, finds what filters keep."""
    if law is None or not is_filtered(numbers):
        return law
    search = scratch_of(batch, law.C, law.x.device)
    # gfx942 has registers enough, and calls cost it a stack
    search = search._replace(apart=tl.constexpr(arch != "gfx942"))
    return law._replace(search=search, SEARCHED=tl.constexpr(True))


def shared_arguments(
    p: LawRows, q: LawRows | None, p_numbers: Numbers, q_numbers: Numbers, tokens: Tensor,
    parents: Tensor, count: Pair, draws: Draws, outputs: Outputs, max_depth: int, seed: int,
    offset: int, positions: int,
) -> dict[str, Any]:  # fmt: skip
    """What ``walk`` and ``leaf_first`` both take."""
    B, T = tokens.shape
    records = torch.empty((B, T, int(FIELDS)), dtype=torch.float32, device=tokens.device)
    number, *of = pair(*count)
    shared = plain(0 if parents.shape[0] == 1 else parents.stride(0))
    strides = *tokens.stride(), shared, parents.stride(1)
    return dict(
        p=p,
        q=q,
        p_numbers=p_numbers,
        q_numbers=q_numbers,
        tree=Tree(tokens, parents, records, *strides, *of),
        draws=draws,
        outputs=outputs,
        T=T,
        W=max_depth + 1,
        max_depth=max_depth,
        count=number,
        seed=seed,
        offset=offset,
        positions=positions,
        BLOCK_C=power_of_two(p.C if q is None else max(p.C, q.C)),
        BLOCK_T=max(64, power_of_two(T)),
    )


def walk_arguments(
    shared: dict[str, Any], rule: str, threshold_single: float, threshold_acc: float
) -> dict[str, Any]:
    """The kernel's arguments, less its table entry. It keeps chunks' numbers to itself."""
    p, q = shared["p"], shared["q"]
    return dict(
        shared,
        p=p._replace(stats=None, floors=None),
        q=None if q is None else q._replace(stats=None, floors=None),
        threshold_single=float(threshold_single),
        threshold_acc=float(threshold_acc),
        RULE=rule,
    )


def walk_key(arch: str, arguments: dict[str, Any]) -> tuple[str, ...]:
    """k_seq over a reduced vocabulary tries fewer points at once, for its registers."""
    q = arguments["q"]
    few = arguments["RULE"] == "k_seq" and q.vocab is not None
    return ("walk", "amd" if arch == "gfx942" else "nvidia", *(["k_seq", "reduced"] * few))


def leaf_first_key(arch: str) -> tuple[str, ...]:
    return ("leaf_first", "amd" if arch == "gfx942" else "nvidia")


def leaf_first_arguments(shared: dict[str, Any], rows: Tensor, rule: str) -> dict[str, Any]:
    p, q = shared["p"], shared["q"]
    return dict(
        shared,
        p=p._replace(search=None),
        q=q._replace(search=None),
        rows=rows,
        WITHOUT=rule == "traversal_without_replacement",
        ROUNDS=shared["BLOCK_T"].bit_length() - 1,
    )


def example(
    rule: str, dtype: torch.dtype, target: dict[str, bool], draft: dict[str, bool], T: int = 64
) -> tuple[dict[str, Any], Tensor]:
    """What ``shared_arguments`` makes of a call, on no device, and scratch of ``leaf_first``."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, W, int64 = 8, 9, torch.int64
    p, p_numbers = law_prepare.example(dtype, **target)
    q, q_numbers = law_prepare.example(dtype, **draft)
    outputs = Outputs(
        empty(B, W, dtype=int64),
        empty(B, dtype=torch.int32),
        empty(B, W, dtype=torch.int32),
        empty(B, W) if "filtered" in target else None,
    )
    uniforms = empty(B, T + 1) if "index" in target else None
    seeds = empty(B, dtype=int64)
    shared = shared_arguments(
        p,
        None if rule in ("delta", "target_only") else q,
        p_numbers,
        q_numbers,
        empty(B, T, dtype=int64),
        empty(1, T, dtype=int64),
        (T - 1, None),
        draws_of(seeds, None, seeds, uniforms),
        outputs,
        *(W - 1, 0, 0, 0),
    )
    return shared, empty(B, 2, T, int(NUMBERS))


PLAIN: dict[str, bool] = {}
FILTERED = dict(filtered=True, index=True)
ALL = dict(FILTERED, allowed=True)
REDUCED = dict(reduced=True, filtered=True)
WIDE = dict(wide=True, filtered=True)
STATIC: tuple[tuple[str, torch.dtype, dict[str, bool], dict[str, bool]], ...] = (
    ("recursive", torch.bfloat16, PLAIN, PLAIN),
    ("recursive", torch.float32, ALL, FILTERED),
    ("recursive", torch.float16, dict(odd=True), dict(odd=True)),
    ("recursive", torch.bfloat16, WIDE, WIDE),
    ("without_replacement", torch.bfloat16, ALL, FILTERED),
    ("without_replacement", torch.float32, dict(probs=True), dict(probs=True, reduced=True)),
    ("without_replacement", torch.bfloat16, PLAIN, REDUCED),
    ("k_seq", torch.bfloat16, PLAIN, PLAIN),
    ("k_seq", torch.float32, ALL, FILTERED),
    ("k_seq", torch.bfloat16, PLAIN, REDUCED),
    ("delta", torch.bfloat16, PLAIN, PLAIN),
    ("delta", torch.float32, ALL, PLAIN),
    ("target_only", torch.float16, ALL, PLAIN),
    ("target_only", torch.float32, dict(probs=True), PLAIN),
    ("traversal", torch.bfloat16, PLAIN, PLAIN),
    ("traversal", torch.float32, ALL, FILTERED),
    ("traversal", torch.bfloat16, WIDE, WIDE),
    ("traversal_without_replacement", torch.float16, dict(odd=True), dict(odd=True)),
    ("traversal_without_replacement", torch.float32, ALL, dict(probs=True)),
    ("traversal_without_replacement", torch.bfloat16, PLAIN, REDUCED),
)


def static_calls(arch: str) -> Iterator[StaticCall]:
    for rule, dtype, target, draft in STATIC:
        shared, rows = example(rule, dtype, target, draft)
        note = f"{rule}: {describe(dtype, target)}" + " reduced" * ("reduced" in draft)
        aligned = not target.get("odd", False)
        more: dict[str, Any] = dict(streamed=CHUNK * dtype.itemsize, aligned=aligned, note=note)
        if rule.startswith("traversal"):
            given = leaf_first_arguments(shared, rows, rule)
            yield StaticCall(leaf_first_kernel, leaf_first_key(arch), given, dtype, **more)
        else:
            for law in ("p", "q"):
                shared[law] = searched(shared[law], shared[law + "_numbers"], 8, arch)
            given = walk_arguments(shared, rule, 1.0, 1.0)
            yield StaticCall(walk, walk_key(arch, given), given, dtype, **more)
