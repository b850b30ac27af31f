"""The whole loop of masked-diffusion decoding against plain loops over a dense twin."""

from typing import Any

import pytest
import torch
from tiny_diffusion import MASK, TinyDiffusion, twin_generate
from torch import Tensor

import pydecode
from pydecode.decode import block_cache
from pydecode.decode.diffusion import DiffusionResult, generate

KINDS = ("none", "prefix", "dual", "block_causal")
RULES: dict[str, dict[str, Any]] = {
    "stepwise": dict(rule="top_k"),
    "top_k": dict(rule="top_k", steps_per_block=2),
    "threshold": dict(rule="threshold", threshold=0.6),
    "threshold_capped": dict(rule="threshold", threshold=0.4, strict=True, max_commit=2),
    "threshold_slack": dict(rule="threshold", threshold=0.95, slack=0.2, min_commit=2),
    "factor": dict(rule="factor", factor=1.4),
    "entropy": dict(rule="entropy", threshold=1.2),
    "entropy_bound": dict(rule="entropy_bound", threshold=1.0),
    "prefix": dict(rule="prefix", threshold=0.5),
    "sequential": dict(rule="sequential", k=2),
    "segments": dict(rule="segments", threshold=0.8, low=0.3),
    "posterior": dict(rule="posterior", steps_per_block=3),
}


@pytest.fixture(scope="module")
def model() -> TinyDiffusion:
    return TinyDiffusion()


def run(model: TinyDiffusion, prompt: Tensor, kind: str = "none", **given: Any) -> DiffusionResult:
    """The loop on a fresh cache with room to spare."""
    given = dict(length=11, block_length=4, mask_id=MASK, cache=kind) | given
    kv = None if kind == "none" else model.kv(len(prompt), prompt.shape[1] + given["length"] + 3)
    return generate(model, prompt, **{"kv": kv, **given})


def prompts(batch: int = 3, width: int = 6) -> Tensor:
    return torch.randint(0, MASK, (batch, width))


def expect_twin(
    result: DiffusionResult, model: TinyDiffusion, prompt: Tensor, kind: str, **given: Any
) -> None:
    given = dict(length=11, block_length=4) | given
    seeds = given.pop("seeds", [0] * len(prompt))
    for b, row in enumerate(prompt.tolist()):
        tokens, order, steps = twin_generate(model, row, kind=kind, seed=seeds[b], **given)
        assert result.tokens[b].tolist() == tokens
        assert result.order[b].tolist() == order
        assert result.num_steps[b] == steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_and_cache_equals_a_plain_loop(
    model: TinyDiffusion, name: str, kind: str
) -> None:
    """Tokens, the step of every token and the number of steps, for blocks of 4, 4 and 3."""
    prompt, seeds = prompts(), torch.tensor([5, 6, 7])
    given = RULES[name]
    result = run(model, prompt, kind, **given, seed=seeds)
    expect_twin(result, model, prompt, kind, **given, seeds=seeds.tolist())
    assert torch.equal(result.tokens[:, :6], prompt)
    assert not (result.tokens == MASK).any()
    assert (result.order >= 0).all()
    # a request that is done waits, so the batch takes between its slowest and all in turn
    assert result.num_steps.max() <= result.num_forwards <= result.num_steps.sum()
    if name == "stepwise":
        assert result.num_forwards == 11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stepwise", "threshold", "prefix"])
def test_shifted_logits(model: TinyDiffusion, name: str, kind: str) -> None:
    """Dream: position i's token is read from row i - 1, which every pass feeds as well."""
    prompt = prompts(2)
    result = run(model, prompt, kind, shift=1, **RULES[name])
    expect_twin(result, model, prompt, kind, shift=1, **RULES[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("width", "length", "block_length"),
    [(6, 5, 1), (1, 3, 8), (0, 5, 2), (8, 4, 4), (7, 9, 4), (3, 1, 4), (5, 0, 4), (2, 3, 4)],
    ids="{}".format,
)
def test_block_boundaries(
    model: TinyDiffusion, width: int, length: int, block_length: int, shift: int, kind: str
) -> None:
    """One-token blocks, one block, no prompt, aligned, one token, none, a block with the prompt."""
    prompt = prompts(2, width)
    # without a prompt all rows are equal, so confidences tie up to rounding
    given = dict(rule="top_k" if width else "sequential", steps_per_block=2, shift=shift)
    given |= dict(length=length, block_length=block_length)
    result = run(model, prompt, kind, **given)
    expect_twin(result, model, prompt, kind, **given)


def test_block_causal_cache_is_exact(model: TinyDiffusion) -> None:
    """The cached loop, and the uncached one under the static mask, are the same loop."""
    prompt = prompts(3, 9)
    for rule in ("threshold", "posterior"):
        for shift in (0, 1):
            cached = run(model, prompt, "block_causal", shift=shift, **RULES[rule])
            uncached = run(model, prompt, "block_causal", kv=None, shift=shift, **RULES[rule])
            assert torch.equal(cached.tokens, uncached.tokens)
            assert torch.equal(cached.order, uncached.order)
            assert cached.num_forwards == uncached.num_forwards


def test_approximate_caches_do_differ(model: TinyDiffusion) -> None:
    """A negative control: stale K/V matter in this model, so the twin's staleness is tested."""
    prompt = prompts(8)
    results = [run(model, prompt, kind, **RULES["threshold"]).tokens for kind in KINDS]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_longer_than_block_attention_takes(
    model: TinyDiffusion, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find their own rows in the cache, with prompts of different lengths too."""
    prompt, lengths = prompts(2, 9), torch.tensor([9, 5])
    given = dict(prompt_lengths=lengths, shift=1, **RULES["threshold"])
    want = run(model, prompt, kind, **given)
    monkeypatch.setattr(block_cache, "MAX_ROWS", 1)
    monkeypatch.setattr(pydecode, "block_attention", None)  # it is not called
    result = run(model, prompt, kind, **given)
    assert torch.equal(result.tokens, want.tokens)
    assert torch.equal(result.order, want.order)


def test_rows_fed_stored_and_counted(model: TinyDiffusion) -> None:
    """What each kind of cache feeds the model: (first position, rows), prompt 6, blocks of 4."""
    fed: list[tuple[int, int, int]] = []

    def watching(tokens: Tensor, positions: Tensor, cache: Any, mask: Any, keep: Any) -> Tensor:
        fed.append((int(positions[0, 0]), tokens.shape[1], keep.stop - keep.start))
        return model(tokens, positions, cache, mask, keep)

    def rows(kind: str, **given: Any) -> list[tuple[int, int, int]]:
        fed.clear()
        kv = None if kind == "none" else model.kv(1, 14)
        given = dict(length=8, block_length=4, steps_per_block=2, mask_id=MASK) | given
        assert generate(watching, prompts(1), cache=kind, kv=kv, **given).num_forwards == len(fed)
        return fed

    assert rows("none") == [(0, 14, 4)] * 4
    assert rows("prefix") == [(0, 14, 4), (6, 8, 4), (0, 14, 4), (10, 4, 4)]
    assert rows("dual") == [(0, 14, 4), (6, 4, 4), (0, 14, 4), (10, 4, 4)]
    assert rows("dual", shift=1) == [(0, 14, 5), (5, 5, 5), (0, 14, 5), (9, 5, 5)]
    # blocks [4, 8) (two masks), [8, 12), [12, 14); each first pass also stores the block before
    want = [(0, 8, 2), (4, 4, 2), (4, 8, 4), (8, 4, 4), (8, 6, 2), (12, 2, 2)]
    assert rows("block_causal") == want


def test_a_model_may_return_all_rows(model: TinyDiffusion) -> None:
    """keep is an offer: a model that ignores it and the cache takes part."""
    prompt = prompts(2)

    def plain(tokens: Tensor, positions: Tensor, cache: Any, mask: Any, keep: Any) -> Tensor:
        return model(tokens, positions, cache, mask, slice(None))

    given = dict(length=5, block_length=3, mask_id=MASK)
    assert torch.equal(generate(plain, prompt, **given).tokens, run(model, prompt, **given).tokens)


def test_end_of_text(model: TinyDiffusion) -> None:
    """What follows the first eos of the generated part becomes eos; then nothing more is fed."""
    prompt, eos = prompts(6), 3
    prompt[:, 2] = eos  # one in the prompt ends nothing
    ends = torch.tensor([0, 3, 6, 15, 99, 2])

    def ending(tokens: Tensor, positions: Tensor, cache: Any, mask: Any, keep: Any) -> Tensor:
        logits = model(tokens, positions, cache, mask, keep)
        at = positions[:, keep] == 6 + ends[: len(tokens), None]
        logits[..., eos] = torch.where(at, 100.0, -100.0)
        return logits

    given = dict(length=16, block_length=4, steps_per_block=2, mask_id=MASK)
    free = generate(ending, prompt, **given)
    result = generate(ending, prompt, eos_id=eos, **given)
    for b, end in enumerate(ends.clamp(max=16).tolist()):
        blocks = min(end // 4 + 1, 4)
        assert result.tokens[b, : 6 + end].equal(free.tokens[b, : 6 + end])
        assert (result.tokens[b, 6 + end :] == eos).all()
        assert result.num_steps[b] == 2 * blocks
        assert result.order[b, : 4 * blocks].equal(free.order[b, : 4 * blocks])
        assert (result.order[b, 4 * blocks :] == -1).all()
    assert result.num_forwards == 8
    assert generate(ending, prompt[:3], eos_id=eos, **given).num_forwards == 4  # 0, 3 and 6
    assert not (free.tokens[0, 6:] == eos).all()
