"""Unmasking in Triton, interpreted: decisions of the reference, in two launches."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode.reference import sample_and_score as scoring
from pydecode.reference import unmask as reference_module
from pydecode.reference.unmask import unmask as reference

RULES = (
    *("top_k", "threshold", "factor", "entropy", "entropy_bound"),
    *("prefix", "sequential", "segments", "posterior", "external"),
)
MASK = 9


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference_module, "unmask", refuse)
    monkeypatch.setattr(scoring, "sample_and_score", refuse)


def flat(result: Any, proposed: bool) -> list[Tensor]:
    return [*result[0], result[1]] if proposed else list(result)


def expect_alike(*args: Any, **kwargs: Any) -> list[Tensor]:
    """All integers are the reference's. Inputs are such that no decision hangs on a rounding."""
    proposed = kwargs.get("return_proposals", False)
    got = flat(pydecode.unmask(*args, **kwargs, backend="triton"), proposed)
    with pytest.MonkeyPatch.context() as change:
        change.setattr(reference_module, "unmask", reference)
        want = flat(pydecode.unmask(*args, **kwargs, backend="reference"), proposed)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        if x.dtype.is_floating_point:
            torch.testing.assert_close(x, y, rtol=4e-6, atol=4e-6)
        else:
            assert torch.equal(x, y)
    return got


def example(
    B: int, L: int, rows: int, V: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """One peak a row; those of a request are half a unit apart or more, so that confidences are
    far from each other, and few numbers in all, so that none comes near a threshold by chance."""
    tokens = torch.where(torch.rand(B, L) < 0.7, MASK, torch.randint(0, 9, (B, L)))
    logits = torch.zeros(B, rows, V + 3)
    level = 1 + torch.rand(B, rows, 1).argsort(1) / 2
    logits.scatter_(-1, torch.randint(0, V, (B, rows, 1)), level)
    logits[..., V:] = torch.nan
    logits[torch.rand(B, rows) < 0.05] = torch.nan
    logits[torch.rand(B, rows) < 0.05] = -torch.inf
    return tokens, logits.to(dtype)[..., :V]


def rule_numbers(rule: str, B: int, L: int) -> dict[str, Any]:
    each: dict[str, Any] = dict(
        k=torch.randint(0, L + 2, (B,)),
        threshold=torch.randint(0, 15, (B,)) / (5 if "entropy" in rule else 16),
        slack=torch.randint(0, 3, (B,)) / 16,
        factor=torch.randint(0, 32, (B,)) / 16,
        low=torch.randint(0, 8, (B,)) / 16,
        keep=torch.rand(B),
    )
    if rule == "external":
        each["external_score"] = torch.rand(B, L)
    return dict(each, rule=rule, mask_id=MASK)


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    B, L, V = 7, 7, 40
    seeds = torch.arange(B) * 2**33
    options: tuple[dict[str, Any], ...] = (
        dict(dtype=torch.float32),
        dict(dtype=torch.bfloat16, strict=True, max_commit=2, return_proposals=True),
        dict(dtype=torch.float16, min_commit=0, confidence="margin", masked=torch.rand(B, L) < 0.5),
    )
    for more in options:
        tokens, logits = example(B, L, L, V, more.pop("dtype"))
        expect_alike(tokens, logits, **rule_numbers(rule, B, L), **more, seed=seeds)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("length", "extra"), [(4, None), (4, 0), (4, 1), (12, None), (9, 0)])
def test_windows(length: int, extra: int | None, shift: int) -> None:
    """The whole, the window's rows, or one more; the window begins before, in or after the row."""
    B, L, V = 5, 9, 30
    rows = L if extra is None else length + extra * shift
    tokens, logits = example(B, L, rows, V)
    starts = torch.tensor([0, -2, 3, 7, 40])
    bias = dict(bias_ids=torch.randint(-1, V, (B, rows, 2)), bias=5 * torch.randn(B, rows, 2))
    for start in (starts, starts[2], 2):
        got = expect_alike(
            tokens, logits, mask_id=MASK, window=(start, length), shift=shift, k=2, **bias
        )
        assert got[2].sum() > 0


def test_sampling_belongs_to_the_position() -> None:
    """Draws, positions and grammar are the position's, whatever row its logits come from."""
    B, L, V = 4, 8, 50
    tokens, logits = example(B, L, L, V)
    allowed = torch.randint(-(2**31), 2**31 - 1, (B, L, 2), dtype=torch.int32)
    sampling: tuple[dict[str, Any], ...] = (
        dict(temperature=torch.tensor([0.0, 0.5, 1.0, 2.0]), uniforms=torch.rand(B, L)),
        dict(temperature=1.0, seed=5, offset=3, allowed=allowed),
        dict(temperature=1.0, sampler="gumbel", positions=torch.randint(0, 99, (B, L))),
        dict(temperature=0.7, top_k=4, top_p=torch.rand(B), tempered=True, exclude_ids=[1, 2]),
        dict(temperature=0.7, min_p=0.3, sampler="gumbel", filter_order="joint", top_p=0.9),
    )
    for number, more in enumerate(sampling):
        kwargs = dict(mask_id=MASK, window=(2, 5), shift=number % 2, k=3, return_proposals=True)
        expect_alike(tokens, logits, **kwargs, **more)


def test_nothing_else_is_read() -> None:
    """Rows that are not masked or outside the window may be anything; the mask is never chosen."""
    tokens, logits = example(3, 6, 6, 20)
    logits[:, :, MASK] = 100.0
    logits[tokens != MASK] = torch.nan
    logits[:, 4:] = torch.nan
    for rule in ("top_k", "prefix"):
        got = expect_alike(tokens, logits, mask_id=MASK, rule=rule, window=(0, 4), k=4)
        assert (got[0][got[1]] != MASK).all()


@pytest.mark.parametrize("rule", ["segments", "threshold"])
def test_out(rule: str) -> None:
    """Fresh, of any strides, or the tokens themselves: rows read what has not been written."""
    tokens, logits = example(4, 10, 10, 30)
    kwargs = dict(rule_numbers(rule, 4, 10), return_proposals=True, backend="triton")
    want = flat(pydecode.unmask(tokens, logits, **kwargs), True)
    strided = torch.full((10, 4), -7).T
    for out in (strided, tokens.clone(), tokens.T.contiguous().T):
        given = out if out is not strided else tokens
        result, proposals = pydecode.unmask(given, logits, **kwargs, out=out)
        assert result.tokens is out
        for x, y in zip((*result, proposals), want):
            assert torch.equal(x, y)


def test_alone_or_in_a_batch() -> None:
    tokens, logits = example(5, 6, 6, 4200, torch.bfloat16)
    kwargs: dict[str, Any] = dict(mask_id=MASK, rule="threshold", temperature=0.8, backend="triton")
    seeds = torch.arange(5) + 2**50
    whole = pydecode.unmask(tokens, logits, **kwargs, seed=seeds)
    one = pydecode.unmask(tokens[3:4], logits[3:4], **kwargs, seed=seeds[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, one))


def test_a_long_window_and_a_real_vocabulary() -> None:
    tokens, logits = example(1, 80, 80, 20)
    expect_alike(tokens, logits, mask_id=MASK, rule="top_k", k=37)
    tokens, logits = example(1, 2, 2, 128256, torch.bfloat16)
    expect_alike(torch.full_like(tokens, MASK), logits, mask_id=MASK, k=1)


@pytest.mark.parametrize(("B", "L", "length"), [(0, 5, 5), (3, 0, 0), (3, 5, 0)])
def test_empty(B: int, L: int, length: int) -> None:
    tokens, logits = example(B, L, length, 20)
    window = (torch.zeros(B, dtype=torch.int64), length)
    expect_alike(tokens, logits, mask_id=MASK, window=window, return_proposals=True)
    got = expect_alike(tokens, logits, mask_id=MASK, window=window)
    assert got[2].tolist() == [0] * B


def test_what_cannot_run() -> None:
    tokens, logits = example(2, 4, 4, 20)
    call: dict[str, Any] = dict(mask_id=MASK, backend="triton")
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        pydecode.unmask(tokens, logits.double(), **call)
    wide = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        pydecode.unmask(tokens, logits, rule="external", external_score=wide, **call)
