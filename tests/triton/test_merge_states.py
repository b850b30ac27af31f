"""Merging in Triton, interpreted, against the fp64 reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import merge_states
from pydecode.reference.merge_states import merge_states as reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = {
    "padded": (2, 5, 4, 80),
    "packed": (7, 3, 16),
    "branches": (2, 3, 5, 4, 8),
    "wide": (1, 3, 2, 300),
    "one_value": (1, 1, 1, 1),
    "more_than_a_program": (3, 65, 2, 64),
}


def parts(M: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A third of the rows saw nothing; their outs are NaN."""
    outs = torch.randn(M, *shape).to(dtype)
    lses = torch.randn(M, *shape[:-3], shape[-2], shape[-3]) * 5
    lses[torch.rand(lses.shape) < 0.3] = -torch.inf
    outs[(lses == -torch.inf).transpose(-1, -2)] = torch.nan
    return outs, lses


def exact(
    outs: Any, lses: Any, t: Any = None, s: Any = None, base: float = math.e, mask: Any = None
) -> Any:
    wide = ([x.double() for x in xs] for xs in (outs, lses))
    return reference(*wide, *(None if x is None else x.double() for x in (t, s)), mask, base)


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.reference import merge_states as module

    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(module, "merge_states", refuse)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("M", "dtype"), [(1, FP16), (2, FP32), (3, BF16), (5, FP16)], ids=str)
def test_against_the_reference(shape: str, M: int, dtype: torch.dtype) -> None:
    outs, lses = parts(M, SHAPES[shape], dtype)
    t, s = torch.rand(M) + 0.5, (torch.rand(M, dtype=torch.float64) + 0.5)[:, None][:, 0]
    for given in ({}, dict(temperatures=t), dict(temperatures=t.half(), scales=s)):
        base = 2.0 if given else math.e
        want = exact(outs, lses, given.get("temperatures"), given.get("scales"), base)
        got = merge_states(outs, lses, **given, log_base=base, backend="triton")
        assert got[0].dtype == dtype
        for x, y in zip(got, want):
            near = 4 * torch.finfo(x.dtype).eps * y.nan_to_num(0, 0, 0).abs().max().item()
            torch.testing.assert_close(x.double(), y, rtol=0, atol=near)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_are_not_merged(shape: str, in_place: bool) -> None:
    """They are part 0's, bit for bit, -inf and NaN included; into memory of any strides."""
    outs, lses = parts(3, SHAPES[shape], FP16)
    mask = torch.rand(*SHAPES[shape][:-2], 2)[..., 1] < 0.5
    first = torch.cat([outs[0], outs[0]], -1)[..., : outs.shape[-1]], lses[0].mT.contiguous().mT
    listed = [first[0], *outs[1:]], [first[1], *lses[1:]]
    whole = merge_states(*listed, log_base=2.0, backend="triton")
    out = dict(out=first[0], out_lse=first[1]) if in_place else {}
    kept = [x.clone() for x in (outs[0], lses[0])]
    # before the call: of one value, a transposed copy is the memory that is merged into
    want = exact(outs, lses, None, None, 2.0, mask)
    got = merge_states(*listed, mask=mask, log_base=2.0, backend="triton", **out)
    assert not in_place or (got[0] is first[0] and got[1] is first[1])
    for x, y, part, rows in zip(
        got, whole, kept, (mask[..., None, None], mask.unsqueeze(-2)), strict=True
    ):
        alike = torch.where(rows, y, part)
        torch.testing.assert_close(x, alike, rtol=0, atol=0, equal_nan=True)
    near = 4 * torch.finfo(FP16).eps * 4
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=near, equal_nan=True)


def test_lists_of_any_strides() -> None:
    """Parts that lie anywhere, each in its own layout; the same bits as stacked ones."""
    outs, lses = parts(3, (2, 5, 4, 16), FP32)
    want = merge_states(outs, lses, backend="triton")
    listed = [
        outs[0].transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([outs[1], outs[1]], -1)[..., 16:],
        outs[2].transpose(0, 1).contiguous().transpose(0, 1),
    ]
    logs = [lses[0].mT.contiguous().mT, lses[1], lses[2].repeat(1, 1, 2)[..., ::2][..., :5]]
    logs[2] = torch.stack([lses[2]] * 2, -1)[..., 0]
    got = merge_states(listed, logs, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, -1.0)], ids=str)
def test_all_empty(weights: tuple[float, float]) -> None:
    outs, lses = torch.full((2, 1, 3, 2, 4), torch.nan), torch.full((2, 1, 2, 3), -torch.inf)
    out, lse = merge_states(outs, lses, scales=torch.tensor(weights), backend="triton")
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for shape in ((2, 0, 4, 8), (0, 5, 4, 8)):
        out, lse = merge_states(*parts(2, shape, FP32), backend="triton")
        assert (out.shape, lse.shape) == (shape, (shape[0], 4, shape[1]))


def test_large_logs_and_nan() -> None:
    outs, lses = torch.randn(2, 1, 3, 2, 4), torch.tensor([3e38, -3e38]).view(2, 1, 1, 1)
    lses = lses.repeat(1, 1, 2, 3)
    lses[1, 0, 1, 2], outs[0, 0, 0, 0, 1] = torch.nan, torch.nan
    out, lse = merge_states(outs, lses, backend="triton")
    want = outs[0].clone()
    want[0, 2, 1] = torch.nan
    assert torch.equal(out.nan_to_num(7), want.nan_to_num(7))
    assert torch.isnan(lse).sum() == 1


def test_what_cannot_run() -> None:
    outs, lses = torch.zeros(2, 1, 3, 2, 4).double(), torch.zeros(2, 1, 2, 3).double()
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        merge_states(outs, lses, backend="triton")
