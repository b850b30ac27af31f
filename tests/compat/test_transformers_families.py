"""attn_implementation="pydecode" in the place of SDPA, for whole models of several families."""

from typing import Any

import pytest
import torch
from torch import Tensor

T = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_families import CAUSAL, NOT_SDPA, OTHERS, twins  # noqa: E402

CLOSE = dict(rtol=0, atol=5e-5)


def tokens_and_padding(kind: str) -> tuple[Tensor, Tensor | None]:
    tokens = torch.randint(3, 61, (3, 13))
    real = torch.ones_like(tokens)
    real[1, :4] = 0
    real[2, :9] = 0
    return tokens, {"none": None, "ones": torch.ones_like(real), "left": real}.get(
        kind, real.flip(1)
    )


def compare(a: Tensor, b: Tensor, real: Tensor | None = None) -> None:
    if real is not None:
        a, b = a[real.bool()], b[real.bool()]
    torch.testing.assert_close(b, a, **CLOSE)


@pytest.mark.parametrize("kind", ["none", "ones", "left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_padded_batches(family: str, kind: str) -> None:
    model, ours = twins(family)
    tokens, real = tokens_and_padding(kind)
    want = model(tokens, attention_mask=real).logits
    compare(want, ours(tokens, attention_mask=real).logits, real)
    # negative control: a token reaches the one after it (both in one window, and in one chunk)
    tokens[:, 10] = 60 - tokens[:, 10]
    got = ours(tokens, attention_mask=real).logits
    assert not torch.allclose(want[0, 11], got[0, 11], atol=0.01)
    compare(want[0, :10], got[0, :10])


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "left"])
@torch.no_grad()
def test_caches(family: str, static: bool, kind: str) -> None:
    """A prompt, single tokens and several at once; past the windows of the sliding layers."""
    model, ours = twins(family)
    tokens, real = tokens_and_padding(kind)
    logits = []
    for m in (model, ours):
        if static:
            past = T.StaticCache(config=m.config, max_cache_len=16)
        else:
            past = T.DynamicCache(config=m.config)
        got = []
        for first, end in ((0, 6), (6, 7), (7, 8), (8, 13)):
            seen = None if real is None else real[:, :end]
            part = m(tokens[:, first:end], attention_mask=seen, past_key_values=past)
            got.append(part.logits)
        logits.append(torch.cat(got, 1))
    compare(*logits, real)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_packed_sequences(family: str) -> None:
    """Positions that start again: no sequence sees another."""
    model, ours = twins(family)
    tokens, at = torch.randint(3, 61, (1, 11)), torch.tensor([[*range(4), 0, *range(6)]])
    want = model(tokens, position_ids=at, use_cache=False).logits
    compare(want, ours(tokens, position_ids=at, use_cache=False).logits)
    if family != "gpt_oss":  # whose masks transformers makes without the positions
        compare(want[:, 5:], ours(tokens[:, 5:], use_cache=False).logits)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@torch.no_grad()
def test_four_dimensional_masks_of_a_batch(family: str, kind: str) -> None:
    """A random tree for each request, behind a cache; the mask is taken as it is in every layer."""
    model, ours = twins(family)
    tokens, _ = tokens_and_padding("none")
    visible = (torch.rand(3, 1, 13, 13) < 0.6).tril() | torch.eye(13, dtype=torch.bool)
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    at = torch.arange(13) - (torch.arange(13) > 8) * 2  # positions as of a tree
    logits = []
    for m, eager in ((model, family in NOT_SDPA), (ours, False)):
        mask = additive if eager or kind == "additive" else visible
        part = m(
            tokens,
            attention_mask=mask,
            position_ids=at.expand(3, 13),
            use_cache=False,
        )
        logits.append(part.logits)
    compare(*logits)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize(
    "options", [dict(), dict(cache_implementation="static"), dict(num_beams=2)]
)
def test_generate_is_the_same(family: str, options: dict[str, Any]) -> None:
    tokens, real = tokens_and_padding("left")
    options = dict(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    want, got = (m.generate(tokens, attention_mask=real, **options) for m in twins(family))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_encoders_and_cross_attention(family: str, kind: str) -> None:
    model, ours = twins(family)
    tokens, real = tokens_and_padding(kind)
    call: dict[str, Any] = dict(input_ids=tokens, attention_mask=real)
    rows = real
    if family == "bart":  # the source is padded, and its states are seen by the decoder
        call["decoder_input_ids"], rows = tokens[:, :5], None
    elif family == "whisper":  # the target is padded
        call = dict(input_features=torch.randn(3, 8, 20), decoder_input_ids=tokens)
        call["decoder_attention_mask"] = real
    elif family == "vit":
        call, rows = dict(pixel_values=torch.randn(3, 3, 16, 16)), None
    compare(model(**call)[0], ours(**call)[0], rows)


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_encoder_decoder_generates_the_same(family: str) -> None:
    tokens, real = tokens_and_padding("right")
    inputs: dict[str, Any] = dict(inputs=tokens, attention_mask=real)
    if family == "whisper":
        inputs = dict(input_features=torch.randn(3, 8, 20))
    options = dict(max_new_tokens=7, do_sample=False, num_beams=1)
    want, got = (m.generate(**inputs, **options) for m in twins(family))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_a_decoder_without_causality(is_causal: bool) -> None:
    model, ours = twins("llama")
    tokens, real = tokens_and_padding("right")
    call = dict(attention_mask=real, use_cache=False, is_causal=is_causal)
    compare(model(tokens, **call).logits, ours(tokens, **call).logits, real)


def test_a_position_bias_raises() -> None:
    sizes = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = T.T5EncoderModel(T.T5Config(**sizes))
    model.set_attn_implementation("pydecode")
    with pytest.raises(NotImplementedError, match="position_bias: not supported"):
        model.eval()(torch.randint(3, 61, (1, 5)))


# ---- torch.compile ------------------------------------------------------------------------------


def one_layer(family: str) -> tuple[Any, Any]:
    model, ours = twins(family)
    del model.model.layers[1:], ours.model.layers[1:]
    return model, ours


@torch.no_grad()
def test_a_padded_batch_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, ours = one_layer("llama")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tokens, real = tokens_and_padding("left")
    want = model(tokens, attention_mask=real, use_cache=False).logits
    compare(want, compiled(tokens, attention_mask=real, use_cache=False).logits, real)


@pytest.mark.slow
@torch.no_grad()
def test_every_mask_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, ours = one_layer("mistral")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tokens, real = tokens_and_padding("left")
    visible = (torch.rand(3, 1, 13, 13) < 0.6).tril() | torch.eye(13, dtype=torch.bool)
    additive = torch.where(visible, 0.0, -torch.inf)
    for mask in (None, visible, additive):
        at = None if mask is None else torch.arange(13).expand(3, 13)
        call = dict(attention_mask=mask, position_ids=at, use_cache=False)
        compare(model(tokens, **call).logits, compiled(tokens, **call).logits)
    # decoding steps over a static cache
    results = []
    for m, step in ((model, model), (ours, compiled)):
        past = T.StaticCache(config=m.config, max_cache_len=16)
        m(tokens[:, :8], attention_mask=real[:, :8], past_key_values=past)
        for i in (8, 9):
            call = dict(attention_mask=real[:, : i + 1], past_key_values=past)
            last = step(tokens[:, i : i + 1], **call).logits
        results.append(last)
    compare(*results, real[:, 9:10])
