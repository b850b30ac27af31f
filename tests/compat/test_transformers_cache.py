"""PydecodeCache: what DynamicCache gives, read in place under our attention, gathered elsewhere."""

import copy
import doctest
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_llama import text_logits, tiny_llama  # noqa: E402

import pydecode  # noqa: E402
from pydecode.compat.transformers import PydecodeCache  # noqa: E402
from pydecode.compat.transformers import cache as cache_module  # noqa: E402

CLOSE = dict(rtol=0, atol=5e-5)
attentions = pytest.mark.parametrize("attention", ["pydecode", "sdpa", "eager"])


def windowed() -> Any:
    torch.manual_seed(1)
    sizes = tiny_llama().config
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keep += ("num_attention_heads", "num_key_value_heads", "initializer_range")
    options = {name: getattr(sizes, name) for name in keep}
    config = transformers.MistralConfig(**options, sliding_window=5)
    return transformers.MistralForCausalLM(config).eval()


@pytest.fixture
def model() -> Any:
    made = tiny_llama()
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    return made


def new_cache(model: Any, capacity: int = 48) -> PydecodeCache:
    return PydecodeCache(model, capacity, page_size=4, shuffle=True)


def padded_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 12, (3, 14))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :13] = 0, 0
    return dict(inputs=ids, attention_mask=mask)


@attentions
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, windowed])
def test_generate_is_that_of_a_dynamic_cache(attention: str, padded: bool, make: Any) -> None:
    model = make()
    batch = padded_batch()
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["inputs"])
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(**batch, **options)  # transformers' own, by SDPA or eager
    model.set_attn_implementation(attention)
    cache = new_cache(model)
    for _ in range(2):  # and once more behind a reset
        got = model.generate(**batch, past_key_values=cache, **options)
        assert torch.equal(got, want)
        assert cache.get_seq_length() == 33
        cache.reset()
        assert cache.get_seq_length() == 0
    # another batch size behind a reset: a pool of its own
    one = model.generate(batch["inputs"][:1], past_key_values=cache, **options)
    assert torch.equal(one, want[:1])


@attentions
@torch.no_grad()
def test_pieces_crop_and_go_on(model: Any, attention: str) -> None:
    """Prompt, chunk, rejected chunk, crop, one token: every logit is the plain text's."""
    text = torch.randint(0, 61, (2, 19))
    want = torch.stack([text_logits(model, row) for row in text.tolist()])
    model.set_attn_implementation(attention)
    cache = new_cache(model)
    for first, end in itertools.pairwise((0, 11, 15, 16)):
        got = model(text[:, first:end], past_key_values=cache).logits
        torch.testing.assert_close(got, want[:, first:end], **CLOSE)
    model(torch.randint(0, 61, (2, 7)), past_key_values=cache)  # rejected
    assert cache.get_seq_length() == 23
    assert cache.get_mask_sizes(3, 0) == (26, 0)
    cache.crop(-7)
    cache.crop(0)
    got = model(text[:, 16:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 16:], **CLOSE)
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most 0, got 3"):
        cache.crop(3)


@attentions
def test_their_assisted_generation(model: Any, attention: str) -> None:
    """Their loop crops what it rejects; their prompt lookup and assistant, on our cache."""
    prompt, options = torch.tensor([[3, 4, 5, 6, 3, 4, 5]]), dict(max_new_tokens=24)
    want = model.generate(prompt, **options)
    model.set_attn_implementation(attention)
    for draft in (dict(prompt_lookup_num_tokens=4), dict(assistant_model=tiny_llama(1))):
        got = model.generate(prompt, past_key_values=new_cache(model), **draft, **options)
        assert torch.equal(got, want)


@attentions
def test_beam_search_reorders(model: Any, attention: str) -> None:
    batch, options = padded_batch(), dict(max_new_tokens=12, num_beams=3)
    want = model.generate(**batch, **options)
    model.set_attn_implementation(attention)
    assert torch.equal(model.generate(**batch, past_key_values=new_cache(model), **options), want)


@attentions
@torch.no_grad()
def test_selecting_requests(model: Any, attention: str) -> None:
    """Fewer, more and repeated ones; two that share a past do not share what follows."""
    model.set_attn_implementation(attention)
    text = torch.randint(0, 61, (3, 9))
    base = new_cache(model)
    model(text[:, :6], past_key_values=base)
    for rows in ([2], [1, 1, 0], [2, 1, 0], [0, 0, 1, 1, 2, 2]):
        cache = copy.deepcopy(base)
        if len(rows) == 6:
            cache.batch_repeat_interleave(2)
        elif len(rows) == 3:
            cache.reorder_cache(torch.tensor(rows))
        else:
            cache.batch_select_indices(torch.tensor(rows))
        last = torch.randint(0, 61, (len(rows), 3))
        got = model(last, past_key_values=cache).logits
        for b, row in enumerate(rows):
            whole = text[row, :6].tolist() + last[b].tolist()
            torch.testing.assert_close(got[b], text_logits(model, whole)[6:], **CLOSE)


def test_a_copied_prompt_follows_the_model(model: Any) -> None:
    """A prompt's cache, copied for an answer; the model changes its attention in between."""
    prompt = torch.tensor([[3, 4, 5, 6]])
    base = new_cache(model)
    with torch.no_grad():
        model(prompt[:, :3], past_key_values=base)
    want = model.generate(prompt, max_new_tokens=9)
    for attention in ("eager", "pydecode", "sdpa"):
        cache = copy.deepcopy(base)
        model.set_attn_implementation(attention)
        got = model.generate(prompt, max_new_tokens=9, past_key_values=cache)
        assert torch.equal(got, want)
    assert base.get_seq_length() == 3


# ---- in place, or a copy -------------------------------------------------------------------------


def test_attention_reads_the_pool_in_place(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "pydecode" the keys that attention gets are the pages themselves."""
    model.set_attn_implementation("pydecode")
    cache, seen = new_cache(model), []
    for name in ("ranked_attention", "tree_attention"):
        original = getattr(pydecode, name)

        def spy(q: Tensor, k: Tensor, *args: Any, original: Any = original, **kw: Any) -> Any:
            seen.append(k.untyped_storage().data_ptr())
            return original(q, k, *args, **kw)

        monkeypatch.setattr(pydecode, name, spy)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, past_key_values=cache)
    assert seen == [cache.pool.k.untyped_storage().data_ptr()] * 8  # 4 passes of 2 layers


def test_what_is_returned() -> None:
    """A copy of all keys; or under "pydecode" their shape, no data, and the layer's name."""
    model = tiny_llama()
    cache = new_cache(model)
    k, v = torch.randn(2, 2, 2, 5, 8).unbind()
    got = cache.update(k, v, 0)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)
    model.set_attn_implementation("pydecode")
    got = cache.update(k[:, :, :1], v[:, :, :1], 0)
    assert got[0]._pydecode_layer is cache.layers[0]
    for x in got:
        assert x.shape == (2, 2, 6, 8)
        assert x.isnan().all()  # whoever reads it all the same notices
    model.set_attn_implementation("eager")
    again = cache.update(k[:, :, 1:2], v[:, :, 1:2], 0)
    assert torch.equal(again[0], torch.cat([k, k[:, :, :2]], 2))


def test_errors() -> None:
    model = tiny_llama()
    cache = new_cache(model, capacity=10)
    assert not cache.layers[0].is_initialized
    assert cache.get_max_length() == 10
    assert cache.is_croppable
    k = torch.randn(1, 2, 12, 8)
    cache.update(k, k, 0)  # whole pages: 12 fit
    with pytest.raises(ValueError, match="capacity: expected room for 13 tokens"):
        cache.update(k[:, :, :1], k[:, :, :1], 0)
    with pytest.raises(ValueError, match="key_states, value_states: expected"):
        cache.update(k[:, :1, :1], k[:, :1, :1], 1)
    with pytest.raises(ValueError, match="key_states, value_states: expected"):
        cache.update(k[:, :, :1].expand(2, -1, -1, -1), k[:, :, :1].expand(2, -1, -1, -1), 1)
    with pytest.raises(NotImplementedError, match="offload"):
        cache.offload(0)


def test_doctest() -> None:
    assert doctest.testmod(cache_module).failed == 0
