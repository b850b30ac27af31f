"""attn_implementation="pydecode" without our cache: right, or an error that names what is wrong."""

import copy
import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_llama import random_parents, text_logits, tiny_llama, tree_logits  # noqa: E402

import pydecode.compat.transformers as compat  # noqa: E402
from pydecode import trees  # noqa: E402

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


# ---- what would be silently wrong raises ---------------------------------------------------------


def padded() -> tuple[Any, dict[str, Any]]:
    tokens = torch.randint(3, 61, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return tiny_llama(), dict(inputs=tokens, attention_mask=mask)


def test_left_padded_generate_raises() -> None:
    model, inputs = padded()
    with pytest.raises(NotImplementedError, match=r"position_ids: expected to count up.*padded"):
        on_pydecode(model).generate(**inputs, max_new_tokens=3, pad_token_id=0)


@torch.no_grad()
def test_right_padding_is_harmless() -> None:
    model, tokens = tiny_llama(), torch.randint(0, 61, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    got = on_pydecode(model)(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[1, :5], text_logits(model, tokens[1, :5].tolist()), **CLOSE)


def test_static_cache_raises() -> None:
    tokens = torch.randint(3, 61, (1, 5))
    with pytest.raises(NotImplementedError, match=r"position_ids.*static caches"):
        on_pydecode(tiny_llama()).generate(
            tokens, max_new_tokens=3, cache_implementation="static", disable_compile=True
        )


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 0, 1, 2], [0, 1, 1, 2, 2], [0, 1, 0, 3, 4]],
    ids=["packed", "tree", "ends where it should"],
)
def test_positions_that_ask_for_a_mask_raise(positions: list[int]) -> None:
    model = on_pydecode(tiny_llama())
    with pytest.raises(NotImplementedError, match="packed sequences and trees"):
        model(torch.zeros(1, 5, dtype=torch.int64), position_ids=torch.tensor([positions]))


def call(**options: Any) -> Tensor:
    """The attention function by itself, over q [1, 4, 3, 8] and k, v [1, 2, 5, 8]."""
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    options = {"position_ids": torch.arange(2, 5)[None], "scaling": 0.5, **options}
    mask = options.pop("attention_mask", None)
    return compat.attention(torch.nn.Module(), q, k, v, mask, **options)[0]


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
        ("position_ids", torch.zeros(3, 1, 3, dtype=torch.int64)),
        ("position_ids", None),  # five keys of three queries: a cache, of which nothing is known
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
    with pytest.raises(NotImplementedError, match="is_causal=False"):
        call(is_causal=False, sliding_window=2)
    # a sink of +0 in the denominator, by the formula: out / (1 + exp(-lse))
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    s = (q[0] @ k[0].repeat_interleave(2, 0).mT) * 0.5
    p = s.exp() / (1 + s.exp().sum(-1, keepdim=True))
    expected = (p @ v[0].repeat_interleave(2, 0)).transpose(0, 1)[None]
    got = call(is_causal=False, s_aux=torch.zeros(4))
    torch.testing.assert_close(got, expected, **CLOSE)


def test_registered_once_and_without_a_mask_function() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    compat.register()
    compat.register()
    assert ALL_ATTENTION_FUNCTIONS["pydecode"] is compat.attention
    assert "pydecode" not in ALL_MASK_ATTENTION_FUNCTIONS


def test_doctest() -> None:
    assert doctest.testmod(compat).failed == 0
