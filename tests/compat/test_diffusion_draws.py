"""The laws of the peers' transfer functions above temperature 0, and their seeds."""

import pytest
import scipy.stats
import torch
from fake_diffusion import MASK
from peer_diffusion import cases, fixed, masked_rows
from transfer_calls import LOW, NAMES, call_of

from pydecode.compat.diffusion.fast_dllm import get_transfer_index


@pytest.mark.parametrize("name", NAMES)
def test_tokens_follow_the_tempered_law(name: str) -> None:
    law = torch.tensor([0.0, 1.0, 2.5, -1.0, 2.0], dtype=torch.float64)
    logits = torch.full((1500, 2, 24), -40.0, dtype=torch.float64)
    logits[..., :5] = law
    masked, x = torch.ones(1500, 2, dtype=torch.bool), torch.full((1500, 2), MASK)
    torch.manual_seed(11)
    x0, _ = call_of(name, 0.7)(logits, masked, x)
    torch.manual_seed(11)
    assert x0.tolist() == call_of(name, 0.7)(logits, masked, x)[0].tolist()
    assert x0.tolist() != call_of(name, 0.7)(logits, masked, x)[0].tolist()
    want = torch.softmax(law / 0.7, -1) * x0.numel()
    got = torch.bincount(x0.flatten(), minlength=5)
    assert scipy.stats.chisquare(got, want).pvalue > 1e-4
    assert scipy.stats.chisquare(got, torch.softmax(law, -1) * x0.numel()).pvalue < 1e-4
    pairs = torch.bincount((x0[:, 0] * 5 + x0[:, 1]), minlength=25)
    want = torch.outer(want, want).flatten() / (4 * len(x0))
    assert scipy.stats.chisquare(pairs, want).pvalue > 1e-4


def test_confidence_stays_untempered() -> None:
    """Given what was drawn, the surest under softmax(logits) are taken."""
    logits, masked, x = cases(150, 6)
    x0, taken = get_transfer_index(
        logits, 3.0, LOW, masked, x, torch.full((150,), 2), mask_id=MASK, seed=5, offset=3
    )
    p = torch.softmax(logits, -1).gather(-1, x0[..., None])[..., 0]
    for b, rows in enumerate(masked_rows(masked)):
        want = fixed({i: float(p[b, i]) for i in rows}, 2)
        assert {i for i, t in enumerate(taken[b].tolist()) if t} == want
    assert (x0 != logits[..., :MASK].argmax(-1))[masked].any()


@pytest.mark.parametrize("name", ["fixed", "threshold", "factor", "entropy"])
def test_random_remasking(name: str) -> None:
    """Positions by lot: each alike, and the logits say nothing."""
    logits = torch.zeros(2000, 4, 24)
    logits[:, 0, 7], logits[..., MASK] = 30.0, -40.0
    masked, x = torch.ones(2000, 4, dtype=torch.bool), torch.full((2000, 4), MASK)
    torch.manual_seed(12)
    x0, taken = call_of(name, 0.0, "random")(logits, masked, x)
    assert (x0[:, 0] == 7).all()
    assert taken.tolist() != call_of(name, 0.0, "random")(logits, masked, x)[1].tolist()
    per_position = taken.sum(0).double()
    share = per_position.mean() / 2000
    deviation = (2000 * share * (1 - share)) ** 0.5
    assert (per_position - per_position.mean()).abs().max() < 4.5 * deviation
    want = {"fixed": 0.5, "threshold": 0.7 + 0.3**4 / 4, "entropy": 0.5 + 0.5**4 / 4}
    if name in want:
        assert abs(share - want[name]) < 0.02


def test_a_seed_repeats_and_an_offset_moves_on() -> None:
    case = cases(50, 6)
    case[1][:] = True
    first = call_of("fixed", 2.0, seed=7)(*case)[0]
    assert first.tolist() == call_of("fixed", 2.0, seed=7)(*case)[0].tolist()
    assert first.tolist() != call_of("fixed", 2.0, seed=7, offset=1)(*case)[0].tolist()
    seeds = torch.arange(50)
    every = call_of("fixed", 2.0, seed=seeds)(*case)[0]
    alone = call_of("fixed", 2.0, seed=seeds[9:10])(*(y[9:10] for y in case))[0]
    assert alone.tolist() == every[9:10].tolist()
