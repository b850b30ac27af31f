"""What only a GPU can show, for every op and backend that runs there: graphs, streams, no reads.

Skipped where torch sees no CUDA device; ``bench/device.sh test`` runs them on a lent one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples import EXAMPLES
from torch.utils import _pytree as pytree

import pydecode
from pydecode.check import run as checking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ON_GPU = ("reference", "triton", "cuda")


def cases() -> list[Any]:
    """(op, backend) for every backend of this version that takes CUDA tensors."""
    found = []
    for op, make in EXAMPLES.items():
        for backend in ON_GPU:
            function, args, kwargs = make()
            try:
                function(*args, **kwargs, backend=backend)
            except pydecode.BackendUnavailable as reason:
                if "no kernel" in str(reason) or f"has no '{backend}'" in str(reason):
                    continue
            found.append(pytest.param(op, backend, id=f"{op}-{backend}"))
    return found


def on_gpu(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), tree)


def call_of(op: str, backend: str) -> tuple[Callable[[], Any], list[torch.Tensor]]:
    """A call of the op's example on the GPU, and the tensors that it reads."""
    function, args, kwargs = EXAMPLES[op]()
    args, kwargs = on_gpu((args, kwargs))
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return (lambda: function(*args, **kwargs, backend=backend)), inputs


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def same(a: Any, b: Any) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("op", "backend"), cases())
def test_never_synchronises(op: str, backend: str) -> None:
    call, _ = call_of(op, backend)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("op", "backend"), cases())
def test_a_graph_replays_with_new_data(op: str, backend: str) -> None:
    """Captured after one warm call; every input is then replaced by another example's data."""
    call, inputs = call_of(op, backend)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for _ in range(2):
        _, fresh = call_of(op, backend)
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        after = [x.clone() for x in inputs]
        graph.replay()
        torch.cuda.synchronize()
        got = [x.clone() for x in (*tensors(result), *inputs)]
        for x, y in zip(inputs, after, strict=True):
            x.copy_(y)
        want = [x.clone() for x in (*tensors(call()), *inputs)]
        same(got, want)


@pytest.mark.parametrize(("op", "backend"), cases())
def test_runs_on_the_current_stream(op: str, backend: str) -> None:
    """Its inputs are written on a side stream just before, behind a long wait."""
    call, inputs = call_of(op, backend)
    saved = [x.clone() for x in inputs]
    want = [x.clone() for x in tensors(call())]
    for x in inputs:
        x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for x, y in zip(inputs, saved, strict=True):
            x.copy_(y)
        got = tensors(call())
    side.synchronize()
    same(got, want)


@pytest.mark.parametrize(("op", "backend"), cases())
def test_bits_repeat(op: str, backend: str) -> None:
    call, inputs = call_of(op, backend)
    saved = [x.clone() for x in inputs]
    first = [x.clone() for x in tensors(call())]
    for _ in range(20):
        for x, y in zip(inputs, saved, strict=True):
            x.copy_(y)
        same(tensors(call()), first)


@pytest.mark.parametrize("op", checking.OPS)
def test_check_on_the_gpu(op: str) -> None:
    for backend in ON_GPU:
        for dtype in checking.dtypes(op):
            done = checking.check(op, backend, dtype, "cuda", seed=11, cases=3)
            assert done.ok, done.failures


def attention_backends() -> list[str]:
    return [p.values[1] for p in cases() if p.values[0] == "tree_attention"]


@pytest.mark.parametrize("backend", attention_backends())
def test_a_request_alone_or_in_a_batch_has_the_same_bits(backend: str) -> None:
    B, N, S = 7, 33, 900
    q = torch.randn(B, N, 8, 64, device="cuda", dtype=torch.float16)
    kv = torch.randn(B, N, 2, 64, device="cuda", dtype=torch.float16)
    cache = torch.randn(B, S, 2, 64, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([900, 3, 0, 512, 511, 513, 64], device="cuda")

    def attend(b: Any) -> Any:
        return pydecode.tree_attention(
            *(x[b] for x in (q, cache, cache, kv, kv)),
            mask="causal",
            cache_seqlens=lengths[b],
            return_lse=True,
            backend=backend,
        )

    out, lse = attend(slice(None))
    for b in range(B):
        alone, alone_lse = attend(slice(b, b + 1))
        same([alone[0], alone_lse[0]], [out[b], lse[b]])


@pytest.mark.parametrize("backend", attention_backends())
def test_offsets_past_2_to_the_31(backend: str) -> None:
    """A pool of 4.4 GB: its last pages lie past 2^31 elements."""
    pages, page, D = 2**31 // (16 * 2 * 64) + 4, 16, 64
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory")
    pool = torch.zeros(pages, page, 2, D, device="cuda", dtype=torch.float16)
    pool[-4:] = torch.randn(4, page, 2, D)
    small = pool[-4:].clone()
    q = torch.randn(1, 5, 4, D, device="cuda", dtype=torch.float16)
    kv = torch.randn(1, 5, 2, D, device="cuda", dtype=torch.float16)
    results = [
        pydecode.tree_attention(
            *(q, cache, cache, kv, kv),
            mask="causal",
            cache_seqlens=50,
            block_table=table,
            backend=backend,
        )
        for cache, table in (
            (pool, torch.arange(pages - 4, pages, device="cuda")[None]),
            (small, torch.arange(4, device="cuda")[None]),
        )
    ]
    same([results[0]], [results[1]])
    at = torch.arange(5, device="cuda")[None] + 40
    table = torch.arange(pages - 4, pages, device="cuda")[None]
    pydecode.write_kv(
        kv, kv, pool, pool.clone(), positions=at, block_table=table, backend="reference"
    )
    torch.testing.assert_close(pool[-4:].flatten(0, 1)[40:45], kv[0], rtol=0, atol=0)


def test_logits_past_2_to_the_31() -> None:
    V = 2**18
    rows = 2**31 // V + 3
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free memory")
    logits = torch.zeros(rows, V, device="cuda", dtype=torch.float16)
    logits[-1, V - 1] = logits[-2, 7] = 5.0
    at = torch.tensor([rows - 1, rows - 2], device="cuda")
    for backend in {p.values[1] for p in cases() if p.values[0] == "sample_and_score"}:
        scores = pydecode.sample_and_score(logits, row_index=at, backend=backend)
        assert scores.tokens.tolist() == [V - 1, 7]
