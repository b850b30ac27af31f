"""The custom_generate methods that are tested, and a model that repeats itself."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_llama import tiny_llama
from torch import Tensor

from pydecode.compat.transformers import assisted, prompt_lookup

METHODS: dict[str, Callable[[Any], Any]] = {
    "lookup": lambda other: prompt_lookup(min_matching_ngram_size=1),
    "lookup, trie": lambda other: prompt_lookup(
        min_matching_ngram_size=1, candidates=3, num_tokens=4
    ),
    "assisted": lambda other: assisted(
        other, num_assistant_tokens=3, assistant_confidence_threshold=0
    ),
    "assisted, while sure": lambda other: assisted(other, assistant_confidence_threshold=0.3),
    "assisted, tree": lambda other: assisted(other, branching=(2, 2)),
}


def repeating_llama() -> Any:
    """Random, so it soon repeats itself and drafts are accepted; attends with SDPA, never ends."""
    made = tiny_llama(attn_implementation="sdpa")
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made


def padded_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 12, (4, 14))
    mask = torch.ones_like(ids)
    for b, padding in enumerate((0, 5, 13, 2)):
        mask[b, :padding] = 0
        ids[b, :padding] = 60  # nobody may read it
    return dict(inputs=ids, attention_mask=mask)
