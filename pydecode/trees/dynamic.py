"""EAGLE-2's dynamic tree: the public function, its checks and its binding."""

import torch
from torch import Tensor

from .. import binding
from ..backends import choose, unavailable
from ..reference import dynamic_tree as reference
from ..replay import replayed
from ..validation import (
    FLOATS,
    INTS,
    expect_device,
    expect_dim,
    expect_dtype,
    expect_index,
    expect_tensor,
)
from .masks import expect_parents
from .tree import Tree, expect_int

HAS = ("reference", "triton")


@replayed
def dynamic(
    scores: Tensor,
    tokens: Tensor,
    parents: Tensor,
    *,
    num_nodes: int,
    max_depth: int | None = None,
    backend: str | None = None,
) -> Tree:
    """The best nodes of a drafted beam by cumulative log probability, on the device.

    EAGLE-2's rerank (Li et al., EMNLP 2024, section 4.2): of all M drafted entries keep the
    ``num_nodes`` with the largest ``scores[i] = sum of log q along the path``, sorted by index, so
    that parents precede their children. Ties go to the lowest index.

    Args:
        scores: [B, M], fp16, bf16, fp32 or fp64, cumulative log probabilities. A NaN counts as
            -inf, and a node's value is the minimum along its path, so that no child outranks its
            parent and the choice is always a tree. Entry 0's score is not read.
        tokens: int32 or int64 [B, M]; < 0 marks an entry of the beam that is absent.
        parents: int32 or int64 [B|1, M], indices into the beam, each before its child. Entry 0 is
            the root and always kept; any other entry whose parent is not in [0, own index), or
            with an absent ancestor, is absent itself.
        num_nodes: T, the root included, 1 <= T <= M. Static.
        max_depth: what the caller knows about the beam's depth (its number of draft rounds), for
            ``Tree.max_depth`` alone: nothing is cut. None: T - 1.

    Returns:
        Tree with [B, T] tensors. choice [B, T] is a node's index in the beam, so the draft tokens
        are ``tokens.gather(1, choice)``, and a draft law's rows ``choice`` as well. With fewer than
        T entries that are there, absent ones come last, with parent -1: no child of anyone, so
        every verification rule loses them.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name; under
            ``pydecode.checks(True)`` also a parent that is not in [-1, own index).
        BackendUnavailable: the named backend cannot run this call.

    >>> import torch, pydecode
    >>> scores = torch.tensor([[0.0, -0.5, -1.0, -2.0, -0.6]])
    >>> tokens = torch.tensor([[7, 3, 4, 5, 6]])
    >>> parents = torch.tensor([[-1, 0, 0, 1, 1]])
    >>> tree = pydecode.trees.dynamic(scores, tokens, parents, num_nodes=4)
    >>> tree.parents, tokens.gather(1, tree.choice)
    (tensor([[-1,  0,  0,  1]]), tensor([[7, 3, 4, 6]]))
    """
    scores = expect_tensor("scores", scores)
    expect_dtype("scores", scores, FLOATS)
    expect_dim("scores", scores, 2, "[B, M]")
    B, M = scores.shape
    tokens = expect_index("tokens", tokens, (B, M), "[B, M]", scores.device)
    parents = expect_tensor("parents", parents)
    expect_dtype("parents", parents, INTS)
    expect_device("parents", parents, scores.device)
    if tuple(parents.shape) not in ((B, M), (1, M)):
        raise ValueError(
            f"parents: expected shape [B|1, M] = [{B}|1, {M}], got {list(parents.shape)}"
        )
    parents = expect_parents(parents)
    num_nodes = expect_int("num_nodes", num_nodes, 1)
    if num_nodes > M:
        raise ValueError(f"num_nodes: expected at most M = {M} nodes, got {num_nodes}")
    bound = num_nodes - 1
    if max_depth is not None:
        bound = min(expect_int("max_depth", max_depth, 0), bound)
    chosen = choose("dynamic_tree", backend, HAS, scores)
    args = (scores, tokens, parents, num_nodes, chosen)
    tree_parents, depths, mask, choice = binding.call(_op, _run, *args)
    return Tree(tree_parents, depths, mask, choice, bound)


def _run(
    scores: Tensor, tokens: Tensor, parents: Tensor, num_nodes: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference.dynamic_tree(scores, tokens, parents, num_nodes)
    if backend == "triton":
        from ..triton_kernels import dynamic_tree as triton

        return triton.dynamic_tree(scores, tokens, parents, num_nodes)
    raise unavailable("dynamic_tree", backend, HAS)


def _fake(
    scores: Tensor, tokens: Tensor, parents: Tensor, num_nodes: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T = scores.shape[0], num_nodes
    words = -(-T // 64)
    shapes = ((B, T), (B, T), (B, T, words), (B, T))
    parents_, depths, mask, choice = (scores.new_empty(s, dtype=torch.int64) for s in shapes)
    return parents_, depths, mask, choice


_op = binding.bind("dynamic_tree", _run, _fake)
