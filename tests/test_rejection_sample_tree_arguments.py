"""rejection_sample_tree's arguments: masks, temperature 0, thresholds, sizes, and its errors."""

from typing import Any

import pytest
import torch
from sure_tree import PARENTS, RULES, TOKENS, outcome, run, sure_target

import pydecode

NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("rule", RULES)
def test_allowed_acts_like_minus_inf(rule: str, backend: str) -> None:
    B, T, V = 30, 5, 40
    logits, q = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.rand(B, T, V) < 0.5
    bits = torch.zeros(B, T, 2, dtype=torch.int64)
    for v in range(V):
        bits[..., v // 32] |= mask[..., v].long() << (v % 32)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).int()
    common = dict(
        tokens=torch.randint(0, V, (B, T)),
        draft_logits=q if rule != "target_only" else None,
        rule=rule,
        uniforms=torch.rand(B, T + 1),
        return_logprobs=True,
        backend=backend,
    )
    want = run(logits.masked_fill(~mask, -INF), **common)
    for x, y in zip(run(logits, allowed=bits, **common), want):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_greedy_requests_among_others(rule: str, backend: str) -> None:
    """The first child that is the argmax, whatever the rule, q and the coins; ties: the lowest."""
    B = 64
    logits = torch.randint(0, 3, (B, 5, 4)).float()
    tokens = torch.randint(0, 4, (B, 5))
    out = run(
        logits,
        tokens=tokens,
        draft_logits=torch.randn(B, 5, 4) if rule != "target_only" else None,
        rule=rule,
        temperature=torch.arange(B) % 2,
        threshold_single=0.0,
        uniforms=torch.where(torch.arange(B)[:, None] % 2 == 0, NAN, torch.rand(B, 6)),
        backend=backend,
    )
    for b in range(0, B, 2):
        node, path, emitted = 0, [0], []
        while True:
            best = logits[b, node].tolist().index(max(logits[b, node].tolist()))
            emitted.append(best)
            below = [c for c in range(1, 5) if PARENTS[0, c] == node and tokens[b, c] == best]
            if not below:
                break
            node = below[0]
            path.append(node)
        assert outcome(out, b) == (emitted, path)


def test_target_only_thresholds_and_its_one_coin(backend: str) -> None:
    probs = torch.tensor([0.0, 0.2, 0.5, 0.3]).log().expand(1, 5, 4)
    u = torch.full((1, 6), NAN)  # only the coins of walked nodes and the last one are read
    u[0, 5] = 0.0

    def path(coin: float, tokens: list[int], **thresholds: float) -> list[int]:
        u[0, 0], u[0, 1], u[0, 2] = coin, 0.999, 0.999
        common = dict(uniforms=u, rule="target_only", backend=backend, **thresholds)
        return outcome(run(probs, tokens=torch.tensor([tokens]), **common))[1]

    assert path(0.19, [0, 1, 2, 0, 0]) == [0, 1]
    assert path(0.21, [0, 1, 2, 0, 0]) == [0, 2]
    assert path(0.71, [0, 1, 2, 0, 0]) == [0]
    assert path(0.21, [0, 1, 1, 0, 0]) == [0]  # the second copy adds nothing
    assert path(0.0, [0, 0, 0, 0, 0]) == [0]  # a coin of 0 accepts no impossible token
    assert path(0.0, [0, 0, 2, 0, 0]) == [0, 2]
    assert path(0.71, [0, 1, 2, 0, 0], threshold_acc=0.9) == [0, 2]
    assert path(0.99, [0, 1, 2, 0, 0], threshold_single=0.4) == [0, 2]
    assert path(0.99, [0, 1, 2, 0, 0], threshold_acc=0.0) == [0, 1]
    probs = sure_target().exp().double()
    probs[0, 0] = torch.tensor([0, 0.1, 0.3, 0.6])  # fp64 reads 0.3 as fp64, not as fp32's 0.3
    for threshold, want in ((0.3, [0, 2, 4]), (0.3 + 1e-9, [0])):
        law: dict[str, Any] = dict(target_probs=probs, rule="target_only", backend=backend)
        law |= dict(uniforms=torch.full((1, 6), 0.99), threshold_single=threshold)
        assert outcome(pydecode.rejection_sample_tree(None, TOKENS, PARENTS, **law))[1] == want


@pytest.mark.parametrize("rule", RULES)
def test_sizes_of_one_and_none(rule: str, backend: str) -> None:
    q = None if rule == "target_only" else torch.zeros(1, 1, 4)
    alone = dict(tokens=TOKENS[:, :1], parents=PARENTS[:, :1], rule=rule, backend=backend)
    assert outcome(run(sure_target()[:, :1], draft_logits=q, **alone)) == ([2], [0])
    q = None if rule == "target_only" else torch.zeros(0, 5, 4)
    out = run(torch.zeros(0, 5, 4), tokens=TOKENS[:0], draft_logits=q, rule=rule, backend=backend)
    assert [x.shape for x in out[:3]] == [(0, 5), (0,), (0, 5)]
    one = torch.zeros(1, 5, 1)  # V = 1
    q = None if rule == "target_only" else one
    out = run(one, tokens=TOKENS * 0, draft_logits=q, rule=rule, max_depth=7, backend=backend)
    assert outcome(out) == ([0, 0, 0], [0, 1, 3])
    assert out.tokens.shape == (1, 8)


ERRORS = {
    "rule": (dict(rule="best"), ValueError, "rule: expected one of recursive, "),
    "parents": (
        dict(parents=PARENTS[0]),
        ValueError,
        r"parents: expected 2 dimensions \[B\|1, T\]",
    ),
    "parents T": (dict(parents=PARENTS[:, 1:]), ValueError, "parents: expected shape"),
    "max_depth": (dict(max_depth=-1), ValueError, "max_depth: expected at least 0"),
    "max_depth tensor": (dict(max_depth=torch.tensor(2)), TypeError, "max_depth: expected an int"),
    "both laws": (dict(draft_probs=torch.zeros(1, 5, 4)), ValueError, "draft_logits, draft_probs"),
    "draft rows": (dict(draft_logits=torch.zeros(1, 4, 4)), ValueError, "draft_logits: expected"),
    "uniforms": (
        dict(uniforms=torch.rand(1, 5)),
        ValueError,
        r"uniforms: expected shape \[B, T\+1\]",
    ),
    "threshold": (dict(threshold_acc="a"), TypeError, "threshold_acc: expected a number"),
    "threshold tensor": (dict(threshold_single=torch.ones(())), TypeError, "threshold_single: exp"),
    "targets": (dict(target_probs=torch.ones(1, 5, 4)), ValueError, "target_logits, target_probs"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    kwargs, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        run(**kwargs)


def test_checks_name_the_offending_index() -> None:
    with pydecode.checks(True):
        run()
        run(tokens=TOKENS * torch.tensor([[9, 1, 1, 1, 1]]))  # the root's id is not read
        late = torch.tensor([[-1, 0, 0, 4, 2]])
        run(parents=late, num_drafts=2)  # nodes past num_drafts are not checked
        with pytest.raises(ValueError, match=r"parents: .* got 4 at index \[0, 3\]"):
            run(parents=late)
        with pytest.raises(ValueError, match=r"parents: .* got -1 at index \[0, 2\]"):
            run(parents=torch.tensor([[-1, 0, -1, 1, 1]]))
        with pytest.raises(ValueError, match=r"draft_tokens: .* got 4 at index \[0, 4\]"):
            run(tokens=torch.tensor([[0, 1, 2, 3, 4]]))
