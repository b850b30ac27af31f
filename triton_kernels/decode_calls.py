"""The decode kernel's launches for the static report: every table entry, as real calls make it."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch

from .decode_attention import decode_pointers
from .decode_combine import clear, combine
from .decode_kernel import decode
from .decode_plan import CONFIGURATIONS, make_plan
from .devices import table_of
from .static_call import StaticCall

B, HKV, GROUP = 8, 8, 4
FP8 = torch.float8_e4m3fn, torch.float8_e5m2


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def numbers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def example(
    dtype: torch.dtype, rows: int, d: int, page: int, arch: str, *, dv: int = 0, op: str = "tree",
    packed: bool = False, cached: bool = False, odd: bool = False,
    cache: tuple[torch.dtype, torch.dtype] | None = None, splits: int | None = None, **more: Any,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Plan and arguments of a call: ``rows`` of each of B requests over a cache, paged or (page 0)
    not. cached: the rows' K and V lie there too; odd: bases and strides of single elements."""
    dv, branches = dv or d, 4 if op == "branch" else 0
    lead = (B * rows,) if packed else (B, branches, rows // branches) if branches else (B, rows)

    def rows_of(heads: int, width: int) -> torch.Tensor:
        return empty(*lead, heads, width + odd, dtype=dtype)[..., odd:]

    def cache_of(width: int, kind: torch.dtype) -> torch.Tensor:
        size = (999, page) if page else (B, 4096)
        return empty(*size, HKV, width + odd, dtype=kind)[..., odd:]

    kinds = cache or (dtype, dtype)
    out = empty(*lead, HKV * GROUP, dv, dtype=dtype)
    given: dict[str, Any] = dict(
        mask=None, positions=None, sinks=None, causal=(False, None), length=(0, numbers(B)),
        hole=(-1, None), first=(0, None), count=(rows, None), branches=(branches or 1, None),
        k_scale=(1.0, None), v_scale=(1.0, None), softmax_scale=d**-0.5, softcap=0.0,
        window_size=-1, return_lse=False,
    )  # fmt: skip
    given.update(more)
    q, k, v = rows_of(HKV * GROUP, d), rows_of(HKV, d), rows_of(HKV, dv)
    five = [given.pop(name) for name in ("length", "hole", "first", "count", "branches")]
    k_cache, v_cache = cache_of(d, kinds[0]), cache_of(dv, kinds[1])
    table = numbers(B, 40) if page else None
    cu = numbers(B + 1) if packed else None
    sinks, scales = given.pop("sinks"), (given["k_scale"], given["v_scale"])
    own = (None, None) if cached else (k, v)
    plan = make_plan(
        *(q, k_cache, v_cache, *own), numbers=tuple(five), block_table=table, cu_seqlens_q=cu,
        max_seqlen_q=rows if packed else 0, block=op != "tree", arch=arch, splits=splits, **given,
    )  # fmt: skip
    pointers = decode_pointers(
        plan, q, k_cache, v_cache, *own, out, empty(*plan.lse_shape) if plan.lse_shape else None,
        empty(plan.parts * dv) if plan.parts else None, empty(plan.parts) if plan.parts else None,
        given["mask"], given["positions"], table, sinks, cu, given["causal"], *five, *scales,
    )  # fmt: skip
    return plan, dict(zip(decode.arg_names, (*pointers, *plan.rest)))


def bits(rows: int, packed: bool = False) -> torch.Tensor:
    words = -(-rows // 64)
    shape = (B * rows, words) if packed else (B, rows, words)
    return empty(*shape, dtype=torch.int64)


def variants(rows: int) -> dict[str, dict[str, Any]]:
    """What calls ask for, several things at once: with a table's entries they make the report."""
    each = torch.empty(B, dtype=torch.bool, device="meta")
    heads, all_heads = empty(HKV), empty(B, HKV)
    sinks = empty(HKV * GROUP)
    block = dict(op="block", hole=(-1, numbers(B)), first=(0, numbers(B)))
    branch = dict(op="branch", branches=(4, numbers(B)), count=(rows // 4, numbers(B)))
    return {
        "block": dict(op="block", hole=(-1, numbers(B))),
        "window of a mask, softcap, sinks, lse": dict(
            mask=bits(rows), window_size=99, softcap=30.0, sinks=sinks, return_lse=True,
            count=(rows, numbers(B)),
        ),
        "block, causal each, window, lse": dict(
            block, causal=(False, each), window_size=99, return_lse=True
        ),
        "branch, hole, lse": dict(branch, hole=(-1, numbers(B)), return_lse=True),
        "branch, causal, window of positions": dict(
            branch, causal=(True, None), window_size=99,
            positions=numbers(B, 1, max(rows // 4, 1)), hole=(-1, numbers(B)),
        ),
        "e4m3, scales of heads, causal, in the cache": dict(
            cache=FP8[:1] * 2, k_scale=(1.0, all_heads), v_scale=(1.0, heads),
            causal=(True, None), cached=True,
        ),
        "e5m2, scales, block": dict(
            block, cache=FP8[1:] * 2, k_scale=(0.5, None), v_scale=(0.5, None),
        ),
        "packed, mask, window, lse": dict(
            packed=True, mask=bits(rows, True), window_size=99, return_lse=True
        ),
        "packed block, causal each, in the cache": dict(
            block, packed=True, causal=(False, each), cached=True,
        ),
        "odd strides": dict(odd=True, mask=bits(rows)),
        "odd strides, block, e5m2": dict(block, odd=True, cache=FP8[1:] * 2),
        "odd strides, branch, causal, window of positions": dict(
            branch, odd=True, causal=(True, None), window_size=99,
            positions=numbers(B, 1, max(rows // 4, 1)), hole=(-1, numbers(B)),
        ),
        "odd strides, packed, mask, window, lse": dict(
            odd=True, packed=True, mask=bits(rows, True), window_size=99, return_lse=True,
        ),
        "window, positions, softcap, scale < 0": dict(
            window_size=99, positions=numbers(B, rows), softcap=30.0, softmax_scale=-0.1,
            sinks=sinks, mask=bits(rows),
        ),
        "block, mask, e4m3 and e5m2, window": dict(
            op="block", cache=FP8, mask=bits(rows), window_size=99, cached=True,
            return_lse=True,
        ),
        "packed, causal, e4m3, positions": dict(
            packed=True, cache=FP8[:1] * 2, causal=(True, None), window_size=99,
            positions=numbers(B * rows), k_scale=(1.0, empty()), v_scale=(1.0, empty()),
        ),
        "no mask": dict(causal=(True, None)),
    }  # fmt: skip


ROWS = {16: 4, 64: 16, 128: 64}
MANY = 160  # so many rows that the context is not split
ODD_DIMS = {64: (48, 32), 128: (80, 96), 256: (192, 160)}  # no powers of two, Dv other than D


def fits(more: dict[str, Any], key: tuple[Any, ...]) -> bool:
    """Whether the launcher takes this entry for that variant, see ``decode_plan.key_of``."""
    wide = key[2] > 128 and ("packed" in more or "cached" in more or more.get("op") == "branch")
    rich = wide or "window_size" in more or "cache" in more
    if "odd" in more or key[4] == "odd":
        return "odd" in more and key[4] == "odd"
    if key[0] == "fp32":
        return key[4] == "gather"
    return rich == (key[4] == "rich")


def calls(arch: str) -> Iterator[StaticCall]:
    """Every entry with a tree under a mask, and with some of the variants, other ones each time:
    all of them for every architecture, and each with several of its entries."""
    table, half, waiting = table_of(arch), torch.bfloat16, list(variants(16))
    for turn, key in enumerate(CONFIGURATIONS):
        if key[0] in ("combine", "clear"):
            yield from second_calls(key)
        elif key[3] == table and (arch == table or key[1:] == (64, 128, table, "rich")):
            kind, rows = torch.float32 if key[0] == "fp32" else half, ROWS[key[1]]
            if key[4] not in ("rich", "odd"):
                yield call(key, kind, "", dict(mask=bits(rows)))
            for _ in range(3 if key[4] in ("rich", "odd") or key[0] == "fp32" else 1):
                some = [name for name in waiting if fits(variants(rows)[name], key)]
                if some:
                    waiting.remove(some[0])
                    waiting.append(some[0])
                    wide = key[1] == 128 or key[1::3] in ((64, "rich"), (64, "odd"))
                    many = MANY if wide and turn % 2 else rows
                    yield call(key, kind, some[0], variants(many)[some[0]], many)
            if key[4] in ("gather", "odd"):
                dims: dict[str, Any] = dict(zip(("d", "dv"), ODD_DIMS[key[2]]))
                note = "D Dv"
                if key[4] == "odd":
                    dims, note = dims | dict(odd=True), "odd strides, D Dv"
                yield call(key, torch.float16 if kind == half else kind, note, dims)


def call(
    key: tuple[Hashable, ...], dtype: torch.dtype, note: str, more: dict[str, Any], rows: int = 0
) -> StaticCall:
    _, m, width, arch, how = key
    entry, more = CONFIGURATIONS[key], dict(dict(d=width), **more)
    gathers = how == "gather" or (how in ("rich", "odd") and "packed" in more)
    page = 0 if "odd" in more and "packed" not in more else 16 if gathers else 64
    plan, made = example(dtype, rows or ROWS[m], page=page, arch=arch, **more)
    assert plan.key == key, (plan.key, key)
    sizes = [c.itemsize for c in more.get("cache", (dtype, dtype))]
    multiplied = entry["BM"]
    if arch == "sm_90":  # no small tile may hide HMMA there
        multiplied = (rows or ROWS[m]) * GROUP
    streamed = entry["BN"] * sum(map(int.__mul__, sizes, (more["d"], more.get("dv", more["d"]))))
    return StaticCall(
        decode, key, made, dtype, multiplied, streamed=streamed, aligned="odd" not in more,
        note=note,
    )  # fmt: skip


def second_calls(key: tuple[Hashable, ...]) -> Iterator[StaticCall]:
    """Of the kernels that follow the decode kernel."""
    width, half = key[1], torch.bfloat16
    assert isinstance(width, int)
    for packed in (False, True):
        if key[0] == "clear" and not packed:
            continue
        d = 128 if key[0] == "clear" else width
        plan, _ = example(
            half, 16, d, 16, "sm_90", packed=packed, return_lse=packed,
            splits=1 if key[0] == "clear" else 4,
        )  # fmt: skip
        out, lse = empty(*plan.shape, dtype=half), empty(*plan.lse_shape) if packed else None
        cu = numbers(B + 1) if packed else None
        given: tuple[Any, ...] = (out, lse, cu)
        if key[0] == "combine":
            sinks = empty(HKV * GROUP) if packed else None
            given = (empty(plan.parts * d), empty(plan.parts), out, lse, sinks, cu)
        kernel = clear if key[0] == "clear" else combine
        made = dict(zip(kernel.arg_names, (*given, *plan.combine_rest)))
        yield StaticCall(kernel, key, made, torch.float32, note="packed" if packed else "")
