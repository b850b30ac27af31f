"""Fast-dLLM's generators against their loops: the same tokens from the same calls and caches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_diffusion import MASK, FullModel, table
from peer_diffusion_loops import fast_dllm
from reads import Reads
from torch import Tensor

from pydecode.compat.diffusion import fast_dllm as ours

GENERATORS: dict[str, Callable[..., Any]] = {
    "none": ours.generate,
    "prefix": ours.generate_with_prefix_cache,
    "dual": ours.generate_with_dual_cache,
}
RULES: dict[str, dict[str, Any]] = {
    "schedule": {},
    "threshold": dict(threshold=0.6),
    "never": dict(threshold=2.0),
    "factor": dict(factor=1.2),
    "quirk": dict(factor=1.2, quirk=True),
    "factor wins": dict(factor=1.2, threshold=0.0),
}
SHAPE = dict(steps=8, gen_length=8, block_length=4)


def prompts(B: int, P: int) -> Tensor:
    return torch.randint(0, MASK, (B, P))


def ours_of(cache: str, model: FullModel, prompt: Tensor, rule: dict[str, Any], **more: Any) -> Any:
    how = {"bug_compatible" if k == "quirk" else k: v for k, v in rule.items()}
    return GENERATORS[cache](model, prompt, mask_id=MASK, **{**SHAPE, **how, **more})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", GENERATORS)
def test_equals_the_loop(cache: str, rule: str) -> None:
    for seed in range(2):
        logits, prompt = table(seed, sure=2.0), prompts(1, 5)
        model, twin = FullModel(logits), FullModel(logits)
        x, nfe = ours_of(cache, model, prompt, RULES[rule])
        want, forwards = fast_dllm(twin, prompt, cache, **SHAPE, **RULES[rule])
        assert model.calls == twin.calls
        assert x.tolist() == want.tolist()
        assert nfe == forwards == len(model.calls)
        assert not (x == MASK).any()


def test_caches_matter() -> None:
    """The three see different things, so that equality above says something."""
    prompt = prompts(1, 5)
    results = [
        ours_of(cache, FullModel(table(sure=2.0)), prompt, {})[0].tolist() for cache in GENERATORS
    ]
    assert results[0] != results[1] != results[2]


@pytest.mark.parametrize("steps", [2, 6, 12])
def test_schedules(steps: int) -> None:
    """One step a block (where the first state of theirs fails), and steps that commit nothing."""
    for cache in GENERATORS:
        prompt, shape = prompts(1, 4), {**SHAPE, "steps": steps}
        model, twin = FullModel(table(sure=2.0)), FullModel(table(sure=2.0))
        x, nfe = ours_of(cache, model, prompt, {}, steps=steps)
        want, forwards = fast_dllm(twin, prompt, cache, **shape)
        assert (x.tolist(), nfe, model.calls) == (want.tolist(), forwards, twin.calls)


@pytest.mark.parametrize("rule", ["schedule", "threshold", "factor", "quirk"])
@pytest.mark.parametrize("cache", GENERATORS)
def test_batches(cache: str, rule: str) -> None:
    """Each request as alone, though they finish at different times (theirs: batch 1, or errors).

    Without a cache and with a schedule exactly; else a request that is done waits, and what is
    stale meanwhile is its own.
    """
    prompt, logits = prompts(3, 4), table(sure=2.0)
    x, nfe = ours_of(cache, FullModel(logits), prompt, RULES[rule])
    alone = [
        fast_dllm(FullModel(logits), prompt[b : b + 1], cache, **SHAPE, **RULES[rule])
        for b in range(3)
    ]
    assert x.tolist() == [a[0][0].tolist() for a in alone]
    assert max(a[1] for a in alone) <= nfe <= sum(a[1] for a in alone)


def test_a_prompt_with_masks_under_a_threshold() -> None:
    """A block's full forwards fill them too, as theirs."""
    prompt = prompts(1, 5)
    prompt[0, 2] = MASK
    for cache in GENERATORS:
        model, twin = FullModel(table(sure=2.0)), FullModel(table(sure=2.0))
        x, nfe = ours_of(cache, model, prompt, RULES["threshold"])
        want, forwards = fast_dllm(twin, prompt, cache, **SHAPE, **RULES["threshold"])
        assert (x.tolist(), nfe, model.calls) == (want.tolist(), forwards, twin.calls)
        # with a schedule theirs runs out of steps where the prompt's mask took a quota
        for steps in (8, 12):
            x, _ = ours_of(cache, FullModel(table()), prompt, {}, steps=steps)
            assert not (x[:, 5:] == MASK).any()


@pytest.mark.parametrize("rule", ["schedule", "threshold", "factor", "quirk"])
@pytest.mark.parametrize("cache", GENERATORS)
def test_a_model_that_prefers_the_mask(cache: str, rule: str) -> None:
    """Theirs never ends."""
    model = FullModel(table(mask_logit=50.0))
    x, _ = ours_of(cache, model, prompts(2, 4), RULES[rule])
    assert not (x == MASK).any()


@pytest.mark.parametrize("rule", ["schedule", "threshold"])
def test_a_model_that_says_nothing(rule: str) -> None:
    for cache in GENERATORS:
        with pytest.raises(ValueError, match="model"):
            ours_of(cache, FullModel(table() * torch.nan), prompts(1, 4), RULES[rule])


@pytest.mark.parametrize("cache", GENERATORS)
def test_one_read_a_step(cache: str) -> None:
    class Silent(FullModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            reads, before = self.reads, self.reads.count
            out = super().__call__(*args, **kwargs)
            reads.count = before  # the fake's own are not counted
            return out

    model = Silent(table())
    with Reads() as model.reads:
        _, nfe = ours_of(cache, model, prompts(2, 4), RULES["threshold"])
    assert model.reads.count == nfe


def test_step_callback() -> None:
    steps: list[int] = []
    _, nfe = ours_of(
        "dual", FullModel(table()), prompts(1, 4), RULES["threshold"], step_callback=steps.append
    )
    assert steps == list(range(nfe))


@pytest.mark.parametrize("cache", GENERATORS)
def test_draws(cache: str) -> None:
    prompt = prompts(3, 4)

    def once(rule: str = "threshold", **more: Any) -> list[list[int]]:
        more = {"temperature": 1.0} | more
        return ours_of(cache, FullModel(table(sure=1.0)), prompt, RULES[rule], **more)[0].tolist()

    torch.manual_seed(3)
    first = once()
    assert first != once()
    torch.manual_seed(3)
    assert first == once()
    assert once(seed=1) != once(seed=2)
    assert once("quirk", seed=1) != once("quirk", seed=2)
    lots = dict(temperature=0.0, remasking="random")
    assert once("schedule", seed=1, **lots) != once("schedule", seed=2, **lots)


def test_what_does_not_divide() -> None:
    for generate in GENERATORS.values():
        with pytest.raises(ValueError, match="gen_length"):
            generate(FullModel(table()), prompts(1, 2), 8, 10, 4, mask_id=MASK)
        with pytest.raises(NotImplementedError, match="remasking"):
            generate(FullModel(table()), prompts(1, 2), 8, 8, 8, remasking="none", mask_id=MASK)
        x, nfe = generate(FullModel(table()), prompts(2, 3), 0, 0, 8, mask_id=MASK)
        assert (x.shape, nfe) == ((2, 3), 0)
