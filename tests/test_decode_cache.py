"""PagedCache: pages and slots, commits through its parts, and views of some requests."""

import doctest

import pytest
import torch

import pydecode.decode.cache
from pydecode.decode.cache import PagedCache

TREE_PATH = torch.tensor([[0, 2, 3, -1], [-1, -1, -1, -1]])
ACCEPTED = torch.tensor([2, 0])


def filled(**options: object) -> tuple[PagedCache, torch.Tensor, torch.Tensor]:
    """Two requests with 3 and 6 committed tokens and 4 rows in flight, and their K and V."""
    cache = PagedCache(3, 2, 10, 2, 8, v_head_dim=4, page_size=4, **options)  # type: ignore[arg-type]
    k, v = torch.randn(3, 2, 10, 2, 8), torch.randn(3, 2, 10, 2, 4)
    for layer in range(3):
        slots = torch.arange(10).expand(2, 10)
        pydecode.write_kv(
            *(k[layer], v[layer], *cache.layer(layer)),
            positions=slots,
            block_table=cache.block_table,
        )
    cache.lengths += torch.tensor([3, 6])
    return cache, k, v


def dense(cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache read back in order, K and V as [layers, B, capacity, H, D]."""
    table = cache.block_table.long()
    return cache.k[:, table].flatten(2, 3), cache.v[:, table].flatten(2, 3)


def test_shapes_and_rounding() -> None:
    cache = PagedCache(2, 3, 17, 4, 8, page_size=8, dtype=torch.bfloat16)
    assert cache.k.shape == (2, 9, 8, 4, 8) == cache.v.shape
    assert cache.k.dtype == torch.bfloat16
    assert (cache.capacity, cache.block_table.dtype) == (24, torch.int32)
    assert cache.lengths.dtype == torch.int64
    assert cache.lengths.tolist() == [0, 0, 0]
    assert sorted(cache.block_table.flatten().tolist()) == list(range(9))
    assert PagedCache(2, 3, 0, 4, 8).capacity == 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_commit_keeps_the_path(shuffle: bool) -> None:
    cache, k, v = filled(shuffle=shuffle)
    lengths = cache.lengths
    cache.commit(TREE_PATH, ACCEPTED)
    assert cache.lengths is lengths  # in place: views stay true
    assert lengths.tolist() == [6, 6]
    for got, rows in zip(dense(cache), (k, v)):
        expected = rows.clone()
        expected[:, 0, 3:6] = rows[:, 0, [3, 5, 6]]
        assert torch.equal(got[:, :, :10], expected)


def test_shuffled_pages_change_nothing() -> None:
    q = torch.randn(2, 4, 4, 8)
    results = []
    for shuffle in (False, True):
        torch.manual_seed(5)
        cache, _, _ = filled()
        if shuffle:  # the same pages under other numbers
            order = torch.randperm(cache.k.shape[1])
            cache.k, cache.v = cache.k[:, order], cache.v[:, order]
            cache.block_table = order.argsort().int()[cache.block_table.long()]
        cache.commit(TREE_PATH, ACCEPTED)
        results.append(
            pydecode.tree_attention(
                *(q, *cache.layer(1)),
                mask="causal",
                cache_seqlens=cache.lengths - 2,
                block_table=cache.block_table,
            )
        )
    assert torch.equal(*results)


def test_slots() -> None:
    cache, _, _ = filled()
    assert cache.slots(3).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert cache.slots(3, torch.tensor([0, 2])).tolist() == [[-1, -1, -1], [6, 7, -1]]
    assert cache.slots(6).max() == 11  # the last of three pages
    with pytest.raises(
        ValueError, match=r"capacity: expected room .* position 12, .* 12 positions"
    ):
        cache.slots(7)
    assert cache.slots(7, torch.tensor([7, 6])).shape == (2, 7)  # only valid rows count


def test_write_reaches_each_layer_and_nothing_else() -> None:
    cache, k, v = filled(shuffle=True)
    rows = [torch.randn(2, 2, 2, 8) for _ in range(2)], [torch.randn(2, 2, 2, 4) for _ in range(2)]
    slots = cache.slots(2, torch.tensor([2, 1]))
    cache.write((2, 0), *rows, slots)
    for got, expected, new in zip(dense(cache), (k, v), rows):
        for layer, x in zip((2, 0), new):
            expected[layer, 0, 3:5], expected[layer, 1, 6] = x[0], x[1, 0]
        assert torch.equal(got[:, :, :10], expected)


def test_rows_are_views_of_the_same_pool() -> None:
    cache, k, _ = filled(shuffle=True)
    one = cache.rows(slice(0, 1))
    one.commit(TREE_PATH[:1], ACCEPTED[:1])
    assert cache.lengths.tolist() == [6, 6]
    assert torch.equal(dense(cache)[0][:, 0, 4], k[:, 0, 5])
    picked = cache.rows(torch.tensor([1, 0]))
    assert picked.lengths.tolist() == [6, 6]
    picked.lengths += 1
    assert cache.lengths.tolist() == [6, 6]  # a copy
    assert torch.equal(dense(picked)[0], dense(cache)[0].flip(1))
    assert picked.capacity == cache.capacity


@pytest.mark.parametrize(("name", "value"), [("page_size", 0), ("capacity", -1)])
def test_bad_sizes_raise(name: str, value: int) -> None:
    arguments = {"capacity": 8, "page_size": 4, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value}"):
        PagedCache(1, 1, num_kv_heads=1, head_dim=4, **arguments)


def test_doctest() -> None:
    assert doctest.testmod(pydecode.decode.cache).failed == 0


@pytest.mark.parametrize("page", [-1, 2])
def test_an_unmapped_page_reaches_no_other_layer(page: int) -> None:
    """All layers are written by one call, as one pool: a page outside it must not alias."""
    cache = PagedCache(3, 1, 8, 1, 2, page_size=4)
    cache.block_table[0, 0] = page
    rows = [torch.ones(1, 2, 1, 2) for _ in range(3)]
    cache.write((0, 1, 2), rows, rows, torch.tensor([[1, 4]]))  # one on the bad page, one not
    assert cache.k[:, 0].count_nonzero() == 0
    assert cache.k[:, 1, 0].count_nonzero() == cache.k.count_nonzero() == 6
