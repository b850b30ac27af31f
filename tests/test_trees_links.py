"""Trees linked by lists against walks in plain Python."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pydecode
from pydecode import trees

Lists = tuple[list[int], list[int]]


def linked_trees(B: int, T: int) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """Random trees under random numbers, node 0 the root: lists [B, T], and children in order."""
    rng = random.Random(int(torch.randint(2**31, ())))  # torch's seed repeats a run
    first, following, children = [], [], []
    for _ in range(B):
        number = [0, *rng.sample(range(1, T), T - 1)]
        kids: list[list[int]] = [[] for _ in range(T)]
        for i in range(1, T):
            below = kids[number[rng.randrange(i)]]
            below.insert(rng.randint(0, len(below)), number[i])
        after = [-1] * T
        for row in kids:
            for x, y in itertools.pairwise(row):
                after[x] = y
        first.append([row[0] if row else -1 for row in kids])
        following.append(after)
        children.append(kids)
    return torch.tensor(first), torch.tensor(following), children


def brute(first: list[int], following: list[int]) -> Lists:
    """Parents and order of one tree, links of any kind, straight from the documentation."""
    T = len(first)
    link: dict[int, tuple[int, bool]] = {}  # node -> the lowest node that links to it, as its child
    for x in range(T):
        if 0 < first[x] < T and first[x] != x:
            link.setdefault(first[x], (x, True))
        if x != 0 and 0 < following[x] < T and following[x] != x:
            link.setdefault(following[x], (x, False))
    found: list[tuple[int, int, int]] = []
    for node in range(T):
        at, steps, parent = node, 0, -1
        while at != 0 and at in link and steps <= T:
            at, is_child = link[at]
            steps += 1
            if is_child and parent == -1:
                parent = at
        if at == 0:
            found.append((steps, node, parent))
    found.sort()
    order = [node for _, node, _ in found]
    parents = [-1 if node == 0 else order.index(parent) for _, node, parent in found]
    absent = [-1] * (T - len(found))
    return parents + absent, order + absent


def expect_brute(first: Tensor, following: Tensor, backend: str | None = None) -> Lists:
    parents, order = trees.from_links(first, following, backend=backend)
    assert parents.dtype == order.dtype == torch.int64
    want = [brute(*rows) for rows in zip(first.tolist(), following.tolist())]
    assert parents.tolist() == [row[0] for row in want]
    assert order.tolist() == [row[1] for row in want]
    return parents.tolist(), order.tolist()


@pytest.mark.parametrize("T", [1, 2, 3, 8, 33, 64, 65])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_walk_from_the_root(T: int, dtype: torch.dtype, backend: str) -> None:
    first, following, children = linked_trees(20, T)
    all_parents, all_order = expect_brute(first.to(dtype), following.to(dtype), backend)
    for parents, order, kids in zip(all_parents, all_order, children):
        assert sorted(order) == list(range(T))
        assert order[0] == 0
        assert parents[0] == -1
        assert all(0 <= parents[i] < i for i in range(1, T))
        for i in range(T):  # a node's children by index are its list
            assert [order[j] for j in range(T) if parents[j] == i] == kids[order[i]]


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(0, 9))
def test_any_links(data: st.DataObject, T: int) -> None:
    def row() -> list[int]:
        return data.draw(st.lists(st.integers(-2, T + 1), min_size=T, max_size=T))

    links = torch.tensor([[row(), row()] for _ in range(3)], dtype=torch.int64).view(3, 2, T)
    parents, _ = expect_brute(links[:, 0], links[:, 1])
    for above in parents:
        assert all(p < i for i, p in enumerate(above))


@pytest.mark.parametrize(
    ("first", "following", "parents", "order"),
    [
        # what each is for: the lists, and what is left of them
        ([1, 2, 1], [-1, -1, -1], [-1, 0, 1], [0, 1, 2]),  # 2's child is its own grandparent
        ([1, 1, -1], [-1, 2, -1], [-1, 0, 0], [0, 1, 2]),  # a node that is its own child
        ([1, -1, -1], [-1, 1, -1], [-1, 0, -1], [0, 1, -1]),  # its own sibling
        ([-1, 2, 1], [-1, -1, -1], [-1, -1, -1], [0, -1, -1]),  # a cycle beside the root
        ([1, 0, -1], [2, -1, -1], [-1, 0, -1], [0, 1, -1]),  # to the root; the root's sibling
        ([1, 2**31 - 1, -1], [-1, -(2**31), -1], [-1, 0, -1], [0, 1, -1]),  # far outside
        ([2, 2, -1], [-1, -1, -1], [-1, 0, -1], [0, 2, -1]),  # two links to a node
        ([2, -1, -1, -1], [-1, -1, 3, 1], [-1, 0, 0, 0], [0, 2, 3, 1]),  # siblings 2, 3, 1
        ([1, -1, 3, -1], [-1] * 4, [-1, 0, -1, -1], [0, 1, -1, -1]),  # below an unlinked node
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hostile_links(
    first: list[int],
    following: list[int],
    parents: list[int],
    order: list[int],
    dtype: torch.dtype,
    backend: str,
) -> None:
    lists = torch.tensor([first], dtype=dtype), torch.tensor([following], dtype=dtype)
    got = trees.from_links(*lists, backend=backend)
    assert [x.tolist() for x in got] == [[parents], [order]]


@pytest.mark.parametrize("deep", [True, False], ids=["children", "siblings"])
def test_1024_links_in_a_row(deep: bool, backend: str) -> None:
    number = [0, *(torch.randperm(1023) + 1).tolist()]
    first, following = torch.full((2, 1, 1024), -1)
    for x, y in itertools.pairwise(number):
        (first if deep or x == 0 else following)[0, x] = y
    parents, order = trees.from_links(first, following, backend=backend)
    assert order.tolist() == [number]
    assert parents.tolist() == [[-1, *(range(1023) if deep else [0] * 1023)]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-2, 9), max_size=9))
def test_links_of_any_parents(parents: list[int]) -> None:
    T = len(parents)
    kids = [[j for j in range(i + 1, T) if parents[j] == i] for i in range(T)]
    first, following = trees.links(torch.tensor(parents, dtype=torch.int64))
    assert first.dtype == following.dtype == torch.int64
    assert first.tolist() == [row[0] if row else -1 for row in kids]
    after = {x: y for row in kids for x, y in itertools.pairwise(row)}
    assert following.tolist() == [after.get(i, -1) for i in range(T)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_there_and_back(dtype: torch.dtype, backend: str) -> None:
    parents = ((torch.rand(30, 40) * torch.arange(40)).long() - (torch.arange(40) == 0).long()).to(
        dtype
    )
    above, order = trees.from_links(*trees.links(parents, backend=backend), backend=backend)
    # the same tree under the new numbers
    assert torch.equal(order.sort(-1).values, torch.arange(40).expand(30, 40))
    assert torch.equal(order.gather(1, above[:, 1:]), parents.long().gather(1, order[:, 1:]))


def test_requests_alone_strides_and_leading_dimensions(backend: str) -> None:
    first, following, _ = linked_trees(6, 17)
    parents, order = trees.from_links(first, following, backend=backend)
    for b in range(6):
        alone = trees.from_links(first[b], following[b], backend=backend)
        assert torch.equal(alone[0], parents[b])
        assert torch.equal(alone[1], order[b])
    spread = [torch.stack([x, x.flip(1)], -1)[..., 0] for x in (first, following)]
    got = trees.from_links(spread[0].view(2, 3, 17), spread[1].view(2, 3, 17), backend=backend)
    assert torch.equal(got[0].view(6, 17), parents)
    # siblings that come in index order come back as they were
    lists = trees.links(parents.view(2, 3, 17), backend=backend)
    assert torch.equal(trees.links(parents, backend=backend)[1], lists[1].view(6, 17))
    for empty in ((0, 5), (3, 0), (2, 0, 4)):
        x = torch.zeros(empty, dtype=torch.int32)
        assert [y.shape for y in trees.from_links(x, x, backend=backend)] == [empty, empty]
        assert [y.shape for y in trees.links(x, backend=backend)] == [empty, empty]


def test_nothing_reads_device_data() -> None:
    with FakeTensorMode():
        x = torch.zeros(2, 9, dtype=torch.int64)
        assert trees.from_links(x, x)[1].shape == (2, 9)
        assert trees.links(x)[0].shape == (2, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(first_child=torch.zeros(2, 3)), TypeError, "first_child: expected dtype int32"),
        (dict(first_child=torch.tensor(1)), ValueError, r"first_child: expected shape \[..., T\]"),
        (dict(next_sibling=torch.zeros(2, 4).long()), ValueError, "next_sibling: expected shape"),
        (dict(next_sibling=[1, 2]), TypeError, "next_sibling: expected a tensor"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(first_child=torch.zeros(2, 3).long() - 1, next_sibling=torch.zeros(2, 3).int() - 1)
    trees.from_links(**good)
    with pytest.raises(error, match=message):
        trees.from_links(**{**good, **change})


def test_checks_name_the_link() -> None:
    first, following, _ = linked_trees(3, 9)
    with pydecode.checks(True):
        trees.from_links(first, following)
        with pytest.raises(ValueError, match=r"first_child: .*got 9 at index \[1, 4\]"):
            trees.from_links(
                first.index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(9)), following
            )
        twice = torch.tensor([[1, 2, -1], [2, 2, -1]])
        with pytest.raises(ValueError, match=r"several to node 2 at index \[1\]"):
            trees.from_links(twice, torch.full_like(twice, -1))
        with pytest.raises(ValueError, match=r"parents: .*before its child"):
            trees.links(torch.tensor([[-1, 1]]))
