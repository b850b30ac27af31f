"""dInfer's decoders, step by step, against their documented rules in plain loops."""

from typing import Any

import pytest
import torch
from fake_diffusion import MASK
from peer_diffusion import (
    cases,
    credit,
    dinfer_threshold,
    fixed,
    hierarchy,
    masked_rows,
    proposals,
)
from peer_diffusion_loops import quotas
from reads import Reads
from torch import Tensor

from pydecode.compat.diffusion.dinfer import (
    CreditThresholdParallelDecoder,
    FixedParallelDecoder,
    HierarchyDecoder,
    ThresholdParallelDecoder,
)

START, END = 3, 9


class TokenArray:
    """dInfer's: indexing goes to ``data``."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __getitem__(self, at: Any) -> Tensor:
        return self.data[at]

    def __setitem__(self, at: Any, values: Tensor) -> None:
        self.data[at] = values


def start(B: int) -> Tensor:
    """[B, 12], masked from START on."""
    x = torch.randint(0, MASK, (B, 12))
    x[:, START:] = MASK
    return x


def model_of(B: int, sure: float = 3.0) -> Tensor:
    logits = torch.randn(B, END - START, 24, dtype=torch.float64) * sure
    logits[..., MASK] = -40.0
    return logits


def expect_step(x: Tensor, before: Tensor, logits: Tensor, choose: Any) -> None:
    """x's block is before's with the chosen positions filled; all else is untouched."""
    want = before.clone()
    masked = masked_rows(before[:, START:END] == MASK)
    for b, rows in enumerate(masked):
        token, c, _ = proposals(logits[b], rows)
        for i in choose(b, c):
            want[b, START + i] = token[i]
    assert x.tolist() == want.tolist()


@pytest.mark.parametrize("wrapped", [False, True])
def test_threshold(wrapped: bool) -> None:
    decoder = ThresholdParallelDecoder(0, 0.8, mask_id=MASK, eos_id=1, use_float64=True)
    x = start(25)
    for step in range(END - START):
        before, logits = x.clone(), model_of(25)
        bar = None if step % 2 else 0.5
        decoder.decode(logits, START, END, TokenArray(x) if wrapped else x, bar)
        expect_step(x, before, logits, lambda b, c: dinfer_threshold(c, bar or 0.8))  # noqa: B023
    assert not (x[:, START:END] == MASK).any()
    assert (x[:, END:] == MASK).all()


@pytest.mark.parametrize("low", [None, 0.4])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_hierarchy(threshold: float | None, low: float | None) -> None:
    """Theirs asserts a batch of one."""
    decoder = HierarchyDecoder(0, mask_id=MASK, threshold=threshold, low_threshold=low)
    x = start(25)
    decoder.block_init(x[:, START:END], 0)
    for _ in range(END - START):
        before, logits = x.clone(), model_of(25, 1.0)
        decoder.decode(logits, START, END, x)
        expect_step(x, before, logits, lambda b, c: hierarchy(c, threshold, low))
    assert not (x[:, START:END] == MASK).any()


def test_fixed() -> None:
    """Theirs fails in block_init, on undefined names."""
    decoder = FixedParallelDecoder(0, 4, mask_id=MASK)
    x = start(20)
    x[::2, START] = 5
    decoder.block_init(x[:, START:END], 0)
    schedule = [quotas(int(m), 4) for m in (x[:, START:END] == MASK).sum(1)]
    for i in range(4):
        before, logits = x.clone(), model_of(20)
        decoder.decode(logits, START, END, x)
        expect_step(x, before, logits, lambda b, c: fixed(c, schedule[b][i]))  # noqa: B023
    assert not (x[:, START:END] == MASK).any()


@pytest.mark.parametrize("wrapped", [False, True])
def test_credit(wrapped: bool) -> None:
    """The sparse credit is the dense matrix of theirs, through two blocks and a second run."""
    alpha, gamma, beta = 3.0, 0.2, 0.8
    decoder = CreditThresholdParallelDecoder(
        credit_alpha=alpha, temperature=0, threshold=2.0, mask_id=MASK
    )
    mattered = 0
    for _ in range(2):
        x, dense = start(12), torch.zeros(12, 6, 24, dtype=torch.float64)
        x[:, END:] = 5
        steady = model_of(12, 1.0)
        while (x == MASK).any():
            before, logits = x.clone(), steady + model_of(12, 0.7)
            logits[..., MASK] = -40.0
            masked = before[:, START:END] == MASK
            fused = credit(logits, dense, masked, alpha, gamma, beta)
            decoder.decode(logits, START, END, TokenArray(x) if wrapped else x)
            expect_step(x, before, fused, lambda b, c: dinfer_threshold(c, 2.0))
            mattered += int((fused.argmax(-1) != logits.argmax(-1))[masked].sum())
    assert mattered > 0  # else this says nothing


def test_credit_of_another_block_is_its_own() -> None:
    one = CreditThresholdParallelDecoder(temperature=0, threshold=0.9, mask_id=MASK)
    x = start(4)
    one.decode(model_of(4), START, END, x)
    y = x.clone()
    logits = torch.randn(4, 3, 24, dtype=torch.float64)
    one.decode(logits, END, 12, x)
    fresh = CreditThresholdParallelDecoder(temperature=0, threshold=0.9, mask_id=MASK)
    fresh.decode(logits, END, 12, y)
    assert x.tolist() == y.tolist()


def test_credit_ends_with_the_masks_of_its_request() -> None:
    """A request that is filled starts anew, also while others of its batch have masks."""
    decoder = CreditThresholdParallelDecoder(temperature=0, threshold=2.0, mask_id=MASK)
    x, logits = start(2), model_of(2, 1.0)
    x[:, END:] = 5
    x[0, START + 1 :] = 5
    decoder.decode(logits, START, END, x)  # fills request 0, and one row of request 1
    assert (x == MASK).sum(1).tolist() == [0, END - START - 1]
    x[0, START:END] = MASK
    fresh, alone = CreditThresholdParallelDecoder(temperature=0, threshold=2.0, mask_id=MASK), x[:1]
    once = alone.clone()
    fresh.decode(logits[:1], START, END, once)
    decoder.decode(logits, START, END, x)
    for mine, want in ((decoder._ids, fresh._ids), (decoder._credit, fresh._credit)):
        assert torch.equal(mine[:1], want)
    assert x[:1].tolist() == once.tolist()
    assert (decoder._credit[1].amax(-1) > 1).any()  # request 1 kept what it had


def test_a_graph_may_hold_a_step() -> None:
    """What a step reads of the one before lies where it lay, and no number counts its steps."""
    decoder = CreditThresholdParallelDecoder(temperature=0, threshold=2.0, mask_id=MASK)
    x = start(2)
    places = []
    for _ in range(3):
        decoder.decode(model_of(2), START, END, x)
        state = (decoder._ids, decoder._credit, decoder._masks)
        places.append([t.data_ptr() for t in state])
    assert places[0] == places[1] == places[2]


DECODERS: dict[str, Any] = {
    "threshold": lambda **more: ThresholdParallelDecoder(threshold=0.9, mask_id=MASK, **more),
    "credit": lambda **more: CreditThresholdParallelDecoder(threshold=0.9, mask_id=MASK, **more),
    "hierarchy": lambda **more: HierarchyDecoder(threshold=0.9, mask_id=MASK, **more),
}


@pytest.mark.parametrize("name", DECODERS)
def test_all_rows_prefer_the_mask(name: str) -> None:
    """dInfer's threshold decoders take nothing then, and their loop hangs."""
    decoder, x, logits = DECODERS[name](temperature=0), start(9), model_of(9)
    logits[..., MASK] = 50.0
    left = [int((x[:, START:END] == MASK).sum())]
    while left[-1]:
        decoder.decode(logits, START, END, x)
        left.append(int((x[:, START:END] == MASK).sum()))
        assert left[-1] <= left[-2] - 1
    assert len(left) <= 7


@pytest.mark.parametrize("name", DECODERS)
def test_reads_nothing(name: str) -> None:
    decoder, x = DECODERS[name](temperature=0.5), start(4)
    with Reads() as reads:
        decoder.block_init(x[:, START:END], 0)
        decoder.decode(torch.randn(4, 12, 24)[:, START:END], START, END, x)
    assert reads.count == 0


@pytest.mark.parametrize("name", DECODERS)
def test_draws(name: str) -> None:
    logits, x = torch.zeros(40, 6, 24, dtype=torch.float64), start(40)
    logits[..., MASK] = -40.0

    def once(**seed: Any) -> list[list[int]]:
        decoder, y = DECODERS[name](temperature=1.0, **seed), x.clone()
        for _ in range(2):
            decoder.decode(logits, START, END, y)
        return y.tolist()

    torch.manual_seed(5)
    first = once()
    assert first != once()
    torch.manual_seed(5)
    assert first == once()
    assert once(seed=3) == once(seed=3) != once(seed=4)
    decoder, y = DECODERS[name](temperature=1.0, seed=3), x.clone()
    decoder.decode(logits, START, END, y)
    z = x.clone()
    decoder.decode(logits, START, END, z)
    assert y.tolist() != z.tolist()  # a seed moves on by itself


def test_logits_of_another_width() -> None:
    how: dict[str, Any] = dict(temperature=0, threshold=0.9, mask_id=MASK)
    for make in (ThresholdParallelDecoder, CreditThresholdParallelDecoder):
        with pytest.raises(ValueError, match=r"logits: expected shape \[B, L, V\]"):
            make(**how).decode(model_of(2), START, END + 1, start(2))


def test_cases_are_what_they_seem() -> None:
    logits, mask_index, x = cases(50, 6)
    assert ((x == MASK) == mask_index).all()
    assert logits[..., MASK].max() < -30
