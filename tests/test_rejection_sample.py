"""``rejection_sample`` one request at a time: decisions, layouts, data at the edges, errors."""

from typing import Any

import numpy as np
import pytest
import torch
from laws_oracle import decide, filtered_law
from torch import Tensor

import pydecode
from pydecode import Verified, philox

RULES = ["token", "block"]
F64 = torch.float64
NAN, INF = float("nan"), float("inf")


def emitted(out: Verified) -> list[list[int]]:
    """The emitted tokens of each request; checks the shape of everything behind them."""
    width = out.tokens.shape[1]
    assert out.tokens.dtype == torch.int64
    assert out.num_accepted.dtype == out.path.dtype == torch.int32
    rows = []
    for tokens, path, n in zip(out.tokens.tolist(), out.path.tolist(), out.num_accepted.tolist()):
        count = n + 1 if path[0] == 0 else 0
        assert count or n == 0
        assert path == [*range(count)] + [-1] * (width - count)
        assert tokens[count:] == [-1] * (width - count)
        rows.append(tokens[:count])
    return rows


def same(a: Verified, b: Verified) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3]))


def inputs(B: int, G: int, V: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Target logits, drafts and draft logits that resemble each other."""
    target = 1.5 * torch.randn(B, G + 1, V, dtype=F64)
    draft = target[:, :G] + 0.7 * torch.randn(B, G, V, dtype=F64)
    tokens = (draft - torch.empty_like(draft).exponential_().log()).argmax(-1)  # Gumbel's trick
    return target.to(dtype), tokens, draft.to(dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("given", ["logits", "probs", "deterministic"])
def test_decisions_are_the_plain_loops(
    rule: str, dtype: torch.dtype, given: str, backend: str
) -> None:
    B, G, V = 96, 4, 13
    target, x, draft = inputs(B, G, V, dtype)
    u, n = torch.rand(B, G + 1, dtype=F64), torch.randint(0, G + 1, (B,))
    kwargs: dict[str, Any] = dict(uniforms=u, num_drafts=n, rule=rule, backend=backend)
    if given == "probs":
        target, draft = 3 * target.softmax(-1), draft.softmax(-1) / 2  # not normalised
        out = pydecode.rejection_sample(
            None, x, draft_probs=draft, target_probs=target, temperature=0.3, **kwargs
        )
        law = lambda row: row / row.sum()  # noqa: E731
    else:
        q = None if given == "deterministic" else draft
        out = pydecode.rejection_sample(target, x, q, temperature=0.7, **kwargs)
        law = lambda row: filtered_law(row, 0.7)  # noqa: E731
    p, q = (np.apply_along_axis(law, 2, t.double().numpy()) for t in (target, draft))
    compared = 0
    for b, got in enumerate(emitted(out)):
        m = int(n[b])
        args = p[b, : m + 1], x[b, :m].tolist(), None if given == "deterministic" else q[b, :m]
        near = 0.0 if dtype == F64 else 1e-5  # a decision may turn only within rounding
        want = [decide(*args, u[b].numpy() * scale, rule) for scale in (1 - near, 1, 1 + near)]
        if want[0] == want[1] == want[2]:
            assert got == want[1], b
            compared += 1
    assert compared > 0.9 * B
    assert (out.num_accepted == n).any()
    assert (out.num_accepted < n).any()


@pytest.mark.parametrize("rule", RULES)
def test_filters_per_request(rule: str, backend: str) -> None:
    """Logits with many ties, so that thresholds on values matter; every filter off for some."""
    B, G, V = 400, 2, 7
    target, draft = torch.randint(0, 4, (B, 3, V)).double(), torch.randint(0, 4, (B, 2, V)).double()
    x, u = torch.randint(0, V, (B, G)), torch.rand(B, G + 1, dtype=F64)
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (B,))]  # noqa: E731
    top_k, temperature = pick(-1, 0, 1, 2, 3, 7, 9), pick(0.0, 0.5, 1.0, 2.0).double()
    top_p, min_p = pick(0.3, 0.61, 0.87, 1.0, 2.0).double(), pick(-1.0, 0.0, 0.17, 0.5).double()
    own = pick(0.7, 1.3).double()
    bits = torch.randint(1, 2**V, (B, G + 1, 1), dtype=torch.int32)
    for filter_draft in (True, False):
        out = pydecode.rejection_sample(
            target,
            x,
            draft,
            allowed=bits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            draft_temperature=own,
            filter_draft=filter_draft,
            uniforms=u,
            rule=rule,
            backend=backend,
        )
        for b, got in enumerate(emitted(out)):
            t, *filters = (float(f[b]) for f in (temperature, top_p, min_p))
            filters = [int(top_k[b]), *filters]
            grammar = [(int(bits[b, i, 0]) >> np.arange(V)) & 1 == 1 for i in range(G + 1)]
            p = [filtered_law(r.numpy(), t, *filters, g) for r, g in zip(target[b], grammar)]
            q = [
                filtered_law(r.numpy(), float(own[b]), *(filters * filter_draft)) for r in draft[b]
            ]
            law = (np.stack(p), x[b].tolist(), None if t == 0 else np.stack(q))
            assert got == decide(*law, u[b].numpy(), rule), b


@pytest.mark.parametrize("rule", RULES)
def test_layouts_change_nothing(rule: str, backend: str) -> None:
    """Padded vocabularies, packed rows in any order, any index dtype, numbers as tensors."""
    B, G, V = 9, 3, 37
    target, x, draft = inputs(B, G, V, torch.float32)
    want = pydecode.rejection_sample(
        target, x, draft, top_p=0.9, seed=5, rule=rule, backend=backend
    )
    padded = torch.full((G + 1, B, V + 27), NAN)[..., :V].transpose(0, 1)
    padded.copy_(target)
    order, draft_order = torch.randperm(B * (G + 1)), torch.randperm(B * G)
    rows, draft_rows = target.flatten(0, 1)[order], draft.flatten(0, 1)[draft_order]
    for kind in (torch.int32, torch.int64):
        index = order.argsort().reshape(B, G + 1).to(kind)
        draft_index = draft_order.argsort().reshape(B, G).to(kind)
        packed = pydecode.rejection_sample(
            rows,
            x.to(kind),
            draft_rows,
            row_index=index,
            draft_row_index=draft_index,
            num_drafts=torch.tensor(G, dtype=kind),
            top_p=torch.tensor(0.9),
            seed=torch.tensor(5, dtype=kind),
            offset=torch.zeros(B, dtype=kind),
            positions=torch.tensor(0, dtype=kind),
            rule=rule,
            backend=backend,
        )
        assert same(packed, want)
    strided = pydecode.rejection_sample(
        padded, x.t().contiguous().t(), draft, top_p=0.9, seed=5, rule=rule, backend=backend
    )
    assert same(strided, want)


@pytest.mark.parametrize("rule", RULES)
def test_a_request_alone_and_in_any_batch(rule: str, backend: str) -> None:
    B, G, V = 17, 3, 129
    target, x, draft = inputs(B, G, V, torch.float32)
    seed, position = torch.randint(-(2**60), 2**60, (B,)), torch.randint(0, 9999, (B,))

    def run(i: Tensor, seed: Any) -> Verified:
        return pydecode.rejection_sample(
            *(target[i], x[i], draft[i]),
            **dict(rule=rule, seed=seed, offset=3, positions=position[i], return_logprobs=True),
            backend=backend,
        )

    whole, order = run(torch.arange(B), seed), torch.randperm(B)
    for i in (order, *torch.arange(B)[:, None]):
        for got, want in zip(run(i, seed[i]), whole):
            assert torch.equal(got, want[i])
    # a scalar seed is mixed with the batch index, as philox.py says
    high = torch.arange(B) << 32
    assert same(run(torch.arange(B), 7), run(torch.arange(B), 7 + high))
    minus_one = torch.tensor(-1)
    assert same(run(torch.arange(B), 2**64 - 1), run(torch.arange(B), minus_one))
    twins = run(torch.zeros(64, dtype=torch.int64), 2**64 - 1)
    assert len({tuple(row) for row in twins.tokens.tolist()}) > 8


def test_the_draws_are_the_specified_ones(backend: str) -> None:
    B, G, V = 50, 3, 11
    target, x, draft = inputs(B, G, V)
    seed, offset = torch.randint(-(2**62), 2**62, (B,)), torch.randint(2**40, (B,))
    position = torch.randint(2**31, (B,))
    key = [seed[:, None], offset[:, None], position[:, None]]
    u = [philox.uniform(philox.ACCEPT, *key, torch.arange(G))]
    u.append(philox.uniform(philox.RESAMPLE, *key, torch.tensor([-1])))
    for rule in RULES:
        fixed = pydecode.rejection_sample(
            target, x, draft, rule=rule, uniforms=torch.cat(u, -1), backend=backend
        )
        numbers = dict(seed=seed, offset=offset, positions=position)
        own = pydecode.rejection_sample(target, x, draft, rule=rule, backend=backend, **numbers)
        assert same(own, fixed)


def test_logprobs_are_of_the_unfiltered_law(backend: str) -> None:
    B, G, V = 12, 2, 20
    target, x, draft = inputs(B, G, V)
    t = torch.rand(B, dtype=F64) + 0.3
    t[::3] = 0
    bits = torch.randint(1, 2**V, (B, G + 1, 1), dtype=torch.int32)
    kwargs: dict[str, Any] = dict(allowed=bits, return_logprobs=True, backend=backend)
    out = pydecode.rejection_sample(target, x, draft, temperature=t, top_k=3, **kwargs)
    allowed = (bits >> torch.arange(V)) & 1 == 1
    divided = target / torch.where(t == 0, 1.0, t)[:, None, None]
    logp = divided.masked_fill(~allowed, -INF).log_softmax(-1)
    probs = 2 * logp.exp()
    given = pydecode.rejection_sample(None, x, draft, target_probs=probs, **kwargs)
    for got in (out, given):
        want = logp.gather(-1, got.tokens.clamp(min=0)[..., None])[..., 0]
        want = torch.where(got.tokens >= 0, want, 0.0)
        torch.testing.assert_close(got.logprobs, want, rtol=1e-12, atol=1e-12)
    half = pydecode.rejection_sample(target.bfloat16(), x, return_logprobs=True, backend=backend)
    assert half.logprobs.dtype == torch.float32
    assert pydecode.rejection_sample(target, x, draft, backend=backend).logprobs is None
