"""``commit``: the ten rules against plain loops, and who may be committed at all."""

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


def test_one_step_of_every_rule_by_hand(backend: str) -> None:
    tokens = torch.tensor([[MASK, MASK, 1, MASK, MASK, MASK]])
    proposals = torch.tensor([[0, 1, 2, 3, 4, 5]], dtype=torch.int32)
    scores = torch.tensor([[0.5, 0.75, 1.0, 0.9, 0.625, 0.9]])

    def committed(rule: str, scores: Tensor = scores, **numbers: Any) -> list[int]:
        got = pydecode.commit(
            tokens, proposals, scores, mask_id=MASK, rule=rule, backend=backend, **numbers
        )
        return got.committed[0].nonzero()[:, 0].tolist()

    assert committed("top_k") == [3]  # the tie with 5 goes to the left
    assert committed("top_k", k=2) == [3, 5]
    assert committed("threshold") == [3, 5]  # fp32(0.9) meets 0.9
    assert committed("threshold", strict=True) == [3]
    assert committed("threshold", threshold=0.95, slack=0.2) == [1, 3, 5]
    assert committed("threshold", threshold=0.5, max_commit=2) == [3, 5]
    assert committed("threshold", threshold=0.9, strict=True, min_commit=3) == [1, 3, 5]
    assert committed("factor", factor=0.5) == [3, 5]  # 0.9 >= 1 - 0.5/3, 0.75 < 1 - 0.5/4
    assert committed("factor", factor=1.0) == [1, 3, 5]  # 0.75 >= 3/4, 0.625 < 4/5
    assert committed("prefix", threshold=0.5) == [0, 1, 3, 4, 5]  # over the filled row 2
    assert committed("prefix", threshold=0.6) == [0]  # none, so the leftmost
    assert committed("sequential", k=3) == [0, 1, 3]
    assert committed("segments", threshold=0.95) == [1, 3]
    assert committed("segments", threshold=0.95, low=0.8) == [3]
    assert committed("entropy", -scores, threshold=0.625) == [0, 4]
    assert committed("entropy_bound", -scores, threshold=0.5) == [0, 4]  # 0, then 0.5, then 1.125
    assert committed("external", external_score=1 - scores, threshold=0.3) == [0, 4]
    assert committed("posterior", uniforms=1 - scores, keep=0.3) == [0, 4]


def test_the_peers_factor_quirk_is_not_here(backend: str) -> None:
    """Fast-dLLM's code commits the last candidate when only that one fails; the paper does not."""
    tokens, proposals = torch.full((1, 3), MASK), torch.tensor([[1, 2, 3]])
    scores = torch.tensor([[0.99, 0.98, 0.1]])
    got = pydecode.commit(
        tokens, proposals, scores, mask_id=MASK, rule="factor", factor=0.5, backend=backend
    )
    assert got.tokens.tolist() == [[1, 2, MASK]]


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


def test_posterior_draws(backend: str) -> None:
    """Seeded draws are those of the COMMIT stream at the row's position; [B] seeds stand alone."""
    tokens, proposals = torch.full((4, 300), MASK), torch.ones(4, 300).long()
    scores = torch.rand(4, 300)
    call = dict(mask_id=MASK, rule="posterior", keep=0.25, backend=backend)

    def run(b: slice, **keys: Any) -> Tensor:
        return pydecode.commit(tokens[b], proposals[b], scores[b], **call, **keys).committed

    everything = slice(None)
    seeds = torch.tensor([5, 6, 5, 2**50 + 5])
    whole = run(everything, seed=seeds)
    assert torch.equal(whole[0], whole[2])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], whole[3])
    assert torch.equal(run(slice(1, 2), seed=seeds[1:2]), whole[1:2])
    scalar = run(everything, seed=5)
    assert torch.equal(scalar[0], whole[0])  # request 0 adds nothing
    assert not torch.equal(scalar[0], scalar[2])
    positions = torch.arange(300).expand(4, 300)
    assert torch.equal(run(everything, seed=seeds, positions=positions), whole)
    assert torch.equal(run(everything, seed=seeds, positions=positions.flip(1)), whole.flip(1))
    assert not torch.equal(run(everything, seed=seeds, offset=1), whole)
    assert 1200 * 0.75 - 4 * 15 < whole[:3].sum() / 3 * 4 < 1200 * 0.75 + 4 * 15


@pytest.mark.parametrize(("B", "L"), [(0, 5), (3, 0), (0, 0), (2, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_empty_and_single(rule: str, B: int, L: int, backend: str) -> None:
    tokens, proposals, scores = torch.full((B, L), MASK), torch.ones(B, L).long(), torch.rand(B, L)
    got = pydecode.commit(
        tokens,
        proposals,
        scores,
        mask_id=MASK,
        rule=rule,
        external_score=scores,
        backend=backend,
    )
    assert got.tokens.shape == got.committed.shape == got.confidence.shape == (B, L)
    assert got.num_committed.tolist() == [L] * B
    assert got.num_left.tolist() == [0] * B


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "rule: expected one of top_k", dict(rule="greedy")),
        (ValueError, "external_score: expected scores", dict(rule="external")),
        (
            ValueError,
            r"proposals: expected shape \[B, L\]",
            dict(proposals=torch.zeros(1, 4).long()),
        ),
        (TypeError, "proposals: expected dtype", dict(proposals=torch.zeros(2, 4))),
        (TypeError, "scores: expected dtype", dict(scores=torch.zeros(2, 4).long())),
        (TypeError, "tokens: expected dtype int64", dict(tokens=torch.zeros(2, 4).int())),
        (ValueError, "tokens: expected 2 dimensions", dict(tokens=torch.zeros(2).long())),
        (TypeError, "mask_id: expected an int", dict(mask_id=1.0)),
        (TypeError, "window: expected None or a pair", dict(window=3)),
        (ValueError, "window: expected a length of at least 0", dict(window=(0, -1))),
        (ValueError, r"window: expected 0-d or \[B\]", dict(window=(torch.zeros(3).long(), 1))),
        (ValueError, "min_commit: expected at least 0", dict(min_commit=-1)),
        (ValueError, "max_commit: expected at least min_commit = 1, got 0", dict(max_commit=0)),
        (TypeError, "max_commit: expected an int", dict(max_commit=torch.tensor(1))),
        (ValueError, r"threshold: expected 0-d or \[B\]", dict(threshold=torch.zeros(3))),
        (ValueError, "k: expected at least 0", dict(k=-1)),
        (ValueError, "slack: expected at least 0", dict(slack=-0.1)),
        (TypeError, "uniforms: expected dtype", dict(uniforms=torch.zeros(2, 4).half())),
        (ValueError, "positions: expected shape", dict(positions=torch.zeros(4).long())),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given = dict(
        tokens=torch.zeros(2, 4).long(),
        proposals=torch.zeros(2, 4).long(),
        scores=torch.zeros(2, 4),
        mask_id=MASK,
    )
    with pytest.raises(error, match=message):
        pydecode.commit(**{**given, **change})
