"""A position is drawn afresh in every step: a rejected draw that came again would bias the rest."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_diffusion import MASK, BlockModel, FullModel, table

import pydecode
from pydecode import philox
from pydecode.compat.diffusion import dream, fast_dllm, llada, sdar

PROMPT = torch.arange(8).view(2, 4)
BLOCKS: dict[str, Any] = dict(gen_length=8, block_length=4)
HOT: dict[str, Any] = dict(temperature=1.0, seed=3)
FAST: dict[str, Any] = dict(threshold=0.9, mask_id=MASK, **BLOCKS, **HOT)
LOOPS: dict[str, Any] = {
    "llada": lambda: llada.generate(
        FullModel(table()), PROMPT, None, 8, mask_id=MASK, **BLOCKS, **HOT
    ),
    "late": lambda: llada.generate(
        *(FullModel(table()), PROMPT, None, 8),
        **dict(mask_id=MASK, confidence_eos_eot_inf=True, eos_id=1, eot_id=2, **BLOCKS, **HOT),
    ),
    "none": lambda: fast_dllm.generate(FullModel(table()), PROMPT, 8, **FAST),
    "dual": lambda: fast_dllm.generate_with_dual_cache(FullModel(table()), PROMPT, 8, **FAST),
    "quirk": lambda: fast_dllm.generate(
        FullModel(table()), PROMPT, 8, factor=0.5, bug_compatible=True, **FAST
    ),
    "dream": lambda: dream.diffusion_generate(
        FullModel(table()), PROMPT, max_new_tokens=5, steps=5, mask_token_id=MASK, **HOT
    ),
    "alg_temp": lambda: dream.diffusion_generate(
        *(FullModel(table()), PROMPT),
        **dict(max_new_tokens=5, steps=5, mask_token_id=MASK, alg="entropy", alg_temp=1.0, **HOT),
    ),
    "sdar": lambda: sdar.block_diffusion_generate(
        *(BlockModel(table()), {"input_ids": PROMPT}, MASK),
        **dict(denoising_steps=4, past_key_values=SimpleNamespace(), **BLOCKS, **HOT),
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_every_step_has_its_own_draws(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: dict[str, list[int]] = {}

    def remember(place: Any, name: str, offset_of: Any) -> None:
        original = getattr(place, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if (offset := offset_of(args, kwargs)) is not None:
                offsets.setdefault(name, []).append(int(offset))
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, function)

    remember(pydecode, "unmask", lambda args, kwargs: kwargs["offset"])
    remember(pydecode, "sample_and_score", lambda args, kwargs: kwargs.get("offset"))
    if loop == "alg_temp":
        remember(philox, "gumbel", lambda args, kwargs: args[2])
    LOOPS[loop]()
    assert offsets
    for seen in offsets.values():
        assert len(seen) > 3
        assert len(set(seen)) == len(seen)
