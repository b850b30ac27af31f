"""The diffusion loop's batches, padding, sampling, functions of the step, and errors by name."""

import doctest
import re
from typing import Any

import pytest
import torch
from test_decode_diffusion import KINDS, prompts, run
from tiny_diffusion import MASK, TinyDiffusion, V
from torch import Tensor

import pydecode.decode
from pydecode.decode import diffusion
from pydecode.decode.diffusion import Step, generate


@pytest.fixture(scope="module")
def model() -> TinyDiffusion:
    return TinyDiffusion()


SAMPLED = dict(
    threshold=dict(rule="threshold", threshold=0.5, temperature=0.8, top_p=0.9, tempered=True),
    random=dict(rule="top_k", steps_per_block=2, confidence="random", sampler="gumbel"),
    posterior=dict(rule="posterior", temperature=1.0),
)
SAMPLED["random"]["temperature"] = 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_request_does_not_depend_on_its_batch(model: TinyDiffusion, name: str, kind: str) -> None:
    """Alone, and among others that take more or fewer steps: same tokens, same own steps."""
    prompt, seeds = prompts(4), torch.randint(0, 2**40, (4,))
    batch = run(model, prompt, kind, seed=seeds, **SAMPLED[name])
    for b in range(4):
        alone = run(model, prompt[b : b + 1], kind, seed=seeds[b : b + 1], **SAMPLED[name])
        assert torch.equal(alone.tokens[0], batch.tokens[b])
        assert torch.equal(alone.order[0], batch.order[b])
        assert alone.num_steps[0] == batch.num_steps[b] == alone.num_forwards
    other = run(model, prompt, kind, seed=seeds + 1, **SAMPLED[name])
    assert not torch.equal(other.tokens, batch.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 1])
def test_left_padding_changes_nothing(model: TinyDiffusion, shift: int, kind: str) -> None:
    """Ragged prompts: 9, 5 and 1 valid tokens; the padded slots hold the mask token."""
    lengths = torch.tensor([9, 5, 1])  # whole blocks of 4 are missing
    prompt = prompts(3, 9)
    prompt[torch.arange(9) < 9 - lengths[:, None]] = MASK
    given: dict[str, Any] = dict(rule="threshold", threshold=0.5, temperature=0.7, shift=shift)
    seeds = torch.tensor([1, 2, 3])
    padded = run(model, prompt, kind, prompt_lengths=lengths, seed=seeds, **given)
    for b, n in enumerate(lengths.tolist()):
        alone = run(model, prompt[b : b + 1, 9 - n :], kind, seed=seeds[b : b + 1], **given)
        assert torch.equal(padded.tokens[b, 9 - n :], alone.tokens[0])
        assert torch.equal(padded.order[b], alone.order[0])
    assert torch.equal(padded.tokens[:, :9], prompt)


def test_offsets_give_other_draws(model: TinyDiffusion) -> None:
    prompt = prompts(4)
    a, b, c = (run(model, prompt, temperature=1.0, seed=7, offset=o).tokens for o in (0, 100, 0))
    assert torch.equal(a, c)
    assert not torch.equal(a, b)


def test_posterior_keeps_its_schedule(model: TinyDiffusion) -> None:
    """3 steps, keep 2/3, 1/2, 0: a third of a block in each; and a schedule of the caller's own."""
    prompt, seeds = prompts(64), torch.arange(64)
    given: dict[str, Any] = dict(rule="posterior", steps_per_block=3, length=12, block_length=12)
    order = run(model, prompt, seed=seeds, **given).order
    counts = torch.stack([(order == s).sum() for s in range(3)]).double()
    # 768 positions a third each: sigma of a count is 13
    assert ((counts - 256).abs() < 65).all(), counts
    order = run(model, prompt, seed=seeds, keep=lambda s: 1.0 - 0.9 * (s.index == 1), **given).order
    counts = torch.stack([(order == s).sum() for s in range(3)])
    assert counts[0] == 0
    assert abs(int(counts[1]) - 691) < 45  # sigma 8.3
    assert counts[2] == 768 - counts[1]


def test_arguments_that_are_functions_of_the_step(model: TinyDiffusion) -> None:
    """dInfer's decaying threshold; Learn2PD's filter as an external score."""
    prompt = prompts(3)
    seen: list[int] = []

    def decaying(step: Step) -> float:
        seen.append(step.index)
        return 0.9 if step.index < 2 else 0.0

    result = run(model, prompt, "dual", rule="threshold", threshold=decaying)
    assert result.num_steps.max() <= 9  # three a block: the third threshold takes all that is left
    assert max(seen) == 2

    def filtered(step: Step) -> Tensor:
        """The confidence itself, at the block's positions of the canvas."""
        scores = pydecode.sample_and_score(step.logits, exclude_ids=[MASK]).confidence
        whole = scores.new_zeros(step.tokens.shape)
        whole[:, step.block.begin : step.block.stop] = scores
        return whole

    external = run(model, prompt, rule="external", external_score=filtered, threshold=0.6)
    want = run(model, prompt, rule="threshold", threshold=0.6, strict=True)
    assert torch.equal(external.tokens, want.tokens)
    assert torch.equal(external.order, want.order)


def test_on_step_sees_every_step(model: TinyDiffusion) -> None:
    steps: list[Step] = []
    prompt = prompts(2)
    result = run(model, prompt, "prefix", rule="threshold", threshold=0.5, on_step=steps.append)
    assert len(steps) == result.num_forwards
    before = torch.cat([prompt, torch.full((2, 11), MASK)], 1)
    for step in steps:
        assert step.unmasked is not None
        changed = before != step.tokens
        assert torch.equal(changed, step.unmasked.committed)
        changed[:, step.block.begin : step.block.stop] = False
        assert not changed.any()
        before = step.tokens
    assert torch.equal(before, result.tokens)


def test_masks_in_the_prompt_stay(model: TinyDiffusion) -> None:
    prompt = prompts(2)
    prompt[:, 1::2] = MASK
    for kind in KINDS:  # block_causal: the last of them lies in the first generated block
        result = run(model, prompt, kind)
        assert torch.equal(result.tokens[:, :6], prompt)
        assert not (result.tokens[:, 6:] == MASK).any()


def test_the_mask_is_never_predicted(model: TinyDiffusion) -> None:
    """Peers loop for ever where the mask's logit is the largest."""

    def stubborn(*args: Any, **kwargs: Any) -> Tensor:
        logits = model(*args, **kwargs)
        logits[..., MASK] = 1e3
        return logits

    prompt = prompts(2)
    given = dict(length=5, block_length=5, mask_id=MASK, rule="threshold", threshold=0.6)
    assert torch.equal(
        generate(stubborn, prompt, **given).tokens, generate(model, prompt, **given).tokens
    )


def test_examples() -> None:
    for module in (pydecode.decode, diffusion):
        tried = doctest.testmod(module)
        assert tried.attempted
        assert tried.failed == 0


def test_empty_batch(model: TinyDiffusion) -> None:
    result = run(model, prompts(0), "dual")
    assert result.tokens.shape == (0, 17)
    assert result.num_forwards == 0


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt_dim": (dict(prompt=torch.zeros(3, dtype=torch.int64)), "prompt: expected 2 dim"),
    "prompt_dtype": (dict(prompt=torch.zeros(1, 3)), "prompt: expected dtype int64, got float32"),
    "length": (dict(length=-1), "length: expected an integer of at least 0, got -1"),
    "block": (dict(block_length=0), "block_length: expected an integer of at least 1, got 0"),
    "mask_id": (dict(mask_id=None), "mask_id: expected an integer of at least 0, got None"),
    "shift": (dict(shift=2), "shift: expected 0 or 1, got 2"),
    "cache": (dict(cache="paged"), "cache: expected one of none, prefix, dual, block_causal"),
    "kv_missing": (dict(cache="dual"), 'kv: expected .* with cache="dual", got None'),
    "kv_idle": (dict(kv=(torch.zeros(1), torch.zeros(1))), 'kv: expected None with cache="none"'),
    "kv_short": (
        dict(cache="prefix", kv=[torch.zeros(2, 1, 6, 2, 16)] * 2),
        r"kv: expected K .* P \+ length = 7.*, got shape",
    ),
    "rule": (dict(rule="best"), "rule: expected one of"),
    "steps": (dict(steps_per_block=0), "steps_per_block: expected None or an integer >= 1, got 0"),
    "steps_rule": (
        dict(steps_per_block=2, rule="threshold"),
        "steps_per_block: expected None with rule='threshold', got 2",
    ),
    "steps_k": (dict(steps_per_block=2, k=2), "k: expected none with steps_per_block"),
    "min_commit": (dict(min_commit=0), "min_commit: expected at least 1 in a loop"),
    "lengths": (
        dict(prompt_lengths=torch.tensor([4])),
        r"prompt_lengths: expected lengths in \[1, P = 3\], got \[4\]",
    ),
    "lengths_block": (
        dict(prompt_lengths=torch.tensor([2]), cache="block_causal"),
        r"prompt_lengths: expected lengths in \[1, P = 3\], P less whole blocks of 2, got \[2\]",
    ),
    "nan": (dict(model=lambda *_, keep: torch.full((1, 7, V), torch.nan)), "model: logits of"),
    "rows": (dict(model=lambda *_, keep: torch.zeros(1, 5, V)), "model: expected logits .* got"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(model: TinyDiffusion, name: str) -> None:
    given = dict(model=model, prompt=prompts(1, 3), length=4, block_length=2, mask_id=MASK)
    wrong, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        generate(**{**given, **wrong})
    assert re.match(message, str(raised.value)), raised.value
