"""``earn_credit``: against a dense credit of the whole vocabulary, and against a plain loop."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

Row = tuple[list[int], list[float]]


def loop(row: Row, token: int, p: float, alive: bool, gamma: float, decay: float) -> Row:
    """One row's ids and credit after a step."""
    ids, credit = ([*row[0]], [*row[1]]) if alive else ([-1] * len(row[0]), [0.0] * len(row[0]))
    credit = [c * decay if c * decay > 0 else 0.0 for c in credit]
    if token < 0 or not p > 0 or not ids:
        return ids, credit
    if token in ids:
        slot = ids.index(token)
    else:
        slot = credit.index(min(credit))
        ids[slot], credit[slot] = token, 0.0
    credit[slot] += p**gamma
    return ids, credit


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("S", [0, 1, 2, 5])
def test_is_the_loop(S: int, dtype: torch.dtype, ids_dtype: torch.dtype, backend: str) -> None:
    B, L, gamma, decay, alpha = 6, 7, 0.2, 0.75, 0.7
    ids = torch.full((B, L, S), -1, dtype=ids_dtype)
    credit = torch.zeros(L, B, S, dtype=dtype).transpose(0, 1)  # any strides
    rows: list[list[Row]] = [[([-1] * S, [0.0] * S) for _ in range(L)] for _ in range(B)]
    for step in range(12):
        tokens = torch.randint(-1, 6, (B, L), dtype=(torch.int64, torch.int32)[step % 2])
        p = torch.rand(B, L, dtype=dtype).masked_fill(torch.rand(B, L) < 0.2, -torch.inf)
        p[0, 0], p[1, 0], p[2, 0] = torch.nan, 0.0, 1.0
        alive = (torch.rand(B, 3) < 0.6)[:, : (3, 0, 1)[step % 3]]
        lives = alive.any(1).tolist() if step % 3 != 1 else [True] * B
        given = (alive, None, alive[:, 0])[step % 3] if alive.shape[1] else None
        bias = pydecode.earn_credit(
            *(ids, credit, tokens, p),
            **dict(alive=given, gamma=gamma, decay=decay, alpha=alpha, backend=backend),
        )
        assert bias.dtype == dtype
        for b in range(B):
            for i in range(L):
                row = (int(tokens[b, i]), float(p[b, i]), lives[b], gamma, decay)
                rows[b][i] = loop(rows[b][i], *row)
                assert ids[b, i].tolist() == rows[b][i][0]
                assert credit[b, i].tolist() == pytest.approx(rows[b][i][1], rel=1e-5)
                want = [alpha * math.log1p(c) for c in rows[b][i][1]]
                assert bias[b, i].tolist() == pytest.approx(want, rel=1e-5)


def test_is_the_dense_credit(backend: str) -> None:
    """With a slot for every favourite it is dInfer's [B, L, V]."""
    B, L, V, S, gamma, decay, alpha = 3, 4, 30, 8, 0.2, 0.8, 0.7
    dense = torch.zeros(B, L, V, dtype=torch.float64)
    ids, credit = torch.full((B, L, S), -1), torch.zeros(B, L, S, dtype=torch.float64)
    favourites = torch.stack([torch.randperm(V)[:S] for _ in range(B * L)]).view(B, L, S)
    for _ in range(40):
        tokens = favourites.gather(-1, torch.randint(S, (B, L, 1)))
        p = torch.rand(B, L, 1, dtype=torch.float64)
        dense = (dense * decay).scatter_add(-1, tokens, p**gamma)
        bias = pydecode.earn_credit(
            *(ids, credit, tokens[..., 0], p[..., 0]),
            **dict(gamma=gamma, decay=decay, alpha=alpha, backend=backend),
        )
        mine = torch.zeros(B, L, V + 1, dtype=torch.float64)
        mine.scatter_(-1, torch.where(ids < 0, V, ids), bias)
        torch.testing.assert_close(mine[..., :V], alpha * torch.log(dense + 1))


def test_is_the_bias_of_unmask() -> None:
    """The row's second best token, which has credit, is filled in."""
    x, logits = torch.tensor([[9]]), torch.zeros(1, 1, 10)
    logits[..., 4], logits[..., 2] = 3.0, 3.2
    ids, credit = torch.tensor([[[4, -1]]]), torch.tensor([[[5.0, 0.0]]])
    best, tokens = pydecode.unmask(x, logits, mask_id=9, k=0, min_commit=0, return_proposals=True)
    bias = pydecode.earn_credit(ids, credit, tokens, best.confidence)
    assert ids.tolist() == [[[4, 2]]]
    done = pydecode.unmask(x, logits, mask_id=9, bias_ids=ids, bias=bias)
    assert done.tokens.tolist() == [[4]]


def of(row: list[tuple[int, float]], token: int, p: float, **more: Any) -> list[tuple[int, float]]:
    ids, credit = torch.tensor([[[i for i, _ in row]]]), torch.tensor([[[c for _, c in row]]])
    pydecode.earn_credit(ids, credit, torch.tensor([[token]]), torch.tensor([[p]]), **more)
    return list(zip(ids[0, 0].tolist(), credit[0, 0].tolist()))


def test_slots(backend: str) -> None:
    how: dict[str, Any] = dict(decay=0.5, gamma=1.0, backend=backend)
    full = [(3, 2.0), (4, 1.0), (5, 1.0)]
    assert of(full, 4, 0.5, **how) == [(3, 1.0), (4, 1.0), (5, 0.5)]  # its own
    assert of(full, 7, 0.5, **how) == [(3, 1.0), (7, 0.5), (5, 0.5)]  # the least, the first such
    assert of([(3, 2.0), (-1, 0.0)], 7, 0.5, **how) == [(3, 1.0), (7, 0.5)]
    for p in (0.0, -torch.inf, torch.nan, -1.0):
        assert of(full, 7, p, **how) == [(3, 1.0), (4, 0.5), (5, 0.5)]
    assert of(full, -1, 0.5, **how) == [(3, 1.0), (4, 0.5), (5, 0.5)]
    assert of([(3, torch.nan), (4, -2.0)], 3, 0.5, **how) == [(3, 0.5), (4, 0.0)]
    dead = torch.zeros(1, 0, dtype=torch.bool)
    assert of(full, 4, 0.5, alive=dead, **how) == [(4, 0.5), (-1, 0.0), (-1, 0.0)]
    assert of(full, -1, 0.5, alive=torch.tensor(False), **how) == [(-1, 0.0)] * 3
    # nothing that is not positive earns, also where 0 ** 0 would be 1
    assert of(full, 7, 0.0, **(how | dict(gamma=0.0))) == [(3, 1.0), (4, 0.5), (5, 0.5)]


@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_empty(shape: tuple[int, int, int], backend: str) -> None:
    ids, rows = torch.full(shape, -1), torch.ones(shape[:2])
    bias = pydecode.earn_credit(ids, torch.zeros(shape), rows.long(), rows, backend=backend)
    assert bias.shape == shape


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "ids": (TypeError, "credit_ids: expected dtype int32", dict(credit_ids=torch.ones(2, 4, 3))),
    "dim": (ValueError, "credit_ids: expected 3 dim", dict(credit_ids=torch.ones(2, 4).long())),
    "half": (TypeError, "credit: expected dtype float32", dict(credit=torch.zeros(2, 4, 3).half())),
    "slots": (ValueError, r"credit: expected shape \[B, L, S\]", dict(credit=torch.zeros(2, 4, 2))),
    "expanded": (
        ValueError,
        "credit: .* stride 0",
        dict(credit=torch.zeros(2, 4, 1).expand(2, 4, 3)),
    ),
    "tokens": (
        ValueError,
        r"tokens: expected shape \[B, L\]",
        dict(tokens=torch.ones(2, 3).long()),
    ),
    "p": (ValueError, "confidence: expected shape", dict(confidence=torch.ones(2, 3))),
    "alive": (ValueError, "alive: expected 0-d", dict(alive=torch.ones(3, dtype=torch.bool))),
    "flags": (TypeError, "alive: expected dtype bool", dict(alive=torch.ones(2))),
    "gamma": (ValueError, "gamma: expected at least 0", dict(gamma=-0.1)),
    "decay": (TypeError, "decay: expected a number", dict(decay=Tensor())),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case: str) -> None:
    error, message, change = BAD[case]
    given: dict[str, Any] = dict(
        credit_ids=torch.full((2, 4, 3), -1),
        credit=torch.zeros(2, 4, 3),
        tokens=torch.ones(2, 4).long(),
        confidence=torch.ones(2, 4),
    )
    with pytest.raises(error, match=message):
        pydecode.earn_credit(**{**given, **change})
    with pydecode.checks(True), pytest.raises(ValueError, match="credit_ids: expected entries in"):
        pydecode.earn_credit(**{**given, "credit_ids": given["credit_ids"] - 1})
