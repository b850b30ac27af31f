"""Ranked attention in Triton, interpreted, against the oracle's loops."""

import functools
from typing import Any

import attention_calls
import pytest
import torch
from attention_calls import cumulative, packed
from oracle_attention import PAD, verify
from torch import Tensor

import pydecode
from pydecode import ranks
from pydecode.trees.masks import pack_bits

OP = "ranked_attention"
# heads of 8 would all have the small tiles of odd strides
make = functools.partial(attention_calls.make, Dv=16)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.reference import ranked_attention as module

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(module, "ranked_attention", refuse)


def call(args: list[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return pydecode.ranked_attention(*args, **kwargs, return_lse=True, backend="triton")


# (N, Hq, Hkv, D, Dv, page size, dtype): keys in one to three tiles
SIZES = [
    (1, 2, 1, 16, 16, 1, FP32),
    (3, 7, 1, 80, 80, 16, FP16),
    (33, 2, 2, 16, 24, 3, BF16),
    (64, 2, 1, 7, 1, 64, FP16),
    (65, 1, 1, 96, 64, 16, FP16),
    (17, 2, 1, 128, 16, 64, FP32),
    (4, 2, 1, 256, 128, 16, BF16),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: Any) -> None:
    N, Hq, Hkv, D, Dv, page_size, dtype = size
    more = dict(dtype=dtype, page_size=page_size, pages=max(1, 80 // page_size))
    verify(OP, *make(OP, 2, N, Hq, Hkv, D, Dv=Dv, **more), "triton")


CASES: dict[str, dict[str, Any]] = {
    "padded": dict(paged=False),
    "all_keys": dict(cache_seqlens=None),
    "int_lengths": dict(cache_seqlens=9, num_tokens=3),
    "strict": dict(strict=True),
    "strict_first": dict(strict=True, q_rank=torch.zeros(1, 5).int()),
    "shared": dict(q_rank=ranks.causal(16)[:, 11:], k_rank=ranks.causal(16), cache_seqlens=16),
    "negative": dict(q_rank=ranks.causal(5) - 3, k_rank=ranks.causal(16) - 9),
    "extremes": dict(
        q_rank=torch.tensor([[-(2**31), PAD - 1, 0, PAD, PAD - 1]]).int(),
        k_rank=torch.tensor([-(2**31), PAD, PAD - 1, 3] * 4)[None].int(),
    ),
    "padding": dict(
        q_rank=torch.tensor([[0, PAD, 2, 3, PAD]]).int(),
        k_rank=ranks.bidirectional([3, 0, 16], 16),
        sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]),
    ),
    "ragged": dict(num_tokens=torch.tensor([5, 0, 2]), cache_seqlens=torch.tensor([16, 7, 1])),
    "window": dict(window_size=4, num_tokens=torch.tensor([5, 1, 3])),
    "positions": dict(window_size=4, positions=torch.arange(15).view(3, 5) * 7 % 20),
    "wild_positions": dict(window_size=2**40, positions=torch.full((3, 5), -(2**62))),
    "softcap": dict(softcap=1.5, softmax_scale=0.7, sinks=torch.randn(4).half()),
    "negative_scale": dict(softmax_scale=-0.5),
    "scale_0": dict(softmax_scale=0.0),
    "hnd": dict(layout="HND"),
    "interleaved": dict(layout="interleaved"),
    "views": dict(layout="padded"),
    "zero_rows": dict(N=0),
    "zero_batch": dict(B=0),
    "no_keys": dict(pages=0, cache_seqlens=None),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    verify(OP, *make(OP, **{"dtype": FP32, **CASES[case]}), "triton")


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_fp8(cache: torch.dtype, dtype: torch.dtype) -> None:
    scale = torch.rand(3, 2) + 0.5
    for more in (dict(k_scale=scale, v_scale=1.5), dict(k_scale=0.5, v_scale=scale[0])):
        verify(OP, *make(OP, dtype=dtype, cache_dtype=cache, **more), "triton")


# kinds of tiles: full, partial and skipped, in every order
RANKS = {
    "causal": lambda n: ranks.causal(n),
    "block_causal": lambda n: ranks.block_causal(n, 24),
    "bidirectional": lambda n: ranks.bidirectional([n], n),
    "reversed": lambda n: ranks.causal(n).flip(1),
    "islands": lambda n: (torch.arange(n) // 40 % 2 * 9)[None].int(),
}


@pytest.mark.parametrize(("kind", "window"), [*zip(RANKS, [None] * 5), *zip(RANKS, [50] * 3)])
def test_tiles(kind: str, window: int | None) -> None:
    N = 100
    args, kwargs = make(
        *(OP, 1, N, 1, 1), paged=False, dtype=FP32, page_size=N, pages=1, window_size=window
    )
    rank = RANKS[kind](N)
    kwargs |= dict(q_rank=rank, k_rank=rank, cache_seqlens=torch.tensor([N - 3]))
    verify(OP, args, kwargs, "triton")


@pytest.mark.parametrize(
    ("form", "shared", "pages"),
    [("bool", True, 4), ("bool", False, 40), ("bits", False, 4), ("bits", True, 40)],
    ids=str,
)
def test_masks(form: str, shared: bool, pages: int) -> None:
    dtype = FP16 if form == "bits" else FP32  # tiles of 64 keys, and of 32
    args, kwargs = make(OP, dtype=dtype, pages=pages, window_size=None if shared else 9)
    mask = torch.rand(1 if shared else 3, 5, pages * 4) < 0.5
    mask[..., :64] |= pages > 16  # a full tile
    spare = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 64), value=True)
    kwargs["mask"] = mask if form == "bool" else pack_bits(spare)
    verify(OP, args, kwargs, "triton")
    if form == "bool":
        kwargs["mask"] = torch.stack([mask, ~mask], 1)[:, 0]  # a view
        verify(OP, args, kwargs, "triton")
        del kwargs["q_rank"], kwargs["k_rank"]
        verify(OP, args, kwargs, "triton")


@pytest.mark.parametrize("keys", ["packed", "paged", "padded"])
@pytest.mark.parametrize("masked", [False, True])
def test_packed(keys: str, masked: bool) -> None:
    queries = [3, 0, 5, 1]
    args, kwargs = make(OP, 4, 5, paged=keys == "paged", dtype=FP32, window_size=6)
    if masked:
        kwargs["mask"] = packed(torch.rand(4, 5, 16) < 0.5, queries)
    args[0], kwargs["q_rank"] = packed(args[0], queries), packed(kwargs["q_rank"], queries)
    kwargs |= dict(cu_seqlens_q=cumulative(queries), max_seqlen_q=5)
    if keys == "packed":
        lengths = kwargs.pop("cache_seqlens").tolist()
        args[1:] = [packed(x, lengths) for x in args[1:]]
        kwargs["k_rank"] = packed(kwargs["k_rank"], lengths)
        kwargs |= dict(cu_seqlens_k=cumulative(lengths), max_seqlen_k=16)
    verify(OP, args, kwargs, "triton")


@pytest.mark.parametrize(
    ("cu", "kept"),
    [
        ([0, 3, 2**31, 8], (0, 8)),
        ([0, 3, -4, 8], (0, 8)),
        ([0, 3, 1, 8], (0, 3)),
        ([2, 5, 5, 8], (2, 8)),
    ],
    ids=str,
)
def test_bad_cu_seqlens(cu: list[int], kept: tuple[int, int]) -> None:
    """Rows of nobody give 0 and -inf; of two that claim a row the first has it."""
    args, kwargs = make(OP, 3, 8, dtype=FP32)
    args[0] = packed(args[0], [3, 1, 4])
    kwargs["q_rank"] = packed(kwargs["q_rank"], [3, 1, 4])
    good = list(cu) if cu[0] else [cu[0], cu[1], cu[1], cu[1]]
    want = call(args, kwargs | dict(cu_seqlens_q=torch.tensor(good), max_seqlen_q=8))
    out, lse = call(args, kwargs | dict(cu_seqlens_q=torch.tensor(cu), max_seqlen_q=8))
    rows = slice(*kept)
    if cu[0] == 0:
        rows = slice(0, 3)
    assert torch.equal(out[rows], want[0][rows])
    assert torch.equal(lse[:, rows], want[1][:, rows])
    assert (out[: cu[0]] == 0).all()
    assert (lse[:, : cu[0]] == -torch.inf).all()


@pytest.mark.parametrize(("column", "page"), [(0, -1), (0, PAD), (1, -(2**31)), (3, 14)], ids=str)
@pytest.mark.parametrize("page_size", [4, 32])
def test_pages_outside_the_pool(column: int, page: int, page_size: int) -> None:
    lengths = torch.tensor([4, 4, 4]) * page_size
    more = dict(dtype=FP32, page_size=page_size, cache_seqlens=lengths)
    args, kwargs = make(OP, 3, 2, 1, 1, **more)
    kwargs["block_table"][1:, column] = page
    verify(OP, args, kwargs, "triton")


def test_wild_lengths() -> None:
    args, kwargs = make(OP, dtype=FP32)
    for given, worth in (([-1, -(2**62), 4], [0, 0, 4]), ([17, 2**62, 4], [16, 16, 4])):
        got = call(args, kwargs | dict(cache_seqlens=torch.tensor(given)))
        want = call(args, kwargs | dict(cache_seqlens=torch.tensor(worth)))
        assert all(torch.equal(x, y) for x, y in zip(got, want))
    args[1:] = [x[:0] for x in args[1:]]  # a pool of no pages
    assert (call(args, kwargs)[0] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("masked", [False, True], ids=["ranks", "mask"])
def test_bad_values_hurt_only_the_rows_that_see_them(bad: float, masked: bool) -> None:
    N = 9
    args, kwargs = make(
        *(OP, 1, N, 1, 1), paged=False, dtype=FP32, page_size=N, pages=1, cache_seqlens=N
    )
    kwargs |= dict(q_rank=ranks.causal(N), k_rank=ranks.causal(N))
    if masked:
        kwargs = dict(mask=torch.ones(N, N).tril().bool()[None])
    want = call(args, kwargs)[0]
    args[2][:, 4, :, 1] = bad
    got = call(args, kwargs)[0]
    assert torch.equal(got[:, :4], want[:, :4])
    assert torch.equal(got[..., 2:], want[..., 2:])
    column = got[:, 4:, :, 1]
    assert torch.equal(column.nan_to_num(5), torch.full_like(column, bad).nan_to_num(5))
    args[0][0, 2] = torch.nan
    assert torch.equal(call(args, kwargs)[0][0, :2], want[0, :2])


@pytest.mark.parametrize("order", [[1], [2, 0], [0, 0, 2, 1]], ids=str)
def test_a_request_alone_or_in_any_batch(order: list[int]) -> None:
    args, kwargs = make(OP, dtype=FP16, pages=20)
    kwargs["k_rank"] = torch.arange(80).expand(3, 80).int() // 17
    want = call(args, kwargs)
    args[0] = args[0][order]
    kwargs = {n: x[order] if isinstance(x, Tensor) else x for n, x in kwargs.items()}
    got = call(args, kwargs)
    assert all(torch.equal(x, y[order]) for x, y in zip(got, want))


def test_a_packed_request_does_not_see_the_longest() -> None:
    """Bit for bit, however long the longest request of the batch may be."""
    args, kwargs = make(OP, 1, 40, 2, 1, dtype=FP16, pages=20, cache_seqlens=80)
    args[0], kwargs["q_rank"] = args[0][0], kwargs["q_rank"][0]
    kwargs["cu_seqlens_q"] = cumulative([40])
    got = [call(args, kwargs | dict(max_seqlen_q=n)) for n in (40, 200)]
    assert all(torch.equal(x, y) for x, y in zip(*got))


def test_out_is_written_whole() -> None:
    args, kwargs = make(OP, dtype=FP32, num_tokens=torch.tensor([5, 0, 2]))
    out = torch.full((3, 5, 4, 16), torch.nan)
    got = pydecode.ranked_attention(*args, **kwargs, out=out, backend="triton")
    assert got is out
    assert torch.equal(out, call(args, kwargs)[0])


def test_what_cannot_run() -> None:
    for more, why in ((dict(), "fp32"), (dict(D=260, dtype=FP32), "head dims up to 256")):
        with pytest.raises(pydecode.BackendUnavailable, match=why):
            call(*make(OP, **more))
