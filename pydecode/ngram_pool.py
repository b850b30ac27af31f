"""A pool of n-grams on the device: what lookahead decoding and Jacobi forcing draft from."""

import torch
from torch import Tensor

from .validation import (
    INTS,
    expect_device,
    expect_dtype,
    expect_index,
    expect_tensor,
)

MAX_BATCH = 256  # rows that one pass compares with each other


class NgramPool:
    """A fixed-size table from keys to their most recent n-grams, on the device, without a sync.

    The n-gram pool of lookahead decoding (Fu et al., ICML 2024, section 3.2; there the key is the
    token before the n-gram) and of Jacobi forcing's rejection recycling. The table holds the
    ``capacity`` most recently used keys, and of each its ``candidates`` most recently inserted
    distinct n-grams; used means inserted, a lookup changes nothing. Any key may take any slot: a
    call compares its keys with all slots.

    Both methods are deterministic, have static shapes and can be captured in a CUDA graph; the
    tensors of the table are updated in place.

    Args:
        capacity: number of keys, at least 1.
        n: tokens of an n-gram, at least 1.
        candidates: n-grams kept of each key, at least 1.
        device: where the table lies; None: PyTorch's default device.

    >>> import torch, pydecode
    >>> pool = pydecode.NgramPool(capacity=8, n=2, candidates=3)
    >>> pool.insert(torch.tensor([5, 5, 6]), torch.tensor([[1, 2], [3, 4], [7, 8]]))
    >>> found, counts = pool.lookup(torch.tensor([5, 9]))
    >>> found.tolist(), counts.tolist()
    ([[[3, 4], [1, 2], [-1, -1]], [[-1, -1], [-1, -1], [-1, -1]]], [2, 0])
    """

    def __init__(
        self,
        capacity: int,
        n: int,
        candidates: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("capacity", capacity), ("n", n), ("candidates", candidates)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        self.capacity, self.n, self.candidates = capacity, n, candidates
        self._keys = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._used = torch.empty(capacity, dtype=torch.int64, device=device)  # -1: an empty slot
        self._ngrams = torch.empty(capacity, candidates, n, dtype=torch.int64, device=device)
        self._counts = torch.empty(capacity, dtype=torch.int32, device=device)
        self._clock = torch.empty((), dtype=torch.int64, device=device)
        self.clear()

    @property
    def device(self) -> torch.device:
        return self._keys.device

    def clear(self) -> None:
        """Empties the pool, in place."""
        self._used.fill_(-1)
        self._ngrams.fill_(-1)
        self._counts.zero_()
        self._clock.zero_()

    def lookup(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The n-grams of each key, most recent first.

        Args:
            keys: [B] (or any shape) int32/int64.

        Returns:
            candidates int64 [B, candidates, n], -1 past what the key has; counts int32 [B].
        """
        keys = self._expect_keys(keys)
        slot, found = self._find(keys.flatten())
        candidates = torch.where(found[:, None, None], self._ngrams[slot], -1)
        counts = torch.where(found, self._counts[slot], 0)
        return candidates.unflatten(0, keys.shape), counts.unflatten(0, keys.shape)

    def insert(self, keys: Tensor, ngrams: Tensor) -> None:
        """Puts n-grams at the front of their keys' lists, row after row.

        An n-gram that its key already has moves to the front. A row with a negative token is
        skipped, so what ``lookup`` pads with may be given back. The keys of one call are all used
        before any other key is evicted; a call of more than min(capacity, 256) rows counts as
        several. Keys are any int64: mix a request's number in where requests should not share.

        Args:
            keys: [M] (or any shape) int32/int64.
            ngrams: [M, n] int32/int64.
        """
        keys = self._expect_keys(keys)
        shape = (*keys.shape, self.n)
        ngrams = expect_index("ngrams", ngrams, shape, "[M, n]", self.device)
        rows = min(self.capacity, MAX_BATCH)
        for some_keys, some_ngrams in zip(
            keys.flatten().long().split(rows), ngrams.reshape(-1, self.n).long().split(rows)
        ):
            self._insert(some_keys, some_ngrams)

    def _expect_keys(self, keys: Tensor) -> Tensor:
        keys = expect_tensor("keys", keys)
        expect_dtype("keys", keys, INTS)
        expect_device("keys", keys, self.device)
        return keys

    def _matches(self, keys: Tensor) -> Tensor:
        """bool [M, capacity]: at most one slot a key."""
        return (keys[:, None] == self._keys) & (self._used >= 0)

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The slot of each key (0 where there is none), and whether there is one."""
        match = self._matches(keys)
        at = torch.arange(self.capacity, device=self.device)
        return torch.where(match, at, 0).sum(1), match.any(1)

    def _insert(self, keys: Tensor, ngrams: Tensor) -> None:
        """keys [M], ngrams [M, n] with 1 <= M <= capacity."""
        M = keys.shape[0]
        if M == 0:
            return
        i = torch.arange(M, device=self.device)
        # a skipped row repeats the last one that counts, which changes nothing
        counts = (ngrams >= 0).all(1)
        last = torch.where(counts, i, -1).amax()
        stand_in = torch.where(counts, i, last.clamp(min=0))
        keys, ngrams = keys[stand_in], ngrams[stand_in]
        same_key = keys[:, None] == keys
        last_row = torch.where(same_key, i, -1).amax(1)

        # slots: a key's own, else the emptiest or least recently used that this call leaves alone
        match = self._matches(keys)
        slot, found = self._find(keys)
        touched = match.any(0)
        victims = torch.where(touched, 2**62, self._used).argsort(stable=True)
        leads = ~found & (last_row == i)  # one row of each new key
        rank = (leads.cumsum(0) - 1)[last_row].clamp(min=0)
        slot = torch.where(found, slot, victims[rank])

        # a key's list: its rows of this call, last first, then what it had; no n-gram twice
        same = same_key & (ngrams[:, None] == ngrams).all(2)
        again = (same & (i > i[:, None])).any(1)
        had = self._ngrams[slot]
        held = torch.arange(self.candidates, device=self.device) < self._counts[slot][:, None]
        held = held & found[:, None]
        repeats = (had == ngrams[:, None]).all(2)
        repeats = (same_key.float() @ repeats.float()) > 0  # by any row of the same key
        keep = torch.cat([(same_key & ~again).flip(1), held & ~repeats], 1)
        order = (~keep).int().argsort(dim=1, stable=True)[:, : self.candidates]
        rows = torch.cat([ngrams.flip(0).expand(M, M, self.n), had], 1)
        merged = rows.gather(1, order[..., None].expand(*order.shape, self.n))
        merged = torch.where(keep.gather(1, order)[..., None], merged, -1)
        count = keep.sum(1).clamp(max=self.candidates).int()

        # rows of one key write the same; where no row counts, everything keeps its value
        some = last >= 0
        for table, value in (
            (self._keys, keys),
            (self._used, self._clock + last_row),
            (self._ngrams, merged),
            (self._counts, count),
        ):
            table.index_put_((slot,), torch.where(some, value, table[slot]))
        self._clock += M
