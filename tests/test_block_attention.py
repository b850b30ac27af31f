"""Block attention against the oracle: holes, starts, causal requests, windows, the dual cache."""

from typing import Any

import pytest
import torch
from attention_calls import FUZZ, LAYOUTS, cumulative, make, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_attention import assert_close, verify

import pydecode
from pydecode import block_attention, tree_attention
from pydecode.trees.masks import pack_bits

OP = "block_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIXED = torch.tensor([True, False, True])
BITS = torch.arange(75).view(3, 5, 5) ** 2 % 7 < 3

# capacity 16, blocks of 5 rows, three requests
CASES: dict[str, dict[str, Any]] = {
    "after_the_context": dict(),
    "hole_inside": dict(cache_seqlens=torch.tensor([16, 12, 9]), replace_at=4),
    "hole_at_0": dict(cache_seqlens=16, replace_at=0),
    "hole_at_the_end": dict(cache_seqlens=16, replace_at=11),
    "hole_past_the_length": dict(cache_seqlens=9, replace_at=torch.tensor([7, 9, 12])),
    "hole_past_the_cache": dict(cache_seqlens=16, replace_at=torch.tensor([13, 15, 16])),
    "some_holes": dict(cache_seqlens=14, replace_at=torch.tensor([3, -1, -7])),
    "no_hole": dict(replace_at=-1),
    "starts": dict(cache_seqlens=15, cache_starts=torch.tensor([0, 6, 15]), replace_at=7),
    "start_in_the_hole": dict(cache_seqlens=15, cache_starts=9, replace_at=7),
    "start_past_the_length": dict(cache_seqlens=4, cache_starts=10),
    "causal": dict(causal=True),
    "causal_hole": dict(causal=True, cache_seqlens=16, replace_at=6),
    "mixed": dict(causal=MIXED, cache_seqlens=16, replace_at=torch.tensor([6, 6, -1])),
    "causal_0d": dict(causal=torch.tensor(True)),
    "not_causal_with_mask": dict(causal=False, mask=BITS, replace_at=3),
    "mask": dict(mask=BITS[1:2], cache_seqlens=16, replace_at=2),
    "packed_mask": dict(mask=pack_bits(BITS)),
    "window": dict(window_size=4, cache_seqlens=16, replace_at=torch.tensor([8, 2, -1])),
    "window_causal": dict(window_size=4, causal=MIXED, cache_seqlens=16, replace_at=8),
    "window_starts": dict(window_size=4, cache_seqlens=16, cache_starts=6, replace_at=8),
    "window_1": dict(window_size=1, causal=MIXED),
    "positions": dict(
        window_size=4,
        causal=MIXED,
        positions=torch.arange(15).view(3, 5) * 7 % 20,
        cache_seqlens=16,
        replace_at=8,
    ),
    "ragged": dict(num_tokens=torch.tensor([5, 0, 2]), cache_seqlens=16, replace_at=6),
    "ragged_causal": dict(num_tokens=torch.tensor([4, 1, 2]), causal=MIXED, replace_at=3),
    "not_paged": dict(paged=False, cache_seqlens=16, replace_at=6),
    "whole_cache": dict(cache_seqlens=None, replace_at=torch.tensor(6, dtype=torch.int32)),
    "sinks": dict(
        sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=2.0, softmax_scale=0.4, replace_at=3
    ),
    "no_context": dict(cache_seqlens=0),
    "odd_head_dim": dict(D=7, Dv=1, replace_at=3, cache_seqlens=12),
    "wide_head": dict(D=260, Dv=8, Hq=2, Hkv=1, replace_at=3),
    "page_of_one": dict(page_size=1, pages=9, replace_at=3, cache_seqlens=9),
    "zero_rows": dict(N=0, replace_at=2),
    "zero_batch": dict(B=0, replace_at=2),
    "no_pages": dict(pages=0, cache_seqlens=0),
}
# where the block's rows, read from the cache, would not lie in it
OUTSIDE = ("whole_cache", "hole_past_the_cache", "no_pages")


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, backend: str) -> None:
    verify(OP, *make(OP, **CASES[case]), backend)


@pytest.mark.parametrize("case", sorted({*CASES} - {*OUTSIDE}))
def test_cases_with_rows_in_the_cache(case: str, backend: str) -> None:
    verify(OP, *make(OP, own=False, **{"cache_seqlens": 11, **CASES[case]}), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own", "in_cache"])
def test_dtypes(dtype: torch.dtype, own: bool, backend: str) -> None:
    place = dict(cache_seqlens=16, replace_at=torch.tensor([8, 4, 11]), cache_starts=2)
    verify(OP, *make(OP, dtype=dtype, own=own, causal=MIXED, **place), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [None, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_layouts_and_fp8(layout: str, fp8: torch.dtype | None, backend: str) -> None:
    extras = dict(k_scale=torch.rand(2) + 0.5, v_scale=1.5) if fp8 else {}
    place = dict(cache_seqlens=14, replace_at=4)
    verify(OP, *make(OP, layout=layout, cache_dtype=fp8, **place, **extras), backend)


@pytest.mark.parametrize("L", [1, 32, 64, 65])
def test_block_lengths(L: int, backend: str) -> None:
    place = dict(cache_seqlens=torch.tensor([99, 40]), replace_at=torch.tensor([20, -1]))
    verify(OP, *make(OP, 2, L, 2, 1, 8, 8, page_size=9, pages=12, **place), backend)


@pytest.mark.parametrize("kind", ["plain", "hole", "causal", "mask", "window", "in_cache"])
def test_packed_batch(kind: str, backend: str) -> None:
    counts = [3, 0, 5, 1]
    args, kwargs = make(OP, 4, 5, own=kind != "in_cache", cache_seqlens=11)
    args = [x if i in (1, 2) else packed(x, counts) for i, x in enumerate(args)]
    extras: dict[str, dict[str, Any]] = {
        "hole": dict(replace_at=torch.tensor([4, 2, 5, -1])),
        "causal": dict(causal=torch.tensor([True, True, False, False]), replace_at=3),
        "mask": dict(mask=torch.rand(9, 5) < 0.5),
        "window": dict(window_size=3, positions=torch.randint(0, 20, (9,))),
    }
    kwargs |= dict(cu_seqlens_q=cumulative(counts), max_seqlen_q=5, **extras.get(kind, {}))
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize("own", [True, False], ids=["own", "in_cache"])
def test_dual_cache_is_the_cache_with_the_block_written_in(own: bool, backend: str) -> None:
    """The reason for the hole: attention over the hole equals plain attention after a write."""
    args, kwargs = make(OP, paged=False, cache_seqlens=16, replace_at=6)
    q, k_cache, v_cache, k, v = args
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache[:, 6:11] = rows if not own else torch.nan  # stale: nobody may look
    got = block_attention(q, k_cache, v_cache, *([k, v] if own else []), **kwargs, backend=backend)
    k_cache[:, 6:11], v_cache[:, 6:11] = k, v
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)), enable_gqa=True
    )
    assert_close(got, want.transpose(1, 2))


def test_without_a_hole_it_is_tree_attention(backend: str) -> None:
    args, kwargs = make(OP)
    for causal in (False, True):
        want = tree_attention(*args, **kwargs, mask="causal" if causal else None, backend=backend)
        got = block_attention(*args, **kwargs, causal=causal, backend=backend)
        assert torch.equal(got, want)


def test_a_mixed_batch_is_its_requests(backend: str) -> None:
    args, kwargs = make(OP, cache_seqlens=16, replace_at=5)
    mixed = block_attention(*args, **kwargs, causal=MIXED, backend=backend)
    for causal in (False, True):
        all_alike = block_attention(*args, **kwargs, causal=causal, backend=backend)
        assert torch.equal(mixed[causal == MIXED], all_alike[causal == MIXED])


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_random_blocks(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, L, Hkv = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 2))
    args, kwargs = make(
        *(OP, B, L, Hkv * draw(st.integers(1, 3)), Hkv, draw(st.integers(1, 9)), 3),
        page_size=draw(st.integers(1, 5)),
        pages=draw(st.integers(1, 4)),
        paged=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        window_size=draw(st.none() | st.integers(1, 12)),
        num_tokens=draw(st.none() | st.just(torch.randint(0, L + 1, (B,)))),
        causal=draw(st.booleans() | st.just(torch.rand(B) < 0.5)),
    )
    capacity = args[1].shape[1] * (kwargs["block_table"].shape[1] if "block_table" in kwargs else 1)
    kwargs["replace_at"] = torch.randint(-1, capacity + 1, (B,))
    kwargs["cache_starts"] = torch.randint(0, capacity + 1, (B,))
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask="causal"), ValueError, "mask: expected a tensor or None .see causal=True"),
        (dict(causal=1), TypeError, "causal: expected a tensor, got int"),
        (dict(causal=torch.ones(2, dtype=torch.bool)), ValueError, r"causal: expected shape \[B\]"),
        (dict(causal=torch.ones(3)), TypeError, "causal: expected dtype bool"),
        (dict(replace_at=-2), ValueError, r"replace_at: expected an integer in \[-1, 16\], got -2"),
        (dict(replace_at=17), ValueError, "replace_at: expected an integer"),
        (
            dict(replace_at=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "replace_at: expected 0-d",
        ),
        (dict(cache_starts=-1), ValueError, "cache_starts: expected an integer"),
        (dict(cache_starts=torch.zeros(3)), TypeError, "cache_starts: expected dtype int32, int64"),
        (dict(k=None, v=None, cache_seqlens=None), ValueError, "cache_seqlens: expected lengths"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args, kwargs = make(OP)
    call = dict(zip(("q", "k_cache", "v_cache", "k", "v"), args)) | kwargs | change
    with pytest.raises(error, match=message):
        pydecode.block_attention(**call)


@pytest.mark.parametrize("causal", [True, torch.tensor(False), MIXED], ids=str)
def test_mask_and_causal_exclude_each_other(causal: Any) -> None:
    args, kwargs = make(OP, mask=torch.ones(1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask, causal: expected at most one of them, got both"):
        block_attention(*args, **kwargs, causal=causal)
