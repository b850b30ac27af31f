"""FlashInfer's documented semantics in plain loops and our own words; faults by keyword.

``naive=True`` is what a direct port does at the edges: FlashInfer has, or had, each of them.
"""

import math
from collections.abc import Sequence

import numpy as np

Row = np.ndarray


def inverse_cdf(weights: Row, u: float) -> int:
    """The first v whose running sum passes u times the whole."""
    total = float(weights.sum())
    running = 0.0
    for v, weight in enumerate(weights):
        running += float(weight)
        if running > u * total:
            return v
    return max((v for v, weight in enumerate(weights) if weight > 0), default=-1)


def verify_chain(
    q: np.ndarray, ids: Sequence[int], p: np.ndarray, u: Sequence[float], *, naive: bool = False
) -> tuple[list[int], int, int]:
    """One request: q [n, V], n ids, p [n+1, V], u [n+1] -> (ids with -1 behind, accepted, emitted).

    The last draw is the correction's or the bonus's, wherever the chain ends.
    """
    n, V = q.shape
    tokens: list[int] = []
    end = n
    for i, x in enumerate(ids):
        there = 0 <= x < V
        if not there and not naive:
            end = i  # padding: the chain is as long as that
            break
        if u[i] * q[i][x] < p[i][x] and (naive or q[i][x] > 0):
            tokens.append(int(x))
        else:
            break
    emitted = len(tokens)
    weights = p[emitted]
    if emitted < end:
        weights = np.maximum(p[emitted] - q[emitted], 0)
        if weights.sum() == 0 and not naive:
            weights = p[emitted]
    accepted = emitted
    absent = [i for i, x in enumerate(ids) if not 0 <= x < V]
    for i in range(emitted + 1, min(absent, default=n)):  # padding ends the chain for this as well
        if q[i][ids[i]] > 0 and u[i] * q[i][ids[i]] < p[i][ids[i]]:
            accepted += 1
    tokens.append(inverse_cdf(weights, u[n]))
    return tokens + [-1] * (n - emitted), accepted, emitted


def filtered(x: Row, top_k: int, top_p: float, order: str) -> Row:
    """The law of one row of logits; what ties with the last one kept is kept as well."""
    p = np.exp(x - x.max())
    p /= p.sum()
    V = len(p)
    few = np.array([1 if not 0 < top_k < V or (p > p[v]).sum() < top_k else 0 for v in range(V)])
    law = p if order == "joint" else p * few / (p * few).sum()
    head = np.array([1 if top_p >= 1 or law[law > law[v]].sum() < top_p else 0 for v in range(V)])
    kept = p * few * head
    return kept / kept.sum()


def merge(vs: Sequence[Row], ss: Sequence[float]) -> tuple[Row, float]:
    """States (v [D], s) of one row and head, s in base 2."""
    heard = [(v, s) for v, s in zip(vs, ss) if s != -math.inf]
    if not heard:
        return np.zeros_like(vs[0]), -math.inf
    top = max(s for _, s in heard)
    total = sum(2.0 ** (s - top) for _, s in heard)
    out = sum(2.0 ** (s - top) / total * v for v, s in heard)
    return np.asarray(out), top + math.log2(total)
