"""Bad data in the Triton kernels: the cases of test_rejection_sample_tree_edges.py, and trees that
only a kernel could trip over."""

import pytest
import test_rejection_sample_tree_edges as edges
import torch
from sure_tree import RULES, SAMPLED
from test_rejection_sample_tree_edges import (  # noqa: F401
    test_a_bad_request_hurts_no_other,
    test_a_zero_residual_falls_back_to_p,
    test_bad_draft_rows,
    test_draft_ids_beyond_the_vocabulary,
    test_nodes_that_do_not_exist,
    test_nothing_fits,
    test_target_only_reads_no_draft_law,
    test_the_sure_path,
)

import pydecode


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.mark.parametrize(
    ("rule", "bad"), [("recursive", "one nan"), ("traversal", "nan"), ("k_seq", "nothing allowed")]
)
@pytest.mark.parametrize("node", range(5))
def test_bad_target_rows(node: int, bad: str, rule: str) -> None:
    edges.test_bad_target_rows(node, bad, rule, "triton")


@pytest.mark.parametrize("rule", ["without_replacement", "target_only", "traversal"])
def test_missing_and_wrong_rows(rule: str) -> None:
    edges.test_missing_and_wrong_rows(rule, "triton")


@pytest.mark.parametrize(("rule", "T"), [("recursive", 1024), ("target_only", 130)])
def test_wide_and_deep_trees(rule: str, T: int) -> None:
    """A chain of all nodes, and all of them children of the root."""
    V = 3
    law = torch.zeros(1, 1, V).expand(2, T, V)
    chain = torch.arange(-1, T - 1)
    star = torch.zeros(T, dtype=torch.int64)
    star[0] = -1
    tokens = torch.ones(2, T, dtype=torch.int32)
    tokens[:, -1] = 2
    u = torch.zeros(2, T + 1)
    u[1] = 0.5  # after the first child p'(1) = 0, so only the last can be right
    u[1, 1] = 0.9
    out = pydecode.rejection_sample_tree(
        law[..., :V].contiguous(),
        tokens,
        torch.stack([chain, star]),
        rule=rule,
        temperature=torch.tensor([1.0, 0.7]),
        max_depth=5,
        uniforms=u,
        backend="triton",
    )
    want = pydecode.rejection_sample_tree(
        law.contiguous(),
        tokens,
        torch.stack([chain, star]),
        rule=rule,
        temperature=torch.tensor([1.0, 0.7]),
        max_depth=5,
        uniforms=u,
    )
    assert out.num_accepted.tolist() == want.num_accepted.tolist()
    assert torch.equal(out.tokens, want.tokens)
    assert torch.equal(out.path, want.path)


@pytest.mark.parametrize("rule", RULES)
def test_outputs_wider_than_the_tree(rule: str) -> None:
    law = torch.zeros(1, 2, 4)
    given = dict(draft_logits=law) if rule in SAMPLED else {}
    tokens, parents = torch.tensor([[0, 1]]), torch.tensor([[-1, 0]])
    out = pydecode.rejection_sample_tree(
        *(law, tokens, parents), rule=rule, max_depth=130, backend="triton", **given
    )
    n = int(out.num_accepted[0])
    assert out.tokens.shape == (1, 131)
    assert (out.tokens[0, n + 1 :] == -1).all()
    assert (out.path[0, n + 1 :] == -1).all()


def test_no_rows_at_all() -> None:
    """A packed target without rows: nothing is read, and nothing decided."""
    tokens, parents = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[-1, 0]])
    index = torch.tensor([[-1, -1], [0, 0]])
    for rule in ("recursive", "traversal"):
        out = pydecode.rejection_sample_tree(
            *(torch.empty(0, 5), tokens, parents),
            draft_logits=torch.empty(0, 5),
            row_index=index,
            draft_row_index=index,
            rule=rule,
            backend="triton",
        )
        assert out.tokens.tolist() == [[-1, -1], [-1, -1]]
        assert out.path.tolist() == [[0, -1], [-1, -1]]
