"""rejection_sample_tree keeps the target's law: exactly at small V, by frequencies at larger ones.

The exact tests drive the op through every drafted tree and every cell of its coins (see
tree_laws_oracle), at both ends of each coin's interval, so a threshold that is off by 1e-11 shows.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tree_laws_oracle import Law, Tree, cells, completed, dirichlet, drafted, joint, shape

import pydecode

EDGE = 1e-11
SHAPES = {"1-1": (1, 1), "2-1": (2, 1), "2-2": (2, 2), "1-1-1": (1, 1, 1), "3": (3,)}
# E[accepted] by seed 0 and 1, of the enumeration that ALGORITHMS.md quotes
TRAVERSAL = {"1-1": (0.5933, 0.9360), "1-1-1": (0.7423, 1.3187), "2-1": (0.6428, 0.9963)}
TRAVERSAL |= {"2-2": (0.6736, 1.0708)}
TRAVERSAL_WITHOUT = {"2-1": (0.7628, 1.0848), "2-2": (0.8595, 1.1603)}
RECURSIVE = {"1-1": (0.4970, 0.8341), "1-1-1": (0.5792, 1.0926), "2-1": (0.5465, 0.8944)}
RECURSIVE |= {"2-2": (0.5863, 0.9554)}
WITHOUT = {"2-1": (0.6665, 0.9828), "2-2": (0.8441, 1.1275)}
FIGURES = {
    "recursive": RECURSIVE,
    "without_replacement": WITHOUT,
    "k_seq": {},
    "traversal": TRAVERSAL,
    "traversal_without_replacement": TRAVERSAL_WITHOUT,
}


class Outcome(NamedTuple):
    law: np.ndarray  # of the first `length` tokens of the text, what follows coming from P
    accepted: float  # E[accepted]
    surprises: int  # requests whose tokens are not what the cell says
    plain: np.ndarray  # the law if the last token came from P, not from the residual


def through_the_op(
    rule: str,
    trees: Iterable[tuple[Tree, float]],
    P: Law,
    Q: Law,
    backend: str,
    *,
    edge: str,
    cell_rule: str | None = None,
    with_q: bool = True,
    **kwargs: Any,
) -> Outcome:
    """Runs every cell of every tree at one end of its coins, and adds up what the op emits."""
    rng = np.random.default_rng(0)
    rows: dict[tuple[int, ...], int] = {}
    tokens, index, uniforms, weights, expected = [], [], [], [], []

    def inside(lo: float, hi: float) -> float:
        if hi - lo < 4 * EDGE:
            return (lo + hi) / 2
        if edge == "low":
            return lo + EDGE if lo > 0 else 0.0
        return hi - EDGE

    for tree, weight in trees:
        rows_of_tree = [rows.setdefault(c, len(rows)) for c in tree.context]
        for cell in cells(tree, cell_rule or rule):
            edges = np.cumsum([0.0, *cell.law])
            edges[-1] = 1.0
            for y in np.flatnonzero(cell.law > 0):
                u = rng.random(len(tree.parents) + 1)  # coins that are not read may be anything
                for node, interval in cell.coins.items():
                    u[node] = inside(*interval)
                u[-1] = inside(edges[y], edges[y + 1])
                w = weight * cell.probability * cell.law[y]
                if w < 1e-15:  # an interval of rounding errors
                    continue
                tokens.append(tree.tokens)
                index.append(rows_of_tree)
                uniforms.append(u)
                weights.append(w)
                expected.append((*tree.context[cell.last], int(y)))
    p_rows = torch.tensor(np.array([P(c) for c in rows]))
    q_rows = torch.tensor(np.array([Q(c) for c in rows]))
    out = pydecode.rejection_sample_tree(
        p_rows.log(),
        torch.tensor(tokens),
        torch.tensor([tree.parents]),
        q_rows if with_q else None,
        row_index=torch.tensor(index),
        draft_row_index=torch.tensor(index) if with_q else None,
        rule=rule,
        uniforms=torch.tensor(np.array(uniforms)),
        backend=backend,
        **kwargs,
    )
    emitted: dict[tuple[int, ...], float] = defaultdict(float)
    plain: dict[tuple[int, ...], float] = defaultdict(float)
    surprises = 0
    for row, n, w, want in zip(out.tokens.tolist(), out.num_accepted.tolist(), weights, expected):
        got = tuple(row[: n + 1])
        emitted[got] += w
        plain[got[:-1]] += w
        surprises += got != want or any(x != -1 for x in row[n + 1 :])
    length = max(len(c) for c in rows) + 1
    accepted = float(np.dot(weights, out.num_accepted.numpy()))
    return Outcome(completed(emitted, P, length), accepted, surprises, completed(plain, P, length))


def laws(seed: int, vocab: int = 3) -> tuple[Law, Law]:
    return dirichlet("p", seed, vocab), dirichlet("q", seed, vocab)


def error(outcome: Outcome, P: Law) -> float:
    return float(np.abs(outcome.law - joint(P, outcome.law.ndim)).max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rule", FIGURES)
def test_sampled_trees_keep_the_law(rule: str, name: str, seed: int, backend: str) -> None:
    P, Q = laws(seed)
    trees = list(drafted(shape(*SHAPES[name]), P, Q, replacement="without" not in rule))
    assert sum(w for _, w in trees) == pytest.approx(1, abs=1e-14)
    for edge in ("low", "high"):
        outcome = through_the_op(rule, trees, P, Q, backend, edge=edge)
        assert outcome.surprises == 0
        assert error(outcome, P) < 1e-12
        if name in FIGURES[rule]:
            assert outcome.accepted == pytest.approx(FIGURES[rule][name][seed], abs=5.1e-5)


@pytest.mark.parametrize(
    ("rule", "k", "mean"),
    [
        *[("recursive", 2, 0.6727), ("recursive", 3, 0.7305)],
        *[("without_replacement", 2, 0.7917), ("without_replacement", 3, 1.0)],
        *[("k_seq", 2, 0.6852), ("k_seq", 3, 0.7501), ("traversal", 3, 0.7305)],
    ],
)
def test_mean_acceptance_of_one_node(rule: str, k: int, mean: float, backend: str) -> None:
    accepted = []
    for seed in range(20):
        P, Q = laws(seed)
        trees = list(drafted(shape(k), P, Q, replacement="without" not in rule))
        outcome = through_the_op(rule, trees, P, Q, backend, edge="high")
        assert outcome.surprises == 0
        assert error(outcome, P) < 1e-12
        accepted.append(outcome.accepted)
    assert np.mean(accepted) == pytest.approx(mean, abs=5.1e-5)


@pytest.mark.parametrize(("rule", "mean"), [("recursive", 10 / 9), ("traversal", 11 / 9)])
def test_two_symbols(rule: str, mean: float, backend: str) -> None:
    """The example of Sun et al. (2025): a chain of two over two symbols."""
    P, Q = (lambda c: np.array([1 / 3, 2 / 3])), (lambda c: np.array([2 / 3, 1 / 3]))
    trees = list(drafted(shape(1, 1), P, Q, replacement=True))
    for edge in ("low", "high"):
        outcome = through_the_op(rule, trees, P, Q, backend, edge=edge)
        assert (outcome.surprises, error(outcome, P) < 1e-12) == (0, True)
        assert outcome.accepted == pytest.approx(mean, abs=1e-12)


DETERMINISTIC = {
    "chain": ((1, 1, 1), (2, 0, 1)),
    "star": ((3,), (1, 2, 0)),
    "star-with-duplicates": ((3,), (1, 1, 2)),
    "binary": ((2, 2), (0, 2, 1, 0, 2, 1)),
    "binary-with-duplicates": ((2, 2), (1, 1, 0, 2, 2, 2)),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("rule", [*FIGURES, "target_only"])
def test_deterministic_trees_keep_the_law(rule: str, name: str, backend: str) -> None:
    """Each tree on its own, no average over drafts is needed; a second equal sibling adds 0."""
    widths, drafts = DETERMINISTIC[name]
    for seed in (0, 1):
        P, Q = laws(seed)
        tree = Tree(shape(*widths), (0, *drafts), P, Q)
        cell_rule = "target_only" if rule == "target_only" else "delta"
        for edge in ("low", "high"):
            run = dict(edge=edge, cell_rule=cell_rule, with_q=False)
            outcome = through_the_op(rule, [(tree, 1.0)], P, Q, backend, **run)
            assert outcome.surprises == 0
            assert error(outcome, P) < 1e-12


# ---- negative controls: what breaks the law must be seen to break it ----------------------------


def worst(make: Any) -> float:
    """The largest error over a few laws: a control may err by little on one of them."""
    return max(make(*laws(seed)) for seed in range(6))


def test_control_a_stale_q_without_replacement(backend: str) -> None:
    def err(P: Law, Q: Law) -> float:
        trees = list(drafted(shape(2), P, Q, replacement=False))
        return error(through_the_op("recursive", trees, P, Q, backend, edge="high"), P)

    assert worst(err) > 0.01


@pytest.mark.parametrize("rule", FIGURES)
def test_control_top_k_drafts_tested_by_their_q(rule: str, backend: str) -> None:
    def err(P: Law, Q: Law) -> float:
        top = np.argsort(-Q(()), kind="stable")[:2]
        trees = [(Tree(shape(2), (0, *top), P, Q), 1.0)]
        return error(through_the_op(rule, trees, P, Q, backend, edge="high"), P)

    assert worst(err) > 0.1


def test_control_choosing_the_branch_that_the_target_likes(backend: str) -> None:
    def err(P: Law, Q: Law) -> float:
        top = np.argsort(-Q(()), kind="stable")[:2]
        branch = top[np.argmax(P(())[top])]
        trees = [(Tree(shape(1), (0, branch), P, Q), 1.0)]
        return error(through_the_op("recursive", trees, P, Q, backend, edge="high"), P)

    assert worst(err) > 0.1


@pytest.mark.parametrize("rule", FIGURES)
def test_control_no_residual(rule: str, backend: str) -> None:
    """The op's accepted paths, but the last token from p itself."""

    def err(P: Law, Q: Law) -> float:
        trees = list(drafted(shape(2, 1), P, Q, replacement="without" not in rule))
        outcome = through_the_op(rule, trees, P, Q, backend, edge="high")
        return float(np.abs(outcome.plain - joint(P, 3)).max())

    assert worst(err) > 0.01


def test_control_thresholds_below_one(backend: str) -> None:
    def err(P: Law, Q: Law, **thresholds: float) -> float:
        trees = [(Tree(shape(1), (0, x), P, Q), 1.0) for x in range(3)]
        run = dict(edge="low", **thresholds)
        return max(
            error(through_the_op("target_only", [t], P, Q, backend, **run), P) for t in trees
        )

    assert worst(err) < 1e-12
    assert worst(lambda P, Q: err(P, Q, threshold_single=0.3)) > 0.1
