"""``unmask``: ``out=``, torch.compile, batches, unread rows, empty inputs and errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

MASK, V, L = 6, 10, 8


def masked_batch(B: int) -> Tensor:
    tokens = torch.where(torch.rand(B, L) < torch.rand(B, 1) * 1.3, MASK, torch.zeros(B, L).long())
    tokens[0], tokens[1] = MASK, 0
    return tokens


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_out(in_place: bool, compiled: bool, backend: str) -> None:
    tokens, logits = masked_batch(6), torch.randn(6, L, V)
    given = dict(mask_id=MASK, rule="top_k", k=2, confidence="margin", backend=backend)
    want = pydecode.unmask(tokens, logits, **given)

    def call(tokens: Tensor, out: Tensor) -> pydecode.Unmasked:
        return pydecode.unmask(tokens, logits, out=out, **given)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    held = tokens.clone()
    out = held if in_place else torch.empty_like(tokens)
    got = function(held, out)
    assert got.tokens is out or compiled
    assert torch.equal(out, want.tokens)
    assert torch.equal(held, want.tokens if in_place else tokens)
    for x, y in zip(got, want):
        assert torch.equal(x, y)


def test_compiled_numbers_may_change(backend: str) -> None:
    compiled = torch.compile(pydecode.unmask, fullgraph=True, backend="aot_eager")
    tokens, logits = masked_batch(6), torch.randn(6, L, V)
    for seed, threshold in ((0, 0.1), (1, 0.2), (2, 0.3), (2**64 - 1, 0.4)):
        given = dict(mask_id=MASK, rule="threshold", threshold=threshold, seed=seed, offset=seed)
        given.update(temperature=1.0, window=(2, 4), exclude_ids=[0, 1], backend=backend)
        want = pydecode.unmask(tokens, logits, **given)
        for x, y in zip(compiled(tokens, logits, **given), want):
            assert torch.equal(x, y)


@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel"])
def test_a_request_is_alone_in_any_batch(sampler: str, backend: str) -> None:
    tokens, logits = torch.full((5, 6), MASK), torch.randn(5, 6, 4099)
    seed, start = torch.tensor([7, 8, 7, 9, 1 << 45]), torch.tensor([0, 1, 2, 3, 4])
    given = dict(mask_id=MASK, rule="threshold", threshold=1e-3, temperature=1.0, sampler=sampler)
    given.update(confidence="neg_entropy", max_commit=2, offset=3, backend=backend)
    whole = pydecode.unmask(tokens, logits, window=(start, 3), seed=seed, **given)
    order = torch.tensor([3, 1, 4, 0, 2])
    other = pydecode.unmask(
        tokens, logits[order], window=(start[order], 3), seed=seed[order], **given
    )
    for x, y in zip(whole, other):
        assert torch.equal(x[order], y)
    for b in range(5):
        one = slice(b, b + 1)
        alone = pydecode.unmask(
            tokens[one], logits[one], window=(start[one], 3), seed=seed[one], **given
        )
        for x, y in zip(whole, alone):
            assert torch.equal(x[one], y)


def test_rows_that_are_not_read_may_hold_nan(backend: str) -> None:
    tokens, logits = masked_batch(6), torch.randn(6, L, V)
    given = dict(mask_id=MASK, rule="threshold", threshold=0.3, window=(1, 5), backend=backend)
    want = pydecode.unmask(tokens, logits, **given)
    read = (tokens == MASK) & (torch.arange(L) >= 1) & (torch.arange(L) < 6)
    for x, y in zip(
        pydecode.unmask(tokens, logits.masked_fill(~read[..., None], torch.nan), **given), want
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("B", "length"), [(0, L), (3, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, L])
def test_empty(B: int, length: int, rows: int, backend: str) -> None:
    tokens = torch.full((B, rows), MASK)
    got = pydecode.unmask(
        tokens, torch.randn(B, rows, V), mask_id=MASK, window=(1, length), backend=backend
    )
    assert torch.equal(got.tokens, tokens)
    assert got.num_left.tolist() == got.num_committed.tolist() == [0] * B


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"logits: expected shape \[B, L, V\] = \[2, 4, V\]", dict(shape=(2, 3, V))),
        (ValueError, r"\[B, L\|length, V\] = ", dict(shape=(2, 3, V), window=(0, 2))),
        (ValueError, r"length\|length\+1, V", dict(shape=(2, 1, V), window=(0, 2), shift=1)),
        (ValueError, r"logits: expected shape \[B", dict(shape=(1, 4, V))),
        (ValueError, r"logits: expected 3 dimensions", dict(shape=(2, V))),
        (ValueError, r"logits: expected \[..., V\] with V >= 1", dict(shape=(2, 4, 0))),
        (ValueError, "shift: expected 0 or 1, got 2", dict(shift=2)),
        (ValueError, "shift: expected 0 or 1, got True", dict(shift=True)),
        (ValueError, "rule: expected one of", dict(rule="topk")),
        (ValueError, "external_score: expected scores", dict(rule="external")),
        (ValueError, "sampler: expected one of", dict(sampler="gumbel_max")),
        (TypeError, "masked: expected a tensor, got bool", dict(masked=True)),
        (TypeError, "masked: expected dtype bool", dict(masked=torch.zeros(2, 4))),
        (ValueError, "masked: expected shape", dict(masked=torch.zeros(2, 1).bool())),
        (TypeError, "out: expected dtype int64", dict(out=torch.zeros(2, 4))),
        (ValueError, "out: expected shape", dict(out=torch.zeros(2, 3).long())),
        (ValueError, "allowed: expected shape", dict(allowed=torch.zeros(2, 4, 2).int())),
        (ValueError, "exclude_ids: expected a token id in", dict(exclude_ids=[V])),
        (ValueError, "temperature: expected at least 0", dict(temperature=-1)),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    logits = torch.zeros(change.pop("shape", (2, 4, V)))
    with pytest.raises(error, match=message):
        pydecode.unmask(torch.zeros(2, 4).long(), logits, **{"mask_id": MASK, **change})
