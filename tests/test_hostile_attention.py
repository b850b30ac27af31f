"""Bad device data and NaN in the attention ops: harmless by default, named under checks(True)."""

from typing import Any

import pytest
import torch
from attention_calls import OPS, cumulative, make, packed
from oracle_attention import assert_close, verify
from torch import Tensor

import pydecode

HUGE = 2**31 - 1
TABLES = [(0, -1), (0, HUGE), (1, -(2**31)), (3, 14)]  # (column, page id); the pool has 14


def call(op: str, args: list[Any], kwargs: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    return getattr(pydecode, op)(*args, **kwargs, return_lse=True, backend=backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("column", "page"), TABLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_page_ids_outside_the_pool(
    op: str, column: int, page: int, dtype: torch.dtype, backend: str
) -> None:
    args, kwargs = make(op, cache_seqlens=torch.tensor([16, 9, 13]))
    table = kwargs["block_table"].to(dtype)
    table[1:, column] = page
    kwargs["block_table"] = table
    verify(op, args, kwargs, backend)
    first = 1 if column < 3 else 2  # request 1 has three pages in use
    message = (
        rf"block_table: expected entries in \[0, 14\), got {page} at index \[{first}, {column}"
    )
    with pydecode.checks(True), pytest.raises(ValueError, match=message):
        call(op, args, kwargs, backend)


@pytest.mark.parametrize("op", OPS)
def test_ids_past_the_length_are_not_read(op: str, backend: str) -> None:
    args, kwargs = make(op, cache_seqlens=torch.tensor([8, 0, 5]))
    want = call(op, args, kwargs, backend)
    for b, used in enumerate((2, 0, 2)):
        kwargs["block_table"][b, used:] = torch.tensor([HUGE, -1, 2**40, -(2**40)])[: 4 - used]
    with pydecode.checks(True):
        got = call(op, args, kwargs, backend)
    assert torch.equal(got[0], want[0])


# lengths and places that point nowhere; what they are worth
CLAMPED = {
    "negative": (torch.tensor([-1, -(2**62), 4]), torch.tensor([0, 0, 4]), -1),
    "past_the_table": (torch.tensor([17, 2**62, 4]), torch.tensor([16, 16, 4]), 17),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", CLAMPED)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
def test_lengths_past_the_cache(op: str, kind: str, paged: bool, backend: str) -> None:
    given, worth, first = CLAMPED[kind]
    args, kwargs = make(op, paged=paged)
    got = call(op, args, kwargs | {"cache_seqlens": given}, backend)
    want = call(op, args, kwargs | {"cache_seqlens": worth}, backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    message = rf"cache_seqlens: expected entries in \[0, 17\), got {first} at index \[0\]"
    with pydecode.checks(True), pytest.raises(ValueError, match=message):
        call(op, args, kwargs | {"cache_seqlens": given}, backend)
    with pytest.raises(
        ValueError, match=rf"cache_seqlens: expected an integer in .0, 16., got {first}"
    ):
        call(op, args, kwargs | {"cache_seqlens": first}, backend)


@pytest.mark.parametrize("op", OPS)
def test_counts_past_the_rows(op: str, backend: str) -> None:
    args, kwargs = make(op)
    want = call(op, args, kwargs | {"num_tokens": torch.tensor([0, 5, 5])}, backend)
    kwargs["num_tokens"] = torch.tensor([-3, 6, 2**62])
    got = call(op, args, kwargs, backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    with (
        pydecode.checks(True),
        pytest.raises(ValueError, match=r"num_tokens: .* got -3 at index \[0\]"),
    ):
        call(op, args, kwargs, backend)


@pytest.mark.parametrize("op", ["block_attention", "branch_attention"])
@pytest.mark.parametrize("name", ["replace_at", "cache_starts"])
def test_places_past_the_cache(op: str, name: str, backend: str) -> None:
    args, kwargs = make(op, cache_seqlens=16)
    given = torch.tensor([17, 2**62, -(2**62)])
    worth = torch.tensor([16, 16, -1 if name == "replace_at" else 0])
    got = call(op, args, kwargs | {name: given}, backend)
    want = call(op, args, kwargs | {name: worth}, backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    with (
        pydecode.checks(True),
        pytest.raises(ValueError, match=rf"{name}: .* got 17 at index \[0\]"),
    ):
        call(op, args, kwargs | {name: given}, backend)


def test_branches_past_the_last(backend: str) -> None:
    args, kwargs = make("branch_attention")
    want = call(
        "branch_attention", args, kwargs | {"num_branches": torch.tensor([0, 3, 3])}, backend
    )
    kwargs["num_branches"] = torch.tensor([-1, 4, 2**62])
    got = call("branch_attention", args, kwargs, backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    message = r"num_branches: .* got -1 at index \[0\]"
    with pydecode.checks(True), pytest.raises(ValueError, match=message):
        call("branch_attention", args, kwargs, backend)


@pytest.mark.parametrize("op", ["tree_attention", "block_attention"])
@pytest.mark.parametrize("pages", [4, 0])
def test_rows_in_the_cache_past_its_end(op: str, pages: int, backend: str) -> None:
    """k, v None and no room behind the context: those rows are seen by nobody."""
    lengths = torch.tensor([13, 16, 2]) if pages else torch.zeros(3).long()
    args, kwargs = make(op, own=False, pages=pages, cache_seqlens=lengths)
    verify(op, args, kwargs, backend)
    for wild in (torch.tensor([-4, 2**63 - 2, -(2**63)]), torch.tensor([-4, HUGE, -HUGE])):
        out, lse = call(op, args, kwargs | {"cache_seqlens": wild}, backend)
        assert (out[2] == 0).all()
        assert (lse[2] == -torch.inf).all()
    with pydecode.checks(True), pytest.raises(ValueError, match="cache_seqlens: expected room for"):
        call(op, args, kwargs, backend)


def test_pages_of_the_rows_are_checked(backend: str) -> None:
    """k, v None: the rows lie on pages past the context's length."""
    args, kwargs = make("tree_attention", own=False, cache_seqlens=4)
    kwargs["block_table"][1, 2] = -1
    with pydecode.checks(True), pytest.raises(ValueError, match=r"got -1 at index \[1, 2\]"):
        call("tree_attention", args, kwargs, backend)


def test_replaced_rows_past_the_end(backend: str) -> None:
    args, kwargs = make("block_attention", own=False, cache_seqlens=16, replace_at=13)
    verify("block_attention", args, kwargs, backend)
    kwargs["replace_at"] = torch.tensor([3, 12, 11])
    with (
        pydecode.checks(True),
        pytest.raises(ValueError, match=r"replace_at: .* got 12 at index \[1\]"),
    ):
        call("block_attention", args, kwargs, backend)


@pytest.mark.parametrize("op", OPS)
def test_no_pool_at_all(op: str, backend: str) -> None:
    """A pool of no pages, under a table that names some."""
    args, kwargs = make(op)
    args[1:3] = [x[:0] for x in args[1:3]]
    out, lse = call(op, args, kwargs, backend)
    want = call(op, args, kwargs | {"cache_seqlens": 0}, backend)
    assert_close(out, want[0])
    assert_close(lse, want[1])


@pytest.mark.parametrize("op", ["tree_attention", "block_attention", "ranked_attention"])
@pytest.mark.parametrize(
    ("cu", "kept", "message"),
    [
        ([0, 3, 2**31, 8], [0, 8], "got 2147483648 at index .2."),  # past the end
        ([0, 3, -4, 8], [0, 8], "got -4 at index .2."),
        ([0, 3, 1, 8], [0, 3], "expected no descent"),  # 2 rows are claimed twice: by the first
        ([2, 5, 5, 8], [2, 8], None),  # rows 0 and 1 are nobody's
        ([0, 3, 3, 9], [0, 8], "got 9 at index .3."),
    ],
    ids=str,
)
def test_bad_cu_seqlens(
    op: str, cu: list[int], kept: list[int], message: str | None, backend: str
) -> None:
    """A request whose rows do not lie in the batch has none; the first one is never hurt."""
    args, kwargs = make(op, 3, 8)
    args = [x if i in (1, 2) else packed(x, [3, 1, 4]) for i, x in enumerate(args)]
    if op == "ranked_attention":
        kwargs["q_rank"] = packed(kwargs["q_rank"], [3, 1, 4])
    good = list(cu) if message is None else [cu[0], cu[1], cu[1], cu[1]]
    kwargs |= dict(cu_seqlens_q=torch.tensor(good), max_seqlen_q=8)
    want = call(op, args, kwargs, backend)
    kwargs["cu_seqlens_q"] = torch.tensor(cu)
    out, lse = call(op, args, kwargs, backend)
    rows = slice(*kept)
    assert torch.equal(out[rows], want[0][rows])
    assert torch.equal(lse[:, rows], want[1][:, rows])
    assert (out[: cu[0]] == 0).all()
    assert (lse[:, : cu[0]] == -torch.inf).all()
    if message is not None:
        with pydecode.checks(True), pytest.raises(ValueError, match=f"cu_seqlens_q: .*{message}"):
            call(op, args, kwargs, backend)


def test_requests_longer_than_max_seqlen(backend: str) -> None:
    """Rows past max_seqlen_q are not computed, nor seen; keys past max_seqlen_k are not seen."""
    x, rank = torch.randn(9, 2, 4, dtype=torch.float64), torch.zeros(9).int()
    kwargs = dict(q_rank=rank, k_rank=rank, cu_seqlens_q=cumulative([4, 5]), max_seqlen_q=4)
    kwargs |= dict(cu_seqlens_k=cumulative([5, 4]), max_seqlen_k=4)
    out, lse = call("ranked_attention", [x, x, x], kwargs, backend)
    assert (out[8] == 0).all()
    assert (lse[:, 8] == -torch.inf).all()
    heads = x[:4].transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.testing.assert_close(out[:4].transpose(0, 1), want)
    with (
        pydecode.checks(True),
        pytest.raises(ValueError, match="cu_seqlens_q: expected lengths of"),
    ):
        call("ranked_attention", [x, x, x], kwargs, backend)


@pytest.mark.parametrize("op", OPS)
def test_nan_in_q_stays_in_its_row(op: str, backend: str) -> None:
    args, kwargs = make(op)
    want = call(op, args, kwargs, backend)
    args[0][(1,) * (args[0].dim() - 2)] = torch.nan
    got = call(op, args, kwargs, backend)
    changed = torch.zeros_like(got[0], dtype=torch.bool)
    changed[(1,) * (args[0].dim() - 2)] = True
    assert torch.equal(got[0][~changed], want[0][~changed])
    sees_any = (want[1].transpose(-1, -2)[(1,) * (args[0].dim() - 2)] > -torch.inf).all()
    assert got[0][changed].isnan().all() or not sees_any


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_hurt_only_the_rows_that_see_them(bad: float, backend: str) -> None:
    """v of row 2 is bad: causal rows 0 and 1 do not see it, rows 2 to 4 do."""
    args, kwargs = make("tree_attention", mask="causal")
    want = call("tree_attention", args, kwargs, backend)[0]
    args[4][:, 2] = bad
    got = call("tree_attention", args, kwargs, backend)[0]
    assert torch.equal(got[:, :2], want[:, :2])
    assert torch.equal(got[:, 2:], torch.full_like(got[:, 2:], bad)) or got[:, 2:].isnan().all()
