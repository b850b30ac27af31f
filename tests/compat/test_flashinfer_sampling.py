"""``compat.flashinfer.sampling``: tokens of rows, and how draws are keyed."""

from typing import Any

import peer_flashinfer as peer
import pytest
import torch
from torch import Tensor

from pydecode.compat.flashinfer import (
    chain_speculative_sampling,
    sampling_from_logits,
    sampling_from_probs,
    top_k_top_p_sampling_from_logits,
)

V = 7


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- draws ---------------------------------------------------------------------------------------


def call(name: str, B: int, rows: Tensor, **draws: Any) -> Tensor:
    if name == "chain":
        p = rows.softmax(-1)
        ids = p[:, :3].argmin(-1)
        return chain_speculative_sampling(p[:, 1:], ids, p, **draws)[0]
    if name == "logits":
        return top_k_top_p_sampling_from_logits(rows[:, 0], 5, 0.95, **draws)
    if name == "indices":
        flat = rows.flatten(0, 1)
        return sampling_from_logits(flat, indices=torch.arange(B) * rows.shape[1], **draws)
    return sampling_from_probs(rows[:, 0].softmax(-1), **draws)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["chain", "logits", "indices", "probs"])
def test_seeds_belong_to_requests(name: str) -> None:
    """Theirs reads entry 0 of [B] seeds and keys by the row, so results move with their place."""
    B = 40
    rows = torch.randn(B, 4, 50)
    seed, offset = torch.randint(2**62, (B,)), torch.randint(99, (B,))
    whole = call(name, B, rows, seed=seed, offset=offset)
    at = torch.randperm(B)
    assert torch.equal(call(name, B, rows[at], seed=seed[at], offset=offset[at]), whole[at])
    for b in (0, 17):
        s = slice(b, b + 1)
        assert torch.equal(call(name, 1, rows[s], seed=seed[s], offset=offset[s]), whole[s])
    unsigned = seed.view(torch.uint64), offset.view(torch.uint64)
    assert torch.equal(call(name, B, rows, seed=unsigned[0], offset=unsigned[1]), whole)
    for other in (dict(seed=seed + 1, offset=offset), dict(seed=seed, offset=offset + 1)):
        assert not torch.equal(call(name, B, rows, **other), whole)


@pytest.mark.parametrize("name", ["chain", "logits", "indices", "probs"])
def test_one_seed_for_the_batch(name: str) -> None:
    B = 40
    rows = torch.randn(1, 4, 50).expand(B, 4, 50)
    want = call(name, B, rows, seed=5, offset=6)
    assert torch.equal(call(name, B, rows, seed=torch.tensor([5]), offset=torch.tensor([6])), want)
    assert torch.equal(call(name, B, rows, seed=torch.tensor([5]), offset=6), want)
    assert not torch.equal(call(name, B, rows, seed=5, offset=7), want)
    assert len(want[..., 0].unique() if want.dim() > 1 else want.unique()) > 1  # rows differ
    first = call(name, B, rows, generator=generator())
    assert torch.equal(call(name, B, rows, generator=generator()), first)
    torch.manual_seed(9)
    first = call(name, B, rows)
    assert not torch.equal(call(name, B, rows), first)  # torch's generator moved on
    torch.manual_seed(9)
    assert torch.equal(call(name, B, rows), first)
    for half in (dict(seed=5), dict(offset=5)):
        with pytest.raises(ValueError, match="seed, offset: expected both or neither"):
            call(name, B, rows, **half)
    with pytest.raises(ValueError, match="seed: expected"):
        call(name, B, rows, seed=torch.zeros(2).long(), offset=torch.zeros(2).long())


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("indexed", [None, torch.int32, torch.int64])
def test_top_k_top_p(order: str, indexed: torch.dtype | None) -> None:
    """A thousand rows by the peer's filters and an inverse CDF, with draws that are known."""
    B = 1000
    logits = torch.randn(B if indexed is None else 50, V).double()
    logits[:, 4] = logits[:, 1]
    index = torch.arange(B) if indexed is None else torch.randint(50, (B,))
    top_k = torch.randint(0, V + 2, (B,), dtype=torch.int32)  # 0 and V + 1 are off
    top_p = (torch.rand(B) * 1.1).clamp(min=0.05).double()
    got = top_k_top_p_sampling_from_logits(
        logits,
        top_k,
        top_p,
        None if indexed is None else index.to(indexed),
        order,
        generator=generator(),
    )
    u, other = (
        torch.rand(B, generator=generator()).tolist(),
        {"joint": "top_k_first"}.get(order, "joint"),
    )
    rows, differ = logits[index].numpy(), 0
    for b in range(B):
        k, share = int(top_k[b]), float(top_p[b])
        law = peer.filtered(rows[b], k, share, order)
        assert got[b] == peer.inverse_cdf(law, u[b])
        differ += got[b] != peer.inverse_cdf(peer.filtered(rows[b], k, share, other), u[b])
    assert got.dtype == (indexed or torch.int32)
    assert differ > 5  # the order matters here
    same = top_k_top_p_sampling_from_logits(logits[:9], 3, 0.8, None, order, generator=generator())
    want = [
        peer.inverse_cdf(peer.filtered(x, 3, 0.8, order), u[b])
        for b, x in enumerate(logits[:9].numpy())
    ]
    assert same.tolist() == want


@pytest.mark.parametrize("indexed", [False, True])
def test_unfiltered_rows(indexed: bool) -> None:
    logits = torch.randn(400, V).double()
    index = torch.randint(400, (400,)) if indexed else None
    rows = logits if index is None else logits[index]
    u = torch.rand(400, generator=generator())
    want = [peer.inverse_cdf(x.softmax(-1).numpy(), float(a)) for x, a in zip(rows, u)]
    assert sampling_from_logits(logits, index, generator=generator()).tolist() == want
    probs = 3 * logits.softmax(-1)  # not normalised: rows are divided by their sum
    got, valid = sampling_from_probs(probs, index, generator=generator(), return_valid=True)
    assert got.tolist() == want
    assert got.dtype == (torch.int32 if index is None else torch.int64)
    assert valid.dtype == torch.bool
    assert valid.all()


def test_bad_rows() -> None:
    """NaN and rows without mass give -1 (theirs: some id); -1 as an index is no row."""
    logits = torch.randn(4, V)
    logits[1, 3], logits[2] = torch.nan, -torch.inf
    bad = torch.tensor([False, True, True, False])
    for got in (sampling_from_logits(logits), top_k_top_p_sampling_from_logits(logits, 3, 0.9)):
        assert torch.equal(got < 0, bad)
    got, valid = sampling_from_probs(logits.softmax(-1), return_valid=True)
    assert torch.equal(got < 0, bad)
    assert torch.equal(valid, ~bad)
    assert sampling_from_logits(logits, torch.tensor([-1, 0]))[0] == -1
    assert sampling_from_probs(logits[::3].softmax(-1), torch.tensor([-1, 0]))[0] == -1
    for call in (
        lambda: sampling_from_logits(logits, check_nan=True),
        lambda: top_k_top_p_sampling_from_logits(logits, 3, 0.9, check_nan=True),
        lambda: sampling_from_probs(logits, check_nan=True),
    ):
        with pytest.raises(ValueError, match="expected no NaN, as check_nan asks"):
            call()
    sampling_from_logits(logits[::3], check_nan=True)


def test_errors() -> None:
    with pytest.raises(ValueError, match="filter_apply_order: expected one of top_k_first, joint"):
        top_k_top_p_sampling_from_logits(torch.zeros(2, 5), 1, 0.5, None, "top_p_first")
    with pytest.raises(ValueError, match=r"logits: expected \[B, V\]"):
        sampling_from_logits(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"probs: expected \[B, V\]"):
        sampling_from_probs(torch.zeros(5))
