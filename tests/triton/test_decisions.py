"""The small integer ops in Triton, interpreted: Jacobi steps, block states, masks put back."""

from typing import Any

import pytest
import test_jacobi_step as jacobi
import test_remask as masking
import test_verify_states as states
import torch

import pydecode
from pydecode.reference import jacobi_step as jacobi_reference
from pydecode.reference import remask as remask_reference
from pydecode.reference import verify_states as states_reference

remask_exactly, states_exactly = remask_reference.remask, states_reference.verify_states
jacobi_exactly = jacobi_reference.jacobi_step


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(jacobi_reference, "jacobi_step", refuse)
    monkeypatch.setattr(remask_reference, "remask", refuse)
    monkeypatch.setattr(states_reference, "verify_states", refuse)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_jacobi(n: int, dtype: torch.dtype) -> None:
    jacobi.test_against_loops("triton", n, dtype)


@pytest.mark.parametrize("n", [512, 513, 514, 1300])
def test_jacobi_over_many_blocks(n: int) -> None:
    """Wrong at one place, or nowhere; strided; what the model says in the other width."""
    B = 6
    target = torch.randint(0, 9, (n, B)).mT
    draft = torch.cat([torch.zeros(B, 1).long(), target[:, :-1]], 1).int()
    for b, at in enumerate((1, 511, 512, n - 1, n // 2)):
        draft[b, min(at, n - 1)] += 1
    for valid in (None, torch.tensor([n, n - 1, 512, n, 1, 513])):
        number = (n, None) if valid is None else (0, valid)
        want = jacobi_exactly(draft, target, *number)
        got = pydecode.jacobi_step(draft, target, num_valid=valid, backend="triton")
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, want))


def test_jacobi_edges() -> None:
    jacobi.test_rows_past_num_valid_are_not_read("triton")
    for shape in ((0, 4), (3, 0), (0, 0)):
        jacobi.test_empty("triton", shape)


@pytest.mark.parametrize("rule", ["exact", "subset"])
@pytest.mark.parametrize("graph", [None, "shared", "each"])
@pytest.mark.parametrize(("K", "L"), [(1, 3), (8, 3), (9, 0), (20, 70), (130, 2)])
def test_states(K: int, L: int, graph: str | None, rule: str) -> None:
    """Few symbols, so that equal states, cycles and subsets abound."""
    B = 12 if K < 100 else 2
    choices = torch.randint(0, 3, (3, L))  # a few rows, for long ones to be equal
    x = choices[torch.randint(0, 3, (2, B, K))]
    x = torch.where(torch.rand(x.shape) < (0.2 if L < 9 else 0.003), 0, x)
    edges = {None: None, "shared": torch.rand(1, K, K) < 0.7, "each": torch.rand(B, K, K) < 0.7}
    allowed = edges[graph]
    args = (x[0], x[1].int().transpose(1, 2).contiguous().transpose(1, 2))
    want = states_exactly(*args, states.MASK, rule, allowed)
    got = pydecode.verify_states(
        *args, mask_id=states.MASK, rule=rule, graph=allowed, backend="triton"
    )
    assert torch.equal(got, want)


def test_states_edges() -> None:
    states.test_order_of_children("triton")
    states.test_a_cycle_ends_the_walk("triton")
    states.test_empty_batch("triton")
    big = torch.zeros(1, 257, 1, dtype=torch.int64)
    with pytest.raises(pydecode.BackendUnavailable, match="up to 256 states, got 257"):
        pydecode.verify_states(big, big, mask_id=0, backend="triton")


@pytest.mark.parametrize(
    ("L", "dtype"),
    [
        *((1, torch.float32), (40, torch.float16), (40, torch.bfloat16), (300, torch.bfloat16)),
        *((300, torch.float32), (1500, torch.float16), (4097, torch.float32)),
    ],
    ids=str,
)
def test_remask(L: int, dtype: torch.dtype) -> None:
    """Ties, NaN, infinities and signed zeros, over one block and several."""
    B = 4 if L < 1000 else 2
    tokens = torch.randint(0, 12, (B, L))
    scores = (torch.randint(-3, 5, (B, L)) / 4).to(dtype)
    scores[torch.rand(B, L) < 0.1] = torch.nan
    scores[torch.rand(B, L) < 0.1] = -torch.inf
    scores[torch.rand(B, L) < 0.1] = -0.0
    scores[0] = torch.randn(L).to(dtype)
    scores = torch.stack([scores] * 2, -1)[..., 1]
    for r in (
        L // 3,
        torch.randint(-1, L + 2, (B,)),
        torch.tensor([L // 2, 2**62, -(2**62), 1])[:B],
    ):
        pair = (0, r) if isinstance(r, torch.Tensor) else (r, None)
        want = remask_exactly(tokens, scores, *pair, masking.MASK)
        got = pydecode.remask(tokens, scores, r=r, mask_id=masking.MASK, backend="triton")
        assert torch.equal(got, want)


def test_remask_edges() -> None:
    for shape in ((0, 4), (3, 0)):
        tokens = torch.zeros(shape, dtype=torch.int64)
        got = pydecode.remask(tokens, torch.zeros(shape), r=1, mask_id=0, backend="triton")
        assert got.shape == shape
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        pydecode.remask(
            torch.zeros(1, 2).long(), torch.zeros(1, 2).double(), r=1, mask_id=0, backend="triton"
        )
