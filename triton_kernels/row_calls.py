"""Launches of the row kernels for the static report, as ``sample_and_score`` and ``unmask`` make
them; ``soft_embed`` launches the first of them too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .commit import empty_results, results_of, window_place
from .commit_orders import NAMES
from .commit_rules import rule_of
from .devices import table_of
from .row_chunks import CHUNK, CONFIGURATIONS, row_chunks
from .row_launches import RowCall, chunk_arguments, support_arguments
from .row_supports import row_supports
from .sample_and_score import call_of, choice_arguments, row_choices
from .soft_embed import embed_call
from .static_call import StaticCall
from .unmask import lines_of, unmask_arguments, unmask_call, unmask_rows

B, L, V = 8, 32, 128256
META = torch.device("meta")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
__all__ = [
    "CONFIGURATIONS",
    "row_choices",
    "row_chunks",
    "row_supports",
    "static_calls",
    "unmask_rows",
]


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def sampling(**given: Any) -> list[Any]:
    """The schema's sampling arguments; ``given`` by name."""
    usual: dict[str, Any] = dict(
        temperature=0.0, temperature_tensor=None, top_k=0, top_k_tensor=None, top_p=1.0,
        top_p_tensor=None, min_p=0.0, min_p_tensor=None, filter_order="top_k_first",
        confidence="probability", tempered=False, exclude_ids=[], exclude_ids_tensor=None,
        bias_ids=None, bias=None, allowed=None, sampler="inverse_cdf", seed=0,
        seed_tensor=empty(B, dtype=torch.int64), offset=0, offset_tensor=None, positions=None,
        uniforms=None,
    )  # fmt: skip
    return list((usual | given).values())


def examples() -> dict[str, dict[str, Any]]:
    """What engines ask for, and what is hardest to compile."""
    each = dict(temperature_tensor=empty(B))
    filters = dict(top_k=50, top_p_tensor=empty(B), min_p=0.05)
    bias = dict(bias_ids=empty(B, L, 5, dtype=torch.int32), bias=empty(B, L, 5))
    bits = dict(allowed=empty(B, L, V // 32, dtype=torch.int32))
    return {
        "greedy": {},
        "entropy": dict(confidence="neg_entropy"),
        "sampled": dict(each, confidence="margin"),
        "tempered": dict(each, **bits, confidence="neg_entropy", tempered=True, exclude_ids=[3]),
        "gumbel": dict(temperature=0.5, sampler="gumbel", **bias),
        "filtered": dict(each, **filters, confidence="neg_entropy", tempered=True),
        "filtered gumbel": dict(each, **filters, sampler="gumbel", filter_order="joint"),
        "filtered gumbel entropy": dict(
            each, **filters, **bias, sampler="gumbel", confidence="neg_entropy", tempered=True
        ),
    }


def static_calls(arch: str) -> Iterator[StaticCall]:
    for call in any_calls():
        yield call._replace(configuration=(*call.configuration, table_of(arch)))


def any_calls() -> Iterator[StaticCall]:
    """As on any architecture; which one, the configuration has still to say."""
    for name, given in examples().items():
        for dtype in (BF16, FP32):
            yield from sample_calls(dtype, name, given)
    yield from sample_calls(FP16, "greedy", {})
    yield from sample_calls(BF16, "probabilities", dict(temperature=1.0), probs=True)
    index = empty(B, L, dtype=torch.int32)
    yield from sample_calls(BF16, "packed", {}, row_index=index)
    yield from sample_calls(BF16, "odd stride", dict(temperature=1.0), odd=True)
    for name in ("sampled", "filtered gumbel entropy"):
        yield from sample_calls(BF16, name + " wide", examples()[name], vocab=262144)
    for dtype, top_p in ((BF16, 0.9), (BF16, 1.0), (FP32, 0.9), (FP32, 1.0)):
        call = embed_call(empty(B, L, V, dtype=dtype), B * L, top_p, None)
        note = f"{str(dtype).removeprefix('torch.')} soft_embed top_p={top_p}"
        yield from reads(call, dtype, None, note)
    options = list(examples().values())
    for number, rule in enumerate(NAMES):
        yield from unmask_static(BF16, rule, options[number % len(options)])
    yield from unmask_static(FP32, "threshold", {})
    yield from unmask_static(FP32, "factor", options[-1])


def sample_calls(
    dtype: torch.dtype,
    name: str,
    given: dict[str, Any],
    *,
    row_index: Tensor | None = None,
    probs: bool = False,
    odd: bool = False,
    vocab: int = V,
) -> Iterator[StaticCall]:
    shape = (B * L,) if row_index is not None else (B, L)
    logits = empty(*shape, vocab + odd, dtype=dtype)[..., :vocab]
    call = call_of(logits, row_index, probs, B * L, *sampling(**given))
    note = f"{str(dtype).removeprefix('torch.')} {name}"
    yield from reads(call, dtype, None, note, odd)
    results = empty(B, L, dtype=torch.int64), empty(B, L), empty(B, L)
    yield StaticCall(
        row_choices,
        ("choose", call.key),
        choice_arguments(call, *results),
        dtype,
        streamed=reread(call, dtype),
        aligned=not odd,
        note=note,
    )


def reads(
    call: RowCall, dtype: torch.dtype, finished: Tensor | None, note: str, odd: bool = False
) -> Iterator[StaticCall]:
    """All that comes before the decisions."""
    more: dict[str, Any] = dict(streamed=CHUNK * dtype.itemsize, aligned=not odd, note=note)
    yield StaticCall(row_chunks, ("chunks",), chunk_arguments(call, finished, 1), dtype, **more)
    if call.search is not None:
        yield StaticCall(row_supports, ("supports",), support_arguments(call, 1), dtype, **more)


def reread(call: RowCall, dtype: torch.dtype) -> int:
    """Bytes of the chunk that a drawn token lies in, or of one that keeps something of a row whose
    brackets do not hold its floor; nothing is read of the others."""
    energy = call.options["CONFIDENCE"] == 2 and call.options["TEMPERED"]
    again = call.key == "filtered" and (energy or call.options["SAMPLER"] == 2)
    return CHUNK * dtype.itemsize if call.options["SAMPLER"] == 1 or again else 0


def unmask_static(dtype: torch.dtype, rule: str, given: dict[str, Any]) -> Iterator[StaticCall]:
    made = empty_results(B, L, META)
    lines = lines_of(L, L, L, 1)
    place = window_place(made[0], None, 5, 0, None, L, L, lines)
    call = unmask_call(empty(B, L, V, dtype=dtype), place, B * L, 126336, rule, *sampling(**given))
    numbers = (1, None, 0.9, None, 0.0, None, 1.0, None, 0.4, None, 0.0, None, False, 1, -1)
    external = empty(B, L) if rule == "external" else None
    number_of, options = rule_of(rule, *numbers, external=external, coins=None)
    results = results_of(*made, empty(B, L, dtype=torch.int64), rule)
    finished = empty(B, dtype=torch.int32)
    note = f"{str(dtype).removeprefix('torch.')} {rule}"
    yield from reads(call, dtype, finished, note)
    yield StaticCall(
        unmask_rows,
        ("unmask", call.key),
        unmask_arguments(call, finished, number_of, results, options, False),
        dtype,
        streamed=reread(call, dtype),
        note=note,
    )
