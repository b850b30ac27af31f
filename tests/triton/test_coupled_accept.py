"""Universal coupling in Triton, interpreted, against the reference."""

from typing import Any

import pytest
import torch
from triton_cases import MORE, chance, one_of

import pydecode


def case(turn: int, B: int = 5) -> tuple[Any, ...]:
    M, V = one_of(0, 1, 2, 4, 6), one_of(1, 2, 3, 40, 127, 5003)
    draft = torch.randn(B, M, V) * 2
    verifier = draft + 0.5 * torch.randn(B, M, V)
    for x in (draft, verifier):
        r = torch.rand(x.shape)
        x[r < 0.05] = -torch.inf
        if V < 100:
            x[r > 0.98] = torch.inf
            x[(r > 0.977) & (r < 0.98)] = torch.nan
    dtypes = one_of(torch.bfloat16, torch.float16, torch.float32), torch.float32
    draft, verifier = draft.to(dtypes[0]), verifier.to(one_of(*dtypes))
    kwargs = dict(
        ratio=(1.0, 0.5, 0.0, torch.rand(B))[turn % 4],
        temperature=one_of(1.0, 0.3, 0.0, torch.rand(B).round(decimals=1)),
        seed=one_of(5, torch.randint(2**60, (B,))),
        offset=2**33 + turn,
        positions=one_of(None, torch.randint(10**6, (B, M))),
    )
    return draft, verifier, kwargs


@pytest.mark.parametrize("turn", range(12 * MORE))
def test_decides_as_the_reference(turn: int) -> None:
    draft, verifier, kwargs = case(turn)
    drawing = {name: kwargs[name] for name in ("temperature", "seed", "offset", "positions")}
    drafted = pydecode.sample_and_score(
        draft, **drawing, sampler="gumbel", backend="reference"
    ).tokens
    kwargs["force_first"] = chance(0.5)
    args = (draft, verifier, drafted)
    want = pydecode.coupled_accept(*args, **kwargs, backend="reference")
    got = pydecode.coupled_accept(*args, **kwargs, backend="triton")
    assert got.dtype == want.dtype
    assert (got != want).sum() <= (draft.shape[2] > 1000)  # a near-tie among so many
    assert len(got) == len(want)


def test_own_drafts_meet_their_own_noise() -> None:
    """At ratio 1 all is accepted, to the bit: what drafted is what verifies."""
    draft, verifier = torch.randn(2, 6, 5003).half(), torch.randn(2, 6, 5003).half()
    given: dict[str, Any] = dict(temperature=0.7, seed=3, offset=9, backend="triton")
    drafted = pydecode.sample_and_score(draft, sampler="gumbel", **given).tokens
    accepted = pydecode.coupled_accept(
        draft, verifier, drafted, ratio=1.0, force_first=False, **given
    )
    assert accepted.tolist() == [6, 6]
    other = dict(given, seed=4)
    redrawn = pydecode.coupled_accept(
        draft, verifier, drafted, ratio=1.0, force_first=False, **other
    )
    assert (redrawn < 6).all()


def test_a_request_alone_and_in_any_batch() -> None:
    draft, verifier = torch.randn(5, 4, 4500), torch.randn(5, 4, 4500)
    seeds = torch.arange(5)
    given: dict[str, Any] = dict(sampler="gumbel", temperature=0.5, backend="triton")
    drafted = pydecode.sample_and_score(draft, seed=seeds, **given).tokens
    del given["sampler"]
    many = pydecode.coupled_accept(draft, verifier, drafted, ratio=0.6, seed=seeds, **given)
    one = slice(4, 5)
    alone = pydecode.coupled_accept(
        draft[one], verifier[one], drafted[one], ratio=0.6, seed=seeds[one], **given
    )
    assert torch.equal(alone, many[one])
