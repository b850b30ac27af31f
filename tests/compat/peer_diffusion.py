"""What the diffusion peers document, in plain loops: one request at a time, dictionaries position
-> score of the masked positions, sets of positions as the result.
"""

import math
from typing import Any

import torch
from fake_diffusion import MASK
from torch import Tensor

Scores = dict[int, float]


def surest(scores: Scores) -> list[int]:
    return sorted(scores, key=lambda i: (-scores[i], i))


def proposals(logits: Tensor, masked: list[int]) -> Any:
    """Argmax, its probability, and the entropy of the masked rows of [L, V]."""
    p = torch.softmax(logits.double(), -1)
    best, token = (y.tolist() for y in p.max(-1))
    entropy = (-torch.special.xlogy(p, p).sum(-1)).tolist()
    return ({i: y[i] for i in masked} for y in (token, best, entropy))


def masked_rows(mask_index: Tensor) -> list[list[int]]:
    return [[i for i, m in enumerate(row) if m] for row in mask_index.tolist()]


# ---- rules ---------------------------------------------------------------------------------------


def fixed(c: Scores, k: int) -> set[int]:
    return set(surest(c)[:k])


def fast_threshold(c: Scores, threshold: float) -> set[int]:
    """Fast-dLLM: the surest stays, others go if they are under the threshold."""
    ranked = surest(c)
    return {i for n, i in enumerate(ranked) if n == 0 or not c[i] < threshold}


def fast_factor(c: Scores, factor: float, quirk: bool) -> set[int]:
    """Fast-dLLM's dynamic rule: thresholds -1, 1 - f/3, 1 - f/4, ..; stop at the first miss."""
    ranked = surest(c)
    if not ranked:
        return set()
    stop = len(ranked)
    for n in range(1, len(ranked)):
        if c[ranked[n]] < 1 - factor / (n + 2):
            stop = n
            break
    if quirk and stop == len(ranked) - 1:
        stop = len(ranked)
    return set(ranked[: max(stop, 1)])


def low_entropy(h: Scores, threshold: float) -> set[int]:
    """dParallel: the lowest entropy, and all up to the threshold."""
    return {i for i in h if h[i] <= threshold or h[i] == min(h.values())}


def dinfer_threshold(c: Scores, threshold: float) -> set[int]:
    if not c:
        return set()
    bar = min(max(max(c.values()) - 1e-5, -1000), threshold)
    return {i for i in c if c[i] >= bar}


def runs(positions: list[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for i in positions:
        if out and out[-1][-1] == i - 1:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def hierarchy(c: Scores, threshold: float | None, low: float | None) -> set[int]:
    """dInfer's segments: each run's surest if over low, all over threshold, and one at least."""
    best = {surest({i: c[i] for i in run})[0] for run in runs(sorted(c))}
    taken = {i for i in best if low is None or c[i] > low}
    taken |= {i for i in c if threshold is not None and c[i] > threshold}
    return taken or set(surest(c)[:1])


def sdar_step(
    strategy: str, c: Scores, h: Scores, quota: int, *, length: int, tau: float = 0.85
) -> set[int]:
    """SDAR's strategies, as documented: no committed row is ever taken."""
    if strategy == "sequential":
        first = min(c)
        return {i for i in range(first, min(first + quota, length)) if i in c}
    if strategy == "low_confidence_dynamic":
        high = {i for i in c if c[i] > tau}
        if len(high) >= quota:
            return high
    if strategy == "entropy_bounded":  # EB-sampling, which theirs means to be
        ranked, total, taken = sorted(h, key=lambda i: (h[i], i)), 0.0, set()
        for n, i in enumerate(ranked):
            if n > 0 and total > tau:
                break
            taken.add(i)
            total += h[i]
        return taken
    return fixed(c, quota)


def sdar_literal_top_k(c: Scores, quota: int, length: int) -> set[int]:
    """What theirs does: -inf rows are in the race, and x0 overwrites them."""
    every = {i: c.get(i, -math.inf) for i in range(length)}
    return set(surest(every)[:quota])


def credit(
    logits: Tensor, dense: Tensor, masked: Tensor, alpha: float, gamma: float, beta: float
) -> Tensor:
    """dInfer's credit: the dense matrix [B, L, V] is updated, fused logits are returned."""
    dense *= beta
    for b, i in masked.nonzero().tolist():
        p = torch.softmax(logits[b, i].double(), -1)
        dense[b, i, p.argmax()] += p.max() ** gamma
    return logits + alpha * torch.log(dense + 1)


def dream_law(
    row: Tensor, temperature: float, top_p: float | None, top_k: int | None
) -> dict[int, float]:
    """Dream's filtered law of one row: nucleus of the tempered law, then its k largest."""
    p = torch.softmax(row / (temperature or 1.0), -1).tolist()
    ranked = sorted(range(len(p)), key=lambda v: -p[v])
    kept, mass = [], 0.0
    for v in ranked:
        if top_p is None or top_p >= 1 or mass <= top_p:  # a token goes once those above exceed
            kept.append(v)
        mass += p[v]
    kept = kept if top_k is None else [v for v in kept if v in ranked[:top_k]]
    total = sum(p[v] for v in kept)
    return {v: p[v] / total for v in kept}


# ---- random cases --------------------------------------------------------------------------------


def cases(B: int, L: int, vocab: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Logits fp64 [B, L, V] from vague to certain, mask_index with none to all set, and x."""
    sure = torch.rand(B, L, 1, dtype=torch.float64) * 6
    logits = torch.randn(B, L, vocab, dtype=torch.float64) * sure
    logits[..., MASK] = -40.0
    mask_index = torch.rand(B, L) < torch.rand(B, 1) * 1.3
    mask_index[0], mask_index[1] = False, True
    mask_index[2] = torch.arange(L) == L // 2
    x = torch.where(mask_index, MASK, torch.randint(0, MASK, (B, L)))
    return logits, mask_index, x


def expect_transfer(got: tuple[Tensor, Tensor], case: Any, choose: Any) -> None:
    """(x0, transfer_index) of every request against choose(b, c, h) -> positions."""
    logits, mask_index, x = case
    x0, taken = got
    assert (x0.dtype, taken.dtype, x0.shape, taken.shape) == (
        *(torch.int64, torch.bool),
        *(x.shape, x.shape),
    )
    want_x0, want = x.clone(), torch.zeros_like(mask_index)
    for b, masked in enumerate(masked_rows(mask_index)):
        token, c, h = proposals(logits[b], masked)
        for i in masked:
            want_x0[b, i] = token[i]
        for i in choose(b, c, h):
            want[b, i] = True
    assert x0.tolist() == want_x0.tolist()
    assert taken.tolist() == want.tolist()
