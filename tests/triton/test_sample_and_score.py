"""Sampling and scoring in Triton, interpreted, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode import Scores, sample_and_score

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEEDS = torch.tensor([2**40 + 3, -5, 7, 2**62])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is out of reach while the kernels run."""
    from pydecode.reference import sample_and_score as module

    real = module.sample_and_score
    real_call = pydecode.sample_and_score

    def run(*args: Any, backend: str, **kwargs: Any) -> Scores:
        def refuse(*_: Any) -> None:
            raise AssertionError("the reference was called")

        monkeypatch.setattr(module, "sample_and_score", real if backend != "triton" else refuse)
        return real_call(*args, backend=backend, **kwargs)

    monkeypatch.setitem(globals(), "sample_and_score", run)


pytestmark = pytest.mark.usefixtures("alone")


def expect_alike(logits: Tensor, allowance: float = 0.02, **kwargs: Any) -> Scores:
    """Tokens are the reference's, but where moving logits by a rounding makes it choose as we did;
    numbers near those of the fp64 reference."""
    got = sample_and_score(logits, **kwargs, backend="triton")
    want = sample_and_score(logits, **kwargs, backend="reference")
    close = got.tokens == want.tokens
    if not close.all():
        assert (~close).sum() <= max(1, allowance * close.numel())
        ramp = torch.linspace(-1, 1, logits.shape[-1], dtype=torch.float64)
        for tilt in range(-8, 8):  # a tilt moves the cumulative sum, which plain noise does not
            noise = 2**-22 * torch.randn(logits.shape, dtype=torch.float64)
            moved = logits.double() * (1 + noise) + 2**-24 * tilt * ramp
            close |= got.tokens == sample_and_score(moved, **kwargs, backend="reference").tokens
        assert close.all()
    same = got.tokens == want.tokens
    exact = sample_and_score(logits.double(), **kwargs, backend="reference")
    for x, y, tolerance in ((got.lse, exact.lse, 2e-6), (got.confidence, exact.confidence, 4e-6)):
        assert x.dtype == FP32
        torch.testing.assert_close(
            x[same].double(), y[same], rtol=tolerance, atol=tolerance, equal_nan=True
        )
    return got


def rows(*shape: int, dtype: torch.dtype = FP32, padding: int = 0) -> Tensor:
    """Logits as a view of rows of V + padding entries; a twentieth is -inf."""
    V = shape[-1]
    x = torch.randn(*shape[:-1], V + padding) * 4
    x[torch.rand(x.shape) < 0.05] = -torch.inf
    x[..., 0] = 1.0
    x[..., V:] = torch.nan
    return x.to(dtype)[..., :V]


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("V", [1, 2, 127, 4096, 4097, 9001])
def test_sizes(V: int, dtype: torch.dtype) -> None:
    for number, confidence in enumerate(("probability", "margin", "neg_entropy")):
        kwargs: dict[str, Any] = dict(seed=SEEDS[:2], offset=number)
        if number:
            kwargs["temperature"] = torch.tensor([0.0, 0.7])
        padding = (0, 8, 3)[number]  # a padded vocabulary, and an odd stride
        x = rows(2, 2, V, dtype=dtype, padding=padding)
        expect_alike(x, confidence=confidence, tempered=number == 2, **kwargs)


def test_a_real_vocabulary() -> None:
    x = rows(1, 2, 128256, dtype=BF16)
    expect_alike(x, temperature=1.0, confidence="margin", uniforms=torch.tensor([[0.3, 0.99999]]))


OPTIONS: dict[str, dict[str, Any]] = {
    "one_temperature": dict(temperature=0.6, confidence="neg_entropy"),
    "tempered": dict(temperature=1.3, tempered=True),
    "tempered_margin": dict(temperature=torch.tensor([0.0, 0.5, 1.0, 3.0]), tempered=True,
                            confidence="margin"),
    "tempered_entropy": dict(temperature=0.4, tempered=True, confidence="neg_entropy"),
    "random_confidence": dict(temperature=0.9, confidence="random", offset=2**45 + 9),
    "gumbel": dict(temperature=torch.tensor([0.0, 0.5, 1.0, 3.0]), sampler="gumbel"),
    "gumbel_extreme": dict(temperature=torch.tensor([1e-4, 1e-30, torch.inf, 50.0]),
                           sampler="gumbel", tempered=True),
    "extreme": dict(temperature=torch.tensor([1e-4, 1e-30, torch.inf, 50.0])),
    "bad_temperatures": dict(temperature=torch.tensor([-1.0, torch.nan, -torch.inf, 1.0])),
    "top_k": dict(temperature=0.8, top_k=torch.tensor([1, 5, 0, 127])),
    "top_p": dict(temperature=0.8, top_p=torch.tensor([0.9, 0.0, 1.0, 0.3]), tempered=True),
    "min_p": dict(temperature=1.0, min_p=torch.tensor([0.1, 2.0, 0.0, torch.nan]), tempered=True,
                  confidence="margin"),
    "all_filters": dict(temperature=torch.tensor([0.0, 0.5, 1.0, 3.0]), top_k=9, top_p=0.9,
                        min_p=0.05, tempered=True, confidence="neg_entropy"),
    "joint": dict(temperature=2.0, top_k=9, top_p=0.8, filter_order="joint", tempered=True),
    "joint_gumbel": dict(temperature=torch.tensor([0.0, 0.5, 1.0, 3.0]), top_k=9, top_p=0.8,
                         filter_order="joint", sampler="gumbel"),
    "greedy_filtered": dict(temperature=0.0, top_k=3, tempered=True),
    "excluded": dict(temperature=1.0, exclude_ids=[3, 126, 0], confidence="neg_entropy"),
    "excluded_tensor": dict(exclude_ids=torch.tensor([[0, 1], [-1, 5], [126, 500], [7, 7]])),
    "many_excluded": dict(temperature=1.0, exclude_ids=list(range(3, 40))),
    "scalar_seed": dict(temperature=1.0, seed=2**63 - 9, offset=torch.tensor(2**50)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    x = rows(4, 2, 127, dtype=BF16 if len(name) % 2 else FP32)
    expect_alike(x, **{"seed": SEEDS, **OPTIONS[name]})


def test_bias_grammar_and_positions() -> None:
    """Also an id named twice, ids outside, a bias that forbids, bits of rows that allow nothing."""
    x = rows(2, 3, 127)
    ids = torch.randint(-1, 130, (2, 3, 4), dtype=torch.int32)
    ids[..., 1] = ids[..., 0]
    bias = torch.randn(2, 3, 4) * 5
    bias[..., 3] = -torch.inf
    allowed = torch.randint(-(2**31), 2**31 - 1, (2, 3, 4), dtype=torch.int32)
    allowed[1, 2] = 0
    wide = torch.randint(0, 2**40, (2, 3, 2))[..., 0]
    for more in (dict(), dict(exclude_ids=5, top_p=0.9)):
        kwargs = dict(bias_ids=ids, bias=bias, allowed=allowed, positions=wide, seed=SEEDS[:2])
        got = expect_alike(x, temperature=0.9, **kwargs, **more)
        assert got.tokens[1, 2] == -1


@pytest.mark.parametrize("filtered", [False, True])
def test_probabilities(filtered: bool) -> None:
    """Read as they are, not divided by their sum; a negative one spoils its row."""
    p = rows(2, 3, 200).softmax(-1) * torch.tensor([1.0, 3.0, 0.1])[:, None]
    p[1, 1, 7] = -0.1
    kwargs = dict(top_k=20, top_p=0.9) if filtered else {}
    got = expect_alike(p, probs=True, temperature=0.8, seed=SEEDS[:2], **kwargs)
    assert got.tokens[1, 1] == -1


def test_shapes_and_row_index() -> None:
    x = rows(2, 3, 2, 50)
    for shaped in (x, x[0], x[0, 0], x[0, 0, 0], x.transpose(0, 1)):
        n = shaped[..., 0].numel()
        B = n // shaped.shape[-2] if shaped.dim() > 2 else (n if shaped.dim() > 1 else 1)
        got = expect_alike(shaped, temperature=1.0, seed=torch.arange(B) + 5)
        assert got.tokens.shape == shaped.shape[:-1]
    packed = x.reshape(12, 50)
    packed[5] = torch.nan  # read by nobody
    for index in (torch.tensor([[3, -1], [11, 12], [0, -7]]), torch.tensor([4, 1, -1]).int()):
        ids = torch.randint(-1, 50, (*index.shape, 3))  # a bias is a result's, not a row's
        more = dict(bias_ids=ids, bias=5 * torch.randn(ids.shape))
        got = expect_alike(packed, temperature=1.0, row_index=index, seed=9, **more)
        bad = (index < 0) | (index >= 12)
        assert (got.tokens[bad] == -1).all()
        assert (got.lse[bad] == -torch.inf).all()
    assert sample_and_score(x[:0], backend="triton").tokens.shape == (0, 3, 2)
    none = torch.empty(2, 0, dtype=torch.int64)
    assert sample_and_score(packed, row_index=none, backend="triton").tokens.shape == (2, 0)


def hostile(V: int) -> Tensor:
    x = rows(8, V)
    x[0, V // 2] = torch.nan
    x[1, V - 1] = torch.inf
    x[2, [1, V // 2, V - 1]] = torch.inf
    x[3] = -torch.inf
    x[4, 0], x[4, V - 1] = torch.nan, torch.inf
    x[5] = 3e38
    x[6] = -1e30
    x[7] = -torch.inf
    x[7, V - 1] = 1.0
    return x


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=1.0, confidence="margin"),
    dict(temperature=0.7, confidence="neg_entropy", tempered=True),
    dict(temperature=0.7, sampler="gumbel"),
    dict(temperature=0.7, top_k=4, top_p=0.9, tempered=True),
], ids=["greedy", "margin", "entropy", "gumbel", "filtered"])  # fmt: skip
def test_hostile_rows(options: dict[str, Any]) -> None:
    for V in (90, 4100) if "top_k" not in options else (90,):
        x = hostile(V)
        if "sampler" in options:  # the reference adds noise to -1e30, and so loses it
            x[6] = -1e6
        got = expect_alike(x, seed=torch.arange(8), **options)
        assert (got.tokens == -1).tolist() == [True, False, False, True, True, False, False, False]


def test_given_draws() -> None:
    """0, just below 1, and what is no draw: always a token that has mass."""
    x = torch.full((7, 4099), -torch.inf)
    x[:, [3, 50, 4097]] = torch.tensor([0.0, 1.0, 0.5])
    u = torch.tensor([0.0, 1 - 2**-24, 1.0, torch.nan, -1.0, torch.inf, 0.5])
    want = [3, 4097, 4097, 3, 3, 4097, 50]
    for dtype in (FP32, torch.float64):
        got = expect_alike(x, temperature=1.0, uniforms=u.to(dtype))
        assert got.tokens.tolist() == want
    got = expect_alike(x, temperature=1.0, uniforms=u, top_k=2)
    assert got.tokens.tolist() == [v if v != 3 else 50 for v in want]


def test_alone_or_in_a_batch() -> None:
    """With [B] seeds a request's bits are its own, also where a program takes several chunks."""
    x = rows(4, 3, 4200, dtype=BF16)
    for options in (dict(tempered=True, confidence="neg_entropy"), dict(sampler="gumbel")):
        kwargs = dict(temperature=0.8, **options)
        whole = sample_and_score(x, seed=SEEDS, **kwargs, backend="triton")
        one = sample_and_score(x[2:3], seed=SEEDS[2:3], **kwargs, backend="triton")
        assert all(torch.equal(a[2:3], b) for a, b in zip(whole, one))
    from pydecode.triton_kernels import row_launches

    with pytest.MonkeyPatch.context() as change:
        change.setattr(row_launches, "chunks_a_program", lambda rows, chunks: 2)
        again = sample_and_score(x, seed=SEEDS, **kwargs, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_what_cannot_run() -> None:
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        sample_and_score(torch.zeros(2, 3).double(), backend="triton")
