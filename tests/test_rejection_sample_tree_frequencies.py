"""rejection_sample_tree with its own Philox draws: several steps in a row, and larger vocabularies.

Chi-square tests at alpha = 1e-4 with fixed seeds.
"""

import pytest
import torch
from scipy import stats
from torch import Tensor

import pydecode

ALPHA = 1e-4


def p_value(observed: Tensor, law: Tensor) -> float:
    """Chi-square of counts against a law; cells of expectation under 10 are merged."""
    expected = law.double() / law.double().sum() * observed.sum()
    order = expected.argsort(descending=True)
    observed, expected = observed.double()[order], expected[order]
    small = expected < 10
    if small.any():
        observed = torch.cat([observed[~small], observed[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)


def draw(q: Tensor, k: int, replacement: bool, generator: torch.Generator) -> Tensor:
    return torch.multinomial(q, k, replacement, generator=generator)


# ---- several steps: the joint law of a text ------------------------------------------------------

P = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.45, 0.5, 0.05]]).double()  # by last token
Q = torch.tensor([[0.3, 0.3, 0.4], [0.4, 0.3, 0.3], [0.1, 0.6, 0.3]]).double()
PARENTS = torch.tensor([[-1, 0, 0, 1, 2]])
LENGTH = 4


def texts(rule: str, requests: int, backend: str, advance: bool) -> Tensor:
    """The first LENGTH tokens of texts that begin after token 0, step by step."""
    g = torch.Generator().manual_seed(20)
    b = torch.arange(requests)
    text = torch.zeros(requests, 4 * LENGTH, dtype=torch.long)
    length = torch.zeros(requests, dtype=torch.long)
    last = torch.zeros(requests, dtype=torch.long)
    for _ in range(LENGTH):  # each step emits at least one token
        first = draw(Q[last], 2, "without" not in rule, g)
        second = [draw(Q[first[:, j]], 1, True, g) for j in range(2)]
        tokens = torch.cat([last[:, None], first, *second], 1)
        out = pydecode.rejection_sample_tree(
            P.log(),
            tokens,
            PARENTS,
            Q if rule != "target_only" else None,
            row_index=tokens,  # the law after a node is that of its token
            draft_row_index=tokens if rule != "target_only" else None,
            max_depth=2,
            rule=rule,
            seed=b + 1000,
            positions=length + 1 if advance else 1,
            backend=backend,
        )
        for j in range(3):
            emitted = j <= out.num_accepted
            at = length + j
            text[b, at] = torch.where(emitted, out.tokens[:, j], text[b, at])
        last = out.tokens[b, out.num_accepted.long()]
        length = length + out.num_accepted + 1
    return text[:, :LENGTH]


def joint_p_value(text: Tensor) -> float:
    law = torch.ones(1, dtype=torch.double)
    last = torch.zeros(1, dtype=torch.long)
    for _ in range(LENGTH):
        law = (law[:, None] * P[last]).flatten()
        last = torch.arange(3).repeat(len(last))
    cell = (text * 3 ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    return p_value(torch.bincount(cell, minlength=3**LENGTH), law)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_several_steps(rule: str, backend: str) -> None:
    assert joint_p_value(texts(rule, 100_000, backend, advance=True)) > ALPHA


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_control_positions_that_do_not_advance(rule: str, backend: str) -> None:
    """Every step then meets the first step's coins again."""
    assert joint_p_value(texts(rule, 30_000, backend, advance=False)) < ALPHA


# ---- a larger vocabulary ------------------------------------------------------------------------


SAMPLED = ["recursive", "without_replacement", "k_seq", "traversal"]
SAMPLED += ["traversal_without_replacement"]


@pytest.mark.parametrize(
    ("rule", "drafts"),
    [
        *((rule, "sampled") for rule in SAMPLED),
        # one walk serves all rules without a draft law: test_deterministic_trees_keep_the_law
        *[("recursive", "deterministic"), ("target_only", "deterministic")],
    ],
)
def test_larger_vocabulary(rule: str, drafts: str, backend: str) -> None:
    """First and second tokens of 4000 trees of 3 + 1 nodes, V = 500, logits in fp32."""
    g = torch.Generator().manual_seed(7)
    B, V, T = 4000, 500, 5
    parents = torch.tensor([[-1, 0, 0, 0, 1]])
    logits = 2 * torch.randn(2, V, generator=g)  # rows: the root's law, and every other node's
    q = (0.7 * logits + torch.randn(2, V, generator=g)).softmax(-1)
    row = torch.tensor([0, 1, 1, 1, 1]).expand(B, T)
    if drafts == "sampled":
        replacement = "without" not in rule
        first = draw(q[0].expand(B, V), 3, replacement, g)
        second = draw(q[1].expand(B, V), 1, True, g)
    else:
        first = logits[0].topk(3).indices.expand(B, 3)
        second = logits[1].topk(1).indices.expand(B, 1)
    tokens = torch.cat([torch.zeros(B, 1, dtype=torch.long), first, second], 1)
    with_q = drafts == "sampled"
    out = pydecode.rejection_sample_tree(
        logits,
        tokens,
        parents,
        draft_logits=q.log() if with_q else None,
        row_index=row,
        draft_row_index=row if with_q else None,
        rule=rule,
        seed=11,  # a scalar seed: requests do not share draws
        backend=backend,
    )
    law = logits.softmax(-1)
    assert p_value(torch.bincount(out.tokens[:, 0], minlength=V), law[0]) > ALPHA
    more = out.num_accepted > 0
    assert more.sum() > B // 10
    assert p_value(torch.bincount(out.tokens[more, 1], minlength=V), law[1]) > ALPHA
