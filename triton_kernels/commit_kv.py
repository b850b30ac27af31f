"""Committing an accepted path's K/V in one launch: all layers, in place, and the lengths."""

from collections import OrderedDict
from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..replay import launch
from . import configurations
from .commit_kv_kernel import commit
from .devices import on_device_of
from .static_call import StaticCall

CONFIGURATIONS = configurations.load("commit_kv")
MAX_ROWS = 1024  # rows in flight of one forward pass
UNIT = 16  # bytes: the unit of strides where all addresses are multiples of it


def commit_kv(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    path: Tensor,
    num_accepted: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_rows: Tensor | None,
    v_rows: Tensor | None,
) -> Tensor:
    """path [B, P], staging k_rows, v_rows [layers, B, N, Hkv, D] -> new cache_seqlens [B]."""
    B, P = path.shape
    if B == 0 or P == 0:
        return cache_seqlens.clone()
    lengths = torch.empty(B, dtype=cache_seqlens.dtype, device=path.device)
    given, grid = arguments(
        k_caches, v_caches, path, num_accepted, cache_seqlens, block_table, k_rows, v_rows, lengths
    )
    with on_device_of(path):
        launch(commit, grid, **given, **CONFIGURATIONS[key_of(given)])
    return lengths


def key_of(given: dict[str, Any]) -> tuple[int, int]:
    return given["WORD"].primitive_bitwidth, given["UNITS"]


def arguments(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    path: Tensor,
    num_accepted: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_rows: Tensor | None,
    v_rows: Tensor | None,
    lengths: Tensor,
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The kernel's arguments, less its table entry, and the grid."""
    k, v = k_caches[0], v_caches[0]
    stacked = k.dim() == 5
    num_layers = k.shape[0] if stacked else len(k_caches)
    pages, page_size, heads = k.shape[-4:-1]
    size = k.element_size()
    row_bytes = [k.shape[-1] * size, v.shape[-1] * size]
    aligned = gcd(UNIT, *row_bytes)
    for x in (k, v) if stacked else ():
        aligned = alignment(x, aligned)
    for x in (k_rows, v_rows):
        aligned = aligned if x is None else alignment(x, aligned)
    table = None
    if not stacked:
        table, aligned = layer_table(k_caches, v_caches, aligned)
    bits, units = min(aligned, 8) * 8, 2 if aligned == UNIT else 1
    WORD = {64: tl.int64, 32: tl.int32, 16: tl.int16, 8: tl.int8}[bits]
    words = [n * 8 // bits for n in row_bytes]
    nothing = pages * page_size * num_layers == 0 or (k_rows is not None and k_rows.shape[2] == 0)
    heads = 0 if nothing else heads
    slices = max(1, -(-heads * max(words) // CONFIGURATIONS[(bits, units)]["BLOCK"]))
    none = (0, 0, 0, 0)
    given = dict(
        k_cache=as_bytes(k) if stacked else None,
        v_cache=as_bytes(v) if stacked else None,
        layer_table=table,
        k_rows=None if k_rows is None else as_bytes(k_rows),
        v_rows=None if v_rows is None else as_bytes(v_rows),
        path=path,
        num_accepted=num_accepted,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        lengths=lengths,
        P=path.shape[1],
        heads=heads,
        pages=pages,
        page_size=page_size,
        width=1 if block_table is None else block_table.shape[1],
        num_rows=MAX_ROWS if k_rows is None else k_rows.shape[2],
        slices=slices,
        stride_path_b=path.stride(0),
        stride_path=path.stride(1),
        stride_num=num_accepted.stride(0),
        stride_length=cache_seqlens.stride(0),
        stride_table_b=0 if block_table is None else block_table.stride(0),
        stride_table=0 if block_table is None else block_table.stride(1),
        k_strides=in_units(k, size, aligned) if stacked else none,
        v_strides=in_units(v, size, aligned) if stacked else none,
        k_row_strides=none if k_rows is None else in_units(k_rows, size, aligned),
        v_row_strides=none if v_rows is None else in_units(v_rows, size, aligned),
        K_WORDS=words[0],
        V_WORDS=words[1],
        UNITS=units,
        WORD=WORD,
    )
    return given, (path.shape[0] * slices, max(1, num_layers), 2)


def alignment(x: Tensor, most: int) -> int:
    """The power of two of bytes, at most ``most``, that divides all addresses of x's rows."""
    size = x.element_size()
    return gcd(most, x.data_ptr(), *(size * s for n, s in zip(x.shape, x.stride()[:-1]) if n > 1))


def as_bytes(x: Tensor) -> Tensor:
    """fp8 as bytes: Triton refuses even a pointer to e4m3 below sm_89."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def in_units(x: Tensor, size: int, aligned: int) -> tuple[int, ...]:
    """Strides in units of ``aligned`` bytes; that of a dimension of 1 is never used."""
    return tuple(s * size // aligned for s in x.stride()[:-1])


# ---- lists of caches ----------------------------------------------------------------------------

KEPT = 256  # tables; a model has one
_tables: OrderedDict[Any, tuple[Tensor, int]] = OrderedDict()
_in_graphs: dict[Any, tuple[Tensor, int]] = {}  # a captured graph reads its table for ever


def layer_table(k_caches: list[Tensor], v_caches: list[Tensor], most: int) -> tuple[Tensor, int]:
    """Where each layer's K and V lie, [layers, 2, 4] int64 on their device (address, and strides
    of page, slot and head in units of the alignment), and that alignment in bytes.

    Built on the first call with tensors at these addresses, and kept: so that call reads the host
    and cannot be captured, but all later ones can.
    """
    device = k_caches[0].device
    both = [x for pair in zip(k_caches, v_caches) for x in pair]
    key = (device, most, both[0].element_size(), *[(x.data_ptr(), x.stride()) for x in both])
    found = _tables.get(key) or _in_graphs.get(key)
    if found is None:
        if capturing(device):
            raise RuntimeError(
                "k_caches: expected a call with these tensors before the capture, for a list's "
                "pointer table is built on the first one; or give one tensor [layers, ...]"
            )
        found = _tables[key] = build_table(both, most)
        while len(_tables) > KEPT:
            _tables.popitem(last=False)
    elif key in _tables:
        _tables.move_to_end(key)
    if capturing(device):
        _in_graphs[key] = found
    return found


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def build_table(both: list[Tensor], most: int) -> tuple[Tensor, int]:
    size, aligned = both[0].element_size(), most
    for x in both:
        aligned = alignment(x, aligned)
    rows = [(x.data_ptr(), *in_units(x, size, aligned)) for x in both]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 2, 4)
    return table.to(both[0].device), aligned


def static_calls(arch: str) -> Iterator[StaticCall]:
    def call(dtype: torch.dtype, D: int, note: str, **more: Any) -> StaticCall:
        made = example(dtype, D, **more)
        entry = CONFIGURATIONS[key_of(made)]
        wide = made["UNITS"] == 2
        bytes_ = entry["MOVES"] * entry["BLOCK"] * 8 if wide else 0
        note = f"{str(dtype).removeprefix('torch.')} D={D} {note}"
        return StaticCall(
            commit, key_of(made), made, dtype, streamed=bytes_, aligned=wide, note=note
        )

    half, fp8, i64 = torch.bfloat16, torch.float8_e4m3fn, torch.int64
    for listed in (False, True):
        how = "list" if listed else "stacked"
        yield call(half, 128, f"{how} paged", listed=listed)
        yield call(half, 128, f"{how} dense, int64", listed=listed, paged=False, index=i64)
        yield call(half, 128, f"{how} staged", listed=listed, staged=True)
        yield call(half, 80, f"{how} paged", listed=listed)
    yield call(fp8, 64, "list paged", listed=True)
    yield call(fp8, 128, "list staged", listed=True, staged=True)
    yield call(torch.float32, 256, "list paged", listed=True)
    for step, word in ((1, 2), (2, 4), (4, 8)):
        yield call(half, 64, f"rows at multiples of {word} bytes", listed=True, step=step)
    yield call(fp8, 64, "rows at odd bytes", listed=False, step=1)


def example(
    dtype: torch.dtype,
    D: int,
    *,
    listed: bool,
    paged: bool = True,
    staged: bool = False,
    step: int = 0,
    index: torch.dtype = torch.int32,
) -> dict[str, Any]:
    """A tree of 64 nodes over 32 layers; ``step`` more elements a head, that are not used."""

    def empty(*shape: int, dtype: torch.dtype = index) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, layers, heads = 8, 32, 8
    pages = (999, 16) if paged else (B, 4096)
    shape = (*pages, heads, D + step)
    one = empty(*(() if listed else (layers,)), *shape, dtype=dtype)[..., :D]
    caches = [one] * (layers if listed else 1)
    rows = empty(layers, B, 64, heads, D, dtype=dtype) if staged else None
    return arguments(
        *(caches, caches, empty(B, 9), empty(B, dtype=torch.int32), empty(B)),
        *(empty(B, 40, dtype=torch.int32) if paged else None, rows, rows, empty(B)),
    )[0]
