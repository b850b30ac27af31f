"""``commit``: rules by hand, draws, empty inputs and errors; test_commit_rules.py has the loops."""

from typing import Any

import pytest
import torch
from commit_rules_oracle import RULES
from torch import Tensor

import pydecode

MASK = 7


def test_one_step_of_every_rule_by_hand(backend: str) -> None:
    tokens = torch.tensor([[MASK, MASK, 1, MASK, MASK, MASK]])
    proposals = torch.tensor([[0, 1, 2, 3, 4, 5]], dtype=torch.int32)
    scores = torch.tensor([[0.5, 0.75, 1.0, 0.9, 0.625, 0.9]])

    def committed(rule: str, scores: Tensor = scores, **numbers: Any) -> list[int]:
        got = pydecode.commit(
            tokens, proposals, scores, mask_id=MASK, rule=rule, backend=backend, **numbers
        )
        return got.committed[0].nonzero()[:, 0].tolist()

    assert committed("top_k") == [3]  # the tie with 5 goes to the left
    assert committed("top_k", k=2) == [3, 5]
    assert committed("threshold") == [3, 5]  # fp32(0.9) meets 0.9
    assert committed("threshold", strict=True) == [3]
    assert committed("threshold", threshold=0.95, slack=0.2) == [1, 3, 5]
    assert committed("threshold", threshold=0.5, max_commit=2) == [3, 5]
    assert committed("threshold", threshold=0.9, strict=True, min_commit=3) == [1, 3, 5]
    assert committed("factor", factor=0.5) == [3, 5]  # 0.9 >= 1 - 0.5/3, 0.75 < 1 - 0.5/4
    assert committed("factor", factor=1.0) == [1, 3, 5]  # 0.75 >= 3/4, 0.625 < 4/5
    assert committed("prefix", threshold=0.5) == [0, 1, 3, 4, 5]  # over the filled row 2
    assert committed("prefix", threshold=0.6) == [0]  # none, so the leftmost
    assert committed("sequential", k=3) == [0, 1, 3]
    assert committed("segments", threshold=0.95) == [1, 3]
    assert committed("segments", threshold=0.95, low=0.8) == [3]
    assert committed("entropy", -scores, threshold=0.625) == [0, 4]
    assert committed("entropy_bound", -scores, threshold=0.5) == [0, 4]  # 0, then 0.5, then 1.125
    assert committed("external", external_score=1 - scores, threshold=0.3) == [0, 4]
    assert committed("posterior", uniforms=1 - scores, keep=0.3) == [0, 4]


def test_the_peers_factor_quirk_is_not_here(backend: str) -> None:
    """Fast-dLLM's code commits the last candidate when only that one fails; the paper does not."""
    tokens, proposals = torch.full((1, 3), MASK), torch.tensor([[1, 2, 3]])
    scores = torch.tensor([[0.99, 0.98, 0.1]])
    got = pydecode.commit(
        tokens, proposals, scores, mask_id=MASK, rule="factor", factor=0.5, backend=backend
    )
    assert got.tokens.tolist() == [[1, 2, MASK]]


def test_posterior_draws(backend: str) -> None:
    """Seeded draws are those of the COMMIT stream at the row's position; [B] seeds stand alone."""
    tokens, proposals = torch.full((4, 300), MASK), torch.ones(4, 300).long()
    scores = torch.rand(4, 300)
    call = dict(mask_id=MASK, rule="posterior", keep=0.25, backend=backend)

    def run(b: slice, **keys: Any) -> Tensor:
        return pydecode.commit(tokens[b], proposals[b], scores[b], **call, **keys).committed

    everything = slice(None)
    seeds = torch.tensor([5, 6, 5, 2**50 + 5])
    whole = run(everything, seed=seeds)
    assert torch.equal(whole[0], whole[2])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], whole[3])
    assert torch.equal(run(slice(1, 2), seed=seeds[1:2]), whole[1:2])
    scalar = run(everything, seed=5)
    assert torch.equal(scalar[0], whole[0])  # request 0 adds nothing
    assert not torch.equal(scalar[0], scalar[2])
    positions = torch.arange(300).expand(4, 300)
    assert torch.equal(run(everything, seed=seeds, positions=positions), whole)
    assert torch.equal(run(everything, seed=seeds, positions=positions.flip(1)), whole.flip(1))
    assert not torch.equal(run(everything, seed=seeds, offset=1), whole)
    assert 1200 * 0.75 - 4 * 15 < whole[:3].sum() / 3 * 4 < 1200 * 0.75 + 4 * 15


@pytest.mark.parametrize(("B", "L"), [(0, 5), (3, 0), (0, 0), (2, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_empty_and_single(rule: str, B: int, L: int, backend: str) -> None:
    tokens, proposals, scores = torch.full((B, L), MASK), torch.ones(B, L).long(), torch.rand(B, L)
    got = pydecode.commit(
        tokens,
        proposals,
        scores,
        mask_id=MASK,
        rule=rule,
        external_score=scores,
        backend=backend,
    )
    assert got.tokens.shape == got.committed.shape == got.confidence.shape == (B, L)
    assert got.num_committed.tolist() == [L] * B
    assert got.num_left.tolist() == [0] * B


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "rule: expected one of top_k", dict(rule="greedy")),
        (ValueError, "external_score: expected scores", dict(rule="external")),
        (
            ValueError,
            r"proposals: expected shape \[B, L\]",
            dict(proposals=torch.zeros(1, 4).long()),
        ),
        (TypeError, "proposals: expected dtype", dict(proposals=torch.zeros(2, 4))),
        (TypeError, "scores: expected dtype", dict(scores=torch.zeros(2, 4).long())),
        (TypeError, "tokens: expected dtype int64", dict(tokens=torch.zeros(2, 4).int())),
        (ValueError, "tokens: expected 2 dimensions", dict(tokens=torch.zeros(2).long())),
        (TypeError, "mask_id: expected an int", dict(mask_id=1.0)),
        (TypeError, "window: expected None or a pair", dict(window=3)),
        (ValueError, "window: expected a length of at least 0", dict(window=(0, -1))),
        (ValueError, r"window: expected 0-d or \[B\]", dict(window=(torch.zeros(3).long(), 1))),
        (ValueError, "min_commit: expected at least 0", dict(min_commit=-1)),
        (ValueError, "max_commit: expected at least min_commit = 1, got 0", dict(max_commit=0)),
        (TypeError, "max_commit: expected an int", dict(max_commit=torch.tensor(1))),
        (ValueError, r"threshold: expected 0-d or \[B\]", dict(threshold=torch.zeros(3))),
        (ValueError, "k: expected at least 0", dict(k=-1)),
        (ValueError, "slack: expected at least 0", dict(slack=-0.1)),
        (TypeError, "uniforms: expected dtype", dict(uniforms=torch.zeros(2, 4).half())),
        (ValueError, "positions: expected shape", dict(positions=torch.zeros(4).long())),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given = dict(
        tokens=torch.zeros(2, 4).long(),
        proposals=torch.zeros(2, 4).long(),
        scores=torch.zeros(2, 4),
        mask_id=MASK,
    )
    with pytest.raises(error, match=message):
        pydecode.commit(**{**given, **change})
