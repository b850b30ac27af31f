"""Functions of vLLM and of its plugin for diffusion models, on pydecode's operators.

``v1.rejection_sample`` and ``v2.rejection_sample`` share a name, as they do in vLLM, so import them
from their modules. vLLM itself is not needed.
"""

from . import v1, v2
from .remask import (
    Llada2DefaultRemaskingPolicy,
    RemaskStepResult,
    batched_remask,
    batched_remask_triton,
    llada2_remask,
)
from .tree_attention import pack_qq_bias, prepare_tree_attn_bias, unified_attention

__all__ = [
    "Llada2DefaultRemaskingPolicy",
    "RemaskStepResult",
    "batched_remask",
    "batched_remask_triton",
    "llada2_remask",
    "pack_qq_bias",
    "prepare_tree_attn_bias",
    "unified_attention",
    "v1",
    "v2",
]
