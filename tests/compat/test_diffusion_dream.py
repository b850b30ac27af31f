"""Dream's sampler against its law, enumerated; and what it returns."""

import math
from typing import Any

import pytest
import scipy.stats
import torch
from peer_diffusion import dream_law

from pydecode.compat.diffusion.dream import sample_tokens

FILTERS = [(None, None), (0.8, None), (None, 4), (0.85, 3), (0.5, 20), (1.0, 50)]


@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.7])
@pytest.mark.parametrize("dims", [(90,), (6, 15)])
def test_confidence(
    temperature: float, top_p: float | None, top_k: int | None, dims: tuple[int, ...]
) -> None:
    """p(x0), margin and negative entropy, all of the law that was sampled from."""
    logits = torch.randn(*dims, 12, dtype=torch.float64) * 2
    how: dict[str, Any] = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=3)
    p_x0, x0 = sample_tokens(logits, **how)
    margin, _ = sample_tokens(logits, margin_confidence=True, **how)
    entropy, _ = sample_tokens(logits, neg_entropy=True, **how)
    both, _ = sample_tokens(logits, margin_confidence=True, neg_entropy=True, **how)
    assert torch.equal(both, entropy)
    assert (p_x0.dtype, x0.dtype, x0.shape) == (torch.float64, torch.int64, dims)
    flat = zip(*(y.flatten().tolist() for y in (p_x0, x0, margin, entropy)))
    for row, (p, v, m, h) in zip(logits.flatten(0, -2), flat):
        law = dream_law(row, temperature, top_p, top_k)
        first, second, *_ = [*sorted(law.values(), reverse=True), 0.0]
        assert v == int(row.argmax()) or temperature > 0
        assert p == pytest.approx(law[v], abs=1e-9)
        assert m == pytest.approx(first - second, abs=1e-9)
        assert h == pytest.approx(sum(q * math.log(q) for q in law.values()), abs=1e-9)


@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
def test_tokens_follow_the_law(top_p: float | None, top_k: int | None) -> None:
    row = torch.tensor([0.0, 1.0, 2.2, -1.0, 2.0, 0.5, -2.0], dtype=torch.float64)
    torch.manual_seed(21)
    _, x0 = sample_tokens(row.expand(6000, 7), 1.3, top_p, top_k)
    law = dream_law(row, 1.3, top_p, top_k)
    assert set(x0.tolist()) == set(law)
    counts = [(x0 == v).sum().item() for v in law]
    assert scipy.stats.chisquare(counts, [6000 * q for q in law.values()]).pvalue > 1e-4


def test_sampler_conventions() -> None:
    """The confidence's dtype is the logits', which their index_put needs; torch's generator."""
    logits = torch.randn(8, 12)
    for dtype in (torch.float32, torch.bfloat16):
        assert sample_tokens(logits.to(dtype), 0.5, 0.9, 3)[0].dtype == dtype
    torch.manual_seed(4)
    first = sample_tokens(logits.expand(3, 8, 12), 5.0)[1]
    assert not torch.equal(first, sample_tokens(logits.expand(3, 8, 12), 5.0)[1])
    torch.manual_seed(4)
    assert torch.equal(first, sample_tokens(logits.expand(3, 8, 12), 5.0)[1])
    assert torch.equal(sample_tokens(logits, top_k=0)[1], logits.argmax(-1))  # IndexError there
