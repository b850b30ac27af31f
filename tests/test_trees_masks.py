"""Packed masks and depths against walks in plain Python."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pydecode
from pydecode import trees

SIZES = (1, 2, 63, 64, 65, 127, 128, 129)


def walk(parents: list[int], i: int) -> list[int]:
    """Node i and its ancestors; a parent that does not precede its child ends the walk."""
    path = [i]
    while 0 <= parents[path[-1]] < path[-1]:
        path.append(parents[path[-1]])
    return path


def words(bits: list[int], n: int) -> list[int]:
    """The int64 words of a row that has these bits."""
    row = sum(1 << bit for bit in bits)
    chunks = [row >> (64 * w) & (2**64 - 1) for w in range(-(-n // 64))]
    return [chunk - 2**64 if chunk >> 63 else chunk for chunk in chunks]


def expect_walks(parents: torch.Tensor, backend: str | None = None) -> None:
    """mask_from_parents, depths of [B, T] against ``walk``."""
    B, T = parents.shape
    paths = [[walk(row, i) for i in range(T)] for row in parents.tolist()]
    mask = trees.mask_from_parents(parents, backend=backend)
    assert (mask.shape, mask.dtype) == ((B, T, -(-T // 64)), torch.int64)
    assert mask.tolist() == [[words(path, T) for path in row] for row in paths]
    depths = trees.depths(parents, backend=backend)
    assert (depths.shape, depths.dtype) == ((B, T), torch.int64)
    assert depths.tolist() == [[len(path) - 1 for path in row] for row in paths]


def random_trees(B: int, T: int) -> torch.Tensor:
    """Uniform recursive trees, [B, T]."""
    return (torch.rand(B, T) * torch.arange(T)).long() - (torch.arange(T) == 0).long()


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_random_trees(T: int, dtype: torch.dtype, backend: str) -> None:
    expect_walks(random_trees(3, T).to(dtype), backend)


@pytest.mark.parametrize(
    "shape",
    ["chain", "star", "random"],  # the deepest, the flattest, between
)
def test_1024_nodes(shape: str, backend: str) -> None:
    i = torch.arange(1024)
    parents = {"chain": i - 1, "star": -(i == 0).long(), "random": random_trees(1, 1024)[0]}[shape]
    expect_walks(parents[None], backend)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 12), min_size=10, max_size=10), min_size=1, max_size=3))
def test_any_parents(parents: list[list[int]]) -> None:
    # forests, self-parents, cycles, later nodes, out of range on both sides
    expect_walks(torch.tensor(parents))


@pytest.mark.parametrize(
    ("parents", "depths"),
    [
        ([-1, 2, 1, 2], [0, 0, 1, 2]),  # a cycle 1 <-> 2: the forward half of it ends the walk
        ([-1, 1, 1], [0, 0, 1]),  # its own parent
        ([-1, 99, 1, -2, 3], [0, 0, 1, 0, 1]),  # outside, on both sides
        ([-1, 2**40, 1], [0, 0, 1]),  # not narrowed to 32 bits
        ([3, 0, 0, 0], [0, 1, 1, 1]),  # a root with a parent
    ],
)
def test_bad_parents_end_the_walk(parents: list[int], depths: list[int], backend: str) -> None:
    expect_walks(torch.tensor([parents]), backend)
    assert trees.depths(torch.tensor(parents), backend=backend).tolist() == depths


def test_leading_dimensions_and_strides(backend: str) -> None:
    parents = random_trees(6, 70)
    want_mask, want_depths = trees.mask_from_parents(parents), trees.depths(parents)
    strided = torch.stack([parents, parents], -1)[..., 0].unflatten(0, (2, 3))
    mask, depths = (f(strided, backend=backend) for f in (trees.mask_from_parents, trees.depths))
    assert torch.equal(mask.flatten(0, 1), want_mask)
    assert torch.equal(depths.flatten(0, 1), want_depths)
    assert mask.is_contiguous()
    for b in range(6):  # a request alone, and without a batch dimension
        assert torch.equal(trees.mask_from_parents(parents[b], backend=backend), want_mask[b])
        assert torch.equal(trees.depths(parents[b], backend=backend), want_depths[b])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (2, 0, 7)])
def test_empty_parents(shape: tuple[int, ...], backend: str) -> None:
    parents = torch.empty(shape, dtype=torch.int64)
    words = -(-shape[-1] // 64)
    assert trees.mask_from_parents(parents, backend=backend).shape == (*shape, words)
    assert trees.depths(parents, backend=backend).shape == shape


@pytest.mark.parametrize("N", [*SIZES, 1024])
def test_pack_mask(N: int, backend: str) -> None:
    mask = torch.rand(2, N, N) < 0.5
    packed = trees.pack_mask(mask, backend=backend)
    rows = [[words(row.nonzero()[:, 0].tolist(), N) for row in m] for m in mask]
    assert packed.dtype == torch.int64
    assert packed.tolist() == rows
    assert torch.equal(trees.unpack_mask(packed, N), mask)


def test_pack_mask_of_views_and_of_nothing(backend: str) -> None:
    mask = torch.rand(2, 3, 70, 70) < 0.5
    packed = trees.pack_mask(mask, backend=backend)
    assert packed.shape == (2, 3, 70, 2)
    assert torch.equal(trees.pack_mask(mask.mT.contiguous().mT, backend=backend), packed)
    assert torch.equal(trees.pack_mask(mask[1, 2], backend=backend), packed[1, 2])
    assert trees.pack_mask(mask[:0], backend=backend).shape == (0, 3, 70, 2)
    assert trees.pack_mask(mask[..., :0, :0], backend=backend).shape == (2, 3, 0, 0)


def test_unpack_drops_the_bits_past_n() -> None:
    assert trees.unpack_mask(torch.tensor([[-1], [5]]), 2).tolist() == [[True] * 2, [True, False]]
    assert trees.unpack_mask(torch.empty(3, 0, dtype=torch.int64), 0).shape == (3, 0)


def test_the_packed_mask_is_what_tree_attention_reads() -> None:
    parents = random_trees(2, 70)
    visible = torch.tensor(
        [[[j in walk(row, i) for j in range(70)] for i in range(70)] for row in parents.tolist()]
    )
    q, kv = torch.randn(2, 70, 2, 8), torch.randn(2, 70, 2, 8)
    cache = torch.randn(2, 4, 2, 8)
    packed, plain = (
        pydecode.tree_attention(q, cache, cache, kv, kv, mask=mask, cache_seqlens=4)
        for mask in (trees.mask_from_parents(parents), visible)
    )
    assert torch.equal(packed, plain)


def test_nothing_reads_device_data() -> None:
    with FakeTensorMode():  # any synchronisation raises under fake tensors
        parents = torch.zeros(2, 65, dtype=torch.int64)
        from pydecode.reference import mask_from_parents, pack_mask, tree_depths

        assert mask_from_parents.mask_from_parents(parents).shape == (2, 65, 2)
        assert tree_depths.tree_depths(parents).shape == (2, 65)
        assert pack_mask.pack_mask(torch.zeros(65, 65) > 0).shape == (65, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trees.pack_mask(torch.ones(2, 2)), TypeError, "mask: expected dtype bool"),
        (lambda: trees.pack_mask(torch.ones(2, 3) > 0), ValueError, r"mask: .*\[..., N, N\].*2, 3"),
        (lambda: trees.pack_mask(torch.ones(3) > 0), ValueError, "mask: expected shape"),
        (lambda: trees.pack_mask([[True]]), TypeError, "mask: expected a tensor, got list"),
        (lambda: trees.unpack_mask(torch.ones(2, 1), 2), TypeError, "packed: expected dtype int64"),
        (lambda: trees.unpack_mask(torch.ones(2, 1).long(), 65), ValueError, "packed: .*shape"),
        (lambda: trees.unpack_mask(torch.ones(2, 1).long(), -1), ValueError, "n: expected an int"),
        (
            lambda: trees.mask_from_parents(torch.ones(2)),
            TypeError,
            "parents: expected dtype int32",
        ),
        (lambda: trees.mask_from_parents(torch.tensor(1)), ValueError, "parents: expected shape"),
        (lambda: trees.depths([-1, 0]), TypeError, "parents: expected a tensor, got list"),
        (lambda: trees.depths(torch.ones(2) > 0), TypeError, "parents: .*got bool"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("function", [trees.mask_from_parents, trees.depths])
def test_checks(function: Any) -> None:
    with pydecode.checks(True):
        function(torch.tensor([[-1, 0, -1, 2]]))  # a forest is legal
        with pytest.raises(ValueError, match=r"parents: .*\[-1, 3\), got 3 at index \[0, 2\]"):
            function(torch.tensor([[-1, 0, 3]]))
        with pytest.raises(ValueError, match=r"before its child, got 2 at index \[0, 1\]"):
            function(torch.tensor([[-1, 2, 0]]))
        with pytest.raises(ValueError, match=r"before its child, got 1 at index \[0, 1\]"):
            function(torch.tensor([[-1, 1, 0]]))  # its own parent
