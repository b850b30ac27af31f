"""What is remembered between calls must never be seen: every change of metadata counts."""

import threading

import numpy as np
import pytest
import torch

import pydecode
from pydecode.reference.memo import remember_last


def call(
    lengths: torch.Tensor, table: torch.Tensor, mask: torch.Tensor, tensors: tuple
) -> torch.Tensor:
    q, pool, kv = tensors
    return pydecode.tree_attention(
        q, pool, pool, kv, kv, mask=mask, cache_seqlens=lengths, block_table=table
    )


@pytest.fixture
def tensors() -> tuple:
    return torch.randn(1, 3, 2, 8), torch.randn(6, 4, 2, 8), torch.randn(1, 3, 2, 8)


CHANGES = {
    "in place": lambda x, value: x.copy_(value),
    "through a view": lambda x, value: x.view(-1).copy_(value.view(-1)),
    "through .data": lambda x, value: x.data.copy_(value),
    "through numpy": lambda x, value: np.copyto(x.numpy(), value.numpy()),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["lengths", "table", "mask"])
def test_changed_metadata_counts(change: str, which: int, inference: bool, tensors: tuple) -> None:
    with torch.inference_mode(inference):
        old = [torch.tensor([5]), torch.tensor([[3, 1]]), torch.tensor([[[1], [3], [7]]])]
        new = [torch.tensor([7]), torch.tensor([[2, 5]]), torch.tensor([[[1], [2], [5]]])]
        before = call(*old, tensors)
        CHANGES[change](old[which], new[which])
        after = call(*old, tensors)
        want = call(*(x.clone() for x in old), tensors)
    assert torch.equal(after, want)
    assert not torch.equal(before, after)


def test_what_is_remembered_is_no_view_of_the_callers_memory(tensors: tuple) -> None:
    """The same lengths come again after the first tensor of lengths has moved on."""
    mask, lengths = torch.tensor([[[1], [3], [7]]]), torch.tensor([5])
    call(lengths, torch.tensor([[3, 1]]), mask, tensors)
    lengths += 2
    got = call(torch.tensor([5]), torch.tensor([[3, 1, 2]]), mask, tensors)
    want = call(5, torch.tensor([[3, 1, 4]]), mask, tensors)  # type: ignore[arg-type]
    assert torch.equal(got, want)


def test_written_slots_follow_the_positions() -> None:
    k, positions = torch.ones(1, 1, 1, 4), torch.tensor([[2]])
    cache = torch.zeros(1, 8, 1, 4)
    for slot in (2, 5, 6):
        positions.numpy()[0, 0] = slot
        pydecode.write_kv(k, k, cache, cache.clone(), positions=positions)
    assert cache[0, :, 0, 0].nonzero().flatten().tolist() == [2, 5, 6]


def test_it_does_remember() -> None:
    calls = []
    remembered = remember_last(lambda x, n: calls.append(n) or x + n)
    x = torch.tensor([1, 2])
    first = remembered(x, 1)
    assert remembered(x.clone(), 1) is first
    assert remembered(x, 2).tolist() == [3, 4]
    assert remembered(x.int(), 2).dtype == torch.int32
    assert len(calls) == 3


def test_threads_do_not_meet(tensors: tuple) -> None:
    """Each thread's calls have its own lengths."""
    mask, table = torch.tensor([[[1], [3], [7]]]), torch.tensor([[3, 1]])
    want = {n: call(torch.tensor([n]), table, mask, tensors) for n in range(1, 6)}
    wrong = []

    def work(n: int) -> None:
        for _ in range(200):
            if not torch.equal(call(torch.tensor([n]), table, mask, tensors), want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
