"""``verify_greedy`` against plain Python loops over random chains and trees, under every rule."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import Verified

RULES: dict[str, dict[str, Any]] = {
    "exact": {},
    "top_k": dict(top_k=2),
    "distance": dict(distance=1),
    "typical": dict(posterior_threshold=0.25, posterior_alpha=0.4, temperature=0.8),
}
INF = float("inf")
F64 = torch.float64


def passes(row: list[float], token: int, rule: str, numbers: dict[str, Any]) -> tuple[bool, float]:
    """Whether a token passes the test of its parent's row, and its log-probability."""
    best = row.index(max(row))
    if not 0 <= token < len(row):
        return False, 0.0
    if rule == "top_k":
        return row[token] >= sorted(row, reverse=True)[min(numbers["top_k"], len(row)) - 1], 0.0
    if rule == "distance":
        return abs(token - best) <= numbers["distance"], 0.0
    if rule == "typical" and numbers["temperature"] > 0:
        e = [math.exp((x - max(row)) / numbers["temperature"]) for x in row]
        p = [x / sum(e) for x in e]
        H = -sum(x * math.log(x + 1e-5) for x in p)
        edge = min(numbers["posterior_threshold"], numbers["posterior_alpha"] * math.exp(-H))
        return p[token] > edge, math.log(p[token]) if p[token] > 0 else -INF
    return token == best, 0.0


def walk(
    tokens: list[int],
    rows: list[list[float]],
    parents: list[int],
    count: int,
    max_depth: int,
    rule: str,
    numbers: dict[str, Any],
    first_match: bool = False,
) -> tuple[list[int], list[int]]:
    """Emitted tokens and path of one request whose rows are all good."""
    left = set()  # nodes whose first child that passes has come
    found = {0: (0, 0.0, [0])}  # node -> depth, sum of log p, path
    for n in range(1, min(count + 1, len(tokens))):
        if not 0 <= parents[n] < n or parents[n] not in found:
            continue
        depth, score, path = found[parents[n]]
        good, logp = passes(rows[parents[n]], tokens[n], rule, numbers)
        if first_match and parents[n] in left:
            continue
        left |= {parents[n]} if good else set()
        if good and depth < max_depth:
            found[n] = (depth + 1, score + logp, [*path, n])
    leaf = max(found, key=lambda n: (found[n][0], found[n][1], -n))
    path = found[leaf][2]
    last = rows[leaf].index(max(rows[leaf]))
    return [*(tokens[n] for n in path[1:]), last], path


def check(out: Verified, want: list[tuple[list[int], list[int]]], width: int) -> None:
    assert out.logprobs is None
    assert (out.tokens.dtype, out.num_accepted.dtype) == (torch.int64, torch.int32)
    assert out.path.dtype == torch.int32
    for b, (tokens, path) in enumerate(want):
        assert out.tokens[b].tolist() == tokens + [-1] * (width - len(tokens)), b
        assert out.path[b].tolist() == path + [-1] * (width - len(path)), b
        assert int(out.num_accepted[b]) == max(len(path) - 1, 0), b


def emitted_by(out: Verified, b: int) -> tuple[list[int], list[int]]:
    n = int(out.num_accepted[b]) + 1
    return out.tokens[b, :n].tolist(), out.path[b, :n].tolist()


def random_parents(B: int, T: int) -> Tensor:
    """Some invalid ones among them: a node that is its own, a second root, one out of range."""
    parents = (torch.rand(B, T) * torch.arange(T)).long()
    parents[:, 0] = -1
    for value in (torch.arange(T), torch.tensor(-1), torch.tensor(-9), torch.tensor(T + 5)):
        parents[:, 1:] = torch.where(torch.rand(B, T) < 0.03, value, parents)[:, 1:]
    return parents


def agreeing(logits: Tensor, parents: Tensor) -> Tensor:
    """Tokens that are often their parent's argmax, sometimes out of the vocabulary."""
    B, T, V = logits.shape
    best = logits.argmax(-1).gather(1, parents.clamp(0, T - 1))
    tokens = torch.where(torch.rand(B, T) < 0.6, best, torch.randint(0, V, (B, T)))
    return torch.where(
        torch.rand(B, T) < 0.03, torch.tensor([-1, V])[torch.randint(2, (B, T))], tokens
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("T", "max_depth"), [(1, None), (2, None), (9, None), (24, 3), (7, 0), (5, 9)]
)
def test_trees(rule: str, T: int, max_depth: int | None, backend: str) -> None:
    B, V = 60, 6
    # ties in a row; each row has its own scale, so that no two paths are equally likely by chance
    logits = torch.randint(0, 5, (B, T, V)) * (0.5 + torch.rand(B, T, 1, dtype=F64))
    parents = random_parents(B, T)
    tokens, count = agreeing(logits, parents), torch.randint(0, T + 2, (B,))
    depth = T - 1 if max_depth is None else max_depth
    kwargs: dict[str, Any] = dict(max_depth=max_depth, rule=rule, backend=backend, **RULES[rule])
    out = pydecode.verify_greedy(tokens, logits, parents=parents, num_drafts=count, **kwargs)
    want = [
        walk(*(x[b].tolist() for x in (tokens, logits, parents, count)), depth, rule, RULES[rule])
        for b in range(B)
    ]
    check(out, want, depth + 1)
    shared = parents[:1].int()
    out = pydecode.verify_greedy(tokens.int(), logits, parents=shared, **kwargs)
    rows = [(tokens[b].tolist(), logits[b].tolist(), shared[0].tolist(), T) for b in range(B)]
    check(out, [walk(*r, depth, rule, RULES[rule]) for r in rows], depth + 1)


@pytest.mark.parametrize("rule", RULES)
def test_first_match(rule: str, backend: str) -> None:
    """Of a node's children only the first that passes counts, be the path below it shorter."""
    B, T, V = 150, 16, 4
    logits = torch.randint(0, 5, (B, T, V)) * (0.5 + torch.rand(B, T, 1, dtype=F64))
    parents, count = random_parents(B, T), torch.full((B,), T)
    tokens = agreeing(logits, parents)
    kwargs: dict[str, Any] = dict(rule=rule, backend=backend, **RULES[rule])
    rows = [[x[b].tolist() for x in (tokens, logits, parents, count)] for b in range(B)]
    want = [walk(*r, 5, rule, RULES[rule], True) for r in rows]
    call = dict(parents=parents, max_depth=5, **kwargs)
    check(pydecode.verify_greedy(tokens, logits, first_match=True, **call), want, 6)
    assert want != [walk(*r, 5, rule, RULES[rule]) for r in rows]


def test_first_match_does_not_read_what_it_does_not_enter(backend: str) -> None:
    tokens, parents = torch.tensor([[0, 5, 5, 6]]), torch.tensor([[-1, 0, 0, 2]])
    target = torch.tensor([[5, 7, -1, 8]])  # node 2, the second 5, has a bad row
    call = dict(parents=parents, backend=backend)
    got = pydecode.verify_greedy(tokens, target, first_match=True, **call)
    assert got.tokens.tolist() == [[5, 7, -1, -1]]
    assert pydecode.verify_greedy(tokens, target, **call).tokens.tolist() == [[-1] * 4]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_chains(rule: str, dtype: torch.dtype, backend: str) -> None:
    B, G, V = 80, 4, 8
    logits = torch.randint(0, 6, (B, G + 1, V)).to(dtype)
    chain = [list(range(-1, G))] * B
    tokens = agreeing(logits, torch.tensor(chain))[:, 1:]
    count = torch.randint(0, G + 1, (B,))
    out = pydecode.verify_greedy(
        tokens, logits, num_drafts=count, rule=rule, backend=backend, **RULES[rule]
    )
    rows = [([0, *tokens[b].tolist()], logits[b].tolist(), chain[b], count[b]) for b in range(B)]
    want = [walk(*r, G, rule, RULES[rule]) for r in rows]
    if rule == "typical" and dtype != F64:  # a decision may turn only within rounding
        for scale in (1 - 1e-5, 1 + 1e-5):
            near = RULES[rule] | {k: RULES[rule][k] * scale for k in RULES[rule] if "post" in k}
            same = [walk(*r, G, rule, near) == w for r, w in zip(rows, want)]
            assert sum(same) > 0.9 * B
            want = [w if s else emitted_by(out, b) for b, (w, s) in enumerate(zip(want, same))]
    check(out, want, G + 1)
    assert (out.num_accepted > 1).any()


def test_typical_takes_the_likelier_path_of_equal_depth(backend: str) -> None:
    p = torch.tensor([[0.3, 0.36, 0.34], [0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    logits = torch.cat([p, p[:1]]).log()[None]
    tree = dict(parents=torch.tensor([[-1, 0, 0, 1, 2]]), backend=backend)
    tokens = torch.tensor([[0, 1, 2, 0, 0]])  # 0.36 * 0.5 against 0.34 * 0.9
    typical = dict(rule="typical", posterior_threshold=0.05, **tree)
    assert pydecode.verify_greedy(tokens, logits, **typical).path.tolist() == [[0, 2, 4, -1, -1]]
    out = pydecode.verify_greedy(tokens, logits, rule="top_k", top_k=2, **tree)
    assert out.path.tolist() == [[0, 1, 3, -1, -1]]  # elsewhere the lowest index


def test_numbers_per_request(backend: str) -> None:
    B, T, V = 50, 8, 6
    logits, parents = torch.randn(B, T, V, dtype=F64), random_parents(B, T)
    tokens = agreeing(logits, parents)
    k, t = torch.randint(-1, 9, (B,)), torch.randint(0, 4, (B,)) / 2
    for rule, numbers in (("top_k", dict(top_k=k)), ("typical", dict(temperature=t))):
        out = pydecode.verify_greedy(
            tokens, logits, parents=parents, rule=rule, backend=backend, **numbers
        )
        own = [
            dict(top_k=max(int(k[b]), 1), temperature=float(t[b]))
            | dict(posterior_threshold=0.3, posterior_alpha=0.09)
            for b in range(B)
        ]
        rows = [[x[b].tolist() for x in (tokens, logits, parents)] for b in range(B)]
        check(out, [walk(*r, T, T - 1, rule, own[b]) for b, r in enumerate(rows)], T)


@pytest.mark.parametrize("rule", ["exact", "distance"])
def test_target_ids(rule: str, backend: str) -> None:
    B, T = 40, 9
    logits, parents = torch.randn(B, T, 5), random_parents(B, T)
    tokens, ids = agreeing(logits, parents), logits.argmax(-1)
    kwargs: dict[str, Any] = dict(parents=parents, rule=rule, backend=backend, **RULES[rule])
    want = pydecode.verify_greedy(tokens.where(tokens < 5, -1), logits, **kwargs)
    order = torch.randperm(B * T)
    index = order.argsort().reshape(B, T)
    tokens = tokens.where(tokens < 5, -1)
    for got in (
        pydecode.verify_greedy(tokens, ids.int(), **kwargs),
        pydecode.verify_greedy(tokens, ids.flatten()[order], row_index=index.int(), **kwargs),
        pydecode.verify_greedy(tokens, logits.flatten(0, 1)[order], row_index=index, **kwargs),
    ):
        assert all(torch.equal(x, y) for x, y in zip(got[:3], want[:3]))


@pytest.mark.parametrize("rule", RULES)
def test_grammar_is_minus_infinity(rule: str, backend: str) -> None:
    B, T, V = 40, 7, 37
    logits, parents = torch.randn(B, T, V).round(), random_parents(B, T)
    bits = torch.randint(-(2**31), 2**31, (B, T, 2), dtype=torch.int32)
    allowed = torch.stack([(bits[..., v // 32] >> (v % 32)) & 1 == 1 for v in range(V)], -1)
    masked = logits.masked_fill(~allowed, -INF)
    tokens = agreeing(masked, parents)
    kwargs: dict[str, Any] = dict(parents=parents, rule=rule, backend=backend, **RULES[rule])
    got = pydecode.verify_greedy(tokens, logits, allowed=bits, **kwargs)
    want = pydecode.verify_greedy(tokens, masked, **kwargs)
    assert all(torch.equal(x, y) for x, y in zip(got[:3], want[:3]))
    assert (want.num_accepted > 0).any()
    # fewer allowed than k: what is not allowed does not pass
    one = torch.zeros(1, 2, 4).masked_fill_(torch.arange(4) != 2, -INF)
    wide = pydecode.verify_greedy(torch.tensor([[1]]), one, rule="top_k", top_k=3, backend=backend)
    assert wide.tokens.tolist() == [[2, -1]]


def test_alone_and_in_any_batch(backend: str) -> None:
    B, T, V = 11, 9, 300
    logits, parents = torch.randn(B, T, V), random_parents(B, T)
    tokens = agreeing(logits, parents)

    def run(i: Tensor, rule: str) -> Verified:
        tree = dict(parents=parents[i], rule=rule, **RULES[rule])
        return pydecode.verify_greedy(tokens[i], logits[i], **tree, backend=backend)

    for rule in RULES:
        whole = run(torch.arange(B), rule)
        for i in (torch.randperm(B), *torch.arange(B)[:, None]):
            assert all(torch.equal(x, y[i]) for x, y in zip(run(i, rule)[:3], whole[:3]))
