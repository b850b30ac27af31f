"""``sample_and_score``: choices, confidences and log-sum-exps against fp64, and bad rows."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

INF = float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = ("probability", "margin", "neg_entropy")


def confidence_of(x: Tensor, tokens: Tensor, kind: str) -> Tensor:
    """The plain formula in x's own dtype."""
    p = x.softmax(-1)
    if kind == "probability":
        return p.gather(-1, tokens[..., None])[..., 0]
    if kind == "margin":
        best = p.sort(-1, descending=True).values
        return best[..., 0] - best[..., 1]
    return torch.where(p > 0, p * p.log(), 0).sum(-1)


def within_twice(got: Tensor, x: Tensor, plain: Any, scale: float) -> None:
    """At most twice the error of the plain formula in x's dtype, plus rounding at ``scale``."""
    exact, low = plain(x.double()), plain(x).double()
    if x.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
        return
    rounding = torch.finfo(got.dtype).eps * scale
    assert (got.double() - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(257,), (3, 1000), (2, 3, 100), (2, 2, 3, 33)])
def test_greedy(dtype: torch.dtype, kind: str, shape: tuple[int, ...], backend: str) -> None:
    logits = (4 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    got = pydecode.sample_and_score(logits, confidence=kind, backend=backend)
    want = (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)  # the first
    assert torch.equal(got.tokens, want)
    # a margin is a difference of probabilities up to 1, so rounds as they do
    scale = max(1.0, float(got.confidence.abs().max()))
    within_twice(got.confidence, logits, lambda x: confidence_of(x, want, kind), scale)
    within_twice(got.lse, logits, lambda x: x.logsumexp(-1), float(got.lse.abs().max()))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (got.tokens.dtype, got.confidence.dtype, got.lse.dtype) == (torch.int64, wide, wide)


def kept(p: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One row's filtered law, by DESIGN's words: top-k, top-p, min-p, renormalised after each."""
    if 0 < top_k < len(p):
        p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0)
        p = p / p.sum()
    if top_p < 1:
        above = torch.stack([p[p > value].sum() for value in p])
        p = torch.where(above < top_p, p, 0)
        p = p / p.sum()
    if min_p > 0:
        p = torch.where(p >= min_p * p.max(), p, 0)
        p = p / p.sum()
    return p


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tempered", [False, True])
def test_tempered_filtered_laws(kind: str, tempered: bool, backend: str) -> None:
    """Inverse CDF of the filtered law, and the confidence of the law that is asked for."""
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.7, 3.0])
    top_k, top_p = torch.tensor([4, 0, 5, 99, 1]), torch.tensor([0.9, 0.8, 1.0, 0.7, 0.5])
    min_p, u = torch.tensor([0.0, 0.1, 0.05, 0.0, 0.2]), torch.rand(5, 4, dtype=torch.float64)
    logits = torch.randn(5, 4, 12, dtype=torch.float64)
    logits[:, :, 7] = logits[:, :, 3]  # ties share their fate
    numbers = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = pydecode.sample_and_score(
        logits,
        **{name: x.double() if x.is_floating_point() else x for name, x in numbers.items()},
        confidence=kind,
        tempered=tempered,
        exclude_ids=[0, 5],
        uniforms=u,
        backend=backend,
    )
    for b in range(5):
        for i in range(4):
            x = logits[b, i].clone()
            x[0] = x[5] = -INF
            t, k, share, least = (float(number[b]) for number in numbers.values())
            p = kept((x / (t or 1.0)).softmax(-1), int(k), share, least)
            c = p.cumsum(0)
            token = int((c > u[b, i] * c[-1]).int().argmax()) if t else int(x.argmax())
            assert got.tokens[b, i] == token
            law = p.log() if tempered else x  # at T = 0 Dream's: filtered, not tempered
            want = confidence_of(law, torch.tensor(token), kind)
            torch.testing.assert_close(got.confidence[b, i], want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.lse[b, i], x.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocab", [5, 32, 33, 100])
def test_exclusions_and_grammars(vocab: int, backend: str) -> None:
    """An int, a list, tensors, a grammar's bits: all are logits of -inf."""
    logits = torch.randn(3, 2, vocab, dtype=torch.float64)
    given = dict(temperature=1.0, seed=4, backend=backend)

    def same(excluded: Tensor, **arguments: Any) -> None:
        want = pydecode.sample_and_score(logits.masked_fill(excluded, -INF), **given)
        for x, y in zip(pydecode.sample_and_score(logits, **given, **arguments), want):
            assert torch.equal(x, y)

    v = torch.arange(vocab)
    same(v == 4, exclude_ids=4)
    same((v == 4) | (v == 0), exclude_ids=(0, 4))
    same((v == 4) | (v == 0), exclude_ids=torch.tensor([4, -1, 0, vocab, 4]))
    same(v == 2, exclude_ids=torch.tensor(2, dtype=torch.int32))
    ids = torch.tensor([[1, -1], [2, 3], [-1, -1]])
    same((v == ids[:, None, :1]) | (v == ids[:, None, 1:]), exclude_ids=ids)
    allow = torch.rand(3, 2, vocab) < 0.5
    allow[..., 3] = True
    bits = torch.nn.functional.pad(allow, (0, -vocab % 32), value=True)  # tail bits mean nothing
    words = (bits.view(3, 2, -1, 32).long() << torch.arange(32)).sum(-1)
    same(~allow, allowed=(words - ((words >> 31) << 32)).int())


def test_bad_rows(backend: str) -> None:
    """NaN, nothing allowed, +inf, extreme temperatures: defined, and nobody else's business."""
    logits = torch.randn(9, 1, 6)
    logits[1, 0, 2], logits[2], logits[3, 0, 1::2] = torch.nan, -INF, INF
    logits[4] = torch.finfo(torch.float32).max
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, INF, 1e-40, torch.nan, -1.0])
    for sampler in ("inverse_cdf", "gumbel"):
        given = dict(temperature=temperature, sampler=sampler, seed=3, backend=backend)
        got = pydecode.sample_and_score(logits, **given)
        bad = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1, 1]).bool()[:, None]
        assert (got.tokens[bad] == -1).all()
        assert (got.confidence[bad] == -INF).all()
        assert ((got.tokens[~bad] >= 0) & (got.tokens[~bad] < 6)).all()
        assert got.lse[1].isnan()
        assert (got.lse[2], got.lse[3]) == (-INF, INF)
        assert got.tokens[3] in (1, 3, 5)
        assert got.confidence[3] == pytest.approx(1 / 3)
        assert got.confidence[4] == pytest.approx(1 / 6)
        assert got.tokens[6] == logits[6].argmax()  # a temperature that overflows l/T
        for greedy in (0.0, torch.tensor(0.0)):
            got = pydecode.sample_and_score(logits, **{**given, "temperature": greedy})
            assert got.tokens[:5, 0].tolist() == [int(logits[0].argmax()), -1, -1, 1, 0]
    grammar = torch.full((9, 1, 1), 0b1000, dtype=torch.int32)
    got = pydecode.sample_and_score(logits, exclude_ids=3, allowed=grammar, backend=backend)
    assert (got.tokens == -1).all()


def test_a_callers_uniforms(backend: str) -> None:
    """The smallest v with cumsum > u; no u, not even NaN or 1, leaves the support."""
    logits = torch.tensor([-INF, 1.0, 1.0, -INF, 1.0, 1.0, -INF]).expand(9, 7)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.75, 1.0, 2.0, -1.0, torch.nan])
    got = pydecode.sample_and_score(logits, temperature=1.0, uniforms=u, backend=backend)
    assert got.tokens.tolist() == [1, 1, 2, 4, 5, 5, 5, 1, 1]


@pytest.mark.parametrize("vocab", [1, 2])
def test_small_vocabularies(vocab: int, backend: str) -> None:
    logits = torch.zeros(2, 3, vocab)
    for kind, want in (("probability", 1 / vocab), ("margin", 2 - vocab)):
        got = pydecode.sample_and_score(logits, temperature=1.0, confidence=kind, backend=backend)
        assert (got.confidence == want).all()
    for sampler in ("inverse_cdf", "gumbel"):
        got = pydecode.sample_and_score(
            logits, temperature=1.0, sampler=sampler, confidence="neg_entropy", backend=backend
        )
        torch.testing.assert_close(got.confidence, torch.full((2, 3), -math.log(vocab)))
        assert ((got.tokens >= 0) & (got.tokens < vocab)).all()


def test_padded_vocabularies_and_strides(backend: str) -> None:
    padded = torch.full((2, 3, 40), torch.nan)
    logits = torch.randn(2, 3, 37)
    padded[..., :37] = logits
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    for sampler in ("inverse_cdf", "gumbel"):
        given = dict(temperature=0.8, sampler=sampler, seed=9, confidence="neg_entropy")
        want = pydecode.sample_and_score(logits, backend=backend, **given)
        for view in (padded[..., :37], turned):
            for x, y in zip(pydecode.sample_and_score(view, backend=backend, **given), want):
                assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (0, 0, 5)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    for sampler in ("inverse_cdf", "gumbel"):
        got = pydecode.sample_and_score(
            torch.randn(shape), temperature=1.0, top_k=2, sampler=sampler, backend=backend
        )
        assert got.tokens.shape == got.confidence.shape == got.lse.shape == shape[:-1]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "logits: expected a tensor, got list", dict(logits=[0.0])),
        (TypeError, "logits: expected dtype float16", dict(logits=torch.zeros(2, 5).long())),
        (ValueError, "logits: expected the last dimension", dict(logits=torch.zeros(5, 2).T)),
        (ValueError, r"logits: expected \[..., V\]", dict(logits=torch.tensor(0.0))),
        (ValueError, "confidence: expected one of", dict(confidence="entropy")),
        (ValueError, "sampler: expected one of", dict(sampler="multinomial")),
        (ValueError, "uniforms: expected None", dict(sampler="gumbel", uniforms=torch.rand(2))),
        (ValueError, "uniforms: expected shape", dict(uniforms=torch.rand(2, 1))),
        (ValueError, "positions: expected shape", dict(positions=torch.zeros(3).long())),
        (TypeError, "positions: expected dtype", dict(positions=torch.zeros(2))),
        (ValueError, "temperature: expected a number, got nan", dict(temperature=math.nan)),
        (ValueError, r"seed: expected 0-d or \[B\]", dict(seed=torch.zeros(3).long())),
        (TypeError, "seed: expected an integer", dict(seed=1.5)),
        (TypeError, "exclude_ids: expected an int", dict(exclude_ids=["a"])),
        (ValueError, r"exclude_ids: expected shape", dict(exclude_ids=torch.zeros(3, 1).long())),
        (ValueError, r"exclude_ids: expected a token id in \[0, 5\)", dict(exclude_ids=-1)),
        (TypeError, "allowed: expected dtype int32", dict(allowed=torch.zeros(2, 1).long())),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pydecode.sample_and_score(**{"logits": torch.zeros(2, 5), **change})


def test_checks_find_bad_ids() -> None:
    with pydecode.checks(True), pytest.raises(ValueError, match=r"exclude_ids: .* got 5 at"):
        pydecode.sample_and_score(torch.zeros(2, 5), exclude_ids=torch.tensor([-1, 5]))
