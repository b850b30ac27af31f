"""CUDA-graph mode of FlashInfer's paged prefill wrapper: capture a run, plan anew, replay."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from graph_tape import Tape
from peer_flashinfer_prefill import Batch, flat, oracle, packed, random_batch, random_tree_mask
from test_flashinfer_prefill import close, plan, where  # noqa: F401
from torch import Tensor

import pydecode
from pydecode.compat.flashinfer import BatchPrefillWithPagedKVCacheWrapper, page_lists

POOL, PAGE = 40, 3


def graph_wrapper(B: int, mask_bytes: int | None = None) -> BatchPrefillWithPagedKVCacheWrapper:
    def buffer(n: int) -> Tensor:
        return torch.full((n,), 77, dtype=torch.int32)

    mask = None if mask_bytes is None else torch.full((mask_bytes,), 255, dtype=torch.uint8)
    lists = (buffer(B + 1), buffer(B + 1), buffer(20), buffer(B))
    return BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(0), "NHD", True, *lists, mask, buffer(B + 1)
    )


class Session:
    """Engine's tensors at fixed addresses, and batches that come and go in them."""

    def __init__(self, wrapper: BatchPrefillWithPagedKVCacheWrapper, rows: int) -> None:
        self.wrapper, self.graph = wrapper, Tape()
        self.k, self.v = torch.randn(2, POOL, PAGE, 1, 8).double()
        self.q = torch.zeros(rows, 2, 8).double()
        self.result: Any = None

    def next(self, rows: list[int], keys: list[int]) -> Batch:
        batch = random_batch(rows, keys, page_size=PAGE, spare=1)
        self.q[: len(batch.q)] = batch.q
        indices = torch.randperm(POOL)[: len(batch.indices)].int()
        return batch._replace(k=self.k, v=self.v, indices=indices)

    def run(self) -> Any:
        return self.wrapper.run(self.q, (self.k, self.v), return_lse=True)

    def capture(self) -> None:
        with self.graph:
            self.result = self.run()

    def check(self, batch: Batch, **rule: Any) -> None:
        """Replayed and run anew, against what the plan says."""
        want, n = oracle(batch, **rule), len(batch.q)
        self.graph.replay()
        close((self.result[0][:n], self.result[1][:n]), want)
        assert (self.result[0][n:] == 0).all()
        if n == len(self.q):
            close(self.run(), want)


SHAPES = [([3, 2, 2], [9, 4, 2]), ([1, 5, 1], [7, 5, 20]), ([0, 4, 3], [0, 19, 3])]


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("window_left", [-1, 1])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.usefixtures("where")
def test_replay_follows_the_plan(causal: bool, window_left: int, warm: bool) -> None:
    session = Session(graph_wrapper(3), 7)
    rule: dict[str, Any] = dict(causal=causal, window_left=window_left)
    plan(session.wrapper, session.next(*SHAPES[0]), **rule)
    if warm:
        session.run()
    session.capture()
    for shape in (*SHAPES, ([2, 1, 1], [5, 8, 1])):
        batch = session.next(*shape)
        plan(session.wrapper, batch, **rule)
        session.check(batch, **rule)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("first", ["custom_mask", "packed_custom_mask", "causal", "full"])
@pytest.mark.usefixtures("where")
def test_masks_come_and_go_under_one_graph(first: str, warm: bool) -> None:
    """flashinfer #860, #1028, #2690: no plan sees another's mask, whatever was captured."""
    session = Session(graph_wrapper(3, 60), 7)
    kinds = ("full", "custom_mask", "causal", "packed_custom_mask", "full", "causal")

    def next_plan(shape: tuple[list[int], list[int]], kind: str) -> tuple[Batch, dict[str, Any]]:
        batch = session.next(*shape)
        mask = [random_tree_mask(Q, K) for Q, K in zip(batch.rows, batch.keys)]
        given = {"custom_mask": flat, "packed_custom_mask": packed}
        if kind in given:
            plan(session.wrapper, batch, **{kind: given[kind](mask)})
            return batch, dict(mask=mask)
        plan(session.wrapper, batch, causal=kind == "causal")
        return batch, dict(causal=kind == "causal")

    next_plan(SHAPES[0], first)
    if warm:
        session.run()
    session.capture()
    for i, kind in enumerate(kinds):
        batch, rule = next_plan(SHAPES[i % 3], kind)
        session.check(batch, **rule)


def test_run_reads_the_same_memory_after_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the op keeps its address; the CPU's way to say that a graph stays valid."""
    session = Session(graph_wrapper(3, 60), 7)
    seen: list[dict[str, int]] = []

    def op(*args: Any, **kwargs: Any) -> Any:
        seen.append({n: x.data_ptr() for n, x in kwargs.items() if isinstance(x, Tensor)})
        return torch.zeros(7, 2, 8).double(), torch.zeros(2, 7).double()

    monkeypatch.setattr(pydecode, "tree_attention", op)
    for shape in SHAPES:
        batch = session.next(*shape)
        mask = [random_tree_mask(Q, K) for Q, K in zip(batch.rows, batch.keys)]
        plan(session.wrapper, batch, custom_mask=flat(mask), window_left=1)
        session.run()
    assert set(seen[0]) == {"mask", "cache_seqlens", "block_table", "cu_seqlens_q", "positions"}
    assert all(a == b for a, b in pairwise(seen))


@pytest.mark.parametrize("masked", [True, False])
def test_plan_and_run_do_not_synchronise(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_lists, "on_host", lambda x: False)
    for wrapper in (graph_wrapper(3, 60), BatchPrefillWithPagedKVCacheWrapper(torch.empty(0))):
        session = Session(wrapper, 7)
        batch = session.next(*SHAPES[0])
        mask = [random_tree_mask(Q, K) for Q, K in zip(batch.rows, batch.keys)]
        with Tape():
            plan(wrapper, batch, custom_mask=flat(mask) if masked else None)
            session.run()


def test_the_callers_buffers_are_filled() -> None:
    wrapper = graph_wrapper(3, 60)
    assert wrapper.is_cuda_graph_enabled
    batch = Session(wrapper, 7).next(*SHAPES[0])
    plan(wrapper, batch)
    buffers = wrapper._state.buffers
    assert buffers is not None
    for buffer, x in zip(buffers.lists, batch.lists):
        assert torch.equal(buffer[: len(x)], x)


def test_hints_of_the_first_plan_hold() -> None:
    session = Session(graph_wrapper(3), 7)
    plan(session.wrapper, session.next(*SHAPES[0]), max_token_per_sequence=4, max_sequence_kv=10)
    assert session.wrapper._state.table.shape == (3, 4)
    assert session.wrapper._state.max_rows == 4
    with pytest.raises(ValueError, match="max_token_per_sequence"):
        plan(session.wrapper, session.next([5, 1, 1], [5, 1, 1]))
    with pytest.raises(ValueError, match="max_token_per_sequence"):
        plan(session.wrapper, session.next(*SHAPES[0]), max_token_per_sequence=5)
    for bad in (dict(), dict(max_sequence_kv=13)):
        with pytest.raises(ValueError, match=r"max_sequence_kv: .* got 4 where there are 5"):
            plan(session.wrapper, session.next([3, 2, 2], [9, 4, 12 + (not bad)]), **bad)
    with pytest.raises(ValueError, match="block_tables"):
        plan(session.wrapper, session.next(*SHAPES[0]), block_tables=torch.zeros(3, 5).int())


def test_more_rows_than_a_mask_in_a_graph_has(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch([600, 600], [600, 600], Hq=1, D=1, Dv=1, page_size=64)
    ones = torch.ones(2 * 600 * 600, dtype=torch.bool)
    monkeypatch.setattr(page_lists, "on_host", lambda x: False)
    wrapper = graph_wrapper(2, 90_000)
    plan(wrapper, batch, custom_mask=ones)
    with pytest.raises(ValueError, match=r"got 1200 in all: .* max_token_per_sequence"):
        wrapper.run(batch.q, (batch.k, batch.v))
    wrapper = graph_wrapper(2, 90_000)
    plan(wrapper, batch, custom_mask=ones, max_token_per_sequence=600)
    rows = [0, 599, 600, 1199]
    got = wrapper.run_return_lse(batch.q, (batch.k, batch.v))
    want = oracle(batch, only=set(rows))
    close((got[0][rows], got[1][rows]), (want[0][rows], want[1][rows]))
    plan(wrapper, batch)  # and as many without a mask, which custom_mask_buf cannot say
    wrapper._state.max_rows = None
    got = wrapper.run_return_lse(batch.q, (batch.k, batch.v))
    close((got[0][rows], got[1][rows]), (want[0][rows], want[1][rows]))


def test_forward_sets_causal_after_the_plan() -> None:
    session = Session(graph_wrapper(3, 60), 7)
    batch = session.next(*SHAPES[0])
    plan(session.wrapper, batch)
    for causal in (True, False):
        got = session.wrapper.forward_return_lse(batch.q, (session.k, session.v), causal=causal)
        close(got, oracle(batch, causal=causal))


def test_what_graphs_cannot_take() -> None:
    session = Session(graph_wrapper(3), 7)
    batch = session.next(*SHAPES[0])
    ones = torch.ones(27 + 8 + 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="custom_mask_buf"):
        plan(session.wrapper, batch, custom_mask=ones)
    with pytest.raises(ValueError, match="custom_mask_buf: expected at least 5 bytes, got 4"):
        plan(graph_wrapper(3, 4), batch, custom_mask=ones)
    with pytest.raises(ValueError, match="paged_kv_indices"):
        plan(session.wrapper, batch._replace(indices=torch.zeros(21).int()))
    with pytest.raises(ValueError, match="qo_indptr"):
        plan(session.wrapper, session.next([1, 1], [1, 1]))
    with pytest.raises(NotImplementedError, match="whole_mask"):
        plan(session.wrapper, batch, whole_mask=True)
    plan(session.wrapper, batch)
    with pytest.raises(ValueError, match=r"qo_indptr: .* got 7 where there are 8"):
        plan(session.wrapper, random_batch([4, 2, 2], [9, 4, 2]))
