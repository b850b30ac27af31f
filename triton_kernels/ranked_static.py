"""Calls of ranked attention for the static report, on tensors without memory."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
B, S, HQ, HKV = 8, 4096, 32, 8


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def example(
    N: int = 4096,
    D: int = 128,
    dtype: torch.dtype = BF16,
    *,
    cache: torch.dtype | None = None,
    page_size: int = 0,
    packed: bool = False,
    step: int = 0,
    Dv: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The schema's arguments of a call; ``packed``: the queries, and keys without pages;
    ``step``: an odd head stride.
    """
    Dv = Dv or D
    packed_keys = packed and not page_size
    rows = (B * N,) if packed else (B, N)
    keys = (B * S,) if packed_keys else (B, S)
    first = (B * S // page_size, page_size) if page_size else keys
    k, v = (empty(*first, HKV, d + step, dtype=cache or dtype)[..., :d] for d in (D, Dv))
    call: dict[str, Any] = dict(
        q=empty(*rows, HQ, D + step, dtype=dtype)[..., :D],
        k=k,
        v=v,
        q_rank=empty(*rows) if packed else empty(1, N),
        k_rank=empty(*keys) if packed_keys else empty(1, S),
        mask=None,
        strict=False,
        cache_seqlens=S,
        cache_seqlens_tensor=None if packed_keys else empty(B),
        block_table=empty(B, S // page_size) if page_size else None,
        num_tokens=N,
        num_tokens_tensor=None,
        positions=None,
        softmax_scale=D**-0.5,
        softcap=0.0,
        window_size=-1,
        sinks=None,
        k_scale=1.0,
        k_scale_tensor=None,
        v_scale=1.0,
        v_scale_tensor=None,
        cu_seqlens_q=empty(B + 1) if packed else None,
        cu_seqlens_k=empty(B + 1) if packed_keys else None,
        max_seqlen_q=N if packed else 0,
        max_seqlen_k=S if packed_keys else 0,
        return_lse=True,
    )
    return call | more


def variants(N: int, D: int, kind: str, step: int = 0) -> Iterator[tuple[dict[str, Any], str]]:
    """For one entry of the table: a plain call, and those that need the most registers."""
    dtype, other, cache = {
        "half": (BF16, FP16, None),
        "bytes": (BF16, FP16, E4M3),
        "single": (FP32, FP32, None),
    }[kind]
    more: dict[str, Any] = dict(step=step)
    if cache:
        scale = empty(B, HKV, dtype=FP32)
        more |= dict(cache=cache, k_scale_tensor=scale, v_scale_tensor=scale)
    yield example(N, D, dtype, **more), f"N={N}"
    packed = N > 1024
    positions = empty(B * N) if packed else empty(B, N)
    whole = dict(page_size=64, window_size=128, positions=positions, packed=packed)
    yield example(N, D, other, **whole, **more), f"N={N} pages of 64, window" + ", packed" * packed
    small = dict(page_size=16, window_size=128, softcap=30.0, sinks=empty(HQ, dtype=dtype))
    yield example(N, D, dtype, **small, **more), f"N={N} pages of 16, window, softcap, sinks"
    mask = empty(B, N, S // 64, dtype=torch.int64)
    yield example(N, D, dtype, page_size=16, mask=mask, **more), f"N={N} pages of 16, bits"


SIZES = {"half": (64, 4096), "bytes": (4096,), "single": (4096,)}


def examples(whole: bool = True, few: bool = True) -> Iterator[tuple[dict[str, Any], bool, str]]:
    """Arguments, whether 16 bytes can be read at once, and a note: every entry with a plain call
    and another one, other ones in turn; all for heads of 128. So, too, odd strides of all dtypes.
    Not ``whole``: of a target that reads another one's table, every entry once. ``few``: odd
    strides of so few queries that the table has other tiles for them.
    """
    for turn, (kind, D, N) in enumerate(entries(), 1):
        plain, *others = variants(N, D, kind)
        one = others[(turn + D // 128) % 3 :][:1]
        for call, note in [plain, *(others if D == 128 else one)] if whole else one:
            yield call, True, f"{kind} D={D} {note}"
    for turn, (D, kind) in enumerate(product((64, 128, 256), ("half", "bytes", "single"))):
        plain, *others = variants(4096, D, kind, step=1)
        another = others[(turn + turn // 3) % 3]  # each head dim meets all three, and each dtype
        for call, note in [plain, another] if whole else [another]:
            yield call, False, f"odd strides, {kind} D={D} {note}"
    if not whole:
        return
    for D, kind in product((64, 128, 256), ("half", "bytes")) if few else ():
        call, note = next(variants(16, D, kind, step=1))
        yield call, False, f"odd strides, {kind} D={D} {note}"
    yield example(D=80, Dv=96, step=1), False, "odd strides, D=80 Dv=96"
    yield example(D=192, Dv=160, step=1), False, "odd strides, D=192 Dv=160"
    yield example(mask=empty(B, 4096, S, dtype=torch.bool)), True, "bool"
    mask = empty(B * 4096, S // 64, dtype=torch.int64)
    yield example(packed=True, mask=mask), True, "packed bits"
    yield example(page_size=1), True, "pages of 1"
    yield example(page_size=256, window_size=128), True, "pages of 256, window"
    yield example(packed=True, strict=True), True, "packed, strict"
    yield example(D=80), True, "D=80"
    yield example(D=192, Dv=128), True, "D=192 Dv=128"
    yield example(D=64, cache=E5M2, packed=True), True, "e5m2 packed"


def entries() -> Iterator[tuple[str, int, int]]:
    """Dtypes, head dims and queries that between them select every entry of a table."""
    for kind in ("half", "bytes", "single"):
        for D in (64, 128, 256):
            if kind == "half" and D < 256:
                yield kind, D, 64
            yield kind, D, 4096


def masked() -> Iterator[tuple[dict[str, Any], str]]:
    """A mask for every entry: the first kernel's tiles are those of the second one's entry."""
    for kind, D, N in entries():
        *_, (call, note) = variants(N, D, kind)
        yield call, f"{kind} D={D} {note}"
