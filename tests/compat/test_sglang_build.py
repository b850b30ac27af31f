"""build_tree_kernel_efficient and reconstruct_indices_from_tree_mask against SGLang's loops."""

from typing import Any

import peer_sglang as peer
import pytest
import torch
from torch import Tensor

from pydecode import trees
from pydecode.compat.sglang import (
    TreeMaskMode,
    build_tree_kernel_efficient,
    reconstruct_indices_from_tree_mask,
)

# topk, depth, nodes: SGLang's usual ones, chains, one step, a tree of the root alone, 8/9/16/17/32
SHAPES = [
    (4, 3, 8),
    (8, 4, 32),
    (3, 2, 9),
    (4, 3, 16),
    (1, 5, 6),
    (5, 1, 4),
    (2, 1, 1),
    (3, 5, 17),
    (9, 3, 70),
]


def beam(B: int, topk: int, depth: int, ndt: int) -> tuple[Tensor, Tensor]:
    """An EAGLE-2 draft's parent_list and selected_index, as SGLang's draft loop makes them."""
    score = torch.rand(B, topk)
    history, parents = [score], [torch.arange(-1, topk).expand(B, -1)]
    for step in range(1, depth):
        grown = (score[:, :, None] * torch.rand(B, topk, topk)).flatten(1)
        score, best = grown.topk(topk)
        history.append(grown)
        parents.append(best + topk**2 * (step - 1) + topk)
    selected = torch.cat(history, 1).topk(ndt - 1).indices.sort().values
    above = torch.cat(parents[:-1], 1) if depth > 1 else torch.empty(B, 0, dtype=torch.int64)
    return above, selected


class Buffers:
    """What the caller hands over, full of other values."""

    def __init__(self, B: int, ndt: int, mask: Tensor) -> None:
        self.mask, self.positions = mask, torch.full((B * ndt,), -99)
        self.index, self.next_token, self.next_sibling = torch.full((3, B, ndt), -1)

    def __call__(self) -> tuple[Tensor, ...]:
        return self.mask, self.positions, self.index, self.next_token, self.next_sibling


def noise(size: int) -> Tensor:
    return torch.rand(size) < 0.5


def build(
    above: Tensor, selected: Tensor, lengths: Tensor, topk: int, depth: int, mode: int, mask: Tensor
) -> Buffers:
    B, ndt = selected.shape[0], selected.shape[1] + 1
    buffers = Buffers(B, ndt, mask)
    build_tree_kernel_efficient(
        above, selected, lengths, *buffers(), topk, depth, ndt, tree_mask_mode=mode
    )
    return buffers


def peers(above: Tensor, selected: Tensor, lengths: Tensor, topk: int) -> list[peer.Built]:
    rows = zip(above.tolist(), selected.tolist(), lengths.tolist())
    return [peer.build_tree(*row, topk) for row in rows]


def expect_links(got: Buffers, want: list[peer.Built]) -> None:
    B, ndt = got.index.shape
    assert got.index.tolist() == torch.arange(B * ndt).view(B, ndt).tolist()
    assert got.next_token.tolist() == [x.first_child for x in want]
    assert got.next_sibling.tolist() == [x.next_sibling for x in want]
    for positions, x in zip(got.positions.view(B, ndt).tolist(), want):
        assert [p for p, w in zip(positions, x.positions) if w != peer.INVALID] == [
            w for w in x.positions if w != peer.INVALID
        ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mask_mode(shape: tuple[int, int, int]) -> None:
    (topk, depth, ndt), B = shape, 60 if shape[2] < 64 else 8
    above, selected = beam(B, topk, depth, ndt)
    lengths = torch.randint(0, 9, (B,))
    want = peers(above, selected, lengths, topk)
    sees = [x.sees for x in want]

    # the prefix and the tail of a longer buffer keep what is in them
    given = noise(int(lengths.sum()) * ndt + B * ndt * ndt + 5)
    got = build(above, selected, lengths, topk, depth, TreeMaskMode.FULL_MASK, given.clone())
    expect_links(got, want)
    at = 0
    for length, rows in zip(lengths.tolist(), sees):
        for row in rows:
            assert torch.equal(got.mask[at : at + length], given[at : at + length])
            assert got.mask[at + length : at + length + ndt].tolist() == row
            at += length + ndt
    assert torch.equal(got.mask[at:], given[at:])

    given = noise(B * ndt * ndt + 5)
    got = build(above, selected, lengths, topk, depth, 1, given.clone())
    expect_links(got, want)
    assert got.mask[:-5].view(B, ndt, ndt).tolist() == sees
    assert torch.equal(got.mask[-5:], given[-5:])

    if ndt > 32:
        return
    size = 1 if ndt <= 8 else 2 if ndt <= 16 else 4
    dtype = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[size]
    for mask in (torch.zeros(B * ndt, dtype=dtype), torch.zeros(B * ndt * size + 3).byte()):
        got = build(above, selected, lengths, topk, depth, 2, mask)
        expect_links(got, want)
        rows = got.mask.view(torch.uint8)[: B * ndt * size].view(B, ndt, size).tolist()
        for b in range(B):
            for i in range(ndt):
                bits = sum(seen << j for j, seen in enumerate(sees[b][i]))
                assert rows[b][i] == list(bits.to_bytes(size, "little"))


@pytest.mark.parametrize(("B", "topk", "ndt"), [(400, 3, 8), (10, 8, 66)])
def test_parents_that_were_not_selected(B: int, topk: int, ndt: int) -> None:
    """NaN scores: any ascending selection, where theirs walks out of its arrays."""
    depth = 4
    above, _ = beam(B, topk, depth, ndt)
    scores = torch.rand(B, topk + topk**2 * (depth - 1))
    selected = scores.topk(ndt - 1).indices.sort().values
    lengths = torch.randint(0, 9, (B,))
    want = peers(above, selected, lengths, topk)
    got = build(above, selected, lengths, topk, depth, 1, noise(B * ndt * ndt))
    expect_links(got, want)
    mask = got.mask.view(B, ndt, ndt)
    assert mask[:, :, 0].all()
    assert mask.diagonal(dim1=1, dim2=2).all()
    positions = (got.positions.view(B, ndt) - lengths[:, None]).tolist()
    orphans = 0
    for b, x in enumerate(want):
        assert [row for row, p in zip(mask[b].tolist(), x.positions) if p != peer.INVALID] == [
            row for row, p in zip(x.sees, x.positions) if p != peer.INVALID
        ]
        linked = {*x.first_child, *x.next_sibling}
        orphans += sum(i not in linked for i in range(1, ndt))
        assert all(positions[b][i] == 0 for i in range(1, ndt) if i not in linked)
    assert orphans > 100
    # and no walk from the root gets there
    reached = trees.from_links(got.next_token, got.next_sibling)[1]
    assert (reached >= 0).sum(1).tolist() == [
        sum(p != peer.INVALID for p in x.positions) for x in want
    ]


def test_hostile_selections_stay_in_bounds() -> None:
    above, selected = beam(4, 3, 3, 8)
    selected[0, -1], selected[1, 3], selected[2] = 10**9, -5, 2
    got = build(above, selected, torch.tensor([5, 2, 0, 3]), 3, 3, 1, noise(4 * 64))
    assert got.next_token.max() < 8
    assert got.next_token.min() >= -1
    assert got.next_sibling.max() < 8
    alone = build(above[3:], selected[3:], torch.tensor([3]), 3, 3, 1, noise(64))
    assert torch.equal(got.mask.view(4, 8, 8)[3], alone.mask.view(8, 8))
    assert torch.equal(got.next_token[3:], alone.next_token)


@pytest.mark.parametrize(
    "lengths", [[1, 2, 3], [0, 3, 10**12], [2, 10**12, 1], [0, -9, 4], [-70, 3, 3]]
)
@pytest.mark.parametrize("fill", [False, True])
def test_full_mask_never_leaves_its_buffer(lengths: list[int], fill: bool) -> None:
    """Buffers of any length, too short ones too: what is in reach is right, entry 0 included."""
    above, selected = beam(3, 2, 2, 3)
    sees = [x.sees for x in peers(above, selected, torch.tensor([0, 0, 0]), 2)]
    for size in range(1, 46):
        mask = torch.full((size,), fill)
        got = build(above, selected, torch.tensor(lengths), 2, 2, 0, mask)
        want, start = [fill] * size, 0
        for length, rows in zip(lengths, sees):
            for i, row in enumerate(rows):
                for j, seen in enumerate(row):
                    at = start + i * (length + 3) + length + j
                    if 0 <= at < size:
                        want[at] = seen
            start += 3 * (length + 3)
        assert got.mask.tolist() == want


def test_int32_and_an_empty_batch() -> None:
    above, selected = beam(3, 4, 3, 8)
    lengths = torch.tensor([3, 0, 7])
    for mode, size in ((0, 8 * 34), (1, 192), (2, 24)):
        mask = torch.zeros(size, dtype=torch.uint8 if mode == 2 else torch.bool)
        want = build(above, selected, lengths, 4, 3, mode, mask.clone())()
        got = build(above.int(), selected.int(), lengths.int(), 4, 3, mode, mask)()
        assert all(torch.equal(x, y) for x, y in zip(got, want))
    for mode in (0, 1, 2):
        build(above[:0], selected[:0], lengths[:0], 4, 3, mode, torch.ones(0).bool())


def test_reconstruct_from_the_mask() -> None:
    for B, n in ((200, 8), (30, 33), (3, 1)):
        parents = (torch.rand(B, n) * torch.arange(n)).long() - (torch.arange(n) == 0).long()
        mask = trees.unpack_mask(trees.mask_from_parents(parents), n)
        mask = mask | noise(n * n).view(n, n).triu(1)  # right of the diagonal nothing is read
        lengths = torch.randint(0, 99, (B,))
        for given in (mask, mask.flatten()):
            got = Buffers(B, n, given.clone())
            got.next_token.fill_(5)  # no prefill needed
            got.next_sibling.fill_(5)
            args = got()
            reconstruct_indices_from_tree_mask(args[0], lengths, *args[1:], B, n)
            assert torch.equal(got.mask, given)
            assert got.index.tolist() == torch.arange(B * n).view(B, n).tolist()
            want = [peer.lists(row) for row in parents.tolist()]
            assert got.next_token.tolist() == [row[0] for row in want]
            assert got.next_sibling.tolist() == [row[1] for row in want]
            depths = trees.depths(parents) + lengths[:, None]
            assert torch.equal(got.positions, depths.flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(draft_token_num=7), "draft_token_num: expected retrive_index"),
        (dict(selected_index=torch.zeros(2, 6).long()), "selected_index: expected shape"),
        (dict(depth=4), r"parent_list: expected topk \* \(depth - 1\) \+ 1 = 13 columns, got 9"),
        (dict(tree_mask=torch.ones(127).bool()), "tree_mask: expected at least 2 x 8 x 8"),
        (dict(tree_mask_mode=3), "tree_mask_mode: expected 0, 1 or 2, got 3"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    above, selected = beam(2, 4, 3, 8)
    names = ("tree_mask", "positions", "retrive_index", "retrive_next_token")
    call: dict[str, Any] = dict(
        zip((*names, "retrive_next_sibling"), Buffers(2, 8, torch.ones(128).bool())()),
        parent_list=above,
        selected_index=selected,
        verified_seq_len=torch.tensor([3, 4]),
        **dict(topk=4, depth=3, draft_token_num=8, tree_mask_mode=1),
    )
    build_tree_kernel_efficient(**call)
    with pytest.raises(ValueError, match=message):
        build_tree_kernel_efficient(**{**call, **change})


def test_packed_masks_hold_32_nodes() -> None:
    above, selected = beam(1, 8, 4, 33)
    with pytest.raises(ValueError, match="draft_token_num: expected at most 32"):
        build(above, selected, torch.tensor([3]), 8, 4, 2, torch.zeros(500).byte())
