"""Halves in rows that 16 does not divide: the tiles of 64 rows that sm_90 has for them alone."""

import functools
from typing import Any

import pytest
import torch
from attention_calls import cumulative, make, packed
from oracle_attention import verify

import pydecode

FP16, E4M3 = torch.float16, torch.float8_e4m3fn
TREE, BLOCK, BRANCH, RANKED = (f"{x}_attention" for x in ("tree", "block", "branch", "ranked"))
# of heads of 129 to 256 dims the tiles fill the registers: LEAN
WIDTHS = {"lean": (136, 200), "not lean": (24, 40)}
CONTEXT = torch.tensor([37, 0, 90])

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tree, window": (TREE, dict(mask="causal", window_size=9)),
    "tree, dense, scale < 0": (TREE, dict(paged=False, mask="causal", softmax_scale=-0.2)),
    "tree, scale 0": (TREE, dict(softmax_scale=0.0)),
    "tree, e4m3 in the cache": (
        TREE,
        dict(cache_dtype=E4M3, own=False, mask="causal", k_scale=0.5, v_scale=torch.rand(2) + 0.5),
    ),
    "block, hole": (BLOCK, dict(replace_at=torch.tensor([20, -1, 3]))),
    "block, starts": (BLOCK, dict(cache_starts=torch.tensor([2, 0, 30]), causal=True)),
    "branch, window": (BRANCH, dict(K=2, N=6, causal=True, window_size=20, replace_at=17)),
    "ranked": (RANKED, {}),
    "ranked, window, dense": (RANKED, dict(window_size=12, paged=False, softcap=2.0)),
    "ranked, e4m3": (RANKED, dict(cache_dtype=E4M3, k_scale=torch.rand(3, 2) + 0.5, v_scale=2.0)),
    "ranked, mask": (RANKED, dict(mask=torch.rand(3, 17, 96) < 0.5)),
}


@pytest.mark.parametrize(
    ("case", "width"),
    [(case, "lean") for case in CASES]
    + [(case, "not lean") for case in ("branch, window", "ranked, window, dense")],
)
def test_cases(case: str, width: str) -> None:
    op, more = CASES[case]
    given = dict(dtype=FP16, page_size=16, pages=6, cache_seqlens=CONTEXT, **more)
    given |= dict(cache_seqlens=CONTEXT.clamp(max=70)) if "own" in more else {}
    args, kwargs = make(
        op, **{"N": 17, "Hq": 4, "D": WIDTHS[width][0], "Dv": WIDTHS[width][1]} | given
    )
    if "block_table" in kwargs and op != RANKED:
        kwargs["block_table"][2, 1] = -1
    verify(op, args, kwargs, "triton")


@pytest.mark.parametrize("width", WIDTHS)
def test_packed(width: str) -> None:
    D, Dv = WIDTHS[width]
    counts = [3, 0, 17]
    for op in (TREE, BLOCK, RANKED):
        args, kwargs = make(
            op, 3, 17, 4, 2, D, Dv, dtype=FP16, page_size=16, cache_seqlens=CONTEXT.clamp(max=64)
        )
        args = [x if i in (1, 2) else packed(x, counts) for i, x in enumerate(args)]
        if op == RANKED:
            kwargs["q_rank"] = packed(kwargs["q_rank"], counts)
        verify(op, args, kwargs | dict(cu_seqlens_q=cumulative(counts), max_seqlen_q=17), "triton")


@pytest.mark.parametrize("op", [TREE, RANKED])
def test_bad_values_reach_those_that_see_them(op: str) -> None:
    sizes = dict(page_size=64, pages=1, paged=False, cache_seqlens=64)
    args, kwargs = make(op, 2, 17, 4, 2, 136, 200, dtype=FP16, **sizes)
    for at, bad in ((9, torch.nan), (40, torch.inf)):
        args[2][0, at, 1, 3] = bad
    more = dict(mask="causal", window_size=40) if op == TREE else dict(window_size=40)
    run = functools.partial(getattr(pydecode, op), *args, **kwargs, **more, return_lse=True)
    for got, want in zip(run(backend="triton"), run(backend="reference")):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert not run(backend="triton")[0].isfinite().all()


def test_which_tiles_they_have() -> None:
    """64 rows from 17 on, and never for fp32, whose products have no matrix units."""
    from pydecode.triton_kernels import decode_plan, ranked_attention

    for table, odd, few in (
        (decode_plan.CONFIGURATIONS, decode_key, ("half", 16)),
        (ranked_attention.CONFIGURATIONS, ranked_key, ("odd", 16)),
    ):
        for d in (64, 128, 256):
            key = odd(FP16, 17, d, "sm_90")
            entry = table[key]
            assert (entry["BM"], entry.get("LEAN", False)) == (64, d == 256)
            assert odd(FP16, 4096, d, "sm_90") == key
            assert odd(FP16, 16, d, "sm_90")[:2] == few
            for other in (odd(torch.float32, 64, d, "sm_90"), odd(FP16, 64, d, "sm_80")):
                assert other[1] == table[other]["BM"] == 16


def decode_key(dtype: torch.dtype, rows: int, d: int, arch: str) -> Any:
    from pydecode.triton_kernels.decode_plan import key_of

    keys = {key_of(dtype, rows, d, p, arch, rich, True) for p in (0, 16) for rich in (True, False)}
    assert len(keys) == 1
    return keys.pop()


def ranked_key(dtype: torch.dtype, rows: int, d: int, arch: str) -> Any:
    from pydecode.triton_kernels.ranked_attention import key_of

    keys = {key_of(dtype, same, d, rows, arch, True) for same in (True, False)}
    assert len(keys) == 1
    return keys.pop()
