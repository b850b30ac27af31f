"""Small Triton kernels that keep the static report's rule, laid out as a real kernel's module."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from pydecode.triton_kernels.static_call import StaticCall

CONFIGURATIONS: dict[Any, dict[str, Any]] = {
    ("bfloat16", 16): dict(BM=16, BN=64, D=64, num_warps=4, num_stages=3),
    ("bfloat16", 64): dict(BM=64, BN=64, D=64, num_warps=4, num_stages=3),
    ("float32", 16): dict(BM=16, BN=32, D=64, num_warps=4, num_stages=3),
    "row": dict(BLOCK=4096, MASKED=False, num_warps=4),
    "box": dict(BM=64, BN=64, D=64, num_warps=4, num_stages=3),
}


@triton.jit
def add(a, b):
    return a + b


@triton.jit(do_not_specialize=["rows"])
def scores(
    q,
    k,
    out,
    rows,
    stride_q,
    stride_k,
    stride_out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """out[BM, BN] = sum over tiles of k of q k^T: a main loop that streams k."""
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    b_q = tl.load(q + o_m[:, None] * stride_q + o_d[None, :])
    b_s = tl.zeros([BM, BN], tl.float32)
    for i_n in range(0, rows, BN):
        o_k = i_n + o_n
        b_k = tl.load(k + o_k[:, None] * stride_k + o_d[None, :], mask=o_k[:, None] < rows, other=0)
        b_s = add(b_s, tl.dot(b_q, tl.trans(b_k), input_precision="ieee"))
    tl.store(out + o_m[:, None] * stride_out + o_n[None, :], b_s)


@triton.jit(do_not_specialize=["n"])
def total(x, out, n, stride_x, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """out[row] = sum of x[row, :n]: nothing but a streamed row.

    A mask against an n of unknown divisibility splits every load into single elements, so only the
    last block may have one; MASKED has it on all.
    """
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    b = tl.zeros([BLOCK], tl.float32)
    whole = 0 if MASKED else n // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        b += tl.load(x + row * stride_x + i + o).to(tl.float32)
    for i in range(whole, n, BLOCK):
        b += tl.load(x + row * stride_x + i + o, mask=i + o < n, other=0).to(tl.float32)
    tl.store(out + row, tl.sum(b))


@triton.jit(do_not_specialize=["rows"])
def boxes(q, k, out, rows, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """``scores`` by tensor descriptors: bulk copies."""
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    b_q = tl.load(q + o_m[:, None] * D + o_d[None, :])
    box = tl.make_tensor_descriptor(k, [rows, D], [D, 1], [BN, D])
    b_s = tl.zeros([BM, BN], tl.float32)
    for i_n in range(0, rows, BN):
        b_s = tl.dot(b_q, tl.trans(box.load([i_n, 0])), b_s)
    tl.store(out + o_m[:, None] * BN + o_n[None, :], b_s)


def score_arguments(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
    return dict(
        q=q,
        k=k,
        out=out,
        rows=k.shape[0],
        stride_q=q.stride(0),
        stride_k=k.stride(0),
        stride_out=out.stride(0),
    )


def launch_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The launcher: reads the table by dtype and M."""
    entry = CONFIGURATIONS[str(q.dtype).removeprefix("torch."), q.shape[0]]
    out = torch.empty(entry["BM"], entry["BN"], device=q.device)
    scores[(1,)](**score_arguments(q, k, out), **entry)
    return out


def example_scores(dtype: torch.dtype, m: int, *, width: int = 64) -> dict[str, Any]:
    """As a call with one key-value head sees a cache of 999 rows; ``width`` 65 makes it odd."""
    q, k = (torch.empty(n, width, dtype=dtype, device="meta") for n in (m, 999))
    return score_arguments(q[:, :64], k[:, :64], torch.empty(m, 64, device="meta"))


def example_total(width: int) -> dict[str, Any]:
    x = torch.empty(8, width, dtype=torch.bfloat16, device="meta")
    return dict(x=x, out=torch.empty(8, device="meta"), n=5000, stride_x=x.stride(0))


def static_calls(arch: str) -> Iterator[StaticCall]:
    bf16, fp32 = torch.bfloat16, torch.float32
    tile = 64 * 64 * 2  # bytes of k that one turn reads
    for m in (16, 64):
        key = ("bfloat16", m)
        yield StaticCall(scores, key, example_scores(bf16, m), bf16, m, streamed=tile)
    key = ("float32", 16)
    yield StaticCall(scores, key, example_scores(fp32, 16), fp32, 16, streamed=tile)
    odd = example_scores(fp32, 16, width=65)  # copied by 4 bytes, still asynchronously
    yield StaticCall(scores, key, odd, fp32, 16, aligned=False, note="odd stride")
    yield StaticCall(total, "row", example_total(8192), bf16, streamed=8192)
    if arch == "sm_90":
        box = {k: v for k, v in example_scores(bf16, 64).items() if "stride" not in k}
        yield StaticCall(boxes, "box", box, bf16, 64, streamed=tile)
