"""``compat.flashinfer``'s chains against FlashInfer's semantics, and where those have faults."""

import math
from typing import Any

import numpy as np
import peer_flashinfer as peer
import pytest
import torch
from scipy import stats
from torch import Tensor

import pydecode
from pydecode.compat.flashinfer import chain_speculative_sampling

V = 7


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laws(*shape: int) -> Tensor:
    """Rows in fp64 with zeros in them, so that decisions have no rounding to hide behind."""
    x = torch.rand(*shape, V).double().masked_fill(torch.rand(*shape, V) < 0.3, 0.0)
    x[..., 2] += 0.1
    return x / x.sum(-1, keepdim=True)


def drawn_from(q: Tensor) -> Tensor:
    return torch.multinomial(q.flatten(0, 1), 1).view(q.shape[:2])


@pytest.mark.parametrize("n", [0, 1, 4])
def test_chains_equal_the_peers(n: int) -> None:
    """Thousands of chains with draws that are known, padding and impossible drafts among them."""
    B = 1500
    q, p = laws(B, n), laws(B, n + 1)
    q[::3] = p[::3, :n]  # many acceptances
    ids = torch.where(torch.rand(B, n) < 0.2, torch.randint(-1, V + 1, (B, n)), drawn_from(q))
    given = [x.clone() for x in (q, ids, p)]
    got = chain_speculative_sampling(q, ids.int(), p, generator=generator())
    u = torch.rand(B, n + 1, generator=generator())
    want = [
        peer.verify_chain(q[b].numpy(), ids[b].tolist(), p[b].numpy(), u[b].tolist())
        for b in range(B)
    ]
    for x, y in zip(got, zip(*want)):
        assert x.dtype == torch.int32
        assert x.tolist() == list(y)
    assert all(torch.equal(x, y) for x, y in zip((q, ids, p), given))
    if n == 4:  # the batch has what it should: every length, and later drafts that would pass
        assert set(got[2].tolist()) == {0, 1, 2, 3, 4}
        assert (got[1] > got[2]).sum() > 100


def one(q: list[Any], ids: list[int], p: list[Any], **more: Any) -> tuple[list[int], int, int]:
    q_, p_ = (torch.tensor([x], dtype=torch.float64) for x in (q, p))
    tokens, accepted, emitted = chain_speculative_sampling(q_, torch.tensor([ids]), p_, **more)
    return tokens[0].tolist(), int(accepted), int(emitted)


def test_padding_is_no_index() -> None:
    """A draft of -1 ends the chain; a port reads the element before the row (the last token's)."""
    q, p = [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert one(q, [2, -1], p) == ([2, 1, -1], 1, 1)
    assert one(q, [-1, 2], p) == ([2, -1, -1], 0, 0)
    assert one(q, [2, 3], p) == ([2, 1, -1], 1, 1)
    naive = peer.verify_chain(np.array(q), [-1, 2], np.array(p), [0.5] * 3, naive=True)
    assert naive[0] == [-1, 1, -1]  # "accepted", and the rest is shifted


def test_a_residual_of_zeros() -> None:
    """Equal laws whose draft is impossible: nothing is left of p - q, so p itself is drawn from."""
    law = [0.0, 0.25, 0.75]
    for seed in range(20):
        tokens, _, emitted = one([law], [0], [law, law], generator=generator(seed))
        assert emitted == 0
        assert tokens[0] in (1, 2)
    assert peer.verify_chain(np.array([law]), [0], np.array([law, law]), [0.5] * 2, naive=True)[
        0
    ] == [-1, -1]


def test_an_impossible_draft_is_not_accepted() -> None:
    """q = 0 < p: it was not drawn from q. The strict test of a port takes it."""
    q, p = [[0.0, 1.0]], [[0.9, 0.1], [0.5, 0.5]]
    assert one(q, [0], p) == ([0, -1], 0, 0)  # and the residual is token 0
    assert peer.verify_chain(np.array(q), [0], np.array(p), [0.5] * 2, naive=True)[2] == 1


def test_a_coin_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.zeros(*size))
    q, never = [1.0, 0.0], [0.0, 1.0]
    assert one([q], [0], [never, q]) == ([1, -1], 0, 0)
    assert one([q, q], [0, 0], [never, never, q]) == ([1, -1, -1], 0, 0)  # nor in the count


@pytest.mark.parametrize("where", ["p", "q"])
def test_nan_leaves_a_request_undecided(where: str) -> None:
    q, p = laws(3, 2), laws(3, 3)
    q[:] = p[:, :2]
    ids = drawn_from(q)
    (p if where == "p" else q)[1, 0] = torch.nan
    tokens, _, emitted = chain_speculative_sampling(q, ids, p)
    assert tokens[1].tolist() == [-1, -1, -1]
    assert emitted.tolist() == [2, 0, 2]
    assert torch.equal(tokens[::2, :2], ids[::2].int())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counters_are_added_to(dtype: torch.dtype) -> None:
    """Theirs counts int64 in a copy, so the caller's counter stands still."""
    q, p = laws(5, 3), laws(5, 4)
    ids = drawn_from(q)
    counters = [torch.full((5,), 10, dtype=dtype), torch.full((5,), 20, dtype=dtype)]
    fresh = chain_speculative_sampling(q, ids, p, generator=generator())
    for times in (1, 2):
        got = chain_speculative_sampling(q, ids, p, *counters, generator=generator())
        for start, counter, x, count in zip((10, 20), counters, got[1:], fresh[1:]):
            assert x is counter
            assert torch.equal(counter, (start + times * count).to(dtype))
    with pytest.raises(ValueError, match=r"maybe_output_accepted_token_num: expected \[B\]"):
        chain_speculative_sampling(q, ids, p, torch.zeros(4).int())


def test_the_law_and_the_acceptance_rate() -> None:
    """Tokens have the target's law; ``accepted`` has the mean that independent tests have."""
    N, n = 30000, 3
    q, p = laws(1, n), laws(1, n + 1)
    ids = drawn_from(q.expand(N, n, V).contiguous())
    got, accepted, emitted = chain_speculative_sampling(
        *(q.expand(N, n, V), ids, p.expand(N, n + 1, V)), seed=torch.arange(N), offset=2
    )
    seen = torch.bincount(got[:, 0], minlength=V).double()
    law = p[0, 0] * N
    assert (seen[law == 0] == 0).all()
    assert stats.chisquare(seen[law > 0], law[law > 0]).pvalue > 1e-4
    other = q[0, 0][law > 0] + 1e-3  # the drafts' law is another
    assert stats.chisquare(seen[law > 0], other / other.sum() * N).pvalue < 1e-4
    rates = torch.minimum(p[0, :n], q[0]).sum(-1)  # of each draft on its own
    mean, sigma = rates.sum(), math.sqrt(n / 4 / N)
    assert abs(accepted.double().mean() - mean) < 5 * sigma
    assert (accepted >= emitted).all()
    # a second draw for the rejected one, as theirs has, would be far off
    redrawn = sum(rates[:i].prod() * (1 - rates[i]) * rates[i] for i in range(n))
    assert redrawn > 10 * sigma


def test_seeded_chains_are_the_operators() -> None:
    """Also: the draws of ``accepted`` move no token."""
    q, p = laws(30, 3), laws(30, 4)
    ids = drawn_from(q)
    seed = torch.arange(30)
    want = pydecode.rejection_sample(
        None, ids, draft_probs=q, target_probs=p, seed=seed, offset=torch.tensor(4)
    )
    got = chain_speculative_sampling(q, ids, p, seed=seed, offset=torch.tensor([4]))
    assert torch.equal(got[0], want.tokens.int())
    assert torch.equal(got[2], want.num_accepted)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"draft_token_ids: expected \[B, n\]"):
        chain_speculative_sampling(laws(1, 1), torch.zeros(1).long(), laws(1, 2))
