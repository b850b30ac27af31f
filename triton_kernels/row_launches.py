"""How the row ops launch: options from the schema's arguments, and the first launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..replay import launch
from .devices import architecture
from .law_arguments import Numbers, is_filtered, numbers_of
from .numerics import power_of_two
from .row_chunks import CHUNK, CONFIGURATIONS, FIELDS, row_chunks
from .row_decision import CONFIDENCES, SAMPLERS
from .row_supports import row_supports
from .rows import Changes, Keys, Place, Rows, changes_of, keys_of, per_request
from .supports import Scratch, chunks_to_narrow, scratch_of
from .vocabulary import chunks_a_program


class RowCall(NamedTuple):
    """All that both launches of a call share."""

    rows: Rows
    place: Place
    changes: Changes
    numbers: Numbers
    keys: Keys
    stats: Tensor
    search: Scratch | None  # of the filters
    chunk_options: dict[str, Any]  # of ``row_chunks``
    options: dict[str, Any]  # of the second launch
    key: str  # of its configuration


def row_call(
    rows: Rows,
    place: Place,
    count: int,
    temperature: float,
    temperature_tensor: Tensor | None,
    top_k: int,
    top_k_tensor: Tensor | None,
    top_p: float,
    top_p_tensor: Tensor | None,
    min_p: float,
    min_p_tensor: Tensor | None,
    filter_order: str,
    confidence: str,
    tempered: bool,
    exclude_ids: list[int],
    exclude_ids_tensor: Tensor | None,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    sampler: str,
    seed: int,
    seed_tensor: Tensor | None,
    offset: int,
    offset_tensor: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
    *,
    probs: bool = False,
    extra: int = 0,
) -> RowCall:
    """From the schema's sampling arguments; ``count`` results, ``extra`` more words of scratch."""
    device = rows.x.device
    numbers = numbers_of(
        (temperature, temperature_tensor),
        (top_k, top_k_tensor),
        (top_p, top_p_tensor),
        (min_p, min_p_tensor),
    )
    fixed = temperature_tensor is None
    if fixed and temperature == 0:
        sampler = "greedy"
    filtered = is_filtered(numbers) and (sampler != "greedy" or tempered)
    plain = fixed and temperature in (0.0, 1.0)
    has_tempered = not plain and (sampler == "inverse_cdf" or tempered or filtered)
    common = dict(HAS_TEMPERED=has_tempered, PER_REQUEST=per_request(seed_tensor))
    return RowCall(
        rows,
        place,
        changes_of(exclude_ids, exclude_ids_tensor, bias_ids, bias, allowed, probs, rows.V, device),
        numbers,
        keys_of(seed, seed_tensor, offset, offset_tensor, positions, uniforms),
        torch.empty(count * FIELDS.value * rows.C + extra, dtype=torch.float32, device=device),
        scratch_of(count, rows.C, device, tokens=sampler == "gumbel") if filtered else None,
        dict(
            common,
            HAS_SECOND=confidence == "margin",
            HAS_ENERGY=confidence == "neg_entropy" and not (tempered and filtered),
            ENERGY_TEMPERED=tempered and has_tempered,
            HAS_NOISE=sampler == "gumbel" and not filtered,
        ),
        dict(
            common,
            SAMPLER=SAMPLERS[sampler],
            CONFIDENCE=CONFIDENCES[confidence],
            TEMPERED=tempered,
            FILTERED=filtered,
            JOINT=filter_order == "joint",
            BLOCK_C=power_of_two(rows.C),
        ),
        "filtered" if filtered else "greedy" if sampler == "greedy" else "sampled",
    )


def launch_chunks(call: RowCall, count: int, finished: Tensor | None) -> None:
    """All that comes before the decisions: one launch, two with filters."""
    per = chunks_a_program(count, call.rows.C)
    launch(
        row_chunks,
        (count, -(-call.rows.C // per)),
        **chunk_arguments(call, finished, per),
        **CONFIGURATIONS[("chunks", architecture(call.rows.x))],
    )
    if call.search is not None:
        per = chunks_to_narrow(count, call.rows.C)
        launch(
            row_supports,
            (count, -(-call.rows.C // per)),
            **support_arguments(call, per),
            **CONFIGURATIONS[("supports", architecture(call.rows.x))],
        )


def chunk_arguments(call: RowCall, finished: Tensor | None, per: int) -> dict[str, Any]:
    return dict(
        rows=call.rows,
        place=call.place,
        changes=call.changes,
        numbers=call.numbers,
        keys=call.keys,
        stats=call.stats,
        search=call.search,
        finished=finished,
        per=per,
        HAS_SEARCH=call.search is not None,
        **call.chunk_options,
    )


def support_arguments(call: RowCall, per: int) -> dict[str, Any]:
    names = ("TEMPERED", "JOINT", "HAS_TEMPERED", "BLOCK_C")
    noise = call.options["SAMPLER"] == SAMPLERS["gumbel"]
    entropy = call.options["CONFIDENCE"] == CONFIDENCES["neg_entropy"]
    return dict(
        rows=call.rows,
        place=call.place,
        changes=call.changes,
        numbers=call.numbers,
        keys=call.keys if noise else None,
        stats=call.stats,
        search=call.search,
        per=per,
        HAS_NOISE=noise,
        HAS_ENERGY=entropy and call.options["TEMPERED"],
        PER_REQUEST=noise and call.options["PER_REQUEST"],
        **{name: call.options[name] for name in names},
    )


def rows_of(x: Tensor) -> Rows:
    """Of logits [B, R, V], or [n, V]."""
    V = x.shape[-1]
    stride_b = x.stride(0) if x.dim() == 3 else 0
    return Rows(x, stride_b, x.stride(-2), V, -(-V // CHUNK))
