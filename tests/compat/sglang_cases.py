"""SGLang's result tensors, and random cases whose sums are exact."""

import peer_sglang as peer
import torch
from test_trees_links import linked_trees
from torch import Tensor

PREFILL = -55


class Results:
    """Tensors as the engine hands them over; ``prefill`` shows which entries were written."""

    def __init__(self, bs: int, rows: int, S: int) -> None:
        self.predicts = torch.full((rows,), PREFILL, dtype=torch.int32)
        self.index = torch.full((bs, S), PREFILL, dtype=torch.int32)
        self.num = torch.full((bs,), PREFILL, dtype=torch.int32)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.predicts, self.index, self.num


def expect(got: Results, want: list[peer.Walk], rows: list[list[int]]) -> None:
    S = got.index.shape[1]
    assert got.num.tolist() == [len(x.accepted) - 1 for x in want]
    assert got.index.tolist() == [
        [row[i] for i in x.accepted] + [-1] * (S - len(x.accepted)) for x, row in zip(want, rows)
    ]
    predicts = [PREFILL] * got.predicts.shape[0]
    for x in want:
        for at, token in x.predicts.items():
            predicts[at] = token
    assert got.predicts.tolist() == predicts


def scattered_rows(bs: int, ndt: int, rows: int) -> Tensor:
    """Global rows in no order, more than there are nodes."""
    return torch.randperm(rows)[: bs * ndt].view(bs, ndt)


def dyadic(*shape: int, zeros: float = 0.3) -> Tensor:
    """Laws in whole 64ths, so that every sum of them is exact in fp32; many entries are 0."""
    *rows, V = shape
    ticket = torch.where(torch.rand(*rows, V) < zeros, 0.0, torch.rand(*rows, V)) + 1e-9
    drawn = ticket.flatten(0, -2).multinomial(64, replacement=True)
    count = torch.zeros(drawn.shape[0], V).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return (count / 64).view(shape)


def coins(*shape: int) -> Tensor:
    """In 32nds: ties with sums of probabilities, and zeros, come up."""
    return torch.randint(32, shape) / 32


def sampled_case(bs: int, ndt: int, V: int, distinct: bool) -> dict[str, Tensor]:
    first, following, children = linked_trees(bs, ndt)
    tokens = torch.randint(V, (bs, ndt))
    if distinct:
        for b, kids in enumerate(children):
            for row in kids:
                tokens[b, row] = torch.randperm(V)[: len(row)]
    return dict(
        candidates=tokens,
        retrive_index=scattered_rows(bs, ndt, bs * ndt + 9),
        retrive_next_token=first,
        retrive_next_sibling=following,
        uniform_samples=coins(bs, ndt),
        uniform_samples_for_final_sampling=coins(bs),
        target_probs=dyadic(bs, ndt, V),
    )
