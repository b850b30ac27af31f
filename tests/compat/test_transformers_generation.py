"""generate(custom_generate=...): plain generate's tokens, and its laws."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peer_transformers import p_value, text_law  # noqa: E402
from tiny_llama import tiny_llama  # noqa: E402
from transformers_methods import METHODS, padded_batch, repeating_llama  # noqa: E402

from pydecode.compat.transformers import assisted, prompt_lookup  # noqa: E402

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def model() -> Any:
    return repeating_llama()


@pytest.fixture
def other() -> Any:
    return tiny_llama(1)


def likely_stop(model: Any, batch: dict[str, Tensor], options: dict[str, Any]) -> int:
    """A token that ends the first text in its middle."""
    return int(model.generate(**batch, **options)[0, 14 + 6])


@every_method
@pytest.mark.parametrize("stop", [False, True])
def test_greedy_is_plain_generate(model: Any, other: Any, name: str, stop: bool) -> None:
    batch = padded_batch()
    options: dict[str, Any] = dict(max_new_tokens=24, do_sample=False)
    if stop:
        options["eos_token_id"] = [likely_stop(model, batch, options), 59]
    want = model.generate(**batch, **options)
    method = METHODS[name](other)
    got = model.generate(**batch, custom_generate=method, **options)
    assert torch.equal(got, want)
    if stop:  # cut inside an accepted path or not, padded behind
        assert (got[0] == 0).any()
    assert model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == "eager"
    # every step of every request is accounted for
    lengths = [len(t) for t in method.last.tokens]
    assert [sum(a) + len(a) >= n for a, n in zip(method.last.accepted, lengths)] == [True] * 4


def test_drafts_save_passes(model: Any) -> None:
    prompt = torch.tensor([[*range(3, 20), 3, 4, 5]])
    itself = assisted(model, num_assistant_tokens=4, assistant_confidence_threshold=0)
    got = model.generate(prompt, max_new_tokens=20, custom_generate=itself)
    assert torch.equal(got, model.generate(prompt, max_new_tokens=20))
    assert itself.last.steps == 4
    assert model.config._attn_implementation == "sdpa"


def test_a_draft_ends_where_the_assistant_is_unsure(model: Any, other: Any) -> None:
    for threshold, want in ((1.1, {1}), (0.0, {20})):  # nothing is that sure; everything is
        method = assisted(other, assistant_confidence_threshold=threshold)
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=30, custom_generate=method)
        assert set(method.last.drafted[0][:3]) == want


@pytest.mark.parametrize(
    "limit", [dict(max_new_tokens=1), dict(max_new_tokens=5), dict(max_length=17)]
)
@every_method
def test_length_limits(model: Any, other: Any, name: str, limit: dict[str, int]) -> None:
    batch = padded_batch()
    got = model.generate(**batch, custom_generate=METHODS[name](other), **limit)
    assert torch.equal(got, model.generate(**batch, **limit))


# ---- sampling ------------------------------------------------------------------------------------


@every_method
def test_sampled_output_has_the_models_law(name: str) -> None:
    """700 texts through several steps, under all four filters, against the enumerated law."""
    V, rows = 5, 700
    model = tiny_llama(0, vocab_size=V)
    other = tiny_llama(4, vocab_size=V)  # one whose unfiltered drafts would be seen to be biased
    method, prompt = METHODS[name](other), [1, 2, 1, 2, 1]
    # each of the four matters: without it the law is at least 0.08 away
    filters = dict(temperature=2.0, top_k=4, top_p=0.85, min_p=0.3)
    options = dict(max_new_tokens=3, do_sample=True, eos_token_id=None, pad_token_id=0, **filters)
    got = model.generate(torch.tensor([prompt]).expand(rows, -1), custom_generate=method, **options)
    processors = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(2.0),
            transformers.TopKLogitsWarper(4),
            transformers.TopPLogitsWarper(0.85),
            transformers.MinPLogitsWarper(0.3),
        ]
    )
    law = text_law(model, prompt, 3, processors)
    assert p_value(got[:, 5:], law, V) > 1e-4
    assert sum(map(sum, method.last.accepted)) > 0
    # the check can fail: without any one of the filters, and for another model
    for i in range(4):
        fewer = transformers.LogitsProcessorList([*processors[:i], *processors[i + 1 :]])
        assert p_value(got[:, 5:], text_law(model, prompt, 3, fewer), V) < 1e-4
    assert p_value(got[:, 5:], text_law(other, prompt, 3, processors), V) < 1e-4


@every_method
def test_manual_seed_repeats_a_run(model: Any, other: Any, name: str) -> None:
    batch = padded_batch()
    options = dict(max_new_tokens=20, do_sample=True, temperature=2.0)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(model.generate(**batch, custom_generate=METHODS[name](other), **options))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_num_return_sequences(model: Any) -> None:
    options = dict(max_new_tokens=20, do_sample=True, temperature=2.0, num_return_sequences=3)
    got = model.generate(torch.tensor([[3, 4, 5]]), custom_generate=prompt_lookup(), **options)
    assert got.shape == (3, 23)
    assert not torch.equal(got[0], got[1])
