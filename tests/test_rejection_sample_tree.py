"""rejection_sample_tree against a brute-force walk and the chain op, its draws and batches.

Laws: test_rejection_sample_tree_laws.py; bad data: test_rejection_sample_tree_edges.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tree_laws_oracle import Cell, Tree, cells, shape

import pydecode
from pydecode import philox

SAMPLED = ["recursive", "without_replacement", "k_seq", "traversal"]
SAMPLED += ["traversal_without_replacement"]
RULES = [*SAMPLED, "target_only"]


def random_parents(T: int, rng: np.random.Generator) -> list[int]:
    """Any order in which parents precede children, not only breadth first."""
    return [-1, *(int(rng.integers(0, i)) for i in range(1, T))]


def walk(tree: Tree, rule: str, u: np.ndarray) -> tuple[list[int], int]:
    """Path and last token that the coins lead to: the one cell that holds them."""

    def holds(cell: Cell) -> bool:
        return all(lo <= u[node] < hi for node, (lo, hi) in cell.coins.items())

    (cell,) = [c for c in cells(tree, rule) if holds(c)]
    path = [cell.last]
    while path[0] > 0:
        path.insert(0, tree.parents[path[0]])
    y = int((np.cumsum(cell.law) <= u[-1] * cell.law.sum()).sum())
    return path, y


def existing(parents: list[int], tokens: list[int], V: int, count: int, depth: int) -> list[int]:
    """The nodes that exist, in order."""
    levels = {0: 0}
    for i in range(1, count + 1):
        n = parents[i]
        if 0 <= n < i and n in levels and levels[n] < depth and 0 <= tokens[i] < V:
            levels[i] = levels[n] + 1
    return list(levels)


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_random_trees_by_brute_force(rule: str, with_q: bool, backend: str) -> None:
    """Ragged trees with bad ids and bad parents, each with its own shape."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    B, T, V, depth = 60, 8, 5, 3
    p, q = (rng.dirichlet([0.5] * V, (B, T)) * (rng.random((B, T, V)) < 0.8) for _ in range(2))
    p[..., 0] += 1e-3
    q[..., 1] += 1e-3
    p[::3] = q[::3] + 1e-3 * p[::3]  # nearly equal laws: a residual of 1e-3, which still counts
    p[1::3] = q[1::3] + 1e-8 * p[1::3]  # and one which to traversal is none
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    tokens = rng.integers(0, V, (B, T))
    parents = np.array([random_parents(T, rng) for _ in range(B)])
    tokens[rng.random((B, T)) < 0.05] = rng.choice([-1, V, 2**40])
    bad = rng.random((B, T)) < 0.05
    bad[:, 0] = False
    parents[bad] = rng.choice([-1, -7, T - 1, T, 2**40], int(bad.sum()))
    counts, u = rng.integers(0, T, B), rng.random((B, T + 1))
    out = pydecode.rejection_sample_tree(
        None,
        torch.tensor(tokens),
        torch.tensor(parents),
        torch.tensor(q) if with_q else None,
        target_probs=torch.tensor(p * 3),  # divided by their sum
        rule=rule,
        num_drafts=torch.tensor(counts),
        max_depth=depth,
        uniforms=torch.tensor(u),
        backend=backend,
    )
    for b in range(B):
        keep = existing(parents[b].tolist(), tokens[b].tolist(), V, counts[b], depth)
        small = Tree([-1, *(keep.index(parents[b, i]) for i in keep[1:])], tokens[b, keep], *laws())
        small.p, small.q = list(p[b, keep]), list(q[b, keep])
        oracle_rule = rule if with_q or rule == "target_only" else "delta"
        path, y = walk(small, oracle_rule, u[b, [*keep, T]])
        path = [keep[n] for n in path]
        blank = [-1] * (depth + 1 - len(path))
        assert out.path[b].tolist() == path + blank
        assert out.num_accepted[b] == len(path) - 1
        assert out.tokens[b].tolist() == [*tokens[b, path[1:]], y, *blank]


def laws() -> tuple[Any, Any]:
    return (lambda c: np.ones(1)), (lambda c: np.ones(1))


def chain_parents(G: int) -> Tensor:
    return torch.arange(-1, G)[None]


@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize(
    ("rule", "chain_rule"),
    [
        *[("recursive", "token"), ("without_replacement", "token"), ("k_seq", "token")],
        *[("traversal", "block"), ("traversal_without_replacement", "block")],
    ],
)
def test_a_chain_is_the_chain_op(rule: str, chain_rule: str, with_q: bool, backend: str) -> None:
    B, G, V, Vd = 200, 4, 40, 25
    logits, draft_logits = 2 * torch.randn(B, G + 1, V).double(), torch.randn(B, G, Vd).double()
    vocab = torch.randperm(V)[:Vd]
    drafts = vocab[torch.randint(0, Vd, (B, G))]
    logits[:, :G].scatter_add_(2, drafts[..., None], torch.full((B, G, 1), 4.0).double())
    drafts[::9, 2] = -3
    allowed = torch.randint(-(2**31), 2**31 - 1, (B, G + 1, 2)).int() | 7
    allowed[torch.rand(B) < 0.7] = -1
    temperature = torch.where(torch.arange(B) % 5 == 0, 0.0, 0.8)
    u = torch.rand(B, G + 1).double()
    u[::3, G] = 0.0  # a residual of rounding errors would show
    same: dict[str, Any] = dict(
        num_drafts=torch.randint(0, G + 1, (B,)),
        allowed=allowed,
        temperature=temperature,
        top_k=9,
        draft_temperature=1.3,
        filter_draft=False,
        return_logprobs=True,
        backend=backend,
    )
    q_chain, q_tree = None, None
    if with_q:
        same["draft_vocab"] = vocab
        q_chain = draft_logits
        q_tree = torch.cat([draft_logits, torch.full((B, 1, Vd), torch.nan)], 1)  # a leaf's: unread
    want = pydecode.rejection_sample(logits, drafts, q_chain, rule=chain_rule, uniforms=u, **same)
    got = pydecode.rejection_sample_tree(
        logits,
        torch.cat([torch.zeros(B, 1, dtype=torch.long), drafts], 1),
        chain_parents(G),
        draft_logits=q_tree,
        rule=rule,
        uniforms=torch.cat([torch.full((B, 1), torch.nan), u], 1),
        **same,
    )
    for x, y in zip(got, want):
        assert x is not None
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert len(got.num_accepted.unique()) > 2


def case(B: int, T: int, V: int, rule: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A random call's arguments; siblings are distinct where the rule wants that."""
    logits = torch.randn(B, T, V).to(dtype)
    return dict(
        target_logits=logits,
        draft_tokens=torch.stack([torch.randperm(V)[:T] for _ in range(B)]),
        parents=torch.tensor([shape(2, 2)]),
        draft_logits=None if rule == "target_only" else (logits + torch.randn(B, T, V).to(dtype)),
        rule=rule,
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_draws_are_those_of_the_specification(rule: str, backend: str) -> None:
    """Streams, keys and indices as in philox.py: node i draws index i, the last token index -1."""
    B, T = 50, 7
    call = case(B, T, 9, rule)
    seed, offset, positions = torch.randint(0, 2**62, (B,)), torch.arange(B), torch.arange(B) * 3
    index = torch.arange(T)
    keys = (seed[:, None], offset[:, None], positions[:, None])
    u = torch.cat(
        [
            philox.uniform(philox.ACCEPT, *keys, index),
            philox.uniform(philox.RESAMPLE, *keys, torch.tensor([-1])),
        ],
        1,
    )
    want = pydecode.rejection_sample_tree(**call, uniforms=u, backend=backend)
    key: dict[str, Any] = dict(seed=seed, offset=offset, positions=positions)
    got = pydecode.rejection_sample_tree(**call, **key, backend=backend)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.path, want.path)
    key["offset"] = offset + 1
    other = pydecode.rejection_sample_tree(**call, **key, backend=backend)
    assert not torch.equal(got.tokens, other.tokens)


@pytest.mark.parametrize("rule", RULES)
def test_a_request_is_alone_in_any_batch(rule: str, backend: str) -> None:
    """Bitwise, log-probabilities too, with [B] seeds."""
    B, V = 12, 4099
    call = case(B, 7, V, rule)
    numbers: dict[str, Any] = dict(
        seed=torch.randint(0, 2**62, (B,)),
        temperature=torch.rand(B).round(decimals=1),
        top_k=torch.randint(0, 60, (B,)),
        top_p=0.5 + 0.5 * torch.rand(B),
        num_drafts=torch.randint(0, 7, (B,)),
    )
    run = dict(return_logprobs=True, backend=backend)
    whole = pydecode.rejection_sample_tree(**call, **numbers, **run)

    def pick(x: Any, rows: Tensor) -> Any:
        return x[rows] if isinstance(x, Tensor) and x.shape[0] == B else x

    for rows in [torch.tensor([b]) for b in range(B)] + [torch.randperm(B)]:
        part = {k: pick(v, rows) for k, v in {**call, **numbers}.items()}
        for x, y in zip(pydecode.rejection_sample_tree(**part, **run), whole):
            assert x is not None
            assert y is not None
            assert torch.equal(x, y[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_read_into_fp32(rule: str, dtype: torch.dtype, backend: str) -> None:
    call = case(40, 7, 33, rule, dtype)
    u = torch.rand(40, 8)
    got = pydecode.rejection_sample_tree(**call, uniforms=u, return_logprobs=True, backend=backend)
    wide = {k: v.float() if k.endswith("logits") and v is not None else v for k, v in call.items()}
    want = pydecode.rejection_sample_tree(**wide, uniforms=u, return_logprobs=True, backend=backend)
    for x, y in zip(got, want):
        assert x is not None
        assert y is not None
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
