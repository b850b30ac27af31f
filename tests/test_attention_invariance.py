"""What must not change a bit of an attention op's result: pages, neighbours, strides, out."""

from typing import Any

import pytest
import torch
from attention_calls import LAYOUTS, OPS, cumulative, make, packed
from torch import Tensor

import pydecode

DTYPES = (torch.bfloat16, torch.float32)
Result = tuple[Tensor, Tensor]


def call(op: str, args: list[Any], kwargs: dict[str, Any], backend: str) -> Result:
    return getattr(pydecode, op)(*args, **kwargs, return_lse=True, backend=backend)


def rich(
    op: str, dtype: torch.dtype = torch.float32, **extras: Any
) -> tuple[list[Any], dict[str, Any]]:
    """A ragged call with a window, sinks and the op's own arguments."""
    extras = dict(window_size=7, sinks=torch.randn(4), dtype=dtype) | extras
    if op in ("block_attention", "branch_attention"):
        extras |= dict(
            replace_at=torch.tensor([3, -1, 6]), causal=torch.tensor([True, False, False])
        )
    return make(op, num_tokens=torch.tensor([3, 5, 4]), pages=9, **extras)


def same(got: Result, want: Result) -> None:
    for x, y in zip(got, want):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
        assert torch.equal(x.isnan(), y.isnan())


def rename_pages(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The same cache under other page ids."""
    order = torch.randperm(args[1].shape[0])
    caches = [torch.empty_like(x) for x in args[1:3]]
    for new, old in zip(caches, args[1:3]):
        new[order] = old
    return [args[0], *caches, *args[3:]], kwargs | {"block_table": order[kwargs["block_table"]]}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_ids(op: str, dtype: torch.dtype, backend: str) -> None:
    args, kwargs = rich(op, dtype)
    want = call(op, args, kwargs, backend)
    same(call(op, *rename_pages(args, kwargs), backend), want)
    kwargs["block_table"] = kwargs["block_table"].int()
    same(call(op, args, kwargs, backend), want)
    # negative control: pages in another order are another context
    kwargs["block_table"] = kwargs["block_table"].flip(1)
    with pytest.raises(AssertionError):
        same(call(op, args, kwargs, backend), want)


@pytest.mark.parametrize("op", OPS)
def test_shared_pages(op: str, backend: str) -> None:
    """Prefix sharing: two requests may name the same page."""
    args, kwargs = rich(op)
    kwargs["block_table"][1, :3] = kwargs["block_table"][0, :3]
    copied = [x.clone() for x in args[1:3]]
    spare = sorted({*range(args[1].shape[0])} - {*kwargs["block_table"].flatten().tolist()})[:3]
    table = kwargs["block_table"].clone()
    for column, page in enumerate(spare):
        for x in copied:
            x[page] = x[table[0, column]]
        table[1, column] = page
    want = call(op, [args[0], *copied, *args[3:]], kwargs | {"block_table": table}, backend)
    same(call(op, args, kwargs, backend), want)


@pytest.mark.parametrize("op", OPS)
def test_paged_is_contiguous(op: str, backend: str) -> None:
    args, kwargs = rich(op)
    want = call(op, args, kwargs, backend)
    table = kwargs.pop("block_table")
    caches = [x[table].flatten(1, 2) for x in args[1:3]]
    same(call(op, [args[0], *caches, *args[3:]], kwargs, backend), want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [[1], [2, 0], [0, 0, 2, 1]], ids=str)
def test_a_request_alone_or_in_any_batch(
    op: str, dtype: torch.dtype, order: list[int], backend: str
) -> None:
    args, kwargs = rich(op, dtype)
    want = call(op, args, kwargs, backend)

    def pick(x: Any) -> Any:
        return x[order] if isinstance(x, Tensor) and x.shape[0] == 3 else x

    args = [x if i in (1, 2) else pick(x) for i, x in enumerate(args)]
    same(
        call(op, args, {name: pick(x) for name, x in kwargs.items()}, backend),
        pick_all(want, order),
    )


def pick_all(result: Result, order: list[int]) -> Result:
    return result[0][order], result[1][order]


@pytest.mark.parametrize("op", OPS)
def test_a_bad_neighbour(op: str, backend: str) -> None:
    """NaN everywhere in one request, its pages included, stays in that request."""
    args, kwargs = rich(op)
    want = call(op, args, kwargs, backend)
    args = [x.clone() for x in args]
    for i, x in enumerate(args):
        x[1 if i in (0, 3, 4) else kwargs["block_table"][1]] = torch.nan
    same(pick_all(call(op, args, kwargs, backend), [0, 2]), pick_all(want, [0, 2]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(op: str, layout: str, backend: str) -> None:
    args, kwargs = rich(op, layout=layout)
    want = call(op, [x.contiguous() for x in args], kwargs, backend)
    same(call(op, args, kwargs, backend), want)
    rows = [torch.stack([x, x * 2], 1)[:, 0] if i != 1 else x for i, x in enumerate(args)]
    rows[0] = args[0].transpose(-2, -3).contiguous().transpose(-2, -3)
    same(call(op, rows, kwargs, backend), want)


@pytest.mark.parametrize("op", OPS)
def test_broadcast_arguments(op: str, backend: str) -> None:
    """0-d tensors, numbers and [B] tensors say the same; so do expanded ones."""
    args, kwargs = rich(op, cache_seqlens=torch.tensor([9, 9, 9]), sinks=None)
    want = call(op, args, kwargs, backend)
    for length in (9, torch.tensor(9), torch.tensor(9).expand(3), torch.tensor(9).int()):
        same(call(op, args, kwargs | {"cache_seqlens": length}, backend), want)


@pytest.mark.parametrize("op", OPS)
def test_out(op: str, backend: str) -> None:
    args, kwargs = rich(op)
    want = call(op, args, kwargs, backend)
    out = torch.full_like(want[0], torch.nan)
    result, lse = call(op, args, kwargs | {"out": out}, backend)
    assert result is out
    same((out, lse), want)
    strided = torch.full((*out.shape[:-1], 16), torch.nan)[..., 3 : 3 + out.shape[-1]]
    alone = getattr(pydecode, op)(*args, **kwargs, out=strided, backend=backend)
    assert alone is strided
    assert torch.equal(strided, want[0])
    kwargs["out"] = out.double()
    with pytest.raises(TypeError, match="out: expected dtype float32, got float64"):
        call(op, args, kwargs, backend)


@pytest.mark.parametrize("op", OPS)
def test_inputs_keep_their_bits(op: str, backend: str) -> None:
    args, kwargs = rich(op)
    before = [x.clone() for x in (*args, *(x for x in kwargs.values() if isinstance(x, Tensor)))]
    call(op, args, kwargs, backend)
    after = (*args, *(x for x in kwargs.values() if isinstance(x, Tensor)))
    assert all(torch.equal(x, y) for x, y in zip(before, after))


@pytest.mark.parametrize("op", ["tree_attention", "block_attention", "ranked_attention"])
def test_packed_is_ragged(op: str, backend: str) -> None:
    """A packed request has the bits of the padded one, whatever max_seqlen_q is."""
    counts = [3, 5, 4]
    args, kwargs = rich(op)
    want = call(op, args, kwargs, backend)
    del kwargs["num_tokens"]
    args = [x if i in (1, 2) else packed(x, counts) for i, x in enumerate(args)]
    if op == "ranked_attention":
        kwargs["q_rank"] = packed(kwargs["q_rank"], counts)
    for longest in (5, 9):
        kwargs |= dict(cu_seqlens_q=cumulative(counts), max_seqlen_q=longest)
        out, lse = call(op, args, kwargs, backend)
        same((out, lse.mT), (packed(want[0], counts), packed(want[1].mT, counts)))
