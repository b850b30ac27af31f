"""The launcher of the decode kernel: schema-level arguments in, fresh results out."""

from collections.abc import Hashable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..replay import launch
from .decode_combine import clear, combine
from .decode_kernel import decode
from .decode_plan import CONFIGURATIONS, Pair, Plan, make_plan
from .devices import architecture, on_device_of
from .layouts import dense
from .static_call import StaticCall

_plans: dict[Hashable, Plan] = {}
MOST_PLANS = 4096  # a dense cache that grows makes a plan a step


def decode_attention(
    q: Tensor,  # [B, N, Hq, D], [B, K, L, Hq, D] or packed [total, Hq, D]
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    causal: Pair,
    length: Pair,
    hole: Pair,
    first: Pair,
    branches: Pair,
    block_table: Tensor | None,
    count: Pair,
    positions: Tensor | None,
    softmax_scale: float,
    softcap: float,
    window_size: int,
    sinks: Tensor | None,
    k_scale: Pair,
    v_scale: Pair,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    return_lse: bool,
    block: bool,
) -> tuple[Tensor, Tensor]:
    """One launch, or two with splits or a packed batch. ``block``: hole and first count (and
    branches, for 5-d q)."""
    spans = q.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()
    if k is not None and v is not None:
        spans |= k.data_ptr() | v.data_ptr()
    at = (
        spans % 16, q.shape, q.stride(), q.dtype, q.get_device(), k_cache.shape, k_cache.stride(),
        k_cache.dtype, v_cache.shape, v_cache.stride(), v_cache.dtype,
        None if k is None else k.stride(), None if v is None else v.stride(),
        None if mask is None else (mask.shape, mask.stride()),
        None if positions is None else (positions.shape, positions.stride()),
        None if block_table is None else (block_table.shape, block_table.stride()),
        None if cu_seqlens_q is None else (cu_seqlens_q.shape, cu_seqlens_q.stride()),
        causal[0], None if causal[1] is None else causal[1].stride(),
        None if length[1] is None else length[1].stride(),
        None if hole[1] is None else hole[1].stride(),
        None if first[1] is None else first[1].stride(),
        None if count[1] is None else count[1].stride(),
        None if branches[1] is None else branches[1].stride(),
        None if k_scale[1] is None else k_scale[1].stride(),
        None if v_scale[1] is None else v_scale[1].stride(),
        softmax_scale, softcap, window_size, max_seqlen_q, return_lse, block,
    )  # fmt: skip
    plan = _plans.get(at)
    if plan is None or CONFIGURATIONS[plan.key] is not plan.entry:  # tuning changes entries
        given = mask, block_table, cu_seqlens_q
        mask, block_table, cu_seqlens_q = map(dense, given)
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        rows = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
        if batch * rows * q.numel() * v_cache.shape[3] == 0:
            return nothing(q, v_cache.shape[3], return_lse)
        plan = make_plan(
            q, k_cache, v_cache, k, v, mask, positions, block_table, cu_seqlens_q, causal,
            (length, hole, first, count, branches), k_scale, v_scale, softmax_scale, softcap,
            window_size, max_seqlen_q, return_lse, block, architecture(q),
        )  # fmt: skip
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        if all(a is b for a, b in zip(given, (mask, block_table, cu_seqlens_q))):
            _plans[at] = plan
    return run(
        plan, q, k_cache, v_cache, k, v, mask, positions, block_table, sinks, cu_seqlens_q,
        causal, length, hole, first, count, branches, k_scale, v_scale,
    )  # fmt: skip


def nothing(q: Tensor, Dv: int, return_lse: bool) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if return_lse else (0,)
    empty = q.new_full(shape, -torch.inf, dtype=torch.float32)
    return q.new_zeros((*q.shape[:-1], Dv)), empty


def run(
    plan: Plan, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    mask: Tensor | None, positions: Tensor | None, block_table: Tensor | None,
    sinks: Tensor | None, cu_seqlens_q: Tensor | None, causal: Pair, length: Pair, hole: Pair,
    first: Pair, count: Pair, branches: Pair, k_scale: Pair, v_scale: Pair,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    device = q.device
    out = torch.empty(plan.shape, dtype=plan.dtype, device=device)
    lse = part_out = part_lse = None
    if plan.lse_shape is not None:
        lse = torch.empty(plan.lse_shape, dtype=torch.float32, device=device)
    if plan.parts:
        part_out = torch.empty(plan.parts * plan.S.DV, dtype=torch.float32, device=device)
        part_lse = torch.empty(plan.parts, dtype=torch.float32, device=device)
    pointers = decode_pointers(
        plan, q, k_cache, v_cache, k, v, out, lse, part_out, part_lse, mask, positions,
        block_table, sinks, cu_seqlens_q, causal, length, hole, first, count, branches, k_scale,
        v_scale,
    )  # fmt: skip
    with on_device_of(q):
        launch(decode, plan.grid, *pointers, *plan.rest, **plan.entry)
        if plan.parts:
            launch(
                combine, plan.combine_grid, part_out, part_lse, out, lse, sinks, cu_seqlens_q,
                *plan.combine_rest, **plan.combine_entry,
            )  # fmt: skip
        elif cu_seqlens_q is not None:
            launch(
                clear, plan.combine_grid, out, lse, cu_seqlens_q, *plan.combine_rest,
                **plan.combine_entry,
            )  # fmt: skip
    if out.dtype != q.dtype:
        out = out.to(q.dtype)
    return out, torch.empty(0, dtype=torch.float32, device=device) if lse is None else lse


def decode_pointers(
    plan: Plan, q: Any, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any, out: Any, lse: Any,
    part_out: Any, part_lse: Any, mask: Any, positions: Any, block_table: Any, sinks: Any,
    cu_seqlens_q: Any, causal: Pair, length: Pair, hole: Pair, first: Pair, count: Pair,
    branches: Pair, k_scale: Pair, v_scale: Pair,
) -> tuple[Any, ...]:  # fmt: skip
    """The kernel's first arguments: tensors, and numbers that may be tensors."""
    return (
        q,
        k_cache.view(torch.uint8) if plan.S.K_FORM else k_cache,
        v_cache.view(torch.uint8) if plan.S.V_FORM else v_cache,
        *(k, v, out, lse, part_out, part_lse, mask, positions, block_table, sinks, cu_seqlens_q),
        causal[1],
        length[0] if length[1] is None else length[1],
        hole[0] if hole[1] is None else hole[1],
        first[0] if first[1] is None else first[1],
        count[0] if count[1] is None else count[1],
        branches[0] if branches[1] is None else branches[1],
        (None if k_scale[0] == 1.0 else float(k_scale[0])) if k_scale[1] is None else k_scale[1],
        (None if v_scale[0] == 1.0 else float(v_scale[0])) if v_scale[1] is None else v_scale[1],
    )


def candidates(key: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Other launches of an entry, for ``bench/tune.py``, which proves each before it is timed."""
    now = CONFIGURATIONS[key]
    if "BLOCK" in now:
        yield from (dict(now, BLOCK=b, num_warps=w) for b in (4, 8, 16, 32) for w in (2, 4, 8))
        return
    tiles = {now["BM"]} if key[1] == 16 else {32, 64, key[1]}
    for BM, BN in product(sorted(tiles), (16, 32, 64, 128)):
        for num_warps, num_stages in product((4, 8), (2, 3, 4, 5)):
            yield dict(now, BM=BM, BN=BN, num_warps=num_warps, num_stages=num_stages)


def static_calls(arch: str) -> Iterator[StaticCall]:
    from .decode_calls import calls

    return calls(arch)
