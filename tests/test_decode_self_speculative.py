"""Self-speculative unmasking: the stepwise loop's tokens, in its order, in fewer forwards."""

import re
from typing import Any

import pytest
import torch
from test_decode_diffusion import KINDS, prompts
from tiny_diffusion import MASK, TinyDiffusion
from torch import Tensor

from pydecode.decode import diffusion, self_speculative
from pydecode.decode.diffusion import DiffusionResult

RULES: dict[str, dict[str, Any]] = {
    "stepwise": dict(rule="top_k"),
    "schedule": dict(rule="top_k", steps_per_block=4),
    "threshold": dict(rule="threshold", threshold=0.6, max_commit=2),
    "entropy": dict(rule="entropy", threshold=1.0),
    "sequential": dict(rule="sequential"),
    "segments": dict(rule="segments", threshold=0.8, low=0.3),
}


@pytest.fixture(scope="module")
def model() -> TinyDiffusion:
    return TinyDiffusion()


def both(
    model: TinyDiffusion, prompt: Tensor, kind: str, num_states: int, **given: Any
) -> tuple[DiffusionResult, DiffusionResult]:
    """The stepwise and the self-speculative result."""
    given = dict(length=14, block_length=6, mask_id=MASK, cache=kind) | given
    results = []
    for loop, more in (
        (diffusion.generate, {}),
        (self_speculative.generate, dict(num_states=num_states)),
    ):
        kv = None if kind == "none" else model.kv(len(prompt), prompt.shape[1] + given["length"])
        results.append(loop(model, prompt, **{"kv": kv, **given, **more}))
    return results[0], results[1]


def expect_equal(stepwise: DiffusionResult, speculative: DiffusionResult) -> None:
    assert torch.equal(speculative.tokens, stepwise.tokens)
    assert torch.equal(speculative.order, stepwise.order)
    assert torch.equal(speculative.num_steps, stepwise.num_steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_lossless(model: TinyDiffusion, name: str, kind: str) -> None:
    """Blocks of 6, 6 and 2; three requests whose walks end at different states."""
    stepwise, speculative = both(model, prompts(3, 5), kind, 4, **RULES[name])
    expect_equal(stepwise, speculative)
    assert speculative.num_forwards <= stepwise.num_forwards


@pytest.mark.parametrize("num_states", [1, 2, 8])
def test_any_number_of_states(model: TinyDiffusion, num_states: int) -> None:
    """One state is stepwise decoding; more than the block has masks is harmless."""
    torch.manual_seed(1)  # prompts for which some drafts are right
    forwards = torch.zeros(2)
    for _ in range(4):
        stepwise, speculative = both(model, prompts(1, 5), "dual", num_states)
        expect_equal(stepwise, speculative)
        forwards += torch.tensor([stepwise.num_forwards, speculative.num_forwards])
    if num_states == 1:
        assert forwards[0] == forwards[1]
    else:
        assert forwards[0] > forwards[1]


@pytest.mark.parametrize("num_states", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    ("rule", "steps"),
    [(dict(), 6), (dict(steps_per_block=4), 4), (dict(rule="threshold", threshold=0.0), 1)],
    ids=["one", "2_2_1_1", "all"],
)
def test_right_drafts_count(rule: dict[str, Any], steps: int, num_states: int) -> None:
    """Where no token depends on another every draft is right: 1 + ceil((steps - 1) / K) passes."""
    table = torch.randn(20, 32, dtype=torch.float64)

    def independent(tokens: Tensor, positions: Tensor, *_: Any, keep: Any) -> Tensor:
        return table[positions][:, keep]

    given = dict(length=12, block_length=6, mask_id=MASK) | rule
    stepwise = diffusion.generate(independent, prompts(2, 3), **given)
    assert stepwise.num_forwards == 2 * steps
    result = self_speculative.generate(independent, prompts(2, 3), num_states=num_states, **given)
    assert torch.equal(result.tokens[:, 3:], stepwise.tokens[:, 3:])
    assert torch.equal(result.order, stepwise.order)
    assert result.num_forwards == 2 * (1 + -(-(steps - 1) // num_states))


@pytest.mark.parametrize("kind", ["none", "prefix", "dual"])
def test_shift_padding_and_end_of_text(model: TinyDiffusion, kind: str) -> None:
    given = dict(shift=1, prompt_lengths=torch.tensor([1, 3, 5, 4]), eos_id=15)
    expect_equal(*both(model, prompts(4, 5), kind, 3, **given))


def test_uncached_block_causal_with_shift(model: TinyDiffusion) -> None:
    expect_equal(*both(model, prompts(2, 7), "block_causal", 3, kv=None, shift=1))


def test_a_wrong_walk_would_show(model: TinyDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: accepting every drafted state is not lossless."""
    monkeypatch.setattr(
        self_speculative.pydecode,
        "verify_states",
        lambda states, targets, *, mask_id: states.new_full((len(states),), states.shape[1] - 1),
    )
    stepwise, speculative = both(model, prompts(8, 5), "dual", 4)
    assert not torch.equal(stepwise.tokens, speculative.tokens)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rule": (dict(rule="posterior"), "rule: expected one that follows from the logits"),
    "num_states": (dict(num_states=0), "num_states: expected an integer of at least 1, got 0"),
    "shift": (
        dict(shift=1, cache="block_causal", kv=TinyDiffusion().kv(1, 7)),
        "shift: expected 0 for branches over a block_causal cache, got 1",
    ),
    "prompt": (
        dict(shift=1, prompt=torch.zeros(1, 0, dtype=torch.int64)),
        "prompt: expected at least one token with shift=1, got none",
    ),
    "nan": (
        dict(model=lambda tokens, *_, keep: torch.full((*tokens.shape, 32), torch.nan)),
        "model: logits of block",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(model: TinyDiffusion, name: str) -> None:
    given = dict(model=model, prompt=prompts(1, 3), length=4, block_length=2, mask_id=MASK)
    wrong, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        self_speculative.generate(**{**given, **wrong})
    assert re.match(message, str(raised.value)), raised.value
