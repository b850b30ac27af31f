"""Writing K/V into a cache in one launch: rotated, divided by the scales, scattered."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..replay import launch
from . import configurations
from .devices import on_device_of
from .layouts import FORMS
from .static_call import StaticCall
from .write_kv_kernel import write

CONFIGURATIONS = configurations.load("write_kv")


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    q: Tensor | None,
    k_scale: float,
    k_scale_tensor: Tensor | None,
    v_scale: float,
    v_scale_tensor: Tensor | None,
) -> Tensor:
    """k, v [B, N, Hkv, D] into positions [B, N]; returns q [B, N, Hq, D] rotated, or size 0."""
    q_out = k.new_empty(0) if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    given, grid = arguments(
        *(k, v, k_cache, v_cache, positions, block_table, cos, sin, interleaved, q, q_out),
        *((k_scale, k_scale_tensor), (v_scale, v_scale_tensor)),
    )
    if grid[0] * grid[1]:
        with on_device_of(k):
            launch(write, grid, **given, **CONFIGURATIONS[key_of(given)])
    return q_out


Pair = tuple[float, Tensor | None]  # a scale, as the schema has it


def key_of(given: dict[str, Any]) -> tuple[int]:
    return (min(256, max(16, triton.next_power_of_2(max(given["D"], given["DV"])))),)


def arguments(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    q: Tensor | None, q_out: Tensor, k_scale: Pair, v_scale: Pair,
) -> tuple[dict[str, Any], tuple[int, int]]:  # fmt: skip
    """The kernel's arguments, less its table entry, and the grid."""
    B, N, H, D = k.shape
    Dv, Hq = v.shape[-1], 0 if q is None else q.shape[2]
    pages, page_size = k_cache.shape[:2]
    forms = FORMS.get(k_cache.dtype, 0), FORMS.get(v_cache.dtype, 0)
    factors = [_scale(pair) for pair in (k_scale, v_scale)]
    given: dict[str, Any] = dict(
        k=k,
        v=v,
        q=q,
        k_cache=k_cache.view(torch.uint8) if forms[0] else k_cache,
        v_cache=v_cache.view(torch.uint8) if forms[1] else v_cache,
        q_out=None if q is None else q_out,
        positions=positions,
        block_table=block_table,
        cos=cos,
        sin=sin,
        k_scale=factors[0][0],
        v_scale=factors[1][0],
        N=N,
        H=H,
        HQ=Hq,
        pages=pages,
        page_size=page_size,
        width=1 if block_table is None else block_table.shape[1],
        stride_at_b=positions.stride(0),
        stride_at_n=positions.stride(1),
        stride_table_b=0 if block_table is None else block_table.stride(0),
        stride_table=0 if block_table is None else block_table.stride(1),
        k_scale_strides=factors[0][1],
        v_scale_strides=factors[1][1],
        cos_strides=(0, 0) if cos is None else cos.stride()[:2],
        sin_strides=(0, 0) if sin is None else sin.stride()[:2],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        q_strides=(0, 0, 0) if q is None else q.stride()[:3],
        k_cache_strides=k_cache.stride()[:3],
        v_cache_strides=v_cache.stride()[:3],
        D=D,
        DV=Dv,
        HALF=0 if cos is None else cos.shape[-1],
        INTERLEAVED=bool(interleaved),
        K_FORM=forms[0],
        V_FORM=forms[1],
        K_POINTER=k_scale[1] is not None,
        V_POINTER=v_scale[1] is not None,
    )
    heads = CONFIGURATIONS[key_of(given)]["HEADS"]
    stored = pages * page_size > 0
    k_tiles = -(-H // heads) if D and stored else 0
    v_tiles = -(-H // heads) if Dv and stored else 0
    given.update(k_tiles=k_tiles, v_tiles=v_tiles)
    q_tiles = -(-Hq // heads) if D else 0
    return given, (B * N, k_tiles + v_tiles + q_tiles)


def _scale(pair: Pair) -> tuple[Any, tuple[int, int]]:
    """A cache's scale, None for 1, and its strides along requests and heads."""
    number, tensor = pair
    if tensor is None:
        return (None if number == 1.0 else float(number)), (0, 0)
    return tensor, ((0, 0), (0, *tensor.stride()), tensor.stride())[tensor.dim()]


def static_calls(arch: str) -> Iterator[StaticCall]:
    def call(dtype: torch.dtype, D: int, note: str = "", **more: Any) -> StaticCall:
        made = example(dtype, D, **more)
        key = key_of(made)
        wide = not more.get("step") and key[0] == D
        bytes_ = CONFIGURATIONS[key]["HEADS"] * D * dtype.itemsize if wide else 0
        note = f"{str(dtype).removeprefix('torch.')} D={D} {note}"
        return StaticCall(
            write, key, made, dtype, streamed=bytes_, aligned=not more.get("step"), note=note
        )

    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for D in (16, 32, 64, 128, 256):
        yield call(bf16, D, "rotated", half=D // 2)
        yield call(bf16, D, "interleaved, e4m3", half=D // 2, interleaved=True, cache=e4m3)
    for cache in (e4m3, e5m2):
        name = str(cache).removeprefix("torch.float8_")
        yield call(bf16, 128, f"{name}, scales of requests", half=64, cache=cache, scale=2)
        yield call(bf16, 128, f"{name}, a number", cache=cache, scale=0, queries=False)
        yield call(fp32, 128, f"{name}, scales of heads", half=64, cache=cache, scale=1)
    yield call(bf16, 128, "as it is")
    yield call(fp16, 128, "half of it rotated", half=32)
    yield call(fp32, 64, "dense, int64", half=32, paged=False, index=torch.int64)
    yield call(bf16, 80, "rotated", half=40)
    yield call(bf16, 512, "rotated", half=32)
    yield call(bf16, 64, "odd stride", half=32, step=1)


def example(
    dtype: torch.dtype,
    D: int,
    *,
    half: int = 0,
    interleaved: bool = False,
    cache: torch.dtype | None = None,
    scale: int | None = None,
    paged: bool = True,
    queries: bool = True,
    step: int = 0,
    index: torch.dtype = torch.int32,
) -> dict[str, Any]:
    """A tree of 64 nodes; scale: dimensions of the scales, 0 for a number; ``step``: odd heads."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, N, H = 8, 64, 8
    pages = (999, 16) if paged else (B, 4096)
    k = empty(B, N, H, D + step, dtype=dtype)[..., :D]
    q = empty(B, N, 4 * H, D, dtype=dtype)
    kv = empty(*pages, H, D, dtype=cache or dtype)
    turned = empty(B, N, half, dtype=torch.float32) if half else None
    factor: Pair = (1.0, None) if scale is None else (0.5, None)
    if scale:
        factor = (1.0, empty(*(B, H)[2 - scale :]))
    return arguments(
        *(k, k, kv, kv, empty(B, N, dtype=index)),
        *(empty(B, 40, dtype=torch.int32) if paged else None, turned, turned, interleaved),
        *(q if queries else None, q, factor, factor),
    )[0]
