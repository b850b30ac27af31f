"""generate(custom_generate=...) around the loop: stops, streams, what it returns and refuses."""

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_llama import tiny_llama  # noqa: E402
from transformers_methods import METHODS, padded_batch, repeating_llama  # noqa: E402

from pydecode.compat.transformers import (  # noqa: E402
    assisted,
    generate_arguments,
    generation,
    prompt_lookup,
)

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def model() -> Any:
    return repeating_llama()


@pytest.fixture
def other() -> Any:
    return tiny_llama(1)


class TwoInARow(transformers.StoppingCriteria):
    """Ends a text whose last two tokens are of a set; remembers the widths it was shown."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens, self.widths = tokens, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.widths.append(input_ids.shape[1])
        hits = [set(row[-2:]) <= self.tokens for row in input_ids.tolist()]
        return torch.tensor(hits)


@every_method
def test_criteria_are_asked_token_by_token(model: Any, other: Any, name: str) -> None:
    prompt = dict(
        inputs=torch.tensor([[60, 60, 3, 4, 5]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]])
    )
    plain = model.generate(**prompt, max_new_tokens=24)[0, 5:].tolist()
    criterion = TwoInARow(set(plain[8:10]))
    options = dict(max_new_tokens=24, stopping_criteria=[criterion])
    want = model.generate(**prompt, **options)
    widths = criterion.widths.copy()
    criterion.widths.clear()
    got = model.generate(**prompt, custom_generate=METHODS[name](other), **options)
    assert torch.equal(got, want)
    assert criterion.widths == widths  # padding included, as generate shows it


def test_criteria_end_each_request_by_itself(model: Any, other: Any) -> None:
    batch = padded_batch()
    plain = model.generate(**batch, max_new_tokens=12)
    ends = [3, 12, 7, 1]

    class Ends(transformers.StoppingCriteria):
        """Shown one request at a time: which one, its prompt tells."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            b = batch["inputs"].tolist().index(input_ids[0, :14].tolist())
            assert torch.equal(input_ids[0], plain[b, : input_ids.shape[1]])
            return torch.tensor([input_ids.shape[1] == 14 + ends[b]])

    method = assisted(other)
    options = dict(max_new_tokens=12, stopping_criteria=[Ends()])
    got = model.generate(**batch, custom_generate=method, **options)
    for b, end in enumerate(ends):
        assert torch.equal(got[b, : 14 + end], plain[b, : 14 + end])
        assert (got[b, 14 + end :] == 0).all()


def test_texts_that_may_differ_in_length_need_a_pad(model: Any) -> None:
    model.generation_config.pad_token_id = None
    options = dict(max_new_tokens=3, custom_generate=prompt_lookup())
    prompt = torch.tensor([[3, 4], [4, 5]])
    assert model.generate(prompt, **options).shape == (2, 5)
    criteria = [TwoInARow({3})]
    with pytest.raises(ValueError, match="pad_token_id"):
        model.generate(prompt, stopping_criteria=criteria, **options)
    assert model.generate(prompt[:1], stopping_criteria=criteria, **options).shape == (1, 5)


class Words:
    """As much of a tokenizer as stop strings need: token i is the letter i."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(65 + i): i for i in range(61)}

    def _convert_id_to_token(self, i: int) -> str:
        return chr(65 + i)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 65 for c in text]}

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return "".join(chr(65 + int(i)) for i in ids)


def test_stop_strings(model: Any) -> None:
    prompt = torch.tensor([[3, 4, 5]])
    plain = model.generate(prompt, max_new_tokens=24)[0].tolist()
    string = Words().decode(plain[11:13])
    end = next(i for i in range(3, 25) if plain[i - 1 : i + 1] == plain[11:13])
    method = prompt_lookup(stop_strings=string, tokenizer=Words(), min_matching_ngram_size=1)
    got = model.generate(prompt, max_new_tokens=24, custom_generate=method)
    assert got[0].tolist() == plain[: end + 1]
    with pytest.raises(ValueError, match="stop_strings, tokenizer: expected both or neither"):
        prompt_lookup(stop_strings=string)


class Stream(transformers.generation.BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@every_method
def test_streamer(model: Any, other: Any, name: str) -> None:
    stream, prompt = Stream(), torch.tensor([[3, 4, 5, 3, 4]])
    method = METHODS[name](other)
    method.streamer = stream
    got = model.generate(prompt, max_new_tokens=12, custom_generate=method)
    assert stream.parts[0] == prompt[0].tolist()  # as generate's own streamers begin
    assert [token for part in stream.parts for token in part] == got[0].tolist()
    assert stream.ended
    with pytest.raises(ValueError, match="streamer: expected a batch of 1, got 4"):
        model.generate(**padded_batch(), max_new_tokens=3, custom_generate=method)


def test_return_dict(model: Any) -> None:
    got = model.generate(
        torch.tensor([[3, 4, 5]]),
        max_new_tokens=4,
        return_dict_in_generate=True,
        custom_generate=prompt_lookup(),
    )
    assert got.sequences.shape == (1, 7)


def test_the_model_is_as_it_was_after_an_error(model: Any, other: Any) -> None:
    model.train()
    model.model.layers[0].eval()  # also a mixed state
    training = [x.training for x in model.modules()]
    method = assisted(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, custom_generate=method)
    smaller = assisted(tiny_llama(vocab_size=30))
    with pytest.raises(ValueError, match="assistant_model: expected the model's vocab_size 61"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, custom_generate=smaller)
    assert model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == "eager"
    assert [x.training for x in model.modules()] == training


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(repetition_penalty=1.2), "RepetitionPenaltyLogitsProcessor"),
        (dict(do_sample=True, typical_p=0.5), "TypicalLogitsWarper"),
        (dict(min_new_tokens=2, eos_token_id=5), "MinLengthLogitsProcessor"),
        (dict(num_beams=2), "num_beams"),
        (dict(output_scores=True, return_dict_in_generate=True), "output_scores"),
        (dict(assistant_ensemble_weight=0.5), "assistant_ensemble_weight"),
        (dict(attention_mask=torch.tensor([[1, 1, 0]])), "attention_mask"),
        (dict(inputs_embeds=torch.zeros(1, 3, 32)), "inputs_embeds"),
        (dict(position_ids=torch.tensor([[0, 2, 3]])), "position_ids"),
        (dict(position_ids=torch.zeros(3, 1, 3, dtype=torch.int64)), "position_ids"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_supported_raises_by_name(
    model: Any, options: dict[str, Any], name: str
) -> None:
    options = dict(max_new_tokens=4, custom_generate=prompt_lookup(), **options)
    with pytest.raises(NotImplementedError, match=name):
        model.generate(torch.tensor([[3, 4, 5]]), **options)


def test_processors_in_another_order_raise(model: Any) -> None:
    for processors, match in (
        (
            [transformers.TopPLogitsWarper(0.9), transformers.TopKLogitsWarper(3)],
            "TopK.*behind TopP",
        ),
        ([transformers.TopPLogitsWarper(0.9, min_tokens_to_keep=2)], "min_tokens_to_keep"),
        ([transformers.MinPLogitsWarper(0.1, filter_value=-5.0)], "filter_value"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            generate_arguments.filters_of(processors, True)
    kept = [
        transformers.TopKLogitsWarper(1, min_tokens_to_keep=3),
        transformers.LogitNormalization(),
    ]
    assert generate_arguments.filters_of(kept, True) == {"temperature": 1.0, "top_k": 3}


def test_arguments() -> None:
    for make in (
        lambda: prompt_lookup(num_tokens=0),
        lambda: prompt_lookup(min_matching_ngram_size=0),
        lambda: assisted(None, num_assistant_tokens=0),
        lambda: assisted(None, branching=(2, 0)),
    ):
        with pytest.raises(ValueError, match="expected at least 1"):
            make()


def test_doctest() -> None:
    assert doctest.testmod(generation).failed == 0
