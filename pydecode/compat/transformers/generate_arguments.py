"""What ``generate`` hands to a custom_generate callable, in the terms of ``decode.speculative``."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# What generate itself adds for every model; the loop's own cache takes their place.
_OWN = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# The processors that the op has, in its order: class, attribute, argument.
_FILTERS = (
    ("TemperatureLogitsWarper", "temperature"),
    ("TopKLogitsWarper", "top_k"),
    ("TopPLogitsWarper", "top_p"),
    ("MinPLogitsWarper", "min_p"),
)


def unsupported(
    model: "PreTrainedModel", config: "GenerationConfig", model_kwargs: dict[str, Any]
) -> None:
    """Raises NotImplementedError, by name, for what would be ignored otherwise."""
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"model: {type(model).__name__} is an encoder-decoder")
    if (config.num_beams or 1) > 1:
        raise NotImplementedError(f"num_beams: expected 1, got {config.num_beams}")
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        raise NotImplementedError("assistant_ensemble_weight: not supported, it changes the law")
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name):
            raise NotImplementedError(f"{name}: not supported")
    for name, x in model_kwargs.items():
        if x is not None and name not in _OWN:
            raise NotImplementedError(f"{name}: not supported")
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise NotImplementedError("past_key_values: expected none or an empty one")


def filters_of(processors: Iterable[Any], do_sample: bool) -> dict[str, Any]:
    """Processors -> temperature, top_k, top_p, min_p of the ops; temperature 0 where not sampled.

    Greedy decoding ignores them, as the best token survives all four.
    """
    import transformers

    ranks = {getattr(transformers, name): i for i, (name, _) in enumerate(_FILTERS)}
    found: dict[str, Any] = {"temperature": 1.0}
    last = -1
    for processor in processors:
        name = type(processor).__name__
        if type(processor) is transformers.LogitNormalization:
            continue  # the ops normalise
        rank = ranks.get(type(processor))
        if rank is None:
            raise NotImplementedError(f"logits_processor: {name} is not supported")
        if rank <= last:
            order = ", ".join(argument for _, argument in _FILTERS)
            raise NotImplementedError(
                f"logits_processor: {name} behind {_FILTERS[last][0]}; the ops' order is {order}"
            )
        last, argument = rank, _FILTERS[rank][1]
        if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            raise NotImplementedError(f"logits_processor: {name} with a finite filter_value")
        # top_k has it in its number
        if argument != "top_k" and getattr(processor, "min_tokens_to_keep", 1) > 1:
            raise NotImplementedError(f"logits_processor: {name} with min_tokens_to_keep > 1")
        found[argument] = getattr(processor, argument)
    return found if do_sample else {"temperature": 0.0}


def stops_of(
    criteria: Iterable[Any], input_ids: Tensor, config: "GenerationConfig"
) -> tuple[set[int], int, Callable[[int, int], bool] | None]:
    """Stopping criteria -> stop tokens, max_new_tokens, and ``should_stop`` for all others."""
    import transformers

    stop_tokens: set[int] = set()
    others = transformers.StoppingCriteriaList()
    B, P = input_ids.shape
    max_length = config.max_length
    for criterion in criteria:
        if type(criterion) is transformers.MaxLengthCriteria:
            max_length = min(max_length, criterion.max_length)
        elif type(criterion) is transformers.EosTokenCriteria:
            stop_tokens.update(criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    if B > 1 and (stop_tokens or others) and config._pad_token_tensor is None:
        raise ValueError("pad_token_id: expected one, since the texts may differ in length")
    room = max(max_length - P, 0)
    if not others:
        return stop_tokens, room, None
    # what generate would show them of each request: its padded prompt and its tokens so far
    text = torch.nn.functional.pad(input_ids, (0, room))
    ends = [P] * B

    def should_stop(b: int, token: int) -> bool:
        text[b, ends[b]] = token
        ends[b] += 1
        return bool(others(text[b : b + 1, : ends[b]], None))

    return stop_tokens, room, should_stop


def prompts_of(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[list[int]]:
    """The prompts without their left padding, as lists: read on the host, once."""
    ids = input_ids.tolist()
    if attention_mask is None:
        starts = [0] * len(ids)
    else:
        if attention_mask.shape != input_ids.shape:
            raise NotImplementedError(
                f"attention_mask: expected the shape of input_ids, {list(input_ids.shape)}, got "
                f"{list(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        if not bool((mask.long().diff(dim=1) >= 0).all()):
            raise NotImplementedError("attention_mask: expected padding on the left only")
        starts = (~mask).sum(1).tolist()
    texts = [row[start:] for row, start in zip(ids, starts)]
    if position_ids is not None:
        at = position_ids.expand(len(ids), -1).tolist() if position_ids.dim() == 2 else []
        if [row[s:] for row, s in zip(at, starts)] != [list(range(len(text))) for text in texts]:
            raise NotImplementedError("position_ids: expected each token's place in its text")
    return texts


def output_of(
    input_ids: Tensor, tokens: Sequence[Sequence[int]], config: "GenerationConfig"
) -> Any:
    """[B, P + the longest] with pad ids behind shorter ones, as ``generate`` returns it."""
    width = max(map(len, tokens), default=0)
    pad = config._pad_token_tensor
    pads = [0 if pad is None else int(pad)] * width
    rows = [[*new, *pads[len(new) :]] for new in tokens]
    new_ids = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    sequences = torch.cat([input_ids, new_ids.view(len(rows), width)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))
