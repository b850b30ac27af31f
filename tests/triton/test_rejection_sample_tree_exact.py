"""Exact laws through the Triton kernels: every draft of a small tree, every cell of its coins.

The enumeration is that of test_rejection_sample_tree_laws.py, in fp32, and its own edges.
"""

from typing import Any

import pytest
import test_rejection_sample_tree_laws as laws
import torch
from tree_laws_oracle import Tree, drafted, shape

import pydecode


class Narrow:
    """pydecode, handed fp32 in place of fp64."""

    @staticmethod
    def rejection_sample_tree(*args: Any, **kwargs: Any) -> pydecode.Verified:
        def narrow(x: Any) -> Any:
            return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        given = {name: narrow(x) for name, x in kwargs.items()}
        return pydecode.rejection_sample_tree(*map(narrow, args), **given)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "pydecode", Narrow)
    monkeypatch.setattr(laws, "EDGE", 2e-6)


SAMPLED = {  # rule, widths of the tree, vocabulary, end of the coins' intervals
    "recursive-star": ("recursive", (2,), 3, "high"),
    "recursive-tree": ("recursive", (2, 1), 2, "low"),
    "without-star": ("without_replacement", (2,), 3, "low"),
    "without-wide": ("without_replacement", (2,), 4, "high"),
    "k_seq-star": ("k_seq", (2,), 3, "high"),
    "traversal-tree": ("traversal", (2, 1), 2, "low"),
    "traversal-star": ("traversal", (2,), 3, "high"),
    "leaf_first_without-tree": ("traversal_without_replacement", (2, 1), 2, "high"),
    "leaf_first_without-star": ("traversal_without_replacement", (2,), 3, "low"),
}


@pytest.mark.parametrize(("rule", "widths", "vocab", "edge"), SAMPLED.values(), ids=SAMPLED)
def test_sampled_trees_keep_the_law(
    rule: str, widths: tuple[int, ...], vocab: int, edge: str
) -> None:
    P, Q = laws.laws(2 if rule == "without_replacement" else 0, vocab)  # one that tells all apart
    trees = list(drafted(shape(*widths), P, Q, replacement="without" not in rule))
    outcome = laws.through_the_op(rule, trees, P, Q, "triton", edge=edge)
    if rule == "k_seq":  # its residual holds rounding errors, some of which are cells
        assert laws.error(outcome, P) < 1e-6
    else:
        assert outcome.surprises == 0
        assert laws.error(outcome, P) < 1e-12  # the weights are the enumeration's


@pytest.mark.parametrize("name", ["star", "binary-with-duplicates"])
@pytest.mark.parametrize("rule", ["recursive", "target_only"])
def test_deterministic_trees_keep_the_law(rule: str, name: str) -> None:
    widths, tokens = laws.DETERMINISTIC[name]
    P, Q = laws.laws(1)
    tree = Tree(shape(*widths), (0, *tokens), P, Q)
    cell_rule = "target_only" if rule == "target_only" else "delta"
    given = dict(edge="low", cell_rule=cell_rule, with_q=False)
    outcome = laws.through_the_op(rule, [(tree, 1.0)], P, Q, "triton", **given)
    assert outcome.surprises == 0
    assert laws.error(outcome, P) < 1e-12


def test_control_a_stale_q_without_replacement() -> None:
    P, Q = laws.laws(3)
    trees = list(drafted(shape(2), P, Q, replacement=False))
    outcome = laws.through_the_op("recursive", trees, P, Q, "triton", edge="high")
    assert laws.error(outcome, P) > 0.01
