"""The launches of tree, block and branch attention stay within what the static report compiles."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton's own specialisation")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
from pydecode.bench import decode_attention, tune
from pydecode.bench.host_time import without_kernels
from pydecode.bench.static.launches import Launch, recorded, uncovered
from pydecode.bench.static.rules import expected
from pydecode.bench.static.targets import TARGETS
from pydecode.triton_kernels import decode_attention as kernels
from pydecode.triton_kernels import ranked_attention
from pydecode.triton_kernels.decode_combine import clear, combine
from pydecode.triton_kernels.devices import table_of

import pydecode

FLAGS = ("K_FORM", "V_FORM", "K_POINTER", "V_POINTER", "BLOCK", "BRANCHED", "CAUSAL", "WINDOWED")
NULLABLE = ("k_rows", "lse", "mask", "at", "table", "sinks", "cu", "causal_of")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32).to(dtype)


def calls(dtype: torch.dtype, D: int, N: int) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """A spread of public calls: 2 requests, 8 query heads over 2."""
    q, kv = rand(2, N, 8, D, dtype=dtype), rand(2, N, 2, D, dtype=dtype)
    pages, dense = rand(9, 16, 2, D, dtype=dtype), rand(2, 48, 2, D, dtype=dtype)
    paged = dict(block_table=torch.zeros(2, 4).int(), cache_seqlens=torch.tensor([40, 7]))
    length = dict(cache_seqlens=torch.tensor([40, 7]))
    mask, each = torch.ones(2, N, N).bool(), torch.tensor([True, False])
    own = [q, pages, pages, kv, kv]
    yield "tree_attention", own, dict(mask=mask, **paged)
    yield "tree_attention", [q, dense, dense, kv, kv], dict(mask="causal", **length)
    more: dict[str, Any] = dict(window_size=5, softcap=9.0, sinks=rand(8), return_lse=True)
    yield "tree_attention", own, dict(mask=mask, **paged, **more)
    scales = dict(k_scale=torch.ones(2, 2), v_scale=torch.ones(2))
    for fp8 in (E4M3, E5M2) if dtype != torch.float32 else ():
        narrow = pages.to(fp8)
        inside = [q, narrow, narrow, None, None]
        yield "tree_attention", inside, dict(mask="causal", **paged, **scales)
        yield "block_attention", inside, dict(**paged, k_scale=0.5, v_scale=0.5)
    packed = [x if x.dim() != 4 or x.shape[0] != 2 else x.flatten(0, 1) for x in own]
    cu = dict(cu_seqlens_q=torch.tensor([0, N, 2 * N]), max_seqlen_q=N)
    yield "tree_attention", packed, dict(mask=mask.flatten(0, 1), **paged, **cu, **more)
    yield "block_attention", packed, dict(causal=each, **paged, **cu)
    yield "block_attention", own, dict(replace_at=3, causal=True, **paged)
    yield "block_attention", own, dict(replace_at=3, cache_starts=1, causal=each, **paged, **more)
    odd = rand(2, N, 8, D + 1, dtype=dtype)[..., 1:]
    yield "block_attention", [odd, *own[1:]], dict(mask=mask, **paged, softmax_scale=-1.0)
    five = [x[:, None].expand(-1, 3, -1, -1, -1) for x in (q, kv)]
    branches = [five[0], pages, pages, five[1], five[1]]
    yield "branch_attention", branches, dict(num_branches=each.int(), **paged, return_lse=True)
    at = torch.zeros(2, 3, N).int()
    yield "branch_attention", branches, dict(causal=each, positions=at, window_size=4, **paged)


def features(launch: Launch) -> set[Any]:
    """What a launch of the decode kernel asks for, each for itself, and its table entry."""
    given = dict(zip(kernels.decode.arg_names, launch.positional)) | launch.keywords
    S = given["S"]
    found: set[Any] = {(name, getattr(S, name)) for name in FLAGS}
    found |= {(name, given[name] is None) for name in NULLABLE}
    found |= {("SIGN", S.SIGN), ("CAPPED", S.CAPPED), ("splits", S.SPLITS > 1)}
    entry = sorted((k, v) for k, v in launch.keywords.items() if k not in kernels.decode.arg_names)
    found.add(("entry", *entry, given["BM"], given["BN"], given.get("CHUNK", 0)))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_public_calls_stay_within_the_report(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(target)
    monkeypatch.setattr(kernels, "architecture", lambda q: table)
    known = set()
    for call in kernels.static_calls(table):
        if call.kernel is kernels.decode:
            entry = kernels.CONFIGURATIONS[call.configuration]
            known |= features(Launch(call.kernel, (), dict(call.arguments, **entry)))
    seen = set()
    kernels._plans.clear()
    shapes = [(torch.bfloat16, 128, 4), (torch.float16, 80, 17), (torch.bfloat16, 64, 150)]
    for dtype, D, N in [*shapes, (torch.float16, 256, 2), (torch.float32, 256, 3)]:
        for op, args, kwargs in calls(dtype, D, N):
            with without_kernels(), recorded() as launches:
                getattr(pydecode, op)(*args, **kwargs, backend="triton")
            assert launches[0].kernel is kernels.decode
            seen |= features(launches[0])
            for second in launches[1:]:
                assert second.kernel in (combine, clear)
            assert len(launches) <= 2
    kernels._plans.clear()
    assert seen <= known, seen - known
    assert len(seen) > 40


def test_the_very_binary_of_a_workload_is_compiled() -> None:
    """A tree of 64 nodes over pages of 16, 32 heads over 8, as CEILINGS has it."""
    from pydecode.bench import tree_attention

    args, kwargs = tree_attention.make(8, 128, 64, 32, 8, 128, torch.bfloat16, torch.device("cpu"))
    kernels._plans.clear()
    with without_kernels(), recorded() as launches:
        pydecode.tree_attention(*args, **kwargs, backend="triton")
    name = "pydecode.triton_kernels.decode_attention"
    assert not uncovered(launches, TARGETS["sm_90"], name)
    assert uncovered(launches, TARGETS["sm_80"], name)  # whose table has other tiles


@pytest.mark.parametrize("module", [kernels, ranked_attention])
def test_no_small_tile_hides_the_matrix_units(module: Any) -> None:
    """On sm_90 the rule gets the rows that a call has, not those of a tile."""
    target, wanted = TARGETS["sm_90"], set()
    for call in module.static_calls("sm_90"):
        if call.dtype != torch.bfloat16 or call.m is None:
            continue
        if call.configuration[1] >= 64:
            assert expected(call.dtype, call.m, target).matrix == "HGMMA"
            assert module.CONFIGURATIONS[call.configuration]["BM"] >= 64
            wanted.add(call.configuration)
        else:
            assert call.m < 64
    assert len(wanted) >= 11
    assert sum("odd" in key for key in wanted) == 3


def test_tuning_covers_the_table() -> None:
    """Every entry has other launches, and a workload that reads it."""
    for key, entry in kernels.CONFIGURATIONS.items():
        tried = list(kernels.candidates(key))
        assert entry in tried or key[0] == "fp32"
        assert len({str(launch) for launch in tried}) == len(tried) >= 8
        assert all(launch.keys() == entry.keys() for launch in tried)
        workload = decode_attention.tuned_by(key, "sm_90")
        assert (workload is None) == (key[0] == "clear" or (len(key) > 2 and key[3] != "sm_90"))


@pytest.mark.parametrize("how", ["whole", "gather", "rich", "odd"])
def test_a_tuned_workload_reads_its_entry(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "CONTEXT", 128)
    monkeypatch.setattr(decode_attention, "B", 2)
    key = ("half", 64, 128, "sm_90", how)
    workload = decode_attention.tuned_by(key, "sm_90")
    assert workload is not None
    args, kwargs = workload.make(torch.device("cpu"))
    kernels._plans.clear()
    launch = dict(kernels.CONFIGURATIONS[key], num_stages=7)
    with tune.entry(kernels.CONFIGURATIONS, key, launch), without_kernels(), recorded() as found:
        pydecode.tree_attention(*args, **kwargs, backend="triton")
    assert found[0].keywords["num_stages"] == 7
    with without_kernels(), recorded() as found:  # and the plan does not keep it
        pydecode.tree_attention(*args, **kwargs, backend="triton")
    assert found[0].keywords["num_stages"] == kernels.CONFIGURATIONS[key]["num_stages"]


def test_a_growing_batch_does_not_compile_anew() -> None:
    """Nor do other lengths, tables, rows of the same tiles or caches."""
    from pydecode.bench import tree_attention
    from pydecode.bench.static.launches import specialise

    binaries = set()
    for B, context, nodes in ((2, 64, 33), (16, 64, 40), (17, 4096, 48), (31, 160, 63)):
        args, kwargs = tree_attention.make(
            B, context, nodes, 32, 8, 128, torch.bfloat16, torch.device("cpu")
        )
        with without_kernels(), recorded() as launches:
            pydecode.tree_attention(*args, **kwargs, backend="triton")
        binaries.add(tuple(specialise(x, TARGETS["sm_90"]).exact for x in launches))
    assert len(binaries) == 1


@pytest.mark.parametrize("cache_dtype", [None, E4M3], ids=str)
def test_warmup_compiles_what_later_calls_run(cache_dtype: torch.dtype | None) -> None:
    """Any number of rows, other batches, lengths and tables: no new binary."""
    from pydecode.bench.static.launches import specialise

    sizes: dict[str, Any] = dict(num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=4)
    more: dict[str, Any] = dict(ops=["tree_attention"], backend="triton", cache_dtype=cache_dtype)
    with without_kernels(), recorded() as launches:
        pydecode.warmup(**sizes, dtype=torch.bfloat16, device="cpu", **more)
    warm = {specialise(x, TARGETS["sm_90"]).exact for x in launches}
    assert len(warm) < 60
    scales = {} if cache_dtype is None else dict(k_scale=torch.ones(2), v_scale=torch.ones(2))
    for N in (1, 3, 7, 16, 17, 33, 47, 64):
        q, kv, cache = rand(5, N, 8, 64), rand(5, N, 2, 64), rand(40, 16, 2, 64)
        cache = cache.to(cache_dtype or cache.dtype)
        table, length = torch.zeros(5, 17).int(), torch.ones(5).int()
        with without_kernels(), recorded() as launches:
            pydecode.tree_attention(
                *(q, cache, cache, kv, kv),
                **dict(mask=torch.ones(5, N, N).bool(), cache_seqlens=length, block_table=table),
                **scales,
                backend="triton",
            )
        assert {specialise(x, TARGETS["sm_90"]).exact for x in launches} <= warm, N
