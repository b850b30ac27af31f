"""The ten rules of ``commit`` against plain loops, and who may be committed at all."""

import itertools
from typing import Any

import pytest
import torch
from commit_rules_oracle import RULES, commits
from torch import Tensor

import pydecode

MASK = 7
ENTROPY = ("entropy", "entropy_bound")


def steps(*shape: int) -> Tensor:
    """Eighths in [0, 1]: many ties, exact sums, and thresholds that are met exactly."""
    return torch.randint(0, 9, shape).double() / 8


def batch(B: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with none, one, two, some or all masked; proposals, a few of which are no token."""
    tokens = torch.where(torch.rand(B, L) < torch.rand(B, 1) * 1.4, MASK, torch.zeros(B, L).long())
    tokens[0], tokens[1], tokens[2:5] = 0, MASK, 0
    tokens[2, L // 2] = tokens[3, 0] = tokens[3, L - 1] = tokens[4, 1] = tokens[4, 2] = MASK
    proposals = torch.randint(0, 7, (B, L))
    proposals[torch.rand(B, L) < 0.1] = -1
    proposals[torch.rand(B, L) < 0.1] = MASK
    proposals[5] = MASK  # every row predicts the mask
    return tokens, proposals, steps(B, L)


def of(x: Any, b: int) -> Any:
    return (x[b] if x.dim() else x).item() if isinstance(x, Tensor) else x


def check(
    got: pydecode.Unmasked,
    tokens: Tensor,
    proposals: Tensor,
    scores: Tensor,
    rule: str,
    start: int | Tensor = 0,
    length: int = 10**6,
    external: Tensor | None = None,
    u: Tensor | None = None,
    **numbers: Any,
) -> None:
    """The whole result of one call against the loops, request by request."""
    B, L = tokens.shape
    for b in range(B):
        first = of(start, b)
        masked = [tokens[b, i] == MASK and first <= i < first + length for i in range(L)]
        real = [0 <= p != MASK for p in proposals[b].tolist()]
        c = [s if r else float("nan") for s, r in zip(scores[b].tolist(), real)]
        want = commits(
            rule,
            c,
            masked,
            external=None if external is None else external[b].tolist(),
            u=None if u is None else u[b].tolist(),
            **{name: of(x, b) for name, x in numbers.items()},
        )
        assert got.committed[b].tolist() == want, (rule, b, c, masked)
        new = [p if w else t for p, w, t in zip(proposals[b].tolist(), want, tokens[b].tolist())]
        assert got.tokens[b].tolist() == new
        assert got.num_committed[b] == sum(want)
        assert got.num_left[b] == sum(masked) - sum(want)
        read = [s if m and s == s else float("-inf") for s, m in zip(c, masked)]
        assert got.confidence[b].tolist() == read


NUMBERS: dict[str, list[dict[str, Any]]] = {
    "top_k": [dict(k=1), dict(k=3), dict(k=0), dict(k=99)],
    "threshold": [dict(threshold=t, slack=s) for t in (0.0, 0.5, 1.5) for s in (0.0, 0.125)],
    "factor": [dict(factor=f) for f in (0.0, 0.75, 1.0, 2.5)],
    "entropy": [dict(threshold=t) for t in (0.0, 0.5, 2.0)],
    "entropy_bound": [dict(threshold=t) for t in (-1.0, 0.0, 0.5, 2.0)],
    "prefix": [dict(threshold=t) for t in (0.0, 0.25, 1.5)],
    "sequential": [dict(k=1), dict(k=3), dict(k=99)],
    "segments": [dict(threshold=t, low=low) for t in (0.75, 2.0) for low in (0.0, 0.5, 2.0)],
    "posterior": [dict(keep=0.0), dict(keep=0.5), dict(keep=1.0)],
    "external": [dict(threshold=t) for t in (0.0, 0.5, 1.5)],
}
LIMITS: list[dict[str, Any]] = [
    dict(),
    dict(min_commit=0),
    dict(min_commit=3),
    dict(max_commit=2),
    dict(min_commit=0, max_commit=1),
    dict(min_commit=2, max_commit=2),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_the_loops(rule: str, backend: str) -> None:
    assert set(NUMBERS) == set(RULES)
    for numbers, limits, strict in itertools.product(NUMBERS[rule], LIMITS, (False, True)):
        tokens, proposals, scores = batch(9, 8)
        scores = -scores if rule in ENTROPY else scores
        scores[7, :3] = torch.nan
        scores[8, 2] = -torch.inf
        external = steps(9, 8) if rule == "external" else None
        if external is not None:
            external[1, 1] = torch.nan
        u = steps(9, 8) if rule == "posterior" else None
        given = dict(numbers, strict=strict, **limits)
        got = pydecode.commit(
            tokens,
            proposals,
            scores,
            mask_id=MASK,
            rule=rule,
            external_score=external,
            uniforms=u,
            backend=backend,
            **given,
        )
        check(got, tokens, proposals, scores, rule, external=external, u=u, **given)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [0, 1, 3, 8, 11])
def test_windows_and_numbers_of_each_request(rule: str, length: int, backend: str) -> None:
    tokens, proposals, scores = batch(9, 8)
    scores = -scores if rule in ENTROPY else scores
    external = steps(9, 8) if rule == "external" else None
    u = steps(9, 8) if rule == "posterior" else None
    start = torch.tensor([0, 0, 3, 7, 1, 0, -2, 9, 5])
    given = dict(
        k=torch.randint(0, 5, (9,)),
        threshold=steps(9),
        slack=torch.tensor(0.125),
        factor=steps(9) * 2,
        low=steps(9),
        keep=steps(9),
    )
    got = pydecode.commit(
        tokens,
        proposals,
        scores,
        mask_id=MASK,
        rule=rule,
        window=(start, length),
        external_score=external,
        uniforms=u,
        backend=backend,
        **given,
    )
    numbers = {**given, "external": external, "u": u}
    check(got, tokens, proposals, scores, rule, start, length, **numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_score_dtypes(dtype: torch.dtype, backend: str) -> None:
    tokens, proposals, scores = batch(9, 8)
    given = dict(threshold=0.625)
    got = pydecode.commit(
        tokens,
        proposals,
        scores.to(dtype),
        mask_id=MASK,
        rule="threshold",
        backend=backend,
        **given,
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (got.tokens.dtype, got.confidence.dtype) == (torch.int64, wide)
    assert (got.num_committed.dtype, got.num_left.dtype) == (torch.int32, torch.int32)
    check(got, tokens, proposals, scores, "threshold", **given)
