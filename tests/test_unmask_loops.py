"""``unmask`` in whole loops: the published decoders, progress, and the laws of random steps.

The decoders are written from their papers and code as plain fp64 loops over one sequence, with the
mask's logit at -inf where the peer forgot it.
"""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import pydecode

MASK, V = 12, 13


class Model:
    """A bidirectional toy: every position's logits depend on all tokens, the mask's being large."""

    def __init__(self, length: int, mask_logit: float = 3.0) -> None:
        self.tokens = torch.randn(V, 6, dtype=torch.float64)
        self.mix = torch.randn(length, length, dtype=torch.float64)
        self.head = torch.randn(6, V, dtype=torch.float64)
        self.mask_logit = mask_logit

    def __call__(self, tokens: Tensor) -> Tensor:
        logits = (self.mix @ self.tokens[tokens]) @ self.head
        logits[..., MASK] = self.mask_logit
        return logits


def scored(row: Tensor, mode: str = "probability") -> tuple[int, float]:
    x = [value for v, value in enumerate(row.tolist()) if v != MASK]  # MASK is the last id
    weights = [math.exp(value - max(x)) for value in x]
    p = [w / math.fsum(weights) for w in weights]
    if mode == "entropy":
        return x.index(max(x)), -math.fsum(q * math.log(q) for q in p)
    if mode == "margin":
        return x.index(max(x)), sorted(p)[-1] - sorted(p)[-2]
    return x.index(max(x)), max(p)


def llada(model: Model, x: Tensor, s: int, e: int, mode: str, quota: list[int]) -> Tensor:
    """A schedule of top-k per step (LLaDA generate; Dream with topk_margin)."""
    for k in quota:
        logits = model(x)
        at = {i: scored(logits[i], mode) for i in range(s, e) if x[i] == MASK}
        for i in sorted(at, key=lambda i: -at[i][1])[:k]:
            x[i] = at[i][0]
    return x


def fast_dllm(model: Model, x: Tensor, s: int, e: int, threshold: float) -> Tensor:
    """The best always, then every one that is not below the threshold."""
    while (x[s:e] == MASK).any():
        logits = model(x)
        at = {i: scored(logits[i]) for i in range(s, e) if x[i] == MASK}
        ranked = sorted(at, key=lambda i: -at[i][1])
        for n, i in enumerate(ranked):
            if n > 0 and at[i][1] < threshold:
                break
            x[i] = at[i][0]
    return x


def fast_dllm_factor(model: Model, x: Tensor, s: int, e: int, factor: float) -> Tensor:
    """The largest n with (n + 1)(1 - c_(n)) < f, read as the first failure (the paper)."""
    while (x[s:e] == MASK).any():
        logits = model(x)
        at = {i: scored(logits[i]) for i in range(s, e) if x[i] == MASK}
        for n, i in enumerate(sorted(at, key=lambda i: -at[i][1]), 1):
            if n > 1 and (n + 1) * (1 - at[i][1]) > factor:
                break
            x[i] = at[i][0]
    return x


def dinfer(model: Model, x: Tensor, s: int, e: int, threshold: float) -> Tensor:
    """The threshold clamped to just under the best."""
    while (x[s:e] == MASK).any():
        logits = model(x)
        at = {i: scored(logits[i]) for i in range(s, e) if x[i] == MASK}
        clamped = min(max(max(c for _, c in at.values()) - 1e-5, -1000), threshold)
        for i, (token, c) in at.items():
            if c >= clamped:
                x[i] = token
    return x


def dparallel(model: Model, x: Tensor, s: int, e: int, threshold: float) -> Tensor:
    """Entropies up to the threshold, and the lowest."""
    while (x[s:e] == MASK).any():
        logits = model(x)
        at = {i: scored(logits[i], "entropy") for i in range(s, e) if x[i] == MASK}
        lowest = min(at, key=lambda i: at[i][1])
        for i, (token, h) in at.items():
            if h <= threshold or i == lowest:
                x[i] = token
    return x


def sdar(model: Model, x: Tensor, s: int, e: int, threshold: float, k: int) -> Tensor:
    """Those above the threshold if they are k or more, else the k best."""
    while (x[s:e] == MASK).any():
        logits = model(x)
        at = {i: scored(logits[i]) for i in range(s, e) if x[i] == MASK}
        chosen = [i for i in at if at[i][1] > threshold]
        if len(chosen) < k:
            chosen = sorted(at, key=lambda i: -at[i][1])[:k]
        for i in chosen:
            x[i] = at[i][0]
    return x


@pytest.mark.parametrize(
    ("loop", "arguments", "ours"),
    [
        (llada, ("probability", [2, 2, 2, 1, 1]), dict(rule="top_k", k=[2, 2, 2, 1, 1])),
        (llada, ("margin", [3, 3, 2]), dict(rule="top_k", k=[3, 3, 2], confidence="margin")),
        (fast_dllm, (0.6,), dict(rule="threshold", threshold=0.6)),
        (fast_dllm_factor, (1.0,), dict(rule="factor", factor=1.0)),
        (dinfer, (0.6,), dict(rule="threshold", threshold=0.6, slack=1e-5)),
        (dparallel, (0.7,), dict(rule="entropy", threshold=0.7)),
        (dparallel, (0.0,), dict(rule="top_k", k=[1] * 8, confidence="neg_entropy")),  # LRD
        (sdar, (0.8, 2), dict(rule="threshold", threshold=0.8, strict=True, min_commit=2)),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_published_decoders(loop: Any, arguments: Any, ours: dict[str, Any], backend: str) -> None:
    """Block by block (8 rows), a prompt before, a batch of two with one finished early."""
    model = Model(20)
    start = torch.cat([torch.randint(0, MASK, (2, 4)), torch.full((2, 16), MASK)], 1)
    start[1, 12:] = 3
    want = torch.stack([x.clone() for x in start])
    for b in range(2):
        for s in (4, 12):
            if (want[b, s : s + 8] == MASK).any():
                loop(model, want[b], s, s + 8, *arguments)

    x, schedule = start.clone(), ours.get("k")
    for s in (4, 12):
        for step in range(8 if schedule is None else len(schedule)):
            numbers = dict(ours) if schedule is None else dict(ours, k=schedule[step])
            done = pydecode.unmask(
                x, model(x), mask_id=MASK, window=(s, 8), backend=backend, **numbers
            )
            x = done.tokens
        assert done.num_left.tolist() == [0, 0]
    assert torch.equal(x, want)


@pytest.mark.parametrize("rule", [
    "top_k", "threshold", "factor", "entropy", "entropy_bound", "prefix", "sequential",
    "segments", "external",
])  # fmt: skip
def test_every_loop_ends(rule: str, backend: str) -> None:
    """Peers never finish where the argmax is the mask, or nothing passes a threshold."""
    model = Model(10, mask_logit=1e4)
    x = torch.full((3, 10), MASK)
    x[1, ::2], x[2] = 0, 0
    numbers = dict(k=0, threshold=1e3, factor=0.0, low=1e3)
    if rule.startswith("entropy"):
        numbers["threshold"] = -1.0
    for _ in range(10):
        left = (x == MASK).sum(-1)
        done = pydecode.unmask(
            x,
            model(x),
            mask_id=MASK,
            rule=rule,
            external_score=torch.rand(3, 10),
            temperature=1.0,
            backend=backend,
            **numbers,
        )
        assert torch.equal(done.num_committed, left.clamp(max=1).int())
        x = done.tokens
    assert not (x == MASK).any()


@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel"])
@pytest.mark.parametrize("seeds", ["scalar", "one each"])
def test_positions_and_requests_are_independent(sampler: str, seeds: str, backend: str) -> None:
    """Four uniform draws are a permutation with probability 4!/4^4 = 0.09375 (ALGORITHMS #2)."""
    N = 20000
    seed = 2026 if seeds == "scalar" else torch.arange(N) * 7919 + 13
    done = pydecode.unmask(
        torch.full((N, 4), 4),
        torch.zeros(1, 1, 5).expand(N, 4, 5),
        mask_id=4,
        k=4,
        temperature=1.0,
        sampler=sampler,
        seed=seed,
        backend=backend,
    )
    assert done.committed.all()
    valid = (done.tokens.sort(-1).values == torch.arange(4)).all(-1).double().mean()
    sigma = math.sqrt(0.09375 * 0.90625 / N)
    assert abs(valid - 0.09375) < 4 * sigma
    # neighbours in the batch, and the same row at the next offset, are independent too
    pairs = done.tokens[:-1, 0] * 4 + done.tokens[1:, 0]
    assert stats.chisquare(torch.bincount(pairs, minlength=16)).pvalue > 1e-4


def test_draws_repeat_unless_the_offset_moves(backend: str) -> None:
    """The negative control of the docstring's warning."""
    given = dict(mask_id=8, k=64, temperature=1.0, seed=5, backend=backend)
    tokens, logits = torch.full((1, 64), 8), torch.zeros(1, 64, 9)
    one = pydecode.unmask(tokens, logits, **given).tokens
    assert torch.equal(one, pydecode.unmask(tokens, logits, **given).tokens)
    assert not torch.equal(one, pydecode.unmask(tokens, logits, offset=1, **given).tokens)


def test_posterior_commits_binomially(backend: str) -> None:
    """Each of 12 masked rows stays with probability ``keep``, whatever the sampler draws."""
    N, keep = 4000, 0.35
    done = pydecode.unmask(
        torch.full((N, 12), 4),
        torch.zeros(1, 1, 5).expand(N, 12, 5),
        mask_id=4,
        rule="posterior",
        keep=keep,
        temperature=1.0,
        seed=77,
        backend=backend,
    )
    seen = torch.bincount(done.num_committed, minlength=13).double()
    law = torch.from_numpy(stats.binom(12, 1 - keep).pmf(range(13))) * N
    seen = torch.cat([seen[:4].sum()[None], seen[4:]])
    law = torch.cat([law[:4].sum()[None], law[4:]])
    assert stats.chisquare(seen, law).pvalue > 1e-4
    # the coin and the token come from two streams
    table = torch.zeros(4, 2)
    first = torch.where(
        done.committed[:, 0],
        done.tokens[:, 0],
        pydecode.unmask(
            torch.full((N, 12), 4),
            torch.zeros(1, 1, 5).expand(N, 12, 5),
            mask_id=4,
            k=12,
            temperature=1.0,
            seed=77,
            backend=backend,
        ).tokens[:, 0],
    )
    for token in range(4):
        for coin in range(2):
            table[token, coin] = ((first == token) & (done.committed[:, 0] == coin)).sum()
    assert stats.chi2_contingency(table).pvalue > 1e-4
