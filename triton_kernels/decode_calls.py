"""The decode kernel's launches for the static report: every table entry, as real calls make it."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch

from .decode_attention import CONFIGURATIONS, combine_arguments, decode_arguments
from .decode_kernel import combine, decode
from .static_call import StaticCall

B, HKV = 8, 8
TABLES = {"sm_89": "sm_86", "sm_120": "sm_86"}  # architectures that share a table
__all__ = ["CONFIGURATIONS", "combine", "decode", "static_calls"]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def example(
    dtype: torch.dtype, rows: int, group: int, d: int, block_m: int, page: int, **more: Any
) -> dict[str, Any]:
    """A tree of ``rows`` nodes over a cache, paged or (page 0) not; ``more``: other arguments."""
    q, own = empty(B, rows, HKV * group, d, dtype=dtype), empty(B, rows, HKV, d, dtype=dtype)
    cache = empty(*((999, page) if page else (B, 4096)), HKV, d, dtype=more.pop("cache", dtype))
    splits, out = more.pop("splits", 4), torch.empty_like(q)
    parts = B * rows * HKV * group * splits
    given = dict(
        q=q, k_cache=cache, v_cache=cache, k=own, v=own, out=out, lse=None,
        part_out=empty(parts * d) if splits > 1 else None,
        part_lse=empty(parts) if splits > 1 else None,
        mask=empty(B, rows, -(-rows // 64), dtype=torch.int64), positions=None,
        block_table=empty(B, 40, dtype=torch.int32) if page else None, sinks=None,
        cu_seqlens_q=None, causal=(False, None), length=(0, empty(B, dtype=torch.int32)),
        hole=(-1, None), first=(0, None), count=(rows, None), branches=(1, None),
        k_scale=(1.0, None), v_scale=(1.0, None), softmax_scale=d**-0.5, softcap=0.0,
        window_size=-1, rows=rows, per_branch=rows, block=False, splits=splits, block_m=block_m,
    )  # fmt: skip
    return decode_arguments(**{**given, **more})


def static_calls(arch: str) -> Iterator[StaticCall]:
    table, half = TABLES.get(arch, arch), torch.bfloat16
    for key in CONFIGURATIONS:
        if key[0] == "combine":
            yield combine_call(key)
        elif key[3] == table and (arch == table or key[1:3] == (64, 128)):
            dtype = torch.float32 if key[0] == "fp32" else half
            yield call(key, dtype, page=0 if key[4] == "whole" else 16)
    if arch == table:
        key = ("half", 64, 128, arch, "whole")
        no_mask = dict(mask=None, hole=(-1, empty(B, dtype=torch.int32)), block=True)
        yield call(key, half, page=0, note="block", splits=1, **no_mask)
        yield call(key, half, page=64, note="page of 64")


def call(key: Any, dtype: torch.dtype, page: int, note: str = "", **more: Any) -> StaticCall:
    entry, d = CONFIGURATIONS[key], key[2]
    rows = {16: 4, 64: 16, 128: 64}[key[1]]
    made = example(dtype, rows, 4, d, entry["BM"], page, **more)
    streamed = entry["BN"] * 2 * d * dtype.itemsize
    return StaticCall(decode, key, made, dtype, entry["BM"], streamed=streamed, note=note)


def combine_call(key: tuple[Hashable, ...]) -> StaticCall:
    d = key[1]
    assert isinstance(d, int)
    out = empty(B, 16, HKV * 4, d, dtype=torch.bfloat16)
    parts = B * 16 * HKV * 4 * 4
    made = combine_arguments(empty(parts * d), empty(parts), out, None, None, 16, 16, 4, False)
    del made["BLOCK_DV"]
    return StaticCall(combine, key, dict(made, BLOCK_DV=max(d, 16)), torch.float32)
