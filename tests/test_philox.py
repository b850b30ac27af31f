"""The specification of randomness: Philox itself, the counter's layout, and the numbers' laws.

Frequencies use fixed seeds, so these tests either always pass or never.
"""

import itertools
import math
import random

import pytest
import scipy.stats
import torch

from pydecode import philox
from pydecode.validation import signed64

MASK = 2**32 - 1


def python_philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int = 10) -> list[int]:
    """Philox4x32 in Python's own integers."""
    c, (k0, k1) = list(counter), key
    for r in range(rounds):
        bump0, bump1 = (k0 + r * 0x9E3779B9) & MASK, (k1 + r * 0xBB67AE85) & MASK
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ bump0, lo1, hi0 ^ c[3] ^ bump1, lo0]
    return c


def tensor_philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(x) for x in (*counter, *key))
    return [int(x) for x in philox.philox4x32((c0, c1, c2, c3), (k0, k1))]


def documented(stream: int, seed: int, offset: int, position: int, index: int) -> list[int]:
    """The words of a draw, as the page of philox.py has it; Python's & takes any sign."""
    counter = (
        index & MASK,
        position & MASK,
        offset & MASK,
        stream << 24 | (offset >> 32 & 0xFFFFFF),
    )
    return python_philox(counter, (seed & MASK, seed >> 32 & MASK))


def words(stream: int, *numbers: int) -> list[int]:
    return philox.words(stream, *(torch.tensor(signed64(x)) for x in numbers)).tolist()


# ---- Philox4x32-10 ------------------------------------------------------------------------------

KNOWN = {  # Random123's known answers
    "zeros": ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN.values(), ids=KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    want = [int(word, 16) for word in answer.split()]
    assert tensor_philox(counter, key) == want
    assert python_philox(counter, key) == want
    assert python_philox(counter, key, rounds=9) != want


def test_random_inputs() -> None:
    draw = random.Random(torch.randint(2**31, ()).item())
    edges = (0, 1, 2**31 - 1, 2**31, MASK - 1, MASK)
    for _ in range(50):
        six = [draw.choice((*edges, draw.randrange(2**32))) for _ in range(6)]
        counter, key = tuple(six[:4]), (six[4], six[5])
        assert tensor_philox(counter, key) == python_philox(counter, key)


# ---- from (stream, seed, offset, position, index) to a counter and a key ------------------------

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), -12345678901)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed: int) -> None:
    assert words(1, seed, 2, 3, 4) == documented(1, seed, 2, 3, 4)
    assert words(1, seed, 2, 3, 4) == documented(1, seed % 2**64, 2, 3, 4)


@pytest.mark.parametrize("offset", [0, 1, 2**32 - 1, 2**32, 2**56 - 1, 2**56, -1, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 4, 255])
def test_offsets_and_streams(offset: int, stream: int) -> None:
    assert words(stream, 5, offset, 6, 7) == documented(stream, 5, offset, 6, 7)


@pytest.mark.parametrize("position", [0, 1, 2**31, 2**32 - 1, -1])
@pytest.mark.parametrize("index", [0, 1, 1023, -1])
def test_positions_and_indices(position: int, index: int) -> None:
    # index -1 is a word of all ones
    assert words(2, 5, 6, position, index) == documented(2, 5, 6, position, index)


def test_every_number_matters() -> None:
    draws = [words(1, *numbers) for numbers in itertools.product((0, 1), repeat=4)]
    draws += [words(s, 0, 0, 0, 0) for s in (0, 2, 3, 4)]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_broadcast_and_int32() -> None:
    seed, position = torch.tensor([[3], [4]], dtype=torch.int32), torch.arange(5)
    got = philox.words(1, seed, torch.tensor(7), position, torch.tensor(-1))
    assert got.shape == (2, 5, 4)
    for b, i in itertools.product(range(2), range(5)):
        assert got[b, i].tolist() == documented(1, 3 + b, 7, i, -1)


@pytest.mark.parametrize("seed", [*SEEDS, 0xFFFFFFFF_00000007, 0xFFFFFFFE_80000000])
def test_a_scalar_seed_is_mixed_with_the_batch_index(seed: int) -> None:
    low, high = seed & MASK, seed >> 32 & MASK
    want = [signed64(low | ((high + b) % 2**32) << 32) for b in range(5)]
    device = torch.device("cpu")
    assert philox.request_keys(signed64(seed), None, 5, device).tolist() == want
    zero_dim = torch.tensor(signed64(seed))
    assert philox.request_keys(0, zero_dim, 5, device).tolist() == want


def test_a_batch_of_seeds_is_taken_as_it_is() -> None:
    seeds = torch.tensor([signed64(seed) for seed in SEEDS])
    keys = philox.request_keys(9, seeds, len(SEEDS), seeds.device)
    assert keys.tolist() == seeds.tolist()
    small = torch.tensor([7, -7], dtype=torch.int32)
    assert philox.request_keys(9, small, 2, seeds.device).tolist() == [7, -7]


def test_streams_are_distinct() -> None:
    streams = {
        name: value
        for name, value in vars(philox).items()
        if name.isupper() and isinstance(value, int) and name != "MASK32" and name[0] != "_"
    }
    assert set(streams) >= {"DRAFT", "ACCEPT", "RESAMPLE", "COMMIT", "RANDOM_CONFIDENCE"}
    assert len(set(streams.values())) == len(streams)
    assert all(0 <= value < 256 for value in streams.values())  # eight bits of the counter


def test_no_offset_reaches_into_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(philox, "philox4x32", lambda counter, key: seen.append(counter) or counter)
    for stream in range(5):
        for offset in (0, 2**56 - 1, 2**56, -1):
            words(stream, -1, offset, -1, -1)
            assert int(seen[-1][3]) >> 24 == stream


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0, 255, 256, 2**31, 2**32 - 256, 2**32 - 1])
def test_numbers_of_extreme_words(x: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(stream: int, *numbers: torch.Tensor) -> torch.Tensor:
        return torch.full((*torch.broadcast_shapes(*(n.shape for n in numbers)), 4), x)

    monkeypatch.setattr(philox, "words", constant)
    zero = torch.zeros((), dtype=torch.int64)
    u = philox.uniform(0, zero, zero, zero, zero)
    assert u.dtype == torch.float32
    assert u.item() == (x >> 8) / 2**24
    assert 0 <= u.item() < 1
    g = philox.gumbel(0, zero, zero, zero, 5)
    assert g.dtype == torch.float64
    assert g.isfinite().all()
    exact = -math.log(-math.log1p(-(x + 0.5) / 2**32))
    assert all(math.isclose(value, exact, rel_tol=1e-14, abs_tol=1e-14) for value in g.tolist())


def test_uniform_takes_word_0() -> None:
    seed, index = torch.arange(3)[:, None], torch.tensor([0, 1, -1])
    u = philox.uniform(philox.RESAMPLE, seed, torch.tensor(4), torch.tensor(5), index)
    first = [[documented(2, b, 4, 5, i)[0] for i in (0, 1, -1)] for b in range(3)]
    assert u.tolist() == [[(x >> 8) / 2**24 for x in row] for row in first]


@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 8, 11])
def test_gumbel_takes_word_v_mod_4_of_index_v_div_4(vocab: int) -> None:
    seed, offset = torch.tensor([3, -4])[:, None], torch.tensor(2**33 + 5)
    position = torch.tensor([[0, 7, 2**31], [1, 1, -1]])
    got = philox.gumbel(philox.DRAFT, seed, offset, position, vocab)
    assert got.shape == (2, 3, vocab)
    for b, i, v in itertools.product(range(2), range(3), range(vocab)):
        x = documented(0, int(seed[b]), 2**33 + 5, int(position[b, i]), v // 4)[v % 4]
        want = -math.log(-math.log1p(-(x + 0.5) / 2**32))
        assert math.isclose(got[b, i, v].item(), want, rel_tol=1e-12, abs_tol=1e-14)


N = 1 << 16
AXES = ("position", "index", "offset", "seed", "high seed", "stream")


def neighbours(axis: str, step: int) -> torch.Tensor:
    """N uniforms, all ``step`` ahead along one axis, so that pairs of steps are neighbours."""
    numbers = {"seed": 1234, "offset": 0, "position": 0, "index": 0}
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    varied = "index" if axis == "position" else "position"
    tensors[varied] = torch.arange(N)
    if axis == "high seed":  # what a scalar seed's requests differ in
        tensors["seed"] = tensors["seed"] + (step << 32)
    elif axis != "stream":
        tensors[axis] = tensors[axis] + step
    return philox.uniform(step if axis == "stream" else 1, *tensors.values())


def p_value(counts: torch.Tensor) -> float:
    return float(scipy.stats.chisquare(counts.double().numpy().ravel()).pvalue)


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_uniform_and_independent(axis: str) -> None:
    a, b = neighbours(axis, 0), neighbours(axis, 1)
    assert p_value(torch.bincount((a * 256).long(), minlength=256)) > 1e-3
    cells = (a * 16).long() * 16 + (b * 16).long()
    assert p_value(torch.bincount(cells, minlength=256)) > 1e-3
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 4 / math.sqrt(N)


def test_chi_square_sees_dependence() -> None:
    # the negative control: a stream met twice, as a peer had it
    a = neighbours("stream", 1)
    cells = (a * 16).long() * 16 + (a * 16).long()
    assert p_value(torch.bincount(cells, minlength=256)) < 1e-12


def test_every_bit_of_every_word_is_fair() -> None:
    zero = torch.tensor(0)
    x = philox.words(0, torch.tensor(99), zero, torch.arange(N), zero)
    ones = (x[..., None] >> torch.arange(32) & 1).sum(0)
    assert ((ones - N / 2).abs() < 5 * math.sqrt(N) / 2).all()


def test_gumbel_law() -> None:
    zero = torch.tensor(0)
    g = philox.gumbel(philox.DRAFT, torch.tensor(7), zero, torch.arange(64), 1000).numpy()
    assert scipy.stats.kstest(g.ravel(), "gumbel_r").pvalue > 1e-3
    assert scipy.stats.kstest(g.ravel() + 0.02, "gumbel_r").pvalue < 1e-3  # the test can fail
    # argmax of log p + g is a draw from p
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    g4 = philox.gumbel(philox.DRAFT, torch.tensor(8), zero, torch.arange(N), 4)
    counts = torch.bincount((p.log() + g4).argmax(-1), minlength=4)
    assert scipy.stats.chisquare(counts.numpy(), (p * N).numpy()).pvalue > 1e-3
