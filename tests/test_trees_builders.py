"""The builders of trees and masks: Medusa's choices, tries, lookahead windows, chains."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import pydecode
from pydecode import trees

# In the form of Medusa's published sparse trees: paths of ranks, deep where the heads are sure.
SPARSE = [
    *[(0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2), (3,), (0, 3), (4,), (0, 4)],
    *[(2, 0), (0, 5), (0, 0, 1), (5,), (0, 6), (6,), (0, 7), (0, 1, 0), (1, 1), (7,), (0, 8)],
    *[(0, 0, 2), (3, 0), (0, 9), (8,), (9,), (1, 0, 0), (0, 2, 0), (1, 2), (0, 0, 3), (0, 0, 0, 0)],
]


# ---- Medusa's choices ---------------------------------------------------------------------------


def expect_choices(choices: list[tuple[int, ...]]) -> None:
    tree = trees.from_choices(choices)
    T = len(choices) + 1
    order = [(), *sorted(choices, key=lambda path: (len(path), path))]
    assert [x.shape for x in tree] == [(1, T), (1, T), (1, T, -(-T // 64)), (T,)]
    assert tree.parents.tolist() == [[-1, *(order.index(path[:-1]) for path in order[1:])]]
    assert tree.depths.tolist() == [[len(path) for path in order]]
    assert tree.choice.tolist() == [0, *(path[-1] for path in order[1:])]
    assert tree.max_depth == max(len(path) for path in order)
    sees = [[b == a[: len(b)] for b in order] for a in order]
    assert trees.unpack_mask(tree.mask, T)[0].tolist() == sees


@pytest.mark.parametrize("choices", [SPARSE, SPARSE[::-1], [(0,)], [(7,), (7, 3)], []])
def test_choices(choices: list[tuple[int, ...]]) -> None:
    expect_choices(choices)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=30))
def test_any_choices(paths: set[tuple[int, ...]]) -> None:
    closed = {path[:d] for path in paths for d in range(1, len(path) + 1)}
    expect_choices(list(closed))
    bare = closed - {path[:-1] for path in closed}  # leaves only
    if any(len(path) > 1 for path in bare):
        with pytest.raises(ValueError, match=r"choices: expected every prefix"):
            trees.from_choices(list(bare))


def test_choices_give_tokens() -> None:
    topk_ids = torch.arange(30).view(3, 10)  # id = 10 * head + rank
    tree = trees.from_choices([list(path) for path in SPARSE[:-1]])  # lists, as Medusa has them
    tokens = topk_ids[tree.depths[0, 1:] - 1, tree.choice[1:]].tolist()
    paths = sorted(SPARSE[:-1], key=lambda path: (len(path), path))
    assert tokens == [10 * (len(path) - 1) + path[-1] for path in paths]


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([(0,), (1, 0)], ValueError, r"expected every prefix, got \(1, 0\) without \(1,\)"),
        ([(0,), (0,)], ValueError, r"expected distinct paths, got \(0,\) twice"),
        ([(0,), ()], ValueError, "expected non-empty paths"),
        ([(-1,)], ValueError, "ranks >= 0, got"),
        ([(0.0,)], TypeError, "expected paths of ints"),
        ([(True,)], TypeError, "expected paths of ints"),
    ],
)
def test_bad_choices(choices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="choices: .*" + message):
        trees.from_choices(choices)


# ---- tries --------------------------------------------------------------------------------------


def trie(candidates: list[list[int]], count: int) -> tuple[list[int], list[int], list[int]]:
    """parents, tokens and choice from a dict of prefixes."""
    n = len(candidates[0]) if candidates else 0
    place: dict[tuple[int, ...], int] = {(): 0}
    parents, tokens, choice = [-1], [-1], [0]
    for c, candidate in enumerate(candidates[: max(count, 0)]):
        for d in range(n):
            if candidate[d] < 0:
                break
            prefix = tuple(candidate[: d + 1])
            if prefix not in place:
                place[prefix] = len(parents)
                parents.append(place[prefix[:-1]])
                tokens.append(candidate[d])
                choice.append(c * n + d)
    unused = len(candidates) * n + 1 - len(parents)
    return parents + [-1] * unused, tokens + [-1] * unused, choice + [0] * unused


def expect_trie(tokens: torch.Tensor, counts: Any) -> None:
    B, C, n = tokens.shape
    tree, draft = trees.from_sequences(tokens, counts)
    T = 1 + C * n
    assert [x.shape for x in tree] == [(B, T), (B, T), (B, T, -(-T // 64)), (B, T)]
    assert draft.shape == (B, T)
    assert tree.max_depth == (n if C else 0)
    count = torch.as_tensor(C if counts is None else counts).expand(B).tolist()
    for b in range(B):
        want = trie(tokens[b].tolist(), count[b])
        assert (tree.parents[b].tolist(), draft[b].tolist(), tree.choice[b].tolist()) == want
    assert torch.equal(tree.depths, trees.depths(tree.parents))
    assert torch.equal(tree.mask, trees.mask_from_parents(tree.parents))


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 7, 9), (3, 1, 5), (2, 5, 1), (1, 16, 8)])
@pytest.mark.parametrize("vocab", [1, 2, 1000])  # 1: all equal, 1000: nearly nothing shared
def test_tries(shape: tuple[int, int, int], vocab: int) -> None:
    tokens = torch.randint(0, vocab, shape)
    expect_trie(tokens, None)
    expect_trie(tokens.int(), torch.randint(0, shape[1] + 1, shape[:1]))
    expect_trie(tokens, 1)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 4), st.integers(0, 4))
def test_any_trie(data: st.DataObject, C: int, n: int) -> None:
    token = st.integers(-1, 2)  # candidates end before their first negative token
    values = data.draw(st.lists(token, min_size=2 * C * n, max_size=2 * C * n))
    tokens = torch.tensor(values, dtype=torch.int64).view(2, C, n)
    expect_trie(tokens, torch.tensor(data.draw(st.tuples(st.integers(-1, 5), st.integers(0, 5)))))


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_tries(shape: tuple[int, int, int]) -> None:
    expect_trie(torch.zeros(shape, dtype=torch.int64), None)


def test_a_trie_on_the_device() -> None:
    tokens = torch.randint(0, 3, (3, 4, 3))
    counts = torch.tensor([4, 2, 0])
    with FakeTensorMode():  # any synchronisation raises under fake tensors
        trees.from_sequences(torch.zeros(3, 4, 3).long(), torch.zeros(3).long())
    compiled = torch.compile(trees.from_sequences, fullgraph=True, backend="aot_eager")
    (got, got_draft), (want, draft) = (
        compiled(tokens, counts),
        trees.from_sequences(tokens, counts),
    )
    assert isinstance(got, trees.Tree)
    assert got.max_depth == want.max_depth == 3
    assert all(torch.equal(x, y) for x, y in zip([*got, got_draft], [*want, draft]))
    for b in range(3):  # alone as in the batch
        alone, alone_draft = trees.from_sequences(tokens[b : b + 1], counts[b : b + 1])
        pairs = zip([*alone, alone_draft], [*want, draft])
        assert all(torch.equal(x, y[b : b + 1]) for x, y in pairs)


@pytest.mark.parametrize(
    ("tokens", "counts", "error", "message"),
    [
        (torch.zeros(2, 3).long(), None, ValueError, r"tokens: expected 3 dimensions \[B, C, n\]"),
        (torch.zeros(2, 3, 4), None, TypeError, "tokens: expected dtype int32"),
        (torch.zeros(2, 3, 4).long(), torch.zeros(3).long(), ValueError, "counts: expected 0-d or"),
        (torch.zeros(2, 3, 4).long(), 1.5, TypeError, "counts: expected an integer"),
    ],
)
def test_bad_sequences(tokens: Any, counts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trees.from_sequences(tokens, counts)


def test_checks_of_counts() -> None:
    with pydecode.checks(True), pytest.raises(ValueError, match=r"counts: .*got 4 at index \[1\]"):
        trees.from_sequences(torch.zeros(2, 3, 1).long(), torch.tensor([0, 4]))


# ---- lookahead ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("guesses", [0, 1, 4])
def test_lookahead(window: int, n: int, guesses: int) -> None:
    rows: list[tuple[Any, ...]] = [("w", l, c) for l in range(n - 1) for c in range(window)]
    rows += [("g", g, j) for g in range(guesses) for j in range(n - 1)]

    def sees(i: tuple[Any, ...], j: tuple[Any, ...]) -> bool:
        if i[0] == "w" and j[0] == "w":
            (_, level, column), (_, other, at) = i, j
            if other == 0:
                return at <= column  # level 0 is causal
            return at == column and other <= level  # the diagonal that led to the row
        if i[0] == "g" and j[0] == "g":
            return i[1] == j[1] and j[2] <= i[2]
        return i[0] == "g" and j == ("w", 0, 0)  # guesses follow the input token

    packed = trees.lookahead_mask(window, n, guesses)
    N = (window + guesses) * (n - 1)
    assert packed.shape == (1, N, -(-N // 64))
    assert trees.unpack_mask(packed, N)[0].tolist() == [[sees(i, j) for j in rows] for i in rows]
    offsets = [row[1] + row[2] if row[0] == "w" else 1 + row[2] for row in rows]
    assert trees.lookahead_positions(window, n, guesses).tolist() == [offsets]


@pytest.mark.parametrize(
    ("args", "message"),
    [((0, 3, 1), "window: .*>= 1"), ((2, 1, 1), "n: .*>= 2"), ((2, 3, -1), "guesses: .*>= 0")],
)
@pytest.mark.parametrize("function", [trees.lookahead_mask, trees.lookahead_positions])
def test_bad_windows(function: Any, args: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args)


# ---- the tuple itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 65])
def test_chain(n: int) -> None:
    tree = trees.chain(n)
    assert torch.equal(trees.unpack_mask(tree.mask, n)[0], torch.ones(n, n).tril() > 0)
    assert (tree.depths == torch.arange(n)).all()
    assert tree.max_depth == n - 1


def test_a_tree_is_a_tuple_of_four() -> None:
    tree = trees.from_choices(SPARSE)
    parents, depths, mask, choice = tree
    named = (tree.parents, tree.depths, tree.mask, tree.choice)
    assert all(x is y for x, y in zip((parents, depths, mask, choice), named))
    assert (len(tree), isinstance(tree, tuple), tree.max_depth) == (4, True, 4)
    for again in (copy.copy(tree), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert again.max_depth == 4
        assert all(torch.equal(x, y) for x, y in zip(again, tree))
    moved = tree.to("meta")
    assert (moved.max_depth, {x.device.type for x in moved}) == (4, {"meta"})
    assert trees.from_choices(SPARSE, device="meta").mask.device.type == "meta"
    mapped = pytree.tree_map(torch.clone, tree)
    assert isinstance(mapped, trees.Tree)
    assert mapped.max_depth == len(SPARSE)  # T - 1, still a bound
