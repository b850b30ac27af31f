"""PPD's dynamic sparse trees: candidates, and the prompt tokens that draft the next step."""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tree import Tree, expect_int, from_host


class PromptState(NamedTuple):
    """What one forward runs when the last accepted node had ``s`` prompt tokens.

    Rows 0 .. C (C candidates) are the root and the candidates, the rows behind them prompt tokens.
    """

    tree: Tree  # choice [T]: a candidate's rank in its head; a prompt token's number, from 0
    num_candidates: int  # C: the verification's num_drafts
    num_prompts: Tensor  # int64 [C+1]: prompt tokens of each node, the next state if it is last
    prompt_rows: Tensor  # int64 [C+1, n]: the row of a node's j-th prompt token, -1: it has none
    expected_tokens: float  # f(s), the root's 1 included
    probability: float  # the share of steps that run in this state


class PromptTrees(NamedTuple):
    """A dynamic sparse tree: one static tree a state."""

    states: tuple[PromptState, ...]  # states[s], s = 0 .. n
    expected_tokens: float  # sum over states of probability * expected_tokens


def prompt_tree(
    accuracy: Tensor | Sequence[Any],
    *,
    num_candidates: int | Sequence[int],
    budget: int,
    device: torch.device | str | None = None,
) -> PromptTrees:
    """PPD's dynamic sparse tree: which candidates to verify, and where the prompt tokens go.

    In PPD (Chen et al., "Hardware-aware parallel prompt decoding", 2024, section 4) the trained
    prompt tokens behind the accepted node draft the next step. If it had s of them, the next step
    is in state s: it has s draft heads, so candidates of depth at most s. For each state

    1. candidates: the num_candidates paths (i_1, .., i_d) with the largest ``value = product of
       accuracy[j, i_j]``, the tree that ``from_choices`` would make of them; a state's
       ``f(s) = sum of all nodes' values``, the root's 1 included;
    2. every node gets n prompt tokens; then, while the rows exceed the budget, the node that loses
       least by it gives up one: ``p_last * (f(s') - f(s' - 1))`` with s' the prompt tokens that it
       has and ``p_last = value - sum of its children's values`` (ties: the last such node);
    3. the state after one that ends at a node with s' prompt tokens is s', so the states form a
       Markov chain with ``e[s, s'] = sum of p_last``. Its stationary law weighs the states' f.

    "Hardware aware" is to call this for several sizes and keep the one with the most
    ``expected_tokens`` per measured second of a forward of that many rows.

    Args:
        accuracy: [n, k], host numbers: how often the i-th best token (from 0) of prompt token j's
            law is the right one; each row sums to at most 1. n is the number of prompt tokens (3
            in the paper).
        num_candidates: candidates behind the root in the states 1 .. n: an int, or n ints. State 0
            has none: only its root, with its prompt tokens.
        budget: rows of a forward at most: root, candidates and prompt tokens.

    Returns:
        PromptTrees. In each state's tree the prompt tokens are a chain below their node, so they
        see it, its ancestors and each other, and their depth is their rotary offset; they are
        leaves that no candidate sees. Verify with ``num_drafts=state.num_candidates`` (or token -1
        in their rows) and they are out of it. If the last accepted node is a, the next state is
        ``num_prompts[a]``, and its heads are the logits of rows ``prompt_rows[a]``. The share of
        steps is that of a long run that starts in state n.

    Raises:
        ValueError: an accuracy outside [0, 1] or a row that sums to more than 1; more candidates
            than paths; a budget that does not hold a state's root and candidates.

    >>> import pydecode
    >>> trees = pydecode.trees.prompt_tree(
    ...     [[0.5, 0.25], [0.25, 0.125]], num_candidates=[2, 3], budget=10
    ... )
    >>> trees.states[2].tree.parents, trees.states[2].num_prompts
    (tensor([[-1,  0,  0,  1,  0,  4,  1,  6,  2,  3]]), tensor([2, 2, 1, 1]))
    """
    acc = torch.as_tensor(accuracy, dtype=torch.float64, device="cpu").detach()
    if acc.dim() != 2 or acc.shape[0] == 0:
        raise ValueError(f"accuracy: expected shape [n, k] with n >= 1, got {list(acc.shape)}")
    if not bool((acc >= 0).all() and (acc.sum(1) <= 1 + 1e-9).all()):
        raise ValueError(
            f"accuracy: expected numbers >= 0 whose rows sum to at most 1, got {acc.tolist()}"
        )
    n = acc.shape[0]
    if isinstance(num_candidates, int):
        num_candidates = [num_candidates] * n
    if len(num_candidates) != n:
        raise ValueError(
            f"num_candidates: expected an int or n = {n} ints, got {len(num_candidates)}"
        )
    counts = [0, *(expect_int("num_candidates", count, 0) for count in num_candidates)]
    budget = expect_int("budget", budget, 1 + max(counts))

    nodes = [_best_paths(acc[:s].tolist(), counts[s]) for s in range(n + 1)]
    f = [sum(value for _, _, value in state) for state in nodes]
    lasts = [_last(state) for state in nodes]
    prompts = [_prompts(last, f, n, budget) for last in lasts]
    share = _long_run(lasts, prompts, n)
    states = tuple(_state(nodes[s], prompts[s], n, f[s], share[s], device) for s in range(n + 1))
    return PromptTrees(states, sum(p * x for p, x in zip(share, f)))


# A node is (parent, rank, value); node 0 is the root.
_Node = tuple[int, int, float]


def _best_paths(acc: list[list[float]], count: int) -> list[_Node]:
    """The root and the ``count`` most valuable paths, ordered by length, then lexicographic."""
    # No child is worth more than its parent, so the frontier always holds the next best; of equal
    # ones the shorter, then the lexicographic first.
    frontier: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    kept: dict[tuple[int, ...], float] = {}
    while len(kept) < count + 1:
        if not frontier:
            raise ValueError(
                f"num_candidates: expected at most the {len(kept) - 1} paths of {len(acc)} heads, "
                f"got {count}"
            )
        value, depth, path = heapq.heappop(frontier)
        kept[path] = -value
        for rank, p in enumerate(acc[depth] if depth < len(acc) else ()):
            heapq.heappush(frontier, (value * p, depth + 1, (*path, rank)))
    paths = sorted(kept, key=lambda path: (len(path), path))
    place = {path: i for i, path in enumerate(paths)}
    return [
        (place[path[:-1]] if path else -1, path[-1] if path else 0, kept[path]) for path in paths
    ]


def _last(nodes: list[_Node]) -> list[float]:
    """The probability that a node is the last accepted one."""
    last = [value for _, _, value in nodes]
    for parent, _, value in nodes[1:]:
        last[parent] -= value
    return last


def _prompts(last: list[float], f: list[float], n: int, budget: int) -> list[int]:
    """Prompt tokens of each node: n, less those that cost least, until the budget holds."""
    prompts = [n] * len(last)
    while len(prompts) + sum(prompts) > budget:
        loss = [p * (f[s] - f[s - 1]) if s else float("inf") for p, s in zip(last, prompts)]
        cheapest = min(loss)
        prompts[max(i for i, x in enumerate(loss) if x == cheapest)] -= 1
    return prompts


def _long_run(lasts: list[list[float]], prompts: list[list[int]], n: int) -> list[float]:
    """Shares of the states in a long run from state n."""
    e = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for s in range(n + 1):
        for p, after in zip(lasts[s], prompts[s]):
            e[s, after] += max(p, 0.0)
    # The lazy chain has the same long run and no period; squaring it 64 times runs 2^64 steps.
    e = (e + torch.eye(n + 1, dtype=torch.float64)) / 2
    for _ in range(64):
        e = e / e.sum(1, keepdim=True)
        e = e @ e
    share: list[float] = (e[n] / e[n].sum()).tolist()
    return share


def _state(
    nodes: list[_Node], prompts: list[int], n: int, f: float, share: float, device: Any
) -> PromptState:
    parents = [parent for parent, _, _ in nodes]
    choice = [rank for _, rank, _ in nodes]
    rows = []
    for node, count in enumerate(prompts):
        first = len(parents)
        parents += [node, *range(first, first + count - 1)][:count]
        choice += range(count)
        rows.append([first + j if j < count else -1 for j in range(n)])
    return PromptState(
        from_host(parents, choice, device),
        len(nodes) - 1,
        torch.tensor(prompts, dtype=torch.int64, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        f,
        share,
    )
