"""The launcher of the decode kernel: schema-level arguments in, fresh results out."""

from typing import Any

import torch
from torch import Tensor

from . import configurations
from .decode_kernel import combine, decode
from .numerics import INTERPRETED

CONFIGURATIONS = configurations.load("decode_attention")
LOG2E = 1.4426950408889634
Pair = tuple[Any, Tensor | None]  # a number, as the schemas have it

_ARCHITECTURES: dict[int | None, str] = {}


def architecture(device: torch.device) -> str:
    """The table's name of a device, asked once."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter
    return _ARCHITECTURES.get(device.index) or _ask(device.index)


def _ask(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    name = "sm_90" if major == 9 else "sm_100" if major == 10 else "sm_86"
    if (major, minor) == (8, 0):
        name = "sm_80"
    return _ARCHITECTURES.setdefault(index, "gfx942" if torch.version.hip else name)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


Key = tuple[str, int, int, str, str]


def key_of(dtype: torch.dtype, m: int, d: int, page: int, arch: str) -> Key:
    """(dtype's kind, M, head dim, architecture, whether a tile's keys lie in one page)."""
    d = max(power_of_two(d), 64)
    how = "whole" if page % 64 == 0 else "gather"
    if dtype == torch.float32:
        if arch == "sm_80" and INTERPRETED:
            d = 64  # there are no registers to run out of
        return "fp32", 16, d, arch, how
    return "half", 16 if m <= 16 else 64 if m <= 64 else 128, d, arch, how


def splits_of(rows: int, group: int, num_kv_heads: int, block_m: int) -> int:
    """Parts of the context, by what never changes with the batch: M tiles first fill a GPU of
    about 128 SMs, then splits; each split writes and reads all rows once more in fp32."""
    tiles = num_kv_heads * -(-rows * group // block_m)
    wanted = min(128 // tiles, 256 // rows, 16)
    return 1 << max(wanted, 1).bit_length() - 1


def decode_attention(
    q: Tensor,  # [B, N, Hq, D], [B, K, L, Hq, D] or packed [total, Hq, D]
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    mask: Tensor | None = None,
    causal: Pair = (False, None),
    length: Pair,
    hole: Pair = (-1, None),
    first: Pair = (0, None),
    branches: Pair = (1, None),
    block_table: Tensor | None,
    count: Pair,
    positions: Tensor | None,
    softmax_scale: float,
    softcap: float,
    window_size: int,
    sinks: Tensor | None,
    k_scale: Pair,
    v_scale: Pair,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    return_lse: bool,
    block: bool = False,
) -> tuple[Tensor, Tensor]:
    """One launch, or two with splits. ``block``: hole and first count (and branches, for 5-d q)."""
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    Hq, D = q.shape[-2:]
    Hkv, Dv = v_cache.shape[2:]
    branched, packed = q.dim() == 5, cu_seqlens_q is not None
    per_branch = max_seqlen_q if packed else q.shape[-3]
    rows = per_branch * (q.shape[1] if branched else 1)
    # the interpreter's cast to bf16 cuts off, so it hands out fp32
    dtype = torch.float32 if INTERPRETED and q.dtype == torch.bfloat16 else q.dtype
    shape = (*q.shape[:-1], Dv)
    if batch * rows * q.numel() * Dv == 0:
        lse_shape = (*q.shape[:-3], Hq, q.shape[-3]) if return_lse else (0,)
        return q.new_zeros(shape), q.new_full(lse_shape, -torch.inf, dtype=torch.float32)
    page = 0 if block_table is None else k_cache.shape[1]
    entry = CONFIGURATIONS[
        key_of(q.dtype, rows * (Hq // Hkv), max(D, Dv), page, architecture(q.device))
    ]
    splits = splits_of(rows, Hq // Hkv, Hkv, entry["BM"])
    # rows of a packed batch that belong to no request give 0 and -inf
    out = (q.new_zeros if packed and splits == 1 else q.new_empty)(shape, dtype=dtype)
    lse = None
    if return_lse:
        lse_shape = (*q.shape[:-3], Hq, q.shape[-3])
        lse = (
            torch.full(lse_shape, -torch.inf, device=q.device)
            if packed and splits == 1
            else (torch.empty(lse_shape, dtype=torch.float32, device=q.device))
        )
    part_out = part_lse = None
    if splits > 1:
        size = out.numel() // Dv
        part_out = torch.empty(size * splits * Dv, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(size * splits, dtype=torch.float32, device=q.device)
        if packed:
            part_lse.fill_(torch.inf)
    arguments = decode_arguments(
        q, k_cache, v_cache, k, v, out, lse, part_out, part_lse, mask, positions, block_table,
        sinks, cu_seqlens_q, causal, length, hole, first, count, branches, k_scale, v_scale,
        softmax_scale, softcap, window_size, rows, per_branch, block, splits, entry["BM"],
    )  # fmt: skip
    with _device_of(q):
        grid = (batch * Hkv * splits * arguments["m_tiles"],)
        decode[grid](**arguments, **entry)
        if splits > 1:
            launch_combine(part_out, part_lse, out, lse, sinks, rows, per_branch, splits, packed)
    if dtype != q.dtype:
        out = out.to(q.dtype)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _device_of(q: Tensor) -> Any:
    return torch.cuda.device(q.device) if q.is_cuda else _NOTHING


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...


_NOTHING = _Nothing()


def launch_combine(
    part_out: Any, part_lse: Any, out: Tensor, lse: Tensor | None, sinks: Tensor | None,
    rows: int, per_branch: int, splits: int, packed: bool,
) -> None:  # fmt: skip
    size = out.numel() // out.shape[-1]
    arguments = combine_arguments(
        part_out, part_lse, out, lse, sinks, rows, per_branch, splits, packed
    )
    entry = CONFIGURATIONS["combine", arguments["BLOCK_DV"]]
    combine[(-(-size // entry["BLOCK"]),)](**arguments, **entry)


def combine_arguments(
    part_out: Any, part_lse: Any, out: Tensor, lse: Tensor | None, sinks: Tensor | None,
    rows: int, per_branch: int, splits: int, packed: bool,
) -> dict[str, Any]:  # fmt: skip
    Hq, Dv = out.shape[-2:]
    return dict(
        part_out=part_out, part_lse=part_lse, out=out, lse=lse, sinks=sinks,
        size=out.numel() // Dv, rows=rows, branch_length=per_branch, total=out.shape[0],
        HQ=Hq, DV=Dv, SPLITS=splits, PACKED=packed, BLOCK_DV=max(power_of_two(Dv), 16),
    )  # fmt: skip


_FORMS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


def decode_arguments(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    out: Tensor, lse: Tensor | None, part_out: Tensor | None, part_lse: Tensor | None,
    mask: Tensor | None, positions: Tensor | None, block_table: Tensor | None,
    sinks: Tensor | None, cu_seqlens_q: Tensor | None, causal: Pair, length: Pair, hole: Pair,
    first: Pair, count: Pair, branches: Pair, k_scale: Pair, v_scale: Pair,
    softmax_scale: float, softcap: float, window_size: int, rows: int, per_branch: int,
    block: bool, splits: int, block_m: int,
) -> dict[str, Any]:  # fmt: skip
    """The kernel's arguments by name, but for its table entry's."""
    Hq, D = q.shape[-2:]
    num_pages, page_size, Hkv, Dv = v_cache.shape
    packed, branched = cu_seqlens_q is not None, q.dim() == 5
    if packed and cu_seqlens_q.stride(0) != 1:  # type: ignore[union-attr]
        cu_seqlens_q = cu_seqlens_q.contiguous()  # type: ignore[union-attr]
    sign = (softmax_scale > 0) - (softmax_scale < 0)
    scale = abs(softmax_scale) if sign else 1.0
    cap = scale / softcap if softcap > 0 else 0.0
    k_form, v_form = _FORMS.get(k_cache.dtype, 0), _FORMS.get(v_cache.dtype, 0)
    bytes_of = (k_cache.view(torch.uint8) if k_form else k_cache,
                v_cache.view(torch.uint8) if v_form else v_cache)  # fmt: skip
    table_stride, max_pages, page = 0, page_size, 1
    if block_table is not None:
        table_stride, max_pages, page = block_table.stride(0), block_table.shape[1], page_size
        if block_table.stride(1) != 1:
            block_table = block_table.contiguous()
            table_stride = max_pages
    mask_b = mask_n = 0
    if mask is not None:
        if mask.stride(-1) != 1 and mask.shape[-1] > 1:
            mask = mask.contiguous()
        mask_n = mask.stride(-2)
        mask_b = mask.stride(0) if mask.dim() == 3 and mask.shape[0] > 1 else 0
    q_strides = _row_strides(q, packed)
    at_strides = (0, 0, 0)
    if positions is not None:
        at_strides = _row_strides(positions[..., None, None], packed)[:3]
        if branched and positions.shape[1] == 1:
            at_strides = (at_strides[0], 0, at_strides[2])
    k_strides = v_strides = (0, 0, 0, 0)
    if k is not None and v is not None:
        k_strides, v_strides = _row_strides(k, packed), _row_strides(v, packed)
    k_factor, k_factor_strides = _scale(k_scale)
    v_factor, v_factor_strides = _scale(v_scale)
    numbers = [_number(pair) for pair in (length, hole, first, count, branches)]
    causal_stride = 0 if causal[1] is None or causal[1].dim() == 0 else causal[1].stride(0)
    return dict(
        q=q, k_cache=bytes_of[0], v_cache=bytes_of[1], k_rows=k, v_rows=v, out=out, lse=lse,
        part_out=part_out, part_lse=part_lse, mask=mask, at=positions, table=block_table,
        sinks=sinks, cu=cu_seqlens_q, causal_of=causal[1],
        length=numbers[0][0], hole=numbers[1][0], first=numbers[2][0], count=numbers[3][0],
        branches=numbers[4][0], k_scale=k_factor, v_scale=v_factor,
        scale=LOG2E * (softcap if softcap > 0 else scale), cap=cap,
        rows=rows, branch_length=per_branch, total=q.shape[0], num_pages=num_pages,
        max_pages=max_pages, m_tiles=-(-rows * (Hq // Hkv) // block_m), window=window_size,
        stride_length=numbers[0][1], stride_hole=numbers[1][1], stride_first=numbers[2][1],
        stride_count=numbers[3][1], stride_branches=numbers[4][1], stride_causal=causal_stride,
        stride_ks_b=k_factor_strides[0], stride_ks_h=k_factor_strides[1],
        stride_vs_b=v_factor_strides[0], stride_vs_h=v_factor_strides[1],
        stride_table=table_stride, stride_mask_b=mask_b, stride_mask_n=mask_n,
        stride_at_b=at_strides[0], stride_at_c=at_strides[1], stride_at_n=at_strides[2],
        stride_q_b=q_strides[0], stride_q_c=q_strides[1], stride_q_n=q_strides[2],
        stride_q_h=q_strides[3],
        stride_k_p=k_cache.stride(0), stride_k_s=k_cache.stride(1), stride_k_h=k_cache.stride(2),
        stride_v_p=v_cache.stride(0), stride_v_s=v_cache.stride(1), stride_v_h=v_cache.stride(2),
        stride_rk_b=k_strides[0], stride_rk_c=k_strides[1], stride_rk_n=k_strides[2],
        stride_rk_h=k_strides[3],
        stride_rv_b=v_strides[0], stride_rv_c=v_strides[1], stride_rv_n=v_strides[2],
        stride_rv_h=v_strides[3],
        HKV=Hkv, G=Hq // Hkv, D=D, DV=Dv, PAGE=page, K_FORM=k_form, V_FORM=v_form,
        K_POINTER=k_scale[1] is not None, V_POINTER=v_scale[1] is not None,
        BLOCK=block, BRANCHED=branched, CAUSAL=causal[0], WINDOWED=window_size >= 0,
        CAPPED=softcap > 0, SIGN=sign, SPLITS=splits,
        BLOCK_D=max(power_of_two(D), 16), BLOCK_DV=max(power_of_two(Dv), 16),
    )  # fmt: skip


def _row_strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """Of [B, (K,) N, H, D] as (b, c, n, h); packed [total, H, D]."""
    strides = x.stride()
    if packed:
        return 0, 0, *strides[:2]
    return strides[:4] if x.dim() == 5 else (strides[0], 0, *strides[1:3])


def _number(pair: Pair) -> tuple[Any, int]:
    number, tensor = pair
    if tensor is None:
        return number, 0
    return tensor, tensor.stride(0) if tensor.dim() else 0


def _scale(pair: Pair) -> tuple[Any, tuple[int, int]]:
    """A cache's scale, None for 1, and its strides along requests and heads."""
    number, tensor = pair
    if tensor is None:
        return (None if number == 1.0 else float(number)), (0, 0)
    return tensor, ((0, 0), (0, *tensor.stride()), tensor.stride())[tensor.dim()]
