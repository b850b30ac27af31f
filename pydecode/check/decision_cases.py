"""Random cases of verification and unmasking: ops whose results are decisions about tokens."""

from typing import Any

import torch
from torch import Tensor

from .. import sample_and_score as sample
from ..trees.masks import pack_bits
from .draw import Case, Draw

TREE_RULES = (
    "recursive",
    "without_replacement",
    "k_seq",
    "traversal",
    "traversal_without_replacement",
    "target_only",
)
COMMIT_RULES = (
    "top_k",
    "threshold",
    "factor",
    "entropy",
    "entropy_bound",
    "prefix",
    "sequential",
    "segments",
    "posterior",
    "external",
)


def _vocab(d: Draw) -> int:
    return d.choice([1, 2, 127, 1000, 5003, 128256 if d.big else 5003])


def _logits(d: Draw, *shape: int) -> Tensor:
    """Logits in a padded vocabulary, some of them -inf."""
    x = d.normal(*shape[:-1], shape[-1] + d.choice([0, 8]), scale=3.0)[..., : shape[-1]]
    return x.masked_fill(d.bools(0.05, *x.shape), -torch.inf) if shape[-1] > 20 else x


def _near(d: Draw, x: Tensor) -> Tensor:
    """A draft model's logits, near enough to the target's that drafts are accepted."""
    return x + d.normal(*x.shape)


def _poison(d: Draw, x: Tensor) -> str:
    """A NaN in some row now and then: that request, and no other, must be undecided."""
    if not d.chance(0.2) or not x.numel():
        return ""
    x.view(-1, x.shape[-1])[d.integer(0, x[..., 0].numel() - 1), -1] = torch.nan
    return " NaN"


def _filters(d: Draw, B: int) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    kind = d.choice(["one", "greedy", "each"])
    kwargs["temperature"] = {"one": 0.8, "greedy": 0.0, "each": d.uniform(B).round(decimals=1)}[
        kind
    ]
    if d.chance(0.4):
        kwargs["top_k"] = d.choice([3, 50, d.integers(0, 20, B)])
    if d.chance(0.4):
        kwargs["top_p"] = d.choice([0.9, d.uniform(B)])
    if d.chance(0.2):
        kwargs["min_p"] = 0.05
    return kwargs


def _allowed(d: Draw, *rows: int, V: int) -> dict[str, Any]:
    """A grammar's bits, int32 [..., ceil(V/32)]; now and then a row that allows nothing."""
    if not d.chance(0.25):
        return {}
    bits = d.bools(0.7, *rows, V) & ~d.bools(0.02, *rows, 1)
    words = pack_bits(bits).view(torch.int32)[..., : -(-V // 32)]  # little end first
    return dict(allowed=words.contiguous())


def _uniforms(d: Draw, *shape: int, residual: bool = False) -> dict[str, Any]:
    """Draws in place of the seeded ones; 0 and what counts as 1 among them.

    ``residual``: the last column draws from differences, whose zeros are zeros but for rounding.
    """
    if not d.chance(0.2):
        return {}
    u = d.uniform(*shape)
    at = d.integers(0, 19, *shape)
    u = u.masked_fill(at == 0, 0.0).masked_fill(at == 1, torch.nan).masked_fill(at == 2, -1.0)
    if residual:
        u[..., -1] = u[..., -1].clamp(min=0.01)
    return dict(uniforms=u.to(d.choice([torch.float32, torch.float64])))


def _no_row(d: Draw, index: Tensor) -> Tensor:
    """Some rows are none."""
    return index.masked_fill(d.bools(0.1, *index.shape), -1) if d.chance(0.4) else index


def _scattered(d: Draw, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[B, R, V] as packed rows in another order, and where each lies."""
    B, R, V = rows.shape
    order = torch.randperm(B * R, generator=d.generator).to(d.device)
    packed = torch.empty_like(rows).view(-1, V).index_copy_(0, order, rows.reshape(-1, V))
    return packed, order.view(B, R)


def _keys(d: Draw, B: int) -> dict[str, Any]:
    return dict(
        seed=d.choice([7, d.integers(0, 2**40, B, dtype=torch.int64)]),
        offset=d.integer(0, 2**40),
        positions=d.choice([5, d.integers(0, 9999, B)]),
    )


def _drafted(d: Draw, law: Tensor) -> Tensor:
    """Tokens from softmax(law), by inverse CDF in fp64."""
    p = law.double().nan_to_num(-50.0, 50.0, -50.0).softmax(-1).cumsum(-1)
    u = d.uniform(*law.shape[:-1])[..., None] * p[..., -1:]
    return (p <= u).sum(-1).clamp(max=law.shape[-1] - 1)


def _label(**parts: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in parts.items())


def rejection_sample(d: Draw) -> Case:
    B, G, V = d.integer(1, 5), d.integer(0, 7), _vocab(d)
    target = _logits(d, B, G + 1, V)
    law = _near(d, target[:, :G])
    tokens = _drafted(d, law)
    kwargs = dict(_filters(d, B), **_keys(d, B), return_logprobs=True)
    kwargs["rule"] = d.choice(["token", "block"])
    kwargs["filter_draft"] = d.chance(0.5)
    kwargs.update(_allowed(d, B, G + 1, V=V), **_uniforms(d, B, G + 1, residual=True))
    if d.chance(0.3):
        kwargs["num_drafts"] = d.integers(0, G, B)
    if d.chance(0.3):
        kwargs["draft_temperature"] = d.choice([1.0, d.uniform(B) + 0.5])
    what = _poison(d, target)
    draft: Tensor | None = law
    kind = d.choice(["logits", "probs", "chosen"])
    if kind == "probs":
        kwargs["draft_probs"], draft = law.float().softmax(-1).to(law.dtype), None
    elif kind == "chosen":
        draft = None
    if kind != "chosen" and V > 2 and d.chance(0.3):  # a draft head over a part of the vocabulary
        vocab = torch.randperm(V, generator=d.generator)[: V // 2].to(d.device)
        kwargs["draft_vocab"] = vocab.int() if d.chance(0.5) else vocab
        draft = draft[..., vocab] if draft is not None else None
        tokens = vocab[_drafted(d, law[..., vocab])]
        if kind == "probs":
            kwargs["draft_probs"] = law[..., vocab].float().softmax(-1).to(law.dtype)
        what += f" Vd={len(vocab)}"
    if d.chance(0.4):  # packed rows
        target, index = _scattered(d, target)
        kwargs["row_index"] = _no_row(d, index)
        what += " packed"
        if draft is not None and G and d.chance(0.5):
            draft, index = _scattered(d, draft)
            kwargs["draft_row_index"] = _no_row(d, index)
    label = _label(B=B, G=G, V=V, rule=kwargs["rule"], draft=kind) + what
    return Case((target, tokens, draft), kwargs, label)


def rejection_sample_tree(d: Draw) -> Case:
    B, T, V = d.integer(1, 3), d.integer(1, 13), _vocab(d)
    rule = d.choice(TREE_RULES)
    parents = torch.stack([d.tree(T) for _ in range(d.choice([1, B]))])
    target = _logits(d, B, T, V)
    law = _near(d, target)
    above = parents.expand(B, T).clamp(min=0)[..., None].expand(B, T, V)
    tokens = _drafted(d, law.gather(1, above))
    kwargs = dict(_filters(d, B), **_keys(d, B), return_logprobs=True, rule=rule)
    kwargs["filter_draft"] = d.chance(0.5)
    if d.chance(0.3):
        kwargs["max_depth"] = d.integer(0, T)
    if d.chance(0.3):
        kwargs["num_drafts"] = d.integers(0, T - 1, B)
    if rule == "target_only":
        kwargs["threshold_single"] = d.choice([1.0, 0.5])
        kwargs["threshold_acc"] = d.choice([1.0, 0.8])
    elif d.chance(0.8):
        kwargs["draft_logits"] = law
    kwargs.update(_allowed(d, B, T, V=V), **_uniforms(d, B, T + 1, residual=True))
    what = _poison(d, target)
    if "draft_logits" in kwargs and V > 2 and d.chance(0.3):
        vocab = torch.randperm(V, generator=d.generator)[: V // 2].to(d.device)
        kwargs["draft_vocab"], kwargs["draft_logits"] = vocab, law[..., vocab]
        tokens = vocab[_drafted(d, kwargs["draft_logits"].gather(1, above[..., : len(vocab)]))]
        what += f" Vd={len(vocab)}"
    if d.chance(0.3):
        target, index = _scattered(d, target)
        kwargs["row_index"] = _no_row(d, index)
        what += " packed"
    return Case((target, tokens, parents), kwargs, _label(B=B, T=T, V=V, rule=rule) + what)


def verify_greedy(d: Draw) -> Case:
    B, T, V = d.integer(1, 5), d.integer(1, 13), max(_vocab(d), 2)
    rule = d.choice(["exact", "top_k", "distance", "typical"])
    target = _logits(d, B, T, V)
    kwargs: dict[str, Any] = dict(rule=rule)
    if d.chance(0.5):
        tokens = d.integers(0, min(V - 1, 5), B, T - 1)
    else:
        kwargs["parents"] = torch.stack([d.tree(T) for _ in range(B)])
        tokens = d.integers(0, min(V - 1, 5), B, T)
    best = target.float().topk(min(3, V)).indices  # so that some drafts are right
    right = best[..., 0] if "parents" in kwargs else best[:, : T - 1, 0]
    tokens = torch.where(d.bools(0.6, *tokens.shape), right.to(tokens.dtype), tokens)
    if rule == "top_k":
        kwargs["top_k"] = d.choice([2, d.integers(1, 4, B)])
    if rule == "distance":
        kwargs["distance"] = 2
    if rule == "typical":
        kwargs["temperature"] = 0.7
    kwargs.update(_allowed(d, B, T, V=V))
    kwargs["first_match"] = d.chance(0.3)
    if d.chance(0.3):
        kwargs["num_drafts"] = d.integers(0, T - 1, B)
    what = _poison(d, target)
    if d.chance(0.3):
        target, index = _scattered(d, target)
        kwargs["row_index"] = _no_row(d, index)
        what += " packed"
    label = _label(B=B, T=T, V=V, rule=rule, tree="parents" in kwargs) + what
    return Case((tokens, target), kwargs, label)


def coupled_accept(d: Draw) -> Case:
    B, M, V = d.integer(1, 4), d.integer(1, 6), max(_vocab(d), 2)
    draft, verifier = _logits(d, B, M, V), _logits(d, B, M, V)
    keys = dict(
        temperature=0.9,
        seed=d.integers(0, 2**40, B, dtype=torch.int64),
        offset=d.integer(0, 99),
        positions=d.integers(0, 99, B, M),
    )
    tokens = sample(draft, sampler="gumbel", backend="reference", **keys).tokens  # type: ignore[arg-type]
    return Case((draft, verifier, tokens), dict(keys, ratio=0.5), _label(B=B, M=M, V=V))


def jacobi_step(d: Draw) -> Case:
    B, n = d.integer(1, 6), d.integer(1, 40)
    draft = d.integers(0, 2, B, n)
    target = torch.where(d.bools(0.8, B, n), draft.roll(-1, 1), 1)
    return Case((draft, target), dict(num_valid=d.integers(1, n, B)), _label(B=B, n=n))


def verify_states(d: Draw) -> Case:
    B, K, L = d.integer(1, 4), d.integer(1, 6), d.integer(1, 33)
    kwargs = dict(mask_id=0, rule=d.choice(["exact", "subset"]))
    if d.chance(0.3):
        kwargs["graph"] = d.bools(0.7, d.choice([1, B]), K, K)
    states = d.integers(0, 1, B, K, 1) * d.integers(0, 1, B, 1, L) * 3
    return Case((states, states.roll(1, 1)), kwargs, _label(B=B, K=K, L=L, rule=kwargs["rule"]))


def sample_and_score(d: Draw) -> Case:
    B, L, V = d.integer(1, 4), d.integer(1, 6), _vocab(d)
    logits = _logits(d, B, L, V)
    kwargs = dict(_filters(d, B), seed=d.integers(0, 2**40, B, dtype=torch.int64))
    kwargs["confidence"] = d.choice(["probability", "margin", "neg_entropy", "random"])
    kwargs["tempered"] = d.chance(0.4)
    kwargs["sampler"] = d.choice(["inverse_cdf", "gumbel"])
    kwargs["offset"] = d.integer(0, 2**40)
    if d.chance(0.4):
        kwargs["exclude_ids"] = d.integer(0, V - 1)
    if d.chance(0.3):
        kwargs["bias_ids"], kwargs["bias"] = d.integers(-1, V, B, L, 3), d.normal(B, L, 3)
    kwargs["filter_order"] = d.choice(["top_k_first", "joint"])
    if d.chance(0.2):
        logits, kwargs["probs"] = logits.softmax(-1), True
    kwargs.update(_allowed(d, B, L, V=V))
    if kwargs["sampler"] == "inverse_cdf":
        kwargs.update(_uniforms(d, B, L))
    if d.chance(0.3):
        kwargs["positions"] = d.integers(0, 9999, B, L)
    what = _poison(d, logits)
    if d.chance(0.3):
        kwargs["row_index"] = d.integers(-1, B * L - 1, B, L)
        logits = logits.view(B * L, -1) if logits.is_contiguous() else logits.reshape(B * L, V)
        what += " packed"
    label = _label(B=B, L=L, V=V, confidence=kwargs["confidence"], sampler=kwargs["sampler"])
    return Case((logits,), kwargs, label + what)


def _rule(d: Draw, B: int, L: int) -> dict[str, Any]:
    rule = d.choice(COMMIT_RULES)
    kwargs: dict[str, Any] = dict(rule=rule, strict=d.chance(0.3))
    kwargs["k"] = d.choice([2, d.integers(0, L, B)])
    kwargs["threshold"] = d.choice([0.3, d.uniform(B)])
    kwargs["slack"], kwargs["factor"], kwargs["low"], kwargs["keep"] = 1e-3, 1.5, 0.2, 0.4
    if rule == "external":
        kwargs["external_score"] = d.uniform(B, L)
    if d.chance(0.3):
        kwargs["max_commit"] = d.integer(3, 5)
    if d.chance(0.3):
        kwargs["min_commit"] = d.integer(0, 3)
    if d.chance(0.4):
        kwargs["window"] = (d.integers(0, L, B), d.integer(0, L))
    return kwargs


def unmask(d: Draw) -> Case:
    B, L, V = d.integer(1, 4), d.choice([1, 8, 32]), max(_vocab(d), 2)
    mask_id = d.integer(0, V - 1)
    tokens = d.integers(0, V - 1, B, L, dtype=torch.int64)
    tokens = tokens.masked_fill(d.bools(0.7, B, L), mask_id)
    kwargs = dict(_rule(d, B, L), **_filters(d, B), mask_id=mask_id, shift=d.choice([0, 0, 1]))
    rows = L
    if "window" in kwargs and d.chance(0.4):  # the window's rows alone, or one row before them
        rows = kwargs["window"][1] + (kwargs["shift"] if d.chance(0.5) else 0)
    logits = _logits(d, B, rows, V)
    kwargs["filter_order"] = d.choice(["top_k_first", "joint"])
    kwargs["sampler"] = d.choice(["inverse_cdf", "gumbel"])
    kwargs.update(_allowed(d, B, L, V=V))
    if kwargs["sampler"] == "inverse_cdf":
        kwargs.update(_uniforms(d, B, L))
    if d.chance(0.2):
        kwargs["bias_ids"], kwargs["bias"] = d.integers(-1, V, B, rows, 3), d.normal(B, rows, 3)
    kwargs["confidence"] = d.choice(["probability", "margin", "neg_entropy"])
    kwargs["seed"], kwargs["offset"] = d.integers(0, 2**40, B, dtype=torch.int64), 3
    if d.chance(0.3):
        kwargs["masked"] = d.bools(0.6, B, L)
    kwargs["return_proposals"] = d.chance(0.3)
    what = _poison(d, logits)
    return Case((tokens, logits), kwargs, _label(B=B, L=L, V=V, rule=kwargs["rule"]) + what)


def commit(d: Draw) -> Case:
    B, L = d.integer(1, 4), d.choice([1, 8, 32, 300])
    tokens = d.integers(0, 5, B, L, dtype=torch.int64)
    scores = d.uniform(B, L).masked_fill(d.bools(0.05, B, L), torch.nan)
    kwargs = dict(_rule(d, B, L), mask_id=0, seed=d.integers(0, 99, B, dtype=torch.int64))
    args = (tokens, d.integers(-1, 5, B, L), scores)
    return Case(args, kwargs, _label(B=B, L=L, rule=kwargs["rule"]))


def remask(d: Draw) -> Case:
    B, L = d.integer(1, 4), d.choice([1, 8, 300])
    kwargs = dict(r=d.integers(0, L, B), mask_id=0)
    return Case(
        (d.integers(0, 5, B, L, dtype=torch.int64), d.uniform(B, L)), kwargs, f"B={B} L={L}"
    )


def earn_credit(d: Draw) -> Case:
    B, L, S = d.integer(1, 4), d.choice([1, 8, 32]), d.choice([1, 2, 7, 32])
    ids = torch.arange(S, device=d.device).expand(B, L, S) - d.bools(0.3, B, L, S) * (S + 1)
    credit = d.integers(0, 4, B, L, S) / 4 * (ids >= 0)  # amounts that are equal, or far apart
    kwargs: dict[str, Any] = dict(gamma=d.choice([0.0, 0.2, 1.0]), decay=0.75, alpha=0.7)
    if d.chance(0.5):
        kwargs["alive"] = d.choice([d.bools(0.7), d.bools(0.7, B), d.bools(0.1, B, 9)])
    confidence = d.uniform(B, L).masked_fill(d.bools(0.2, B, L), -torch.inf)
    args = (ids.clamp(min=-1), credit.float(), d.integers(-1, S + 3, B, L), confidence)
    return Case(args, kwargs, _label(B=B, L=L, S=S) + (" alive" if "alive" in kwargs else ""))


def soft_embed(d: Draw) -> Case:
    rows, V, E = d.integer(1, 40), max(_vocab(d), 2), d.choice([8, 64])
    kwargs = dict(mask_id=d.integer(0, V - 1), top_p=d.choice([None, 0.8]), ratio=0.6)
    args = (d.normal(1, rows, V, scale=3.0), d.normal(V, E))
    return Case(args, kwargs, _label(rows=rows, V=V, E=E))
