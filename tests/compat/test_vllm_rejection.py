"""pydecode.compat.vllm.v1 against vLLM V1's documented semantics."""

import inspect
from collections import Counter
from types import SimpleNamespace
from typing import Any

import peer_vllm as peer
import pytest
import torch
from torch import Tensor
from vllm_batches import V, chain_law, logits_like, spy_on

import pydecode
from pydecode.compat.vllm import v1


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return spy_on(monkeypatch)


def cumulative(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


def metadata(**changes: Any) -> Any:
    given = dict(all_greedy=False, all_random=True, temperature=None, generators={})
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("kind", ["random", "greedy", "mixed"])
def test_v1_random_batches(spy: dict[str, Any], with_probs: bool, kind: str) -> None:
    B, G = 1500, 4
    counts = torch.randint(0, G + 1, (B,)).tolist()
    N = sum(counts)
    logits, q = logits_like(N), logits_like(N).softmax(-1)
    drafts = torch.randint(-1, V, (N,), dtype=torch.int32)
    likely = logits.argmax(-1).int()
    drafts = torch.where(torch.rand(N) < 0.8, likely, drafts)
    bonus = torch.randint(0, V, (B, 1))
    temperature = torch.tensor([0.0, 0.7, 1.3])[torch.randint(0, 3, (B,))]
    state = dict(
        random=metadata(),
        greedy=metadata(all_greedy=True, all_random=False),
        mixed=metadata(all_random=False, temperature=temperature),
    )[kind]
    out = v1.rejection_sample(
        drafts, counts, G, cumulative(counts), q if with_probs else None, logits, bonus, state
    )
    assert out.dtype == torch.int32
    assert out.shape == (B, G + 1)
    u = spy["uniforms"]
    assert u is None if kind == "greedy" else u.dtype == torch.float64  # fine enough for tails
    seen, first = Counter(), 0
    for b, n in enumerate(counts):
        rows = slice(first, first + n)
        first += n
        x, z = drafts[rows].tolist(), logits[rows].tolist()
        if kind == "greedy" or (kind == "mixed" and temperature[b] == 0):
            want, whole = peer.greedy_chain(z, x)
        else:
            draws = [*u[b, :n].tolist(), u[b, G].item()]
            p = [peer.softmax(row) for row in z]
            want, whole = peer.token_chain(p, q[rows].tolist() if with_probs else None, x, draws)
        want += [bonus[b].item()] if whole else []
        seen[len(want)] += 1
        assert out[b].tolist() == want + [-1] * (G + 1 - len(want)), (b, x)
    assert all(seen[i] for i in range(1, G + 2))  # no length is left out


def small_v1(drafts: list[int], p: list[list[float]], u: list[float], spy: dict[str, Any]) -> Any:
    """One request without draft probabilities and with the given draws."""
    spy["set"] = dict(uniforms=torch.tensor([u], dtype=torch.float64))
    n = len(drafts)
    args = (torch.tensor(drafts), [n], n, cumulative([n]), None, torch.tensor(p).log())
    return v1.rejection_sample(*args, torch.tensor([[5]]), metadata())[0].tolist()


def test_v1_a_draw_of_zero_accepts_nothing_forbidden(spy: dict[str, Any]) -> None:
    """Theirs tests p/q >= u, which 0 >= 0 passes."""
    assert small_v1([2], [[0.5, 0.5, 0.0]], [0.0, 0.6], spy) == [1, -1]


def test_v1_a_missing_draft_is_replaced_from_the_law_itself(spy: dict[str, Any]) -> None:
    assert small_v1([-1, 1], [[0.1, 0.0, 0.9]] * 2, [0.0, 0.0, 0.05], spy) == [0, -1, -1]


def test_v1_a_rejected_deterministic_draft_never_comes_back(spy: dict[str, Any]) -> None:
    for last in (0.0, 0.5, 0.999):
        assert small_v1([0], [[0.6, 0.2, 0.2]], [0.7, last], spy)[0] != 0


def test_v1_nan_rows_give_one_request_nothing() -> None:
    logits = torch.zeros(4, V)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    state = metadata(all_greedy=True, all_random=False)
    drafts, bonus = torch.zeros(4, dtype=torch.int32), torch.full((3, 1), 2)
    out = v1.rejection_sample(
        drafts, [2, 1, 1], 2, cumulative([2, 1, 1]), None, logits, bonus, state
    )
    assert out.tolist() == [[-1] * 3, [-1] * 3, [0, 2, -1]]
    assert v1.parse_output(out, V) == [[], [], [0, 2]]


def test_v1_ties_go_to_the_first_id_and_old_greedy_is_minus_one() -> None:
    state = metadata(all_random=False, temperature=torch.tensor([-1.0, 0.0]))
    drafts = torch.tensor([4, 0], dtype=torch.int32)
    args = (
        drafts,
        [1, 1],
        3,
        cumulative([1, 1]),
        None,
        torch.zeros(2, V),
        torch.tensor([[1], [1]]),
    )
    assert v1.rejection_sample(*args, state).tolist() == [[0, -1, -1, -1], [0, 1, -1, -1]]


@pytest.mark.parametrize("B", [0, 3])
def test_v1_without_drafts(B: int) -> None:
    none, bonus = torch.empty(0, dtype=torch.int32), torch.arange(B)[:, None]
    cu = torch.zeros(B, dtype=torch.int32)
    for G in (0, 2):
        args = (none, [0] * B, G, cu, None, torch.empty(0, V), bonus, metadata())
        assert v1.rejection_sample(*args).tolist() == [[b] + [-1] * G for b in range(B)]


def test_v1_seeded_requests_do_not_depend_on_their_batch(spy: dict[str, Any]) -> None:
    """Nor on the longest chain, and a request without drafts leaves its generator alone."""
    draws = []
    for counts, G, place in (([2], 2, 0), ([3, 2, 0], 5, 1)):
        N, own = sum(counts), [torch.Generator().manual_seed(7) for _ in range(2)]
        state = metadata(generators={place: own[0], len(counts) - 1: own[-1 if place else 0]})
        before = own[1].get_state()
        args = (torch.zeros(N, dtype=torch.int32), counts, G, cumulative(counts), None)
        v1.rejection_sample(*args, torch.zeros(N, V), torch.zeros(len(counts), 1).int(), state)
        draws.append([*spy["uniforms"][place, :2].tolist(), spy["uniforms"][place, G].item()])
        assert torch.equal(before, own[1].get_state())
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 3


@pytest.mark.parametrize("wrong", [False, True])
def test_v1_law(wrong: bool) -> None:
    """Two tokens of 40,000 requests follow the target; with another q than was drawn from, not."""
    torch.manual_seed(3)
    B, G = 40_000, 2
    p, q = torch.rand(2, V).double().softmax(-1), (3 * torch.rand(2, V).double()).softmax(-1)
    drafts = torch.stack([torch.multinomial(q[i], B, replacement=True) for i in range(G)], 1)
    said = q.flip(-1) if wrong else q
    bonus = torch.multinomial(p[1], B, replacement=True)[:, None]  # unused where it would matter
    out = v1.rejection_sample(
        *(drafts.int().flatten(), [G] * B, G, torch.arange(G, B * G + 1, G), said.repeat(B, 1)),
        *(p.log().repeat(B, 1), bonus, metadata()),
    ).long()
    tokens = out[:, :2].clone()  # where the chain ended after one, its second token is p's own
    tokens[:, 1] = torch.where(tokens[:, 1] < 0, bonus[:, 0], tokens[:, 1])
    assert (chain_law(p, tokens) > 0.03) == wrong


def test_v1_names_what_it_cannot_do() -> None:
    args = (torch.zeros(1).int(), [1], 1, cumulative([1]), None, torch.zeros(1, V))
    for name, value in (("synthetic_mode", True), ("synthetic_conditional_rates", torch.ones(1))):
        with pytest.raises(NotImplementedError, match=name):
            v1.rejection_sample(*args, torch.zeros(1, 1).int(), metadata(), **{name: value})
    v1.rejection_sample(*args, torch.zeros(1, 1).int(), metadata(), use_fp64_gumbel=True)


def test_checks_pass_on_a_good_call() -> None:
    args = (torch.zeros(3).int(), [3, 0], 3, cumulative([3, 0]), None, torch.zeros(3, V))
    with pydecode.checks(True):
        v1.rejection_sample(*args, torch.zeros(2, 1).int(), metadata())


def test_signature() -> None:
    names = list(inspect.signature(v1.rejection_sample).parameters)
    assert names == [
        *("draft_token_ids", "num_draft_tokens", "max_spec_len", "cu_num_draft_tokens"),
        *("draft_probs", "target_logits", "bonus_token_ids", "sampling_metadata"),
        *("synthetic_mode", "synthetic_conditional_rates", "use_fp64_gumbel"),
    ]
    assert v1.PLACEHOLDER_TOKEN_ID == -1
