"""Soft embeddings: one read of the logits, and a product that reads the embeddings of what has
mass and no others. With top-p a launch between them finds the thresholds.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .devices import architecture, on_device_of, table_of
from .numerics import LN2, LOG2E, power_of_two, rounded
from .row_chunks import FIELDS
from .row_decision import chunk_sums, merged_energy
from .row_launches import RowCall, launch_chunks, row_call, rows_of
from .rows import Place, as_rows, locate, row_at, stride0
from .sample_and_score import NOTHING_MASKED
from .static_call import StaticCall
from .supports import FLOOR, MASS, row_scratch, surviving
from .vocabulary import (
    INFINITY,
    as_scalar,
    chunk_numbers,
    load_chunk,
    number,
    plain,
    row_of,
)

CONFIGURATIONS = configurations.load("soft_embed")


@triton.jit(do_not_specialize=["place", "stride_ratio", "log_V", "mask_id"])
def mix(
    rows,
    place,
    stats,
    search,
    embedding,
    stride_v,
    E,
    mask_id,
    ratio,
    ratio_of,
    stride_ratio,
    log_V,
    out,
    entropies,
    HAS_SEARCH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Row program_id(0), embedding dims [program_id(1) BLOCK_E, + BLOCK_E)."""
    r = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    b, _i, _inside, line, _read = locate(rows, place, r)
    row = row_at(rows, place, b, line)
    own = stats + r.to(tl.int64) * FIELDS * rows.C
    top, Z, _best = row_of(own, LOG2E, rows.C, BLOCK_C)
    tops, _, _ = chunk_numbers(own, rows.C, float("-inf"), BLOCK_C)
    energy = merged_energy(
        own, tops, chunk_sums(own, rows.C, False, BLOCK_C), top, LOG2E, rows.C, BLOCK_C
    )
    good = top > -INFINITY
    entropy = tl.where(good, tl.log(Z) - energy * LN2 / Z, float("nan"))
    if tl.program_id(1) == 0:
        tl.store(entropies + r, entropy)

    # how much of the expected embedding goes in
    sure = tl.full([], 1.0, tl.float32)
    if rows.V > 1:
        sure = 1.0 - entropy / log_V
    a = as_scalar(number(ratio, ratio_of, stride_ratio, b), tl.float32) * sure
    a = tl.where(good, a, 0.0)
    mask = e < E
    mask_row = embedding + as_scalar(mask_id, tl.int64) * stride_v
    kept = tl.load(mask_row + e, mask=mask, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_E], tl.float32)
    if a != 0:
        floor, mass = tl.full([], float("-inf"), tl.float32), Z
        if HAS_SEARCH:
            header = row_scratch(search, r).to(tl.pointer_type(tl.float32))
            floor, mass = tl.load(header + FLOOR), tl.load(header + MASS)
        TILES: tl.constexpr = CHUNK // BLOCK_V
        o_tile, o_v = tl.arange(0, TILES), tl.arange(0, BLOCK_V)
        for c in range(rows.C):
            start = c * CHUNK
            if tl.load(own + c) >= floor:
                x = load_chunk(row, start, rows.V, float("-inf"), CHUNK)
                w = tl.reshape(surviving(x, top, LOG2E, floor, 0.0), [TILES, BLOCK_V])
                heaviest = tl.max(w, 1)
                for t in range(tl.minimum(TILES, tl.cdiv(rows.V - start, BLOCK_V))):
                    if tl.max(tl.where(o_tile == t, heaviest, 0.0), 0) > 0:
                        v = start + t * BLOCK_V + o_v
                        x_v = tl.load(row + v, mask=v < rows.V, other=float("-inf"))
                        w_v = surviving(x_v.to(tl.float32), top, LOG2E, floor, 0.0)
                        at = v.to(tl.int64)[:, None] * stride_v + e[None, :]
                        # rows without mass are not read: they may be anything
                        m_at = (w_v > 0)[:, None] & mask[None, :]
                        b_e = tl.load(embedding + at, mask=m_at, other=0.0).to(tl.float32)
                        acc += tl.sum(w_v[:, None] * b_e, 0)
        acc = (1.0 - a) * kept + a * (acc / mass)
    else:
        acc = kept
    result = rounded(acc, out.dtype.element_ty)
    tl.store(out + r.to(tl.int64) * E + e, result, mask=mask)


def soft_embed(
    logits: Tensor,
    embedding: Tensor,
    mask_id: int,
    top_p: float,
    top_p_tensor: Tensor | None,
    ratio: float,
    ratio_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """logits [..., V], embedding [V, E] -> embeddings [..., E], entropy [...]."""
    shape, E = logits.shape[:-1], embedding.shape[1]
    if E > 1 and embedding.stride(1) != 1:
        embedding = embedding.contiguous()
    out = torch.empty((*shape, E), dtype=embedding.dtype, device=logits.device)
    entropy = torch.empty(shape, dtype=torch.float32, device=logits.device)
    count = entropy.numel()
    if count == 0:
        return out, entropy
    call, arch = embed_call(logits, count, top_p, top_p_tensor), architecture(logits)
    with on_device_of(logits):
        launch_chunks(call, count, None)
        entry = CONFIGURATIONS[("mix", arch)]
        launch(
            mix,
            (count, max(1, -(-E // entry["BLOCK_E"]))),
            **mix_arguments(call, embedding, mask_id, ratio, ratio_tensor, out, entropy),
            **entry,
        )
    return out, entropy


def embed_call(logits: Tensor, count: int, top_p: float, top_p_tensor: Tensor | None) -> RowCall:
    """Temperature 1, the whole law's entropy."""
    x = as_rows(logits)
    place = Place(plain(x.shape[1]), plain(x.shape[1]), None, 0, 0, *NOTHING_MASKED)
    filters = (1.0, None, 0, None, top_p, top_p_tensor, 0.0, None)
    rest = ([], None, None, None, None, "inverse_cdf", 0, None, 0, None, None, None)
    return row_call(rows_of(x), place, count, *filters, "top_k_first", "neg_entropy", False, *rest)


def mix_arguments(
    call: RowCall,
    embedding: Tensor,
    mask_id: int,
    ratio: float,
    ratio_tensor: Tensor | None,
    out: Tensor,
    entropy: Tensor,
) -> dict[str, Any]:
    return dict(
        rows=call.rows,
        place=call.place,
        stats=call.stats,
        search=call.search,
        embedding=embedding,
        stride_v=embedding.stride(0),
        E=embedding.shape[1],
        mask_id=mask_id,
        ratio=float(ratio),
        ratio_of=ratio_tensor,
        stride_ratio=stride0(ratio_tensor),
        log_V=math.log(call.rows.V),
        out=out,
        entropies=entropy,
        HAS_SEARCH=call.search is not None,
        BLOCK_C=power_of_two(call.rows.C),
    )


def static_calls(arch: str) -> Iterator[StaticCall]:
    def calls(dtype: torch.dtype, table: torch.dtype, odd: int = 0) -> Iterator[StaticCall]:
        meta: Any = dict(device="meta")
        logits = torch.empty(8, 32, 128256 + odd, dtype=dtype, **meta)[..., :128256]
        embedding = torch.empty(128256, 4096 + odd, dtype=table, **meta)[:, :4096]
        out = torch.empty(8, 32, 4096, dtype=table, **meta)
        entropy = torch.empty(8, 32, **meta)
        note = f"{dtype} {table}".replace("torch.", "") + " odd stride" * odd
        for top_p in (0.9, 1.0):
            call = embed_call(logits, 256, top_p, None)
            given = mix_arguments(call, embedding, 5, 0.5, None, out, entropy)
            entry = CONFIGURATIONS[("mix", table_of(arch))]
            bytes_ = entry["BLOCK_V"] * entry["BLOCK_E"] * table.itemsize
            yield StaticCall(
                mix,
                ("mix", table_of(arch)),
                given,
                table,
                streamed=bytes_,
                aligned=not odd,
                note=note,
            )

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from calls(dtype, dtype)
    yield from calls(torch.float32, torch.bfloat16)
    yield from calls(torch.bfloat16, torch.bfloat16, odd=1)
