"""Ranked attention against the oracle and SDPA: padded, paged and packed; and the rank tensors."""

from typing import Any

import pytest
import torch
from attention_calls import FUZZ, LAYOUTS, cumulative, make, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_attention import PAD, assert_close, verify
from torch.nn.functional import scaled_dot_product_attention

import pydecode
from pydecode import ranked_attention, ranks

OP = "ranked_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# three requests, 5 queries, a capacity of 16 keys
CASES: dict[str, dict[str, Any]] = {
    "paged": dict(),
    "padded": dict(paged=False),
    "all_keys": dict(cache_seqlens=None),
    "strict": dict(strict=True),
    "strict_first": dict(strict=True, q_rank=torch.zeros(1, 5).int()),  # sees nothing
    "shared_ranks": dict(
        q_rank=ranks.causal(16)[:, 11:], k_rank=ranks.causal(16), cache_seqlens=16
    ),
    "narrow": dict(k_rank=ranks.causal(7), cache_seqlens=torch.tensor([7, 0, 3])),
    "negative_ranks": dict(q_rank=ranks.causal(5) - 3, k_rank=ranks.causal(16) - 9),
    "largest_rank": dict(q_rank=torch.full((1, 5), PAD - 1).int()),
    "padding": dict(
        q_rank=torch.tensor([[0, PAD, 2, 3, PAD]]).int(),
        k_rank=ranks.bidirectional([3, 0, 16], 16),
        sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]),
    ),
    "ragged": dict(num_tokens=torch.tensor([5, 0, 2]), cache_seqlens=torch.tensor([16, 7, 1])),
    "window": dict(window_size=3),
    "window_ragged": dict(window_size=4, num_tokens=torch.tensor([5, 1, 3])),
    "positions": dict(window_size=4, positions=torch.arange(15).view(3, 5) * 7 % 20),
    "softcap": dict(softcap=1.5, softmax_scale=0.7),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), cache_seqlens=torch.tensor([0, 3, 9])),
    "odd_head_dim": dict(D=7, Dv=1),
    "wide_head": dict(D=260, Dv=8, Hq=2, Hkv=1),
    "page_of_one": dict(page_size=1, pages=9),
    "zero_rows": dict(N=0),
    "zero_batch": dict(B=0),
    "no_keys": dict(pages=0, cache_seqlens=None),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, backend: str) -> None:
    verify(OP, *make(OP, **CASES[case]), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "padded"])
def test_dtypes(dtype: torch.dtype, paged: bool, backend: str) -> None:
    verify(OP, *make(OP, N=9, dtype=dtype, paged=paged), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [None, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_layouts_and_fp8(layout: str, fp8: torch.dtype | None, backend: str) -> None:
    extras = dict(k_scale=torch.rand(2) + 0.5, v_scale=1.5) if fp8 else {}
    verify(OP, *make(OP, layout=layout, cache_dtype=fp8, **extras), backend)


@pytest.mark.parametrize("keys", ["packed", "paged", "padded"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_queries(keys: str, window: int | None, backend: str) -> None:
    queries = [3, 0, 5, 1]
    args, kwargs = make(OP, 4, 5, paged=keys == "paged", window_size=window)
    args[0], kwargs["q_rank"] = packed(args[0], queries), packed(kwargs["q_rank"], queries)
    kwargs |= dict(cu_seqlens_q=cumulative(queries), max_seqlen_q=5)
    if keys == "packed":
        lengths = kwargs.pop("cache_seqlens").tolist()
        args[1:] = [packed(x, lengths) for x in args[1:]]
        kwargs["k_rank"] = packed(kwargs["k_rank"], lengths)
        kwargs |= dict(cu_seqlens_k=cumulative(lengths), max_seqlen_k=16)
    verify(OP, args, kwargs, backend)


def test_packed_keys_alone(backend: str) -> None:
    """Cross attention: a fixed number of queries over packed sources."""
    args, kwargs = make(OP, paged=False, cache_seqlens=None)
    lengths = [4, 16, 0]
    args[1:] = [packed(x, lengths) for x in args[1:]]
    kwargs["k_rank"] = packed(kwargs["k_rank"], lengths)
    kwargs |= dict(cu_seqlens_k=cumulative(lengths), max_seqlen_k=16)
    verify(OP, args, kwargs, backend)


@pytest.mark.parametrize("N", [1, 64, 600])  # 600: more than one chunk of the reference
def test_causal_ranks_are_sdpa_causal(N: int, backend: str) -> None:
    q, k, v = (torch.randn(2, N, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    r = ranks.causal(N)
    got = ranked_attention(q, k, v, q_rank=r, k_rank=r, backend=backend)
    want = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    assert_close(got.transpose(1, 2), want)
    # a chunk of the prefill: the last queries
    last = N // 3
    got = ranked_attention(
        q[:, last:], k, v, q_rank=r[:, last:], k_rank=r, window_size=N, backend=backend
    )
    assert_close(got.transpose(1, 2), want[:, :, last:])


def test_block_causal_ranks_are_a_block_mask(backend: str) -> None:
    q, k, v = (torch.randn(2, 11, 2, 8, dtype=torch.float64) for _ in range(3))
    block = torch.arange(11) // 4
    r = ranks.block_causal(11, 4)
    got = ranked_attention(q, k, v, q_rank=r, k_rank=r, backend=backend)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = scaled_dot_product_attention(*heads, attn_mask=block[:, None] >= block)
    assert_close(got.transpose(1, 2), want)


def test_bidirectional_ranks_cut_the_padding(backend: str) -> None:
    q, k, v = (torch.randn(3, 6, 2, 8, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([6, 0, 4])
    r = ranks.bidirectional(lengths, 6)
    out, lse = ranked_attention(q, k, v, q_rank=r, k_rank=r, return_lse=True, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        heads = [x[b : b + 1, :n].transpose(1, 2) for x in (q, k, v)]
        assert_close(out[b : b + 1, :n].transpose(1, 2), scaled_dot_product_attention(*heads))
        assert (out[b, n:] == 0).all()
        assert (lse[b, :, n:] == -torch.inf).all()


def test_rank_tensors() -> None:
    assert ranks.causal(4).tolist() == [[0, 1, 2, 3]]
    assert ranks.block_causal(5, 3).tolist() == [[0, 0, 0, 1, 1]]
    assert ranks.bidirectional([1, 9], 2).tolist() == [[0, PAD], [0, 0]]
    assert ranks.bidirectional(1, 2).tolist() == [[0, PAD]]
    assert ranks.PAD == PAD
    made = (ranks.causal(0), ranks.block_causal(0, 1), ranks.bidirectional([], 3))
    assert [x.shape for x in made] == [(1, 0), (1, 0), (0, 3)]
    for x in (*made, ranks.bidirectional(torch.tensor([2, 0]), 3)):
        assert x.dtype == torch.int32
    for make_ranks in (
        lambda: ranks.causal(3, device="nowhere"),
        lambda: ranks.block_causal(3, 2, device="nowhere"),
        lambda: ranks.bidirectional(torch.tensor([2]), 3, device="nowhere"),
        lambda: ranks.bidirectional([2], 3, device="nowhere"),
    ):
        with pytest.raises(RuntimeError, match="nowhere"):  # so the device is heeded
            make_ranks()


@pytest.mark.parametrize("bad", [-1, 2.0, True], ids=str)
def test_bad_rank_sizes(bad: Any) -> None:
    with pytest.raises(ValueError, match="n: expected an int >= 0"):
        ranks.causal(bad)
    with pytest.raises(ValueError, match="block: expected an int >= 1"):
        ranks.block_causal(3, 0)
    with pytest.raises(TypeError, match="lengths: expected dtype int32, int64"):
        ranks.bidirectional(torch.zeros(2), 3)


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_random_ranks(data: st.DataObject, backend: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, N, Hkv = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 2))
    args, kwargs = make(
        *(OP, B, N, Hkv * draw(st.integers(1, 3)), Hkv, draw(st.integers(1, 9)), 3),
        page_size=draw(st.integers(1, 5)),
        pages=draw(st.integers(0, 4)),
        paged=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        strict=draw(st.booleans()),
        num_tokens=draw(st.none() | st.just(torch.randint(0, N + 1, (B,)))),
        window_size=draw(st.none() | st.integers(1, 12)),
    )
    verify(OP, args, kwargs, backend)


CU = torch.tensor([0, 2, 5, 5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q_rank=torch.zeros(3, 5)), TypeError, "q_rank: expected dtype int32"),
        (dict(q_rank=torch.zeros(3, 4).int()), ValueError, "q_rank: expected shape"),
        (dict(q_rank=None), TypeError, "q_rank: expected a tensor"),
        (dict(k_rank=torch.zeros(2, 16).int()), ValueError, "k_rank: expected shape"),
        (dict(k_rank=torch.zeros(16).int()), ValueError, "k_rank: expected shape"),
        (dict(k_rank=torch.zeros(3, 17).int()), ValueError, "k_rank: expected at most the table's"),
        (dict(cache_seqlens=17), ValueError, r"cache_seqlens: expected an integer in \[0, 16\]"),
        (dict(cu_seqlens_q=CU, max_seqlen_q=3), ValueError, "q: expected 3 dimensions"),
        (dict(cu_seqlens_k=CU, max_seqlen_k=3), ValueError, "cu_seqlens_k: expected None with"),
        (dict(k=torch.zeros(1, 4, 3, 16).double()), ValueError, "v: expected shape"),
        (dict(v=torch.zeros(3)), ValueError, "v: expected 4 dimensions"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args, kwargs = make(OP)
    call = dict(zip(("q", "k", "v"), args)) | kwargs | change
    with pytest.raises(error, match=message):
        pydecode.ranked_attention(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_seqlen_k=None), "max_seqlen_k: expected an int >= 0 with cu_seqlens_k, got None"),
        (dict(cu_seqlens_k=CU[:3]), r"cu_seqlens_k: expected B\+1 = 4 entries, got 3"),
        (dict(cu_seqlens_k=CU[:0]), r"cu_seqlens_k: expected B\+1 entries, got none"),
        (dict(k_rank=torch.zeros(4).int()), "k_rank: expected shape"),
        (dict(k=torch.zeros(5, 4)), "k: expected 3 dimensions"),
        (dict(num_tokens=3), "num_tokens: expected None with cu_seqlens_q"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_packed_arguments(change: dict[str, Any], message: str) -> None:
    x, rank = torch.randn(5, 2, 4), torch.zeros(5).int()
    call: dict[str, Any] = dict(q=x, k=x, v=x, q_rank=rank, k_rank=rank, cu_seqlens_q=CU)
    call |= dict(cu_seqlens_k=CU, max_seqlen_q=3, max_seqlen_k=3)
    with pytest.raises(ValueError, match=message):
        pydecode.ranked_attention(**call | change)
