"""Verification of drafted chains by rejection sampling, in two launches.

The first reads all rows that may be walked, once (``law_prepare``; one more for filters). The block
rule then needs sum relu(pi_i p_i - q_i) of every row, which is a read of its own. The last decides,
and reads the one row pair again from which the correction is drawn (``chain_kernels``).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .chain_kernels import Chains, Outputs, block_sums, decide
from .devices import architecture, on_device_of, table_of
from .draws import draws_of
from .law_arguments import LawRows, Numbers, is_filtered, law_rows, numbers_of
from .law_prepare import CHUNK, example, prepare
from .numerics import power_of_two
from .static_call import StaticCall
from .vocabulary import chunks_a_program

CONFIGURATIONS = configurations.load("rejection_sample")
PROGRAMS = 264  # two for each processor of the largest chips


def rejection_sample(
    target_logits: Tensor | None,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
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
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: int,
    positions_tensor: Tensor | None,
    uniforms: Tensor | None,
    return_logprobs: bool,
    return_num_passed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """draft_tokens [B, G] -> tokens [B, G+1], num_accepted [B], path [B, G+1], logprobs,
    num_passed [B]."""
    B, G = draft_tokens.shape
    device = draft_tokens.device
    outputs = Outputs(
        torch.empty((B, G + 1), dtype=torch.int64, device=device),
        torch.empty((B,), dtype=torch.int32, device=device),
        torch.empty((B, G + 1), dtype=torch.int32, device=device),
        torch.empty((B, G + 1), dtype=torch.float32, device=device) if return_logprobs else None,
        torch.empty((B,), dtype=torch.int32, device=device) if return_num_passed else None,
    )
    if B:
        kept = (top_k, top_k_tensor), (top_p, top_p_tensor), (min_p, min_p_tensor)
        numbers = numbers_of((temperature, temperature_tensor), *kept)
        target = law_rows(
            *(target_logits, target_probs, row_index, allowed, B, G + 1, is_filtered(numbers))
        )
        draft = draft_numbers = None
        if draft_logits is not None or draft_probs is not None:
            if not filter_draft:
                kept = (0, None), (1.0, None), (0.0, None)
            draft_numbers = numbers_of((draft_temperature, draft_temperature_tensor), *kept)
            draft = law_rows(
                *(draft_logits, draft_probs, draft_row_index, None, B, G),
                *(is_filtered(draft_numbers), draft_vocab, target.V),
            )
        with on_device_of(draft_tokens):
            decide_chains(
                *(target, numbers, draft, draft_numbers, draft_tokens, outputs, rule == "block"),
                *(num_drafts, num_drafts_tensor),
                draws_of(seed_tensor, offset_tensor, positions_tensor, uniforms),
                *(seed, offset, positions),
            )
    tokens, num_accepted, path, logprobs, num_passed = outputs
    if logprobs is None:
        logprobs = torch.empty(0, dtype=torch.float32, device=device)
    if num_passed is None:
        num_passed = num_accepted.new_empty(0)
    return tokens, num_accepted, path, logprobs, num_passed


def decide_chains(
    target: LawRows,
    numbers: Numbers,
    draft: LawRows | None,
    draft_numbers: Numbers | None,
    draft_tokens: Tensor,
    outputs: Outputs,
    by_block: bool,
    count: int,
    count_of: Tensor | None,
    draws: Any,
    seed: int,
    offset: int,
    positions: int,
) -> None:
    B, G = draft_tokens.shape
    arch = architecture(draft_tokens)
    arrivals = torch.empty(B, dtype=torch.int32, device=draft_tokens.device)
    prepare(*(target, numbers, B, (count, count_of), 1, draft, draft_numbers, 0), arrivals=arrivals)
    chains = chains_of(draft_tokens, count_of, draft is not None, by_block)
    laws: dict[str, Any] = dict(
        target=target, numbers=numbers, draft=draft, draft_numbers=draft_numbers, chains=chains,
        count=count, BLOCK_C=power_of_two(target.C),
        DRAFT_BLOCK_C=1 if draft is None else power_of_two(draft.C),
    )  # fmt: skip
    sums = None
    if by_block and draft is not None and G:
        sums = torch.empty((B, G, target.C), dtype=torch.float32, device=draft_tokens.device)
        per = chunks_a_program(B * G, target.C)
        launch(
            block_sums,
            (B * G, -(-target.C // per)),
            **laws,
            sums=sums,
            per=per,
            **CONFIGURATIONS[("sums", arch)],
        )
    masses = torch.empty((B, 2, target.C), dtype=torch.float32, device=draft_tokens.device)
    parts = max(1, min(target.C, PROGRAMS // B))
    launch(
        decide, (B * parts,),
        **laws, draws=draws, outputs=outputs, sums=sums, masses=masses, arrivals=arrivals,
        seed=seed, offset=offset, positions=positions, parts=parts,
        **CONFIGURATIONS[("decide", arch)],
    )  # fmt: skip


def chains_of(
    draft_tokens: Tensor, count_of: Tensor | None, sampled: bool, by_block: bool
) -> Chains:
    G = draft_tokens.shape[1]
    return Chains(
        draft_tokens,
        *draft_tokens.stride(),
        G,
        count_of,
        0 if count_of is None or count_of.dim() == 0 else count_of.stride(0),
        tl.constexpr(power_of_two(G + 1)),
        tl.constexpr(sampled),
        tl.constexpr(sampled and by_block and G > 0),
    )


STATIC: tuple[tuple[torch.dtype, dict[str, bool], dict[str, bool], bool], ...] = (
    # (dtype, the target's options, the draft's, the block rule): see ``law_prepare.example``
    (torch.bfloat16, dict(), dict(), False),
    (torch.bfloat16, dict(filtered=True, allowed=True, index=True), dict(filtered=True), True),
    (torch.float16, dict(filtered=True), dict(reduced=True), True),
    (torch.float32, dict(), dict(probs=True, index=True), False),
    (torch.float32, dict(probs=True, allowed=True), dict(probs=True, reduced=True), True),
    (torch.bfloat16, dict(odd=True), dict(odd=True), True),
    (torch.bfloat16, dict(wide=True, filtered=True), dict(wide=True), True),
)


def static_calls(arch: str) -> Iterator[StaticCall]:
    B, G = 8, 4
    tokens = torch.empty(B, G, dtype=torch.int64, device="meta")
    count = torch.empty(B, dtype=torch.int32, device="meta")
    seeds = torch.empty(B, dtype=torch.int64, device="meta")
    uniforms = torch.empty(B, G + 1, device="meta")

    def wide(size: int) -> torch.Tensor:
        return torch.empty(B, G + 1, dtype=(torch.int64, torch.int32)[size == 4], device="meta")

    for dtype, options, drafted, by_block in STATIC:
        target, numbers = example(dtype, **options)
        draft, draft_numbers = example(dtype, **drafted)
        plain = not options and not drafted
        outputs = Outputs(
            wide(8), count, wide(4), None if plain else uniforms, None if plain else count
        )
        laws: dict[str, Any] = dict(
            target=target, numbers=numbers, draft=draft, draft_numbers=draft_numbers,
            chains=chains_of(tokens, None if plain else count, True, by_block), count=4,
            BLOCK_C=power_of_two(target.C), DRAFT_BLOCK_C=power_of_two(draft.C),
        )  # fmt: skip
        note = " ".join([str(dtype).removeprefix("torch."), *options, "draft", *drafted])
        rows: dict[str, Any] = dict(
            streamed=CHUNK * dtype.itemsize, aligned="odd" not in options, note=note
        )
        sums = target.stats if by_block else None
        if by_block:
            given = dict(laws, sums=sums, per=2)
            yield StaticCall(block_sums, ("sums", table_of(arch)), given, dtype, **rows)
        draws = draws_of(None if plain else seeds, None, None, uniforms if by_block else None)
        given = dict(
            laws, draws=draws, outputs=outputs, sums=sums, masses=target.stats, arrivals=count,
            seed=7, offset=0, positions=99, parts=8,
        )  # fmt: skip
        yield StaticCall(decide, ("decide", table_of(arch)), given, dtype, **rows)
    target, numbers = example(torch.bfloat16)
    given = dict(
        target=target, numbers=numbers, draft=None, draft_numbers=None,
        chains=chains_of(tokens, None, False, False), draws=draws_of(None, None, None, None),
        outputs=Outputs(wide(8), count, wide(4), None, None), sums=None, masses=target.stats,
        arrivals=count, count=4, seed=7, offset=0, positions=99, parts=8,
        BLOCK_C=power_of_two(target.C), DRAFT_BLOCK_C=1,
    )  # fmt: skip
    yield StaticCall(
        decide,
        ("decide", table_of(arch)),
        given,
        torch.bfloat16,
        streamed=2 * CHUNK,
        note="bfloat16 deltas",
    )
