"""Every op on rows of logits: vocabularies of one token and of real models, rows far apart."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pydecode

MASK = 0
B, N = 2, 3  # requests, rows of each
PARENTS = torch.tensor([[-1, 0, 0]])
FILTERS: dict[str, Any] = dict(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
FAR = 2**31


def laws(V: int) -> tuple[Tensor, Tensor, Tensor]:
    """(target, draft, drafted tokens): few tokens have most of the mass, so that no decision hangs
    on a rounding."""
    target = torch.randn(B, N, V) * 2
    target.scatter_(-1, torch.randint(V, (B, N, 4)), 16 + torch.rand(B, N, 4))
    draft = target + torch.randn(B, N, V) / 2
    tokens = draft.argmax(-1)
    tokens[:, 1:] = draft[:, :2].flatten(0, 1).softmax(-1).multinomial(1).view(B, 2)
    return target.half(), draft.half(), tokens


def chain(rule: str, **more: Any) -> Callable[..., Any]:
    def run(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
        q = q if q.dim() == 2 else q[:, : N - 1]
        return pydecode.rejection_sample(
            p, tokens[:, 1:], q, rule=rule, uniforms=u[:, :N], **more, **given
        )

    return run


def tree(rule: str, **more: Any) -> Callable[..., Any]:
    def run(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
        return pydecode.rejection_sample_tree(
            p, tokens, PARENTS, draft_logits=q, rule=rule, uniforms=u, **more, **given
        )

    return run


def greedy(rule: str) -> Callable[..., Any]:
    def run(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
        return pydecode.verify_greedy(tokens, p, parents=PARENTS, rule=rule, top_k=3, **given)

    return run


def coupled(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
    return pydecode.coupled_accept(q, p, tokens, ratio=0.5, seed=3, **given)


def scored(**more: Any) -> Callable[..., Any]:
    def run(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
        return pydecode.sample_and_score(p, seed=3, **more, **given)

    return run


def unmasked(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
    masked = torch.full(p.shape[:2], MASK)
    return pydecode.unmask(masked, p, mask_id=MASK, max_commit=2, exclude_ids=[], **given)


def embedded(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor, **given: Any) -> Any:
    table = torch.arange(p.shape[-1] * 2.0).view(-1, 2).cos()
    return pydecode.soft_embed(p, table, mask_id=0, top_p=0.9, **given)


OPS: dict[str, Callable[..., Any]] = {
    "token": chain("token"),
    "block": chain("block", **FILTERS),
    "recursive": tree("recursive"),
    "filtered": tree("without_replacement", **FILTERS),
    "traversal": tree("traversal"),
    "exact": greedy("exact"),
    "top_k": greedy("top_k"),
    "typical": greedy("typical"),
    "coupled": coupled,
    "inverse_cdf": scored(temperature=0.7, confidence="margin"),
    "gumbel": scored(sampler="gumbel", tempered=True, confidence="neg_entropy", **FILTERS),
    "unmask": unmasked,
    "soft_embed": embedded,
}


def tensors(result: Any) -> Iterator[Tensor]:
    for x in result if isinstance(result, tuple) else (result,):
        if isinstance(x, tuple):
            yield from tensors(x)
        elif x is not None:
            yield x


def expect_alike(got: Any, want: Any) -> None:
    for x, y in zip(tensors(got), tensors(want), strict=True):
        if x.dtype.is_floating_point:
            torch.testing.assert_close(x.double(), y.double(), rtol=2e-5, atol=2e-5)
        else:
            assert torch.equal(x, y)


def expect_equal(got: Any, want: Any) -> None:
    for x, y in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("V", [1, 2, 127, 128256, 151936, 2**18 + 1])
@pytest.mark.parametrize("op", OPS)
def test_sizes(op: str, V: int) -> None:
    inputs = [*laws(V), 0.05 + 0.9 * torch.rand(B, N + 1)]
    if V > 1000:  # for time's sake
        inputs = [x[1:] for x in inputs]
    want = OPS[op](*inputs, backend="reference")
    expect_alike(OPS[op](*inputs, backend="triton"), want)


@pytest.fixture(scope="module")
def far_apart() -> Tensor:
    """More than 2^31 numbers, of which memory holds the few pages that are written."""
    return torch.empty(FAR + 2**20, dtype=torch.float16)


@pytest.mark.parametrize("op", OPS)
def test_rows_past_2_to_the_31(op: str, far_apart: Tensor) -> None:
    """The second request's begin 2^31 elements after the first's."""
    V = 300
    p, q, tokens = laws(V)
    inputs = tokens, torch.rand(B, N + 1)
    want = OPS[op](p, q, *inputs, backend="triton")
    far = [far_apart.as_strided((B, N, V), (FAR, V + 5, 1), at) for at in (0, 2**19)]
    for x, y in zip(far, (p, q), strict=True):
        x.copy_(y)
    expect_equal(OPS[op](*far, *inputs, backend="triton"), want)


INDEXED = [op for op in OPS if op not in ("coupled", "unmask", "soft_embed")]


@pytest.mark.parametrize("op", INDEXED)
def test_an_index_past_2_to_the_31(op: str, far_apart: Tensor) -> None:
    """The last of 32,774 rows, 2^16 elements apart."""
    V = 300
    p, q, tokens = laws(V)
    inputs = tokens, torch.rand(B, N + 1)
    want = OPS[op](p, q, *inputs, backend="triton")
    n = FAR // 2**16 + B * N
    index = torch.arange(n - B * N, n).view(B, N)
    packed = [far_apart.as_strided((n, V), (2**16, 1), at) for at in (0, 2**15)]
    for x, y in zip(packed, (p, q), strict=True):
        x[n - B * N :] = y.flatten(0, 1)
    given: dict[str, Any] = dict(row_index=index, backend="triton")
    if op in ("token", "block"):
        given["draft_row_index"] = index[:, :2]
    elif op in ("recursive", "filtered", "traversal"):
        given["draft_row_index"] = index
    expect_equal(OPS[op](*packed, *inputs, **given), want)
