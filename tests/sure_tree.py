"""A draft tree with laws that leave nothing to chance, for the edge tests of the tree rules."""

from typing import Any

import torch
from torch import Tensor

import pydecode

SAMPLED = ["recursive", "without_replacement", "k_seq", "traversal"]
SAMPLED += ["traversal_without_replacement"]
RULES = [*SAMPLED, "target_only"]

# The tree 0 -> (1, 2), 1 -> 3, 2 -> 4 over V = 4, with laws that leave nothing to chance: after
# node 0 comes token 2 (node 2), after node 2 token 1 (node 4), after that token 3.
PARENTS = torch.tensor([[-1, 0, 0, 1, 2]])
TOKENS = torch.tensor([[0, 1, 2, 0, 1]])
SURE = {0: 2, 1: 0, 2: 1, 3: 0, 4: 3}


def sure_target(nodes: dict[int, int] = SURE) -> Tensor:
    target = torch.full((1, 5, 4), -torch.inf)
    for node, token in nodes.items():
        target[0, node, token] = 0.0
    return target


def run(target: Tensor | None = None, **kwargs: Any) -> pydecode.Verified:
    """The sure tree, under a uniform draft law unless told otherwise."""
    if kwargs.get("rule") != "target_only" and "draft_logits" not in kwargs:
        kwargs["draft_logits"] = torch.zeros(1, 5, 4)
    tokens = kwargs.pop("tokens", TOKENS)
    parents = kwargs.pop("parents", PARENTS)
    target = sure_target() if target is None else target
    return pydecode.rejection_sample_tree(target, tokens, parents, **kwargs)


def outcome(out: pydecode.Verified, b: int = 0) -> tuple[list[int], list[int]]:
    """Emitted tokens and path, after a look at the padding."""
    n = int(out.num_accepted[b]) + 1
    assert set(out.tokens[b, n:].tolist()) <= {-1}
    assert set(out.path[b, n:].tolist()) <= {-1}
    return out.tokens[b, :n].tolist(), out.path[b, :n].tolist()
