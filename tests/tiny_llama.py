"""A tiny random Llama of transformers, and what eager attention says about trees on it."""

from typing import Any

import torch
import transformers
from torch import Tensor


def tiny_llama(seed: int = 0, **options: Any) -> Any:
    """2 layers, 4 query heads over 2 KV heads of 8, V = 61, fp32."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        initializer_range=0.3,  # so that attention matters to the logits
    )
    config = transformers.LlamaConfig(**{**sizes, **options})
    return transformers.LlamaForCausalLM(config).eval()


def random_parents(num_nodes: int) -> Tensor:
    """A random tree [1, T]: any earlier node may be a parent."""
    return torch.tensor([[-1, *(int(torch.randint(i, ())) for i in range(1, num_nodes))]])


def path_to(parents: Tensor, node: int) -> list[int]:
    """Nodes from the root to ``node`` of one tree [T]."""
    path = [node]
    while int(parents[path[0]]) >= 0:
        path.insert(0, int(parents[path[0]]))
    return path


@torch.no_grad()
def text_logits(model: Any, text: list[int]) -> Tensor:
    """Logits [S, V] of a plain text, without our ops."""
    tokens = torch.tensor([text])
    return model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]


@torch.no_grad()
def tree_logits(model: Any, context: list[int], nodes: Tensor, parents: Tensor) -> Tensor:
    """Logits [T, V] of a tree behind a context: one dense pass under a float 4-D mask."""
    C, T = len(context), nodes.shape[0]
    visible = torch.ones(C + T, C + T, dtype=torch.bool).tril()
    visible[C:, C:] = False
    depth = []
    for node in range(T):
        path = path_to(parents, node)
        visible[C + node, [C + n for n in path]] = True
        depth.append(len(path) - 1)
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    tokens = torch.cat([torch.tensor(context, dtype=torch.int64), nodes])[None]
    positions = torch.tensor([[*range(C), *(C + d for d in depth)]])
    out = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[0, C:]
