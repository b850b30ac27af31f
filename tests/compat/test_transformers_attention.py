"""attn_implementation="pydecode" without our cache: right, or an error that names what is wrong."""

import copy
import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_llama import random_parents, tiny_llama, tree_logits  # noqa: E402

import pydecode.compat.transformers as compat  # noqa: E402
from pydecode import trees  # noqa: E402
from pydecode.compat.transformers.masks import make_mask  # noqa: E402

CLOSE = dict(rtol=0, atol=5e-5)
SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    attn_implementation="eager",
)


def on_pydecode(model: Any) -> Any:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("pydecode")
    return twin


def windowed() -> Any:
    torch.manual_seed(1)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=5))


def capped() -> Any:
    """Gemma 2: soft caps, another scale, sliding and full layers in turn."""
    torch.manual_seed(2)
    config = transformers.Gemma2Config(**SMALL, sliding_window=5, attn_logit_softcapping=3.0)
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [tiny_llama, windowed, capped])
@pytest.mark.parametrize("other", ["eager", "sdpa"])
@torch.no_grad()
def test_plain_forward(make: Any, other: str) -> None:
    if make is capped and other == "sdpa":
        pytest.skip("transformers has no soft cap on sdpa")
    model = make().eval()
    model.set_attn_implementation(other)
    tokens = torch.randint(0, 61, (2, 13))
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(
        on_pydecode(model)(tokens, use_cache=False).logits, expected, **CLOSE
    )


@pytest.mark.parametrize("make", [tiny_llama, windowed])
@torch.no_grad()
def test_a_dynamic_cache_goes_on(make: Any) -> None:
    model = make().eval()
    ours, tokens = on_pydecode(model), torch.randint(0, 61, (2, 15))
    past, got = transformers.DynamicCache(config=model.config), []
    for first, end in ((0, 9), (9, 10), (10, 15)):  # prompt, one token, several
        got.append(ours(tokens[:, first:end], past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), model(tokens, use_cache=False).logits, **CLOSE)


def test_generate() -> None:
    model = tiny_llama()
    tokens = torch.randint(3, 61, (2, 9))
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    got = on_pydecode(model).generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("hidden", [False, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("cached", [0, 6])
@torch.no_grad()
def test_four_dimensional_masks(hidden: float, cached: int) -> None:
    """Any mask, bool or additive, also behind a cache: here a tree behind its context."""
    model, context, parents = tiny_llama(), torch.randint(0, 61, (10,)).tolist(), random_parents(5)
    nodes = torch.randint(0, 61, (5,))
    expected = tree_logits(model, context, nodes, parents[0])
    visible = torch.ones(15, 15, dtype=torch.bool).tril()
    depth = trees.depths(parents)
    for node in range(5):
        for other in range(node):
            visible[10 + node, 10 + other] = is_ancestor(parents[0], other, node)
    mask = visible if hidden is False else torch.where(visible, 0.0, hidden)
    tokens = torch.cat([torch.tensor(context), nodes])[None]
    positions = torch.cat([torch.arange(10)[None], 10 + depth], 1)
    ours, past = on_pydecode(model), transformers.DynamicCache(config=model.config)
    if cached:
        ours(tokens[:, :cached], past_key_values=past)
    got = ours(
        tokens[:, cached:],
        attention_mask=mask[None, None, cached:],
        position_ids=positions[:, cached:],
        past_key_values=past,
    )
    torch.testing.assert_close(got.logits[0, 10 - cached :], expected, **CLOSE)


def is_ancestor(parents: Tensor, other: int, node: int) -> bool:
    while node > other:
        node = int(parents[node])
    return node == other


# ---- the attention function by itself -----------------------------------------------------------


def call(**options: Any) -> Tensor:
    """Over q [1, 4, 3, 8] and k, v [1, 2, 5, 8]."""
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = options.pop("attention_mask", None)
    return compat.attention(torch.nn.Module(), q, k, v, mask, **{"scaling": 0.5, **options})[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(1)),
        ("indices", torch.zeros(1)),
        ("cu_seq_lens_q", torch.zeros(2)),
        ("something_new", False),
        ("dropout", 0.1),
        ("output_attentions", True),
        ("attention_mask", torch.full((1, 1, 3, 5), 0.25)),  # a bias
        ("attention_mask", torch.ones(1, 4, 3, 5, dtype=torch.bool)),  # one a head
        ("attention_mask", torch.ones(1, 5, dtype=torch.bool)),
        ("attention_mask", torch.ones(1, 1, 3, 5, dtype=torch.int64)),
        ("attention_mask", torch.zeros(1, 1, 3, 5, requires_grad=True)),
    ],
)
def test_what_is_not_supported_raises_by_name(name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=name):
        call(**{name: value})


def test_what_is_none_or_harmless_passes() -> None:
    plain = call()
    assert torch.equal(plain, call(position_bias=None, use_cache=True, num_items_in_batch=3))


def test_bidirectional_and_sinks() -> None:
    everything = call(is_causal=False)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    torch.testing.assert_close(everything, call(attention_mask=mask), **CLOSE)
    assert not torch.allclose(everything[:, :2], call()[:, :2])
    assert torch.equal(everything[:, 2], call()[:, 2])
    with pytest.raises(NotImplementedError, match="sliding_window: without causality"):
        call(is_causal=False, sliding_window=2)
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)[None, None, 2:]
    windowed = call(sliding_window=2)  # causal: the last query is at the last key
    torch.testing.assert_close(windowed, call(attention_mask=window), **CLOSE)
    assert torch.equal(call(attention_mask=mask, sliding_window=2), call(attention_mask=mask))
    # a sink of +0 in the denominator, by the formula: out / (1 + exp(-lse))
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    s = (q[0] @ k[0].repeat_interleave(2, 0).mT) * 0.5
    p = s.exp() / (1 + s.exp().sum(-1, keepdim=True))
    expected = (p @ v[0].repeat_interleave(2, 0)).transpose(0, 1)[None]
    got = call(is_causal=False, s_aux=torch.zeros(4))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (1, 1, 2, 5), (1, 1, 3, 4), (1, 1, 1, 8)])
def test_a_mask_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="attention_mask: expected"):
        call(attention_mask=torch.ones(shape, dtype=torch.bool))
    if shape != (1, 1, 1, 8):  # of ranks, that one fits
        with pytest.raises(ValueError, match="attention_mask: expected ranks"):
            call(attention_mask=torch.ones(shape, dtype=torch.int32))


@pytest.mark.parametrize(("N", "S"), [(3, 1500), (1030, 1030), (1, 1), (4, 70)])
@pytest.mark.parametrize("kind", ["bool", "additive", "for all queries", "expanded", "transposed"])
def test_any_mask_of_any_size_is_sdpa(N: int, S: int, kind: str) -> None:
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, N), (2, S), (2, S)))
    mask = torch.rand(2, 1, N, S) < 0.4
    mask[..., 0] = True  # SDPA gives NaN where nothing is seen
    if kind == "for all queries":
        mask = mask[:, :, :1]
    elif kind == "expanded":
        mask = mask[:1, :, :1].expand(2, 1, N, S)
    elif kind == "transposed":
        mask = mask.mT.contiguous().mT
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    given = mask if kind != "additive" else torch.where(mask, 0.0, -10000.0)
    got = compat.attention(torch.nn.Module(), q, k, v, given)[0]
    torch.testing.assert_close(got.transpose(1, 2), want, **CLOSE)


def test_learned_queries_are_shared() -> None:
    """One set of queries for a batch of keys, as SDPA broadcasts it."""
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    got = compat.attention(torch.nn.Module(), q, k, v, None, is_causal=False)[0]
    torch.testing.assert_close(got.transpose(1, 2), want, **CLOSE)


def test_registered_once() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    compat.register()
    compat.register()
    assert ALL_ATTENTION_FUNCTIONS["pydecode"] is compat.attention
    assert ALL_MASK_ATTENTION_FUNCTIONS["pydecode"] is make_mask


def test_doctest() -> None:
    assert doctest.testmod(compat).failed == 0
