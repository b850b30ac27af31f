"""Tree attention against the oracle: masks, ragged and packed batches, caches, windows, sinks."""

from typing import Any

import pytest
import torch
from attention_calls import FUZZ, LAYOUTS, cumulative, make, packed, random_parents, tree_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_attention import assert_close, verify

import pydecode
from pydecode import tree_attention
from pydecode.trees.masks import pack_bits

OP = "tree_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own", "in_cache"])
@pytest.mark.parametrize("mask", ["causal", None, "bool", "shared"])
def test_dtypes_and_masks(dtype: torch.dtype, own: bool, mask: Any, backend: str) -> None:
    if mask in ("bool", "shared"):
        mask = torch.rand(3 if mask == "bool" else 1, 5, 5) < 0.5
    verify(OP, *make(OP, dtype=dtype, own=own, mask=mask), backend)


@pytest.mark.parametrize("N", [1, 63, 64, 65, 128])  # around the words of a packed mask
def test_packed_masks(N: int, backend: str) -> None:
    trees = torch.stack([tree_mask(random_parents(N)) for _ in range(2)])
    args, kwargs = make(OP, 2, N, 2, 1, 8, 8, page_size=3, mask=pack_bits(trees))
    verify(OP, args, kwargs, backend)
    # bits past N mean nothing
    noise = torch.full_like(kwargs["mask"], -1)
    noise[..., : N // 64] = 0
    noise[..., N // 64 :] <<= N % 64
    other = tree_attention(*args, **kwargs | {"mask": kwargs["mask"] | noise}, backend=backend)
    assert torch.equal(other, tree_attention(*args, **kwargs, backend=backend))


CASES: dict[str, dict[str, Any]] = {
    "not_paged": dict(paged=False),
    "odd_head_dim": dict(D=7, Dv=1),
    "head_dim_1": dict(D=1, Dv=3),
    "wide_head": dict(D=260, Dv=300, Hq=2, Hkv=1),
    "mha": dict(Hq=3, Hkv=3),
    "mqa": dict(Hq=5, Hkv=1),
    "page_of_one": dict(page_size=1, pages=9),
    "odd_pages": dict(page_size=5),
    "scale": dict(softmax_scale=0.7),
    "negative_scale": dict(softmax_scale=-0.5),
    "softcap": dict(softcap=1.5),
    "window": dict(window_size=3),
    "window_1": dict(window_size=1),
    "window_causal": dict(window_size=4, mask="causal"),
    "window_wide": dict(window_size=10**6, mask="causal"),
    "int_length": dict(cache_seqlens=6),
    "whole_cache": dict(cache_seqlens=None),
    "int32": dict(cache_seqlens=torch.tensor([3, 0, 9], dtype=torch.int32)),
    "exact_pages": dict(cache_seqlens=torch.tensor([4, 8, 16])),
    "around_pages": dict(cache_seqlens=torch.tensor([3, 5, 1])),
    "no_context": dict(cache_seqlens=0),
    "ragged": dict(num_tokens=torch.tensor([5, 0, 2])),
    "ragged_int": dict(num_tokens=3, mask="causal"),
    "zero_rows": dict(N=0),
    "zero_batch": dict(B=0),
    "no_pages": dict(pages=0, cache_seqlens=0),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, backend: str) -> None:
    verify(OP, *make(OP, **CASES[case]), backend)


# not where the rows would lie past the cache: test_hostile_attention.py has those
@pytest.mark.parametrize("case", sorted({*CASES} - {"whole_cache", "exact_pages", "no_pages"}))
def test_cases_with_rows_in_the_cache(case: str, backend: str) -> None:
    verify(OP, *make(OP, own=False, **CASES[case]), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
def test_layouts(layout: str, paged: bool, backend: str) -> None:
    verify(OP, *make(OP, layout=layout, paged=paged, mask="causal"), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(dtype: torch.dtype, backend: str) -> None:
    extras = dict(
        mask=torch.rand(3, 5, 5) < 0.5,
        num_tokens=torch.tensor([5, 4, 3]),
        positions=torch.randint(0, 20, (3, 5), dtype=torch.int32),
        window_size=5,
        softcap=2.0,
        sinks=torch.randn(4),
    )
    verify(OP, *make(OP, dtype=dtype, **extras), backend)


@pytest.mark.parametrize("ragged", [True, False])
def test_window_counts_ancestors(ragged: bool, backend: str) -> None:
    """Rows past num_tokens are no ancestors, whatever the mask says of them."""
    parents = random_parents(6)
    mask = tree_mask(parents)[None]
    args, kwargs = make(OP, N=6, mask=mask, window_size=4)
    if ragged:
        kwargs |= dict(num_tokens=torch.tensor([4, 6, 2]), mask=mask | (torch.arange(6) >= 4))
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize("sink", ["finite", "nobody_seen", "off"])
def test_sinks(sink: str, backend: str) -> None:
    sinks = torch.full((4,), -torch.inf) if sink == "off" else torch.randn(4)
    mask = torch.zeros(1, 5, 5, dtype=torch.bool) if sink == "nobody_seen" else None
    length = 0 if sink == "nobody_seen" else 6
    args, kwargs = make(OP, sinks=sinks, mask=mask, cache_seqlens=length)
    verify(OP, args, kwargs, backend)
    if sink == "nobody_seen":
        out, lse = tree_attention(*args, **kwargs, return_lse=True, backend=backend)
        assert (out == 0).all()
        assert torch.equal(lse, sinks.double()[:, None].expand(3, 4, 5))


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [None, (), (2,), (3, 2), "number"], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own", "in_cache"])
def test_fp8(fp8: torch.dtype, shape: Any, own: bool, backend: str) -> None:
    scales = [0.3, 1.7] if shape == "number" else [None, None]
    if isinstance(shape, tuple):
        scales = [torch.rand(shape) + 0.5, torch.rand(shape) + 0.5]
    extras = dict(k_scale=scales[0], v_scale=scales[1], mask="causal")
    verify(OP, *make(OP, cache_dtype=fp8, own=own, **extras), backend)


@pytest.mark.parametrize("kind", ["causal", None, "bool", "packed", "window", "in_cache"])
def test_packed_batch(kind: str | None, backend: str) -> None:
    counts = [3, 0, 5, 1]
    args, kwargs = make(OP, 4, 5, own=kind != "in_cache")
    args = [x if i in (1, 2) else packed(x, counts) for i, x in enumerate(args)]
    mask: Any = kind if kind in ("causal", None) else torch.rand(9, 5) < 0.5
    if kind == "window":
        kwargs |= dict(window_size=3, positions=torch.randint(0, 20, (9,)))
    if kind == "packed":
        mask = pack_bits(mask)
    kwargs |= dict(mask=mask, cu_seqlens_q=cumulative(counts), max_seqlen_q=5)
    verify(OP, args, kwargs, backend)


def test_max_rows(backend: str) -> None:
    """1024 rows run, and a chain of them is causal attention."""
    args, kwargs = make(OP, 1, 1024, 1, 1, 4, 4, dtype=torch.float32, mask="causal")
    chain = pack_bits(torch.ones(1, 1024, 1024, dtype=torch.bool).tril())
    want = tree_attention(*args, **kwargs, backend=backend)
    got = tree_attention(*args, **kwargs | {"mask": chain}, backend=backend)
    assert torch.equal(got, want)
    args, kwargs = make(OP, 1, 1025, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="q: expected at most 1024 rows in flight, got 1025"):
        tree_attention(*args, **kwargs, backend=backend)


def test_a_chain_tree_is_causal(backend: str) -> None:
    args, kwargs = make(OP, N=6)
    chain = tree_mask([-1, 0, 1, 2, 3, 4])[None]
    for window in (None, 4):
        results = [
            tree_attention(*args, **kwargs, mask=m, window_size=window, backend=backend)
            for m in (chain, pack_bits(chain), "causal")
        ]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])


def test_one_node_is_plain_decoding(backend: str) -> None:
    args, kwargs = make(OP, 1, 1, 4, 2, cache_seqlens=11, paged=False, own=False)
    q, k, v = (x.transpose(1, 2) for x in args)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, :12], v[:, :, :12], enable_gqa=True
    )
    for mask in (None, "causal", torch.ones(1, 1, 1, dtype=torch.bool)):
        assert_close(
            tree_attention(*args, **kwargs, mask=mask, backend=backend).transpose(1, 2), want
        )


def test_all_true_mask_is_none(backend: str) -> None:
    args, kwargs = make(OP)
    full = torch.ones(1, 5, 5, dtype=torch.bool)
    want = tree_attention(*args, **kwargs, backend=backend)
    assert torch.equal(tree_attention(*args, **kwargs, mask=full, backend=backend), want)


@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_random_trees(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, N = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    masks = torch.stack([tree_mask(random_parents(N)) for _ in range(B)])
    args, kwargs = make(
        *(OP, B, N, Hkv * group, Hkv, draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        page_size=draw(st.integers(1, 5)),
        pages=draw(st.integers(0, 4)),
        paged=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        mask=pack_bits(masks) if draw(st.booleans()) else masks,
        num_tokens=draw(st.none() | st.just(torch.randint(0, N + 1, (B,)))),
        window_size=draw(st.none() | st.integers(1, 12)),
    )
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask="tree"), ValueError, 'mask: expected a tensor, "causal" or None'),
        (dict(mask=torch.ones(3, 5, 4, dtype=torch.bool)), ValueError, "mask: expected shape"),
        (dict(mask=torch.ones(3, 5, 5)), TypeError, "mask: expected dtype bool, int64"),
        (dict(k=None), ValueError, "k, v: expected both or neither"),
        (dict(k=None, v=None, cache_seqlens=None), ValueError, "cache_seqlens: expected lengths"),
        (
            dict(positions=torch.zeros(3, 4, dtype=torch.int64)),
            ValueError,
            "positions: expected sh",
        ),
        (dict(cu_seqlens_q=torch.tensor([0, 5])), ValueError, "q: expected 3 dimensions"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args, kwargs = make(OP)
    call = dict(zip(("q", "k_cache", "v_cache", "k", "v"), args)) | kwargs | change
    with pytest.raises(error, match=message):
        pydecode.tree_attention(**call)
