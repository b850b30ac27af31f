"""LLaDA's generator against its loop in plain words: the same tokens from the same calls."""

from typing import Any

import pytest
import torch
from fake_diffusion import MASK, FullModel, V, table
from peer_diffusion_loops import llada
from reads import Reads
from torch import Tensor

from pydecode.compat.diffusion.llada import generate

LATE = dict(eos_id=3, eot_id=4)


def prompts(B: int, P: int) -> Tensor:
    return torch.randint(0, MASK, (B, P))


def same(prompt: Tensor, theirs: dict[str, Any], **given: Any) -> Tensor:
    """Ours on the batch equals the plain loop request by request; and calls, for one request."""
    attention_mask = given.pop("attention_mask", None)
    shape = dict(steps=6, gen_length=8, block_length=4) | given
    logits = table(sure=2.0)
    logits[:, 3:5] += 3.0  # EOS and EoT are likely
    model = FullModel(logits)
    got = generate(
        model, prompt, attention_mask, mask_id=MASK, **shape, **LATE, **theirs.pop("ours", {})
    )
    assert (got.dtype, got.shape) == (torch.int64, (len(prompt), prompt.shape[1] + 8))
    for b in range(len(prompt)):
        one = None if attention_mask is None else attention_mask[b : b + 1]
        twin = FullModel(logits)
        want = llada(twin, prompt[b : b + 1], one, **shape, **theirs)
        assert got[b].tolist() == want[0].tolist()
        if len(prompt) == 1:
            assert model.calls == twin.calls
    assert len(model.calls) == shape["steps"]
    return got


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("steps", [2, 6, 12])
def test_equals_the_loop(B: int, steps: int) -> None:
    same(prompts(B, 5), {}, steps=steps)


def test_one_block_and_many() -> None:
    for block_length in (2, 8):
        same(prompts(2, 3), {}, steps=8, block_length=block_length)


@pytest.mark.parametrize("B", [1, 3])
def test_left_padding(B: int) -> None:
    attention_mask = torch.arange(5) >= torch.randint(0, 4, (B, 1))
    same(prompts(B, 5), {}, attention_mask=attention_mask.long())


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_guidance(B: int, padded: bool) -> None:
    """Theirs raises NameError without an attention_mask."""
    mask = torch.ones(B, 5, dtype=torch.long) if padded else None
    same(
        prompts(B, 5),
        dict(cfg_scale=1.5, ours=dict(cfg_scale=1.5)),
        attention_mask=mask,
    )


def test_forbidden_eos() -> None:
    got = same(prompts(8, 4), dict(eos=3, ours=dict(logits_eos_inf=True)))
    assert not (got[:, 4:] == 3).any()


@pytest.mark.parametrize("forbidden", [False, True])
def test_late_eos(forbidden: bool) -> None:
    """EOS and EoT are scored 0, and no part of the law of the others."""
    got = same(
        prompts(8, 4),
        dict(
            late=(3, 4),
            eos=3 if forbidden else None,
            ours=dict(confidence_eos_eot_inf=True, logits_eos_inf=forbidden),
        ),
    )
    assert (got[:, 4:] == 4).any()
    assert forbidden != bool((got[:, 4:] == 3).any())


def test_a_prompt_with_masks() -> None:
    """They are in the race of the first block, as theirs."""
    prompt = prompts(4, 5)
    prompt[::2, 2] = MASK
    for steps in (8, 12):  # 12: more steps than masks, the last of which commit nothing
        same(prompt, {}, steps=steps)


def test_a_model_that_prefers_the_mask_is_no_obstacle() -> None:
    x = generate(FullModel(table(mask_logit=50.0)), prompts(3, 4), None, 4, 8, 4, mask_id=MASK)
    assert not (x == MASK).any()


def test_reads_no_data() -> None:
    """On the meta device there is none; theirs reads each request's quota in each step."""
    model = FullModel(table().to("meta"))
    for more in ({}, dict(cfg_scale=1.0), dict(confidence_eos_eot_inf=True, **LATE)):
        x = generate(
            model,
            *(prompts(2, 4).to("meta"), None, 4, 8, 4),
            temperature=0.5,
            mask_id=MASK,
            **more,
        )
        assert x.shape == (2, 12)
    with Reads() as reads:
        generate(FullModel(table()), prompts(2, 4), None, 4, 8, 4, mask_id=MASK)
    assert reads.count == 0


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_draws(remasking: str) -> None:
    prompt = prompts(3, 4)

    def once(**seed: Any) -> list[list[int]]:
        model = FullModel(table(sure=1.0))
        return generate(
            model, prompt, None, 4, 8, 4, 1.0, remasking=remasking, mask_id=MASK, **seed
        ).tolist()

    torch.manual_seed(3)
    first = once()
    assert first != once()
    torch.manual_seed(3)
    assert first == once()
    assert once(seed=1) != once(seed=2)
    seeds = torch.tensor([5, 6, 7])
    assert once(seed=seeds)[1:2] == once(seed=torch.tensor([0, 6, 1]))[1:2]


def test_temperature_reaches_the_sampler() -> None:
    """One step, one position: the law of the token is softmax(logits / T)."""
    logits = table(sure=1.0)
    prompt = prompts(1, 3).expand(4000, 3)
    got = generate(FullModel(logits), prompt, None, 1, 1, 1, 0.5, mask_id=MASK, seed=9)[:, 3]
    model = FullModel(logits)
    law = torch.softmax(
        model(torch.cat([prompt[:1], torch.tensor([[MASK]])], 1)).logits[0, 3] / 0.5, -1
    )
    counts = torch.bincount(got, minlength=V)
    assert (counts - 4000 * law).abs().max() < 5 * (4000 * law.max()) ** 0.5
    assert counts.max() < 4000


def test_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="gen_length"):
        generate(FullModel(table()), prompts(1, 2), None, 8, 10, 4, mask_id=MASK)
    with pytest.raises(ValueError, match="steps"):
        generate(FullModel(table()), prompts(1, 2), None, 9, 16, 8, mask_id=MASK)
    with pytest.raises(NotImplementedError, match="remasking"):
        generate(FullModel(table()), prompts(1, 2), None, 8, 8, 8, remasking="none", mask_id=MASK)
