"""commit_kv in Triton, interpreted: every bit of the pool against loops over slots."""

from collections.abc import Callable
from typing import Any

import pytest
import test_commit_kv as cases
import torch
from cache_layouts import LAYOUTS, Pool, assert_same_bits, make_pool, make_table
from torch import Tensor

import pydecode

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.reference import commit_kv as module

    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(module, "commit_kv", refuse)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("page_size", [3, None])
@pytest.mark.parametrize(("layout", "dtype"), [*zip(LAYOUTS, [BF16, FP8, torch.float32, BF16])])
def test_every_bit(layout: str, dtype: torch.dtype, page_size: int | None, staged: bool) -> None:
    cases.test_every_bit_of_the_pool("triton", page_size, staged, layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e5m2])
def test_every_dtype(dtype: torch.dtype) -> None:
    cases.test_every_bit_of_the_pool("triton", 1, False, "nhd", dtype)


PATHS: dict[str, Callable[[int], list[int]]] = {
    "chain": lambda n: list(range(n)),
    "one rejected": lambda n: [0, *range(2, n + 1)],
    "one rejected late": lambda n: [*range(n - 1), n],
    "every other": lambda n: list(range(0, 2 * n, 2)),
    "far": lambda n: [0, *range(n + 5, 2 * n + 4)],
    "any": lambda n: [0, *sorted((1 + torch.randperm(2 * n)[: n - 1]).tolist())],
}


def commit(
    pool: Pool, paths: list[list[int]], lengths: Tensor, table: Tensor | None, **more: Any
) -> None:
    """Against the loops: the lengths, and all bits."""
    width = max(len(p) for p in paths) + 2
    path = torch.tensor([p + [-1] * (width - len(p)) for p in paths])
    num_accepted = torch.tensor([len(p) - 1 for p in paths], dtype=torch.int32)
    want = pool.clone()
    new = cases.loops(want.k, want.v, path, num_accepted, lengths, table, more.get("source"))
    got = pydecode.commit_kv(
        *(pool.k, pool.v, path, num_accepted),
        **dict(cache_seqlens=lengths, block_table=table, backend="triton", **more),
    )
    assert torch.equal(got, new)
    assert (new > lengths).any()
    assert_same_bits(pool.buffer, want.buffer)


@pytest.mark.parametrize("n", [9, 40])
def test_paths_that_overlap(n: int) -> None:
    """Longer than what one turn moves, into each other's places, in one batch."""
    B = len(PATHS)
    pool = make_pool("padded", B * 40, 4, 2, (4, 2), torch.float16)
    paths = [PATHS[kind](n) for kind in PATHS]
    commit(pool, paths, torch.randint(0, 40, (B,)), make_table(B, 40, B * 40))


def test_a_path_of_hundreds() -> None:
    """More entries than are looked at together; then one of them, late, does not increase."""
    pool = make_pool("nhd", 2, 900, 1, (1, 1), torch.float32)
    commit(pool, [PATHS["any"](300), PATHS["one rejected late"](140)], torch.tensor([3, 7]), None)
    path = torch.tensor([PATHS["any"](300), PATHS["any"](300)])
    path[0, 290] = path[0, 289]
    before, lengths = pool.k[0][0].clone(), torch.tensor([5, 6])
    new = pydecode.commit_kv(
        *(pool.k, pool.v, path, torch.tensor([299, 299])),
        **dict(cache_seqlens=lengths, backend="triton"),
    )
    assert new.tolist() == [5, 306]
    assert_same_bits(pool.k[0][0], before)


def test_rows_wider_than_a_program() -> None:
    """Slices of a row; in words of every width, as the addresses allow."""
    for D, dtype, pad in ((128, torch.float32, 0), (66, BF16, 2), (300, FP8, 1), (130, BF16, 0)):
        pool = make_pool("padded" if pad else "nhd", 6, 5, 5, (D, D), dtype)
        commit(pool, [[0, 2, 3], [0, 1, 4]], torch.tensor([1, 3]), make_table(2, 3, 6))


@pytest.mark.parametrize("offset", [1, 2, 4, 8, 16])
def test_words_are_as_wide_as_addresses_allow(offset: int) -> None:
    from pydecode.triton_kernels import commit_kv as module

    storage = torch.randint(0, 256, (3 * 2 * 8 * 16 + 64,), dtype=torch.uint8)
    assert storage.data_ptr() % 16 == 0
    cache = storage[offset:][: 3 * 2 * 8 * 16].view(3, 2, 8, 16).view(FP8).unsqueeze(3)
    many = [cache[0, None], cache[1, None], cache[2, None]]  # a layer each, [1, 2, 8, 1, 16]
    many = [x.flatten(0, 1) for x in many]
    before = storage.clone()
    pydecode.commit_kv(
        *(many, [torch.zeros_like(x) for x in many]),
        *(torch.tensor([[0, 3]] * 2), torch.tensor([1, 1])),
        **dict(cache_seqlens=torch.tensor([2, 4]), backend="triton"),
    )
    rows = before[offset:][: 3 * 2 * 8 * 16].view(3, 2, 8, 16)
    rows[:, 0, 3], rows[:, 1, 5] = rows[:, 0, 5].clone(), rows[:, 1, 7].clone()
    assert_same_bits(storage, before)
    assert list(module._tables.values())[-1][1] == offset


def test_layers_each_in_its_own_layout() -> None:
    """A list's layers may have their own strides; a stacked tensor and its layers agree."""
    B, S, H, D = 2, 12, 2, 4
    full = torch.randn(2, 3, B, S, H, D)
    stacked = full.clone()
    odd = [full[0, 0].clone(), full[0, 1].transpose(1, 2).contiguous().transpose(1, 2)]
    odd.append(torch.cat([full[0, 2]] * 2, -1)[..., :D])
    values = [x.clone() for x in full[1]]
    path, n = torch.tensor([[0, 2, 5], [0, 3, 4]]), torch.tensor([2, 2])
    options = dict(cache_seqlens=torch.tensor([3, 0]), backend="triton")
    one = pydecode.commit_kv(*stacked, path, n, **options)
    two = pydecode.commit_kv(odd, values, path, n, **options)
    assert one.tolist() == two.tolist() == [6, 3]
    assert_same_bits(stacked, torch.stack([torch.stack(odd), torch.stack(values)]))
    assert not torch.equal(stacked, full)


@pytest.mark.parametrize("staged", [False, True])
def test_stacked(staged: bool) -> None:
    cases.test_a_stacked_cache_is_its_layers("triton", staged)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("case", cases.BAD_PATHS)
def test_a_bad_path_keeps_all(case: str, staged: bool) -> None:
    cases.test_a_bad_path_keeps_all("triton", case, staged)


def test_bad_lengths_and_shared_prefixes() -> None:
    cases.test_bad_lengths_keep_all("triton")
    cases.test_shared_prefix_pages_keep_their_bits("triton")


def test_empty() -> None:
    ones, no = torch.ones(2, 1, 2, 8, 1, 4), torch.zeros(0, dtype=torch.int64)
    call = dict(backend="triton")
    lengths = torch.tensor([3, 4])
    path, n = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    assert pydecode.commit_kv(*ones, path, n, cache_seqlens=lengths, **call).tolist() == [4, 5]
    assert pydecode.commit_kv(*ones, path[:, :0], n, cache_seqlens=lengths, **call).tolist() == [
        3,
        4,
    ]  # P = 0
    none = torch.zeros(2, 1, 0, 8, 1, 4)
    assert pydecode.commit_kv(*none, path[:0], n[:0], cache_seqlens=no, **call).shape == (0,)
    for shape in ((2, 0, 2, 8, 1, 4), (2, 1, 2, 8, 0, 4), (2, 1, 2, 8, 1, 0)):
        empty = torch.zeros(shape)  # layers, heads, D of 0: only lengths
        assert pydecode.commit_kv(*empty, path, n, cache_seqlens=lengths, **call).tolist() == [4, 5]
    table = torch.zeros(2, 4, dtype=torch.int32)
    pages = torch.zeros(2, 1, 0, 4, 1, 4)  # a pool without pages
    got = pydecode.commit_kv(*pages, path, n, cache_seqlens=lengths, block_table=table, **call)
    assert got.tolist() == [4, 5]


def test_one_launch_and_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydecode.triton_kernels import commit_kv as module

    launches: list[Any] = []

    class Counted:
        arg_names = module.commit.arg_names

        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return real[grid]

    real, builder = module.commit, module.build_table
    built: list[int] = []
    monkeypatch.setattr(module, "commit", Counted())
    monkeypatch.setattr(module, "build_table", lambda *x: (built.append(1), builder(*x))[1])
    ks, vs = ([torch.randn(2, 8, 2, 4) for _ in range(5)] for _ in "kv")
    args = (ks, vs, torch.tensor([[0, 2, 4]] * 2), torch.tensor([2, 2]))
    for _ in range(3):
        pydecode.commit_kv(*args, cache_seqlens=torch.tensor([1, 2]), backend="triton")
    assert len(launches) == 3
    assert len(built) == 1
    monkeypatch.setattr(module, "capturing", lambda device: True)
    pydecode.commit_kv(*args, cache_seqlens=1, backend="triton")  # the table is there
    assert len(module._in_graphs) >= 1
    fresh = [x.clone() for x in ks]
    with pytest.raises(RuntimeError, match="before the capture"):
        pydecode.commit_kv(fresh, *args[1:], cache_seqlens=1, backend="triton")
