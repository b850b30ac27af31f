"""The decode kernel's edges: bad device data, NaN, fp8 codes, batches, launches, choices."""

from typing import Any

import pytest
import torch
from attention_calls import cumulative, make
from examples import EXAMPLES
from oracle_attention import assert_close, verify

import pydecode
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


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, or two with splits."""
    from pydecode.triton_kernels import decode_attention

    count = []
    for name in ("decode", "combine"):
        kernel = getattr(decode_attention, name)

        class Counted:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                count.append(name)
                return kernel[grid]

        monkeypatch.setattr(decode_attention, name, Counted())
    call(TREE, *make(TREE, 1, 2, 1, 1, dtype=FP32))
    assert count == ["decode", "combine"]
    count.clear()
    call(TREE, *make(TREE, 1, 257, 1, 1, dtype=torch.float16, pages=1, page_size=1))
    assert count == ["decode"]


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
