"""Prompt lookup and assisted generation for transformers' ``generate(custom_generate=...)``.

``generate`` does what it always does (arguments, configuration, processors, stopping criteria) and
then hands over to ``decode.speculative``, whose verification runs on pydecode's operators over a
paged cache. Written for transformers 5.23.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...decode import speculative
from ...decode.drafters import Drafter, ModelDrafter, PromptLookup
from .causal_lm import CausalLM
from .generate_arguments import filters_of, output_of, prompts_of, stops_of, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation import BaseStreamer


class SpeculativeGenerate:
    """What ``prompt_lookup`` and ``assisted`` return, for ``generate(custom_generate=...)``.

    Attributes:
        last: the loop's own account of the last call (accepted and drafted tokens, steps).
    """

    last: speculative.Generation | None = None

    def __init__(
        self,
        make_drafter: Callable[..., Drafter],
        num_rows: int,
        *,
        assistant_model: "PreTrainedModel | None" = None,
        streamer: "BaseStreamer | None" = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        rule: str | None = None,
    ) -> None:
        if (stop_strings is None) != (tokenizer is None):
            raise ValueError("stop_strings, tokenizer: expected both or neither, got one of them")
        self.make_drafter, self.num_rows, self.rule = make_drafter, num_rows, rule
        self.assistant_model, self.streamer = assistant_model, streamer
        self.stop_strings, self.tokenizer = stop_strings, tokenizer

    def __call__(
        self,
        model: "PreTrainedModel",
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate``, with everything prepared. Returns what ``generate`` does."""
        config = generation_config
        unsupported(model, config, model_kwargs)
        filters = filters_of(logits_processor or (), config.do_sample)
        criteria = list(stopping_criteria or ())
        if self.stop_strings is not None:
            from transformers import StopStringCriteria

            criteria.append(StopStringCriteria(cast(Any, self.tokenizer), self.stop_strings))
        stop_tokens, max_new_tokens, should_stop = stops_of(criteria, input_ids, config)
        prompts = prompts_of(
            input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        )
        B = len(prompts)
        if self.streamer is not None:
            if B != 1:
                raise ValueError(f"streamer: expected a batch of 1, got {B}")
            self.streamer.put(input_ids.cpu())
        # one seed a request: its text does not depend on the others, and manual_seed repeats it
        device = model.device
        seeds = torch.randint(2**63 - 1, (B,), device=device) if config.do_sample else 0
        sampling = dict(filters, seed=seeds)
        # rows in flight need slots as well
        capacity = max(map(len, prompts)) + max_new_tokens + self.num_rows
        with on_pydecode(model, self.assistant_model) as (ours, assistant):
            self.last = speculative.generate(
                ours,
                prompts,
                cache=ours.new_cache(B, capacity),
                max_new_tokens=max_new_tokens,
                drafter=self.make_drafter(assistant, B, capacity, sampling),
                stop_tokens=stop_tokens,
                should_stop=should_stop,
                on_tokens=None if self.streamer is None else self._stream,
                rule=self.rule if config.do_sample else None,
                prefill_chunk=config.prefill_chunk_size or 512,
                **sampling,
            )
        if self.streamer is not None:
            self.streamer.end()
        return output_of(input_ids, self.last.tokens, config)

    def _stream(self, request: int, new: list[int]) -> None:
        assert self.streamer is not None
        self.streamer.put(torch.tensor([new]))


def prompt_lookup(
    *,
    num_tokens: int = 32,
    max_matching_ngram_size: int = 5,
    min_matching_ngram_size: int = 2,
    candidates: int = 1,
    **options: Any,
) -> SpeculativeGenerate:
    """Prompt lookup for ``model.generate(..., custom_generate=prompt_lookup())``.

    Takes the place of ``generate(prompt_lookup_num_tokens=..., max_matching_ngram_size=...)``
    (seen in transformers 5.23). Greedy output is plain ``generate``'s token for token, sampled
    output has its law; temperature, top_k, top_p and min_p are those of ``generate``.

    Args:
        num_tokens: the most tokens drafted a step; the number adapts to what is accepted.
        max_matching_ngram_size, min_matching_ngram_size: what is looked up, longest first.
        candidates: more than one distinct continuation is verified as a tree, in the same pass.
        options: ``streamer``, ``stop_strings`` with ``tokenizer`` (``generate`` does not forward
            those given to it), and ``rule`` of ``rejection_sample`` or ``rejection_sample_tree``.

    Where ours differs: any batch size, left-padded (theirs: 1); the draft length adapts; stop
    tokens and every stopping criterion end a text at the token where they first hold; criteria get
    one request at a time, and ``scores=None``. The model attends with pydecode meanwhile, over a
    paged cache, and has its own attention implementation back afterwards (so two threads must not
    share it); ``past_key_values``, ``use_cache`` and ``cache_implementation`` are not used.

    Raises:
        NotImplementedError: by name: logits processors other than temperature, top_k, top_p and
            min_p in this order, beam search, ``output_scores`` and its like, encoder-decoders,
            models that ``CausalLM`` does not take.

    >>> import torch, transformers
    >>> from pydecode.compat.transformers import prompt_lookup
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> prompt = torch.tensor([[7, 8, 9, 7, 8]])
    >>> plain = model.generate(prompt, max_new_tokens=20)
    >>> torch.equal(plain, model.generate(
    ...     prompt, max_new_tokens=20, custom_generate=prompt_lookup(num_tokens=10)))
    True
    """
    for name, x in (
        ("num_tokens", num_tokens),
        ("min_matching_ngram_size", min_matching_ngram_size),
    ):
        if x < 1:
            raise ValueError(f"{name}: expected at least 1, got {x}")
    smallest = min(min_matching_ngram_size, max_matching_ngram_size)

    def drafter(assistant: CausalLM | None, B: int, capacity: int, sampling: Any) -> Drafter:
        return PromptLookup(
            num_tokens=min(8, num_tokens),
            max_tokens=num_tokens,
            max_ngram=max_matching_ngram_size,
            min_ngram=smallest,
            candidates=candidates,
        )

    return SpeculativeGenerate(drafter, num_tokens * candidates + 1, **options)


def assisted(
    assistant_model: "PreTrainedModel",
    *,
    num_assistant_tokens: int = 20,
    assistant_confidence_threshold: float = 0.4,
    branching: Sequence[int] | None = None,
    **options: Any,
) -> SpeculativeGenerate:
    """Assisted generation for ``model.generate(..., custom_generate=assisted(assistant_model))``.

    Takes the place of ``generate(assistant_model=...)`` (seen in transformers 5.23), with what
    ``prompt_lookup`` says of the output, of ``options`` and of what is not supported. While
    sampling, the assistant draws under the same temperature, top_k, top_p and min_p, as theirs
    does.

    Args:
        assistant_model: of the same vocabulary, on the same device.
        num_assistant_tokens, assistant_confidence_threshold: a draft ends after this many tokens,
            or with the first one below this probability; theirs have these defaults as well, but
            theirs are attributes of the assistant's generation_config, which are not read. 0 ends
            no draft, and reads nothing on the host while drafting.
        branching: the children of every node of a drafted tree, level by level, in place of a
            chain: (4, 2, 1). No threshold ends a tree.

    Raises:
        ValueError: the two models differ in vocabulary size or device.
    """
    shape = tuple(branching) if branching is not None else (1,) * num_assistant_tokens
    threshold = assistant_confidence_threshold if max(shape, default=1) == 1 else 0.0
    if not shape or min(shape) < 1:
        raise ValueError(f"num_assistant_tokens, branching: expected at least 1, got {list(shape)}")
    nodes = level = 1
    for children in shape:
        level *= children
        nodes += level

    def drafter(assistant: CausalLM, B: int, capacity: int, sampling: Any) -> Drafter:
        cache = assistant.new_cache(B, capacity)
        return ModelDrafter(
            assistant, branching=shape, cache=cache, min_confidence=threshold, **sampling
        )

    return SpeculativeGenerate(drafter, nodes, assistant_model=assistant_model, **options)


@contextmanager
def on_pydecode(
    model: "PreTrainedModel", assistant: "PreTrainedModel | None"
) -> Iterator[tuple[CausalLM, CausalLM | None]]:
    """The models ready for the loops; afterwards they are as they were, also after an error."""
    models = [model] if assistant is None else [model, assistant]
    before = [(m, _implementations(m), [x for x in m.modules() if x.training]) for m in models]
    try:
        ours = [CausalLM(m) for m in models]
        if assistant is not None:
            for name in ("vocab_size", "device"):
                if getattr(ours[0], name) != getattr(ours[1], name):
                    raise ValueError(
                        f"assistant_model: expected the model's {name} {getattr(ours[0], name)}, "
                        f"got {getattr(ours[1], name)}"
                    )
        yield ours[0], ours[1] if assistant is not None else None
    finally:
        for m, implementations, training in before:
            m.set_attn_implementation(implementations)
            for module in training:
                module.training = True


def _implementations(model: "PreTrainedModel") -> dict[str, str]:
    """The attention implementations of a model and its parts, as it takes them back."""
    parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
    found = {k: c._attn_implementation for k, c in parts.items() if c is not None}
    return {"": model.config._attn_implementation, **found}
