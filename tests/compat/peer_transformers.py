"""What transformers documents, in plain loops: speculative sampling, and the law of a text."""

import itertools
from typing import Any

import torch
from torch import Tensor


def speculative_sampling(
    candidates: list[int],
    q: list[list[float]],
    p: list[list[float]],
    uniforms: list[float],
    weight: float | None = None,
    is_done: bool = False,
) -> tuple[list[int], int]:
    """(valid tokens, matches) of G candidates with laws q [G][V] and p [G+1][V].

    Candidate i stays while its coin is below v/q, v = w p + (1 - w) q; the last uniform picks the
    token after them by inverse CDF. Never a token of probability 0, never a division by 0.
    """
    w = 1.0 if weight is None else weight
    kept: list[int] = []
    for i, x in enumerate(candidates):
        relaxed = w * p[i][x] + (1 - w) * q[i][x]
        if not (p[i][x] > 0 and q[i][x] > 0 and uniforms[i] * q[i][x] < relaxed):
            law = [max(a - b, 0.0) for a, b in zip(p[i], q[i])]
            return [*kept, inverse_cdf(law if sum(law) > 0 else p[i], uniforms[-1])], len(kept)
        kept.append(x)
    if is_done:
        return kept, len(kept) - 1
    return [*kept, inverse_cdf(p[-1], uniforms[-1])], len(kept)


def inverse_cdf(law: list[float], u: float) -> int:
    total, below = sum(law), 0.0
    for v, mass in enumerate(law):
        below += mass
        if below > u * total:
            return v
    raise AssertionError("a law without mass")


@torch.no_grad()
def text_law(model: Any, prompt: list[int], depth: int, processors: Any = None) -> Tensor:
    """The exact joint law [V] * depth of the next tokens, by forwards over every continuation."""
    V = model.config.vocab_size
    law = torch.ones(1)
    for n in range(depth):
        ids = torch.tensor([[*prompt, *c] for c in itertools.product(range(V), repeat=n)])
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        if processors is not None:
            logits = processors(ids, logits)
        law = (law[:, None] * logits.softmax(-1)).flatten()
    return law


def p_value(tokens: Tensor, law: Tensor, V: int) -> float:
    """Chi-square of texts [rows, depth] against their joint law, small cells merged."""
    from scipy import stats

    index = (tokens * V ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1)
    seen = torch.bincount(index, minlength=law.numel()).double()
    if bool((seen[law == 0] > 0).any()):
        return 0.0  # what cannot be was seen
    expected = law.double() / law.sum() * len(tokens)
    small = expected < 8
    seen = torch.cat([seen[~small], seen[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    expected = expected[keep] * (seen[keep].sum() / expected[keep].sum())
    return float(stats.chisquare(seen[keep].numpy(), expected.numpy()).pvalue)
