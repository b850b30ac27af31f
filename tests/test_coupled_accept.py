"""``coupled_accept``: APD's universal coupling, its noise, its laws, and bad rows."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import pydecode
from pydecode import philox

ALPHA = 1e-4


def drafted(logits: Tensor, **keys: Any) -> Tensor:
    return pydecode.sample_and_score(logits, sampler="gumbel", **keys).tokens


def law(seed: int, vocab: int) -> Tensor:
    return torch.randn(vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("force_first", [False, True])
def test_is_the_loop(force_first: bool, backend: str) -> None:
    """Position by position in fp64, with every key and number a tensor of the request."""
    B, M, V = 6, 5, 11
    draft, verifier = torch.randn(2, B, M, V, dtype=torch.float64)
    keys = dict(
        seed=torch.arange(B) * 31 - 2,
        offset=torch.arange(B) * 2**33,
        positions=torch.randint(0, 1000, (B, M)),
        temperature=torch.tensor([0.0, 0.3, 1.0, 1.0, 2.0, 0.7], dtype=torch.float64),
    )
    ratio = torch.tensor([0.5, 0.0, 1.0, 0.9, 0.95, 0.8], dtype=torch.float64)
    tokens = drafted(draft, **keys)
    tokens[5, 2] = -1
    got = pydecode.coupled_accept(
        draft, verifier, tokens, ratio=ratio, force_first=force_first, backend=backend, **keys
    )
    assert got.dtype == torch.int32
    for b in range(B):
        want = 0
        for i in range(M):
            mixed = ratio[b] * draft[b, i] + (1 - ratio[b]) * verifier[b, i]
            if keys["temperature"][b] > 0:
                at = (keys["seed"][b], keys["offset"][b], keys["positions"][b, i])
                mixed = mixed / keys["temperature"][b] + philox.gumbel(philox.DRAFT, *at, V)
            same = int(mixed.argmax()) == tokens[b, i] or (force_first and i == 0)
            if not same:
                break
            want += 1
        assert got[b] == want
    assert got[2] == M


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_draft_alone_is_accepted_whole(dtype: torch.dtype, backend: str) -> None:
    """R = 1 regenerates the draft's own noise bit for bit, whatever the verifier rules out."""
    draft, verifier = torch.randn(2, 10, 25, 101).to(dtype)
    verifier[:, ::2, :100] = -torch.inf
    for temperature in (0.0, 0.6, 1.0, 3.0):
        keys = dict(temperature=temperature, seed=11, offset=torch.tensor(5))
        tokens = drafted(draft, **keys)
        given = dict(keys, force_first=False, backend=backend)
        got = pydecode.coupled_accept(draft, verifier, tokens, ratio=1.0, **given)
        assert got.tolist() == [25] * 10
        if temperature > 0:  # the negative control: other noise
            given["offset"] = torch.tensor(6)
            got = pydecode.coupled_accept(draft, verifier, tokens, ratio=1.0, **given)
            assert got.float().mean() < 5


@pytest.mark.parametrize("R", [0.0, 0.5])
def test_match_frequency(R: float, backend: str) -> None:
    """P(x = y) = sum_x 1 / sum_y max(p_y / p_x, q_y / q_x) (ALGORITHMS D.6), within 4 sigma."""
    N, T = 20000, 0.8
    for vocab in (3, 12):
        l_draft, l_verifier = law(1, vocab), law(2, vocab)
        q = (l_draft / T).softmax(-1)
        p = ((R * l_draft + (1 - R) * l_verifier) / T).softmax(-1)
        ratios = torch.maximum(p[None, :] / p[:, None], q[None, :] / q[:, None])
        want = float((1 / ratios.sum(-1)).sum())
        keys = dict(temperature=T, seed=404)
        draft = l_draft.expand(N, 1, vocab)
        got = pydecode.coupled_accept(
            draft,
            l_verifier.expand(N, 1, vocab),
            drafted(draft, **keys),
            ratio=R,
            force_first=False,
            backend=backend,
            **keys,
        )
        sigma = math.sqrt(want * (1 - want) / N)
        assert abs(float(got.double().mean()) - want) < 4 * sigma
        independent = float((p * q).sum())  # the negative control: fresh noise matches so often
        assert want - independent > 40 * sigma


def test_the_mixture_is_sampled(backend: str) -> None:
    """y follows p_D^R p_A^(1-R): P(accept v) with v proposed blindly is the mixture's p(v)."""
    N, vocab, R = 40000, 5, 0.3
    l_draft, l_verifier = law(3, vocab), law(4, vocab)
    proposed = torch.arange(N)[:, None] % vocab
    got = pydecode.coupled_accept(
        l_draft.expand(N, 1, vocab),
        l_verifier.expand(N, 1, vocab),
        proposed,
        ratio=R,
        force_first=False,
        seed=9,
        backend=backend,
    )
    seen = torch.bincount(proposed[got == 1, 0], minlength=vocab).double()
    p = (R * l_draft + (1 - R) * l_verifier).softmax(-1)
    tries = N / vocab
    z = (seen - p * tries) / (p * (1 - p) * tries).sqrt()
    assert stats.chi2(vocab).sf(float((z**2).sum())) > ALPHA


def test_the_verifier_alone_at_temperature_zero(backend: str) -> None:
    """R = 0, T = 0: the length of agreement with the verifier's greedy choices."""
    verifier = torch.randn(3, 6, 9)
    tokens = verifier.argmax(-1)
    tokens[0, 4], tokens[1, 0] = (tokens[0, 4] + 1) % 9, (tokens[1, 0] + 1) % 9
    given = dict(ratio=0.0, temperature=0.0, backend=backend)
    draft = torch.randn(3, 6, 9)
    got = pydecode.coupled_accept(draft, verifier, tokens, force_first=False, **given)
    assert got.tolist() == [4, 0, 6]
    got = pydecode.coupled_accept(draft, verifier, tokens.int(), **given)
    assert got.tolist() == [4, 6, 6]


def test_bad_rows(backend: str) -> None:
    """NaN, disjoint supports and ids outside the vocabulary end the prefix, the first one too."""
    draft, verifier = torch.randn(8, 4, 5), torch.randn(8, 4, 5)
    tokens = drafted(draft, temperature=1.0, seed=2)
    ratio = torch.ones(8)
    draft[0, 2, 1] = verifier[1, 1, 0] = draft[2, 0, 3] = torch.nan
    draft[3, 3] = -torch.inf
    tokens[4, 1], tokens[5, 0] = 5, -1
    ratio[6] = 0.5
    draft[6, :, :2] = verifier[6, :, 2:] = -torch.inf
    ratio[7] = torch.nan
    got = pydecode.coupled_accept(draft, verifier, tokens, ratio=ratio, seed=2, backend=backend)
    assert got.tolist() == [2, 1, 0, 3, 1, 0, 0, 0]


def test_a_request_is_alone_in_any_batch(backend: str) -> None:
    draft, verifier = torch.randn(6, 9, 50), torch.randn(6, 9, 50)
    seed = torch.tensor([1, 2, 3, 1 << 40, 5, 1])
    tokens = drafted(draft, temperature=1.0, seed=seed)
    given = dict(ratio=0.9, backend=backend)
    whole = pydecode.coupled_accept(draft, verifier, tokens, seed=seed, **given)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    other = pydecode.coupled_accept(
        draft[order], verifier[order], tokens[order], seed=seed[order], **given
    )
    assert torch.equal(whole[order], other)
    # a scalar seed is mixed with the batch index, as the draft's was
    tokens = drafted(draft, temperature=1.0, seed=8)
    got = pydecode.coupled_accept(draft, verifier, tokens, seed=8, **{**given, "ratio": 1.0})
    assert got.tolist() == [9] * 6


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 1)])
def test_empty_and_one_entry(shape: tuple[int, int, int], backend: str) -> None:
    draft = torch.randn(shape)
    got = pydecode.coupled_accept(draft, draft, torch.zeros(shape[:2]).long(), backend=backend)
    assert got.tolist() == [shape[1]] * shape[0]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "draft_logits: expected 3 dimensions", dict(draft_logits=torch.zeros(2, 5))),
        (ValueError, "verifier_logits: expected shape", dict(verifier_logits=torch.zeros(2, 3, 6))),
        (ValueError, r"tokens: expected shape \[B, M\]", dict(tokens=torch.zeros(2, 4).long())),
        (ValueError, "ratio: expected at most 1, got 1.5", dict(ratio=1.5)),
        (ValueError, "ratio: expected at least 0", dict(ratio=-0.5)),
        (ValueError, "temperature: expected at least 0", dict(temperature=-1)),
        (ValueError, "positions: expected shape", dict(positions=torch.zeros(3).long())),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given = dict(
        draft_logits=torch.zeros(2, 3, 5),
        verifier_logits=torch.zeros(2, 3, 5),
        tokens=torch.zeros(2, 3).long(),
    )
    with pytest.raises(error, match=message):
        pydecode.coupled_accept(**{**given, **change})
    with pydecode.checks(True), pytest.raises(ValueError, match=r"tokens: .* got 5 at"):
        pydecode.coupled_accept(**{**given, "tokens": torch.full((2, 3), 5)})
