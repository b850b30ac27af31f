"""rejection_sample_tree in Triton, interpreted, against the reference: random trees, all options.

Bad data: test_rejection_sample_tree_hostile.py; exact laws: test_rejection_sample_tree_exact.py.
"""

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

import pydecode
from pydecode.check import run
from pydecode.check.draw import Case

SAMPLED = ["recursive", "without_replacement", "k_seq", "traversal"]
SAMPLED += ["traversal_without_replacement"]
RULES = [*SAMPLED, "target_only"]
BF16 = torch.bfloat16


def trees(B: int, T: int) -> Tensor:
    """Parents that precede their children, some of them wide, some deep."""
    parents = (torch.rand(B, T) ** torch.tensor([0.5, 1, 3])[torch.randint(3, (B, 1))]) * (
        torch.arange(T)
    )
    parents = parents.long()
    parents[:, 0] = -1
    return parents


def drafts(q: Tensor, parents: Tensor) -> Tensor:
    """Tokens drawn from the law of each node's parent; siblings repeat now and then."""
    law = q.softmax(-1).gather(1, parents.clamp(min=0)[..., None].expand(q.shape))
    return torch.multinomial(law.flatten(0, 1), 1).view(parents.shape)


def bits(B: int, R: int, V: int) -> Tensor:
    """A grammar that allows most tokens."""
    words = torch.randint(-(2**31), 2**31 - 1, (2, B, R, -(-V // 32))).int()
    return words[0] | words[1]


def random_case(B: int, T: int, V: int, rule: str, kind: str) -> Case:
    """Requests that differ in temperature, filters, counts, coins and faults."""
    p = 2 * torch.randn(B, T, V)
    q = p + torch.randn(B, T, V)
    if rule != "k_seq":  # whose residual would be rounding errors
        q[::5] = p[::5]  # no residual at all
    p[1::7, :, : V // 2] = -torch.inf
    q[2::7, :, V // 2 :] = -torch.inf  # drafts of q = 0, below
    parents = trees(B, T)
    tokens = drafts(q, parents)
    tokens[torch.rand(B, T) < 0.1] = 1
    odd = torch.rand(B, T) < 0.03
    tokens[odd] = torch.tensor([-1, V, 2**40])[torch.randint(3, (int(odd.sum()),))]
    parents[torch.rand(B, T) < 0.03] = T
    u = torch.rand(B, T + 1)
    for value in (0.0, 1 - 2**-24, -1.0, torch.nan):
        u[torch.rand(B, T + 1) < 0.04] = value
    if rule == "k_seq":  # at its best rho, entries of the residual are 0 but for rounding, which
        u[:, -1] = 0.001 + 0.998 * torch.rand(B)  # a last coin of 0 or 1 finds
    kwargs: dict[str, Any] = dict(
        rule=rule,
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.5])[torch.randint(4, (B,))],
        num_drafts=torch.randint(T // 2, T, (B,)),
        uniforms=u,
        return_logprobs=True,
    )
    if kind == "filters":
        kwargs.update(
            top_k=torch.randint(-1, V + 1, (B,)),
            top_p=torch.rand(B) + 0.3,
            min_p=torch.rand(B) * 0.2 - 0.05,
            draft_temperature=torch.tensor([0.0, 0.9, 1.3])[torch.randint(3, (B,))],
            filter_draft=bool(torch.rand(()) < 0.5),
            max_depth=2,
            allowed=bits(B, T, V),
        )
    if rule == "target_only":
        kwargs.update(threshold_single=0.6, threshold_acc=0.8)
    elif kind == "probs":
        kwargs["draft_probs"] = 4 * q.softmax(-1)  # a power of two keeps equal laws equal
    elif kind == "reduced":
        vocab = torch.randperm(V + 2)[: V - 1] - 1  # two ids are none of the target's
        vocab = vocab.sort().values if rule != "recursive" else vocab
        kwargs.update(draft_vocab=vocab, draft_logits=q[..., : V - 1].to(BF16))
    elif kind != "delta":
        kwargs["draft_logits"] = q
    if kind == "probs":
        return Case((None, tokens, parents), dict(kwargs, target_probs=p.softmax(-1) / 2), kind)
    if kind == "packed":
        index = torch.randperm(B * T).view(B, T)
        rows = torch.empty(B * T, V)
        rows[index] = p
        absent = torch.rand(B, T) < 0.1
        kwargs["row_index"] = torch.where(absent, torch.tensor([-1, B * T]).repeat(B, 1)[:, :1],
                                          index).int()  # fmt: skip
        kwargs["row_index"][3::8, -1] = B * T
        if rule != "target_only":
            kwargs["draft_logits"] = q.flatten(0, 1)
            own = torch.arange(B * T).view(B, T)
            kwargs["draft_row_index"] = torch.where(torch.rand(B, T) < 0.1, -1, own)
        p = rows
    return Case((p, tokens, parents), kwargs, kind)


def agree(case: Case) -> tuple[int, list[Tensor]]:
    """Requests decided otherwise than by the fp64 reference, each of them within its margin."""
    got = run.call("rejection_sample_tree", case, "triton")
    want = run.call("rejection_sample_tree", run.wide(case), "reference")
    same = run.requests_alike(got, want)
    if not bool(same.all()):
        within = run.alike("rejection_sample_tree", case, got)
        assert within is not None
        assert bool(within.all()), (~within).nonzero().flatten().tolist()
    torch.testing.assert_close(got[-1][same].double(), want[-1][same], rtol=1e-5, atol=1e-5)
    return int((~same).sum()), got


KINDS = ["plain", "filters", "probs", "reduced", "packed", "delta"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_random_trees(rule: str, kind: str) -> None:
    if rule == "target_only" and kind in ("reduced", "delta"):
        pytest.skip("target_only reads no draft law")
    otherwise, got = agree(random_case(9, 8, 7, rule, kind))
    assert otherwise <= 1
    assert len(got[1].unique()) > 1


def test_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of many nodes: a leaf-first walk works out its rows' numbers in several turns."""
    from pydecode.triton_kernels import traversal

    monkeypatch.setattr(traversal, "AT_ONCE", tl.constexpr(4))
    for kind in ("filters", "packed"):
        agree(random_case(9, 8, 7, "traversal", kind))


@pytest.mark.parametrize(("V", "dtype"), [(127, torch.float16), (9001, BF16)])
@pytest.mark.parametrize("rule", RULES)
def test_vocabularies(rule: str, V: int, dtype: torch.dtype) -> None:
    """Rows of one chunk and more, of strides that no vector load fits."""
    B, T = 2 if V < 4096 else 1, 5
    p = (3 * torch.randn(B, T, V + 1)).to(dtype)[..., 1:]
    q = (p + torch.randn(B, T, V + 1)[..., 1:]).to(p.dtype)
    parents = torch.tensor([[-1, 0, 0, 0, 1]])
    tokens = drafts(q.float(), parents.expand(B, T))
    given = dict(draft_logits=q) if rule != "target_only" else {}
    run_ = dict(rule=rule, uniforms=torch.rand(B, T + 1).sqrt(), return_logprobs=True)
    agree(Case((p, tokens, parents), dict(given, **run_, top_k=50, temperature=1.3), str(V)))


def test_a_whole_vocabulary() -> None:
    B, T, V = 1, 3, 128256
    p = (4 * torch.randn(B, T, V)).to(BF16)
    q = p.clone()
    q[:, 0, :1000] += 1
    vocab = torch.arange(0, V, 4)
    parents = torch.tensor([[-1, 0, 0]])
    tokens = vocab[drafts(q[..., ::4].float(), parents)]
    more = dict(draft_logits=q[..., ::4].contiguous(), draft_vocab=vocab, rule="recursive")
    u = torch.tensor([[0.5, 0.9999, 0.9999, 0.7]])
    _, got = agree(
        Case((p, tokens, parents), dict(more, uniforms=u, return_logprobs=True), "whole")
    )
    assert (got[0][0, 0] >= 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_draws_are_those_of_the_specification(rule: str) -> None:
    """Streams, keys and indices, with seeds of each request and of all."""
    B, T, V = 8, 7, 9
    call = random_case(B, T, V, rule, "plain").kwargs
    call.pop("uniforms")
    p = 2 * torch.randn(B, T, V)
    parents = trees(B, T)
    args = (p, drafts(p, parents), parents)
    for seed in (torch.randint(0, 2**62, (B,)), 2**40 + 7, torch.tensor(-3)):
        key = dict(seed=seed, offset=torch.arange(B) + 2**33, positions=5)
        got, want = (
            pydecode.rejection_sample_tree(*args, **call, **key, backend=backend)
            for backend in ("triton", "reference")
        )
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.path, want.path)


@pytest.mark.parametrize("rule", RULES)
def test_a_request_is_alone_in_any_batch(rule: str) -> None:
    """Bit for bit, log-probabilities too."""
    B, T, V = 4, 5, 4099
    p = 2 * torch.randn(B, T, V)
    q = p + torch.randn(B, T, V)
    parents = trees(B, T)
    call = dict(
        target_logits=p,
        draft_tokens=drafts(q, parents),
        parents=parents,
        draft_logits=q if rule != "target_only" else None,
        seed=torch.randint(0, 2**62, (B,)),
        temperature=torch.tensor([0.0, 0.7, 1.0, 2.0]),
        top_p=torch.tensor([0.9, 1.0, 0.8, 0.95]),
    )
    more = dict(rule=rule, return_logprobs=True, backend="triton")
    whole = pydecode.rejection_sample_tree(**call, **more)
    for b in (1,):
        part = {k: None if v is None else v[b : b + 1] for k, v in call.items()}
        for x, y in zip(pydecode.rejection_sample_tree(**part, **more), whole, strict=True):
            assert torch.equal(x, y[b : b + 1])


@pytest.mark.parametrize(
    ("rule", "more", "launches"),
    [
        ("recursive", {}, ["walk"]),
        ("recursive", dict(top_p=0.9, temperature=0.0), ["walk"]),
        ("k_seq", dict(draft_vocab=torch.arange(5)), ["index_vocab", "walk"]),
        ("target_only", {}, ["walk"]),
        ("traversal", {}, ["chunk_laws", "leaf_first"]),
        ("traversal", dict(top_k=3), ["chunk_laws", "row_floors", "leaf_first"]),
    ],
)
def test_launches(
    rule: str, more: dict[str, Any], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    names: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    p = torch.randn(2, 4, 5)
    tokens, parents = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[-1, 0, 0, 1]])
    draft = None if rule == "target_only" else p
    out = pydecode.rejection_sample_tree(
        p, tokens, parents, draft_logits=draft, rule=rule, backend="triton", **more
    )
    assert names == launches
    empty = pydecode.rejection_sample_tree(
        *(p[:0], tokens[:0], parents), draft_logits=p[:0], rule=rule, backend="triton", **more
    )
    assert names == launches
    assert empty.tokens.shape == (0, out.tokens.shape[1])


def test_what_cannot_run() -> None:
    p = torch.randn(1, 2, 5).double()
    tokens, parents = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[-1, 0]])
    with pytest.raises(pydecode.BackendUnavailable, match="fp32"):
        pydecode.rejection_sample_tree(p, tokens, parents, backend="triton")
