"""pydecode.compat.sglang.dllm against SGLang's rule: p > threshold, or else the surest one."""

import inspect
import math

import pytest
import torch
from torch import Tensor

from pydecode.compat.sglang.dllm import (
    calculate_low_confidence_score,
    dllm_post_process,
    dllm_post_process_fused,
)

V, L, MASK = 7, 8, 6


def expected(logits: Tensor, ids: list[int], threshold: float) -> list[int]:
    """One request; the mask is no choice."""
    sure = {}
    for i, x in enumerate(ids):
        if x == MASK:
            row = [y for v, y in enumerate(logits[i].tolist()) if v != MASK]
            weights = [math.exp(y - max(row)) for y in row]
            sure[i] = (1 / math.fsum(weights), row.index(max(row)))  # MASK is the last id
    filled = {i: token for i, (p, token) in sure.items() if p > threshold}
    if sure and not filled:
        first = max(sure, key=lambda i: (sure[i][0], -i))
        filled = {first: sure[first][1]}
    return [filled.get(i, x) for i, x in enumerate(ids)]


def blocks(B: int) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(B, L, V, dtype=torch.float64)
    logits[::3, 1::2] = logits[::3, :1]
    logits[torch.rand(B, L, V) < 0.1] = -torch.inf
    logits[..., 0].clamp_(min=-9)
    ids = torch.randint(0, V - 1, (B, L))
    ids[torch.rand(B, L) < torch.rand(B, 1)] = MASK
    return logits, ids


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95, 1.0])
def test_random_blocks_alone_and_batched(threshold: float) -> None:
    """0.95 is LowConfidence, 0.5 JointThreshold's unmasking."""
    logits, ids = blocks(300)
    want = [expected(z, x.tolist(), threshold) for z, x in zip(logits, ids)]
    single = ids[:40].clone()
    for b in range(40):  # their call: one request, a view of the flat ids
        assert (
            dllm_post_process_fused(logits[b], single.view(-1)[b * L : b * L + L], MASK, threshold)
            is None
        )
    assert single.tolist() == want[:40]
    flat = ids.view(-1)
    dllm_post_process_fused(logits.view(300, L, V), flat.view(300, L), MASK, threshold)
    assert flat.view(300, L).tolist() == want


def test_threshold_is_strict_and_may_be_a_tensor() -> None:
    logits = torch.zeros(2, 3, 2, dtype=torch.float64)
    logits[:, 1, 1] = 1.0
    ids = torch.full((2, 3), MASK)
    dllm_post_process(logits, ids, MASK, torch.tensor([0.5, 0.4]))
    assert ids.tolist() == [[MASK, 1, MASK], [0, 1, 0]]


def test_a_first_tile_without_anything_allowed() -> None:
    """Their running sum starts with exp(-inf + inf)."""
    logits = torch.full((2, 10_000), -torch.inf)
    logits[0, 9000], logits[0, 9001] = 3.0, 1.0
    logits[1, 9500] = 0.0
    ids = torch.full((2,), 11_000)
    dllm_post_process_fused(logits, ids, 11_000, 0.95)
    assert ids.tolist() == [11_000, 9500]
    dllm_post_process_fused(logits, ids, 11_000, 0.95)
    assert ids.tolist() == [9000, 9500]


def test_a_model_that_predicts_the_mask_ends() -> None:
    logits = torch.randn(L, V)
    logits[:, MASK] = 50.0
    ids = torch.full((L,), MASK)
    for _ in range(L):
        dllm_post_process_fused(logits, ids, MASK, 0.95)
    assert (ids != MASK).all()


def test_a_full_block_and_bad_rows_stay() -> None:
    logits, ids = torch.randn(L, V), torch.arange(L) % MASK
    before = ids.clone()
    dllm_post_process_fused(logits, ids, MASK, 0.0)
    assert torch.equal(ids, before)
    ids[:] = MASK
    logits[:] = -torch.inf
    logits[3] = torch.nan
    dllm_post_process_fused(logits, ids, MASK, 0.0)
    assert (ids == MASK).all()


def test_bf16_and_padded_vocabularies() -> None:
    whole = torch.randn(L, V + 5).bfloat16()
    ids = torch.full((L,), MASK)
    want = expected(whole[:, :V].double(), ids.tolist(), 0.3)
    dllm_post_process_fused(whole[:, :V], ids, MASK, 0.3)
    assert ids.tolist() == want


def test_signature() -> None:
    parameters = inspect.signature(dllm_post_process_fused).parameters
    assert list(parameters) == ["logits", "input_ids", "mask_id", "threshold", "autotune"]
    assert parameters["autotune"].default is True
    assert dllm_post_process is calculate_low_confidence_score is dllm_post_process_fused
