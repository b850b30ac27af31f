"""commit_kv against plain loops over slots, on the bits of the whole pool."""

from typing import Any

import pytest
import torch
from cache_layouts import LAYOUTS, assert_same_bits, make_pool, make_table, slot_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pydecode

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def is_good(
    path: list[int], n: int, length: int, capacity: int, num_rows: int, staged: bool
) -> bool:
    if not (0 <= n < len(path)) or length < 0:
        return False
    used = path[: n + 1]
    return (
        used[0] == 0
        and used == sorted(set(used))
        and used[-1] < num_rows
        and length + (n if staged else used[-1]) < capacity
    )


def loops(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    path: Tensor,
    num_accepted: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    source: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The oracle, in place: every row is read before one is written."""
    result = cache_seqlens.clone()
    page_size = k_caches[0].shape[1]
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    moves: list[tuple[int, Any, Any, int]] = []  # request, source slot, target slot, node
    for b, nodes in enumerate(path.tolist()):
        n, length = int(num_accepted[b]), int(cache_seqlens[b])
        num_rows = 1024 if source is None else source[0].shape[2]
        if not is_good(nodes, n, length, capacity, num_rows, source is not None):
            continue
        result[b] = length + n + 1
        for j, node in enumerate(nodes[: n + 1]):
            old = slot_of(k_caches[0], block_table, b, length + node)
            new = slot_of(k_caches[0], block_table, b, length + j)
            if new is not None and (source is not None or (old is not None and old != new)):
                moves.append((b, old, new, node))
    for i in range(len(k_caches)):
        for c, cache in enumerate((k_caches[i], v_caches[i])):
            bits = cache.view(torch.uint8) if cache.element_size() == 1 else cache
            if source is None:
                values = [bits[old].clone() for _, old, _, _ in moves]
            else:
                rows = source[c].view(bits.dtype)
                values = [rows[i, b, node] for b, _, _, node in moves]
            for (_, _, new, _), value in zip(moves, values):
                bits[new] = value
    return result


def random_path(num_nodes: int, width: int) -> tuple[list[int], int]:
    """The root, then some later nodes in order, then -1."""
    n = int(torch.randint(0, min(width, num_nodes), ()))
    nodes = (1 + torch.randperm(num_nodes - 1)[:n]).sort().values.tolist() if n else []
    return [0, *nodes] + [-1] * (width - 1 - n), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 16, None])
def test_every_bit_of_the_pool(
    backend: str, page_size: int | None, staged: bool, layout: str, dtype: torch.dtype
) -> None:
    B, T, P, layers = 5, 9, 5, 2
    width = {1: 14, 3: 6, 16: 2, None: 0}[page_size]
    shape = (B, 21) if page_size is None else (B * width + 3, page_size)
    pool = make_pool(layout, *shape, 2, (4, 3), dtype, layers=layers)
    table = None if page_size is None else make_table(B, width, shape[0])
    if table is not None:
        table[3, width // 2], table[4, -1] = -1, shape[0]  # unmapped and outside of the pool
    drawn = [random_path(T, P) for _ in range(B)]
    path = torch.tensor([p for p, _ in drawn], dtype=torch.int32)
    num_accepted = torch.tensor([n for _, n in drawn], dtype=torch.int32)
    path[2], num_accepted[2] = -1, 0  # undecided
    path[0], num_accepted[0] = torch.tensor([0, 2, 3, 5, 8]), 2  # the rest is not read
    lengths = torch.randint(0, 6, (B,))
    source = None
    if staged:
        rows = torch.randint(0, 256, (2, layers, B, T, 2, 4 * dtype.itemsize), dtype=torch.uint8)
        source = (rows[0].view(dtype), rows[1].view(dtype)[..., :3])
    want = pool.clone()
    new = loops(want.k, want.v, path, num_accepted, lengths, table, source)
    assert new[2] == lengths[2]
    got = pydecode.commit_kv(
        *(pool.k, pool.v, path, num_accepted),
        **dict(cache_seqlens=lengths, block_table=table, source=source, backend=backend),
    )
    assert torch.equal(got, new)
    assert_same_bits(pool.buffer, want.buffer)


@pytest.mark.parametrize("staged", [False, True])
def test_a_stacked_cache_is_its_layers(backend: str, staged: bool) -> None:
    stacked = torch.randn(2, 3, 2, 16, 2, 4)  # K and V, layers, B
    path, num_accepted = torch.tensor([[0, 3, 5], [0, 1, 4]]), torch.tensor([2, 2])
    source = (torch.randn(3, 2, 6, 2, 4), torch.randn(3, 2, 6, 2, 4)) if staged else None
    lengths, listed = torch.tensor([4, 7], dtype=torch.int32), stacked.clone()
    options = dict(cache_seqlens=lengths, source=source, backend=backend)
    one = pydecode.commit_kv(*stacked, path, num_accepted, **options)
    two = pydecode.commit_kv(
        list(listed[0]), tuple(listed[1]), path.int(), num_accepted.int(), **options
    )
    assert one.dtype == two.dtype == torch.int32
    assert one.tolist() == two.tolist() == [7, 10]
    assert_same_bits(stacked, listed)
    assert lengths.tolist() == [4, 7]


def test_moves_that_overlap(backend: str) -> None:
    """Node 2 goes where node 1 was, and node 3 where node 2 was."""
    cache = torch.arange(10.0).view(1, 1, 10, 1, 1)
    path, num_accepted = torch.tensor([[0, 2, 3, 4, 6]]), torch.tensor([4])
    pydecode.commit_kv(
        cache, cache.clone(), path, num_accepted, cache_seqlens=torch.tensor([2]), backend=backend
    )
    assert cache.flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 7, 8, 9]


BAD_PATHS = {
    "does not start at 0": ([1, 2, 3], 2),
    "repeats": ([0, 2, 2], 2),
    "goes back": ([0, 3, 1], 2),
    "ends early": ([0, -1, -1], 1),
    "is not as wide": ([0, 1, 2], 3),
    "negative count": ([0, 1, 2], -1),
    "is huge": ([0, 1, 2**31 - 1], 2),
    "past the rows": ([0, 1, 6], 2),
    "past the capacity": ([0, 1, 5], 2),  # length 9, in a cache of 14
}


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("case", BAD_PATHS)
def test_a_bad_path_keeps_all(backend: str, case: str, staged: bool) -> None:
    path, n = BAD_PATHS[case]
    length = {False: 9, True: 12}[staged] if case == "past the capacity" else 2
    num_rows = 6
    capacity = 14 if length != 2 else (14 if staged else length + num_rows)
    cache = torch.randn(2, 1, 2, capacity, 2, 4)
    before = cache.clone()
    rows = (torch.randn(1, 2, num_rows, 2, 4), torch.randn(1, 2, num_rows, 2, 4))
    args = (torch.tensor([path, [0, 1, 4]]), torch.tensor([n, 1]))
    options = dict(cache_seqlens=torch.tensor([length, 2]), source=rows if staged else None)
    new = pydecode.commit_kv(*cache, *args, **options, backend=backend)
    assert new.tolist() == [length, 4]
    assert_same_bits(cache[:, :, 0], before[:, :, 0])
    with (
        pydecode.checks(True),
        pytest.raises(ValueError, match=r"path: expected 0 = .*index \[0\]"),
    ):
        pydecode.commit_kv(*cache, *args, **options)


def test_bad_lengths_keep_all(backend: str) -> None:
    cache = torch.randn(2, 1, 3, 8, 2, 4)
    before = cache.clone()
    path, num_accepted = torch.tensor([[0, 2]] * 3), torch.tensor([1] * 3)
    lengths = torch.tensor([-1, 8, 2**63 - 2])  # whose sum with a node wraps around
    new = pydecode.commit_kv(*cache, path, num_accepted, cache_seqlens=lengths, backend=backend)
    assert torch.equal(new, lengths)
    assert_same_bits(cache, before)


def test_shared_prefix_pages_keep_their_bits(backend: str) -> None:
    """Two requests share the pages wholly below their lengths."""
    cache = torch.randn(2, 1, 8, 4, 2, 4)
    before = cache.clone()
    table = torch.tensor([[6, 1, 2, 3], [6, 1, 4, 5]])
    path, num_accepted = torch.tensor([[0, 3, 5], [0, 2, 4]]), torch.tensor([2, 2])
    lengths = torch.tensor([8, 9])
    new = pydecode.commit_kv(
        *(*cache, path, num_accepted),
        **dict(cache_seqlens=lengths, block_table=table, backend=backend),
    )
    loops(list(before[0]), list(before[1]), path, num_accepted, lengths, table)
    assert new.tolist() == [11, 12]
    assert_same_bits(cache, before)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_trees_pages_and_strides(data: st.DataObject) -> None:
    """Any batch equals the loops, and each request alone."""
    draw = data.draw
    B, T, P = draw(st.integers(0, 4)), draw(st.integers(1, 12)), draw(st.integers(0, 5))
    page_size, width = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    pages = draw(st.integers(0, 30))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    pool = make_pool(draw(st.sampled_from(LAYOUTS)), pages, page_size, 1, (2, 3), torch.float32)
    table = torch.full((B, width), -1)
    free = torch.randperm(pages)[: B * width]
    table.view(-1)[: len(free)] = free
    path = torch.full((B, P), -1)
    num_accepted = torch.zeros(B, dtype=torch.int64)
    for b in range(B if P else 0):
        nodes, num_accepted[b] = random_path(T, P)
        path[b] = torch.tensor(nodes)
        if draw(st.integers(0, 3)) == 0:  # anything at all
            path[b] = torch.randint(-2, T + 1, (P,))
            num_accepted[b] = int(torch.randint(-1, P + 2, ()))
    lengths = torch.randint(0, page_size * width + 2, (B,))
    source = None
    if draw(st.booleans()):
        source = (torch.randn(1, B, T, 1, 2), torch.randn(1, B, T, 1, 3))
    want, alone = pool.clone(), pool.clone()
    new = loops(want.k, want.v, path, num_accepted, lengths, table, source)
    got = pydecode.commit_kv(
        pool.k, pool.v, path, num_accepted, cache_seqlens=lengths, block_table=table, source=source
    )
    assert torch.equal(got, new)
    assert_same_bits(pool.buffer, want.buffer)
    for b in range(B):
        at = slice(b, b + 1)
        one = None if source is None else (source[0][:, at], source[1][:, at])
        pydecode.commit_kv(
            *(alone.k, alone.v, path[at], num_accepted[at]),
            **dict(cache_seqlens=lengths[at], block_table=table[at], source=one),
        )
    assert_same_bits(alone.buffer, pool.buffer)
