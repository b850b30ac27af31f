"""Thresholds of top-k and top-p, found between two reads of a row: the floors themselves, against
a sort in fp64."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import MORE, chance, one_of

INF = math.inf


class Found(NamedTuple):
    floors: Tensor  # [rows]
    masses: Tensor  # [rows]
    kept: Tensor  # [rows, C]
    inside: Tensor  # [rows, 2, C]: candidates of top-k and of top-p


def found(x: Tensor, joint: bool = False, per: int | None = None, **given: Any) -> Found:
    """What the first two launches of a row op leave of rows x [rows, V]."""
    from pydecode.triton_kernels import row_launches, supports
    from pydecode.triton_kernels.row_calls import sampling
    from pydecode.triton_kernels.sample_and_score import call_of

    rows = x.shape[0]
    arguments = dict(given, seed_tensor=None, filter_order="joint" if joint else "top_k_first")
    arguments = dict(dict(temperature=1.0), **arguments)
    call = call_of(x[:, None], None, False, rows, *sampling(**arguments))
    assert call.search is not None
    call.search.words.fill_(0x7FC00000)  # NaN: what is not written must not be read
    with pytest.MonkeyPatch.context() as change:
        if per is not None:
            change.setattr(row_launches, "chunks_a_program", lambda *_: 1 + per // 2)
            change.setattr(row_launches, "chunks_to_narrow", lambda *_: per)
        row_launches.launch_chunks(call, rows, None)
    words, C, fields = call.search.words, call.rows.C, int(supports.FIELDS)
    numbers = words[:, 16 : 16 + C * fields].view(rows, fields, C)
    at = int(supports.BRACKET) + int(supports.INSIDE)
    return Found(
        words[:, 1].view(torch.float32),
        words[:, 2].view(torch.float32),
        numbers[:, 0].view(torch.float32),
        numbers[:, [at, at + int(supports.OF_BRACKET)]],
    )


def floor_of(x: Tensor, T: float, k: int, p: float, joint: bool) -> tuple[float, float]:
    """(the lowest value that is kept, how near top-p's bound is to a mass): one row, by a sort."""
    x = x.double().sort(descending=True).values
    floor = x[k - 1].item() if 0 < k < len(x) else -INF
    if not p < 1:
        return floor, 1.0
    infinite = x == INF
    e = infinite.double() if infinite.any() else ((x - x[0]) / T).exp()
    e = torch.where(x >= (-INF if joint else floor), e, 0.0)
    values, index = x.unique(return_inverse=True)
    weight = torch.zeros(len(values), dtype=torch.float64).index_add_(0, index, e).flip(0)
    above = weight.cumsum(0) - weight
    bound = max(p, 0.0) * e.sum()
    keep = (above < bound) | (torch.arange(len(values)) == 0)
    margin = ((above[1:] - bound).abs() / e.sum()).min().item() if len(values) > 1 else 1.0
    return max(floor, values.flip(0)[keep][-1].item()), margin


KINDS = ("normal", "ties", "bf16", "equal", "one", "holes", "tiny", "huge", "infinite", "steps")


def row_of(kind: str, V: int) -> Tensor:
    x = torch.randn(V) * one_of(0.3, 2.0, 5.0)
    if kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "bf16":
        x = x.bfloat16().float()
    elif kind == "equal":
        x = x[:1].expand(V).clone()
    elif kind == "one":
        x[int(torch.randint(V, ()))] = 60.0
    elif kind == "holes":
        x[torch.rand(V) < 0.7] = -INF
        x[V // 2] = 1.0
    elif kind == "tiny":  # all in one bin
        x = x * 1e-3 + one_of(0.0, 7.03, -1e4)
    elif kind == "huge":  # the window is left at once
        x = x * one_of(1e3, 1e30)
    elif kind == "infinite":
        x[torch.randint(V, (min(V, 3),))] = INF
    elif kind == "steps":  # on the edges of bins
        x = (x * 8).round() / 8
    return x + (one_of(0.0, 100.0, -3.0) if kind in ("normal", "steps") else 0.0)


@pytest.mark.parametrize("V", [1, 2, 50, 4097, 9001])
@pytest.mark.parametrize("joint", [False, True], ids=["in_turn", "joint"])
def test_floors(V: int, joint: bool) -> None:
    """Rows of every kind, under filters of every kind, alone and together."""
    rows = len(KINDS) * (4 if V < 1000 else 1) * MORE
    x = torch.stack([row_of(KINDS[i % len(KINDS)], V) for i in range(rows)])
    T = torch.tensor([one_of(0.05, 0.7, 1.0, 5.0) for _ in range(rows)])
    k = torch.tensor([one_of(0, 1, 2, 50, V // 3, V - 1, V) for _ in range(rows)])
    p = torch.rand(rows)
    for i in range(rows):
        if chance(0.5):
            p[i] = one_of(0.0, -1.0, 1e-6, 0.5, 0.999, 1 - 1e-7, 1.0, math.nan)
    least = torch.tensor([one_of(0.0, 0.0, 0.01, 0.5) for _ in range(rows)])
    got = found(x, joint, temperature_tensor=T, top_k_tensor=k, top_p_tensor=p, min_p_tensor=least)
    compared = 0
    for i in range(rows):
        numbers = T[i].item(), int(k[i]), p[i].item()
        floor, margin = floor_of(x[i], *numbers, joint)
        if margin < 1e-5:
            continue
        there = (x[i] > -INF) & ((x[i] == INF) | (x[i].max() < INF))
        keep = there & (x[i].double() >= floor)
        assert torch.equal(there & (x[i] >= got.floors[i]), keep), (i, KINDS[i % len(KINDS)])
        e = torch.where(x[i] == x[i].max(), 1.0, ((x[i] - x[i].max()).double() / T[i]).exp())
        if ((e - least[i]).abs() < 1e-6 * (least[i] > 0)).any():
            continue
        e = torch.where(keep & (e >= least[i]), e, 0.0)
        chunks = torch.stack([c.sum() for c in e.split(4096)])
        torch.testing.assert_close(got.kept[i].double(), chunks, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.masses[i].double(), e.sum(), rtol=1e-5, atol=1e-6)
        compared += 1
    assert compared > rows // 2


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each tile of a row that a search reads."""
    from pydecode.triton_kernels import thresholds

    real, seen = thresholds.admitted, []

    def admitted(*args: Any) -> Any:
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(thresholds, "admitted", admitted)
    return seen


FILTERS: dict[str, dict[str, Any]] = {
    "top_k": dict(top_k=50),
    "top_p": dict(top_p=0.9),
    "both": dict(top_k=50, top_p=0.9),
    "sharp": dict(top_k=700, top_p=0.99, temperature=0.3),
    "flat": dict(top_p=0.5, temperature=5.0),
    "deep": dict(top_k=3000),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("joint", [False, True], ids=["in_turn", "joint"])
def test_two_reads_suffice(searches: list[int], name: str, joint: bool) -> None:
    """Ordinary rows are never searched: their candidates have the threshold."""
    torch.manual_seed(5)  # a bracket may fail, seldom, and then the row is searched
    x = torch.randn(2, 9001) * 3
    given = dict(dict(temperature=1.0), **FILTERS[name])
    got = found(x, joint, **given)
    assert not searches
    k, p = given.get("top_k", 0), given.get("top_p", 1.0)
    for row, floor in zip(x, got.floors):
        want, margin = floor_of(row, given["temperature"], k, p, joint)
        assert margin < 1e-5 or floor == want
    assert got.inside.sum() > 0


def test_more_entries_than_a_chunk_has_room_for(searches: list[int]) -> None:
    """257 and more of a chunk inside the bracket: the row is searched; at 256 it is not."""
    for number, there in ((256, False), (257, True)):
        x = torch.full((1, 4500), -20.0)
        x[0, :number] = torch.linspace(1.01, 1.12, number)
        for k in (1, 57, number):
            searches.clear()
            got = found(x, top_k=k)
            assert got.inside[0, 0].max() == number
            assert bool(searches) == there
            assert got.floors.item() == x[0].sort(descending=True).values[k - 1]


def test_far_from_the_top(searches: list[int]) -> None:
    """A threshold that no histogram has seen: further down than their last bin."""
    x = torch.randn(1, 5000)
    x[0, 7], x[0, 4500] = 90.0, 80.0
    for given in (dict(top_k=40), dict(top_k=40, top_p=0.9999), dict(top_p=0.9, temperature=100.0)):
        searches.clear()
        got = found(x, **given)
        T, k, p = given.get("temperature", 1.0), int(given.get("top_k", 0)), given.get("top_p", 1.0)
        want, margin = floor_of(x[0], T, k, p, False)
        assert margin > 1e-7
        assert got.floors.item() == want
        assert searches


@pytest.mark.parametrize("name", ["both", "flat", "deep"])
def test_bits_depend_on_the_row_alone(name: str) -> None:
    """Not on the mates, nor on how many chunks a program takes."""
    x = torch.randn(3, 12400) * 2
    all_ = found(x, min_p=1e-3, **FILTERS[name])
    for per in (1, 2, 3, 4, 8):
        alone = found(x[1:2], min_p=1e-3, per=per, **FILTERS[name])
        for a, b in zip(all_, alone):
            assert torch.equal(a[1:2], b)


def test_rows_that_are_not_filtered(searches: list[int]) -> None:
    """Filters that are off for a request: all is kept, as the first read weighed it."""
    x = torch.randn(4, 5000)
    k, p = torch.tensor([0, 5000, -3, 5]), torch.tensor([1.0, math.nan, 2.0, 1.0])
    got = found(x, top_k_tensor=k, top_p_tensor=p)
    assert got.floors[:3].tolist() == [-INF] * 3
    whole = (x - x.amax(1, keepdim=True)).double().exp()
    torch.testing.assert_close(got.masses[:3].double(), whole.sum(1)[:3], rtol=1e-6, atol=0)
    assert got.floors[3] == x[3].sort(descending=True).values[4]
    assert not searches


def test_a_walk_reads_its_rows_twice(searches: list[int]) -> None:
    """Top-down trees: one program a request finds each row's threshold the same way."""
    import pydecode

    torch.manual_seed(5)
    x = torch.randn(2, 3, 9001) * 3
    draft_tokens, parents = x.argmax(-1), torch.tensor([[-1, 0, 1]])
    given: dict[str, Any] = dict(
        draft_logits=torch.randn(2, 3, 9001) * 3, max_depth=2, seed=torch.tensor([3, 4])
    )
    for filters in (dict(top_k=40), dict(top_p=0.9), dict(top_k=40, top_p=0.9, min_p=0.01)):
        got, want = (
            pydecode.rejection_sample_tree(
                x, draft_tokens, parents, rule="recursive", backend=backend, **filters, **given
            )
            for backend in ("triton", "reference")
        )
        assert torch.equal(got.tokens, want.tokens)
        assert not searches
