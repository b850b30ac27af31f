"""Gumbel noise and tempered entropies of filtered rows: what two reads of them leave is enough."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

MASK = 3
Change = Callable[[Any], None]  # of a call, between its reads of the rows and its decisions


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """What happens to calls before their last launch; scratch begins as NaN."""
    from pydecode.triton_kernels import row_launches, sample_and_score, unmask

    real = row_launches.launch_chunks
    changes: list[Change] = []

    def launch_chunks(call: Any, *args: Any) -> None:
        call.search.words.fill_(0x7FC00000)
        real(call, *args)
        for change in changes:
            change(call)

    for module in (sample_and_score, unmask):
        monkeypatch.setattr(module, "launch_chunks", launch_chunks)
    return changes


def lose_the_rows(call: Any) -> None:
    call.rows.x.fill_(torch.nan)


def trust_no_bracket(call: Any) -> None:
    from pydecode.triton_kernels import supports

    known = call.search.words[:, int(supports.KNOWN)]
    assert ((known == 0) | (known == 1)).all()
    known.fill_(-1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each chunk that is read for a third time."""
    from pydecode.triton_kernels import row_survivors

    real, seen = row_survivors.admitted, []

    def admitted(*args: Any) -> Any:
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(row_survivors, "admitted", admitted)
    return seen


def scored(x: Tensor, backend: str, **given: Any) -> pydecode.Scores:
    return pydecode.sample_and_score(x.clone(), backend=backend, seed=SEEDS[: len(x)], **given)


SEEDS = torch.tensor([7, -5, 2**50])
ENTROPY: dict[str, Any] = dict(tempered=True, confidence="neg_entropy")
FILTERS: dict[str, dict[str, Any]] = {
    "top_k": dict(top_k=50),
    "top_p": dict(top_p=0.9),
    "min_p": dict(min_p=0.02),
    "all": dict(top_k=60, top_p=0.95, min_p=0.003, temperature=2.0),
    "joint": dict(top_k=40, top_p=0.8, filter_order="joint"),
    "some": dict(top_k=torch.tensor([0, 5000, 9]), top_p=torch.tensor([1.0, 0.6, torch.nan])),
    "greedy": dict(temperature=torch.tensor([0.0, 1.0, 0.3]), top_k=5, top_p=0.99),
}


@pytest.mark.parametrize("V", [50, 4200])
@pytest.mark.parametrize("name", FILTERS)
def test_no_third_read(between: list[Change], name: str, V: int) -> None:
    """After the second one the rows may be anything: tokens and entropies are the reference's."""
    torch.manual_seed(11)  # a bracket may fail, seldom, and then the row is read again
    between.append(lose_the_rows)
    x = torch.randn(3, 2, V) * 3
    given = dict(dict(temperature=0.8), **FILTERS[name])
    for sampler, more in (
        ("gumbel", dict(confidence="random")),
        ("gumbel", ENTROPY),
        ("inverse_cdf", ENTROPY),
    ):
        got, want = (
            scored(x, backend, sampler=sampler, **given, **more)
            for backend in ("triton", "reference")
        )
        if sampler == "gumbel":  # the other draws from one chunk, which is lost
            assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.confidence, want.confidence, rtol=4e-6, atol=4e-6)


def test_no_third_read_of_a_window(between: list[Change], reads: list[int]) -> None:
    """``unmask``, whose rules may ask for the entropy themselves; what is edited stays edited."""
    between.append(lose_the_rows)
    torch.manual_seed(11)
    tokens, x = torch.tensor([[MASK, 9, MASK, MASK]] * 2), torch.randn(2, 4, 4500) * 3
    x[..., MASK] = 50.0
    ids = x.topk(6).indices
    edits: dict[str, Any] = dict(bias_ids=ids, bias=torch.randn(2, 4, 6) * 5, exclude_ids=[7])
    given: dict[str, Any] = dict(mask_id=MASK, rule="entropy", tempered=True, temperature=0.9)
    given |= dict(edits, sampler="gumbel", seed=SEEDS[:2], min_commit=2, return_proposals=True)
    for filters in (dict(top_k=50), dict(top_k=200, top_p=0.9, min_p=0.001), dict(min_p=0.01)):
        got, want = (
            pydecode.unmask(tokens, x.clone(), backend=backend, **given, **filters)
            for backend in ("triton", "reference")
        )
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0].tokens, want[0].tokens)
        torch.testing.assert_close(got[0].confidence, want[0].confidence, rtol=4e-6, atol=4e-6)
    assert not reads


@pytest.mark.parametrize("name", ["all", "joint", "some"])
def test_both_ways_agree(between: list[Change], reads: list[int], name: str) -> None:
    """Rows that are read again although they need not be: the same tokens, from the same noise."""
    torch.manual_seed(11)
    x = torch.randn(3, 2, 8200) * 3
    given = dict(dict(temperature=0.8), **FILTERS[name], **ENTROPY, sampler="gumbel")
    want = scored(x, "triton", **given)
    assert not reads
    between.append(trust_no_bracket)
    got = scored(x, "triton", **given)
    assert reads
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("row", ["flat", "infinite"])
@pytest.mark.usefixtures("between")
def test_rows_that_two_reads_do_not_tell(reads: list[int], row: str) -> None:
    """More ties than a chunk has room for, and entries at +inf."""
    x = (torch.randn(3, 2, 9001) * 2).round()
    if row == "infinite":
        x[:, :, [5, 4099, 9000]] = torch.inf
    for filters in (dict(top_p=0.7), dict(top_k=4000, min_p=0.01)):
        given = dict(ENTROPY, temperature=0.8, sampler="gumbel", **filters)
        got, want = (scored(x, backend, **given) for backend in ("triton", "reference"))
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.confidence, want.confidence, rtol=4e-6, atol=4e-6)
    assert reads


def test_equally_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest of several tokens, from whichever chunk: as with no noise at all."""
    import triton.language as tl
    from pydecode.triton_kernels import philox

    monkeypatch.setattr(philox, "gumbel_of", lambda x: x.to(tl.float32) * 0.0)
    x = torch.zeros(1, 3, 9001)
    for i, first in enumerate((40, 4100, 8300)):
        x[0, i, first::77] = 5.0
    for filters in (dict(top_k=10), dict(top_k=200), dict(min_p=0.5), dict(top_p=0.1)):
        got = scored(x, "triton", temperature=1.0, sampler="gumbel", **filters)
        assert got.tokens.tolist() == [[40, 4100, 8300]]


def test_bits_depend_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on its mates, nor on how many chunks a program takes."""
    from pydecode.triton_kernels import row_launches

    x = torch.randn(3, 1, 12400) * 2
    for filters in (dict(top_k=50, top_p=0.9), dict(min_p=0.01)):
        given = dict(ENTROPY, temperature=0.8, sampler="gumbel", backend="triton", **filters)
        want = pydecode.sample_and_score(x, seed=SEEDS, **given)
        for per in (1, 3):
            monkeypatch.setattr(row_launches, "chunks_to_narrow", lambda *_, per=per: per)
            got = pydecode.sample_and_score(x[1:2], seed=SEEDS[1:2], **given)
            assert all(torch.equal(a, b[1:2]) for a, b in zip(got, want))
