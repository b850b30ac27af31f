"""``soft_embed``: LRD's mixture against plain fp64 loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def plain(
    logits: Tensor, table: Tensor, mask_id: int, top_p: float, ratio: float
) -> tuple[Tensor, Tensor]:
    """One row, in the dtype of logits and table: equations 3 to 5 of the paper."""
    p = logits.softmax(-1)
    entropy = -torch.where(p > 0, p * p.log(), 0).sum()
    a = ratio * (1 - entropy / math.log(len(p)))
    above = (p[None, :] * (p[None, :] > p[:, None])).sum(-1)
    kept = p if top_p >= 1 else torch.where(above < top_p, p, 0)
    kept = kept / kept.sum()
    return (1 - a) * table[mask_id] + a * (kept @ table[: len(p)]), entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40)])
def test_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    logits, table = (2 * torch.randn(shape)).to(dtype), torch.randn(43, 8).to(dtype)
    B = math.prod(shape[:-2]) if len(shape) > 2 else math.prod(shape[:-1])
    for top_p, ratio in ((None, 1.0), (0.8, 0.5), (torch.rand(B) * 0.9 + 0.05, torch.rand(B))):
        got, entropy = pydecode.soft_embed(
            logits, table, mask_id=42, top_p=top_p, ratio=ratio, backend=backend
        )
        assert (got.dtype, got.shape) == (dtype, (*shape[:-1], 8))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert (entropy.dtype, entropy.shape) == (wide, shape[:-1])
        rows = logits.reshape(-1, 40)
        want, low = [], []
        for i, row in enumerate(rows):
            b = i * B // len(rows)
            share = top_p[b].double() if isinstance(top_p, Tensor) else (top_p or 1.0)
            weight = ratio[b].double() if isinstance(ratio, Tensor) else ratio
            want.append(plain(row.double(), table.double(), 42, float(share), float(weight)))
            low.append(plain(row, table, 42, float(share), float(weight)))
        for x, exact, rough in zip((got, entropy), zip(*want), zip(*low)):
            exact, rough = torch.stack(exact), torch.stack(rough).double()
            x = x.double().reshape(exact.shape)
            if dtype == torch.float64:
                torch.testing.assert_close(x, exact, rtol=1e-12, atol=1e-12)
                continue
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            assert (x - exact).abs().max() <= 2 * (rough - exact).abs().max() + rounding


def test_the_ends(backend: str) -> None:
    """ratio 0 and a uniform law give the mask; a sure row gives its token; top_p 0 the argmax."""
    table = torch.randn(6, 4, dtype=torch.float64)
    logits = torch.zeros(3, 5, dtype=torch.float64)
    logits[1, 2], logits[2] = 1e4, torch.tensor([1.0, 3.0, 2.0, 0.0, -torch.inf])
    call = dict(mask_id=5, backend=backend)
    got, entropy = pydecode.soft_embed(logits, table, **call)
    torch.testing.assert_close(got[:2], table[[5, 2]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy[:2], entropy.new_tensor([math.log(5), 0]))
    got, _ = pydecode.soft_embed(logits, table, ratio=0.0, **call)
    assert torch.equal(got, table[[5, 5, 5]])
    got, entropy = pydecode.soft_embed(logits, table, top_p=0.0, **call)
    a = 1 - entropy[2] / math.log(5)
    torch.testing.assert_close(got[2], (1 - a) * table[5] + a * table[1], rtol=1e-12, atol=1e-12)


def test_bad_rows_and_one_entry(backend: str) -> None:
    table = torch.randn(37, 3)
    logits = torch.randn(5, 37)
    logits[0, 1], logits[1], logits[2, 1:3] = torch.nan, -torch.inf, torch.inf
    got, entropy = pydecode.soft_embed(logits, table, mask_id=0, backend=backend)
    assert torch.equal(got[:2], table[[0, 0]])
    assert entropy[:2].isnan().all()
    assert entropy[2] == pytest.approx(math.log(2))  # several +inf share the mass
    a = 1 - math.log(2) / math.log(37)
    torch.testing.assert_close(got[2], (1 - a) * table[0] + a * (table[1] + table[2]) / 2)
    assert got[3:].isfinite().all()
    got, entropy = pydecode.soft_embed(
        torch.randn(2, 1), table, mask_id=3, ratio=0.25, backend=backend
    )
    torch.testing.assert_close(got, (0.75 * table[3] + 0.25 * table[0]).expand(2, 3))
    assert entropy.tolist() == [0, 0]


def test_a_request_is_alone_in_any_batch(backend: str) -> None:
    logits, table = torch.randn(5, 3, 301), torch.randn(301, 65)
    given = dict(mask_id=1, backend=backend)
    top_p = torch.rand(5)
    whole = pydecode.soft_embed(logits, table, top_p=top_p, **given)
    for b in range(5):
        one = slice(b, b + 1)
        alone = pydecode.soft_embed(logits[one], table, top_p=top_p[one], **given)
        for x, y in zip(whole, alone):
            assert torch.equal(x[one], y)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    for top_p in (None, 0.5):
        got, entropy = pydecode.soft_embed(
            torch.randn(shape), torch.randn(5, 2), mask_id=0, top_p=top_p, backend=backend
        )
        assert got.shape == (*shape[:-1], 2)
        assert entropy.shape == shape[:-1]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "embedding: expected at least V = 5 rows", dict(embedding=torch.zeros(4, 3))),
        (ValueError, "embedding: expected 2 dimensions", dict(embedding=torch.zeros(5))),
        (ValueError, r"mask_id: expected a token id in \[0, 5\), got 5", dict(mask_id=5)),
        (ValueError, "ratio: expected at least 0", dict(ratio=-0.5)),
        (ValueError, r"top_p: expected 0-d or \[B\]", dict(top_p=torch.ones(4))),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given = dict(logits=torch.zeros(2, 5), embedding=torch.zeros(5, 3), mask_id=0)
    with pytest.raises(error, match=message):
        pydecode.soft_embed(**{**given, **change})
