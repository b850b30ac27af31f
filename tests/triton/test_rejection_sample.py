"""Chains in Triton, interpreted: the reference's decisions on random cases, exact laws, edges."""

import functools
from typing import Any

import laws_oracle
import pytest
import test_rejection_sample_laws as laws
import torch
from pydecode.triton_kernels import law_prepare
from pydecode.triton_kernels import rejection_sample as module
from torch import Tensor
from triton_cases import MORE, chance, one_of

import pydecode

RULES = ["token", "block"]
BELOW_ONE = 1 - 2**-24


def spoiled(x: Tensor) -> Tensor:
    """Some entries -inf, few +inf, fewer NaN."""
    r = torch.rand(x.shape)
    x = x.masked_fill(r < 0.02, -torch.inf).masked_fill(r > 0.999, torch.inf)
    return x.masked_fill((r > 0.9985) & (r < 0.999), torch.nan)


def random_case(rule: str, B: int = 10) -> tuple[tuple[Any, ...], dict[str, Any]]:
    V = one_of(1, 2, 3, 6, 40, 127, 5003)
    B, G = (2, 2) if V > 1000 else (B, one_of(0, 1, 2, 3, 5))
    target, draft = torch.randn(B, G + 1, V) * 2, torch.randn(B, G, V)
    draft = draft * 0.7 + target[:, :G]
    kwargs: dict[str, Any] = dict(rule=rule, return_logprobs=True, return_num_passed=True)
    ids = torch.arange(V)
    if V > 3 and chance(0.3):  # a reduced vocabulary, ascending or not
        ids = torch.randperm(V)[: V // 2]
        ids = ids.sort().values if chance(0.6) else ids
        draft, kwargs["draft_vocab"] = draft[..., ids], ids
    drawn = draft.softmax(-1).flatten(0, 1).multinomial(1).view(B, G) if G else ids.new_empty(B, 0)
    tokens = torch.where(torch.rand(B, G) < 0.05, torch.randint(-2, V + 2, (B, G)), ids[drawn])

    kwargs["temperature"] = one_of(1.0, 0.7, 0.0, (torch.rand(B) * 1.5).round(decimals=1))
    if chance(0.4):
        kwargs["top_k"] = one_of(3, torch.randint(0, V + 2, (B,)))
    if chance(0.4):
        kwargs["top_p"] = one_of(0.8, torch.rand(B) * 1.2)
    if chance(0.4):
        kwargs["min_p"] = one_of(0.05, torch.rand(B) * 0.2)
    if chance(0.3):
        kwargs["num_drafts"] = torch.randint(0, G + 1, (B,))
    if chance(0.3):
        words = (B, G + 1, -(-V // 32))
        kwargs["allowed"] = torch.randint(-(2**31), 2**31 - 1, words).int()
    kwargs["seed"] = one_of(2**40 + 3, torch.randint(-(2**60), 2**60, (B,)))
    kwargs["offset"], kwargs["positions"] = 2**35 + 1, one_of(7, torch.randint(10**6, (B,)))
    if chance(0.4):
        u = torch.rand(B, G + 1)
        u = torch.where(torch.rand(B, G + 1) < 0.1, 0.0, u)
        kwargs["uniforms"] = torch.where(torch.rand(B, G + 1) < 0.1, BELOW_ONE, u)

    dtype = one_of(torch.bfloat16, torch.float16, torch.float32)
    target, draft = spoiled(target).to(dtype), spoiled(draft).to(dtype)
    probs = chance(0.2)
    if probs:  # which need not sum to 1
        target = 1.1 * target.float().softmax(-1)
    if chance(0.3):
        n = B * (G + 1)
        order = torch.randperm(n)
        target = target.reshape(n, V)[order]
        index = order.argsort().int().view(B, G + 1)
        index = torch.where(torch.rand(B, G + 1) < 0.04, -1, index)
        kwargs["row_index"] = torch.where(torch.rand(B, G + 1) < 0.01, n + 5, index)
    if probs:
        kwargs["target_probs"] = target
    if chance(0.2):
        kwargs.pop("draft_vocab", None)
        return (None if probs else target, tokens, None), kwargs
    kwargs["filter_draft"] = chance(0.7)
    kwargs["draft_temperature"] = one_of(None, 0.5, 1.3, 0.0)
    if chance(0.3):
        kwargs["draft_probs"], draft = 0.9 * draft.float().softmax(-1), None
    return (None if probs else target, tokens, draft), kwargs


def undecidable(args: Any, kwargs: dict[str, Any], b: int, got: Tensor) -> bool:
    """Whether moving the logits by a rounding makes the reference decide request b as we did."""
    kwargs = dict(kwargs, backend="reference")
    for _ in range(60):
        moved = [
            x.double() * (1 + 2**-21 * torch.randn(x.shape, dtype=torch.float64))
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in args
        ]
        out, _passed = pydecode.rejection_sample(*moved, **kwargs)
        if torch.equal(out.tokens[b], got):
            return True
    return False


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("turn", range(8 * MORE))
def test_decides_as_the_reference(turn: int, rule: str) -> None:
    args, kwargs = random_case(rule)
    want, passed = pydecode.rejection_sample(*args, **kwargs, backend="reference")
    got, also_passed = pydecode.rejection_sample(*args, **kwargs, backend="triton")
    same = (got.tokens == want.tokens).all(-1)
    for b in (~same).nonzero()[:, 0].tolist():
        assert undecidable(args, kwargs, b, got.tokens[b]), (b, want.tokens[b], got.tokens[b])
    assert (~same).sum() <= 1
    assert torch.equal(got.num_accepted[same], want.num_accepted[same])
    assert torch.equal(got.path[same], want.path[same])
    assert torch.equal(also_passed[same], passed[same])
    torch.testing.assert_close(
        got.logprobs[same], want.logprobs[same].float(), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize(("rule", "vocab", "depth"), [("token", 3, 1), ("block", 2, 2)])
def test_exact_law(rule: str, vocab: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft and every cell of the coins, in fp32 and so with its own edges."""

    class Narrow:
        @staticmethod
        def rejection_sample(*args: Any, **kwargs: Any) -> pydecode.Verified:
            def narrow(x: Any) -> Any:
                return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

            given = {name: narrow(x) for name, x in kwargs.items()}
            return pydecode.rejection_sample(*map(narrow, args), **given)

    monkeypatch.setattr(laws, "pydecode", Narrow)
    cells = functools.partial(laws_oracle.cells, edge=2e-6)
    monkeypatch.setattr(laws_oracle, "cells", cells)
    P, Q = laws_oracle.random_law(0, vocab), laws_oracle.random_law(1, vocab)
    chains = laws_oracle.all_chains(Q, vocab, depth)
    law, accepted = laws_oracle.emitted_law(P, Q, chains, vocab, rule, laws.op(rule, "triton"))
    assert laws_oracle.distance(law, laws_oracle.joint(P, vocab, depth + 1)) < 1e-12
    expected = laws_oracle.expected_accepted(P, Q, vocab, depth, rule)
    assert abs(accepted - expected) < 1e-12


@pytest.mark.parametrize("V", [4097, 128256])
@pytest.mark.parametrize("rule", RULES)
def test_long_rows(rule: str, V: int) -> None:
    """Chunks that several programs share, in a padded vocabulary of odd stride."""
    target = (torch.randn(1, 3, V + 3) * 3)[..., :V].bfloat16()
    draft = target[:, :2].float() + 0.3 * torch.randn(1, 2, V)
    tokens = draft.softmax(-1)[0].multinomial(1).view(1, 2)
    args = (target, tokens, draft)
    kwargs: dict[str, Any] = dict(rule=rule, seed=11, return_num_passed=True, return_logprobs=True)
    want, _ = pydecode.rejection_sample(*args, **kwargs, backend="reference")
    got, _ = pydecode.rejection_sample(*args, **kwargs, backend="triton")
    same = torch.equal(got.tokens, want.tokens)
    assert same or undecidable(args, kwargs, 0, got.tokens[0])
    if same:
        torch.testing.assert_close(got.logprobs, want.logprobs.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_request_alone_and_in_any_batch(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, whatever number of programs share a row."""
    target, draft = torch.randn(4, 3, 9001), torch.randn(4, 2, 9001)
    tokens, seeds = torch.randint(9001, (4, 2)), torch.arange(4)
    given: dict[str, Any] = dict(rule=rule, top_p=0.9, return_logprobs=True, backend="triton")
    many = pydecode.rejection_sample(target, tokens, draft, seed=seeds, **given)
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(law_prepare, "chunks_a_program", lambda *_: 2)
    for b in (0, 3):
        one = slice(b, b + 1)
        alone = pydecode.rejection_sample(
            target[one], tokens[one], draft[one], seed=seeds[one], **given
        )
        for x, y in zip(alone, many):
            assert torch.equal(x, y[one])


def test_rows_after_the_count_are_not_read() -> None:
    """NaN there, and in rows past the chain's end, leaves the request decided."""
    target, draft = torch.randn(2, 4, 50), torch.randn(2, 3, 50)
    target[:, 2:], draft[:, 1:] = torch.nan, torch.nan
    tokens, count = torch.randint(50, (2, 3)), torch.tensor([1, 1])
    for rule in RULES:
        given: dict[str, Any] = dict(num_drafts=count, rule=rule, seed=3)
        got = pydecode.rejection_sample(target, tokens, draft, **given, backend="triton")
        want = pydecode.rejection_sample(target, tokens, draft, **given, backend="reference")
        assert (got.tokens[:, 0] >= 0).all()
        assert torch.equal(got.tokens, want.tokens)


def test_empty_batches() -> None:
    for B, G in ((0, 3), (3, 0)):
        out = pydecode.rejection_sample(
            torch.randn(B, G + 1, 7), torch.zeros(B, G, dtype=torch.int64), backend="triton"
        )
        assert out.tokens.shape == (B, G + 1)
        assert (out.num_accepted == 0).all()


def test_draws_at_the_edge_of_acceptance() -> None:
    """u q = p accepts nothing, the next smaller u does; p = 0 is not accepted at u = 0."""
    target = torch.tensor([[[0.25, 0.75, 0.0]]]).expand(3, 2, 3)
    draft = torch.tensor([[[0.5, 0.25, 0.25]]]).expand(3, 1, 3)
    tokens = torch.tensor([[0], [0], [2]])
    uniforms = torch.tensor([[0.5, 0.0], [0.5 - 2**-24, 0.0], [0.0, 0.0]])
    for rule in RULES:
        out = pydecode.rejection_sample(
            None,
            tokens,
            target_probs=target,
            draft_probs=draft,
            uniforms=uniforms,
            rule=rule,
            backend="triton",
        )
        assert out.num_accepted.tolist() == [0, 1, 0]
        assert out.tokens[0].tolist() == [1, -1]


def test_the_last_token_that_top_k_keeps() -> None:
    """Of k = 2 the second largest passes at u = 0, and the third does not."""
    target = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]).expand(2, 2, 4)
    out = pydecode.rejection_sample(
        target, torch.tensor([[1], [2]]), top_k=2, uniforms=torch.zeros(2, 2), backend="triton"
    )
    assert out.num_accepted.tolist() == [1, 0]
