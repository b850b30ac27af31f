"""Merging states: the parts of a context together give the whole, whatever is empty or NaN."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_calls import FUZZ, make
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_attention import assert_close
from torch import Tensor

from pydecode import block_attention, branch_attention, merge_states, tree_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def oracle(outs: Tensor, lses: Tensor, t: Any = None, s: Any = None) -> tuple[Tensor, Tensor]:
    """One number at a time: outs [M, ..., N, H, D], lses [M, ..., H, N]."""
    M, D = outs.shape[0], outs.shape[-1]
    logs = lses.transpose(-1, -2).reshape(M, -1).double()
    values = outs.reshape(M, -1, D).double()
    out, lse = (
        torch.zeros(values.shape[1:]).double(),
        torch.full(logs.shape[1:], -math.inf).double(),
    )
    for r in range(logs.shape[1]):
        weight = {}
        for m in range(M):
            if logs[m, r] != -math.inf:
                factor = (1.0 if t is None else t[m].item()) * (1.0 if s is None else s[m].item())
                weight[m] = factor * logs[m, r].item()
        if weight:
            top = max(weight.values())
            total = sum(math.exp(w - top) for w in weight.values())
            lse[r] = top + math.log(total)
            for m, w in weight.items():
                out[r] += math.exp(w - top) / total * values[m, r]
    shape = outs.shape[1:]
    return out.view(shape), lse.view(shape[:-1]).transpose(-1, -2)


SHAPES = {
    "padded": ((2, 5, 4, 8), (2, 4, 5)),
    "packed": ((7, 4, 8), (4, 7)),
    "branches": ((2, 3, 5, 4, 8), (2, 3, 4, 5)),
    "one_value": ((1, 1, 1, 1), (1, 1, 1)),
    "zero_rows": ((2, 0, 4, 8), (2, 4, 0)),
    "zero_batch": ((0, 5, 4, 8), (0, 4, 5)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("M", [1, 2, 5])
@pytest.mark.parametrize("weighed", [False, True])
def test_against_the_oracle(shape: str, M: int, weighed: bool, backend: str) -> None:
    outs, lses = (torch.randn(M, *s, dtype=torch.float64) * 3 for s in SHAPES[shape])
    lses[torch.rand(lses.shape) < 0.3] = -torch.inf
    hidden = (lses == -torch.inf).transpose(-1, -2)
    t, s = (torch.rand(M) + 0.5, torch.rand(M) + 0.5) if weighed else (None, None)
    want = oracle(outs, lses, t, s)
    outs[hidden] = torch.nan  # what saw nothing is not heard
    for a, b in ((outs, lses), (list(outs), tuple(lses))):
        out, lse = merge_states(a, b, temperatures=t, scales=s, backend=backend)
        assert_close(out, want[0])
        assert_close(lse, want[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("into", ["nothing", "out", "out_lse", "memory", "part 0", "part 1"])
@pytest.mark.parametrize("compiled", [False, True])
def test_mask_and_out(shape: str, into: str, compiled: bool, backend: str) -> None:
    """Rows outside the mask are part 0's, bit for bit; what lies in ``out`` is not heard."""
    outs, lses = (torch.randn(3, *s) * 3 for s in SHAPES[shape])
    lses[torch.rand(lses.shape) < 0.3] = -torch.inf
    outs[(lses == -torch.inf).transpose(-1, -2)] = torch.nan
    mask = torch.rand(*outs.shape[1:-2], 2)[..., 1] < 0.5  # of any strides
    want = oracle(outs, lses)
    want = (
        torch.where(mask[..., None, None], want[0].float(), outs[0]),
        torch.where(mask.unsqueeze(-2), want[1].float(), lses[0]),
    )
    held = outs.clone(), lses.mT.contiguous().mT
    fresh = torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], 7.0)
    place: dict[str, Any] = {
        "out": dict(out=fresh[0]),
        "out_lse": dict(out_lse=fresh[1]),
        "memory": dict(out=fresh[0], out_lse=fresh[1]),
        "part 0": dict(out=held[0][0], out_lse=held[1][0]),
        "part 1": dict(out=held[0][1], out_lse=held[1][1]),
    }.get(into, {})

    def call(outs: Any, lses: Any, mask: Tensor, **place: Any) -> tuple[Tensor, Tensor]:
        return merge_states(outs, lses, mask=mask, backend=backend, **place)

    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    got = function([*held[0].unbind()], [*held[1].unbind()], mask, **place)
    for name, x, y in zip(("out", "out_lse"), got, want):
        torch.testing.assert_close(x, y, equal_nan=True)
        kept = ~mask[..., None, None] if name == "out" else ~mask.unsqueeze(-2)
        bits = [torch.where(kept, value, 0.0) for value in (x, y)]
        torch.testing.assert_close(*bits, rtol=0, atol=0, equal_nan=True)
        if name in place:
            assert compiled or x is place[name]
            torch.testing.assert_close(place[name], x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs, lses = torch.randn(3, 2, 5, 4, 8).to(dtype), torch.randn(3, 2, 4, 5).to(wide)
    out, lse = merge_states(outs, lses, backend=backend)
    want = oracle(outs, lses)
    assert out.dtype == dtype
    assert lse.dtype == wide
    # the plain formula in that dtype
    weights = torch.softmax(lses.to(dtype), 0).transpose(-1, -2)[..., None]
    assert_close(out, want[0], (weights * outs).sum(0))
    assert_close(lse, want[1], torch.logsumexp(lses, 0))


@pytest.mark.parametrize("log_base", [2.0, 10, math.e])
def test_sums_in_another_base(log_base: float, backend: str) -> None:
    """Given and returned in that base; the parts that see nothing see nothing in any."""
    outs, lses = (torch.randn(3, *s, dtype=torch.float64) for s in SHAPES["padded"])
    lses[torch.rand(lses.shape) < 0.3] = -torch.inf
    s = torch.rand(3) + 0.5
    want = merge_states(outs, lses, scales=s, backend=backend)
    given = lses / math.log(log_base)
    out, lse = merge_states(outs, given, scales=s, log_base=log_base, backend=backend)
    assert_close(out, want[0])
    assert_close(lse, want[1] / math.log(log_base))
    if log_base == math.e:
        assert torch.equal(lse, want[1])  # the default, bit for bit


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, -1.0), (1.0, 1.0)], ids=str)
def test_all_empty(weights: tuple[float, float], backend: str) -> None:
    """Whatever the weights: 0 * -inf is NaN, -1 * -inf is +inf."""
    outs, lses = torch.full((2, 1, 3, 2, 4), torch.nan), torch.full((2, 1, 2, 3), -torch.inf)
    out, lse = merge_states(outs, lses, scales=torch.tensor(weights), backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_one_part_is_itself(backend: str) -> None:
    outs, lses = torch.randn(1, 2, 5, 4, 8), torch.randn(1, 2, 4, 5)
    out, lse = merge_states(outs, lses, backend=backend)
    assert torch.equal(out, outs[0])
    assert torch.equal(lse, lses[0])
    assert out.data_ptr() != outs.data_ptr()


def test_large_logs_do_not_overflow(backend: str) -> None:
    outs, lses = torch.randn(2, 1, 1, 1, 4), torch.tensor([3e38, -3e38]).view(2, 1, 1, 1)
    for largest, order in enumerate(([0, 1], [1, 0])):
        out, lse = merge_states(outs[order], lses[order], backend=backend)
        assert torch.equal(out, outs[0]), largest
        assert torch.equal(lse, lses[0]), largest


def test_a_nan_stays_in_its_row(backend: str) -> None:
    outs, lses = torch.randn(2, 2, 5, 4, 8), torch.randn(2, 2, 4, 5)
    want = merge_states(outs, lses, backend=backend)
    outs[0, 1, 2, 3], lses[1, 0, 1, 4] = torch.nan, torch.nan
    out, lse = merge_states(outs, lses, backend=backend)
    for got, clean, bad in ((out, want[0], [(1, 2, 3), (0, 4, 1)]), (lse, want[1], [(0, 1, 4)])):
        kept = torch.ones_like(got, dtype=torch.bool)
        for index in bad:
            assert got[index].isnan().all()
            kept[index] = False
        assert torch.equal(got[kept], clean[kept])


def test_strides_and_batch_do_not_matter(backend: str) -> None:
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    want = merge_states(outs, lses, backend=backend)
    strided = outs.transpose(2, 3).contiguous().transpose(2, 3), lses.mT.contiguous().mT
    alone = merge_states(outs[:, 1:, 2:3], lses[:, 1:, :, 2:3], backend=backend)
    for i, got in enumerate(merge_states(*strided, backend=backend)):
        assert torch.equal(got, want[i])
    assert torch.equal(alone[0], want[0][1:, 2:3])
    assert torch.equal(alone[1], want[1][1:, :, 2:3])


@settings(FUZZ, max_examples=15)
@given(cuts=st.lists(st.integers(0, 16), max_size=4), seed=st.integers(0, 2**31))
def test_split_contexts_make_the_whole(cuts: list[int], seed: int, backend: str) -> None:
    """Empty parts included: a part between equal cuts saw nothing."""
    torch.manual_seed(seed)
    args, kwargs = make("block_attention", cache_seqlens=16)
    whole = block_attention(*args, **kwargs, return_lse=True, backend=backend)
    nothing = torch.zeros(1, 5, 5, dtype=torch.bool)
    parts = [
        block_attention(*args, **kwargs | {"cache_seqlens": 0}, return_lse=True, backend=backend)
    ]
    bounds = [0, *sorted(cuts), 16]
    for start, stop in pairwise(bounds):
        place = {"cache_starts": start, "cache_seqlens": stop, "mask": nothing}
        parts.append(block_attention(*args, **kwargs | place, return_lse=True, backend=backend))
    for got, want in zip(merge_states(*zip(*parts), backend=backend), whole):
        assert_close(got, want)


def test_packed_and_branch_results_merge(backend: str) -> None:
    """As attention returns them, whichever op it was."""
    args, kwargs = make("branch_attention", cache_seqlens=8)
    part = branch_attention(*args, **kwargs, return_lse=True, backend=backend)
    out, lse = merge_states([part[0]] * 2, [part[1]] * 2, backend=backend)
    assert_close(out, part[0])
    assert_close(lse, part[1] + math.log(2))
    args, kwargs = make("tree_attention", 1, cache_seqlens=8)
    args = [x if i in (1, 2) else x[0] for i, x in enumerate(args)]
    kwargs |= dict(cu_seqlens_q=torch.tensor([0, 5]), max_seqlen_q=5)
    part = tree_attention(*args, **kwargs, return_lse=True, backend=backend)
    out, lse = merge_states([part[0]] * 2, [part[1]] * 2, backend=backend)
    assert_close(out, part[0])
    assert_close(lse, part[1] + math.log(2))


O, L = torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 4, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "extras", "error", "message"),
    [
        ([], [], {}, ValueError, "outs: expected at least one part, got none"),
        (O[:0], L[:0], {}, ValueError, "outs: expected at least one part, got none"),
        (O, L[:1], {}, ValueError, "lses: expected 2 parts as outs, got 1"),
        (O, L.mT, {}, ValueError, r"lses\[0\]: expected shape"),
        ([O[0], O[0, :, :2]], L, {}, ValueError, r"outs\[1\]: expected shape"),
        ([O[0], O[0].double()], L, {}, TypeError, r"outs\[1\]: expected dtype float32"),
        (O, L.double(), {}, TypeError, r"lses\[0\]: expected dtype float32"),
        (O.double(), L, {}, TypeError, r"lses\[0\]: expected dtype float64"),
        (O.int(), L, {}, TypeError, "outs: expected dtype float16"),
        (O[..., 0, 0], L, {}, ValueError, "outs: expected parts"),
        (O[..., ::2], L, {}, ValueError, r"outs\[0\]: expected the last dimension contiguous"),
        ([O[0], 3], L, {}, TypeError, r"outs\[1\]: expected a tensor, got int"),
        (3, L, {}, TypeError, "outs: expected a tensor or tensors, got int"),
        (O, L, dict(scales=torch.ones(3)), ValueError, r"scales: expected shape \[M\]"),
        (O, L, dict(temperatures=0.9), TypeError, "temperatures: expected a tensor, got float"),
        (O, L, dict(mask=torch.ones(1, 3)), TypeError, "mask: expected dtype bool"),
        (O, L, dict(mask=torch.ones(3).bool()), ValueError, "mask: expected shape"),
        (O, L, dict(out=O), ValueError, "out: expected shape"),
        (O, L, dict(out=O[0].half()), TypeError, "out: expected dtype float32"),
        (O, L, dict(out=O.mT.contiguous().mT[0]), ValueError, "out: expected the last dim"),
        (O, L, dict(out_lse=L[0].mT), ValueError, "out_lse: expected shape"),
        (O, L, dict(out_lse=L[0].double()), TypeError, "out_lse: expected dtype float32"),
        (O, L, dict(log_base=1), ValueError, "log_base: expected a number above 1, got 1.0"),
        (O, L, dict(log_base=torch.tensor(2)), TypeError, "log_base: expected a number, got T"),
        (O, L, dict(backend="none"), ValueError, "backend: expected None or one of"),
    ],
)
def test_bad_arguments(
    outs: Any, lses: Any, extras: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_states(outs, lses, **extras)
