"""``compat.flashinfer.merge`` against FlashInfer's semantics: base 2, empty states, in place."""

import math

import numpy as np
import peer_flashinfer as peer
import pytest
import torch
from torch import Tensor

import pydecode
from pydecode.compat.flashinfer import merge_state, merge_state_in_place, merge_states

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def states(n: int, M: int, H: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, M, H, D] and base-2 sums, some of them of nothing."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    v, s = torch.randn(n, M, H, D, dtype=dtype), 20 * torch.randn(n, M, H, dtype=wide)
    return v, s.masked_fill(torch.rand(n, M, H) < 0.3, -torch.inf)


def expected(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    n, _, H, D = v.shape
    out, lse = np.zeros((n, H, D)), np.zeros((n, H))
    a, b = v.double().numpy(), s.double().numpy()
    for i in range(n):
        for h in range(H):
            out[i, h], lse[i, h] = peer.merge(list(a[i, :, h]), b[i, :, h].tolist())
    return torch.from_numpy(out), torch.from_numpy(lse)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    small = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got[0].double(), want[0], rtol=small, atol=small)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got[1].double(), want[1], rtol=tight, atol=tight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 3, 8), (1, 1, 1), (0, 2, 4)])
def test_merge_state(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    n, H, D = shape
    v, s = states(n, 2, H, D, dtype)
    got = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    close(got, expected(v, s), dtype)
    assert (got[0].dtype, got[1].dtype) == (dtype, s.dtype)
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()
    if n > 1:  # sums taken as natural ones are noticed
        with pytest.raises(AssertionError):
            close(got, expected(v, s / math.log(2)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [0, 1, 2, 5])
def test_merge_states(dtype: torch.dtype, M: int) -> None:
    v, s = states(20, M, 3, 8, dtype)
    got = merge_states(v, s)
    assert got[1].dtype == s.dtype
    if M:
        close(got, expected(v, s), dtype)
        assert got[1].is_contiguous()
    else:
        assert (got[0] == 0).all()
        assert (got[1] == -torch.inf).all()
        assert got[0].shape == (20, 3, 8)
        assert got[1].shape == (20, 3)


@pytest.mark.parametrize("mask", [None, torch.bool, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(mask: torch.dtype | None, dtype: torch.dtype) -> None:
    v, s = states(30, 2, 3, 8, dtype)
    (a, b), (s_a, s_b) = (x.clone().unbind(1) for x in (v, s))
    want_v, want_s = merge_state(a, s_a, b, s_b)
    chosen = torch.rand(30) < 0.5 if mask is not None else torch.ones(30, dtype=torch.bool)
    a[~chosen, 0, 0] = torch.nan  # what is not merged keeps its bits
    held_v, held_s = a.clone(), s_a.clone()
    result = merge_state_in_place(a, s_a, b, s_b, None if mask is None else chosen.to(mask))
    assert result is None
    assert torch.equal(a[chosen], want_v[chosen])
    assert torch.equal(s_a[chosen], want_s[chosen])
    torch.testing.assert_close(a[~chosen], held_v[~chosen], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(s_a[~chosen], held_s[~chosen])
    assert torch.equal(b, v[:, 1])
    assert torch.equal(s_b, s[:, 1])


def test_an_empty_state_may_hold_nan() -> None:
    """0 times NaN is NaN in a port that multiplies."""
    v, s = torch.full((1, 1, 2), torch.nan), torch.full((1, 1), -torch.inf)
    other, log = torch.ones(1, 1, 2), torch.zeros(1, 1)
    for got in (merge_state(v, s, other, log), merge_state(other, log, v, s)):
        assert torch.equal(got[0], other)
        assert torch.equal(got[1], log)
    nothing = merge_state(v, s, v, s)
    assert (nothing[0] == 0).all()
    assert (nothing[1] == -torch.inf).all()


def test_sums_of_another_dtype_are_updated() -> None:
    """Theirs updates an fp32 copy, and the caller's bf16 sums stand still."""
    v, s = torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.bfloat16)
    merge_state_in_place(v, s, 3 * v, s.clone())
    assert s.tolist() == [[1.0]]
    assert v.tolist() == [[[2.0, 2.0]]]


def test_two_halves_of_a_context() -> None:
    """What it is for: attention over A and over B, in base 2, is attention over both."""
    q, k, v = (torch.randn(1, n, 4, 16, dtype=torch.float64) for n in (5, 12, 12))
    see = dict(q_rank=torch.zeros(1, 5).int(), return_lse=True)

    def attend(a: int, b: int) -> tuple[Tensor, Tensor]:
        ranks = torch.zeros(1, b - a).int()
        out, lse = pydecode.ranked_attention(q, k[:, a:b], v[:, a:b], k_rank=ranks, **see)
        return out[0], lse[0].T / math.log(2)  # [H, n] natural -> [n, H] base 2, a view

    got = merge_state(*attend(0, 7), *attend(7, 12))
    for x, y in zip(got, attend(0, 12)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_errors() -> None:
    v, s = states(4, 2, 3, 8, torch.float32)
    with pytest.raises(ValueError, match=r"v, s: expected \[n, M, H, D\]"):
        merge_states(v, s[:, :1])
    with pytest.raises(ValueError, match=r"mask: expected \[n\] = \[4\]"):
        merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1], torch.ones(3).bool())
    with pytest.raises(ValueError, match="expected shape"):
        merge_state(v[:, 0], s[:, 0], v[:2, 1], s[:, 1])
    with pytest.raises(ValueError, match=r"v, s, s: expected \[n, H, D\], \[n, H\]"):
        merge_state(v[:, 0], s[:, 0].T, v[:, 1], s[:, 1])
