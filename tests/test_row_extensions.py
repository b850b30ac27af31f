"""``filter_order`` and ``bias`` of the row ops, by loops over rows in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

INF = float("inf")


def equal(got: Any, want: Any) -> None:
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# ---- filter_order --------------------------------------------------------------------------------


def support(p: Tensor, order: str, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One row's support by its words: how many, and how much, lies strictly above each value."""
    count = torch.stack([(p > value).sum() for value in p])
    in_top_k = count < top_k
    law = p if order == "joint" else torch.where(in_top_k, p, 0) / p[in_top_k].sum()
    above = torch.stack([law[law > value].sum() for value in law])
    return in_top_k & (above < top_p) & (p >= min_p * p.max())


@pytest.mark.parametrize("order", ["joint", "top_k_first"])
def test_filter_orders(order: str, backend: str) -> None:
    """The law that is sampled from, through its margin, entropy and inverse CDF, row by row."""
    B, vocab = 60, 12
    logits = torch.randn(B, vocab, dtype=torch.float64)
    logits[:, 7] = logits[:, 3]  # ties share their fate
    top_k, top_p = torch.randint(1, 9, (B,)), 0.3 + 0.6 * torch.rand(B).double()
    min_p, t = 0.2 * torch.rand(B).double(), 0.5 + torch.rand(B).double()
    u = torch.rand(B).double()
    given: dict[str, Any] = dict(
        temperature=t, top_k=top_k, top_p=top_p, min_p=min_p, filter_order=order, uniforms=u
    )
    got = pydecode.sample_and_score(
        logits, confidence="neg_entropy", tempered=True, backend=backend, **given
    )
    tokens = torch.full((B, 1), 5)
    unmasked = pydecode.unmask(
        tokens, logits[:, None], mask_id=5, backend=backend, **{**given, "uniforms": u[:, None]}
    )
    other, differ = "joint" if order != "joint" else "top_k_first", 0
    for b in range(B):
        numbers = int(top_k[b]), float(top_p[b]), float(min_p[b])
        p = (logits[b] / t[b]).softmax(-1)
        keep = support(p, order, *numbers)
        differ += not torch.equal(keep, support(p, other, *numbers))
        law = torch.where(keep, p, 0)
        law, c = law / law.sum(), law.cumsum(0)
        assert got.tokens[b] == int((c > u[b] * c[-1]).int().argmax())
        want = torch.where(law > 0, law * law.log(), 0).sum()
        torch.testing.assert_close(got.confidence[b], want, rtol=1e-12, atol=1e-12)
        x = logits[b].clone()
        x[5] = -INF
        p = (x / t[b]).softmax(-1)
        c = torch.where(support(p, order, *numbers), p, 0).cumsum(0)
        assert unmasked.tokens[b, 0] == int((c > u[b] * c[-1]).int().argmax())
    assert differ > 5  # negative control: the other order would have been noticed


# ---- bias ----------------------------------------------------------------------------------------


def plainly(logits: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    """logits [rows, V], one entry at a time."""
    x = logits.clone()
    for r, row in enumerate(ids.tolist()):
        for v, add in zip(row, bias[r].tolist()):
            if 0 <= v < x.shape[-1]:
                x[r, v] += add
    return x


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("shape", [(4,), (2, 2), (2, 1, 2)])
def test_bias_is_added_first(n: int, shape: tuple[int, ...], backend: str) -> None:
    vocab = 11
    logits = torch.randint(-4, 4, (*shape, vocab)).double()  # small integers: sums are exact
    ids = torch.randint(-3, vocab + 3, (*shape, n))
    ids[..., 1:3] = 6  # named twice, and id 0 beside ids that are none
    ids[..., 3:4], ids[..., 4:] = 0, -1
    ids.view(4, n)[0, :1] = 5  # some id counts
    bias = torch.randint(1, 6, (*shape, n)).float() * (1 - 2 * torch.randint(2, (*shape, n)))
    want = plainly(logits.view(4, -1), ids.view(4, -1), bias.view(4, -1)).view_as(logits)
    held = logits.clone()
    for sampler in ("inverse_cdf", "gumbel"):
        given: dict[str, Any] = dict(temperature=0.9, top_k=4, exclude_ids=[2], sampler=sampler)
        for arguments in (given, dict(exclude_ids=[2])):
            got = pydecode.sample_and_score(
                logits, bias_ids=ids, bias=bias, backend=backend, **arguments
            )
            equal(got, pydecode.sample_and_score(want, backend=backend, **arguments))
    assert torch.equal(logits, held)
    assert n == 0 or not torch.equal(want, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_is_not_rounded_to_the_logits(dtype: torch.dtype, backend: str) -> None:
    """256 + 0.5 is not a 16-bit number's neighbour, and 60000 + 60000 is past fp16."""
    logits = torch.tensor([[256.0, 256.0, 0.0], [60000.0, 0.0, 59000.0]], dtype=dtype)
    ids, bias = torch.tensor([[1], [2]]), torch.tensor([[0.01], [60000.0]])
    got = pydecode.sample_and_score(logits, bias_ids=ids, bias=bias, backend=backend)
    assert got.tokens.tolist() == [1, 2]
    assert got.lse.isfinite().all()


def test_infinite_and_bad_biases(backend: str) -> None:
    """-inf forbids, +inf forces, NaN is a bad row; exclusion stands above a bias."""
    logits, ids = torch.tensor([[3.0, 2.0, 1.0]]).expand(5, 3), torch.tensor([0]).expand(5, 1)
    bias = torch.tensor([-INF, INF, torch.nan, INF, torch.nan])[:, None]
    exclude = torch.tensor([-1, -1, -1, 0, 0])[:, None]
    got = pydecode.sample_and_score(
        logits, bias_ids=ids, bias=bias, exclude_ids=exclude, backend=backend
    )
    assert got.tokens.tolist() == [1, 0, -1, 1, 1]
    assert got.confidence[2] == -INF


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("rows", ["L", "length", "length+1"])
def test_unmask_adds_the_bias_to_the_logits_rows(shift: int, rows: str, backend: str) -> None:
    B, L, V, length = 3, 7, 10, 4
    if rows == "length+1" and not shift:
        return  # such logits exist with shift=1 only
    R = {"L": L, "length": length, "length+1": length + 1}[rows]
    tokens = torch.where(torch.rand(B, L) < 0.7, 9, 1)
    logits = torch.randint(-4, 4, (B, R, V)).double()
    ids, bias = torch.randint(-1, V, (B, R, 3)), torch.randint(-6, 6, (B, R, 3)).double()
    moved = plainly(logits.view(-1, V), ids.view(-1, 3), bias.view(-1, 3)).view_as(logits)
    given: dict[str, Any] = dict(
        mask_id=9, rule="threshold", threshold=0.2, shift=shift, window=(2, length)
    )
    given.update(temperature=torch.tensor([0.0, 1.0, 2.0]), seed=5, backend=backend)
    got = pydecode.unmask(tokens, logits, bias_ids=ids, bias=bias, **given)
    equal(got, pydecode.unmask(tokens, moved, **given))
    assert not torch.equal(got.confidence, pydecode.unmask(tokens, logits, **given).confidence)


# ---- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("indexed", [False, True])
def test_probabilities(dtype: torch.dtype, indexed: bool, backend: str) -> None:
    """p / sum(p) is the law, log sum(p) the lse; an impossible token never comes out."""
    rows = torch.rand(60, 12).to(dtype) * 5
    rows[:, 4] = 0.0
    rows[3, 5], rows[4], rows[5, 1] = torch.nan, 0.0, -1.0
    index = torch.randint(60, (200,)) if indexed else torch.arange(60)
    u = torch.rand(len(index)).double()
    u[:3] = 0.0
    given: dict[str, Any] = dict(temperature=1.0, probs=True, uniforms=u, backend=backend)
    got = pydecode.sample_and_score(rows, row_index=index if indexed else None, **given)
    for i, row in enumerate(rows[index].double()):
        if int(index[i]) in (3, 4, 5):
            assert got.tokens[i] == -1
            assert got.confidence[i] == -INF
            continue
        at = row.cumsum(0) / row.sum()
        near = (at - u[i]).abs().min() < 1e-5  # rounding may decide
        assert near or got.tokens[i] == int((at > u[i]).int().argmax())
        assert got.tokens[i] != 4
        want = row[got.tokens[i]] / row.sum()
        torch.testing.assert_close(got.confidence[i].double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.lse[i].double(), row.sum().log(), rtol=1e-5, atol=1e-6)


def test_probabilities_are_logits_log_p(backend: str) -> None:
    """Filters, temperatures, exclusions and biases act as on those logits."""
    p = torch.randn(9, 3, 20).double().softmax(-1)
    given: dict[str, Any] = dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, exclude_ids=[2])
    ids = torch.randint(0, 20, (9, 3, 2))
    given.update(bias_ids=ids, bias=torch.randn(9, 3, 2).double(), confidence="margin", seed=3)
    want = pydecode.sample_and_score(p.log(), backend=backend, **given)
    equal(pydecode.sample_and_score(p, probs=True, backend=backend, **given), want)


# ---- errors --------------------------------------------------------------------------------------

IDS, ADD = torch.zeros(2, 3).long(), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "filter_order: expected one of top_k_first, joint", dict(filter_order="k")),
        (ValueError, "bias_ids, bias: expected both or neither", dict(bias=ADD)),
        (ValueError, "bias_ids, bias: expected both or neither", dict(bias_ids=IDS)),
        (TypeError, "bias_ids: expected dtype int32", dict(bias_ids=ADD, bias=ADD)),
        (TypeError, "bias: expected dtype float16", dict(bias_ids=IDS, bias=IDS)),
        (ValueError, r"bias: expected shape \[..., n\]", dict(bias_ids=IDS, bias=ADD[:, :2])),
        (ValueError, "bias_ids: expected shape", dict(bias_ids=IDS[:1], bias=ADD)),
        (ValueError, "bias_ids: expected shape", dict(bias_ids=IDS[0, 0], bias=ADD)),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pydecode.sample_and_score(**{"logits": torch.zeros(2, 5), **change})


def test_checks_find_a_bad_bias_id() -> None:
    with pydecode.checks(True), pytest.raises(ValueError, match=r"bias_ids: .* got 5 at index"):
        pydecode.sample_and_score(
            torch.zeros(2, 5), bias_ids=torch.tensor([[0], [5]]), bias=torch.zeros(2, 1)
        )
    tokens, rows = torch.full((2, 4), 4), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match="bias_ids: expected shape"):
        pydecode.unmask(tokens, rows, mask_id=4, bias_ids=IDS, bias=ADD)
