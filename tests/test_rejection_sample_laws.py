"""The law of what ``rejection_sample`` emits: enumerated, over steps in a row, and by frequency."""

import numpy as np
import pytest
import torch
from laws_oracle import (
    Law,
    Prefix,
    Verifier,
    all_chains,
    chi_square,
    decide_all,
    distance,
    emitted_law,
    expected_accepted,
    joint,
    random_law,
)

import pydecode

RULES = ["token", "block"]
EXACT = 1e-12


def op(rule: str, backend: str, deterministic: bool = False, **kwargs: object) -> Verifier:
    def verifier(p: np.ndarray, x: np.ndarray, q: np.ndarray, u: np.ndarray) -> np.ndarray:
        out = pydecode.rejection_sample(
            None,
            torch.from_numpy(x),
            target_probs=torch.from_numpy(p),
            draft_probs=None if deterministic else torch.from_numpy(np.ascontiguousarray(q)),
            uniforms=torch.from_numpy(u),
            rule=rule,
            backend=backend,
            **kwargs,
        )
        assert torch.equal(out.num_accepted, (out.tokens >= 0).sum(-1).int() - 1)
        return out.tokens.numpy()

    return verifier


# Fixed laws: a breakpoint of near equal p and q would be ill-conditioned, and the check is exact.
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("vocab", "depth", "zeros"),
    [(1, 2, False), (2, 1, False), (2, 3, False), (3, 3, True), (4, 2, True), (6, 2, False)],
)
def test_exact_law(rule: str, vocab: int, depth: int, zeros: bool, backend: str) -> None:
    for seed in range(0, 6, 2):
        P, Q = random_law(seed, vocab, zeros=zeros), random_law(seed + 1, vocab, zeros=zeros)
        chains = all_chains(Q, vocab, depth)
        law, accepted = emitted_law(P, Q, chains, vocab, rule, op(rule, backend))
        assert distance(law, joint(P, vocab, depth + 1)) < EXACT
        assert abs(accepted - expected_accepted(P, Q, vocab, depth, rule)) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["equal", "disjoint", "one_hot_draft", "one_hot_target"])
def test_exact_law_of_degenerate_laws(rule: str, case: str, backend: str) -> None:
    free = random_law(5, 4)
    half = {0: np.array([0.3, 0.7, 0, 0]), 1: np.array([0, 0, 0.2, 0.8])}
    P: Law = {"disjoint": lambda s: half[0], "one_hot_target": lambda s: np.eye(4)[len(s)]}.get(
        case, free
    )
    Q: Law = {"disjoint": lambda s: half[1], "one_hot_draft": lambda s: np.eye(4)[2]}.get(
        case, free
    )
    law, accepted = emitted_law(P, Q, all_chains(Q, 4, 2), 4, rule, op(rule, backend))
    assert distance(law, joint(P, 4, 3)) < EXACT
    assert abs(accepted - expected_accepted(P, Q, 4, 2, rule)) < EXACT


def test_the_papers_example(backend: str) -> None:
    """Sun et al., section 3: p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 10/9 against 11/9."""
    P, Q = (lambda s: np.array([1, 2]) / 3), (lambda s: np.array([2, 1]) / 3)
    for rule, want in (("token", 10 / 9), ("block", 11 / 9)):
        _, accepted = emitted_law(P, Q, all_chains(Q, 2, 2), 2, rule, op(rule, backend))
        assert abs(accepted - want) < EXACT


def top1(Q: Law, depth: int) -> list[tuple[Prefix, float]]:
    x: Prefix = ()
    for _ in range(depth):
        x += (int(Q(x).argmax()),)
    return [(x, 1.0)]


@pytest.mark.parametrize("rule", RULES)
def test_exact_law_of_deterministic_drafts(rule: str, backend: str) -> None:
    P, Q = random_law(11, 4), random_law(12, 4)
    law, _ = emitted_law(P, None, top1(Q, 3), 4, "token", op(rule, backend, deterministic=True))
    assert distance(law, joint(P, 4, 4)) < EXACT


def test_exact_law_of_a_reduced_draft_vocabulary(backend: str) -> None:
    """Column 0 is token 3, column 1 token 0; column 2 is out of the vocabulary with no mass."""
    vocab = torch.tensor([3, 0, 9])
    P, R = random_law(21, 4), random_law(22, 2)

    def Q(s: Prefix) -> np.ndarray:
        r = R(s)
        return np.array([r[1], 0, 0, r[0]])

    def verifier(p: np.ndarray, x: np.ndarray, q: np.ndarray, u: np.ndarray) -> np.ndarray:
        return op(rule, backend, draft_vocab=vocab)(p, x, q[..., [3, 0, 1]], u)

    for rule in RULES:
        law, _ = emitted_law(P, Q, all_chains(Q, 4, 2), 4, rule, verifier)
        assert distance(law, joint(P, 4, 3)) < EXACT


# ---- negative controls: errors that people really made ------------------------------------------


@pytest.mark.parametrize("error", ["stop_at_first_rejection", "plain_residual"])
def test_control_of_the_block_rule(error: str) -> None:
    P, Q = random_law(2, 4, 1.0), random_law(3, 4, 1.0)
    chains, want = all_chains(Q, 4, 2), joint(P, 4, 3)
    right, _ = emitted_law(P, Q, chains, 4, "block", decide_all("block"))
    wrong, _ = emitted_law(P, Q, chains, 4, "block", decide_all("block", **{error: True}))
    assert distance(right, want) < EXACT
    assert distance(wrong, want) > 0.01


def test_control_ratio_test_for_deterministic_drafts(backend: str) -> None:
    """Top-1 drafts tested with p/q, which their law would need to be drawn from."""
    P, Q = random_law(11, 4), random_law(12, 4)
    law, _ = emitted_law(P, Q, top1(Q, 2), 4, "token", op("token", backend))
    assert distance(law, joint(P, 4, 3)) > 0.05


# ---- steps in a row, with the op's own draws -----------------------------------------------------


def decode(
    rule: str,
    backend: str,
    *,
    advance: bool,
    requests: int = 200_000,
    vocab: int = 2,
    length: int = 5,
) -> float:
    """p-value of the first ``length`` tokens of ``requests`` decodings against the joint law."""
    P, Q = random_law(31, vocab, 1.0), random_law(32, vocab, 1.0)
    G, generator = 2, torch.Generator().manual_seed(7)
    prefixes = [s for n in range(length + G + 1) for s in joint(P, vocab, n)]
    # a prefix is the number 1, then its tokens, in base V; long ones share their last law
    number = {s: int("1" + "".join(map(str, s)), vocab) for s in prefixes}
    tables = torch.zeros(2, max(number.values()) + 1, vocab, dtype=torch.float64)
    for s, at in number.items():
        tables[0, at], tables[1, at] = torch.from_numpy(P(s)), torch.from_numpy(Q(s))
    limit = vocab ** (length + 1)

    state = torch.ones(requests, dtype=torch.int64)
    done = torch.zeros(requests, dtype=torch.int64)
    while bool((done < length).any()):
        start = torch.where(state >= limit, 1, state)  # finished: whatever
        at, x = [start], []
        for _ in range(G):
            q = tables[1][at[-1]]
            x.append(torch.multinomial(q, 1, generator=generator)[:, 0])
            at.append(at[-1] * vocab + x[-1])
        out = pydecode.rejection_sample(
            None,
            torch.stack(x, 1),
            target_probs=tables[0][torch.stack(at, 1)],
            draft_probs=tables[1][torch.stack(at[:-1], 1)],
            rule=rule,
            seed=torch.arange(requests),
            offset=3,
            positions=done if advance else 0,
            backend=backend,
        )
        for token in out.tokens.unbind(-1):
            emit = (token >= 0) & (done < length)
            state = torch.where(emit, state * vocab + token, state)
            done = done + emit
    counts = torch.bincount(state, minlength=limit)
    sequences = joint(P, vocab, length)
    observed = np.array([int(counts[number[s]]) for s in sequences])
    return chi_square(observed, np.array(list(sequences.values())))


@pytest.mark.parametrize("rule", RULES)
def test_steps_in_a_row(rule: str, backend: str) -> None:
    assert decode(rule, backend, advance=True) > 1e-4


def test_control_steps_with_the_same_draws(backend: str) -> None:
    assert decode("token", backend, advance=False) < 1e-9


# ---- frequencies at a larger vocabulary ---------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "filters"),
    [("token", {}), ("block", {}), ("block", {"top_k": 200, "top_p": 0.9, "min_p": 0.001})],
)
def test_frequencies(rule: str, filters: dict[str, float], backend: str) -> None:
    V, B, rounds = 1000, 5_000, 4
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, V, generator=generator) * 1.5
    draft = logits[:1] + torch.randn(1, V, generator=generator)
    p = law_of(logits.double() / 0.8, **filters)
    q = law_of(draft.double() / 0.8, **filters)
    first, second = np.zeros(V), np.zeros(V)
    for i in range(rounds):
        x = torch.multinomial(q[0], B, replacement=True, generator=generator)[:, None]
        out = pydecode.rejection_sample(
            logits.expand(B, 2, V),
            x,
            draft.expand(B, 1, V),
            rule=rule,
            temperature=0.8,
            seed=2**64 - 5,
            offset=i,
            backend=backend,
            **filters,
        )
        first += torch.bincount(out.tokens[:, 0], minlength=V).numpy()
        second += torch.bincount(out.tokens[out.num_accepted == 1, 1], minlength=V).numpy()
    assert 0.2 < second.sum() / (rounds * B) < 0.95
    assert chi_square(first, p[0].numpy()) > 1e-4
    assert chi_square(second, p[1].numpy()) > 1e-4


def law_of(
    logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The filtered law of rows without ties."""
    p = logits.softmax(-1)
    if top_k:
        p = p * (logits >= logits.topk(top_k).values[:, -1:])
        p = p / p.sum(-1, keepdim=True)
    above = torch.stack([(r[None] * (r[None] > r[:, None])).sum(-1) for r in p])
    p = p * (above < top_p)
    p = p * (p >= min_p * p.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True)
