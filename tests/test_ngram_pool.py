"""NgramPool against an ordered dictionary of lists."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydecode import NgramPool
from pydecode.ngram_pool import MAX_BATCH


class Oracle:
    """The same pool in Python: one insertion after the other, evicting after each batch."""

    def __init__(self, capacity: int, n: int, candidates: int) -> None:
        self.capacity, self.n, self.candidates = capacity, n, candidates
        self.lists: OrderedDict[int, list[list[int]]] = OrderedDict()

    def insert(self, keys: list[int], ngrams: list[list[int]]) -> None:
        rows = min(self.capacity, MAX_BATCH)
        for start in range(0, len(keys), rows):
            for key, ngram in zip(keys[start : start + rows], ngrams[start : start + rows]):
                if min(ngram) < 0:
                    continue
                old = self.lists.pop(key, [])
                self.lists[key] = [ngram, *[x for x in old if x != ngram]]
            for key, found in self.lists.items():
                self.lists[key] = found[: self.candidates]
            while len(self.lists) > self.capacity:
                self.lists.popitem(last=False)

    def lookup(self, keys: list[int]) -> tuple[list, list]:
        found = [self.lists.get(key, []) for key in keys]
        pad = [[-1] * self.n]
        return [x + pad * (self.candidates - len(x)) for x in found], [len(x) for x in found]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_against_an_ordered_dictionary(data: st.DataObject) -> None:
    """Few keys and tokens, so that repeats, full lists and evictions abound."""
    size = st.integers(1, 5)
    capacity, n, candidates = data.draw(size), data.draw(st.integers(1, 3)), data.draw(size)
    pool, oracle = NgramPool(capacity, n, candidates), Oracle(capacity, n, candidates)
    everything = list(range(-3, 5))
    for _ in range(data.draw(st.integers(1, 6))):
        M = data.draw(st.integers(0, 9))
        keys = data.draw(st.lists(st.sampled_from(everything), min_size=M, max_size=M))
        token = st.integers(-1, 2) if data.draw(st.booleans()) else st.integers(0, 1)
        ngram = st.lists(token, min_size=n, max_size=n)
        ngrams = data.draw(st.lists(ngram, min_size=M, max_size=M))
        if data.draw(st.integers(0, 9)) == 0:
            ngrams = [[-1] * n for _ in ngrams]  # nothing counts
        oracle.insert(keys, ngrams)
        pool.insert(
            torch.tensor(keys, dtype=torch.int64),
            torch.tensor(ngrams, dtype=torch.int32).view(M, n),
        )
        found, counts = pool.lookup(torch.tensor(everything))
        want, want_counts = oracle.lookup(everything)
        assert found.tolist() == want
        assert counts.tolist() == want_counts


def test_a_long_call_and_many_keys() -> None:
    """More rows than one pass compares; keys anywhere in int64."""
    M, capacity = 2 * MAX_BATCH + 77, 300
    keys = torch.randint(-200, 200, (M,)) * 2**40 + 5
    ngrams = torch.randint(0, 2, (M, 4))
    pool, oracle = NgramPool(capacity, 4, 6), Oracle(capacity, 4, 6)
    for shift in (0, 1, 2):
        pool.insert(keys + shift, ngrams)
        oracle.insert((keys + shift).tolist(), ngrams.tolist())
    for shift in (0, 1, 2):
        found, counts = pool.lookup(keys + shift)
        want, want_counts = oracle.lookup((keys + shift).tolist())
        assert found.tolist() == want
        assert counts.tolist() == want_counts
    assert len(oracle.lists) == capacity


def test_shapes_and_dtypes() -> None:
    pool = NgramPool(4, 2, 3)
    pool.insert(torch.tensor([[1, 2], [3, 1]]), torch.tensor([[[1, 1], [2, 2]], [[3, 3], [4, 4]]]))
    found, counts = pool.lookup(torch.tensor([[1], [3], [9]], dtype=torch.int32))
    assert (found.shape, found.dtype) == ((3, 1, 3, 2), torch.int64)
    assert (counts.shape, counts.dtype) == ((3, 1), torch.int32)
    assert found[0, 0].tolist() == [[4, 4], [1, 1], [-1, -1]]
    assert counts.flatten().tolist() == [2, 1, 0]
    found, counts = pool.lookup(torch.zeros(0, dtype=torch.int64))
    assert (found.shape, counts.shape) == ((0, 3, 2), (0,))


def test_what_lookup_pads_with_may_be_given_back() -> None:
    pool, other = NgramPool(4, 2, 3), NgramPool(4, 2, 3)
    keys = torch.tensor([5, 6])
    pool.insert(torch.tensor([5, 5]), torch.tensor([[1, 2], [3, 4]]))
    found, _ = pool.lookup(keys)
    other.insert(keys[:, None].expand(2, 3), found)
    again, counts = other.lookup(keys)
    assert counts.tolist() == [2, 0]
    assert again[0, :2].tolist() == [[1, 2], [3, 4]]  # the last one inserted is the first


def test_a_lookup_uses_no_key_and_clear_empties() -> None:
    pool = NgramPool(2, 1, 1)
    pool.insert(torch.tensor([1, 2]), torch.tensor([[1], [2]]))
    pool.lookup(torch.tensor([1]))
    pool.insert(torch.tensor([3]), torch.tensor([[3]]))  # evicts 1, though it was looked up last
    assert pool.lookup(torch.tensor([1, 2, 3]))[1].tolist() == [0, 1, 1]
    pool.clear()
    found, counts = pool.lookup(torch.tensor([1, 2, 3, 0]))
    assert counts.tolist() == [0, 0, 0, 0]
    assert (found == -1).all()


def test_the_table_stays_where_it_is_and_compiles() -> None:
    """In-place state and static shapes: what a captured graph needs."""
    pool, oracle = NgramPool(3, 2, 2), Oracle(3, 2, 2)
    before = {name: x.data_ptr() for name, x in vars(pool).items() if isinstance(x, torch.Tensor)}

    def step(keys: torch.Tensor, ngrams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pool.insert(keys, ngrams)
        return pool.lookup(keys)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        keys, ngrams = torch.randint(0, 6, (3,)), torch.randint(-1, 2, (3, 2))
        found, counts = compiled(keys, ngrams)
        oracle.insert(keys.tolist(), ngrams.tolist())
        assert (found.tolist(), counts.tolist()) == oracle.lookup(keys.tolist())
    after = {name: x.data_ptr() for name, x in vars(pool).items() if isinstance(x, torch.Tensor)}
    assert before == after


def test_errors_name_the_argument() -> None:
    for name in ("capacity", "n", "candidates"):
        for bad in (0, 1.5, True, None):
            with pytest.raises(ValueError, match=f"{name}: expected an int >= 1"):
                NgramPool(**{**dict(capacity=2, n=2, candidates=2), name: bad})  # type: ignore
    pool = NgramPool(2, 2, 2)
    key = torch.tensor([1])
    with pytest.raises(TypeError, match="keys: expected dtype"):
        pool.lookup(key.float())
    with pytest.raises(TypeError, match="keys: expected a tensor"):
        pool.lookup([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ngrams: expected shape \[M, n\] = \[1, 2\]"):
        pool.insert(key, torch.tensor([[1, 2, 3]]))
    with pytest.raises(TypeError, match="ngrams: expected dtype"):
        pool.insert(key, torch.tensor([[1.0, 2.0]]))
