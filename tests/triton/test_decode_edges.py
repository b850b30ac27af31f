"""The decode kernel's edges: bad device data, NaN, fp8 codes, batches, launches, choices."""

import contextlib
from typing import Any

import pytest
import torch
from attention_calls import cumulative, make
from examples import EXAMPLES
from oracle_attention import assert_close, verify
from torch.utils._python_dispatch import TorchDispatchMode

import pydecode
from pydecode import binding
from pydecode.check.compare import same_bits

TREE, BLOCK, BRANCH = "tree_attention", "block_attention", "branch_attention"
OPS = (TREE, BLOCK, BRANCH)
FP32 = torch.float32


def call(op: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(pydecode, op)(*args, **kwargs, return_lse=True, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_examples_run(op: str) -> None:
    function, args, kwargs = EXAMPLES[op]()
    function(*args, **kwargs, backend="triton")


@pytest.mark.parametrize("page", [-1, 2**31 - 1, 14])
def test_page_ids_outside_the_pool(page: int) -> None:
    args, kwargs = make(TREE, dtype=FP32, cache_seqlens=torch.tensor([16, 9, 13]))
    kwargs["block_table"][1:, 1] = page
    verify(TREE, args, kwargs, "triton")


def test_unmapped_pages_of_full_tiles() -> None:
    for page_size in (16, 64):
        args = make(TREE, 1, 2, 1, 1, dtype=FP32, page_size=page_size, pages=256 // page_size)
        args[1]["cache_seqlens"] = 250
        args[1]["block_table"][0, 1] = -1
        verify(TREE, *args, "triton")


@pytest.mark.parametrize("op", OPS)
def test_lengths_past_the_cache(op: str) -> None:
    given = torch.tensor([-(2**62), 2**62, 4])
    args, kwargs = make(op, dtype=FP32, N=3, K=2, Hq=2, Hkv=1)
    got = call(op, args, kwargs | {"cache_seqlens": given})
    want = call(op, args, kwargs | {"cache_seqlens": given.clamp(0, 16)})
    assert all(map(same_bits, got, want))
    got = call(op, args, kwargs | {"num_tokens": given})
    want = call(op, args, kwargs | {"num_tokens": given.clamp(0, 3)})
    assert all(map(same_bits, got, want))


def test_packed_lengths_that_overlap_or_point_outside() -> None:
    for bounds in ([0, 5, 3, 9], [-4, 2, 4, 99], [2, 2, 30, 9]):
        args, kwargs = make(TREE, dtype=FP32)
        args = [x if i in (1, 2) else x.flatten(0, 1)[:9] for i, x in enumerate(args)]
        kwargs |= dict(cu_seqlens_q=torch.tensor(bounds), max_seqlen_q=5, mask="causal")
        want = pydecode.tree_attention(*args, **kwargs, return_lse=True)
        for x, y in zip(call(TREE, args, kwargs), want):
            torch.testing.assert_close(x, y)


def test_nan_stays_in_its_row() -> None:
    """A query, and a row's own K or V, reach those that see them and nobody else."""
    for spoiled in (0, 3, 4):
        args, kwargs = make(TREE, dtype=FP32, mask="causal", cache_seqlens=9)
        clean = call(TREE, args, kwargs)[0]
        args[spoiled][1, 2] = torch.nan
        got = call(TREE, args, kwargs)[0]
        hit = got[1].isnan().flatten(1).any(1).tolist()
        assert hit == [False, False, True, spoiled > 0, spoiled > 0]
        assert torch.equal(got[~got.isnan()], clean[~got.isnan()])
    args[4][1, 2] = torch.inf
    assert (call(TREE, args, kwargs)[0][1, 2:] == torch.inf).all()


@pytest.mark.parametrize("op", OPS)
def test_a_request_alone_or_in_a_batch_has_the_same_bits(op: str) -> None:
    length = torch.tensor([150, 3, 64])
    args, kwargs = make(op, 3, 3, 2, 1, K=2, dtype=FP32, page_size=16, pages=10)
    kwargs["cache_seqlens"] = length
    out, lse = call(op, args, kwargs)
    for b in range(3):
        one = [x if i in (1, 2) else x[b : b + 1] for i, x in enumerate(args)]
        its = dict(block_table=kwargs["block_table"][b : b + 1], cache_seqlens=length[b : b + 1])
        alone = call(op, one, kwargs | its)
        assert same_bits(alone[0][0], out[b])
        assert same_bits(alone[1][0], lse[b])


def test_a_longer_table_changes_no_bits() -> None:
    args, kwargs = make(TREE, 1, 3, 1, 1, dtype=FP32, page_size=16, pages=10, cache_seqlens=130)
    want = call(TREE, args, kwargs)
    table = torch.nn.functional.pad(kwargs["block_table"], (0, 90), value=-7)
    assert all(map(same_bits, call(TREE, args, kwargs | {"block_table": table}), want))


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_code(fp8: torch.dtype) -> None:
    """One key, seen with weight 1: its value comes out as it is."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8)
    v_cache = codes.view(1, 1, 1, 256)
    q, k_cache = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)
    mask = torch.zeros(1, 1, 1, dtype=torch.bool)
    rows = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 256)
    given: dict[str, Any] = dict(mask=mask, cache_seqlens=1, backend="triton")
    for dtype in (FP32, torch.float16, torch.bfloat16):
        call_ = [x.to(dtype) for x in (q, k_cache, *rows)]
        out = pydecode.tree_attention(call_[0], call_[1], v_cache, *call_[2:], **given)
        torch.testing.assert_close(
            out.flatten().float(), codes.float(), rtol=0, atol=0, equal_nan=True
        )


PACKED = dict(cu_seqlens_q=cumulative([2, 0, 3]), max_seqlen_q=5)
WIDE = dict(pages=1, page_size=1)  # so many rows that the context is not split
LAUNCHES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "tree": (TREE, dict(B=1), {}, ["decode", "combine"]),
    "tree, one part": (TREE, dict(B=1, N=257, **WIDE), {}, ["decode"]),
    "block": (BLOCK, dict(replace_at=2), {}, ["decode", "combine"]),
    "branch": (BRANCH, dict(K=2), {}, ["decode", "combine"]),
    "packed": (TREE, {}, PACKED, ["decode", "combine"]),
    "packed, one part": (TREE, WIDE, PACKED | dict(max_seqlen_q=300), ["decode", "clear"]),
    "merge": ("merge_states", {}, {}, ["merge"]),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two of ours, and none of torch: it only makes room."""
    from pydecode.triton_kernels import decode_attention, merge_states

    count = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: count.append(self.name)

    class Torch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if func.overloadpacket._qualified_op_name not in ("aten::empty", "aten::new_empty"):
                count.append(str(func))
            return func(*args, **(kwargs or {}))

    for name in ("decode", "combine", "clear"):
        monkeypatch.setattr(decode_attention, name, Counted(name))
    monkeypatch.setattr(merge_states, "merge", Counted("merge"))
    op, sizes, more, want = LAUNCHES[case]
    args: list[Any] = [torch.randn(2, 3, 4, 1, 16), torch.randn(2, 3, 1, 4)]
    kwargs: dict[str, Any] = {}
    if op != "merge_states":
        args, kwargs = make(op, **{"dtype": FP32, "Hq": 2, "Hkv": 1, **sizes})
    if more:
        args = [x if i in (1, 2) else x.flatten(0, 1)[:5] for i, x in enumerate(args)]
    schema: list[Any] = []
    monkeypatch.setattr(binding, "call", lambda op, run, *args, **out: schema.extend([run, *args]))
    with contextlib.suppress(TypeError):  # nothing comes back
        getattr(pydecode, op)(*args, **kwargs, **more, backend="triton")
    with Torch():
        schema[0](*schema[1:])
    assert count == want


@pytest.mark.parametrize("N", [5, 300])
def test_rows_of_no_request(N: int) -> None:
    """Between requests, behind the last and past max_seqlen_q; with splits and without."""
    args, kwargs = make(TREE, 3, 20, dtype=FP32, Hq=2, Hkv=1)
    args = [x if i in (1, 2) else x.flatten(0, 1) for i, x in enumerate(args)]
    kwargs |= dict(cu_seqlens_q=torch.tensor([3, 5, 5, 41]), max_seqlen_q=N, mask="causal")
    want = pydecode.tree_attention(*args, **kwargs, return_lse=True)
    for x, y in zip(call(TREE, args, kwargs), want):
        torch.testing.assert_close(x, y)
    kwargs["cu_seqlens_q"] = torch.tensor([0, 9, -3, 2**40])
    want = pydecode.tree_attention(*args, **kwargs, return_lse=True)
    for x, y in zip(call(TREE, args, kwargs), want):
        torch.testing.assert_close(x, y)


def test_layouts_whose_last_dimension_is_strided() -> None:
    """Tables, masks and bounds are made dense each time: a plan of before knows them."""
    args, kwargs = make(TREE, dtype=FP32, mask=torch.rand(3, 5, 5) < 0.5)
    kwargs["block_table"] = kwargs["block_table"].repeat_interleave(2, 1)[:, ::2]
    for _ in range(2):
        verify(TREE, args, kwargs, "triton")


def test_plans_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shapes with other numbers, options and addresses, one after the other, twice."""
    args, kwargs = make(TREE, dtype=FP32, D=32, cache_seqlens=6)
    bare = torch.zeros(args[0].numel() + 1)[1:].view_as(args[0])
    others: list[tuple[list[Any], dict[str, Any]]] = [
        (args, kwargs),
        (args, kwargs | dict(cache_seqlens=3)),
        (args, kwargs | dict(cache_seqlens=torch.tensor(4))),
        (args, kwargs | dict(softmax_scale=-0.5)),
        (args, kwargs | dict(num_tokens=2)),
        (args, kwargs | dict(window_size=2)),
        (args, kwargs | dict(window_size=3)),
        ([bare.copy_(args[0]), *args[1:]], kwargs),
    ]
    for _ in range(2):
        for given in others:
            verify(TREE, *given, "triton")


def test_out_is_written_between_its_guards() -> None:
    args, kwargs = make(TREE, dtype=FP32)
    want = call(TREE, args, kwargs)[0]
    buffer = torch.full((want.numel() + 64,), torch.nan)
    out = buffer[32:-32].view_as(want)
    assert call(TREE, args, kwargs | {"out": out})[0] is out
    assert_close(out, want.double())
    assert buffer[:32].isnan().all()
    assert buffer[-32:].isnan().all()


def test_what_it_cannot_run() -> None:
    args, kwargs = make(TREE)
    with pytest.raises(pydecode.BackendUnavailable, match="fp32; the reference computes in fp64"):
        call(TREE, args, kwargs)
    args, kwargs = make(TREE, D=260, dtype=FP32)
    with pytest.raises(pydecode.BackendUnavailable, match="head dims up to 256, got 260"):
        call(TREE, args, kwargs)


def test_empty_packed_batch() -> None:
    args, kwargs = make(TREE, dtype=FP32)
    args = [x if i in (1, 2) else x.flatten(0, 1) for i, x in enumerate(args)]
    kwargs |= dict(cu_seqlens_q=cumulative([0, 0, 0]), max_seqlen_q=5)
    out, lse = call(TREE, args, kwargs)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
