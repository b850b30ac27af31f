"""``rejection_sample`` at the edges: bad rows, ids and draws, empty sizes, and what it raises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from laws_oracle import decide
from test_rejection_sample import F64, INF, NAN, RULES, emitted, inputs, same
from torch import Tensor

import pydecode

P4 = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)


def run(p: Tensor, x: list[list[int]], q: Tensor | None, **kwargs: Any) -> list[list[int]]:
    """Of probabilities."""
    return emitted(
        pydecode.rejection_sample(None, torch.tensor(x), target_probs=p, draft_probs=q, **kwargs)
    )


def bad(kind: str, row: Tensor) -> None:
    row[...] = {"nan": NAN, "one_nan": 0.0, "nothing": -INF}[kind]
    if kind == "one_nan":
        row[..., -1] = NAN


@pytest.mark.parametrize("which", ["target", "draft"])
@pytest.mark.parametrize("kind", ["nan", "one_nan", "nothing"])
def test_bad_rows(kind: str, which: str, backend: str) -> None:
    """Rows up to the first rejection count (block: all valid ones), later ones do not."""
    B, G, V = 60, 4, 11
    target, x, draft = inputs(B, G, V)
    n = torch.randint(0, G + 1, (B,))
    for rule in RULES:
        kwargs: dict[str, Any] = dict(num_drafts=n, rule=rule, seed=3, backend=backend)
        good = pydecode.rejection_sample(target, x, draft, **kwargs)
        rejected = good.num_accepted < n
        last = good.num_accepted if rule == "token" else n
        for i in range(G + (which == "target")):
            rows = [target.clone(), draft.clone()]
            bad(kind, rows[which == "draft"][:, i])
            got = pydecode.rejection_sample(rows[0], x, rows[1], **kwargs)
            read = (i <= last) if which == "target" else (i <= last) & (i < n)
            for b, tokens in enumerate(emitted(got)):
                want = [] if read[b] else good.tokens[b][: good.num_accepted[b] + 1].tolist()
                assert tokens == want, (b, i)
        assert rejected.any()
        assert not rejected.all()


def test_bad_probabilities(backend: str) -> None:
    for row in ([0.0] * 4, [0.5, -0.1, 0.3, 0.3], [INF, 0, 0, 1], [NAN, 1, 1, 1]):
        p = torch.stack([P4, torch.tensor(row, dtype=F64)])[None]
        for rule in RULES:
            kwargs: dict[str, Any] = dict(rule=rule, backend=backend)
            assert run(p, [[3]], P4[None, None], **kwargs) == [[]]
            rejecting = p[:, [1, 0]], [[3]], P4[None, None]
            assert run(*rejecting, **kwargs) == [[]]
            assert run(p[:, [0, 0]], [[3]], p[:, 1:], **kwargs) == [[]]


@pytest.mark.parametrize("inf", [1, 2])
def test_infinite_logits_share_the_mass(inf: int, backend: str) -> None:
    target = torch.zeros(64, 1, 5)
    target[..., 5 - inf :] = INF
    out = pydecode.rejection_sample(target, torch.empty(64, 0, dtype=torch.int64), backend=backend)
    assert set(out.tokens[:, 0].tolist()) == set(range(5 - inf, 5))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("outside", [-1, 7, 2**31 + 3, -(2**40)])
def test_an_id_outside_the_vocabulary_ends_the_chain(rule: str, outside: int, backend: str) -> None:
    B, G, V = 80, 3, 7
    target, x, draft = inputs(B, G, V)
    end, u = torch.randint(0, G + 1, (B,)), torch.rand(B, G + 1, dtype=F64)
    broken = torch.where(torch.arange(G) == end[:, None], outside, x)
    kwargs: dict[str, Any] = dict(uniforms=u, rule=rule, backend=backend)
    want = pydecode.rejection_sample(target, x, draft, num_drafts=end, **kwargs)
    assert same(pydecode.rejection_sample(target, broken, draft, **kwargs), want)
    assert (want.num_accepted == end).any()
    want = pydecode.rejection_sample(target, x, num_drafts=end, **kwargs)
    assert same(pydecode.rejection_sample(target, broken, **kwargs), want)


@pytest.mark.parametrize("rule", RULES)
def test_row_indices(rule: str, backend: str) -> None:
    B, G, V = 40, 3, 9
    target, x, draft = inputs(B, G, V)
    u, index = torch.rand(B, G + 1, dtype=F64), torch.arange(B * (G + 1)).reshape(B, G + 1)
    draft_index, end = torch.arange(B * G).reshape(B, G), torch.randint(0, G + 1, (B,))
    kwargs: dict[str, Any] = dict(uniforms=u, rule=rule, backend=backend)
    rows, draft_rows = target.flatten(0, 1), draft.flatten(0, 1)
    want = emitted(pydecode.rejection_sample(target, x, draft, num_drafts=end, **kwargs))
    # no draft row: the chain ends before it
    no_draft = torch.where(torch.arange(G) == end[:, None], -1, draft_index)
    got = pydecode.rejection_sample(target, x, draft_rows, draft_row_index=no_draft, **kwargs)
    assert emitted(got) == want
    # no target row: likewise, and the last token is the caller's
    no_row = torch.where(torch.arange(G + 1) == end[:, None], -1, index)
    got = pydecode.rejection_sample(rows, x, draft, row_index=no_row, **kwargs)
    ends = [len(tokens) == n + 1 for tokens, n in zip(want, end.tolist())]
    assert emitted(got) == [[*t[:-1], -1] if e else t for t, e in zip(want, ends)]
    assert 0 < sum(ends) < B
    # a row that is not there, where it is read
    last = end if rule == "block" else torch.tensor([len(tokens) - 1 for tokens in want])
    for outside in (B * (G + 1), 2**31 - 1, -2):
        beyond = torch.where(torch.arange(G + 1) == end[:, None], outside, index)
        got = pydecode.rejection_sample(rows, x, draft, row_index=beyond, num_drafts=end, **kwargs)
        undecided = (end <= last).tolist()
        assert emitted(got) == [[] if bad else t for t, bad in zip(want, undecided)]


@pytest.mark.parametrize("rule", RULES)
def test_draws_at_the_edges(rule: str, backend: str) -> None:
    kwargs: dict[str, Any] = dict(rule=rule, backend=backend)
    top = 1 - 2.0**-24
    none = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=F64)
    uniforms = lambda *u: torch.tensor([u], dtype=F64)  # noqa: E731
    # u = 0 accepts nothing that p does not cover; the draw's first and last token have mass
    for u, last in ((0.0, 1), (top, 2), (1.0, 2), (NAN, 2), (-1.0, 2), (INF, 2)):
        p = torch.stack([none, P4])[None]
        assert run(p, [[0]], P4[None, None], uniforms=uniforms(0.0, u), **kwargs) == [[last]]
    # q(x) = 0 is rejected, whatever p says
    p = torch.stack([P4, P4])[None]
    assert run(p, [[3]], none[None, None], uniforms=uniforms(0.0, top), **kwargs) == [[3]]
    # p = q: the largest u of fp32 accepts; a draw of 1 rejects, and a zero residual leaves p
    assert run(p, [[2]], P4[None, None], uniforms=uniforms(top, 0.25), **kwargs) == [[2, 1]]
    for u in (1.0, NAN):
        assert run(p, [[2]], P4[None, None], uniforms=uniforms(u, 0.05), **kwargs) == [[0]]


@pytest.mark.parametrize("rule", RULES)
def test_greedy_requests_in_the_batch(rule: str, backend: str) -> None:
    """They draw nothing, and do not read q; the others are as they would be without them."""
    B, G, V = 48, 3, 5
    target, x, draft = (torch.randint(0, 3, (B, G + 1, V)).double(), None, torch.randn(B, G, V))
    best = target.argmax(-1)  # torch takes the first of equals as well
    x = torch.where(torch.rand(B, G) < 0.7, best[:, :G], torch.randint(0, V, (B, G)))
    greedy = torch.rand(B) < 0.5
    draft[greedy] = NAN
    t = torch.where(greedy, 0.0, 1.0).double()
    for u in (torch.rand(B, G + 1), torch.full((B, G + 1), NAN)):
        kwargs: dict[str, Any] = dict(rule=rule, uniforms=u, backend=backend)
        for q in (draft, None):
            out = emitted(pydecode.rejection_sample(target, x, q, temperature=t, **kwargs))
            plain = emitted(pydecode.rejection_sample(target, x, q, temperature=1.0, **kwargs))
            for b in range(B):
                if greedy[b]:
                    run_ = (x[b] == best[b, :G]).long().cumprod(0).sum()
                    assert out[b] == [*x[b, :run_].tolist(), int(best[b, run_])]
                else:
                    assert out[b] == plain[b]


@pytest.mark.parametrize("rule", RULES)
def test_bad_numbers_on_the_device(rule: str, backend: str) -> None:
    """num_drafts is clipped; a temperature below 0 or NaN leaves its own request undecided."""
    target, x, draft = inputs(4, 2, 6)
    kwargs: dict[str, Any] = dict(rule=rule, seed=1, backend=backend)
    n = torch.tensor([-5, 0, 2, 99])
    want = pydecode.rejection_sample(target, x, draft, num_drafts=n.clamp(0, 2), **kwargs)
    assert same(pydecode.rejection_sample(target, x, draft, num_drafts=n, **kwargs), want)
    t = torch.tensor([1.0, NAN, -1.0, 1.0])
    out = emitted(pydecode.rejection_sample(target, x, draft, temperature=t, **kwargs))
    one = emitted(pydecode.rejection_sample(target, x, draft, temperature=1.0, **kwargs))
    assert out == [one[0], [], [], one[3]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("B", "G", "V"), [(0, 3, 5), (3, 0, 5), (0, 0, 1), (4, 3, 1), (5, 2, 2), (3, 2, 127)]
)
def test_small_sizes(rule: str, B: int, G: int, V: int, backend: str) -> None:
    target, x, draft = inputs(B, G, V)
    u = torch.rand(B, G + 1, dtype=F64)
    for q in (draft, None):
        out = pydecode.rejection_sample(
            target, x, q, rule=rule, uniforms=u, return_logprobs=True, backend=backend
        )
        assert out.tokens.shape == out.path.shape == out.logprobs.shape == (B, G + 1)
        for b, tokens in enumerate(emitted(out)):
            law = None if q is None else draft[b].softmax(-1).numpy()
            p = target[b].softmax(-1).numpy()
            assert tokens == decide(p, x[b].tolist(), law, np.asarray(u[b]), rule)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "both": (dict(target_probs=torch.rand(2, 4, 9)), ValueError, "exactly one of them, got both"),
    "neither": (dict(target_logits=None), ValueError, "exactly one of them, got neither"),
    "both_draft": (dict(draft_probs=torch.rand(2, 3, 9)), ValueError, "at most one of them"),
    "tokens": (dict(draft_tokens=torch.zeros(2, 3)), TypeError, "draft_tokens: expected dtype"),
    "rows": (dict(target_logits=torch.rand(2, 3, 9)), ValueError, r"\[B, G\+1, V\] = \[2, 4, 9\]"),
    "vocab": (dict(draft_logits=torch.rand(2, 3, 8)), ValueError, "V = 9 .*got 8"),
    "no_vocab": (dict(target_logits=torch.rand(2, 4, 0)), ValueError, "at least one entry"),
    "packed": (dict(row_index=torch.zeros(2, 4).int()), ValueError, r"\[rows, V\]"),
    "index": (dict(row_index=torch.zeros(2, 3).int()), ValueError, r"row_index.*\[2, 4\]"),
    "stride": (dict(target_logits=torch.rand(2, 9, 4).mT), ValueError, "last dimension"),
    "half": (dict(draft_logits=torch.zeros(2, 3, 9).int()), TypeError, "draft_logits: .*dtype"),
    "allowed": (dict(allowed=torch.zeros(2, 4, 2).int()), ValueError, r"allowed: .*\[2, 4, 1\]"),
    "rule": (dict(rule="blocks"), ValueError, "rule: expected one of token, block"),
    "temperature": (dict(temperature=-0.1), ValueError, "temperature: expected at least 0"),
    "top_k": (dict(top_k=1.5), TypeError, "top_k: expected an integer"),
    "seed": (dict(seed=torch.zeros(3).int()), ValueError, r"seed: expected 0-d or \[B\]"),
    "positions": (dict(positions=torch.zeros(2)), TypeError, "positions: expected dtype"),
    "uniforms": (dict(uniforms=torch.rand(2, 3)), ValueError, r"uniforms.*\[B, G\+1\]"),
    "num_drafts": (dict(num_drafts=-1), ValueError, "num_drafts: expected at least 0"),
    "orphan": (dict(draft_logits=None, draft_vocab=torch.ones(9)), ValueError, "draft_vocab"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, error, message = ERRORS[case]
    call = dict(target_logits=torch.rand(2, 4, 9), draft_tokens=torch.zeros(2, 3).long())
    call["draft_logits"] = torch.rand(2, 3, 9)
    with pytest.raises(error, match=message):
        pydecode.rejection_sample(**{**call, **change})


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "draft_tokens": lambda: dict(draft_tokens=torch.tensor([[0, 1, 9]])),
    "row_index": lambda: dict(row_index=torch.tensor([[0, 1, 2, 4]])),
    "draft_row_index": lambda: dict(draft_row_index=torch.tensor([[0, -2, 2]])),
    "draft_vocab": lambda: dict(draft_vocab=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9])),
    "num_drafts": lambda: dict(num_drafts=torch.tensor([4])),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_name_the_index(name: str) -> None:
    call = dict(draft_tokens=torch.tensor([[0, 1, 2]])) | CHECKS[name]()
    target, draft = torch.rand(4, 9), torch.rand(3, 9)
    call["target_logits"] = target if "row_index" in call else target[None]
    call["draft_logits"] = draft if "draft_row_index" in call else draft[None]
    pydecode.rejection_sample(**call)
    with pydecode.checks(True), pytest.raises(ValueError, match=f"^{name}: expected .* at index"):
        pydecode.rejection_sample(**call)
    with pydecode.checks(True):  # what num_drafts leaves out is nobody's
        pydecode.rejection_sample(target[None], torch.tensor([[0, 1, -7]]), num_drafts=2)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_num_passed_counts_each_draft_on_its_own(rule: str, backend: str) -> None:
    B, G, V = 200, 5, 4
    p, q = torch.rand(B, G + 1, V).double(), torch.rand(B, G, V).double()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    p[:20, 3, 1] = torch.nan
    tokens = torch.randint(-1, V, (B, G)).clamp(min=-1)
    tokens[50:] = tokens[50:].clamp(min=0)
    counts, u = torch.randint(0, G + 1, (B,)), torch.rand(B, G + 1).double()
    given: dict[str, Any] = dict(draft_probs=q, target_probs=p, num_drafts=counts, uniforms=u)
    plain = pydecode.rejection_sample(None, tokens, rule=rule, backend=backend, **given)
    verified, passed = pydecode.rejection_sample(
        None, tokens, rule=rule, return_num_passed=True, backend=backend, **given
    )
    for x, y in zip(verified[:3], plain[:3]):
        assert torch.equal(x, y)
    later = 0
    for b in range(B):
        want, undecided = 0, bool(verified.path[b, 0] < 0)
        for i, x in enumerate(tokens[b, : counts[b]].tolist()):
            if x < 0 or undecided:
                break
            good = bool((p[b, i] >= 0).all())
            want += good and bool(u[b, i] * q[b, i, x] < p[b, i, x])
        assert passed[b] == want, b
        later += want > int(verified.num_accepted[b])
    assert later > 10  # negative control: it is not the accepted prefix
