"""FlashInfer's paged prefill wrapper against its documented semantics, without a custom mask."""

import math
from typing import Any

import pytest
import torch
from peer_flashinfer_prefill import Batch, oracle, random_batch
from torch import Tensor

import pydecode
from pydecode.compat.flashinfer import BatchPrefillWithPagedKVCacheWrapper, page_lists

DOUBLE = torch.float64


@pytest.fixture(params=["host", "device"])
def where(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the host sees what the lists hold; on a GPU it does not."""
    if request.param == "device":
        monkeypatch.setattr(page_lists, "on_host", lambda x: False)
    return request.param


def wrapper_for(
    batch: Batch, layout: str = "NHD", **kwargs: Any
) -> BatchPrefillWithPagedKVCacheWrapper:
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(0), layout)
    plan(wrapper, batch, **kwargs)
    return wrapper


def plan(wrapper: BatchPrefillWithPagedKVCacheWrapper, batch: Batch, **kwargs: Any) -> None:
    (_, page_size, Hkv, D), Dv = batch.k.shape, batch.v.shape[-1]
    sizes = (batch.q.shape[1], Hkv, D, page_size, Dv)
    wrapper.plan(*batch.lists, *sizes, q_data_type=batch.q.dtype, **kwargs)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], atol: float = 1e-11) -> None:
    for x, exact in zip(got, want):
        torch.testing.assert_close(x.double(), exact, rtol=0, atol=atol)


def stored(batch: Batch, layout: str) -> Any:
    """The pool as an engine stores it."""
    k, v = batch.k, batch.v
    if layout.startswith("HND"):
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    if layout.endswith("no_page"):
        at = 1 if layout.startswith("NHD") else 2
        k, v = k.squeeze(at), v.squeeze(at)
    return (k, v) if "tuple" in layout else torch.stack((k, v), 1)


LENGTHS = {
    "ragged": ([3, 1, 5, 2], [9, 1, 5, 20]),
    "empty_requests": ([0, 4, 0, 2], [7, 4, 0, 6]),
    "fewer_keys_than_rows": ([4, 3, 2], [2, 7, 0]),
    "one": ([1], [10]),
    "nobody": ([], []),
    "no_rows": ([0, 0], [3, 0]),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window_left", [-1, 0, 2])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_random_batches(lengths: str, window_left: int, causal: bool, where: str) -> None:
    batch = random_batch(*LENGTHS[lengths], spare=2)
    rule: dict[str, Any] = dict(causal=causal, window_left=window_left)
    got = wrapper_for(batch, **rule).run(batch.q, (batch.k, batch.v), return_lse=True)
    close(got, oracle(batch, **rule))


LAYOUTS = [(x, 4) for x in ("NHD", "HND", "NHD_tuple", "HND_tuple")]
LAYOUTS += [(f"{x}_no_page", 1) for x in ("NHD", "HND", "NHD_tuple", "HND_tuple")]


@pytest.mark.parametrize(("layout", "page_size"), LAYOUTS, ids=str)
def test_layouts(layout: str, page_size: int) -> None:
    batch = random_batch([3, 2], [9, 4], page_size=page_size, Hq=6, Hkv=3)
    wrapper = wrapper_for(batch, layout[:3], causal=True)
    close(wrapper.run(batch.q, stored(batch, layout), return_lse=True), oracle(batch, causal=True))


def test_numbers(where: str) -> None:
    """Scales, soft cap, sinks, a V head dim of its own."""
    batch = random_batch([3, 2], [9, 4], Hq=4, Hkv=2, Dv=5)
    sinks = torch.randn(4)
    wrapper = wrapper_for(batch, causal=True, sm_scale=0.7, logits_soft_cap=1.5)
    want = oracle(batch, causal=True, scale=0.7 * 2 * 0.5, soft_cap=1.5, sinks=sinks)
    for as_given in (float, torch.tensor, lambda x: torch.tensor([x])):
        q_scale, k_scale, v_scale = map(as_given, (2.0, 0.5, 3.0))
        scales: dict[str, Any] = dict(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        got = wrapper.run(batch.q, (batch.k, batch.v), **scales, sinks=sinks, return_lse=True)
        close(got, (3 * want[0], want[1]))
    got = wrapper.run(batch.q, (batch.k, batch.v), q_scale=torch.tensor(1.0), return_lse=True)
    close(got, oracle(batch, causal=True, scale=0.7, soft_cap=1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool) -> None:
    batch = random_batch([3, 2], [9, 4], dtype=dtype)
    kv_dtype = torch.float8_e4m3fn if fp8 else dtype
    batch = batch._replace(k=batch.k.to(kv_dtype), v=batch.v.to(kv_dtype))
    wrapper = wrapper_for(batch, causal=True, kv_data_type=kv_dtype)
    out, lse = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    close((out, lse), oracle(batch, causal=True), atol=0.02)


def test_results_go_where_the_caller_wants() -> None:
    batch = random_batch([3, 2], [9, 4])
    wrapper = wrapper_for(batch, causal=True)
    want = oracle(batch, causal=True)
    out, lse = torch.empty(5, 2, 8, dtype=DOUBLE), torch.empty(5, 2)
    result = wrapper.run(batch.q, (batch.k, batch.v), out=out, lse=lse, return_lse=True)
    assert result[0] is out
    assert result[1] is lse
    close((out, lse), want, atol=1e-5)
    lse.zero_()
    assert wrapper.run(batch.q, (batch.k, batch.v), out=out, lse=lse) is out
    close((out, lse), want, atol=1e-5)
    own = wrapper.run_return_lse(batch.q, (batch.k, batch.v))
    assert own[1].is_contiguous()
    close(own, want)
    with pytest.raises(ValueError, match="lse"):
        wrapper.run(batch.q, (batch.k, batch.v), lse=torch.empty(2, 5))


def test_older_names() -> None:
    """``forward``'s numbers replace the plan's, its defaults too."""
    batch = random_batch([3, 2], [9, 4])
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(0))
    assert wrapper.begin_forward.__func__ is wrapper.plan.__func__
    plan(wrapper, batch, causal=True, sm_scale=3.0, window_left=1)
    cache = (batch.k, batch.v)
    close((wrapper.forward(batch.q, cache), oracle(batch)[1]), oracle(batch))
    rule: dict[str, Any] = dict(causal=True, window_left=2)
    close(
        wrapper.forward_return_lse(batch.q, cache, **rule, sm_scale=0.1),
        oracle(batch, scale=0.1, **rule),
    )
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(torch.empty(0), torch.empty(0))
    assert wrapper.workspace_size(*batch.lists, 2, 1, 8, 3) == (0, 0)
    assert not wrapper.is_cuda_graph_enabled


def test_a_window_of_one_run() -> None:
    batch = random_batch([3, 2], [9, 4])
    wrapper = wrapper_for(batch, causal=True, window_left=5)
    for window in (1, -1, 5):
        got = wrapper.run(batch.q, (batch.k, batch.v), window_left=window, return_lse=True)
        close(got, oracle(batch, causal=True, window_left=window))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_more_rows_than_tree_attention_takes(causal: bool, where: str) -> None:
    batch = random_batch([1030, 2], [1033, 9], page_size=64, Hq=1)
    got = wrapper_for(batch, causal=causal).run(batch.q, (batch.k, batch.v), return_lse=True)
    rows = [0, 1, 700, 1024, 1029, 1030, 1031]
    want = oracle(batch, causal=causal, only=set(rows))
    close((got[0][rows], got[1][rows]), (want[0][rows], want[1][rows]))


@pytest.mark.parametrize(
    ("hint", "width"),
    [({}, 7), (dict(max_sequence_kv=13), 5), (dict(block_tables=torch.zeros(2, 6).int()), 6)],
    ids=["indices", "keys", "table"],
)
def test_hints_size_the_table(
    hint: dict[str, Any], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_lists, "on_host", lambda x: False)
    batch = random_batch([3, 2], [9, 4], spare=2)
    if "block_tables" in hint:
        hint["block_tables"][0, :3] = batch.indices[:3]
        hint["block_tables"][1, :2] = batch.indices[3:5]
    wrapper = wrapper_for(batch, max_token_per_sequence=4, **hint)
    assert wrapper._state.table.shape == (2, width)
    assert wrapper._state.max_rows == 4
    close(wrapper.run(batch.q, (batch.k, batch.v), return_lse=True), oracle(batch))
    monkeypatch.undo()
    # what the host sees is better than a hint, and a table is a table
    assert wrapper_for(batch, **hint)._state.table.shape == (2, 6 if "block_tables" in hint else 3)
    assert wrapper_for(batch, max_token_per_sequence=99)._state.max_rows == 3


def test_lists_may_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host plans with what it sees: here the row counts, not the pages."""
    batch = random_batch([3, 2], [9, 4])
    monkeypatch.setattr(page_lists, "on_host", lambda x: x is batch.qo_indptr)
    wrapper = wrapper_for(batch, causal=True)
    assert (wrapper._state.max_rows, wrapper._state.table.shape[1]) == (3, 5)
    close(wrapper.run(batch.q, (batch.k, batch.v), return_lse=True), oracle(batch, causal=True))


@pytest.mark.parametrize("mask", ["causal", None, "rows"])
def test_rows_before_key_0(mask: Any, backend: str) -> None:
    """What more rows than keys ask of the op: a place before key 0 is nobody's, and not clipped."""
    batch = random_batch([4, 3, 2], [2, 7, 0])
    state = wrapper_for(batch)._state
    if mask == "rows":
        mask = torch.ones(9, 4, dtype=torch.bool)
    got: Any = pydecode.tree_attention(
        *(batch.q, batch.k, batch.v),
        mask=mask,
        cache_seqlens=state.lengths.context,
        block_table=state.table,
        cu_seqlens_q=batch.qo_indptr,
        max_seqlen_q=4,
        return_lse=True,
        backend=backend,
    )
    want = oracle(batch, causal=isinstance(mask, str))
    close((got[0], got[1].mT / math.log(2)), want)


def test_checks_name_what_the_device_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_lists, "on_host", lambda x: False)
    batch = random_batch([3, 2], [9, 4])
    wrapper = wrapper_for(batch, max_sequence_kv=6)
    wrapper.run(batch.q, (batch.k, batch.v))
    with pydecode.checks(True), pytest.raises(ValueError, match="cache_seqlens"):
        wrapper.run(batch.q, (batch.k, batch.v))
