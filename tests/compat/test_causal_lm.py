"""CausalLM: trees and chunks over a paged cache against transformers' own dense attention."""

import copy

import pytest
import torch
from torch import Tensor

from pydecode import trees

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_llama import path_to, random_parents, text_logits, tiny_llama, tree_logits  # noqa: E402

from pydecode.compat.transformers import CausalLM, Step  # noqa: E402

CLOSE = dict(rtol=0, atol=5e-5)


@pytest.fixture
def dense() -> object:
    return tiny_llama()


@pytest.fixture
def ours() -> CausalLM:
    return CausalLM(tiny_llama())


def prefill(model: CausalLM, contexts: list[list[int]], cache: object, chunk: int = 100) -> None:
    """Ragged prefill in chunks; a request that has ended has no valid rows."""
    for start in range(0, max(map(len, contexts)), chunk):
        parts = [c[start : start + chunk] for c in contexts]
        width = max(map(len, parts))
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in parts])
        count = torch.tensor([len(p) for p in parts])
        model(tokens, cache.lengths[:, None] + torch.arange(width), cache, "causal", count)  # type: ignore[attr-defined]
        cache.lengths += count  # type: ignore[attr-defined]


def text(n: int) -> list[int]:
    return torch.randint(0, 61, (n,)).tolist()


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [100, 7])
def test_ragged_trees_equal_dense_attention(
    dense: object, ours: CausalLM, page_size: int, chunk: int
) -> None:
    contexts = [text(19), text(8)]
    counts = torch.tensor([9, 5])
    cache = ours.new_cache(2, 40, page_size=page_size, shuffle=True)
    prefill(ours, contexts, cache, chunk)
    parents = torch.cat([random_parents(9), random_parents(9)])
    nodes = torch.randint(0, 61, (2, 9))
    lengths = cache.lengths.clone()
    got = ours(
        nodes,
        cache.lengths[:, None] + trees.depths(parents),
        cache,
        trees.mask_from_parents(parents),
        num_tokens=counts,
    )
    assert torch.equal(cache.lengths, lengths)
    for b, n in enumerate(counts.tolist()):
        expected = tree_logits(dense, contexts[b], nodes[b, :n], parents[b])
        torch.testing.assert_close(got[b, :n], expected, **CLOSE)
        for node in range(n):  # and each path as a plain text
            path = nodes[b, path_to(parents[b], node)].tolist()
            plain = text_logits(dense, contexts[b] + path)[-1]
            torch.testing.assert_close(got[b, node], plain, **CLOSE)


def test_commit_then_continue_equals_plain_text(dense: object, ours: CausalLM) -> None:
    context, parents = text(11), torch.tensor([[-1, 0, 0, 2, 1, 3]])
    nodes = torch.randint(0, 61, (1, 6))
    cache = ours.new_cache(1, 32, page_size=4, shuffle=True)
    prefill(ours, [context], cache)
    ours(
        nodes,
        cache.lengths[:, None] + trees.depths(parents),
        cache,
        trees.mask_from_parents(parents),
    )
    cache.commit(torch.tensor([[0, 2, 3, 5]]), torch.tensor([3]))
    assert cache.lengths.tolist() == [15]
    more = text(3)
    got = ours(torch.tensor([more]), 15 + torch.arange(3)[None], cache, "causal")[0]
    plain = text_logits(dense, context + nodes[0, [0, 2, 3, 5]].tolist() + more)[-3:]
    torch.testing.assert_close(got, plain, **CLOSE)


def test_pages_and_batch_change_no_bit(ours: CausalLM) -> None:
    contexts, last = [text(13), text(21)], torch.randint(0, 61, (2, 4))
    results = []
    for batch, shuffle in (([0, 1], False), ([0, 1], True), ([0], True), ([1], True)):
        cache = ours.new_cache(len(batch), 30, page_size=4, shuffle=shuffle)
        for i, b in enumerate(batch):  # request by request, on the same pool
            part = cache.rows(slice(i, i + 1))
            tokens = torch.tensor([contexts[b]])
            ours(tokens, torch.arange(tokens.shape[1])[None], part, "causal")
            part.lengths += tokens.shape[1]
        out = []
        for i, b in enumerate(batch):  # matmuls of the model itself may depend on its batch
            part = cache.rows(slice(i, i + 1))
            at = part.lengths[:, None] + torch.arange(4)
            out.append(ours(last[b : b + 1], at, part, "causal"))
        results.append(torch.cat(out))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], torch.cat(results[2:]))


def test_rows_past_num_tokens_are_seen_by_nobody(ours: CausalLM) -> None:
    """Also where the mask lets every row see every other."""
    context, rows = text(5), torch.randint(0, 61, (1, 4))
    at, everything = 5 + torch.arange(4)[None], torch.full((1, 4, 1), 0b1111)
    out = []
    for n in (3, 4):
        cache = ours.new_cache(1, 16)
        prefill(ours, [context], cache)
        count = torch.tensor([3]) if n == 4 else None
        out.append(ours(rows[:, :n], at[:, :n], cache, everything[:, :n], num_tokens=count)[:, :3])
    torch.testing.assert_close(*out, **CLOSE)


def test_keep_picks_rows(ours: CausalLM) -> None:
    tokens, at = torch.randint(0, 61, (2, 6)), torch.arange(6).expand(2, 6)
    every = ours(tokens, at, ours.new_cache(2, 8), "causal")
    keep = torch.tensor([4, 1])
    some = ours(tokens, at, ours.new_cache(2, 8), "causal", keep=keep)
    torch.testing.assert_close(some, every[:, keep], rtol=0, atol=1e-5)
    some.zero_()  # logits may be changed in place


@pytest.mark.parametrize("skipped", [[0], [1], [0, 2], []])
def test_skipping_equals_a_model_without_those_layers(skipped: list[int]) -> None:
    whole = tiny_llama(3, num_hidden_layers=3)
    shorter = copy.deepcopy(whole)
    kept = [i for i in range(3) if i not in skipped]
    shorter.model.layers = torch.nn.ModuleList(shorter.model.layers[i] for i in kept)
    ours, context = CausalLM(copy.deepcopy(whole)), text(9)
    draft = ours.skipping(skipped)
    cache = ours.new_cache(1, 16)
    prefill(draft, [context[:6]], cache)
    got = draft(torch.tensor([context[6:]]), 6 + torch.arange(3)[None], cache, "causal")[0]
    torch.testing.assert_close(got, text_logits(shorter, context)[6:], **CLOSE)
    assert all(
        a is b for a, b in zip(draft.model.parameters(), _kept(ours.model, kept))
    )  # the same weights, not copies
    # the whole model writes over what the draft wrote, and is itself unchanged
    cache = ours.new_cache(1, 16)
    prefill(ours, [context[:6]], cache)
    rows, at = torch.tensor([context[6:]]), 6 + torch.arange(3)[None]
    draft(rows.flip(1), at, cache, "causal")
    got = ours(rows, at, cache, "causal")[0]
    torch.testing.assert_close(got, text_logits(whole, context)[6:], **CLOSE)


def _kept(model: torch.nn.Module, kept: list[int]) -> list[Tensor]:
    names = dict(model.named_parameters())
    out = (f".{i}." for i in range(3) if i not in kept)
    dropped = tuple(f"layers{i}" for i in out)
    return [p for name, p in names.items() if not any(d in name for d in dropped)]


def test_a_draft_sees_the_context_that_the_whole_model_wrote() -> None:
    """Its layer 2 reads layer 2's slots, although it is only the second of its layers."""
    ours, context = CausalLM(tiny_llama(3, num_hidden_layers=3)), text(9)
    cache = ours.new_cache(1, 16)
    prefill(ours, [context], cache)
    before = cache.k.clone()
    row, at = torch.tensor([[7]]), torch.tensor([[9]])
    ours.skipping([1])(row, at, cache, "causal")
    changed = (cache.k != before).flatten(2).any(-1).any(-1)
    assert changed.tolist() == [True, False, True]


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_sliding_window_layers(chunk: int) -> None:
    """A chunk may be wider than the window, which counts among the rows in flight too."""
    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    dense = transformers.MistralForCausalLM(config).eval()
    ours, tokens = CausalLM(copy.deepcopy(dense)), torch.randint(0, 61, (1, 16))
    with torch.no_grad():
        expected = dense(tokens, use_cache=False).logits[0]
    cache = ours.new_cache(1, 16, page_size=4)
    got = []
    for i in range(0, 16, chunk):
        rows = tokens[:, i : i + chunk]
        at = torch.arange(i, i + rows.shape[1])[None]
        got.append(ours(rows, at, cache, "causal")[0])
        if i == 0:  # a packed mask says the same
            causal = trees.pack_mask(torch.ones(1, chunk, chunk, dtype=torch.bool).tril())
            torch.testing.assert_close(ours(rows, at, cache, causal)[0], got[0], **CLOSE)
        cache.lengths += rows.shape[1]
    torch.testing.assert_close(torch.cat(got), expected, **CLOSE)


def test_properties(ours: CausalLM) -> None:
    assert ours.vocab_size == 61
    assert ours.device == torch.device("cpu")
    for given, expected in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
        ours.model.generation_config.eos_token_id = given
        assert ours.eos_token_ids == expected
    cache = ours.new_cache(2, 20, page_size=8, dtype=torch.bfloat16)
    assert cache.k.shape == (2, 6, 8, 2, 8)
    assert cache.k.dtype == torch.bfloat16
    assert ours.new_cache(1, 1).k.dtype == torch.float32


def test_what_cannot_work_raises(ours: CausalLM) -> None:
    row, at = torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None]
    with pytest.raises(ValueError, match="capacity: expected room"):
        ours(row, at, ours.new_cache(1, 4, page_size=4), "causal")
    with pytest.raises(ValueError, match=r"layers: expected some of 0 .. 1, got \[5\]"):
        ours.skipping([5])
    latent = tiny_llama()
    latent.config.kv_lora_rank = 4
    with pytest.raises(NotImplementedError, match="kv_lora_rank"):
        CausalLM(latent)
    # a cache of transformers' own beside ours would hand the context over twice
    cache, past = ours.new_cache(1, 8), transformers.DynamicCache()
    step = Step(cache, "causal", None, at[:, :2], {})
    call = dict(position_ids=at[:, :2], past_key_values=past, pydecode_step=step)
    with pytest.raises(NotImplementedError, match="attention_mask, is_causal: the step's mask"):
        ours.model(row[:, :2], **call)  # transformers makes a mask unless it is given an empty one
    past = transformers.DynamicCache()
    call |= dict(past_key_values=past, attention_mask=torch.empty(0, 1, 1, 1))
    ours.model(row[:, :2], **call)
    with pytest.raises(ValueError, match="past_key_values"):
        ours.model(row[:, :2], **call)
