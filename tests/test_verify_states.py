"""verify_states against loops, and the recipes of SSD and FreeDave against stepwise decoding."""

import pytest
import torch
from torch import Tensor

import pydecode

MASK = 0


def loops(states: list, targets: list, rule: str, graph: list | None, mask_id: int = MASK) -> int:
    best, seen = 0, {0}
    while True:
        children = []
        for j, state in enumerate(states):
            edge = j > best if graph is None else graph[best][j]
            same = all(
                s == t or (rule == "subset" and s == mask_id) for s, t in zip(state, targets[best])
            )
            if edge and same and j not in seen:
                children.append(j)
        if not children:
            return best
        best = max(children) if rule == "subset" else min(children)
        seen.add(best)


@pytest.mark.parametrize("rule", ["exact", "subset"])
@pytest.mark.parametrize("graph", [None, "shared", "each"])
@pytest.mark.parametrize(("K", "L"), [(1, 3), (2, 1), (5, 2), (8, 3), (9, 0)])
def test_against_loops(backend: str, K: int, L: int, graph: str | None, rule: str) -> None:
    """Few symbols, so that equal states, cycles and subsets abound."""
    B = 200
    states, targets = torch.randint(0, 3, (2, B, K, L))
    edges = {None: None, "shared": torch.rand(1, K, K) < 0.7, "each": torch.rand(B, K, K) < 0.7}
    allowed = edges[graph]
    if graph == "shared":
        allowed[:, 0] = True  # one draw for all requests: let none be without a way out
    got = pydecode.verify_states(
        states, targets.int(), mask_id=MASK, rule=rule, graph=allowed, backend=backend
    )
    each = [None] * B if allowed is None else allowed.expand(B, K, K).tolist()
    want = [loops(s, t, rule, g) for s, t, g in zip(states.tolist(), targets.tolist(), each)]
    assert got.dtype == torch.int64
    assert got.tolist() == want
    if K >= 5 and L:
        assert len(set(want)) > 2  # the walks are not all alike


def test_order_of_children(backend: str) -> None:
    """Equal states: exact takes the lowest, subset the largest."""
    states = torch.tensor([[[1, MASK], [1, 2], [1, 2], [1, MASK]]])
    targets = torch.tensor([[[1, 2], [1, 3], [1, 3], [1, 3]]])
    call = dict(mask_id=MASK, backend=backend)
    assert pydecode.verify_states(states, targets, rule="exact", **call).tolist() == [1]
    assert pydecode.verify_states(states, targets, rule="subset", **call).tolist() == [3]


def test_a_cycle_ends_the_walk(backend: str) -> None:
    """0 -> 1 -> 2 -> 0: no state is visited twice."""
    states = torch.tensor([[[1], [2], [3], [4]]])
    targets = torch.tensor([[[2], [3], [1], [4]]])
    graph = torch.ones(1, 4, 4, dtype=torch.bool)
    for rule in ("exact", "subset"):
        best = pydecode.verify_states(
            states, targets, mask_id=MASK, rule=rule, graph=graph, backend=backend
        )
        assert best.tolist() == [2]


def test_empty_batch(backend: str) -> None:
    states = torch.zeros(0, 3, 4, dtype=torch.int64)
    assert pydecode.verify_states(states, states, mask_id=0, backend=backend).shape == (0,)


# ---- recipes: identical to stepwise decoding, in fewer forwards ----

VOCAB, LENGTH = 7, 12


class TinyModel:
    """A denoiser: logits that mostly know the text, and depend a little on the whole state."""

    def __init__(self) -> None:
        self.known = torch.randn(LENGTH, VOCAB, dtype=torch.float64) * 2
        self.mix = torch.randn(LENGTH, VOCAB, LENGTH, VOCAB, dtype=torch.float64) * 0.1
        self.forwards = 0

    def forward(self, states: Tensor) -> Tensor:
        """states [K, L] -> logits [K, L, V], one forward for all."""
        self.forwards += 1
        one_hot = torch.nn.functional.one_hot(states, VOCAB).double()
        return self.known + torch.einsum("kmw,lvmw->klv", one_hot, self.mix)


def commit(state: Tensor, logits: Tensor, count: int) -> Tensor:
    """state [L] with its ``count`` most confident masked positions filled in."""
    logits = logits.clone()
    logits[:, MASK] = -torch.inf
    confidence, token = logits.softmax(-1).max(-1)
    confidence = torch.where(state == MASK, confidence, -torch.inf)
    order = confidence.argsort(descending=True, stable=True)
    chosen = torch.zeros(LENGTH, dtype=torch.bool)
    chosen[order[:count]] = True
    return torch.where(chosen & (state == MASK), token, state)


def stepwise(model: TinyModel, per_step: int) -> list[list[int]]:
    state = torch.full((LENGTH,), MASK)
    trajectory = []
    while (state == MASK).any():
        state = commit(state, model.forward(state[None])[0], per_step)
        trajectory.append(state.tolist())
    return trajectory


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("num_drafts", [1, 3, 8])
@pytest.mark.parametrize("rule", ["exact", "subset"])
def test_chain_of_drafts_equals_stepwise(
    backend: str, rule: str, num_drafts: int, per_step: int
) -> None:
    """SSD's greedy chain and FreeDave's draft states, at a static number of tokens a step."""
    plain, drafted = 0, 0
    for _ in range(6):
        model = TinyModel()
        trajectory = stepwise(model, per_step)
        plain, model.forwards = plain + model.forwards, 0
        state = torch.full((LENGTH,), MASK)
        logits = model.forward(state[None])[0]
        while (state == MASK).any():
            states = torch.stack(
                [commit(state, logits, (k + 1) * per_step) for k in range(num_drafts)]
            )
            each = model.forward(states)
            targets = torch.stack([commit(s, x, per_step) for s, x in zip(states, each)])
            best = pydecode.verify_states(
                states[None], targets[None], mask_id=MASK, rule=rule, backend=backend
            )
            state, logits = states[best[0]], each[best[0]]
            assert state.tolist() in trajectory  # the order of commits, not only the outcome
        assert state.tolist() == trajectory[-1]
        drafted, model.forwards = drafted + model.forwards, 0
    if num_drafts == 1:
        assert drafted == plain + 6  # one forward a commit, and one to start with
    else:
        assert drafted < plain


def test_a_wrong_draft_is_never_taken(backend: str) -> None:
    """Negative control of the recipe: drafts that differ in one token stay behind."""
    model = TinyModel()
    state = torch.full((LENGTH,), MASK)
    first = commit(state, model.forward(state[None])[0], 1)
    second = commit(first, model.forward(first[None])[0], 1)
    wrong = torch.where((second != MASK) & (first == MASK), second % (VOCAB - 1) + 1, second)
    assert not torch.equal(wrong, second)
    for rule in ("exact", "subset"):
        for drafts, best in (((first, second), 1), ((first, wrong), 0)):
            states = torch.stack(drafts)
            each = model.forward(states)
            targets = torch.stack([commit(s, x, 1) for s, x in zip(states, each)])
            got = pydecode.verify_states(
                states[None], targets[None], mask_id=MASK, rule=rule, backend=backend
            )
            assert got.tolist() == [best]


S = torch.zeros(2, 3, 4, dtype=torch.int64)
BAD_ARGUMENTS = {
    "states": (dict(states=S[0]), ValueError, "states: expected 3 dimensions"),
    "K": (dict(states=S[:, :0], targets=S[:, :0]), ValueError, "states: expected K >= 1"),
    "dtype": (dict(states=S.float()), TypeError, "states: expected dtype int32, int64"),
    "targets": (dict(targets=S[:, 1:]), ValueError, "targets: expected shape"),
    "mask_id": (dict(mask_id=None), TypeError, "mask_id: expected an int"),
    "rule": (dict(rule="superset"), ValueError, "rule: expected one of exact, subset"),
    "graph": (dict(graph=torch.ones(3, 3).bool()), ValueError, "graph: expected shape"),
    "graph dtype": (dict(graph=torch.ones(1, 3, 3)), TypeError, "graph: expected dtype bool"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_errors_name_the_argument(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        pydecode.verify_states(**{**dict(states=S, targets=S, mask_id=0), **change})
