"""pydecode.compat.vllm's remasking against the plugin's rules, written out."""

import inspect

import peer_vllm as peer
import pytest
import torch
from torch import Tensor

from pydecode.compat.vllm import (
    Llada2DefaultRemaskingPolicy,
    RemaskStepResult,
    batched_remask,
    batched_remask_triton,
    llada2_remask,
)

V, L, MASK = 7, 8, 6


def blocks(B: int) -> tuple[Tensor, Tensor]:
    """fp64 logits, some rows equal (ties), and blocks of which some are full."""
    logits = 3 * torch.randn(B, L, V, dtype=torch.float64)
    logits[::3, 1::2] = logits[::3, :1]
    draft = torch.randint(0, V - 1, (B, L))
    draft[torch.rand(B, L) < torch.rand(B, 1)] = MASK
    return logits, draft


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.5])
def test_batched_remask(threshold: float) -> None:
    logits, draft = blocks(400)
    got = batched_remask(logits, draft, MASK, threshold)
    assert [x.dtype for x in got] == [torch.int64, torch.bool, torch.int32]
    for b in range(400):
        want, count = peer.remask(logits[b].tolist(), draft[b].tolist(), MASK, threshold)
        assert got[0][b].tolist() == want
        assert got[1][b] == (MASK not in want)
        assert got[2][b] == count


@pytest.mark.parametrize("k", [0, 1, 3, 20])
def test_llada2_remask(k: int) -> None:
    logits, draft = blocks(300)
    config = dict(mask_token_id=MASK, commit_confidence_threshold=0.7, num_transfer=k)
    got = llada2_remask(logits, draft, config)
    for b in range(300):
        want, count = peer.policy(logits[b].tolist(), draft[b].tolist(), MASK, 0.7, k)
        assert (got[0][b].tolist(), got[2][b]) == (want, count)
        assert got[1][b] == (MASK not in want)


def test_near_ties_go_together() -> None:
    """dInfer's slack: within 1e-5 of the best, also below the threshold."""
    p = torch.tensor([0.5, 0.5 - 5e-6, 0.5 - 2e-5], dtype=torch.float64)
    logits = torch.stack([p, *[(1 - p) / 4] * 4], -1).log()[None]
    assert batched_remask(logits, torch.full((1, 3), 9), 9, 0.9)[0].tolist() == [[0, 0, 9]]


def test_at_the_threshold() -> None:
    """The batched rule commits c == threshold, the policy does not."""
    logits = torch.zeros(1, 2, 2, dtype=torch.float64)
    logits[0, 0, 0] = 1.0
    draft = torch.full((1, 2), 9)
    assert batched_remask(logits, draft, 9, 0.5)[2].tolist() == [2]
    config = dict(mask_token_id=9, commit_confidence_threshold=0.5)
    assert llada2_remask(logits, draft, config)[0].tolist() == [[0, 9]]


def test_a_model_that_predicts_the_mask_ends() -> None:
    """Theirs leaves such positions as they are, and never ends where all are such."""
    logits = torch.randn(2, L, V)
    logits[..., MASK] = 50.0
    for step in (
        lambda draft: batched_remask(logits, draft, MASK, 0.9),
        lambda draft: llada2_remask(logits, draft, {"mask_token_id": MASK}),
    ):
        draft, steps = torch.full((2, L), MASK), 0
        done = torch.tensor([False])
        while not done.all():
            draft, done, count = step(draft)
            assert (count > 0).all() or done.any()
            steps += 1
        assert steps <= L
        assert (draft != MASK).all()


def test_bad_rows_are_never_filled() -> None:
    logits = torch.zeros(1, 3, V)
    logits[0, 0], logits[0, 1, 2] = -torch.inf, torch.nan
    draft, done, count = batched_remask(logits, torch.full((1, 3), MASK), MASK, 0.0)
    assert draft.tolist() == [[MASK, MASK, 0]]
    assert (done.tolist(), count.tolist()) == ([False], [1])


def test_out_and_input() -> None:
    logits, draft = blocks(5)
    before, out = draft.clone(), torch.empty_like(draft)
    got = batched_remask(logits, draft, MASK, 0.5, out=out)[0]
    assert got is out
    assert torch.equal(draft, before)
    assert torch.equal(batched_remask(logits, draft, MASK, 0.5, out=draft)[0], out)
    assert torch.equal(draft, out)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.7, 0.7])])
def test_temperature_draws_but_confidence_does_not(temperature: float | Tensor) -> None:
    """All rows commit, so the tokens follow softmax(logits / T); with a seed, again the same."""
    torch.manual_seed(1)
    row = torch.randn(V)
    row[MASK] = -torch.inf
    logits, draft = row.expand(2, 20_000, V), torch.full((2, 20_000), MASK)
    tokens = batched_remask(logits, draft, MASK, 0.0, temperature, use_float64=True)[0]
    seen = torch.bincount(tokens.flatten(), minlength=V) / tokens.numel()
    assert 0.5 * (seen - (row / 0.7).softmax(-1)).abs().sum() < 0.015
    assert not torch.equal(tokens, batched_remask(logits, draft, MASK, 0.0, temperature)[0])
    seeded = [batched_remask(logits, draft, MASK, 0.0, temperature, seed=3)[0] for _ in "ab"]
    assert torch.equal(*seeded)
    # only tokens whose untempered probability passes
    level = float(row.softmax(-1).median())
    filled = batched_remask(logits, draft, MASK, level, temperature, seed=3)[0]
    assert torch.equal(filled != MASK, row.softmax(-1)[seeded[0]] >= level)


def test_bf16_and_views() -> None:
    logits, draft = blocks(4)
    whole = torch.randn(4, L + 2, V + 3).bfloat16()
    part = whole[:, 1:-1, :V]
    part.copy_(logits)
    got = batched_remask(part, draft, MASK, 0.6)[0]
    assert torch.equal(got, batched_remask(part.float().contiguous(), draft, MASK, 0.6)[0])


@pytest.mark.parametrize(
    ("config", "k"),
    [
        ({}, 1),  # as many steps as positions
        ({"denoise_steps": 3, "denoise_step_index": 0}, 3),
        ({"denoise_steps": 3, "denoise_step_index": 1}, 3),
        ({"denoise_steps": 3, "denoise_step_index": 2}, 2),
        ({"denoise_steps": 3, "denoise_step_index": 99}, 2),
        ({"denoise_steps": 3, "denoise_step_index": -1, "grammar_extra_transfer": 2}, 5),
        ({"denoise_steps": 4, "denoise_step_index": -1}, 2),
        ({"denoise_steps": 20, "denoise_step_index": 9}, 0),
        ({"num_transfer": 4, "denoise_steps": 1}, 4),
        ({"num_transfer": 4, "grammar_extra_transfer": -3}, 4),
    ],
)
def test_the_schedule(config: dict[str, int], k: int) -> None:
    logits = torch.randn(1, L, V)  # nobody is sure of anything
    config = {"mask_token_id": 99, "commit_confidence_threshold": 1.0, **config}
    assert llada2_remask(logits, torch.full((1, L), 99), config)[2].tolist() == [k]


def test_policy() -> None:
    policy, config = Llada2DefaultRemaskingPolicy(), {"mask_token_id": MASK}
    logits = torch.zeros(3, V)
    logits[1, 4] = 9.0
    step = policy.apply(input_draft=[1, MASK, MASK], logits=logits, remasking_config=config)
    assert step == RemaskStepResult((), (1, 4, MASK))
    step = policy.apply(input_draft=step.next_input_block, logits=logits, remasking_config=config)
    assert step == RemaskStepResult((1, 4, 0), (MASK,) * 3)
    assert policy.apply(input_draft=[0] * 3, logits=logits.tolist()).committed_token_ids == (0,) * 3
    for bad, name in (
        ({"num_transfer": -1}, "num_transfer"),
        ({"denoise_steps": 0}, "denoise_steps"),
    ):
        with pytest.raises(ValueError, match=name):
            policy.apply(input_draft=[1], logits=logits[:1], remasking_config=bad)
    with pytest.raises(ValueError, match="logits"):
        policy.apply(input_draft=[1])


def test_signatures() -> None:
    names = list(inspect.signature(batched_remask).parameters)
    assert names[:4] == ["logits", "input_draft", "mask_token_id", "threshold"]
    assert names[4:7] == ["temperature", "use_float64", "out"]
    assert batched_remask_triton is batched_remask
