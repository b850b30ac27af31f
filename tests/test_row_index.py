"""``row_index`` of ``sample_and_score``: a gather that copies nothing, bit for bit."""

from typing import Any

import pytest
import torch

import pydecode

INF = float("inf")
SHAPES: list[tuple[int, ...]] = [(), (6,), (3, 2), (2, 2, 3)]


def equal(got: Any, want: Any) -> None:
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel"])
def test_row_index_is_a_gather(shape: tuple[int, ...], sampler: str, backend: str) -> None:
    """Bit for bit what the gathered rows give: rows may repeat, and nothing else is read."""
    rows, vocab = 7, 37
    logits = torch.randn(rows, vocab)
    index = torch.randint(0, rows - 1, shape)  # row 6 is read by nobody
    logits[6] = torch.nan
    B = pydecode.sampling_arguments.batch_of(shape)
    given: dict[str, Any] = dict(
        temperature=torch.rand(B) + 0.5,
        top_k=torch.randint(0, 9, (B,)),
        top_p=0.9,
        confidence="margin",
        tempered=True,
        sampler=sampler,
        seed=torch.arange(B) + 40,
        exclude_ids=torch.randint(-1, vocab, (B, 2)),
        allowed=torch.randint(-(2**31), 2**31, (*shape, 2)).int(),
        bias_ids=torch.randint(-1, vocab, (*shape, 3)),
        bias=torch.randn(*shape, 3),
        positions=torch.randint(0, 99, shape),
        backend=backend,
    )
    if sampler == "inverse_cdf":
        given["uniforms"] = torch.rand(shape)
    got = pydecode.sample_and_score(logits, row_index=index.int(), **given)
    equal(got, pydecode.sample_and_score(logits[index], **given))
    assert got.tokens.shape == got.confidence.shape == got.lse.shape == shape
    assert (got.tokens >= 0).all()
    padded = torch.cat([logits, torch.full((rows, 3), torch.nan)], 1)[:, :vocab]
    equal(pydecode.sample_and_score(padded, row_index=index, **given), got)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_no_row(shape: tuple[int, ...], backend: str) -> None:
    logits = torch.randn(4, 9)
    logits[0] = torch.nan  # the row that a naive clamp would read
    index = torch.tensor([1, -1, 3, -2, 4]).expand(shape).clone()
    absent = torch.tensor([0, 1, 0, 1, 1]).bool().expand(shape)
    for given in ({}, dict(temperature=1.0), dict(temperature=1.0, sampler="gumbel")):
        got = pydecode.sample_and_score(logits, row_index=index, backend=backend, **given)
        assert (got.tokens[absent] == -1).all()
        assert (got.confidence[absent] == -INF).all()
        assert (got.lse[absent] == -INF).all()
        assert (got.tokens[~absent] >= 0).all()
        assert got.lse[~absent].isfinite().all()
    with pydecode.checks(True):
        pydecode.sample_and_score(logits, row_index=torch.tensor([3, -1]), backend=backend)
        for bad in (-2, 4):
            with pytest.raises(ValueError, match=f"row_index: .* got {bad} at index \\[1\\]"):
                pydecode.sample_and_score(logits, row_index=torch.tensor([0, bad]), backend=backend)


@pytest.mark.parametrize(("rows", "shape"), [(0, (3,)), (0, (2, 3)), (4, (0,)), (4, (0, 3))])
def test_no_rows_at_all(rows: int, shape: tuple[int, ...], backend: str) -> None:
    index = torch.zeros(shape).int()
    got = pydecode.sample_and_score(
        torch.randn(rows, 5), row_index=index, temperature=1.0, top_p=0.9, backend=backend
    )
    assert got.tokens.shape == shape
    assert (got.tokens == -1).all()


def test_a_request_is_alone_in_any_batch(backend: str) -> None:
    """Bits do not follow the batch, the place in it, or which rows of logits hold it."""
    logits, index = torch.randn(9, 4099), torch.tensor([[0, 3], [8, -1], [5, 5], [1, 7]])
    B = len(index)
    given: dict[str, Any] = dict(
        temperature=0.8, top_k=300, top_p=0.8, filter_order="joint", confidence="neg_entropy"
    )
    each: dict[str, Any] = dict(
        seed=torch.tensor([7, 8, 9, 1 << 45]),
        bias_ids=torch.randint(-1, 4099, (B, 2, 40)),
        bias=torch.randn(B, 2, 40),
        row_index=index,
    )
    each["bias_ids"][..., 1:9] = each["bias_ids"][..., :1]  # one id many times
    given.update(offset=3, backend=backend)
    whole = pydecode.sample_and_score(logits, **each, **given)
    order, shuffled = torch.tensor([3, 1, 0, 2]), torch.randperm(9)
    moved = {name: x[order] for name, x in each.items()}
    at = shuffled.argsort()
    moved["row_index"] = torch.where(moved["row_index"] < 0, -1, at[moved["row_index"]])
    equal(pydecode.sample_and_score(logits[shuffled], **moved, **given), [x[order] for x in whole])
    for b in range(B):
        one = {name: x[b : b + 1] for name, x in each.items()}
        equal(pydecode.sample_and_score(logits, **one, **given), [x[b : b + 1] for x in whole])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "row_index: expected a tensor, got list", dict(row_index=[0])),
        (TypeError, "row_index: expected dtype int32", dict(row_index=torch.zeros(2, 3))),
        (
            ValueError,
            r"logits: expected 2 dimensions \[rows, V\]",
            dict(logits=torch.zeros(1, 2, 5)),
        ),
        (ValueError, r"uniforms: expected shape \[...\] = \[2, 3\]", dict(uniforms=torch.rand(2))),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pydecode.sample_and_score(
            **{"logits": torch.zeros(2, 5), "row_index": torch.zeros(2, 3).long(), **change}
        )
