"""``remask``: the r least sure committed tokens, against a plain loop."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

MASK = 9


def loop(tokens: list[int], scores: list[float], r: int) -> list[int]:
    committed = [i for i, t in enumerate(tokens) if t != MASK]
    # a NaN is less sure than any number, -inf too
    committed.sort(
        key=lambda i: (not math.isnan(scores[i]), 0 if scores[i] != scores[i] else scores[i])
    )
    chosen = committed[: max(r, 0)]
    return [MASK if i in chosen else t for i, t in enumerate(tokens)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("L", [1, 2, 9, 40])
def test_is_the_loop(L: int, dtype: torch.dtype, backend: str) -> None:
    B = 12
    tokens = torch.randint(0, 12, (B, L))
    tokens[0], tokens[1] = MASK, 1
    scores = (torch.randint(0, 5, (B, L)) / 4).to(dtype)  # many ties
    scores[2, ::3], scores[3, ::2], scores[4, ::4] = torch.nan, -torch.inf, torch.inf
    scores[5, 0], scores[5, -1] = -torch.inf, torch.nan
    for r in (0, 1, L // 2, L, L + 5, torch.randint(-1, L + 2, (B,)), torch.tensor(1)):
        before = tokens.clone()
        got = pydecode.remask(tokens, scores, r=r, mask_id=MASK, backend=backend)
        assert torch.equal(tokens, before)
        for b in range(B):
            count = int(r.expand(B)[b]) if isinstance(r, Tensor) else r
            assert got[b].tolist() == loop(tokens[b].tolist(), scores[b].tolist(), count)


def test_undoes_a_commit(backend: str) -> None:
    """What top_k commits last, remask takes back first."""
    tokens, scores = torch.full((2, 6), MASK), torch.rand(2, 6)
    call = dict(mask_id=MASK, backend=backend)
    three = pydecode.commit(tokens, torch.zeros(2, 6).long(), scores, k=3, **call).tokens
    five = pydecode.commit(tokens, torch.zeros(2, 6).long(), scores, k=5, **call).tokens
    assert torch.equal(pydecode.remask(five, scores, r=2, **call), three)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int], backend: str) -> None:
    tokens = torch.zeros(shape).long()
    got = pydecode.remask(tokens, torch.zeros(shape), r=2, mask_id=MASK, backend=backend)
    assert got.shape == shape


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "r: expected at least 0, got -1", dict(r=-1)),
        (TypeError, "r: expected an integer", dict(r=0.5)),
        (ValueError, r"r: expected 0-d or \[B\]", dict(r=torch.ones(3).long())),
        (ValueError, r"scores: expected shape \[B, L\]", dict(scores=torch.zeros(2, 3))),
        (TypeError, "mask_id: expected an int", dict(mask_id=None)),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given = dict(tokens=torch.zeros(2, 4).long(), scores=torch.zeros(2, 4), r=1, mask_id=MASK)
    with pytest.raises(error, match=message):
        pydecode.remask(**{**given, **change})
    with pydecode.checks(True), pytest.raises(ValueError, match="r: expected entries in"):
        pydecode.remask(**{**given, "r": torch.tensor([1, -1])})
