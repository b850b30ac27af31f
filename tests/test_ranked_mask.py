"""``ranked_attention(mask=...)``: any mask, beside the ranks or alone; bool or bits; any size."""

from typing import Any

import pytest
import torch
from attention_calls import FUZZ, LAYOUTS, cumulative, make, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_attention import assert_close, verify
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pydecode
from pydecode.trees.masks import pack_bits

OP = "ranked_attention"
FORMS = ("bool", "bits")


def in_form(mask: Tensor, form: str) -> Tensor:
    """As bool, or packed with every bit past the last key set: they say nothing."""
    if form == "bool":
        return mask
    spare = -mask.shape[-1] % 64
    return pack_bits(torch.nn.functional.pad(mask, (0, spare), value=True))


def coins(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.5


# three requests, 5 queries, a capacity of 16 keys
CASES: dict[str, dict[str, Any]] = {
    "paged": dict(),
    "padded": dict(paged=False),
    "strict": dict(strict=True),
    "all_keys": dict(cache_seqlens=None),
    "more_than_a_word": dict(page_size=7, pages=19),
    "window": dict(window_size=6),
    "ragged": dict(num_tokens=torch.tensor([5, 0, 2]), cache_seqlens=torch.tensor([16, 7, 1])),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=1.5),
    "zero_rows": dict(N=0),
    "zero_batch": dict(B=0),
    "no_keys": dict(pages=0, cache_seqlens=None),
}


def masked(
    form: str, *, alone: bool = False, shared: bool = False, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    args, kwargs = make(OP, **options)
    B, N = args[0].shape[:2]
    kwargs["mask"] = in_form(coins(1 if shared else B, N, kwargs["k_rank"].shape[1]), form)
    if alone:
        del kwargs["q_rank"], kwargs["k_rank"]
    return args, kwargs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, form: str, backend: str) -> None:
    verify(OP, *masked(form, **CASES[case]), backend)
    verify(OP, *masked(form, shared=True, **CASES[case]), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [c for c in CASES if c != "strict"])
def test_the_mask_alone(case: str, form: str, backend: str) -> None:
    args, kwargs = masked(form, alone=True, **CASES[case])
    verify(OP, args, kwargs, backend)
    if form == "bool" and args[0].shape[0] and kwargs["mask"].shape[-1]:
        kwargs["mask"] = kwargs["mask"][..., :7]  # narrower than the cache
        if "block_table" in kwargs:
            kwargs["cache_seqlens"] = torch.tensor([7, 0, 4])
            verify(OP, args, kwargs, backend)
        else:
            with pytest.raises(ValueError, match="mask: expected shape"):
                pydecode.ranked_attention(*args, **kwargs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", ["packed", "paged", "padded"])
@pytest.mark.parametrize("alone", [False, True], ids=["ranks", "alone"])
def test_packed_queries(keys: str, form: str, alone: bool, backend: str) -> None:
    """Column j is the request's own key j."""
    queries = [3, 0, 5, 1]
    args, kwargs = masked("bool", alone=alone, B=4, paged=keys == "paged")
    kwargs["mask"] = in_form(packed(kwargs["mask"], queries), form)
    args[0] = packed(args[0], queries)
    kwargs |= dict(cu_seqlens_q=cumulative(queries), max_seqlen_q=5)
    if keys == "packed":
        lengths = kwargs.pop("cache_seqlens").tolist()
        args[1:] = [packed(x, lengths) for x in args[1:]]
        kwargs |= dict(cu_seqlens_k=cumulative(lengths), max_seqlen_k=16)
    if not alone:
        kwargs["q_rank"] = packed(kwargs["q_rank"], queries)
        if keys == "packed":
            kwargs["k_rank"] = packed(kwargs["k_rank"], lengths)
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "S"), [(3, 1500), (1100, 1300), (64, 64), (1, 1)])
def test_sdpa_under_any_mask(N: int, S: int, form: str, backend: str) -> None:
    """No limit of 1024 on either side, which ``tree_attention`` has."""
    q, k, v = (torch.randn(2, n, h, 4, dtype=torch.float64) for n, h in ((N, 2), (S, 1), (S, 1)))
    mask = coins(2, N, S)
    mask[..., 0] = True  # SDPA gives NaN where nothing is seen
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = scaled_dot_product_attention(*heads, attn_mask=mask[:, None], enable_gqa=True)
    got = pydecode.ranked_attention(q, k, v, mask=in_form(mask, form), backend=backend)
    assert_close(got.transpose(1, 2), want)


def test_a_mask_that_says_what_the_ranks_say(backend: str) -> None:
    """Bit for bit: ranks, a bool mask and bits; and a mask of ones beside the ranks."""
    args, kwargs = make(OP, dtype=torch.float32, sinks=torch.randn(4), return_lse=True)
    want = pydecode.ranked_attention(*args, **kwargs, backend=backend)
    q_rank, k_rank = kwargs.pop("q_rank"), kwargs.pop("k_rank")
    mask = k_rank[:, None] <= q_rank[..., None]
    ones = torch.ones_like(mask[:1])
    for more in (
        dict(mask=mask),
        dict(mask=in_form(mask, "bits")),
        dict(mask=ones, q_rank=q_rank, k_rank=k_rank),
    ):
        got = pydecode.ranked_attention(*args, **kwargs, **more, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [[1], [2, 0], [0, 0, 2, 1]], ids=str)
def test_a_request_alone_or_in_any_batch(order: list[int], form: str, backend: str) -> None:
    args, kwargs = masked(form, dtype=torch.float32, return_lse=True)
    want = pydecode.ranked_attention(*args, **kwargs, backend=backend)
    args[0] = args[0][order]
    kwargs = {n: x[order] if isinstance(x, Tensor) else x for n, x in kwargs.items()}
    got = pydecode.ranked_attention(*args, **kwargs, backend=backend)
    assert all(torch.equal(x, y[order]) for x, y in zip(got, want))


def test_strides(backend: str) -> None:
    """Views of a larger mask, also one expanded over requests and queries."""
    args, kwargs = masked("bool", dtype=torch.float32)
    large = coins(3, 2, 5, 40)
    for view in (
        large[:, 1, :, 8:24],
        large[:1, 1, :, 3:19],
        large[:, 0, :1, :16].expand(3, 5, 16),
    ):
        kwargs["mask"] = view.contiguous()
        want = pydecode.ranked_attention(*args, **kwargs, backend=backend)
        kwargs["mask"] = view
        assert torch.equal(pydecode.ranked_attention(*args, **kwargs, backend=backend), want)


def test_out_and_inputs_keep_their_bits(backend: str) -> None:
    args, kwargs = masked("bits", dtype=torch.float32)
    before = kwargs["mask"].clone()
    want = pydecode.ranked_attention(*args, **kwargs, backend=backend)
    out = torch.full_like(want, torch.nan)
    assert pydecode.ranked_attention(*args, **kwargs, out=out, backend=backend) is out
    assert torch.equal(out, want)
    assert torch.equal(kwargs["mask"], before)


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_random_masks(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    args, kwargs = masked(
        draw(st.sampled_from(FORMS)),
        alone=draw(st.booleans()),
        shared=draw(st.booleans()),
        B=draw(st.integers(1, 3)),
        N=draw(st.integers(1, 7)),
        page_size=draw(st.integers(1, 30)),
        pages=draw(st.integers(0, 4)),
        paged=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        window_size=draw(st.none() | st.integers(1, 12)),
    )
    verify(OP, args, kwargs, backend)


MASK = torch.ones(3, 5, 16, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask=MASK.int()), TypeError, "mask: expected dtype bool, int64, got int32"),
        (dict(mask=MASK.float()), TypeError, "mask: expected dtype bool, int64, got float32"),
        (dict(mask=[1]), TypeError, "mask: expected a tensor, got list"),
        (dict(mask=MASK[:2]), ValueError, r"mask: expected shape \[B\|1, Nq, Nk\] = \[3, 5, 16\]"),
        (dict(mask=MASK[:, :4]), ValueError, "mask: expected shape"),
        (dict(mask=MASK[0]), ValueError, "mask: expected shape"),
        (dict(mask=MASK[..., :9]), ValueError, "mask: expected shape"),
        (dict(mask=MASK.long()), ValueError, r"mask: .*ceil\(Nk/64\)\] = \[3, 5, 1\]"),
        (dict(mask=MASK.to("meta")), ValueError, "mask: expected a tensor on cpu"),
        (dict(mask=MASK.mT.contiguous().mT), ValueError, "mask: expected the last dimension"),
        (dict(q_rank=None), TypeError, "q_rank: expected a tensor"),
        (dict(k_rank=None), TypeError, "k_rank: expected a tensor"),
        (
            dict(q_rank=None, k_rank=None, mask=None),
            ValueError,
            "q_rank: expected ranks, or a mask",
        ),
        (dict(q_rank=None, k_rank=None, strict=True), ValueError, "strict: expected False without"),
        (dict(q_rank=None, k_rank=None, k=None), TypeError, "k: expected a tensor"),
        (
            dict(q_rank=None, k_rank=None, block_table=3),
            TypeError,
            "block_table: expected a tensor",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args, kwargs = make(OP, mask=MASK)
    call = dict(zip(("q", "k", "v"), args)) | kwargs | change
    with pytest.raises(error, match=message):
        pydecode.ranked_attention(**call)


def test_bad_packed_mask() -> None:
    x, cu = torch.randn(5, 2, 4), torch.tensor([0, 2, 5])
    call: dict[str, Any] = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=3, max_seqlen_k=3)
    for mask in (MASK[0, :, :4], MASK[0, :4, :3], MASK[:1, :, :3]):
        with pytest.raises(ValueError, match=r"mask: expected shape \[total_q, Nk\] = \[5, 3\]"):
            pydecode.ranked_attention(x, x, x, mask=mask, **call)
