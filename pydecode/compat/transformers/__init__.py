"""Hugging Face transformers on pydecode: the attention implementation, and models for the loops.

Importing this package registers the attention implementation "pydecode", where transformers is
installed, so that any model that supports attention backends takes it
(``from_pretrained(..., attn_implementation="pydecode")``). Written for transformers 5.23.
"""

import importlib.util

from .attention import NAME, Step, attention, register
from .cache import PydecodeCache
from .causal_lm import CausalLM
from .generation import assisted, prompt_lookup
from .sampling import _speculative_sampling

__all__ = [
    "NAME",
    "CausalLM",
    "PydecodeCache",
    "Step",
    "_speculative_sampling",
    "assisted",
    "attention",
    "prompt_lookup",
    "register",
]

if importlib.util.find_spec("transformers") is not None:
    register()
