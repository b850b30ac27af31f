"""Verification of chains in plain Python and numpy, and the exact law of what a verifier emits.

Nothing here is shared with the package. ``decide`` follows the papers one request at a time;
``emitted_law`` integrates any verifier exactly over all drafts and all uniforms.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

Prefix = tuple[int, ...]
Law = Callable[[Prefix], np.ndarray]
# (p [M, G+1, V], x [M, G], q [M, G, V], u [M, G+1]) -> tokens [M, G+1] with -1 behind
Verifier = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def random_law(seed: int, vocab: int, concentration: float = 0.6, zeros: bool = False) -> Law:
    """A law that depends on the whole prefix; ``zeros``: some entries are impossible."""

    def law(prefix: Prefix) -> np.ndarray:
        rng = np.random.default_rng([seed, len(prefix), *prefix])
        p = rng.dirichlet([concentration] * vocab)
        if zeros and vocab > 1:
            p[rng.integers(vocab)] = 0
        return p / p.sum()

    return law


def inverse_cdf(w: np.ndarray, u: float) -> int:
    c = np.cumsum(w)
    above = np.flatnonzero(c > u * c[-1])
    return int(above[0]) if len(above) else int(np.flatnonzero(w)[-1])


def residual(p: np.ndarray, q: np.ndarray, pi: float = 1.0) -> np.ndarray:
    r = np.maximum(pi * p - q, 0)
    return r if r.sum() > 0 else p


def block_tests(p: np.ndarray, q: np.ndarray, x: Sequence[int]) -> tuple[list[float], list[float]]:
    """pi_0..pi_n and h_1..h_n of block verification."""
    n, pi, h = len(x), [1.0], []
    for i in range(n):
        pi.append(min(1.0, pi[i] * p[i][x[i]] / q[i][x[i]]) if q[i][x[i]] > 0 else 0.0)
    for i in range(1, n):
        S = np.maximum(pi[i] * p[i] - q[i], 0).sum()
        h.append(S / (S + 1 - pi[i]) if S + 1 - pi[i] >= 1e-6 else 1.0)
    return pi, [*h, pi[n]][:n]


def decide(
    p: np.ndarray,
    x: Sequence[int],
    q: np.ndarray | None,
    u: Sequence[float],
    rule: str = "token",
    *,
    stop_at_first_rejection: bool = False,
    plain_residual: bool = False,
) -> list[int]:
    """What one request emits; the two keywords are errors that people really made."""
    n = len(x)
    if q is None:  # deterministic drafts
        q, rule = np.stack([np.eye(p.shape[1])[v] for v in x]) if n else p[:0], "token"
    pi = [1.0] * (n + 1)
    if rule == "token":
        tau = 0
        while tau < n and q[tau][x[tau]] > 0 and u[tau] * q[tau][x[tau]] < p[tau][x[tau]]:
            tau += 1
    else:
        pi, h = block_tests(p, q, x)
        tests = [u[i] < h[i] for i in range(n)]
        passed = [i + 1 for i in range(n) if tests[i]]
        tau = [*tests, False].index(False) if stop_at_first_rejection else max([0, *passed])
    w = p[n] if tau == n else residual(p[tau], q[tau], 1.0 if plain_residual else pi[tau])
    return [*x[:tau], inverse_cdf(w, u[-1])]


def decide_all(rule: str, **errors: bool) -> Verifier:
    def verifier(p: np.ndarray, x: np.ndarray, q: np.ndarray, u: np.ndarray) -> np.ndarray:
        out = np.full(u.shape, -1)
        for b in range(len(u)):
            emitted = decide(p[b], x[b].tolist(), q[b], u[b], rule, **errors)
            out[b, : len(emitted)] = emitted
        return out

    return verifier


# ---- exact integration --------------------------------------------------------------------------


def cells(breaks: Iterable[float], edge: float = 1e-13) -> list[tuple[float, float]]:
    """(u, weight): both ends of every interval between breakpoints, each for half of its length.

    A verifier that is monotone in u and whose breakpoints are others than these is caught, where
    midpoints would not notice a breakpoint that is a little off.
    """
    at = sorted({0.0, 1.0, *(float(b) for b in breaks if 0 < b < 1)})
    points = []
    for low, high in itertools.pairwise(at):
        if high - low > 4 * edge:
            points += [(low + edge, (high - low) / 2), (high - edge, (high - low) / 2)]
        else:
            points.append(((low + high) / 2, high - low))
    return points


def breakpoints(
    p: np.ndarray, x: Sequence[int], q: np.ndarray | None, rule: str
) -> tuple[list[float], list[float]]:
    """Of the accept tests u_0..u_{G-1}, one each, and of the last token's draw."""
    n = len(x)
    if q is None:
        q, rule = np.stack([np.eye(p.shape[1])[v] for v in x]), "token"
    pi, h = block_tests(p, q, x)
    if rule == "token":
        pi = [1.0] * (n + 1)
        h = [p[i][x[i]] / q[i][x[i]] if q[i][x[i]] > 0 else 0.0 for i in range(n)]
    weights = [p[n], *(residual(p[i], q[i], pi[i]) for i in range(n))]
    return h, [c for w in weights for c in np.cumsum(w) / w.sum()]


def emitted_law(
    P: Law,
    Q: Law | None,
    chains: list[tuple[Prefix, float]],
    vocab: int,
    rule: str,
    verifier: Verifier,
) -> tuple[dict[Prefix, float], float]:
    """Exact law of the first G+1 tokens (completed by P), and the mean number of accepted drafts.

    ``chains`` are the drafts with their probabilities. Q None: deterministic drafts.
    """
    xs, ps, qs, us, ws = [], [], [], [], []
    for x, weight in chains:
        p = np.stack([P(x[:i]) for i in range(len(x) + 1)])
        q = np.stack([Q(x[:i]) for i in range(len(x))]) if Q else None
        tests, draws = breakpoints(p, x, q, rule)
        for combination in itertools.product(*(cells([t]) for t in tests), cells(draws)):
            xs.append(x)
            ps.append(p)
            qs.append(np.zeros((len(x), vocab)) if q is None else q)
            us.append([u for u, _ in combination])
            ws.append(weight * np.prod([w for _, w in combination]))
    tokens = verifier(np.stack(ps), np.array(xs), np.stack(qs), np.array(us))
    assert tokens.shape == (len(us), len(xs[0]) + 1)
    emitted: dict[Prefix, float] = {}
    for row, w in zip(tokens.tolist(), ws):
        key = tuple(v for v in row if v >= 0)
        emitted[key] = emitted.get(key, 0.0) + w
    accepted = sum(w * (len(key) - 1) for key, w in emitted.items())
    depth = len(xs[0]) + 1
    law = dict.fromkeys(itertools.product(range(vocab), repeat=depth), 0.0)
    for key, w in emitted.items():
        for rest in itertools.product(range(vocab), repeat=depth - len(key)):
            law[key + rest] += w * probability(P, rest, key)
    return law, accepted


def probability(P: Law, tokens: Prefix, prefix: Prefix = ()) -> float:
    product = 1.0
    for i, v in enumerate(tokens):
        product *= P(prefix + tokens[:i])[v]
    return float(product)


def all_chains(Q: Law, vocab: int, depth: int) -> list[tuple[Prefix, float]]:
    chains = itertools.product(range(vocab), repeat=depth)
    return [(x, w) for x in chains if (w := probability(Q, x)) > 0]


def joint(P: Law, vocab: int, depth: int) -> dict[Prefix, float]:
    return {s: probability(P, s) for s in itertools.product(range(vocab), repeat=depth)}


def distance(a: dict[Prefix, float], b: dict[Prefix, float]) -> float:
    return max(abs(a[s] - b[s]) for s in b)


def expected_accepted(P: Law, Q: Law, vocab: int, depth: int, rule: str) -> float:
    """Token: sum over prefixes of the product of min(p, q). Block: P(tau >= l | x^l) = pi_l."""
    total = 0.0
    for length in range(1, depth + 1):
        for x in itertools.product(range(vocab), repeat=length):
            w, pi = 1.0, 1.0
            for i in range(length):
                p, q = P(x[:i])[x[i]], Q(x[:i])[x[i]]
                if rule == "token":
                    w *= min(p, q)
                else:
                    w, pi = w * q, min(1.0, pi * p / q) if q > 0 else 0.0
            total += w * pi
    return total


# ---- frequencies --------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, law: np.ndarray, minimum: float = 10.0) -> float:
    """p-value of counts under a law; cells with a small expectation are merged into one."""
    assert counts[law == 0].sum() == 0, "something impossible was drawn"
    expected = law * counts.sum()
    small = expected < minimum
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] < minimum:  # even merged: into its neighbour
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    return float(stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)


# ---- laws from logits ---------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def filtered_law(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """One row [V]: temperature, then each filter on what the one before it left, renormalised."""
    x = np.where(allowed, logits, -np.inf) if allowed is not None else logits.astype(np.float64)
    V = len(x)
    if temperature == 0:
        return np.eye(V)[int(x.argmax())]
    p = softmax(x / temperature)
    if 0 < top_k < V:
        edge = sorted(x, reverse=True)[top_k - 1]
        p = np.array([p[v] if x[v] >= edge else 0.0 for v in range(V)])
        p = p / p.sum()
    if top_p < 1:
        above = [sum(p[w] for w in range(V) if p[w] > p[v]) for v in range(V)]
        p = np.array([p[v] if above[v] < top_p or p[v] == p.max() else 0.0 for v in range(V)])
        p = p / p.sum()
    if min_p > 0:
        p = np.array([p[v] if p[v] >= min_p * p.max() else 0.0 for v in range(V)])
        p = p / p.sum()
    return p
