"""The peers' transfer functions at temperature 0 against their documented rules in plain loops."""

import pytest
import torch
from fake_diffusion import MASK
from peer_diffusion import (
    cases,
    dinfer_threshold,
    expect_transfer,
    fast_factor,
    fast_threshold,
    fixed,
    hierarchy,
    low_entropy,
)
from transfer_calls import LOW, NAMES, call_of

from pydecode.compat.diffusion.dinfer import (
    get_transfer_index_hierarchy_fast_v2,
    get_transfer_index_threshold,
)
from pydecode.compat.diffusion.dparallel import get_transfer_index_entropy
from pydecode.compat.diffusion.fast_dllm import get_transfer_index, get_transfer_index_dynamic
from pydecode.compat.diffusion.llada import get_num_transfer_tokens

GREEDY = (0.0, LOW)


def test_schedule() -> None:
    mask_index = torch.rand(50, 17) < torch.rand(50, 1)
    for steps in (1, 3, 17, 20):
        got = get_num_transfer_tokens(mask_index, steps)
        assert (got.dtype, got.shape) == (torch.int64, (50, steps))
        for row, m in zip(got.tolist(), mask_index.sum(1).tolist()):
            want = [0] * steps
            for n in range(m):  # dealt out one by one
                want[n % steps] += 1
            assert row == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.9, 1.5])
def test_fast_dllm(threshold: float | None, dtype: torch.dtype) -> None:
    """Theirs is fp64 whatever the logits are; fp32 is enough to rank the same logits alike."""
    logits, *rest = cases(400, 11)
    case = (logits.to(dtype), *rest)
    k = torch.randint(0, 13, (400,))
    got = get_transfer_index(case[0], *GREEDY, *case[1:], k, threshold, mask_id=MASK)
    if threshold is None:
        expect_transfer(got, case, lambda b, c, h: fixed(c, int(k[b])))
    else:
        expect_transfer(got, case, lambda b, c, h: fast_threshold(c, threshold))


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("factor", [0.1, 1, 2.5])
def test_fast_dllm_factor(factor: float, quirk: bool) -> None:
    case = cases(400, 7)
    got = get_transfer_index_dynamic(
        case[0], *GREEDY, *case[1:], None, factor, bug_compatible=quirk, mask_id=MASK
    )
    expect_transfer(got, case, lambda b, c, h: fast_factor(c, factor, quirk))


def test_the_quirk_changes_tokens() -> None:
    """Two masks, the second hopeless: the paper keeps it, theirs takes it."""
    logits = torch.zeros(1, 2, 24)
    logits[0, 0, 5] = 20.0
    masked, x = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), MASK)
    for quirk in (False, True):
        got = get_transfer_index_dynamic(
            logits, *GREEDY, masked, x, None, 1, bug_compatible=quirk, mask_id=MASK
        )
        assert got[1].tolist() == [[True, quirk]]


@pytest.mark.parametrize("threshold", [None, 0.3, 1.2])
def test_dparallel(threshold: float | None) -> None:
    case = cases(400, 9)
    k = torch.randint(0, 10, (400, 1))
    got = get_transfer_index_entropy(case[0], *GREEDY, *case[1:], k, threshold, mask_id=MASK)
    if threshold is None:
        lowest = lambda b, c, h: fixed({i: -v for i, v in h.items()}, int(k[b]))  # noqa: E731
        expect_transfer(got, case, lowest)
    else:
        expect_transfer(got, case, lambda b, c, h: low_entropy(h, threshold))


@pytest.mark.parametrize("threshold", [0.3, 0.9, 2.0])
def test_dinfer_threshold(threshold: float) -> None:
    case = cases(400, 9)
    case[0][:, 4:6] = case[0][:, 2:3]  # ties, which go together
    case[0][:, 6] = case[0][:, 2] * (1 + 1e-6)  # and near ties
    got = get_transfer_index_threshold(case[0], 0.0, *case[1:], MASK, threshold)
    expect_transfer(got, case, lambda b, c, h: dinfer_threshold(c, threshold))


@pytest.mark.parametrize("threshold", [None, 0.8, 0.2])
@pytest.mark.parametrize("low", [None, 0.5])
def test_dinfer_hierarchy(threshold: float | None, low: float | None) -> None:
    case = cases(400, 13)
    got = get_transfer_index_hierarchy_fast_v2(
        case[0], *GREEDY, *case[1:], None, MASK, threshold, low
    )
    expect_transfer(got, case, lambda b, c, h: hierarchy(c, threshold, low))


def test_dinfer_hierarchy_with_a_schedule() -> None:
    case = cases(100, 6)
    k = torch.randint(0, 4, (100,))
    got = get_transfer_index_hierarchy_fast_v2(case[0], *GREEDY, *case[1:], k, MASK)
    expect_transfer(got, case, lambda b, c, h: fixed(c, int(k[b])))
    with pytest.raises(ValueError, match="threshold"):
        get_transfer_index_hierarchy_fast_v2(case[0], *GREEDY, *case[1:], k, MASK, 0.5)
    with pytest.raises(NotImplementedError, match="remasking"):
        get_transfer_index_hierarchy_fast_v2(case[0], 0.0, "random", *case[1:], k, MASK)


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_prefer_the_mask(name: str) -> None:
    """A peer proposes it and gets nowhere; ours proposes the next best."""
    logits, masked, x = cases(20, 5)
    logits[..., MASK] = 50.0
    x0, taken = call_of(name, 0.0)(logits, masked, x)
    assert not ((x0 == MASK) & masked).any()
    assert taken.any(1).tolist() == masked.any(1).tolist()
    without = logits.clone()
    without[..., MASK] = -torch.inf
    for got, want in zip((x0, taken), call_of(name, 0.0)(without, masked, x)):
        assert got.tolist() == want.tolist()


def test_the_mask_competes_if_asked() -> None:
    logits, masked, x = cases(5, 4)
    logits[..., MASK] = 50.0
    x0, _ = get_transfer_index(logits, *GREEDY, masked, x, None, 0.9, mask_id=None)
    assert ((x0 == MASK) == masked).all()
    x0, _ = get_transfer_index_threshold(logits, 0.0, masked, x, MASK, 0.9, rm_mask=False)
    assert ((x0 == MASK) == masked).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_masked_are_not_read(name: str) -> None:
    case = cases(20, 6)
    want = call_of(name, 0.0)(*case)
    poisoned = torch.where(case[1][..., None], case[0], torch.nan)
    for got, x in zip(call_of(name, 0.0)(poisoned, *case[1:]), want):
        assert got.tolist() == x.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_with_nan_waits(name: str) -> None:
    logits, masked, x = cases(20, 6)
    masked[:, 2] = True
    logits[:, 2, 3] = torch.nan
    x0, taken = call_of(name, 0.0)(logits, masked, x)
    assert not taken[:, 2].any()
    assert x0[:, 2].tolist() == x[:, 2].tolist()


VIEWS = {
    "slice of L": lambda l: torch.cat([l, l.new_full((20, 3, 24), 99.0)], 1)[:, :6],
    "rows of wider rows": lambda l: torch.cat([l, l.new_full((20, 6, 8), 99.0)], 2)[..., :24],
    "L before B": lambda l: l.transpose(0, 1).contiguous().transpose(0, 1),
    "one row for all": lambda l: l[:1, :1].expand(20, 6, 24),
    "one request for all": lambda l: l[:1].expand(20, 6, 24),
    "every second request": lambda l: torch.stack([l, l * 0], 1).flatten(0, 1)[::2],
    "uneven strides": lambda l: l.new_zeros(7000).as_strided((20, 6, 24), (331, 50, 1)).copy_(l),
}


@pytest.mark.parametrize("view", VIEWS)
def test_logits_of_any_strides(view: str) -> None:
    case = cases(20, 6)
    logits = VIEWS[view](case[0])
    got = call_of("fixed", 0.0)(logits, *case[1:])
    want = call_of("fixed", 0.0)(logits.clone(memory_format=torch.contiguous_format), *case[1:])
    for x, y in zip(got, want):
        assert x.tolist() == y.tolist()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_empty(shape: tuple[int, int]) -> None:
    B, L = shape
    logits, masked = torch.randn(B, L, 24), torch.ones(B, L, dtype=torch.bool)
    for name in NAMES:
        x0, taken = call_of(name, 0.0)(logits, masked, torch.full((B, L), MASK))
        assert x0.shape == taken.shape == (B, L)
        assert taken.all()


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit(name: str) -> None:
    logits, mask_index, x = cases(3, 4)
    call = call_of(name, 0.0)
    for bad in (
        (logits, mask_index[:1], x),  # would be taken for every request's
        (logits, mask_index, x[:, :2]),
        (logits[0], mask_index[0], x[0]),
    ):
        with pytest.raises(ValueError, match="logits, mask_index, x: expected"):
            call(*bad)
    with pytest.raises(TypeError, match="mask_index: expected dtype bool"):
        call(logits, mask_index.long(), x)


def test_neither_schedule_nor_threshold() -> None:
    logits, mask_index, x = cases(3, 4)
    for function in (get_transfer_index, get_transfer_index_entropy):
        with pytest.raises(TypeError, match="num_transfer_tokens: expected"):
            function(logits, *GREEDY, mask_index, x, None, mask_id=MASK)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_remasking(name: str) -> None:
    if name != "dinfer":
        with pytest.raises(NotImplementedError, match="remasking"):
            call_of(name, 0.0, "sure")(*cases(3, 4))
