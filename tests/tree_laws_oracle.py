"""Exact laws of the tree rules, by enumeration: numpy only, and no code of pydecode.

A rule is written as a recursion that yields its *cells*: for each outcome of its coins the interval
of every coin that was read, the last accepted node and the law of the last token. The product of
the intervals' widths is the cell's probability, so the tests can drive an op through every cell, at
both ends of every interval, and add up the law of what it emits without sampling anything.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Law = Callable[[tuple[int, ...]], np.ndarray]
Interval = tuple[float, float]


def dirichlet(tag: str, seed: int, vocab: int = 3, concentration: float = 0.7) -> Law:
    """A law for each context, drawn once and for all from the context's name."""
    table: dict[tuple[int, ...], np.ndarray] = {}

    def law(context: tuple[int, ...]) -> np.ndarray:
        if context not in table:
            name = hashlib.sha256(f"{tag}|{context}|{seed}".encode()).hexdigest()
            rng = np.random.default_rng(int(name[:8], 16))
            table[context] = rng.dirichlet([concentration] * vocab)
        return table[context]

    return law


class Tree:
    """A drafted tree: parents, tokens, and the laws after each node."""

    def __init__(self, parents: Sequence[int], tokens: Sequence[int], P: Law, Q: Law) -> None:
        self.parents, self.tokens = list(parents), list(tokens)
        self.children = [[c for c, n in enumerate(parents) if n == i] for i in range(len(parents))]
        self.context: list[tuple[int, ...]] = [()]
        for i in range(1, len(parents)):
            self.context.append((*self.context[parents[i]], tokens[i]))
        self.p = [P(c) for c in self.context]
        self.q = [Q(c) for c in self.context]


class Cell(NamedTuple):
    """One outcome of the coins."""

    coins: dict[int, Interval]  # by node; a coin that is not here was not read
    last: int  # the deepest accepted node
    law: np.ndarray  # of the last token

    @property
    def probability(self) -> float:
        return float(np.prod([hi - lo for lo, hi in self.coins.values()]))


def shape(*widths: int) -> list[int]:
    """Parents, breadth first, of a tree in which every node of depth d has widths[d] children."""
    parents, level = [-1], [0]
    for width in widths:
        above, level = level, []
        for n in above:
            for _ in range(width):
                level.append(len(parents))
                parents.append(n)
    return parents


def drafted(
    parents: Sequence[int], P: Law, Q: Law, replacement: bool
) -> Iterator[tuple[Tree, float]]:
    """Every tree that drafting can make (siblings i.i.d. from q, or drawn without replacement)."""
    vocab = len(Q(()))
    for tokens in itertools.product(range(vocab), repeat=len(parents) - 1):
        tree, weight = Tree(parents, (0, *tokens), P, Q), 1.0
        for n, children in enumerate(tree.children):
            q = tree.q[n].copy()
            for c in children:
                x = tree.tokens[c]
                weight *= q[x] / q.sum() if q.sum() > 0 else 0.0
                if not replacement:
                    q[x] = 0.0
        if weight > 0:
            yield tree, weight


def norm(x: np.ndarray) -> np.ndarray:
    return x / x.sum()


def split(h: float, node: int, coins: dict[int, Interval]) -> Iterator[tuple[bool, dict]]:
    """The two sides of a coin with acceptance h, less an empty one."""
    h = min(1.0, h)
    if h > 0:
        yield True, {**coins, node: (0.0, h)}
    if h < 1:
        yield False, {**coins, node: (h, 1.0)}


# ---- the rules ----------------------------------------------------------------------------------


def multi_round(tree: Tree, rule: str) -> Iterator[Cell]:
    """recursive, without_replacement, and delta (deterministic drafts)."""

    def at(n: int, rest: list[int], p: np.ndarray, q: np.ndarray, coins: dict) -> Iterator[Cell]:
        if not rest or (rule != "delta" and q.sum() == 0):
            yield Cell(coins, n, p)
            return
        c, x = rest[0], tree.tokens[rest[0]]
        proposal = np.eye(len(p))[x] if rule == "delta" else q
        h = p[x] / proposal[x] if proposal[x] > 0 else 0.0
        for accepted, both in split(h, c, coins):
            if accepted:
                yield from at(c, tree.children[c], tree.p[c], tree.q[c], both)
                continue
            left = np.maximum(p - proposal, 0)
            q_next = q.copy()
            if rule == "without_replacement":
                q_next[x] = 0
                q_next = norm(q_next) if q_next.sum() > 0 else q_next
            yield from at(n, rest[1:], norm(left) if left.sum() > 0 else p, q_next, both)

    return at(0, tree.children[0], tree.p[0], tree.q[0], {})


def k_seq_rho(p: np.ndarray, q: np.ndarray, k: int) -> float:
    def excess(rho: float) -> float:
        beta = np.minimum(q, p / rho).sum()
        return 1 - (1 - beta) ** k - rho * beta

    lo, hi = 1.0, float(k)
    if excess(lo) <= 0:
        return lo
    for _ in range(24):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if excess(mid) > 0 else (lo, mid)
    return hi


def k_seq(tree: Tree) -> Iterator[Cell]:
    def at(n: int, rest: list[int], coins: dict) -> Iterator[Cell]:
        p, q, k = tree.p[n], tree.q[n], len(tree.children[n])
        rho = k_seq_rho(p, q, k) if k else 1.0
        if not rest:
            common = np.minimum(q, p / rho)
            beta = common.sum()
            left = p - common * (1 - (1 - beta) ** k) / beta if k and beta > 0 else p
            assert left.min() > -1e-12
            left = np.maximum(left, 0)
            yield Cell(coins, n, norm(left) if left.sum() > 0 else p)
            return
        x = tree.tokens[rest[0]]
        for accepted, both in split(p[x] / (rho * q[x]) if q[x] > 0 else 0.0, rest[0], coins):
            if accepted:
                yield from at(rest[0], tree.children[rest[0]], both)
            else:
                yield from at(n, rest[1:], both)

    return at(0, tree.children[0], {})


def target_only(tree: Tree) -> Iterator[Cell]:
    """One coin a node: its children, in order, own adjacent pieces of it."""

    def at(n: int, coins: dict) -> Iterator[Cell]:
        p, seen, low = tree.p[n], set[int](), 0.0
        for c in tree.children[n]:
            x = tree.tokens[c]
            if x not in seen and p[x] > 0:
                high = min(1.0, low + p[x])
                yield from at(c, {**coins, n: (low, high)})
                low = high
            seen.add(x)
        if not tree.children[n]:
            yield Cell(coins, n, p)
        elif low < 1 - 1e-15:
            left = np.array([0 if v in seen else p[v] for v in range(len(p))])
            if left.sum() > 0:
                yield Cell({**coins, n: (low, 1.0)}, n, norm(left))

    return at(0, {})


def traversal(tree: Tree, replacement: bool) -> Iterator[Cell]:
    """Leaf first, on copies: what is left of the tree, and p', q', a of its nodes."""

    def enter(n: int, kids: dict, p: dict, q: dict, a: dict) -> None:
        """Gives every node below n its acceptance."""
        for c in kids[n]:
            x = tree.tokens[c]
            a[c] = min(1.0, a[n] * p[n][x] / q[n][x]) if q[n][x] > 0 else 0.0
            enter(c, kids, p, q, a)

    def first_leaf(n: int, kids: dict) -> int:
        return first_leaf(kids[n][0], kids) if kids[n] else n

    def at(kids: dict, p: dict, q: dict, a: dict, coins: dict) -> Iterator[Cell]:
        leaf = first_leaf(0, kids)
        if leaf == 0:
            yield Cell(coins, 0, p[0])
            return
        for accepted, both in split(a[leaf], leaf, coins):
            if accepted:
                yield Cell(both, leaf, p[leaf])
                continue
            n, x = tree.parents[leaf], tree.tokens[leaf]
            kids2 = {**kids, n: kids[n][1:]}
            p2, q2, a2 = dict(p), dict(q), dict(a)
            left = np.maximum(a[n] * p[n] - q[n], 0)
            mass = float(left.sum())
            if mass + 1 - a[n] < 1e-6:
                a2[n] = 1.0
            else:
                a2[n] = mass / (mass + 1 - a[n]) if n else 1.0
                p2[n] = left / mass if mass > 0 else p[n]
            if not replacement:
                spent = q[n].copy()
                spent[x] = 0
                q2[n] = norm(spent) if spent.sum() > 0 else spent
            enter(n, kids2, p2, q2, a2)
            yield from at(kids2, p2, q2, a2, both)

    nodes = range(len(tree.parents))
    kids = {n: list(tree.children[n]) for n in nodes}
    p, q = dict(enumerate(tree.p)), dict(enumerate(tree.q))
    a = {0: 1.0}
    enter(0, kids, p, q, a)
    return at(kids, p, q, a, {})


def cells(tree: Tree, rule: str) -> Iterator[Cell]:
    if rule.startswith("traversal"):
        return traversal(tree, replacement=rule == "traversal")
    if rule in ("k_seq", "target_only"):
        return k_seq(tree) if rule == "k_seq" else target_only(tree)
    return multi_round(tree, rule)


# ---- laws of whole texts ------------------------------------------------------------------------


def joint(P: Law, length: int) -> np.ndarray:
    """The target's law of every text of that length, [V] * length."""
    vocab = len(P(()))
    out = np.zeros((vocab,) * length)
    for text in itertools.product(range(vocab), repeat=length):
        out[text] = np.prod([P(text[:i])[text[i]] for i in range(length)])
    return out


def completed(emitted: dict[tuple[int, ...], float], P: Law, length: int) -> np.ndarray:
    """The law of texts that begin as they were emitted, with that weight, and go on from P."""
    vocab = len(P(()))
    out = np.zeros((vocab,) * length)
    for begin, weight in emitted.items():
        for tail in itertools.product(range(vocab), repeat=length - len(begin)):
            text = begin + tail
            steps = [P(text[:i])[text[i]] for i in range(len(begin), length)]
            out[text] += weight * np.prod(steps)
    return out
