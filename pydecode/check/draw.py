"""What random cases are made of: one generator, one dtype, one device, and what they must survive.

Caches hold NaN in every slot that no query may see, and lie inside larger storage with guard bands.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Case(NamedTuple):
    """One call of a public function; ``label`` names what is special about it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str


class Draw:
    """A source of random sizes, tensors and layouts; the same seed gives the same cases."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, torch.device(device)
        # a GPU is there to be filled; a CPU runs the reference in a loop
        self.big = self.device.type != "cpu"

    # ---- choices --------------------------------------------------------------------------------

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, p: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < p

    # ---- tensors --------------------------------------------------------------------------------

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(dtype or self.dtype).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = torch.randint(low, high + 1, shape, generator=self.generator)
        return x.to(dtype or self.choice([torch.int32, torch.int64])).to(self.device)

    def bools(self, p: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < p

    def strided(self, x: Tensor) -> Tensor:
        """The same values, with a random layout of all dimensions but the last."""
        order = torch.randperm(x.dim() - 1, generator=self.generator).tolist()
        padding = self.choice([0, 0, 8])  # rows of a wider tensor; 8 keeps them aligned
        shape = [x.shape[i] for i in order] + [x.shape[-1] + padding]
        storage = torch.zeros(shape, dtype=x.dtype, device=x.device)
        inverse = [order.index(i) for i in range(x.dim() - 1)]
        view = storage[..., : x.shape[-1]].permute(*inverse, x.dim() - 1)
        view.copy_(x)
        return view

    def tree(self, nodes: int) -> Tensor:
        """Parents [nodes] of a random tree: -1 first, then an earlier node each."""
        parents = [-1] + [self.integer(max(0, i - 5), i - 1) for i in range(1, nodes)]
        return torch.tensor(parents, device=self.device)

    # ---- caches ---------------------------------------------------------------------------------

    def cache(
        self, lengths: Sequence[int], heads: int, dims: Sequence[int], dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor | None]:
        """Caches (one for each head dim) that hold ``lengths`` positions, and their block table.

        Paged or dense, NHD or HND; everything but those positions is NaN, tables' tails are
        unmapped pages.
        """
        B, longest = len(lengths), max([*lengths, 1])
        # the value of a request's last key stands out, so that losing that one key of many shows
        last = 30.0 if self.chance(0.3) else 1.0
        page_size = self.choice([1, 3, 16, 16, 64])
        if self.chance(0.25):
            capacity = longest + self.integer(0, 20)
            pools = [torch.full((B, capacity, heads, d), torch.nan) for d in dims]
            for pool in pools:
                for b, n in enumerate(lengths):
                    pool[b, :n] = torch.randn(n, *pool.shape[2:], generator=self.generator)
                    pool[b, max(n - 1, 0) : n] *= last if pool is pools[-1] else 1.0
            return [self.strided(pool.to(dtype).to(self.device)) for pool in pools], None
        width = -(-longest // page_size) + self.integer(0, 2)
        needed = [-(-n // page_size) for n in lengths]
        pages = sum(needed) + self.integer(1, 5)
        order = torch.randperm(pages, generator=self.generator).tolist()
        table = torch.full((B, width), self.choice([-1, pages, 2**31 - 1]))
        pools = [torch.full((pages, page_size, heads, d), torch.nan) for d in dims]
        for b, n in enumerate(lengths):
            mine = [order.pop() for _ in range(needed[b])]
            table[b, : len(mine)] = torch.tensor(mine, dtype=torch.int64)
            for pool in pools:
                rows = torch.randn(n, *pool.shape[2:], generator=self.generator)
                rows[max(n - 1, 0) :] *= last if pool is pools[-1] else 1.0
                for i, page in enumerate(mine):
                    part = rows[i * page_size : (i + 1) * page_size]
                    pool[page, : len(part)] = part
        table = table.to(self.choice([torch.int32, torch.int64])).to(self.device)
        pools = [pool.to(dtype).to(self.device) for pool in pools]
        if self.chance(0.3):  # HND is a view
            pools = [pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in pools]
        return pools, table
