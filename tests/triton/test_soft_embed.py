"""Soft embeddings in Triton, interpreted, against the fp64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import soft_embed
from pydecode.reference import soft_embed as reference_module
from pydecode.reference.soft_embed import soft_embed as reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference_module, "soft_embed", refuse)


def expect_near(logits: Tensor, table: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    got = soft_embed(logits, table, **kwargs, backend="triton")
    with pytest.MonkeyPatch.context() as change:
        change.setattr(reference_module, "soft_embed", reference)
        want = soft_embed(logits.double(), table.double(), **kwargs, backend="reference")
    near = torch.finfo(table.dtype).eps + 8e-6
    assert got[0].dtype == table.dtype
    torch.testing.assert_close(got[0].double(), want[0], rtol=near, atol=near, equal_nan=True)
    torch.testing.assert_close(got[1].double(), want[1], rtol=8e-6, atol=8e-6, equal_nan=True)
    return got


def example(*rows: int, V: int, E: int, dtype: torch.dtype, table: torch.dtype) -> Any:
    logits = (torch.randn(*rows, V + 5) * 4).to(dtype)
    logits[..., V:] = torch.nan
    return logits[..., :V], torch.randn(V + 2, E).to(table)


@pytest.mark.parametrize("V", [1, 2, 127, 4097])
@pytest.mark.parametrize(("dtype", "table"), [(FP32, FP32), (BF16, BF16), (FP16, FP32)], ids=str)
def test_sizes(V: int, dtype: torch.dtype, table: torch.dtype) -> None:
    logits, embedding = example(2, 2, V=V, E=(7, 130)[V < 4000], dtype=dtype, table=table)
    each = torch.tensor([0.5, 1.0])
    expect_near(logits, embedding, mask_id=V + 1, ratio=0.6)
    expect_near(logits, embedding, mask_id=V // 2, top_p=each, ratio=torch.tensor([1.0, 0.0]))


def test_shapes_and_strides() -> None:
    logits, embedding = example(2, 3, 2, V=50, E=6, dtype=FP32, table=FP32)
    for x in (logits, logits[0], logits[0, 0], logits[0, 0, 0], logits.transpose(0, 1)):
        got = expect_near(x, embedding.T.contiguous().T, mask_id=3, top_p=0.8)
        assert got[0].shape == (*x.shape[:-1], 6)
    out, entropy = soft_embed(logits[:0], embedding, mask_id=3, backend="triton")
    assert (out.shape, entropy.shape) == ((0, 3, 2, 6), (0, 3, 2))


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_hostile_rows(top_p: float | None) -> None:
    """NaN and nothing allowed give the mask's embedding, several +inf share; embeddings that have
    no mass are not read."""
    logits, embedding = example(6, V=100, E=5, dtype=FP32, table=FP32)
    logits[0, 50], logits[1] = torch.nan, -torch.inf
    logits[2, [3, 99]], logits[3, 7] = torch.inf, torch.inf
    logits[4] = 0.0  # as unsure as can be: the mask's embedding too
    got = expect_near(logits, embedding, mask_id=101, top_p=top_p)
    assert torch.equal(got[0][:2], embedding[[101, 101]])
    torch.testing.assert_close(got[0][3], embedding[7])
    embedding[60] = torch.nan
    one = torch.full((1, 100), -torch.inf)
    one[0, :2] = 1.0
    mixed = soft_embed(one, embedding, mask_id=101, top_p=top_p, backend="triton")
    assert mixed[0].isfinite().all()


def test_alone_or_in_a_batch() -> None:
    logits, embedding = example(4, 1, V=300, E=140, dtype=BF16, table=BF16)
    whole = soft_embed(logits, embedding, mask_id=3, top_p=0.9, backend="triton")
    one = soft_embed(logits[2:3], embedding, mask_id=3, top_p=0.9, backend="triton")
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, one))


def test_what_cannot_run() -> None:
    for x, table in ((torch.zeros(2, 3).double(), torch.zeros(3, 2)),
                     (torch.zeros(2, 3), torch.zeros(3, 2).double())):  # fmt: skip
        with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
            soft_embed(x, table, mask_id=0, backend="triton")
