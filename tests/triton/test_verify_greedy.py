"""Greedy verification in Triton, interpreted: the reference's verdicts on chains and trees."""

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton_cases import MORE, chance, one_of

import pydecode


def parents_of(B: int, T: int) -> Tensor:
    """Random trees, now and then with a node that hangs on nothing, or on itself."""
    rows = [[-1, *(one_of(*range(i)) for i in range(1, T))] for _ in range(B)]
    parents = torch.tensor(rows)
    spoil = torch.rand(B, T) < 0.04
    return torch.where(spoil, torch.randint(-3, T + 2, (B, T)), parents)


def random_case(rule: str, B: int = 10) -> tuple[Tensor, Tensor, dict[str, Any]]:
    chain, V = chance(0.4), one_of(1, 2, 3, 6, 40, 127)
    N = one_of(*range(0 if chain else 1, 9))
    R = N + 1 if chain else N
    kwargs: dict[str, Any] = dict(rule=rule, first_match=chance(0.3))
    tokens = torch.randint(-1, V + 1, (B, N))
    x = torch.randn(B, R, V) * 2
    x = x.round() if chance(0.3) else x  # ties
    r = torch.rand(x.shape)
    x = x.masked_fill(r < 0.05, -torch.inf).masked_fill(r > 0.995, torch.inf)
    x = x.masked_fill((r > 0.99) & (r < 0.993), torch.nan)
    target = x.to(one_of(torch.bfloat16, torch.float16, torch.float32))
    if rule in ("exact", "distance") and chance(0.4):
        target = x.argmax(-1)
        target = torch.where(torch.rand(B, R) < 0.05, -1, target)
    elif chance(0.3):
        kwargs["allowed"] = torch.randint(-(2**31), 2**31 - 1, (B, R, -(-V // 32))).int()
    if rule == "top_k":
        kwargs["top_k"] = one_of(1, 2, torch.randint(0, V + 2, (B,)))
    if rule == "distance":
        kwargs["distance"] = 1
    if rule == "typical":
        kwargs["temperature"] = one_of(1.0, 0.0, torch.rand(B).round(decimals=1))
        kwargs["posterior_threshold"] = 0.2
    if not chain:
        kwargs["parents"] = parents_of(one_of(1, B), N)
        if chance(0.3):
            kwargs["max_depth"] = one_of(*range(N))
    if chance(0.3):
        kwargs["num_drafts"] = torch.randint(0, N + 1 if chain else N, (B,))
    if chance(0.3):
        n = B * R
        order = torch.randperm(n)
        target = target.reshape(n, *target.shape[2:])[order]
        index = torch.where(torch.rand(n) < 0.04, -1, order.argsort())
        index = torch.where(torch.rand(n) < 0.01, n + 5, index)
        kwargs["row_index"] = index.int().view(B, R)
    return tokens, target, kwargs


@pytest.mark.parametrize("rule", ["exact", "top_k", "distance", "typical"])
@pytest.mark.parametrize("turn", range(4 * MORE))
def test_decides_as_the_reference(turn: int, rule: str) -> None:
    tokens, target, kwargs = random_case(rule)
    want = pydecode.verify_greedy(tokens, target, **kwargs, backend="reference")
    got = pydecode.verify_greedy(tokens, target, **kwargs, backend="triton")
    for x, y in zip(got[:3], want[:3]):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_top_k_at_its_limits() -> None:
    """Beside +inf nothing passes, however large k; a k below 1 is 1; k >= V: all but -inf do."""
    inf = torch.inf
    target = torch.tensor([[1.0, inf, 0], [3, 2, 1], [3, -inf, 1]])[:, None].repeat(1, 2, 1)
    for token, want in ((0, [0, 1, 1]), (1, [1, 0, 0]), (2, [0, 0, 1])):
        tokens = torch.full((3, 1), token)
        for backend in ("reference", "triton"):
            got = pydecode.verify_greedy(
                tokens, target, rule="top_k", top_k=torch.tensor([5, -1, 3]), backend=backend
            )
            assert got.num_accepted.tolist() == want


@pytest.mark.parametrize("rule", ["exact", "top_k", "typical"])
def test_few_chunks_at_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many nodes and a large vocabulary: the chunks' numbers are read in several turns."""
    from pydecode.triton_kernels import law_vectors

    monkeypatch.setattr(law_vectors, "TILE", tl.constexpr(64))  # one chunk of each node
    target = torch.randn(2, 4, 13001)
    target[1, 2, 9000] = torch.nan
    tokens = target.nan_to_num(-9).argmax(-1)[:, :3]
    given: dict[str, Any] = dict(rule=rule, top_k=5, posterior_threshold=1e-5)
    want = pydecode.verify_greedy(tokens, target, **given, backend="reference")
    got = pydecode.verify_greedy(tokens, target, **given, backend="triton")
    assert torch.equal(got.tokens, want.tokens)
    assert got.num_accepted.tolist() == [3, 0]


@pytest.mark.parametrize("T", [65, 300])
def test_larger_trees(T: int) -> None:
    """Whose siblings are compared in several turns."""
    V = 6
    parents = torch.arange(T)[None] // 3 - 1
    parents[0, 0] = -1
    parents[0, 1:3] = 0
    target = torch.randn(1, T, V)
    best = target.argmax(-1)
    tokens = best.gather(1, parents.clamp(min=0))
    tokens = torch.where(torch.rand(1, T) < 0.4, torch.randint(V, (1, T)), tokens)
    for first_match in (False, True):
        given: dict[str, Any] = dict(parents=parents, first_match=first_match)
        want = pydecode.verify_greedy(tokens, target, **given, backend="reference")
        got = pydecode.verify_greedy(tokens, target, **given, backend="triton")
        assert torch.equal(got.path, want.path)
        assert torch.equal(got.tokens, want.tokens)


def test_a_long_row() -> None:
    target, tokens = torch.randn(1, 3, 9001), torch.randint(9001, (1, 2))
    best = target.argmax(-1)
    tokens = best[:, :2]
    for rule in ("exact", "top_k", "typical"):
        given: dict[str, Any] = dict(rule=rule, top_k=5, posterior_threshold=1e-5)
        want = pydecode.verify_greedy(tokens, target, **given, backend="reference")
        got = pydecode.verify_greedy(tokens, target, **given, backend="triton")
        assert torch.equal(got.tokens, want.tokens)
        assert int(got.num_accepted) == 2


def test_more_nodes_than_a_program_holds() -> None:
    T = 1025
    with pytest.raises(pydecode.BackendUnavailable, match=r"up to 1024 nodes.* got 1025"):
        pydecode.verify_greedy(
            torch.zeros(1, T, dtype=torch.int64),
            torch.zeros(1, T, dtype=torch.int64),
            parents=torch.arange(T)[None] - 1,
            backend="triton",
        )
