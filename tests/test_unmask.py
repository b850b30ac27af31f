"""``unmask``: what is read from which row, windows, shifts and exclusions, against plain loops."""

import math
from typing import Any

import pytest
import torch
from commit_rules_oracle import RULES, commits
from torch import Tensor

import pydecode

MASK, V, L = 6, 10, 8
INF = float("inf")
FORMS = ("whole", "shifted", "window", "shifted window", "one earlier")


def pool_rows(*shape: int) -> Tensor:
    """Rows of a few kinds, so that confidences either tie exactly or are far apart."""
    kinds = torch.randn(5, V, dtype=torch.float64) * 2
    kinds[0, MASK] = kinds[1, MASK] = 9.0  # the argmax is the mask
    kinds[2, 3] = kinds[2, 5] = 4.0  # a tie
    return kinds[torch.randint(0, 5, shape)]


def score(row: Tensor, excluded: list[int], entropy: bool) -> tuple[int, float]:
    """Token and confidence of a row by a loop in fp64; (-1, nan) where nothing can be chosen."""
    x = [-INF if v in excluded else value for v, value in enumerate(row.tolist())]
    if any(value != value for value in x) or max(x) == -INF:
        return -1, math.nan
    token = x.index(max(x))
    weights = [math.exp(value - max(x)) for value in x]
    p = [w / math.fsum(weights) for w in weights]
    return token, math.fsum(q * math.log(q) for q in p if q > 0) if entropy else p[token]


def expected(
    tokens: Tensor,
    row_at: Any,
    rule: str,
    start: Tensor,
    length: int,
    excluded: list[int],
    is_mask: Tensor | None = None,
    **numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New tokens, masks left in the window, confidence, proposals; row_at(b, i) is i's row."""
    out, left = tokens.clone(), torch.zeros(tokens.shape[0], dtype=torch.int32)
    is_mask, proposals = tokens == MASK if is_mask is None else is_mask, tokens.clone()
    confidence = torch.full(tokens.shape, -INF, dtype=torch.float64)
    for b in range(tokens.shape[0]):
        masked = [bool(is_mask[b, i] and start[b] <= i < start[b] + length) for i in range(L)]
        scored = [
            score(row_at(b, i), excluded, rule.startswith("entropy")) if masked[i] else (-1, -INF)
            for i in range(L)
        ]
        chosen = commits(rule, [c for _, c in scored], masked, **numbers)
        for i in range(L):
            if chosen[i]:
                out[b, i] = scored[i][0]
            confidence[b, i] = -INF if math.isnan(scored[i][1]) else scored[i][1]
            if scored[i][0] >= 0:
                proposals[b, i] = scored[i][0]
        left[b] = sum(masked) - sum(chosen)
    return out, left, confidence, proposals


def check(got: pydecode.Unmasked, tokens: Tensor, want: tuple[Tensor, ...]) -> None:
    assert torch.equal(got.tokens, want[0])
    assert torch.equal(got.committed, want[0] != tokens)
    assert torch.equal(got.num_committed, got.committed.sum(-1).int())
    assert torch.equal(got.num_left, want[1])
    torch.testing.assert_close(got.confidence, want[2], rtol=1e-12, atol=1e-12)


def masked_batch(B: int) -> Tensor:
    tokens = torch.where(torch.rand(B, L) < torch.rand(B, 1) * 1.3, MASK, torch.zeros(B, L).long())
    tokens[0], tokens[1] = MASK, 0
    return tokens


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("posterior", "external")])
@pytest.mark.parametrize(
    ("form", "length"),
    [("whole", None), ("shifted", None)]
    + [(form, n) for form in FORMS for n in (0, 3, 7, 8, 20)],  # 7: one earlier is L rows
)
def test_rows_windows_and_shifts(rule: str, form: str, length: int | None, backend: str) -> None:
    B, size = 6, L if length is None else length
    tokens = masked_batch(B)
    start = torch.zeros(B).long() if length is None else torch.tensor([0, 2, 5, -2, 7, 1])
    shift = int(form not in ("whole", "window"))
    earlier = form == "one earlier"
    rows = {"window": size, "shifted window": size, "one earlier": size + 1}.get(form, L)
    logits = pool_rows(B, rows)
    logits[2, : rows // 2] = torch.nan
    logits[3, : rows // 2, torch.arange(V) != MASK] = -INF  # nothing but the mask is left

    def row_at(b: int, i: int) -> Tensor:
        first = 0 if rows == L else int(start[b])  # L rows are always the whole
        own = i - first - (shift if rows == L or not earlier else 0)
        return logits[b, max(own, 0)]

    numbers = dict(threshold=0.55, k=2, low=0.3, slack=1e-5, factor=1.2)
    if rule.startswith("entropy"):
        numbers["threshold"] = 1.0
    got = pydecode.unmask(
        tokens,
        logits,
        mask_id=MASK,
        rule=rule,
        shift=shift,
        window=None if length is None else (start, size),
        exclude_ids=1,
        backend=backend,
        **numbers,
    )
    check(got, tokens, expected(tokens, row_at, rule, start, size, [1, MASK], **numbers))
    if length is None:
        assert not got.committed[1].any()


@pytest.mark.parametrize("rule", ["top_k", "threshold", "entropy", "prefix", "segments"])
@pytest.mark.parametrize("mask_id", [MASK, -1, V + 3])  # outside [0, V) nothing is excluded
@pytest.mark.parametrize("in_place", [False, True])
def test_masked_and_proposals(rule: str, mask_id: int, in_place: bool, backend: str) -> None:
    """The rows named by ``masked`` are the masked ones, whatever their tokens."""
    B = 40
    tokens = torch.randint(V, V + 9, (B, L))  # no proposal, so that a commit is always a change
    masked, start = torch.rand(B, L) < torch.rand(B, 1), torch.randint(-2, L, (B,))
    logits = pool_rows(B, L)
    logits[torch.rand(B, L) < 0.1] = torch.nan
    numbers = dict(threshold=1.0 if rule == "entropy" else 0.55, k=2, low=0.3, slack=1e-5)
    args = (tokens, lambda b, i: logits[b, i], rule, start, 5, [1, mask_id], masked)
    want = expected(*args, **numbers)
    numbers.update(mask_id=mask_id, masked=masked, window=(start, 5), exclude_ids=1)
    held = tokens.clone()
    numbers.update(out=held if in_place else None, backend=backend)
    got, proposals = pydecode.unmask(held, logits, rule=rule, return_proposals=True, **numbers)
    check(got, tokens, want)
    assert torch.equal(proposals, want[3])
    alone = pydecode.unmask(tokens, logits, rule=rule, **{**numbers, "out": None})
    assert all(torch.equal(x, y) for x, y in zip(got, alone))


def test_proposals_of_the_rows_that_equal_mask_id(backend: str) -> None:
    tokens, logits = masked_batch(6), torch.randn(6, L, V)
    given = dict(mask_id=MASK, k=L, window=(2, 4), exclude_ids=1, backend=backend)
    got, proposals = pydecode.unmask(tokens, logits, return_proposals=True, **given)
    assert torch.equal(proposals, got.tokens)  # all of them committed
    _, few = pydecode.unmask(tokens, logits, return_proposals=True, **{**given, "k": 1})
    assert torch.equal(few, proposals)


def test_shift_is_the_peers_copy(backend: str) -> None:
    """Dream's ``cat([logits[:, :1], logits[:, :-1]], 1)``, and the same rows as windows."""
    tokens, logits = masked_batch(5), torch.randn(5, L, V)
    copied = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    call = dict(mask_id=MASK, rule="threshold", threshold=0.3, backend=backend)
    drawn = dict(call, temperature=0.9, seed=torch.arange(5))
    for given in (call, drawn):
        whole = pydecode.unmask(tokens, logits, shift=1, **given)
        for got, want in zip(whole, pydecode.unmask(tokens, copied, **given)):
            assert torch.equal(got, want)
        # the window's rows: one earlier is exact, its own first row is Fast-dLLM's approximation
        want = pydecode.unmask(tokens, logits, shift=1, window=(2, 4), **given)
        for start in (2, torch.tensor(2), torch.full((5,), 2)):
            got = pydecode.unmask(tokens, logits[:, 1:6], shift=1, window=(start, 4), **given)
            assert all(torch.equal(x, y) for x, y in zip(got, want))
        rows = torch.cat([copied[:, :2], logits[:, 2:3], copied[:, 3:]], 1)
        want = pydecode.unmask(tokens, rows, window=(2, 4), **given)
        got = pydecode.unmask(tokens, logits[:, 2:6], shift=1, window=(2, 4), **given)
        assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_tokens_and_confidence_are_sample_and_scores(backend: str) -> None:
    """Every sampling argument reaches the rows of its own position."""
    B = 4
    tokens, logits = torch.full((B, L), MASK), torch.randn(B, L, V)
    words = torch.randint(0, 1 << V, (B, L, 1), dtype=torch.int32) | 0b101
    sampling = dict(
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0]),
        top_k=torch.tensor([0, 5, 3, 4]),
        top_p=0.95,
        min_p=torch.tensor(0.05),
        confidence="margin",
        tempered=True,
        allowed=words,
        seed=torch.tensor([3, 1, 4, 1]),
        offset=9,
        backend=backend,
    )
    at = torch.randint(0, 99, (B, L))  # the default is the index in L, not in the window
    for extra in (
        dict(sampler="gumbel"),
        dict(sampler="gumbel", positions=at),
        dict(uniforms=torch.rand(B, L)),
        dict(confidence="random"),
        dict(positions=at),
    ):
        ids = torch.tensor([[1], [-1], [3], [4]])
        want = pydecode.sample_and_score(
            logits,
            exclude_ids=torch.cat([ids, torch.full((B, 1), MASK)], 1),
            **{**sampling, **extra},
        )
        start = torch.tensor([1, 2, 3, 6])
        got = pydecode.unmask(
            tokens,
            logits,
            mask_id=MASK,
            k=4,
            window=(start, 4),
            exclude_ids=ids,
            **{**sampling, **extra},
        )
        inside = (torch.arange(L) >= start[:, None]) & (torch.arange(L) < start[:, None] + 4)
        assert torch.equal(got.committed, inside & (want.tokens >= 0))
        assert torch.equal(got.tokens[got.committed], want.tokens[got.committed])
        assert torch.equal(got.confidence[inside], want.confidence[inside])
        assert (got.confidence[~inside] == -INF).all()
