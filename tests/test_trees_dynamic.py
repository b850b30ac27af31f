"""trees.dynamic against a re-ranking in plain Python."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pydecode
from pydecode import trees
from pydecode.reference import dynamic_tree as reference

NAN, INF = math.nan, math.inf


def rerank(
    scores: list[float], tokens: list[int], parents: list[int], num_nodes: int
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """parents, depths, choice and the rows' visible nodes of one request."""
    there, value = [True], [INF]
    for i in range(1, len(scores)):
        parent = parents[i]
        linked = 0 <= parent < i
        there.append(linked and tokens[i] >= 0 and there[parent])
        own = -INF if math.isnan(scores[i]) else scores[i]
        value.append(min(own, value[parent]) if linked else own)
    real = sorted((i for i, x in enumerate(there) if x), key=lambda i: (-value[i], i))[:num_nodes]
    # absent ones: their order among themselves is the op's, but they come last, by index
    choice = sorted(real)
    place = {i: j for j, i in enumerate(choice)}
    new_parents, depths, sees = [-1], [0], [[0]]
    for j, i in enumerate(choice[1:], 1):
        new_parents.append(place[parents[i]])
        depths.append(depths[new_parents[-1]] + 1)
        sees.append([*sees[new_parents[-1]], j])
    return new_parents, depths, choice, sees


def expect_rerank(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: int,
    backend: str | None = None,
) -> trees.Tree:
    tree = trees.dynamic(scores, tokens, parents, num_nodes=num_nodes, backend=backend)
    B, T = scores.shape[0], num_nodes
    assert [x.shape for x in tree] == [(B, T), (B, T), (B, T, -(-T // 64)), (B, T)]
    assert all(x.dtype == torch.int64 for x in tree)
    rows = parents.expand(B, -1).tolist()
    mask = trees.unpack_mask(tree.mask, T)
    for b in range(B):
        want = rerank(scores[b].tolist(), tokens[b].tolist(), rows[b], num_nodes)
        new_parents, depths, choice, sees = want
        n = len(choice)
        assert tree.choice[b, :n].tolist() == choice
        assert tree.parents[b, :n].tolist() == new_parents
        assert tree.depths[b, :n].tolist() == depths
        assert [row.nonzero()[:, 0].tolist() for row in mask[b, :n]] == sees
        # the tail: absent entries, each once, by index; nobody's child
        tail = tree.choice[b, n:].tolist()
        assert tail == sorted(set(tail))
        assert not set(tail) & set(choice)
        assert tree.parents[b, n:].tolist() == [-1] * (T - n)
        assert tree.depths[b, n:].tolist() == [0] * (T - n)
        assert torch.equal(mask[b, n:], torch.eye(T, dtype=torch.bool)[n:])
    return tree


def beams(B: int, rounds: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """EAGLE-2's beam: a root, then in each round the k best of the k x k children, expanded."""
    M = 1 + k + (rounds - 1) * k * k
    scores, parents = torch.zeros(B, M), torch.full((B, M), -1)
    tokens = torch.randint(0, 1000, (B, M))
    for b in range(B):
        frontier, at = [0], 1
        for _ in range(rounds):
            new = []
            for node in frontier:
                logp = torch.randn(k).log_softmax(-1)
                parents[b, at : at + k] = node
                scores[b, at : at + k] = scores[b, node] + logp
                new += range(at, at + k)
                at += k
            frontier = sorted(sorted(new, key=lambda i: -scores[b, i])[:k])
    return scores, tokens, parents


@pytest.mark.parametrize("num_nodes", [1, 2, 20, 64, 65, 85])
def test_an_eagle_beam(num_nodes: int, backend: str) -> None:
    tree = expect_rerank(*beams(3, 6, 4), num_nodes, backend)
    assert tree.max_depth == num_nodes - 1
    assert (tree.depths >= 0).all()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 12))
def test_any_beam(data: st.DataObject, M: int) -> None:
    # few distinct scores, so ties; broken scores; absent entries; parents that lead nowhere
    def row(values: Any) -> list[Any]:
        return data.draw(st.lists(values, min_size=M, max_size=M))

    score = st.sampled_from([0.0, -1.0, -1.0, -2.0, 1.0, NAN, -INF, INF])
    scores = torch.tensor([row(score), row(score)], dtype=torch.float64)
    tokens = torch.tensor([row(st.sampled_from([-1, 5, 5, 5, 6])) for _ in range(2)])
    upper = [data.draw(st.integers(-2 if i % 5 == 4 else 0, max(i - 1, 0))) for i in range(M)]
    parents = torch.tensor([upper, row(st.integers(-2, M))])
    expect_rerank(scores, tokens, parents, data.draw(st.integers(1, M)))


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -1.0, -1.0]])
    tokens, parents = torch.arange(6)[None], torch.tensor([[-1, 0, 0, 1, 2, 1]])
    tree = trees.dynamic(scores, tokens, parents, num_nodes=4, backend=backend)
    assert tree.choice.tolist() == [[0, 1, 2, 3]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1]]


def test_no_child_outranks_its_parent(backend: str) -> None:
    # entry 1 is poor, its child claims to be the best: it cannot stay without its parent
    scores = torch.tensor([[0.0, -9.0, -1.0, 5.0]])
    tree = trees.dynamic(
        scores, torch.ones(1, 4).long(), torch.tensor([[-1, 0, 0, 1]]), num_nodes=2, backend=backend
    )
    assert tree.choice.tolist() == [[0, 2]]
    scores[0, 1] = NAN
    assert expect_rerank(
        scores, torch.ones(1, 4).long(), torch.tensor([[-1, 0, 0, 1]]), 3, backend
    ).choice.tolist() == [[0, 1, 2]]


def test_the_root_stays_whatever_its_score_and_token(backend: str) -> None:
    scores = torch.tensor([[NAN, 0.0], [-INF, 3.0]])
    tokens = torch.tensor([[-1, 4], [-1, 4]])
    tree = trees.dynamic(scores, tokens, torch.tensor([[1, 0]]), num_nodes=1, backend=backend)
    assert tree.choice.tolist() == [[0], [0]]
    assert tree.parents.tolist() == [[-1], [-1]]


def test_a_real_node_of_probability_0_goes_before_an_absent_one(backend: str) -> None:
    scores = torch.tensor([[0.0, 3.0, -INF, NAN]])
    tokens, parents = torch.tensor([[1, -1, 2, 3]]), torch.tensor([[-1, 0, 0, 0]])
    tree = trees.dynamic(scores, tokens, parents, num_nodes=4, backend=backend)
    assert tree.choice.tolist() == [[0, 2, 3, 1]]
    assert tree.parents.tolist() == [[-1, 0, 0, -1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_dtypes(dtype: torch.dtype, index: torch.dtype, backend: str) -> None:
    scores, tokens, parents = beams(2, 4, 3)
    expect_rerank(scores.to(dtype), tokens.to(index), parents.to(index), 10, backend)


def test_a_request_does_not_depend_on_its_batch(backend: str) -> None:
    scores, tokens, parents = beams(4, 4, 3)
    together = trees.dynamic(scores, tokens, parents, num_nodes=9, backend=backend)
    for b in range(4):
        one = slice(b, b + 1)
        alone = trees.dynamic(scores[one], tokens[one], parents[one], num_nodes=9, backend=backend)
        assert all(torch.equal(x[one], y) for x, y in zip(together, alone))
    shared = trees.dynamic(scores, tokens, parents[:1], num_nodes=9, backend=backend)
    spread = parents[:1].expand(4, -1)
    want = trees.dynamic(scores, tokens, spread, num_nodes=9, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(shared, want))


def test_strides_and_empty_batches(backend: str) -> None:
    scores, tokens, parents = beams(3, 3, 3)
    want = trees.dynamic(scores, tokens, parents, num_nodes=7)
    views = [torch.stack([x, x], 1)[:, 1] for x in (scores, tokens, parents)]
    got = trees.dynamic(*views, num_nodes=7, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    empty = trees.dynamic(scores[:0], tokens[:0], parents[:0], num_nodes=7, backend=backend)
    assert [x.shape for x in empty] == [(0, 7), (0, 7), (0, 7, 1), (0, 7)]


def test_verification_loses_the_tail_and_does_not_read_the_root(backend: str) -> None:
    # the target says 5 after the root; entry 2 is that token, but its parent is absent
    scores, tokens = torch.tensor([[0.0, -0.1, -0.2, -0.3]]), torch.tensor([[-1, -1, 5, 6]])
    tree = trees.dynamic(
        scores, tokens, torch.tensor([[-1, 0, 1, 0]]), num_nodes=4, backend=backend
    )
    assert tree.choice.tolist() == [[0, 3, 1, 2]]
    draft = tokens.gather(1, tree.choice)
    target = torch.full((1, 4, 8), -9.0)
    target[:, 0, 5], target[:, 1:, 7] = 9.0, 9.0
    verify = dict(parents=tree.parents, max_depth=tree.max_depth)
    assert pydecode.verify_greedy(draft, target, **verify).tokens.tolist() == [[5, -1, -1, -1]]
    for rule in ("recursive", "traversal", "target_only"):
        got = pydecode.rejection_sample_tree(target, draft, **verify, rule=rule, temperature=0)
        assert got.tokens.tolist() == [[5, -1, -1, -1]]
    target[:, 0, 6] = 99.0  # and finds what is there
    assert pydecode.verify_greedy(draft, target, **verify).tokens.tolist() == [[6, 7, -1, -1]]


def test_max_depth() -> None:
    beam = beams(1, 3, 3)
    bounds = [trees.dynamic(*beam, num_nodes=7, max_depth=d).max_depth for d in (None, 0, 3, 99)]
    assert bounds == [6, 0, 3, 6]


def test_nothing_reads_device_data() -> None:
    with FakeTensorMode():
        i = torch.zeros(2, 9, dtype=torch.int64)
        assert reference.dynamic_tree(torch.zeros(2, 9), i, i, 4)[2].shape == (2, 4, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(scores=torch.zeros(2, 5).long()), TypeError, "scores: expected dtype float16"),
        (dict(scores=torch.zeros(5)), ValueError, r"scores: expected 2 dimensions \[B, M\]"),
        (dict(tokens=torch.zeros(2, 4).long()), ValueError, "tokens: expected shape"),
        (dict(tokens=torch.zeros(2, 5)), TypeError, "tokens: expected dtype int32, int64"),
        (
            dict(parents=torch.zeros(3, 5).long()),
            ValueError,
            r"parents: expected shape \[B\|1, M\]",
        ),
        (dict(parents=torch.zeros(2, 5)), TypeError, "parents: expected dtype"),
        (dict(num_nodes=0), ValueError, "num_nodes: expected an int >= 1, got 0"),
        (dict(num_nodes=6), ValueError, "num_nodes: expected at most M = 5 nodes, got 6"),
        (dict(num_nodes=torch.tensor(3)), ValueError, "num_nodes: expected an int"),
        (dict(max_depth=-1), ValueError, "max_depth: expected an int >= 0"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(
        scores=torch.zeros(2, 5),
        tokens=torch.zeros(2, 5).long(),
        parents=torch.zeros(2, 5).long() - 1,
        num_nodes=3,
    )
    trees.dynamic(**good)
    with pytest.raises(error, match=message):
        trees.dynamic(**{**good, **change})
    with pydecode.checks(True), pytest.raises(ValueError, match=r"parents: .*got 5"):
        trees.dynamic(**{**good, "parents": good["parents"] + 6})
