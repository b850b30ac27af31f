"""verify_tree_greedy against SGLang's loops."""

import peer_sglang as peer
import pytest
import torch
from sglang_cases import PREFILL, Results, expect
from test_trees_links import linked_trees
from torch import Tensor

from pydecode import trees
from pydecode.compat.sglang import verify_tree_greedy


def greedy(S: int, rows: int, *args: Tensor) -> Results:
    got = Results(args[0].shape[0], rows, S)
    verify_tree_greedy(*got(), *args)
    return got


@pytest.mark.parametrize("S", [1, 2, 4, 9])
@pytest.mark.parametrize("ndt", [1, 2, 7, 16])
def test_greedy(S: int, ndt: int) -> None:
    """Lists in any order, equal siblings often; rows of the target anywhere."""
    bs = 100
    first, following, _ = linked_trees(bs, ndt)
    tokens, index = torch.randint(3, (bs, ndt)), torch.randperm(bs * ndt).view(bs, ndt)
    target = torch.randint(3, (bs, ndt))
    got = greedy(S, bs * ndt, tokens, index, first, following, target)
    flat = target.flatten().tolist()
    walks = [
        peer.verify_greedy(S, *each, flat)
        for each in zip(*(x.tolist() for x in (tokens, index, first, following)))
    ]
    expect(got, walks, index.tolist())


def test_greedy_of_equal_siblings_the_first_in_the_list() -> None:
    """The path below the other one is deeper, and would be verify_greedy's own choice."""
    first, following = torch.tensor([[2, 3, -1, -1]]), torch.tensor([[-1, -1, 1, -1]])
    tokens, target = torch.tensor([[0, 5, 5, 6]]), torch.tensor([[5, 6, 9, 7]])
    got = greedy(4, 4, tokens, torch.arange(4)[None], first, following, target)
    assert got.index.tolist() == [[0, 2, -1, -1]]
    assert got.predicts.tolist() == [5, PREFILL, 9, PREFILL]


@pytest.mark.parametrize("target", [-1, -5])
def test_greedy_undecided(target: int) -> None:
    """No token to go on with. Theirs accepts the padding of candidates, -1, and emits it."""
    first, following = trees.links(torch.tensor([[-1, 0, 1], [-1, 0, 1]]))
    tokens = torch.tensor([[4, 5, -1], [4, 5, 6]])
    targets = torch.tensor([[5, target, 6], [5, 6, 7]])
    got = greedy(3, 6, tokens, torch.arange(6).view(2, 3), first, following, targets)
    assert got.index.tolist() == [[0, -1, -1], [3, 4, 5]]
    assert got.num.tolist() == [0, 2]
    assert got.predicts.tolist() == [-1, PREFILL, PREFILL, 5, 6, 7]


def test_hostile_rows_and_links() -> None:
    """Requests 0 to 3 are broken, 4 is not; nothing is read or written out of bounds."""
    first, following = trees.links(torch.tensor([[-1, 0, 1]] * 5))
    index = torch.arange(15).view(5, 3)
    index[0, 0], index[1, 1], index[2, 0] = 10**9, -7, -1
    first[3], following[3] = torch.tensor([2, 2, 1]), torch.tensor([9, -(2**62), 2])
    tokens, target = torch.tensor([[4, 5, 6]]).repeat(5, 1), torch.tensor([[5, 6, 7]]).repeat(5, 1)
    got = greedy(3, 15, tokens, index, first, following, target)
    assert got.num.tolist() == [0, 0, 0, 0, 2]
    assert got.index[:, 0].tolist() == index[:, 0].tolist()
    assert got.index[4].tolist() == [12, 13, 14]
    assert got.predicts[12:].tolist() == [5, 6, 7]
    assert got.predicts[:3].eq(PREFILL).all()
    assert got.predicts[3:6].tolist() == [-1, PREFILL, PREFILL]
    assert got.predicts[6:9].eq(PREFILL).all()  # a padded request, without rows
    assert got.predicts[9:12].tolist() == [5, PREFILL, PREFILL]
