"""What follows the decode kernel: its splits put together, and a packed batch's rows of nobody."""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E


@triton.jit
def finish(m, l, acc, sink):
    """out and base-2 lse of sums whose base-2 maxima are m; a sink is one more logit."""
    top = m
    if sink is not None:
        top = tl.maximum(m, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    if sink is not None:
        shrink = tl.exp2(m - top)
        l = l * shrink + tl.exp2(sink - top)
        acc = acc * shrink[:, None]
    some = tl.where(l == 0, 1.0, l)
    return acc / some[:, None], tl.where(l == 0, -float("inf"), top + tl.log2(some))


@triton.jit
def claimed(token, cu, requests, rows, total):
    """Which rows of a packed batch one of the first ``requests`` requests has."""
    o_b = tl.arange(0, 32)
    found = token < 0
    for b in range(0, requests, 32):
        real = b + o_b < requests
        low = tl.load(cu + b + o_b, mask=real, other=0).to(tl.int64)
        high = tl.load(cu + b + o_b + 1, mask=real, other=0).to(tl.int64)
        good = (low >= 0) & (high <= total)
        high = tl.where(good, tl.minimum(high, low + rows), low)
        mine = (token[:, None] >= low[None, :]) & (token[:, None] < high[None, :])
        found = found | (tl.max(mine.to(tl.int32), 1) != 0)
    return found


@triton.jit(do_not_specialize=["rows", "total", "requests"])
def clear(
    out, lse, cu, rows, total, requests,
    HQ: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """0 and -inf for the rows of a packed batch that no request has, BLOCK of all a program."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    free = (token < total) & ~claimed(token, cu, requests, rows, total)
    o_v = tl.arange(0, BLOCK_DV)
    nothing = tl.zeros([BLOCK, BLOCK_DV], out.dtype.element_ty)
    for head in range(0, HQ * tl.max(free.to(tl.int32), 0)):
        at = (token * HQ + head)[:, None] * DV + o_v[None, :]
        tl.store(out + at, nothing, free[:, None] & (o_v < DV)[None, :])
        if lse is not None:
            tl.store(lse + (token * 0 + total) * head + token, -float("inf"), free)


@triton.jit(do_not_specialize=["size", "rows", "branch_length", "total", "requests"])
def combine(
    part_out, part_lse, out, lse, sinks, cu, size, rows, branch_length, total, requests,
    HQ: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the parts of ``size`` (row, head) pairs together, BLOCK of them a program."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_v = tl.arange(0, BLOCK_DV)
    inside = o < size
    head, token = (o % HQ).to(tl.int32), o // HQ
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(part_lse + o * SPLITS + s, mask=inside, other=0.0))
    valid = top != float("inf")
    if cu is not None:
        valid = claimed(token, cu, requests, rows, total)
    safe = tl.where((top == -float("inf")) | ~valid, 0.0, top)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for s in tl.static_range(SPLITS):
        part = tl.load(part_lse + o * SPLITS + s, mask=inside, other=0.0)
        there = inside & valid & (part != -float("inf"))
        weight = tl.exp2(part - safe)
        l += tl.where(there, weight, 0.0)
        at = part_out + (o * SPLITS + s)[:, None] * DV + o_v[None, :]
        x = tl.load(at, mask=there[:, None] & (o_v < DV)[None, :], other=0.0)
        acc += tl.where(there[:, None], x * weight[:, None], 0.0)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
    b_o, b_lse = finish(top, l, acc, sink)
    b_o = tl.where(valid[:, None], b_o, 0.0)
    v_mask = inside[:, None] & (o_v < DV)[None, :]
    tl.store(out + o[:, None] * DV + o_v[None, :], b_o.to(out.dtype.element_ty), v_mask)
    if lse is not None:
        o_lse = token // branch_length * HQ * branch_length + head * branch_length
        o_lse += token % branch_length
        if cu is not None:
            o_lse = head.to(tl.int64) * total + token
        tl.store(lse + o_lse, tl.where(valid, b_lse * LN2, -float("inf")), inside)
