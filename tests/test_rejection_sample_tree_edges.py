"""rejection_sample_tree on bad data: rows, nodes and indices that are missing or wrong."""

import pytest
import torch
from sure_tree import PARENTS, RULES, SAMPLED, SURE, TOKENS, outcome, run, sure_target

import pydecode

TOP_DOWN = ["recursive", "without_replacement", "k_seq", "target_only"]
NAN, INF = torch.nan, torch.inf
UNDECIDED = ([-1], [-1])


@pytest.mark.parametrize("rule", RULES)
def test_the_sure_path(rule: str, backend: str) -> None:
    out = run(rule=rule, backend=backend, return_logprobs=True)
    assert outcome(out) == ([2, 1, 3], [0, 2, 4])
    assert out.tokens.dtype == torch.int64
    assert out.path.dtype == out.num_accepted.dtype == torch.int32
    assert out.logprobs is not None
    assert out.logprobs.tolist() == [[0.0] * 5]


@pytest.mark.parametrize("rule", RULES)
def test_nothing_fits(rule: str, backend: str) -> None:
    out = run(sure_target({**SURE, 0: 3}), rule=rule, backend=backend)
    assert outcome(out) == ([3], [0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", ["nan", "nothing allowed", "one nan"])
@pytest.mark.parametrize("node", range(5))
def test_bad_target_rows(node: int, bad: str, rule: str, backend: str) -> None:
    """Top-down rules read the walked path, traversal all rows that exist."""
    target = sure_target()
    target[0, node] = NAN if bad == "nan" else -INF
    if bad == "one nan":
        target[0, node] = torch.tensor([0.0, NAN, -INF, 0.0])
    out = run(target, rule=rule, backend=backend)
    read = node in (0, 2, 4) or rule not in TOP_DOWN
    assert outcome(out) == (UNDECIDED if read else ([2, 1, 3], [0, 2, 4]))
    assert out.num_accepted[0] == (0 if read else 2)
    if node > 2:  # a node that does not exist is never read
        out = run(target, rule=rule, num_drafts=2, backend=backend)
        assert outcome(out) == ([2, 1], [0, 2])


@pytest.mark.parametrize("rule", SAMPLED)
@pytest.mark.parametrize("node", range(5))
def test_bad_draft_rows(node: int, rule: str, backend: str) -> None:
    """A draft row is read where children are tested, by traversal wherever there are any."""
    q = torch.zeros(1, 5, 4)
    q[0, node] = NAN
    out = run(draft_logits=q, rule=rule, backend=backend)
    read = node in ((0, 2) if rule in TOP_DOWN else (0, 1, 2))
    assert outcome(out) == (UNDECIDED if read else ([2, 1, 3], [0, 2, 4]))
    greedy = run(draft_logits=q, rule=rule, temperature=0.0, backend=backend)
    assert outcome(greedy) == ([2, 1, 3], [0, 2, 4])


def test_target_only_reads_no_draft_law(backend: str) -> None:
    q = torch.full((1, 5, 4), NAN)
    assert outcome(run(draft_logits=q, rule="target_only", backend=backend))[0] == [2, 1, 3]


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_request_hurts_no_other(rule: str, backend: str) -> None:
    target = torch.cat([sure_target(), torch.full((1, 5, 4), NAN), sure_target()])
    out = run(
        target,
        tokens=TOKENS.expand(3, 5),
        draft_logits=torch.zeros(3, 5, 4) if rule != "target_only" else None,
        rule=rule,
        return_logprobs=True,
        backend=backend,
    )
    assert [outcome(out, b)[1] for b in range(3)] == [[0, 2, 4], [-1], [0, 2, 4]]
    assert out.logprobs is not None
    assert out.logprobs.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "what", ["id", "id beyond", "parent", "root again", "self", "cycle", "num_drafts", "depth"]
)
def test_nodes_that_do_not_exist(what: str, rule: str, backend: str) -> None:
    """They go with all below them, and p itself is sampled in their place."""
    tokens, parents, kwargs = TOKENS.clone(), PARENTS.clone(), {}
    cut = 2 if what in ("id", "parent", "self") else 4
    if what.startswith("id"):
        tokens[0, cut] = -1 if what == "id" else 4
    elif what == "parent":
        parents[0, cut] = -2
    elif what == "root again":
        parents[0, cut] = -1
    elif what == "self":
        parents[0, cut] = cut
    elif what == "cycle":
        parents[0, 3], parents[0, 4] = 4, 3
    elif what == "num_drafts":
        kwargs["num_drafts"] = 3
    else:
        kwargs["max_depth"] = 1
    target = sure_target()  # their rows are not read
    target[0, [2, 4] if cut == 2 else 4] = NAN
    target[0, 3] = NAN if what in ("cycle", "depth") else target[0, 3]
    out = run(target, tokens=tokens, parents=parents, rule=rule, backend=backend, **kwargs)
    assert outcome(out) == (([2], [0]) if cut == 2 else ([2, 1], [0, 2]))
    assert out.tokens.shape == (1, 2 if what == "depth" else 5)


@pytest.mark.parametrize("rule", RULES)
def test_missing_and_wrong_rows(rule: str, backend: str) -> None:
    """-1 ends the walk and leaves the entry open; a row outside the rows leaves it undecided."""
    rows = sure_target()[0]
    for index, want in (
        ([0, 1, 2, 3, 4], ([2, 1, 3], [0, 2, 4])),
        ([0, 1, 2, 3, -1], ([2, 1, -1], [0, 2, 4])),
        ([0, 1, -1, 3, 4], ([2, -1], [0, 2])),
        ([-1, 1, 2, 3, 4], ([-1], [0])),
        ([0, 1, 2, 3, 5], UNDECIDED),
        ([0, 1, -2, 3, 4], UNDECIDED),
    ):
        out = run(rows, row_index=torch.tensor([index]), rule=rule, backend=backend)
        assert outcome(out) == want
        if rule == "target_only":
            continue
        flat = dict(rule=rule, draft_logits=torch.zeros(5, 4), backend=backend)
        out = run(draft_row_index=torch.tensor([[0, -1, 4, -1, -1]]), **flat)
        assert outcome(out) == ([2, 1, 3], [0, 2, 4])
        out = run(draft_row_index=torch.tensor([[0, 1, -1, 3, 4]]), **flat)
        assert outcome(out) == ([2, 1], [0, 2])  # no draft row: its children do not exist
        greedy = dict(draft_row_index=torch.full((1, 5), -1), temperature=0.0)
        assert outcome(run(**greedy, **flat)) == ([2, 1, 3], [0, 2, 4])  # which reads none
        out = run(draft_row_index=torch.tensor([[9, 1, 2, 3, 4]]), **flat)
        assert outcome(out) == UNDECIDED


@pytest.mark.parametrize("rule", SAMPLED)
def test_a_zero_residual_falls_back_to_p(rule: str, backend: str) -> None:
    """Drafts of zero draft probability are rejected; where p equals q nothing else is left."""
    law = torch.full((1, 5, 4), -INF)
    law[0, :, 3] = 0.0
    out = run(law, draft_logits=law, rule=rule, backend=backend)
    assert outcome(out) == ([3], [0])
    chain, tokens = torch.tensor([[-1, 0, 1]]), torch.tensor([[0, 3, 1]])  # 3 is sure, 1 impossible
    chained = dict(tokens=tokens, parents=chain, rule=rule, backend=backend)
    out = run(law[:, :3], draft_logits=law[:, :3], **chained)
    assert outcome(out) == ([3, 3], [0, 1])
    out = run(law[:, :3], draft_logits=law[:, :3], num_drafts=1, **chained)  # node 1 is a leaf
    assert outcome(out) == ([3, 3], [0, 1])


@pytest.mark.parametrize("rule", ["without_replacement", "traversal_without_replacement"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_draft_ids_beyond_the_vocabulary(order: list[int], rule: str, backend: str) -> None:
    """What a reduced vocabulary has beyond the target's is no part of q' once a child is rejected:
    q'(1) = 1 then, against p'(1) = 0.05 / 0.85."""
    target = torch.tensor([[[0.05, 0.15, 0.8]]]).log().repeat(1, 3, 1)
    draft = torch.tensor([0.1, 0.1, 0.8]).log()[order].repeat(1, 3, 1)
    out = pydecode.rejection_sample_tree(
        target,
        torch.tensor([[0, 0, 1]]),
        torch.tensor([[-1, 0, 0]]),
        draft_logits=draft,
        draft_vocab=torch.tensor([0, 1, 3])[order],
        uniforms=torch.tensor([[0.3, 0.6, 0.3, 0.5]]),
        rule=rule,
        backend=backend,
    )
    assert outcome(out) == ([2], [0])
