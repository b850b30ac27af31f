"""The commit rules in Triton, interpreted: every decision is the reference's."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import Unmasked
from pydecode.reference import commit as reference_module
from pydecode.reference.commit import commit as reference

RULES = (
    *("top_k", "threshold", "factor", "entropy", "entropy_bound"),
    *("prefix", "sequential", "segments", "posterior", "external"),
)
MASK = 3
EXAMPLES = {"short": (30, 9), "two_tiles": (4, 100), "one": (3, 1)}


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference_module, "commit", refuse)


def expect_alike(*args: Any, **kwargs: Any) -> Unmasked:
    got = pydecode.commit(*args, **kwargs, backend="triton")
    with pytest.MonkeyPatch.context() as change:
        change.setattr(reference_module, "commit", reference)
        want = pydecode.commit(*args, **kwargs, backend="reference")
    for name, x, y in zip(got._fields, got, want):
        assert x.dtype == y.dtype
        assert x.is_contiguous()
        assert torch.equal(x, y), (name, (x != y).nonzero()[0])
    return got


def eighths(*shape: int, low: int = 0, high: int = 9) -> Tensor:
    """Few different numbers, whose sums are exact: ties, and thresholds that are met."""
    return torch.randint(low, high, shape) / 8


def request_batch(rule: str, B: int, L: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    tokens = torch.where(torch.rand(B, L) < 0.7, MASK, torch.randint(0, 3, (B, L)))
    proposals = torch.randint(-1, 9, (B, L))
    scores = eighths(B, L)
    scores[torch.rand(B, L) < 0.05] = torch.nan
    scores[torch.rand(B, L) < 0.03] = -torch.inf
    scores[torch.rand(B, L) < 0.01] = torch.inf
    kwargs: dict[str, Any] = dict(mask_id=MASK, rule=rule, seed=torch.arange(B) * 2**33)
    if rule in ("entropy", "entropy_bound"):
        scores = -scores
    numbers = dict(
        k=torch.randint(0, L + 2, (B,)),
        threshold=eighths(B),
        slack=eighths(B, high=3),
        factor=eighths(B, low=-4, high=20),
        low=eighths(B),
        keep=torch.rand(B, dtype=torch.float64),
    )
    if rule == "external":
        kwargs["external_score"] = eighths(B, L)
        kwargs["external_score"][torch.rand(B, L) < 0.1] = torch.nan
    return (tokens, proposals, scores), kwargs | numbers


@pytest.mark.parametrize("size", EXAMPLES)
@pytest.mark.parametrize("rule", RULES)
def test_random_requests(rule: str, size: str) -> None:
    """Numbers of its own for each request, in tensors; then filled, cut, strict and windowed."""
    B, L = EXAMPLES[size]
    options: tuple[dict[str, Any], ...] = (
        dict(min_commit=0),
        dict(strict=True),
        dict(min_commit=4, max_commit=5),
        dict(max_commit=2, window=(torch.randint(-3, L + 3, (B,)), max(L // 2, 1)), min_commit=0),
    )
    committed = 0
    for more in options:
        args, kwargs = request_batch(rule, B, L)
        committed += int(expect_alike(*args, **kwargs, **more).num_committed.sum())
    assert committed


@pytest.mark.parametrize("rule", RULES)
def test_python_numbers_and_layouts(rule: str) -> None:
    """Numbers of the host, strided arguments, int32 proposals, 16-bit scores, 0-d tensors."""
    (tokens, proposals, scores), kwargs = request_batch(rule, 6, 20)
    numbers: dict[str, Any] = dict(k=3, threshold=0.5, slack=0.0, factor=0.75, low=0.25, keep=0.3)
    kwargs |= numbers
    for dtype in (torch.float16, torch.bfloat16):
        expect_alike(
            tokens.T.contiguous().T,
            torch.stack([proposals] * 2, -1)[..., 0].int(),
            scores.to(dtype).repeat(1, 2)[:, :20],
            **kwargs,
            window=(torch.tensor(2), 30),
        )
    kwargs |= {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
    kwargs["k"] = torch.tensor(3, dtype=torch.int32)
    if rule == "external":
        kwargs["external_score"] = kwargs["external_score"].T.contiguous().T.half()
    expect_alike(tokens, proposals, scores, **{**kwargs, "seed": 2**40, "offset": -1})


def test_draws() -> None:
    """Given ones, seeded ones at their positions; a scalar seed is mixed with the index."""
    (tokens, proposals, scores), kwargs = request_batch("posterior", 5, 40)
    u = torch.rand(5, 40, dtype=torch.float64)
    u[0], u[1, :4] = 0.0, torch.tensor([torch.nan, 1 - 2**-53, 1.0, -1.0])
    kwargs["keep"] = torch.tensor([0.0, 1 - 2**-24, 0.5, 1.0, torch.nan])
    expect_alike(tokens, proposals, scores, **kwargs, uniforms=u.T.contiguous().T)
    expect_alike(tokens, proposals, scores, **kwargs, positions=torch.randint(0, 2**40, (5, 40)))
    kwargs |= dict(keep=0.5, seed=-9, offset=torch.randint(0, 2**60, (5,)))
    got = expect_alike(tokens, proposals, scores, **kwargs, max_commit=None)
    assert 0 < got.num_committed.sum() < (tokens == MASK).sum()


@pytest.mark.parametrize("rule", RULES)
def test_edges(rule: str) -> None:
    """Nothing masked, nothing to propose, an empty window, no rows, no requests, tokens of 64 bits;
    NaN and infinite thresholds."""
    (tokens, proposals, scores), kwargs = request_batch(rule, 7, 6)
    tokens[0], proposals[1], scores[2] = 0, MASK, torch.nan
    tokens[3:], proposals[3] = MASK, 2**40
    wild = torch.tensor([0.0, 0.0, 0.0, torch.nan, torch.inf, -torch.inf, 0.5])
    kwargs |= dict.fromkeys(("threshold", "slack", "factor", "low", "keep"), wild)
    expect_alike(tokens, proposals, scores, **kwargs)
    for window in ((0, 0), (9, 3), (-9, 3), (torch.full((7,), 2**62), 5)):
        got = expect_alike(tokens, proposals, scores, **kwargs, window=window)
        assert not got.committed.any()
    for B, L in ((0, 5), (3, 0), (0, 0)):
        args, kwargs = request_batch(rule, B, L)
        expect_alike(*args, **kwargs)


def test_what_cannot_run() -> None:
    (tokens, proposals, scores), kwargs = request_batch("external", 2, 4)
    call = dict(kwargs, backend="triton")
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        pydecode.commit(tokens, proposals, scores.double(), **call)
    call["external_score"] = call["external_score"].double()
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        pydecode.commit(tokens, proposals, scores, **call)
