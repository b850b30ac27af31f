"""Branch attention against the oracle, and against one block call a branch."""

from typing import Any

import pytest
import torch
from attention_calls import FUZZ, LAYOUTS, make
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_attention import assert_close, verify

import pydecode
from pydecode import block_attention, branch_attention

OP = "branch_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIXED = torch.tensor([True, False, True])
POSITIONS = torch.arange(45).view(3, 3, 5) * 7 % 20

# capacity 16, three requests of 3 branches of 5 rows
CASES: dict[str, dict[str, Any]] = {
    "after_the_context": dict(),
    "hole": dict(cache_seqlens=16, replace_at=torch.tensor([4, -1, 13])),
    "starts": dict(cache_seqlens=15, cache_starts=torch.tensor([0, 6, 15]), replace_at=7),
    "causal": dict(causal=True),
    "mixed": dict(causal=MIXED, cache_seqlens=16, replace_at=6),
    "ragged_branches": dict(num_branches=torch.tensor([3, 0, 2])),
    "int_branches": dict(num_branches=1, replace_at=3),
    "ragged_rows": dict(num_tokens=torch.tensor([5, 0, 2]), cache_seqlens=16, replace_at=6),
    "ragged_both": dict(num_tokens=torch.tensor([4, 5, 2]), num_branches=torch.tensor([1, 2, 3])),
    "window": dict(window_size=4, cache_seqlens=16, replace_at=torch.tensor([8, 2, -1])),
    "window_causal": dict(window_size=4, causal=MIXED, cache_seqlens=16, replace_at=8),
    "positions": dict(window_size=3, positions=POSITIONS, causal=MIXED),
    "shared_positions": dict(window_size=3, positions=POSITIONS[:, 1:2]),
    "not_paged": dict(paged=False, cache_seqlens=16, replace_at=6),
    "whole_cache": dict(cache_seqlens=None, replace_at=6),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=2.0, softmax_scale=0.4),
    "ragged_sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), num_tokens=2),
    "no_context": dict(cache_seqlens=0),
    "odd_head_dim": dict(D=7, Dv=1),
    "wide_head": dict(D=260, Dv=8, Hq=2, Hkv=1),
    "one_branch": dict(K=1, replace_at=3),
    "one_row": dict(N=1, K=7),
    "rows_64": dict(N=13, K=5, B=1, cache_seqlens=9),  # 65 rows in all
    "zero_rows": dict(N=0),
    "zero_batch": dict(B=0),
    "no_pages": dict(pages=0, cache_seqlens=0),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, backend: str) -> None:
    verify(OP, *make(OP, **CASES[case]), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(dtype: torch.dtype, causal: bool, backend: str) -> None:
    place = dict(cache_seqlens=16, replace_at=torch.tensor([8, 4, -1]), cache_starts=2)
    verify(OP, *make(OP, dtype=dtype, causal=causal, **place), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [None, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_layouts_and_fp8(layout: str, fp8: torch.dtype | None, backend: str) -> None:
    extras = dict(k_scale=torch.rand(3, 2) + 0.5, v_scale=torch.tensor(1.5)) if fp8 else {}
    place = dict(cache_seqlens=14, replace_at=4)
    verify(OP, *make(OP, layout=layout, cache_dtype=fp8, **place, **extras), backend)


@pytest.mark.parametrize("extras", [dict(), dict(replace_at=4, causal=MIXED), dict(window_size=3)])
def test_branches_are_separate_calls(extras: dict[str, Any], backend: str) -> None:
    args, kwargs = make(OP, **extras)
    q, k_cache, v_cache, k, v = args
    out, lse = branch_attention(*args, **kwargs, return_lse=True, backend=backend)
    for c in range(3):
        alone = (q[:, c], k_cache, v_cache, k[:, c], v[:, c])
        want = block_attention(*alone, **kwargs, return_lse=True, backend=backend)
        assert_close(out[:, c], want[0])
        assert_close(lse[:, c], want[1])


def test_a_branch_never_sees_a_sibling(backend: str) -> None:
    args, kwargs = make(OP)
    want = branch_attention(*args, **kwargs, backend=backend)
    for x in (args[0], args[3], args[4]):
        x[:, 1] = torch.nan
    got = branch_attention(*args, **kwargs, backend=backend)
    assert torch.equal(got[:, [0, 2]], want[:, [0, 2]])
    assert got[:, 1].isnan().all()


def test_no_branches(backend: str) -> None:
    args, kwargs = make(OP, K=0)
    out, lse = branch_attention(*args, **kwargs, return_lse=True, backend=backend)
    assert out.shape == (3, 0, 5, 4, 8)
    assert lse.shape == (3, 0, 4, 5)


def test_strided_branches(backend: str) -> None:
    """q, k, v as transposed views: [B, L, K, H, D] storage."""
    args, kwargs = make(OP)
    want = branch_attention(*args, **kwargs, backend=backend)
    for i in (0, 3, 4):
        args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(branch_attention(*args, **kwargs, backend=backend), want)


@settings(FUZZ, max_examples=15)
@given(data=st.data())
def test_random_branches(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, K, L = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    Hkv = draw(st.integers(1, 2))
    args, kwargs = make(
        *(OP, B, L, Hkv * draw(st.integers(1, 3)), Hkv, draw(st.integers(1, 9)), 3),
        K=K,
        page_size=draw(st.integers(1, 5)),
        paged=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        window_size=draw(st.none() | st.integers(1, 12)),
        causal=draw(st.booleans() | st.just(torch.rand(B) < 0.5)),
        replace_at=torch.randint(-1, 5, (B,)),
        num_branches=torch.randint(0, K + 1, (B,)),
    )
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(3, 5, 4, 16)), ValueError, "q: expected 5 dimensions"),
        (dict(k=None), TypeError, "k: expected a tensor, got NoneType"),
        (dict(v=torch.zeros(3, 3, 5, 2, 9)), ValueError, "v: expected shape .B, K, L, Hkv, Dv"),
        (dict(num_branches=4), ValueError, r"num_branches: expected an integer in \[0, 3\]"),
        (dict(num_branches=1.5), TypeError, "num_branches: expected an integer"),
        (dict(num_tokens=6), ValueError, r"num_tokens: expected an integer in \[0, 5\]"),
        (dict(positions=torch.zeros(3, 2, 5).long()), ValueError, "positions: expected shape"),
        (dict(causal="yes"), TypeError, "causal: expected a tensor, got str"),
        (dict(out=torch.zeros(3, 3, 5, 4, 9)), ValueError, "out: expected shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args, kwargs = make(OP)
    call = dict(zip(("q", "k_cache", "v_cache", "k", "v"), args)) | kwargs | change
    with pytest.raises(error, match=message):
        pydecode.branch_attention(**call)


def test_at_most_1024_rows() -> None:
    args, kwargs = make(OP, 1, 205, 1, 1, 4, 4, K=5)
    with pytest.raises(ValueError, match="q: expected at most 1024 rows in flight, got 1025"):
        branch_attention(*args, **kwargs)
