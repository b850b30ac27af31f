"""SGLang's target-only and chain sampling against its loops."""

from typing import Any

import peer_sglang as peer
import pytest
import torch
from sglang_cases import PREFILL, Results, coins, dyadic, expect, sampled_case, scattered_rows
from torch import Tensor

from pydecode import trees
from pydecode.compat.sglang import (
    chain_speculative_sampling_triton,
    tree_speculative_sampling_target_only,
)


def target_only(
    S: int, case: dict[str, Tensor], rows: int, **options: Any
) -> tuple[Results, dict[str, Tensor]]:
    got = Results(case["candidates"].shape[0], rows, S)
    names = ("predicts", "accept_index", "accept_token_num")
    tree_speculative_sampling_target_only(**dict(zip(names, got())), **case, **options)
    return got, case


@pytest.mark.parametrize("thresholds", [(1.0, 1.0), (0.4, 1.0), (1.0, 0.5), (0.3, 0.0)], ids=str)
@pytest.mark.parametrize("distinct", [True, False])
def test_target_only(thresholds: tuple[float, float], distinct: bool) -> None:
    bs, V = 400, 9
    for S, ndt in ((3, 8), (6, 8), (1, 3)):
        case = sampled_case(bs, ndt, V, distinct)
        got, _ = target_only(
            S,
            {**case, "draft_probs": None},
            bs * ndt + 9,
            threshold_single=thresholds[0],
            threshold_acc=thresholds[1],
        )
        each = [x.tolist() for x in case.values()]
        walks = [peer.target_only(S, *row, *thresholds, theirs=False) for row in zip(*each)]
        expect(got, walks, case["retrive_index"].tolist())
        # theirs is the same, but for its two faults
        theirs = [peer.target_only(S, *row, *thresholds, theirs=True) for row in zip(*each)]
        differ = sum(x != y for x, y in zip(walks, theirs))
        assert differ < bs / 3
        if S > 1 and thresholds[1] > 0:
            assert differ > 0  # the cases do meet the faults


def test_target_only_equals_theirs_where_nothing_ties() -> None:
    bs, ndt, V, S = 400, 8, 9, 6
    case = sampled_case(bs, ndt, V, distinct=True)
    case["uniform_samples"] += 1 / 1024
    case["draft_probs"] = torch.full((bs, ndt, V), torch.nan)  # not read, and not written
    got, _ = target_only(S, case, bs * ndt + 9)
    assert case.pop("draft_probs").isnan().all()
    each = zip(*(x.tolist() for x in case.values()))
    walks = [peer.target_only(S, *row, theirs=True) for row in each]
    expect(got, walks, case["retrive_index"].tolist())
    assert got.num.float().mean() > 0.15


def one_node(p: list[list[float]], tokens: list[int], u: float, final: float = 0.5) -> Results:
    """A root whose children have these tokens."""
    first, following = trees.links(torch.tensor([[-1] + [0] * len(tokens)]))
    n = len(tokens) + 1
    got, _ = target_only(
        2,
        dict(
            candidates=torch.tensor([[0, *tokens]]),
            retrive_index=torch.arange(n)[None],
            retrive_next_token=first,
            retrive_next_sibling=following,
            uniform_samples=torch.full((1, n), u),
            uniform_samples_for_final_sampling=torch.tensor([final]),
            target_probs=torch.tensor([p + [p[-1]] * (n - len(p))]),
            draft_probs=torch.zeros(0),
        ),
        n,
    )
    return got


def test_a_threshold_in_place_of_draft_probs_is_an_error() -> None:
    """One version of theirs has no draft_probs: its positional calls must not be misread."""
    filler = [torch.zeros(1)] * 10
    with pytest.raises(TypeError, match=r"draft_probs: expected a tensor or None, got 0\.5"):
        tree_speculative_sampling_target_only(*filler, 0.5, 0.9)  # type: ignore[arg-type]


def test_a_coin_of_0_accepts_nothing_impossible() -> None:
    """sglang#35771: a token that top-k removed was accepted at coin 0."""
    assert one_node([[0.0, 1.0]], [0], 0.0).num.item() == 0
    assert one_node([[0.0, 1.0]], [0], 0.0).predicts.tolist() == [1, PREFILL]
    assert one_node([[0.0, 1.0]], [1], 0.0).index.tolist() == [[0, 1]]


def test_a_repeated_sibling_counts_once() -> None:
    """Theirs counts its mass twice, and accepts token 0 in 3 of 4 cases in place of 3 of 8."""
    p = [[0.375, 0.625]]
    assert one_node(p, [0, 0], 0.5).num.item() == 0
    assert one_node(p, [0, 0], 0.5, final=0.0).predicts.tolist() == [1, PREFILL, PREFILL]
    assert one_node(p, [0, 0], 0.25).index.tolist() == [[0, 1]]


@pytest.mark.parametrize("row", [[torch.nan, 0.5, 0.5], [0.0, 0.0, 0.0], [torch.inf, 0.0, 0.0]])
def test_target_only_undecided(row: list[float]) -> None:
    """Theirs emits token V - 1, as if it had been sampled."""
    got = one_node([row, [0.5, 0.25, 0.25]], [1], 0.2)
    assert (got.num.tolist(), got.index.tolist()) == ([0], [[0, -1]])
    assert got.predicts.tolist() == [-1, PREFILL]
    # not a row of the walked path: no harm
    assert one_node([[0.5, 0.5, 0.0], row], [2], 0.2).predicts[0] in (0, 1)


def test_candidates_outside_the_vocabulary_are_absent() -> None:
    for token in (-1, 3, 2**40):
        got = one_node([[0.5, 0.25, 0.25]], [token, 1], 0.1)
        assert got.index.tolist() == [[0, 2]]


def test_a_padded_vocabulary_is_a_view_and_other_gaps_raise() -> None:
    case = sampled_case(3, 5, 9, True)
    case["draft_probs"] = torch.zeros(0)
    want, _ = target_only(4, case, 24)
    wide = torch.full((3, 5, 16), torch.nan)
    wide[..., :9] = case["target_probs"]
    got, _ = target_only(4, {**case, "target_probs": wide[..., :9]}, 24)
    assert all(torch.equal(x, y) for x, y in zip(got(), want()))
    gap = torch.ones(3, 6, 9)
    alone = {name: x[:, :1] if x.dim() > 1 else x for name, x in case.items()}
    target_only(4, {**alone, "target_probs": gap[:, :1]}, 24)
    with pytest.raises(ValueError, match="target_probs: expected batch and node dimensions"):
        target_only(4, {**case, "target_probs": gap[:, :5]}, 24)


# ---- chain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "extra"), [(1, 0), (2, 0), (5, 0), (5, 3)])
def test_chain(slots: int, extra: int) -> None:
    bs, V = 300, 7
    p, q = dyadic(bs, slots, V), dyadic(bs, slots, V, zeros=0.0)
    tokens = torch.cat(
        [torch.zeros(bs, 1).long(), q[:, :-1].flatten(0, 1).multinomial(1).view(bs, -1)], 1
    )
    u = torch.cat([coins(bs, slots) + 1 / 1024, coins(bs, 1) + 1 / 1000], 1)
    index = scattered_rows(bs, slots, bs * slots + 9)
    got = Results(bs, bs * slots + 9, slots + extra)
    wide = torch.full((bs, 2 * (slots + extra)), PREFILL, dtype=torch.int32)
    got.index = wide[:, ::2]  # theirs needs the row stride of retrive_index
    chain_speculative_sampling_triton(
        *got(),
        tokens,
        index,
        None,
        None,
        u[:, :slots],
        u[:, slots],
        p,
        q[:, : slots - 1],
        1.0,
        1.0,
        True,
    )
    each = zip(
        tokens.tolist(),
        index.tolist(),
        u[:, :slots].tolist(),
        u[:, slots].tolist(),
        p.tolist(),
        q.tolist(),
    )
    expect(got, [peer.chain(*row) for row in each], index.tolist())
    assert wide[:, 1::2].eq(PREFILL).all()


def test_chain_edges() -> None:
    def run(p: list[float], q: list[float], token: int, u: float) -> tuple[int, list[int]]:
        got = Results(1, 2, 2)
        args = (torch.tensor([[0, token]]), torch.arange(2)[None], None, None)
        coin = torch.tensor([[u, u]]), torch.tensor([0.9])
        laws = torch.tensor([[p, [0.25, 0.25, 0.5]]]), torch.tensor([[q]])
        chain_speculative_sampling_triton(*got(), *args, *coin, *laws)
        return int(got.num), got.predicts.tolist()

    half = [0.5, 0.5, 0.0]
    assert run(half, half, 0, 1.0) == (0, [1, PREFILL])  # no residual: p; theirs V - 1, impossible
    assert run(half, [0.0, 0.5, 0.5], 0, 0.0) == (0, [0, PREFILL])  # never drawn; theirs accepts
    assert run(half, [0.5, 0.0, 0.5], 2, 0.0)[0] == 0  # impossible in p: coin 0 does not accept
    assert run(half, half, -1, 0.0) == (0, [1, PREFILL])  # theirs reads out of bounds
    assert run([torch.nan, 0.5, 0.5], half, 0, 0.0) == (0, [-1, PREFILL])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(accept_index=torch.zeros(3, 0).int()), r"accept_index: expected shape \[bs, S\]"),
        (dict(accept_token_num=torch.zeros(2).int()), "accept_token_num: expected shape"),
        (dict(predicts=torch.zeros(3, 5).int()), "predicts: expected 1 dimensions"),
        (dict(retrive_index=torch.zeros(3, 4).long()), "retrive_index: expected shape"),
        (dict(uniform_samples=torch.zeros(3, 4)), "uniform_samples: expected shape"),
        (dict(uniform_samples_for_final_sampling=torch.zeros(3, 1)), "final_sampling: expected"),
        (dict(target_probs=torch.zeros(3, 4, 9)), "target_probs: expected shape"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    names = ("predicts", "accept_index", "accept_token_num")
    call = {**dict(zip(names, Results(3, 15, 4)())), **sampled_case(3, 5, 9, True)}
    call["retrive_index"] %= 15
    tree_speculative_sampling_target_only(**call, draft_probs=None)
    with pytest.raises(ValueError, match=message):
        tree_speculative_sampling_target_only(**{**call, **change}, draft_probs=None)
