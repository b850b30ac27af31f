"""What vLLM documents, written out plainly; where it has a known fault, what it should do.

Randomness is handed in: a uniform a draft, and one for the last token, which is the first id whose
running sum of the weights exceeds u times their total (vLLM races exponentials: the same law).
"""

import math

import torch

Law = list[float]


def softmax(logits: Law) -> Law:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def pick(weights: Law, u: float) -> int:
    running, total = 0.0, math.fsum(weights)
    for v, w in enumerate(weights):
        running += w
        if running > u * total:
            return v
    return max(v for v, w in enumerate(weights) if w > 0)


def one_hot(x: int, size: int) -> Law:
    return [float(v == x) for v in range(size)]


def relu_less(p: Law, q: Law, scale: float = 1.0) -> Law:
    return [max(scale * a - b, 0.0) for a, b in zip(p, q)]


def greedy_chain(logits: list[Law], drafts: list[int]) -> tuple[list[int], bool]:
    """The target's argmax at every place up to and including the first mismatch."""
    tokens = []
    for x, row in zip(drafts, logits):
        tokens.append(row.index(max(row)))
        if tokens[-1] != x:
            return tokens, False
    return tokens, True


def token_chain(
    p: list[Law], q: list[Law] | None, drafts: list[int], u: list[float]
) -> tuple[list[int], bool]:
    """Each draft in turn: kept with probability min(1, p/q), else replaced from relu(p - q)."""
    tokens: list[int] = []
    for i, x in enumerate(drafts):
        if x < 0:  # nothing was drafted here, so p itself is the law
            return [*tokens, pick(p[i], u[-1])], False
        law = q[i] if q is not None else one_hot(x, len(p[i]))
        if law[x] > 0 and u[i] * law[x] < p[i][x]:
            tokens.append(x)
            continue
        weights = relu_less(p[i], law)
        return [*tokens, pick(weights if any(weights) else p[i], u[-1])], False
    return tokens, True


def block_chain(
    p: list[Law], q: list[Law] | None, drafts: list[int], u: list[float]
) -> tuple[list[int], bool]:
    """V2's block rule: the last i with u_i < h_i, and the residual of p scaled by P_tau."""
    n = next((i for i, x in enumerate(drafts) if x < 0), len(drafts))
    laws = [one_hot(x, len(p[0])) if q is None else q[i] for i, x in enumerate(drafts)]
    P = [1.0]
    for i in range(n):
        x = drafts[i]
        P.append(min(P[-1] * p[i][x] / laws[i][x], 1.0) if laws[i][x] > 0 else 0.0)
    tau = 0
    for i in range(1, n + 1):
        h = P[i]
        if i < n:
            mass = math.fsum(relu_less(p[i], laws[i], P[i]))
            bottom = mass + 1 - P[i]
            h = mass / bottom if bottom >= 1e-6 else 1.0
        if u[i - 1] < h:
            tau = i
    if tau == n == len(drafts):
        return drafts[:n], True
    weights = relu_less(p[tau], laws[tau], P[tau]) if tau < n else p[tau]
    return [*drafts[:tau], pick(weights if any(weights) else p[tau], u[-1])], False


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sees: list[list[bool]],
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One request, fp64: q [n, Hq, D], keys and values [m, Hkv, D], sees [n][m]."""
    out = torch.zeros(*q.shape[:2], values.shape[-1], dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            top, weighted, total = -math.inf, [], 0.0
            for j in range(keys.shape[0]):
                if sees[i][j]:
                    s = scale * float(q[i, h].double() @ keys[j, h // group].double())
                    weighted.append((softcap * math.tanh(s / softcap) if softcap else s, j))
            if sinks is not None:
                top = float(sinks[h])
            top = max([top, *(s for s, _ in weighted)])
            if sinks is not None:
                total = math.exp(float(sinks[h]) - top)
            for s, j in weighted:
                total += math.exp(s - top)
                out[i, h] += math.exp(s - top) * values[j, h // group].double()
            out[i, h] /= total or 1.0
    return out


def remask(
    logits: list[Law], draft: list[int], mask: int, threshold: float
) -> tuple[list[int], int]:
    """The plugin's batched rule on one block: c >= min(threshold, the best c less 1e-5)."""
    best = {}
    for i, (x, row) in enumerate(zip(draft, logits)):
        if x == mask:
            row = [-math.inf if v == mask else y for v, y in enumerate(row)]
            best[i] = (max(softmax(row)), row.index(max(row)))
    level = min(threshold, max((c for c, _ in best.values()), default=0.0) - 1e-5)
    filled = {i: x for i, (c, x) in best.items() if c >= level}
    return [filled.get(i, x) for i, x in enumerate(draft)], len(filled)


def policy(
    logits: list[Law], draft: list[int], mask: int, threshold: float, k: int
) -> tuple[list[int], int]:
    """The plugin's LLaDA2 policy: all with c > threshold if they are k or more, else the best k."""
    best = []
    for i, (x, row) in enumerate(zip(draft, logits)):
        if x == mask:
            row = [-math.inf if v == mask else y for v, y in enumerate(row)]
            best.append((-max(softmax(row)), i, row.index(max(row))))
    sure = [b for b in best if -b[0] > threshold]
    chosen = sure if len(sure) >= k else sorted(best)[:k]
    filled = {i: x for _, i, x in chosen}
    return [filled.get(i, x) for i, x in enumerate(draft)], len(filled)
