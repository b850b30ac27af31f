"""The tree ops in Triton, interpreted: walks, reranks and packed bits, against plain loops."""

from typing import Any

import pytest
import test_trees_dynamic as beams
import test_trees_masks as masks
import torch
from torch import Tensor

import pydecode
from pydecode import trees
from pydecode.reference import dynamic_tree as dynamic_reference
from pydecode.reference import mask_from_parents as parents_reference
from pydecode.reference import pack_mask as pack_reference

references = {
    "dynamic_tree": dynamic_reference.dynamic_tree,
    "mask_from_parents": parents_reference.mask_from_parents,
    "pack_mask": pack_reference.pack_mask,
}


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was called")

    modules = (dynamic_reference, parents_reference, pack_reference)
    for module, name in zip(modules, references):
        monkeypatch.setattr(module, name, refuse)


# ---- masks --------------------------------------------------------------------------------------


def hostile(B: int, T: int) -> Tensor:
    """Trees, chains and stars; parents that are none: itself, later ones, out of range, huge."""
    parents = torch.stack([torch.randint(-1, max(i, 1), (B,)) for i in range(T)], 1)
    bad = torch.tensor([-7, T, T + 5, 2**31, -(2**40), 2**62])[torch.randint(0, 6, (B, T))]
    parents = torch.where(torch.rand(B, T) < 0.1, bad, parents)
    later = (torch.arange(T) + torch.randint(0, 3, (B, T))).expand(B, T)  # itself and cycles
    parents = torch.where(torch.rand(B, T) < 0.05, later, parents)
    parents[0] = torch.arange(T) - 1  # a chain, as deep as can be
    return parents


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200, 1024])
def test_masks(T: int) -> None:
    parents = hostile(3, T)
    want = references["mask_from_parents"]
    assert torch.equal(trees.mask_from_parents(parents, backend="triton"), want(parents))
    narrow = parents.clamp(-(2**31), 2**31 - 1).int()
    strided = torch.stack([narrow] * 3, -1)[..., 1]
    assert torch.equal(trees.mask_from_parents(strided, backend="triton"), want(parents))
    assert torch.equal(
        trees.mask_from_parents(parents[None, :, None], backend="triton")[0, :, 0], want(parents)
    )
    assert torch.equal(trees.mask_from_parents(parents[1], backend="triton"), want(parents[1]))


def test_no_mask() -> None:
    for shape in ((0, 5), (3, 0), (0,), (2, 0, 4)):
        got = trees.mask_from_parents(torch.zeros(shape, dtype=torch.int64), backend="triton")
        assert got.shape == (*shape, -(-shape[-1] // 64))
    with pytest.raises(pydecode.BackendUnavailable, match="up to 4096 nodes, got 5000"):
        trees.mask_from_parents(torch.zeros(1, 5000, dtype=torch.int64), backend="triton")


@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 130])
def test_pack(N: int) -> None:
    want = references["pack_mask"]
    mask = torch.rand(2, 3, N, N) < 0.5
    mask[0, 0] = True  # bit 63, the sign
    for x in (
        mask,
        mask[0],
        mask[0, 0],
        mask.mT,
        mask.transpose(0, 1),
        mask[:1].expand(4, 3, N, N),
    ):
        assert torch.equal(trees.pack_mask(x, backend="triton"), want(x))
    padded = torch.rand(2, N, N + 7) < 0.5
    assert torch.equal(trees.pack_mask(padded[..., 3 : N + 3], backend="triton"),
                       want(padded[..., 3 : N + 3]))  # fmt: skip
    assert trees.pack_mask(mask[:0], backend="triton").shape == (0, 3, N, -(-N // 64))
    assert trees.pack_mask(mask[..., :0, :0], backend="triton").shape == (2, 3, 0, 0)


def test_walks() -> None:
    masks_of = torch.stack([torch.randint(-1, max(i, 1), (4,)) for i in range(70)], 1)
    packed = trees.mask_from_parents(masks_of, backend="triton")
    for b in range(4):
        for i, row in enumerate(packed[b].tolist()):
            assert row == masks.words(masks.walk(masks_of[b].tolist(), i), 70)


# ---- the rerank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 7, 60, 200, 1024])
def test_any_beam(M: int) -> None:
    """Ties, NaN, infinities, signed zeros, absent entries, children that outrank their parents."""
    B = 3
    values = torch.tensor([0.0, -0.0, -0.5, -1.0, 1.0, -torch.inf, torch.inf, torch.nan, 1e-42])
    scores = values[torch.randint(0, len(values), (B, M))]
    scores[0] = -torch.rand(M) * 9
    tokens, parents = torch.randint(-1, 30, (B, M)), hostile(B, M)
    parents[0] = torch.stack([torch.randint(0, max(i, 1), ()) for i in range(M)])
    reference = references["dynamic_tree"]
    for num_nodes in {1, (M + 1) // 2, M}:
        for dtype in (torch.float32, torch.bfloat16):
            want = reference(scores.to(dtype), tokens, parents, num_nodes)
            got = trees.dynamic(
                scores.to(dtype), tokens, parents, num_nodes=num_nodes, backend="triton"
            )
            for x, y in zip((got.parents, got.depths, got.mask, got.choice), want):
                assert torch.equal(x, y)


def test_a_shared_tree_any_strides() -> None:
    scores, tokens, parents = beams.beams(3, 3, 4)
    wide = torch.stack([scores.half().float()] * 2, -1)[..., 0]
    got = trees.dynamic(
        wide, tokens.int().mT.contiguous().mT, parents[:1].int(), num_nodes=9, backend="triton"
    )
    want = references["dynamic_tree"](wide, tokens, parents[:1], 9)
    assert torch.equal(got.mask, want[2])
    assert torch.equal(got.choice, want[3])
    got = trees.dynamic(scores.half(), tokens, parents, num_nodes=9, backend="triton")
    assert torch.equal(got.choice, references["dynamic_tree"](scores.half(), tokens, parents, 9)[3])
    none = trees.dynamic(wide[:0], tokens[:0], parents[:0], num_nodes=4, backend="triton")
    assert none.mask.shape == (0, 4, 1)
    big = torch.zeros(1, 2049)
    with pytest.raises(pydecode.BackendUnavailable, match="up to 2048 nodes"):
        trees.dynamic(big, big.long(), big.long(), num_nodes=4, backend="triton")
