"""``sample_and_score``'s draws: their laws by chi-square, their keys, and batch independence."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import pydecode
from pydecode import philox

ALPHA = 1e-4


def skewed(vocab: int) -> Tensor:
    """A fixed law with a head and a long tail."""
    return 2.5 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))


def pvalue(tokens: Tensor, law: Tensor) -> float:
    """Chi-square of the tokens against the law; cells under 10 expected are merged into one."""
    expected = law.double() * tokens.numel()
    seen = torch.bincount(tokens.flatten(), minlength=len(law)).double()
    assert (seen[law == 0] == 0).all()
    few = expected < 10
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    seen = torch.cat([seen[~few], seen[few].sum()[None]])
    real = expected > 0
    return float(stats.chisquare(seen[real], expected[real] * (seen.sum() / expected.sum())).pvalue)


@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel"])
@pytest.mark.parametrize(("vocab", "N"), [(50, 20000), (1000, 4000)])
def test_frequencies(sampler: str, vocab: int, N: int, backend: str) -> None:
    logits = skewed(vocab)
    filters = dict(top_k=40, top_p=0.95, min_p=0.002)
    for arguments in (dict(temperature=0.7), dict(filters, temperature=1.4)):
        law = (logits.double() / arguments["temperature"]).softmax(-1)
        if len(arguments) > 1:
            law = torch.where(law >= law.sort(descending=True).values[39], law, 0)
            law = law / law.sum()
            above = (law[None, :] * (law[None, :] > law[:, None])).sum(-1)
            law = torch.where(above < 0.95, law, 0)
            law = torch.where(law >= 0.002 * law.max(), law, 0)
            law = law / law.sum()
        got = pydecode.sample_and_score(
            logits.expand(N, vocab),
            sampler=sampler,
            seed=12,
            offset=3,
            backend=backend,
            **arguments,
        )
        assert pvalue(got.tokens, law) > ALPHA
        assert pvalue(got.tokens, (2 * logits.double()).softmax(-1)) < ALPHA  # the negative control


@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel"])
def test_keys_are_independent(sampler: str, backend: str) -> None:
    """Tokens of one request at neighbouring positions, offsets and seeds: chi-square on pairs."""
    N = 100_000
    logits, law = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])), torch.tensor([0.4, 0.3, 0.2, 0.1])
    pairs = (law[:, None] * law).flatten()

    def draw(**keys: object) -> Tensor:
        given = dict(temperature=1.0, sampler=sampler, backend=backend, **keys)
        return pydecode.sample_and_score(logits.expand(1, N, 4), **given).tokens[0]

    one = draw(seed=1)
    assert pvalue(one[:-1] * 4 + one[1:], pairs) > ALPHA
    for other in (draw(seed=2), draw(seed=1, offset=1), draw(seed=1, offset=2**33)):
        assert pvalue(one * 4 + other, pairs) > ALPHA
    assert pvalue(one * 4 + draw(seed=1, offset=2**33 - 2**33), pairs) < ALPHA  # the same key


def test_draws_are_the_page_philox(backend: str) -> None:
    """One uniform of the DRAFT stream a row; Gumbel noise by position and token."""
    logits = torch.randn(3, 4, 21, dtype=torch.float64)
    seed, offset = torch.tensor([5, -6, 2**40]), torch.tensor([0, 2**35, 7])
    position = torch.randint(0, 2**31, (3, 4))
    given = dict(temperature=0.7, seed=seed, offset=offset, positions=position, backend=backend)
    keys = (seed[:, None], offset[:, None], position)
    u = philox.uniform(philox.DRAFT, *keys, torch.zeros((), dtype=torch.int64))
    p = (logits / 0.7).softmax(-1)
    want = (p.cumsum(-1) > u[..., None]).int().argmax(-1)
    assert torch.equal(pydecode.sample_and_score(logits, **given).tokens, want)
    g = philox.gumbel(philox.DRAFT, *keys, 21)
    got = pydecode.sample_and_score(logits, sampler="gumbel", **given)
    assert torch.equal(got.tokens, (logits / 0.7 + g).argmax(-1))
    got = pydecode.sample_and_score(logits, confidence="random", **given)
    index = torch.zeros((), dtype=torch.int64)
    want = philox.uniform(philox.RANDOM_CONFIDENCE, *keys, index)
    assert torch.equal(got.confidence, want.double())


def test_default_positions(backend: str) -> None:
    """[B, V]: a row a request, at position 0; [B, L, V]: the index in L; the rest belongs to B."""
    for sampler in ("inverse_cdf", "gumbel"):
        given = dict(temperature=1.0, sampler=sampler, backend=backend)

        def draw(shape: tuple[int, ...], given: dict = given, **keys: object) -> Tensor:
            return pydecode.sample_and_score(torch.zeros(*shape, 997), **given, **keys).tokens

        flat = draw((6,), seed=3)
        assert torch.equal(flat[:, None], draw((6, 1), seed=3))
        assert torch.equal(draw((), seed=3), flat[0])
        rows = draw((6, 5), seed=3)
        assert torch.equal(rows[:, 0], flat)
        assert torch.equal(rows, draw((2, 3, 5), seed=3).reshape(6, 5))
        assert torch.equal(rows, draw((6, 5), seed=torch.tensor(3)))
        at = torch.arange(5).expand(6, 5)
        assert torch.equal(rows, draw((6, 5), seed=3, positions=at.int()))
        # a scalar seed is mixed with the request's index, in the high word
        assert torch.equal(rows, draw((6, 5), seed=3 + (torch.arange(6) << 32)))
        assert len(set(flat.tolist())) > 3
        alike = draw((6, 5), seed=torch.full((6,), 3))
        assert torch.equal(alike, rows[:1].expand(6, 5))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sampler", ["inverse_cdf", "gumbel"])
def test_a_request_is_alone_in_any_batch(sampler: str, threads: int, backend: str) -> None:
    """Bit for bit, with [B] seeds; one row of a large vocabulary included."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        B, vocab = 3, 40001  # long enough for PyTorch to split a sum over threads
        logits, seed = torch.randn(B, 1, vocab), torch.tensor([4, 5, 6])
        given = dict(temperature=0.9, top_p=0.9, min_p=1e-4, sampler=sampler, backend=backend)
        given.update(confidence="neg_entropy", offset=8)
        whole = pydecode.sample_and_score(logits, seed=seed, **given)
        order = torch.tensor([2, 0, 1])
        for x, y in zip(whole, pydecode.sample_and_score(logits[order], seed=seed[order], **given)):
            assert torch.equal(x[order], y)
        for b in range(B):
            one = slice(b, b + 1)
            alone = pydecode.sample_and_score(logits[one], seed=seed[one], **given)
            for x, y in zip(whole, alone):
                assert torch.equal(x[one], y)
    finally:
        torch.set_num_threads(before)


def test_random_confidence_is_uniform(backend: str) -> None:
    got = pydecode.sample_and_score(
        torch.randn(2000, 4, 3), temperature=1.0, confidence="random", seed=6, backend=backend
    )
    assert stats.kstest(got.confidence.flatten(), "uniform").pvalue > ALPHA
    # it knows nothing of the token: another stream than the sampler's
    means = [got.confidence[got.tokens == v].mean() for v in range(3)]
    assert max(abs(m - 0.5) for m in means) < 5 * math.sqrt(1 / 12 / 2000)
