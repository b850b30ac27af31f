"""``verify_greedy`` at the edges: bad rows and numbers, empty sizes, and what it raises."""

from typing import Any

import pytest
import torch
from test_verify_greedy import INF, RULES, check

import pydecode

NAN = float("nan")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [NAN, -INF, "beyond", "absent"])
def test_bad_rows(rule: str, kind: float | str, backend: str) -> None:
    """Row by row: one that is read leaves the request undecided, another one changes nothing."""
    tree = torch.tensor([[-1, 0, 0, 1, 3, 2]])
    logits = (0.1 * torch.arange(8) - 20).repeat(1, 6, 1)
    best = [4, 6, 2, 1, 7, 3]
    logits[0, torch.arange(6), torch.tensor(best)] = 0.0
    tokens = torch.tensor([[0, 4, 0, 6, 3, 2]])  # 1 and 3 are accepted; 2 and 4 are not, nor 5
    kwargs: dict[str, Any] = dict(parents=tree, rule=rule, backend=backend, **RULES[rule])
    for i in range(6):
        if isinstance(kind, str):
            index = torch.arange(6)[None].clone()
            index[0, i] = 6 if kind == "beyond" else -1
            out = pydecode.verify_greedy(tokens, logits[0], row_index=index, **kwargs)
        else:
            broken = logits.clone()
            broken[0, i] = kind
            out = pydecode.verify_greedy(tokens, broken, **kwargs)
        if i in (2, 4, 5):
            want = [([4, 6, 1], [0, 1, 3])]
        elif kind == "absent":  # what follows cannot be tested; the last token is the caller's
            want = [{0: ([-1], [0]), 1: ([4, -1], [0, 1]), 3: ([4, 6, -1], [0, 1, 3])}[i]]
        else:
            want = [([], [])]
        check(out, want, 6)
    ids = torch.tensor([best])
    if rule in ("exact", "distance") and kind == "beyond":
        ids[0, 3] = -2
        check(pydecode.verify_greedy(tokens, ids, **kwargs), [([], [])], 6)


def test_the_row_of_an_accepted_leaf_is_read_only_if_it_is_the_last(backend: str) -> None:
    logits = torch.zeros(1, 5, 3)
    logits[..., 1] = 1.0
    tokens, parents = torch.ones(1, 5).long(), torch.tensor([[-1, 0, 0, 1, 2]])
    want = [([1, 1, 1], [0, 1, 3])]  # 4 is as deep
    for i, max_depth, result in ((4, 2, want), (3, 2, [([], [])]), (2, 1, [([1, 1], [0, 1])])):
        broken = logits.clone()
        broken[0, i] = NAN
        kwargs: dict[str, Any] = dict(parents=parents, max_depth=max_depth, backend=backend)
        check(pydecode.verify_greedy(tokens, broken, **kwargs), result, max_depth + 1)


def test_the_typical_threshold(backend: str) -> None:
    """min(epsilon, delta exp(-H)) with H = -sum p log(p + 1e-5): just above and just below."""
    flat, peaked = torch.zeros(1, 2, 64), torch.tensor([0.7, 0.3]).log().expand(1, 2, 2)
    for logits, epsilon, delta, t, accepted in (
        (flat, 1.0, 0.998, 1.0, 1),  # p = 1/64, exp(-H) = 1/64 + 1e-5
        (flat, 1.0, 1.0, 1.0, 0),
        (peaked, 0.29, 0.9, 1.0, 1),  # exp(-H) = 0.54
        (peaked, 0.31, 0.9, 1.0, 0),
        (peaked, 0.31, 0.54, 1.0, 1),
        (peaked, 0.31, 0.54, 0.5, 0),
    ):
        numbers = dict(posterior_threshold=epsilon, posterior_alpha=delta, temperature=t)
        out = pydecode.verify_greedy(
            torch.tensor([[1]]), logits, rule="typical", backend=backend, **numbers
        )
        assert out.num_accepted.tolist() == [accepted]
    # temperature 0 is exact, whatever the thresholds
    numbers = dict(posterior_threshold=2.0, posterior_alpha=2.0, temperature=0)
    out = pydecode.verify_greedy(torch.tensor([[0]]), peaked, rule="typical", **numbers)
    assert out.num_accepted.tolist() == [1]


def test_k_is_clipped(backend: str) -> None:
    logits, k = torch.tensor([3.0, 2.0, 1.0]).repeat(5, 2, 1), torch.tensor([-3, 0, 1, 2, 9])
    for x, want in ((0, [1, 1, 1, 1, 1]), (1, [0, 0, 0, 1, 1]), (2, [0, 0, 0, 0, 1])):
        tokens = torch.full((5, 1), x)
        out = pydecode.verify_greedy(tokens, logits, rule="top_k", top_k=k, backend=backend)
        assert out.num_accepted.tolist() == want


def test_a_negative_draft_is_absent_beside_target_ids(backend: str) -> None:
    near = dict(rule="distance", distance=1, backend=backend)  # of target 0
    out = pydecode.verify_greedy(torch.tensor([[-1]]), torch.tensor([[0, 3]]), **near)
    assert out.tokens.tolist() == [[0, -1]]


def test_a_nan_temperature_matters_to_typical_only(backend: str) -> None:
    logits, tokens = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]]), torch.tensor([[1]])
    t = torch.tensor([NAN])
    for rule in RULES:
        out = pydecode.verify_greedy(tokens, logits, rule=rule, temperature=t, backend=backend)
        assert out.tokens.tolist() == [[-1, -1] if rule == "typical" else [1, 0]]


@pytest.mark.parametrize("G", [0, 3])
@pytest.mark.parametrize("B", [0, 2])
def test_empty(B: int, G: int, backend: str) -> None:
    tokens = torch.zeros(B, G, dtype=torch.int64)
    for target in (torch.zeros(B, G + 1, 1), torch.zeros(B, G + 1, dtype=torch.int32)):
        out = pydecode.verify_greedy(tokens, target, backend=backend)
        check(out, [([0] * (G + 1), list(range(G + 1)))] * B, G + 1)
        assert out.tokens.shape == out.path.shape == (B, G + 1)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ids": (dict(target=torch.ones(2, 4).int(), rule="top_k"), ValueError, "exact or distance"),
    "ids_shape": (dict(target=torch.ones(2, 3).int()), ValueError, r"\[B, T\] ids"),
    "ids_allowed": (
        dict(target=torch.ones(2, 4).int(), allowed=torch.ones(2, 4, 1).int()),
        ValueError,
        "allowed: expected None with target ids",
    ),
    "target": (dict(target=torch.rand(2, 4, 5) > 0.5), TypeError, "target: expected dtype"),
    "packed": (dict(row_index=torch.ones(2, 4).int()), ValueError, r"target: .*\[rows, V\]"),
    "parents": (dict(parents=torch.ones(3, 4).int()), ValueError, r"parents: .*\[B\|1, T\]"),
    "depth": (dict(max_depth=-1), ValueError, "max_depth: expected at least 0"),
    "chain_depth": (dict(max_depth=2, parents=None), ValueError, "expected None without parents"),
    "rule": (dict(rule="token"), ValueError, "rule: expected one of exact, top_k"),
    "distance": (dict(distance=1.5), TypeError, "distance: expected an integer"),
    "top_k": (dict(top_k=0), ValueError, "top_k: expected at least 1"),
    "alpha": (dict(posterior_alpha=-1.0), ValueError, "posterior_alpha: expected at least 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, error, message = ERRORS[case]
    call = dict(draft_tokens=torch.ones(2, 4).long(), target=torch.rand(2, 4, 5))
    call["parents"] = torch.tensor([[-1, 0, 1, 1]])
    with pytest.raises(error, match=message):
        pydecode.verify_greedy(**{**call, **change})


@pytest.mark.parametrize("name", ["draft_tokens", "row_index", "parents", "num_drafts"])
def test_checks_name_the_index(name: str) -> None:
    call: dict[str, Any] = dict(
        draft_tokens=torch.tensor([[0, 1, 2, 3]]), parents=torch.tensor([[-1, 0, 1, 2]])
    )
    call["row_index"] = torch.tensor([[0, 1, -1, 3]])
    call["num_drafts"] = torch.tensor([3])
    with pydecode.checks(True):
        pydecode.verify_greedy(target=torch.rand(4, 5), **call)
        pydecode.verify_greedy(target=torch.rand(1, 4, 5), draft_tokens=torch.ones(1, 3).int())
    call[name].view(-1)[-1] = 5
    pydecode.verify_greedy(target=torch.rand(4, 5), **call)
    with pydecode.checks(True), pytest.raises(ValueError, match=f"^{name}: expected"):
        pydecode.verify_greedy(target=torch.rand(4, 5), **call)
