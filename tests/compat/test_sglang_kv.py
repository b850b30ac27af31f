"""Where an accepted path's K/V go, against SGLang's slot lists."""

from types import SimpleNamespace
from typing import Any

import peer_sglang as peer
import pytest
import torch
from adapters import ADAPTERS
from torch import Tensor

import pydecode
from pydecode.compat.sglang import (
    commit_accepted_kv,
    get_src_tgt_cache_loc,
    move_accept_tokens_to_target_kvcache,
    move_kv_cache_native,
)

NDT, S = 8, 5


class MHATokenToKVPool(SimpleNamespace):
    """With two layers of 2 heads."""


class MLATokenToKVPool(SimpleNamespace):
    """One latent row a token, of an odd width."""


class SWAKVPool(SimpleNamespace):
    """Two pools, and where a slot of the first lies in the second."""

    def translate_loc_from_full_to_swa(self, loc: Tensor) -> Tensor:
        return self.mapping[loc]


def accepted(bs: int) -> tuple[Tensor, Tensor]:
    """accept_index of random ascending paths, and the numbers of drafts on them."""
    num = torch.randint(0, S, (bs,), dtype=torch.int32)
    path = torch.rand(bs, NDT - 1).argsort(-1)[:, : S - 1] + 1
    path = torch.where(torch.arange(1, S) <= num[:, None], path, NDT).sort(-1).values
    path = torch.cat([torch.zeros(bs, 1).long(), path], 1)
    path = torch.where(path < NDT, path + NDT * torch.arange(bs)[:, None], -1)
    return path.int(), num


def buffers(slots: int, dtype: torch.dtype = torch.float32, width: int = 4) -> list[Tensor]:
    return [(torch.rand(slots, 2, width) * 200).to(dtype) for _ in range(2)]


def moved(buffer: list[Tensor], loc: Tensor, index: Tensor, num: Tensor) -> list[Tensor]:
    src, tgt = peer.source_and_target(loc.tolist(), index.tolist(), num.tolist(), NDT)
    want = [x.clone() for x in buffer]
    for x, old in zip(want, buffer):
        for a, b in zip(tgt, src):
            x[a] = old[b]
    return want


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want))


def allocator(pool: Any) -> Any:
    return SimpleNamespace(get_kvcache=lambda: pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("bs", [1, 7, 90])
def test_accepted_rows_come_first(bs: int, dtype: torch.dtype) -> None:
    index, num = accepted(bs)
    slots = bs * NDT + 30
    loc = torch.randperm(slots)[: bs * NDT]  # pages of one token, anywhere in the pool
    k, v = buffers(slots, dtype), buffers(slots, dtype, width=6)
    want = moved(k, loc, index, num), moved(v, loc, index, num)
    pool = MHATokenToKVPool(k_buffer=k, v_buffer=v)
    batch = SimpleNamespace(out_cache_loc=loc)
    move_accept_tokens_to_target_kvcache(batch, index, num, allocator(pool))
    assert same(k, want[0])
    assert same(v, want[1])


def test_stacked_layers_and_int32_slots() -> None:
    index, num = accepted(6)
    loc = torch.randperm(60)[: 6 * NDT]
    k = buffers(60)
    want = moved(k, loc, index, num)
    stacked = torch.stack(k), torch.stack(k)
    commit_accepted_kv(*stacked, loc.int(), index, num)
    assert same(list(stacked[0]), want)
    assert same(list(stacked[1]), want)


def test_latent_rows_move_whole() -> None:
    """SGLang's move leaves MLA pools alone (sglang#26866)."""
    index, num = accepted(6)
    loc = torch.randperm(60)[: 6 * NDT]
    kv = [torch.rand(60, 1, 9) for _ in range(3)]
    want = moved(kv, loc, index, num)
    pool = MLATokenToKVPool(kv_buffer=kv)
    batch = SimpleNamespace(out_cache_loc=loc)
    move_accept_tokens_to_target_kvcache(batch, index, num, allocator(pool))
    assert same(kv, want)


def test_sliding_window_pools() -> None:
    index, num = accepted(6)
    loc, mapping = torch.randperm(60)[: 6 * NDT], torch.randperm(60)
    full, swa = buffers(60), buffers(60)
    want = moved(full, loc, index, num), moved(swa, mapping[loc], index, num)
    pools = [MHATokenToKVPool(k_buffer=x, v_buffer=[y.clone() for y in x]) for x in (full, swa)]
    pool = SWAKVPool(full_kv_pool=pools[0], swa_kv_pool=pools[1], mapping=mapping)
    batch = SimpleNamespace(out_cache_loc=loc)
    move_accept_tokens_to_target_kvcache(batch, index, num, allocator(pool))
    assert same(full, want[0])
    assert same(swa, want[1])
    assert same(pools[1].v_buffer, want[1])


def test_a_pool_that_may_hold_more_raises() -> None:
    class NSATokenToKVPool(MLATokenToKVPool):
        pass

    pool = NSATokenToKVPool(kv_buffer=[torch.zeros(4, 1, 4)], index_k_with_scale_buffer=[])
    batch = SimpleNamespace(out_cache_loc=torch.arange(NDT))
    with pytest.raises(NotImplementedError, match=r"got NSATokenToKVPool; call commit_accepted_kv"):
        move_accept_tokens_to_target_kvcache(batch, *accepted(1), allocator(pool))


@pytest.mark.parametrize(
    "path",
    [
        [-1, -1, -1, -1, -1],  # a padded request
        [0, 3, 2, -1, -1],  # not ascending
        [8, 9, 10, -1, -1],  # another request's rows
        [0, 2, 10**6, -1, -1],
    ],
)
def test_bad_paths_leave_the_cache_alone(path: list[int]) -> None:
    index = torch.tensor([path, [8, 10, 11, -1, -1]], dtype=torch.int32)
    num = torch.tensor([2, 2], dtype=torch.int32)
    k, loc = buffers(20), torch.arange(16)
    index_1, num_1 = torch.tensor([[0, -1], [8, 10]]), torch.tensor([0, 1])
    want = moved(k, loc, index_1, num_1)
    for x, old in zip(want, k):
        x[10] = old[11]
    v = [x.clone() for x in k]
    commit_accepted_kv(k, v, loc, index, num)
    assert same(k, want)
    assert same(v, want)


def test_slots_outside_the_pool() -> None:
    index, num = torch.tensor([[0, 2, 4, -1, -1]]), torch.tensor([2])
    loc = torch.tensor([0, 10**12, 2, 3, 4, 5, 6, 7])  # where row 1 goes; row 2 goes to slot 2
    k = buffers(8)
    want = [torch.cat([x[:2], x[4:5], x[3:]]) for x in k]
    commit_accepted_kv(k, [x.clone() for x in k], loc, index, num)
    assert same(k, want)


@pytest.mark.parametrize("page", [1, 4, 16])
def test_source_and_target_slots(page: int) -> None:
    bs = 200
    index, num = accepted(bs)
    loc = torch.randperm(bs * NDT) + 1
    lengths = torch.randint(0, 40, (bs,))
    src, tgt = peer.source_and_target(loc.tolist(), index.tolist(), num.tolist(), NDT)
    free = [peer.slots_to_free(x, n, NDT, page) for x, n in zip(lengths.tolist(), num.tolist())]

    got = get_src_tgt_cache_loc(lengths, loc, index, num, NDT, page)
    kept = index != -1
    assert got[0].shape == got[1].shape == index.shape
    assert got[0][kept].tolist() == src
    assert got[1][kept].tolist() == tgt
    assert not got[0][~kept].any()
    assert not got[1][~kept].any()
    assert got[2].tolist() == free

    compact = torch.tensor(peer.compact(index.tolist()), dtype=torch.int32)
    got = get_src_tgt_cache_loc(lengths, loc, compact, num, NDT, page)
    assert [x.tolist() for x in got] == [src, tgt, free]
    assert got[0].dtype == loc.dtype


def test_source_and_target_of_hostile_rows() -> None:
    index = torch.tensor([[0, 10**9, -5], [8, 9, 10]])
    args = torch.arange(2), torch.arange(16), index, torch.tensor([9, -3]), NDT, 1
    src, tgt, _ = get_src_tgt_cache_loc(*args)
    assert src.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert tgt.tolist() == [[0, 0, 0], [0, 0, 0]]
    for loc in (torch.arange(16), torch.zeros(0).long()):
        get_src_tgt_cache_loc(*args[:1], loc, index.flatten(), *args[3:])
    empty = get_src_tgt_cache_loc(*(x[:0] for x in args[:4]), NDT, 1)
    assert [x.shape for x in empty] == [(0, 3), (0, 3), (0,)]


@pytest.mark.parametrize("n", [0, 1, 30, 511])
def test_move(n: int) -> None:
    """Overlapping: slots that are read in one move and written in another."""
    slots = torch.randperm(2 * n + 9)
    tgt, src = slots[:n], slots[n // 2 : n // 2 + n]
    k, v = buffers(2 * n + 9), buffers(2 * n + 9)
    want = [x.index_copy(0, tgt, x[src]) for x in (*k, *v)]
    move_kv_cache_native(k, v, tgt, src)
    assert same([*k, *v], want)


def test_move_of_padding_and_of_too_many() -> None:
    k = buffers(9)
    want = [torch.cat([x[:3], x[7:8], x[4:]]) for x in k]
    tgt, src = torch.tensor([[0, 3, 0], [8, 0, 0]]), torch.tensor([[0, 7, 0], [99, 0, 0]])
    move_kv_cache_native(k, [x.clone() for x in k], tgt, src)
    assert same(k, want)
    with pytest.raises(ValueError, match="tgt_loc: expected at most 511 slots, got 512"):
        move_kv_cache_native(k, k, torch.zeros(512).long(), torch.zeros(512).long())


def test_errors() -> None:
    index, num = accepted(2)
    loc, k = torch.arange(2 * NDT), buffers(20)
    with pytest.raises(
        ValueError, match=r"out_cache_loc: expected \[bs \* ndt\] slots with bs = 2"
    ):
        commit_accepted_kv(k, k, loc[:-1], index, num)
    with pytest.raises(ValueError, match=r"v_buffer: expected \[slots, Hkv, D\] a layer"):
        commit_accepted_kv(k, [x[None] for x in k], loc, index, num)
    with pytest.raises(ValueError, match=r"k_buffer: expected \[layers, slots, Hkv, D\]"):
        commit_accepted_kv(k[0], k, loc, index, num)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name.startswith("sglang.")])
def test_good_calls_pass_the_checks(name: str) -> None:
    function, args, kwargs = ADAPTERS[name].make(4)
    with pydecode.checks(True):
        function(*args, **kwargs)
