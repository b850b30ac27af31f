"""Custom masks of FlashInfer's paged prefill wrapper, and its packing of bits."""

from typing import Any

import numpy as np
import pytest
import torch
from peer_flashinfer_prefill import (
    Batch,
    Mask,
    flat,
    oracle,
    packed,
    random_batch,
    random_tree_mask,
)
from test_flashinfer_prefill import LENGTHS, close, plan, where, wrapper_for  # noqa: F401

import pydecode
from pydecode.compat.flashinfer import packbits, page_lists, segment_packbits


def random_masks(batch: Batch) -> Mask:
    return [random_tree_mask(Q, K) for Q, K in zip(batch.rows, batch.keys)]


GIVEN = {
    "bool": lambda mask: dict(custom_mask=flat(mask)),
    "uint8": lambda mask: dict(custom_mask=flat(mask).to(torch.uint8)),
    "packed": lambda mask: dict(packed_custom_mask=packed(mask)),
    # the peer ignores the bools then
    "both": lambda mask: dict(packed_custom_mask=packed(mask), custom_mask=~flat(mask)),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.usefixtures("where")
def test_random_masks(given: str, lengths: str) -> None:
    """``causal`` does not count beside a mask."""
    for window_left in (-1, 0, 2):
        batch = random_batch(*LENGTHS[lengths], spare=2)
        mask = random_masks(batch)
        causal = bool(torch.rand(()) < 0.5)
        wrapper = wrapper_for(batch, **GIVEN[given](mask), causal=causal, window_left=window_left)
        with pydecode.checks(lengths != "fewer_keys_than_rows"):
            got = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True)
        close(got, oracle(batch, mask=mask, window_left=window_left))


def test_many_small_batches() -> None:
    """Some thousand rows at every offset within a byte and a word."""
    for _ in range(40):
        rows = torch.randint(0, 12, (6,)).tolist()
        keys = [n + m for n, m in zip(rows, torch.randint(0, 20, (6,)).tolist())]
        batch = random_batch(rows, keys, Hq=1, D=2, Dv=1)
        mask = random_masks(batch)
        want = oracle(batch, mask=mask)
        for given in ("bool", "packed"):
            wrapper = wrapper_for(batch, **GIVEN[given](mask))
            close(wrapper.run(batch.q, (batch.k, batch.v), return_lse=True), want)


def test_rows_that_see_nothing() -> None:
    """Documented: out 0, lse -inf."""
    batch = random_batch([3, 2], [3, 2])
    mask = [[[False] * 3] * 3, [[True, False], [False, False]]]
    out, lse = wrapper_for(batch, custom_mask=flat(mask)).run_return_lse(
        batch.q, (batch.k, batch.v)
    )
    nothing = [0, 1, 2, 4]
    assert (out[nothing] == 0).all()
    assert (lse[nothing] == -torch.inf).all()
    assert torch.isfinite(lse[3]).all()


@pytest.mark.parametrize("given", ["bool", "packed"])
def test_masks_of_more_than_a_word(given: str) -> None:
    batch = random_batch([130, 3, 70], [140, 9, 70], Hq=1, page_size=16)
    mask = random_masks(batch)
    got = wrapper_for(batch, **GIVEN[given](mask)).run_return_lse(batch.q, (batch.k, batch.v))
    rows = [0, 63, 64, 65, 128, 129, 130, 132, 133, 197, 202]
    want = oracle(batch, mask=mask, only=set(rows))
    close((got[0][rows], got[1][rows]), (want[0][rows], want[1][rows]))


def test_a_plan_without_a_mask_forgets_the_last_one() -> None:
    """flashinfer #860, #1028, #2690; nor do plans of other batches leave anything."""
    wrapper = wrapper_for(random_batch([1], [1]))
    for n, kind in enumerate(("full", "mask", "mask", "full", "causal", "mask", "causal"), start=2):
        batch = random_batch([3] * (n % 4 + 1), [9, 4, 7, 3][: n % 4 + 1])
        mask = random_masks(batch) if kind == "mask" else None
        given = {} if mask is None else dict(custom_mask=flat(mask))
        plan(wrapper, batch, causal=kind == "causal", window_left=1, **given)
        got = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True)
        close(got, oracle(batch, mask=mask, causal=kind == "causal", window_left=1))


WRONG: dict[str, Any] = {
    "short": lambda mask: dict(custom_mask=flat(mask)[:-1]),
    "long": lambda mask: dict(custom_mask=torch.cat([flat(mask), flat(mask)])),
    "short_packed": lambda mask: dict(packed_custom_mask=packed(mask)[:-1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mask_of_the_wrong_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """flashinfer #3176: it reads past a short mask's end."""
    batch = random_batch([3, 2], [9, 4])
    given = WRONG[name](random_masks(batch))
    with pytest.raises(ValueError, match=f"{next(iter(given))}: expected .* got"):
        wrapper_for(batch, **given)
    monkeypatch.setattr(page_lists, "on_host", lambda x: False)
    wrapper = wrapper_for(batch, **given)
    assert wrapper.run(batch.q, (batch.k, batch.v)).isfinite().all()
    with pydecode.checks(True), pytest.raises(ValueError, match=next(iter(given))):
        wrapper_for(batch, **given)


def test_a_longer_packed_mask_is_a_buffer() -> None:
    batch = random_batch([3, 2], [9, 4])
    mask = random_masks(batch)
    longer = torch.cat([packed(mask), torch.full((9,), 255, dtype=torch.uint8)])
    got = wrapper_for(batch, packed_custom_mask=longer).run_return_lse(batch.q, (batch.k, batch.v))
    close(got, oracle(batch, mask=mask))


def test_a_mask_of_the_wrong_dtype() -> None:
    batch = random_batch([3, 2], [9, 4])
    with pytest.raises(TypeError, match="custom_mask"):
        wrapper_for(batch, custom_mask=flat(random_masks(batch)).float())
    with pytest.raises(TypeError, match="packed_custom_mask"):
        wrapper_for(batch, packed_custom_mask=packed(random_masks(batch)).int())


@pytest.mark.parametrize("given", ["bool", "packed"])
def test_a_hole_in_the_prefix_is_named_under_checks(given: str) -> None:
    batch = random_batch([3, 2], [9, 5])
    mask = random_masks(batch)
    with pydecode.checks(True):
        wrapper_for(batch, **GIVEN[given](mask))
    mask[1][1][2] = False
    message = "row 1 of request 1 that does not see key 2 of 3"
    with pydecode.checks(True), pytest.raises(ValueError, match=message):
        wrapper_for(batch, **GIVEN[given](mask))


@pytest.mark.parametrize("given", ["bool", "packed"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.usefixtures("where")
def test_whole_masks(given: str, lengths: str) -> None:
    """Any entry may be hidden."""
    for window_left in (-1, 0, 4):
        batch = random_batch(*LENGTHS[lengths], spare=2)
        mask = [(torch.rand(Q, K) < 0.6).tolist() for Q, K in zip(batch.rows, batch.keys)]
        rule: dict[str, Any] = dict(window_left=window_left, whole_mask=True, causal=True)
        with pydecode.checks(True):
            wrapper = wrapper_for(batch, **GIVEN[given](mask), **rule)
            got = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True)
        close(got, oracle(batch, mask=mask, window_left=window_left))


@pytest.mark.parametrize("rows", [[1026], [600, 600]], ids=str)
def test_masks_of_more_rows_than_tree_attention_takes(rows: list[int], where: str) -> None:  # noqa: F811
    """One request of 1026 rows may hide any key, for its mask is read whole."""
    batch = random_batch(rows, [n + 5 for n in rows], Hq=1, page_size=64)
    mask = random_masks(batch)
    if len(rows) == 1:
        mask[0][1] = [False, True] * 515 + [False]
    with pydecode.checks(where == "host"):
        wrapper = wrapper_for(batch, custom_mask=flat(mask))
    got = wrapper.run_return_lse(batch.q, (batch.k, batch.v))
    some = [0, 1, 511, 599, 600, 601, 1025]
    want = oracle(batch, mask=mask, only=set(some))
    close((got[0][some], got[1][some]), (want[0][some], want[1][some]))


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["big", "little"])
def test_packbits_is_numpys(order: Any) -> None:
    for n in (0, 1, 7, 8, 9, 64, 1001):
        x = torch.rand(n) < 0.5
        want = np.packbits(x.numpy(), bitorder=order)
        for given in (x, x.int() * 7, x.double()):
            got = packbits(given, order)
            assert got.dtype == torch.uint8
            assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.usefixtures("where")
def test_segment_packbits_is_numpys_by_segment(order: Any, dtype: torch.dtype) -> None:
    for sizes in ([4, 3, 4], [0, 8, 0, 1, 0], [], [0], [65, 64, 63], [9] * 50):
        indptr = torch.tensor([0, *sizes]).cumsum(0).to(dtype)
        x = torch.rand(int(indptr[-1])) < 0.5
        y, starts = segment_packbits(x, indptr, order)
        want = [np.packbits(part.numpy(), bitorder=order) for part in x.split(sizes)]
        end = sum(len(part) for part in want)
        assert starts.dtype == torch.int32
        assert starts.tolist() == [sum(map(len, want[:i])) for i in range(len(sizes) + 1)]
        assert y[:end].tolist() == [byte for part in want for byte in part.tolist()]
        exact = page_lists.on_host(x)
        assert y.shape[0] == (end if exact else (len(x) + 7 * len(sizes)) // 8)
        assert (y[end:] == 0).all()


def test_packbits_refuses() -> None:
    with pytest.raises(ValueError, match="bitorder"):
        packbits(torch.ones(3), "middle")
    with pytest.raises(ValueError, match="x"):
        segment_packbits(torch.ones(3, 3), torch.tensor([0, 9]))
