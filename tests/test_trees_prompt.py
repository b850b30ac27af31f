"""PPD's dynamic sparse trees against their rules, and the long run of their states."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydecode import trees


def paths_of(state: trees.PromptState) -> list[tuple[int, ...]]:
    """The candidates of a state as paths of ranks, the root first."""
    paths: list[tuple[int, ...]] = [()]
    parents, choice = state.tree.parents[0].tolist(), state.tree.choice.tolist()
    for i in range(1, state.num_candidates + 1):
        paths.append((*paths[parents[i]], choice[i]))
    return paths


def expect_prompt_trees(acc: list[list[float]], counts: list[int], budget: int) -> None:
    n = len(acc)
    got = trees.prompt_tree(acc, num_candidates=counts, budget=budget)
    assert len(got.states) == n + 1

    def value(path: tuple[int, ...]) -> float:
        return math.prod(acc[d][rank] for d, rank in enumerate(path))

    f, lasts = [], []
    for s, (state, count) in enumerate(zip(got.states, [0, *counts])):
        # candidates: prefix closed, at most s deep, worth as much as the best of all paths
        paths = paths_of(state)
        assert len(set(paths)) == count + 1 == state.num_candidates + 1
        assert all(path[:-1] in paths and len(path) <= s for path in paths)
        ranks = [range(len(row)) for row in acc[:s]]
        every = [path for d in range(s + 1) for path in itertools.product(*ranks[:d])]
        values = [value(path) for path in paths]
        assert math.isclose(sum(values), sum(sorted(map(value, every))[-count - 1 :]))
        assert math.isclose(state.expected_tokens, sum(values), rel_tol=1e-12)
        f.append(sum(values))
        children = [[value(c) for c in paths if c and c[:-1] == path] for path in paths]
        lasts.append([v - sum(c) for v, c in zip(values, children)])

    e = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for s, (state, last) in enumerate(zip(got.states, lasts)):
        # prompt tokens: n each, then the cheapest goes until the rows fit
        prompts = [n] * len(last)
        while len(prompts) + sum(prompts) > budget:
            losses = [p * (f[k] - f[k - 1]) if k else math.inf for p, k in zip(last, prompts)]
            prompts[len(prompts) - 1 - losses[::-1].index(min(losses))] -= 1
        kept = state.num_prompts.tolist()
        assert kept == prompts
        assert sum(kept) == min(n * len(last), budget - len(last))
        for p, k in zip(last, kept):
            e[s, k] += p
        expect_prompt_rows(state, n)

    # the long run from state n: the mean of e^0 .. e^(2^60 - 1), by doubling
    share = torch.tensor([state.probability for state in got.states], dtype=torch.float64)
    mean, power = torch.eye(n + 1, dtype=torch.float64), e
    for _ in range(60):
        power = power / power.sum(1, keepdim=True)  # or the rows' rounding doubles as well
        mean, power = (mean + power @ mean) / 2, power @ power
    torch.testing.assert_close(share, mean[n], rtol=0, atol=1e-9)
    torch.testing.assert_close(share @ e, share, rtol=0, atol=1e-12)
    assert math.isclose(got.expected_tokens, sum(p * x for p, x in zip(share.tolist(), f)))


def expect_prompt_rows(state: trees.PromptState, n: int) -> None:
    """Behind the candidates, each node's prompt tokens are a chain below it that no other sees."""
    C = state.num_candidates
    parents, choice = state.tree.parents[0].tolist(), state.tree.choice.tolist()
    T = len(parents)
    mask = trees.unpack_mask(state.tree.mask, T)[0]
    assert not mask[: C + 1, C + 1 :].any()  # candidates are blind to them
    assert state.prompt_rows.shape == (C + 1, n)
    seen = []
    for node, (count, rows) in enumerate(zip(state.num_prompts, state.prompt_rows.tolist())):
        chain = rows[:count]
        assert rows[count:] == [-1] * (n - int(count))
        assert [choice[row] for row in chain] == list(range(int(count)))
        for j, row in enumerate(chain):
            assert parents[row] == (chain[j - 1] if j else node)
            sees = mask[row].nonzero()[:, 0].tolist()
            assert sees == sorted([*mask[node].nonzero()[:, 0].tolist(), *chain[: j + 1]])
            assert state.tree.depths[0, row] == state.tree.depths[0, node] + j + 1
        seen += chain
    assert sorted(seen) == list(range(C + 1, T))
    assert state.tree.max_depth == int(state.tree.depths.max())


# Multiples of 1/64: every sum and product below is exact, so ties are ties.
PPD = [[x / 64 for x in row] for row in ([36, 10, 5, 2], [22, 7, 3, 1], [13, 5, 2, 0])]


@pytest.mark.parametrize(
    ("counts", "budget"),
    [
        ([4, 10, 20], 45),  # some prompt tokens go
        ([4, 10, 20], 21),  # no room for any in the last state
        ([4, 6, 8], 1000),  # room for all
        ([0, 0, 0], 2),
    ],
)
def test_prompt_tree(counts: list[int], budget: int) -> None:
    expect_prompt_trees(PPD, counts, budget)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_any_prompt_tree(data: st.DataObject, n: int, k: int) -> None:
    cuts = st.lists(st.integers(0, 64), min_size=k, max_size=k).map(sorted)
    rows = [[0, *data.draw(cuts)] for _ in range(n)]
    acc = [[(b - a) / 64 for a, b in itertools.pairwise(row)] for row in rows]
    limits = [sum(k**d for d in range(1, s + 1)) for s in range(1, n + 1)]
    counts = [data.draw(st.integers(0, limit)) for limit in limits]
    expect_prompt_trees(acc, counts, 1 + max(counts) + data.draw(st.integers(0, 12)))


def test_certain_heads() -> None:
    # a chain of certainty: the last node always is the last accepted one
    got = trees.prompt_tree([[1.0], [1.0]], num_candidates=[1, 2], budget=5)
    assert [state.expected_tokens for state in got.states] == [1.0, 2.0, 3.0]
    assert [state.num_prompts.tolist() for state in got.states] == [[2], [1, 2], [0, 0, 2]]
    assert [state.probability for state in got.states] == [0.0, 0.0, 1.0]
    assert got.expected_tokens == 3.0


def test_decimal_accuracies() -> None:
    # 2^64 steps of a chain whose rows do not sum to 1 exactly
    acc = [[0.43, 0.1], [0.37, 0.11]]
    got = trees.prompt_tree(acc, num_candidates=[2, 4], budget=9)
    e = torch.zeros(3, 3, dtype=torch.float64)
    for s, state in enumerate(got.states):
        paths, prompts = paths_of(state), state.num_prompts.tolist()
        for path in paths:
            value = math.prod(acc[d][rank] for d, rank in enumerate(path))
            e[s, prompts[paths.index(path)]] += value
            if path:
                e[s, prompts[paths.index(path[:-1])]] -= value
    law = torch.tensor([state.probability for state in got.states], dtype=torch.float64)
    assert math.isclose(law.sum().item(), 1.0, rel_tol=1e-12)
    torch.testing.assert_close(law @ e, law, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(accuracy=[0.5]), "accuracy: expected shape"),
        (dict(accuracy=[[0.6, 0.6]]), "accuracy: expected numbers >= 0 whose rows sum"),
        (dict(accuracy=[[-0.1]]), "accuracy: expected numbers >= 0"),
        (dict(num_candidates=[1]), "num_candidates: expected an int or n = 2 ints, got 1"),
        (dict(num_candidates=7), "num_candidates: expected at most the 2 paths of 1 heads, got 7"),
        (dict(num_candidates=-1), "num_candidates: expected an int >= 0"),
        (dict(budget=2), "budget: expected an int >= 3"),
    ],
)
def test_bad_prompt_trees(change: dict[str, Any], message: str) -> None:
    good = dict(accuracy=[[0.5, 0.2], [0.3, 0.1]], num_candidates=2, budget=9)
    trees.prompt_tree(**good)
    with pytest.raises(ValueError, match=message):
        trees.prompt_tree(**{**good, **change})
