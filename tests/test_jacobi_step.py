"""jacobi_step against Python loops, and as a decoder that equals greedy and ancestral sampling."""

import pytest
import torch
from torch import Tensor

import pydecode

VOCAB = 9


def loops(draft: list[int], target: list[int], valid: int) -> tuple[int, list[int], bool]:
    valid = max(1, min(valid, len(draft)))
    accepted = 0
    while accepted + 1 < valid and draft[accepted + 1] == target[accepted]:
        accepted += 1
    tail = target[accepted:valid]
    tail += [target[valid - 1]] * (len(draft) - len(tail))
    return accepted, tail, accepted == valid - 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_against_loops(backend: str, n: int, dtype: torch.dtype) -> None:
    B = 40
    target = torch.randint(0, 3, (B, n), dtype=dtype)
    draft = torch.cat([torch.zeros(B, 1).to(dtype), target[:, :-1]], 1)
    wrong = torch.rand(B, n) < torch.rand(B, 1) * 0.5
    draft = torch.where(wrong, torch.randint(0, 3, (B, n), dtype=dtype), draft)
    for valid in (torch.randint(-1, n + 2, (B,)), torch.tensor(n // 2), n, 0, None):
        got = pydecode.jacobi_step(draft, target, num_valid=valid, backend=backend)
        each = torch.as_tensor(n if valid is None else valid).expand(B).tolist()
        want = [loops(d, t, m) for d, t, m in zip(draft.tolist(), target.tolist(), each)]
        assert [x.dtype for x in got] == [torch.int32, dtype, torch.bool]
        assert got[0].tolist() == [accepted for accepted, _, _ in want]
        assert got[1].tolist() == [tail for _, tail, _ in want]
        assert got[2].tolist() == [converged for _, _, converged in want]


def test_rows_past_num_valid_are_not_read(backend: str) -> None:
    draft, target = torch.tensor([[7, 1, 2, 3]]), torch.tensor([[1, 2, 3, 4]])
    accepted, tail, converged = pydecode.jacobi_step(
        draft, target, num_valid=torch.tensor([2]), backend=backend
    )
    assert (accepted.item(), tail.tolist(), converged.item()) == (1, [[2, 2, 2, 2]], True)
    accepted, tail, converged = pydecode.jacobi_step(draft, target, num_valid=0, backend=backend)
    assert (accepted.item(), tail.tolist(), converged.item()) == (0, [[1, 1, 1, 1]], True)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape, dtype=torch.int64)
    accepted, tail, converged = pydecode.jacobi_step(empty, empty, backend=backend)
    assert accepted.tolist() == [0] * shape[0]
    assert tail.shape == shape
    assert converged.tolist() == [True] * shape[0]


# ---- a decoder ----


class TinyModel:
    """Logits after a prefix, from its last three tokens; with noise frozen for each position."""

    def __init__(self, length: int, temperature: float) -> None:
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, VOCAB, dtype=torch.float64) * 2
        gumbel = -torch.log(-torch.log(torch.rand(length, VOCAB, dtype=torch.float64)))
        self.noise = gumbel * temperature
        self.forwards = 0

    def next(self, prefix: list[int]) -> int:
        a, b, c = [0, 0, *prefix][-3:]
        return int((self.table[a, b, c] + self.noise[len(prefix)]).argmax())

    def forward(self, prefix: list[int], draft: list[int]) -> list[int]:
        """One causal forward over a draft whose first token ends the prefix."""
        self.forwards += 1
        return [self.next(prefix + draft[1 : i + 1]) for i in range(len(draft))]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "frozen noise"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_decoder_equals_one_token_at_a_time(backend: str, n: int, temperature: float) -> None:
    """Ragged requests in one batch, each a decoder of its own, lossless in every step."""
    lengths = [24, 13, 1]
    models = [TinyModel(64, temperature) for _ in lengths]
    texts = [[3], [1, 4], [5]]
    starts = [len(text) for text in texts]
    want = [list(text) for text in texts]
    for text, model, length in zip(want, models, lengths):
        for _ in range(length):
            text.append(model.next(text))
    draft = torch.tensor([[text[-1]] + [0] * (n - 1) for text in texts])
    steps = 0
    while any(len(t) - s < m for t, s, m in zip(texts, starts, lengths)):
        left = [m - (len(t) - s) for t, s, m in zip(texts, starts, lengths)]
        target = torch.tensor(
            [
                model.forward(text, row) if more > 0 else [0] * n
                for model, text, row, more in zip(models, texts, draft.tolist(), left)
            ]
        )
        valid = torch.tensor(left).clamp(max=n)
        accepted, draft, converged = pydecode.jacobi_step(
            draft, target, num_valid=valid, backend=backend
        )
        steps += 1
        for b, text in enumerate(texts):
            if left[b] > 0:
                emitted = target[b, : int(accepted[b]) + 1].tolist()
                text += emitted
                assert text == want[b][: len(text)]  # at least one token is right in each step
                assert emitted[-1] == draft[b, 0]
                assert bool(converged[b]) == (len(emitted) == min(left[b], n))
    assert texts == want
    assert steps <= max(lengths)
    if n == 16 and temperature == 0.0:
        assert all(model.forwards <= length for model, length in zip(models, lengths))


def test_fewer_forwards_on_an_easy_text(backend: str) -> None:
    """Where the next token hardly depends on the last one, the fixed point comes fast."""
    model = TinyModel(64, 0.0)
    model.noise = torch.randn(64, VOCAB, dtype=torch.float64) * 20
    text, want = [2], [2]
    for _ in range(48):
        want.append(model.next(want))
    draft = torch.tensor([[2] + [0] * 15])
    while len(text) < 49:
        target = torch.tensor([model.forward(text, draft[0].tolist())])
        valid = min(16, 49 - len(text))
        accepted, draft, _ = pydecode.jacobi_step(draft, target, num_valid=valid, backend=backend)
        text += target[0, : int(accepted) + 1].tolist()
    assert text == want
    assert model.forwards < 30


def test_a_fixed_point_comes_within_n_iterations(backend: str) -> None:
    """Without sliding on: iterate a block until it converges (Santilli et al., algorithm 1)."""
    model, prefix, n = TinyModel(64, 0.0), [1, 7], 12
    want = list(prefix)
    for _ in range(n):
        want.append(model.next(want))
    draft: Tensor = torch.tensor([[7] + [0] * (n - 1)])
    for iteration in range(1, n + 1):
        target = torch.tensor([model.forward(prefix, draft[0].tolist())])
        accepted, _, converged = pydecode.jacobi_step(draft, target, backend=backend)
        assert int(accepted) + 1 >= iteration  # after iteration k the first k tokens are final
        assert target[0, : int(accepted) + 1].tolist() == want[2 : 3 + int(accepted)]
        if converged:
            break
        draft = torch.cat([draft[:, :1], target[:, :-1]], 1)
    assert converged
    assert target[0].tolist() == want[2:]


ROW = torch.zeros(2, 4, dtype=torch.int64)
BAD_ARGUMENTS = {
    "draft": (dict(draft=ROW[0]), ValueError, "draft: expected 2 dimensions"),
    "draft dtype": (dict(draft=ROW.float()), TypeError, "draft: expected dtype int32, int64"),
    "target": (dict(target=ROW[:, 1:]), ValueError, r"target: expected shape \[B, n\]"),
    "logits": (dict(target=ROW.float()), TypeError, "target: expected dtype"),
    "num_valid": (dict(num_valid=5), ValueError, "num_valid: expected at most n = 4, got 5"),
    "negative": (dict(num_valid=-1), ValueError, "num_valid: expected at least 0"),
    "float": (dict(num_valid=1.5), TypeError, "num_valid: expected an integer"),
    "ragged": (dict(num_valid=ROW[0]), ValueError, "num_valid: expected 0-d or"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_errors_name_the_argument(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        pydecode.jacobi_step(**{**dict(draft=ROW, target=ROW), **change})


def test_checks_raise_with_the_offending_index() -> None:
    with pydecode.checks(True), pytest.raises(ValueError, match=r"num_valid.*got 5 at index \[1\]"):
        pydecode.jacobi_step(ROW, ROW, num_valid=torch.tensor([4, 5]))
