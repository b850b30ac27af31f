"""The commit rules as plain loops over one request, written from DESIGN's table, row by row."""

import math
from collections.abc import Sequence

RULES = (
    "top_k",
    "threshold",
    "factor",
    "entropy",
    "entropy_bound",
    "prefix",
    "sequential",
    "segments",
    "posterior",
    "external",
)


def commits(
    rule: str,
    c: Sequence[float],
    masked: Sequence[bool],
    *,
    external: Sequence[float] | None = None,
    u: Sequence[float] | None = None,
    k: int = 1,
    threshold: float = 0.9,
    slack: float = 0.0,
    factor: float = 1.0,
    low: float = 0.4,
    keep: float = 0.0,
    strict: bool = False,
    min_commit: int | None = None,
    max_commit: int | None = None,
) -> list[bool]:
    """c: confidences (for the entropy rules -H), NaN where a masked row cannot be committed."""
    L = len(c)
    rows = [i for i in range(L) if masked[i] and not math.isnan(c[i])]
    by_confidence = sorted(rows, key=lambda i: (-c[i], i))

    def over(x: float, y: float) -> bool:
        return x > y if strict else x >= y

    order, chosen = by_confidence, set()
    if rule == "top_k":
        chosen = set(order[:k])
    elif rule == "threshold":
        if slack > 0 and order:
            threshold = min(threshold, c[order[0]] - slack)
        chosen = {i for i in rows if over(c[i], threshold)}
    elif rule == "factor":
        for n, i in enumerate(order, 1):
            if n >= 2 and c[i] < 1 - factor / (n + 1):
                break
            chosen.add(i)
    elif rule == "entropy":
        chosen = {i for i in rows if over(threshold, -c[i])}
    elif rule == "entropy_bound":
        earlier = 0.0
        for i in order:
            if not over(threshold, earlier):
                break
            chosen.add(i)
            earlier += -c[i]
    elif rule == "prefix":
        order = rows
        for i in range(L):
            if not masked[i]:
                continue
            if not over(c[i], threshold):  # a NaN too
                break
            chosen.add(i)
    elif rule == "sequential":
        order = rows
        chosen = set(rows[:k])
    elif rule == "segments":
        chosen = {i for i in rows if c[i] > threshold}
        i = 0
        while i < L:
            j = i
            while j < L and masked[j]:
                j += 1
            run = [r for r in range(i, j) if r in rows]
            if run:
                best = min(run, key=lambda r: (-c[r], r))
                if c[best] > low:
                    chosen.add(best)
            i = max(j, i + 1)
    elif rule == "posterior":
        assert u is not None
        order = rows
        chosen = {i for i in rows if u[i] >= keep}
    elif rule == "external":
        assert external is not None
        rows = [i for i in rows if not math.isnan(external[i])]
        order = sorted(rows, key=lambda i: (-external[i], i))
        chosen = {i for i in rows if external[i] > threshold}

    least = (0 if rule == "posterior" else 1) if min_commit is None else min_commit
    final = [i for i in order if i in chosen]
    if max_commit is not None:
        final = final[:max_commit]
    for i in order:
        if len(final) >= least:
            break
        if i not in final:
            final.append(i)
    return [i in final for i in range(L)]
