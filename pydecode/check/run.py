"""Runs random cases of an op and holds them against the fp64 reference."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import pydecode
from pydecode import BackendUnavailable
from pydecode.reference.numbers import at_input_dtype
from pydecode.schemas import SCHEMAS

from . import attention_cases, cache_cases, decision_cases
from .compare import same_bits, share_of_bound
from .draw import Case, Draw

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Where the public function lives, if its name is not the op's.
PUBLIC = {
    "pack_mask": "trees.pack_mask",
    "mask_from_parents": "trees.mask_from_parents",
    "tree_depths": "trees.depths",
    "dynamic_tree": "trees.dynamic",
    "tree_from_links": "trees.from_links",
    "tree_links": "trees.links",
}
# Ops whose products run at the input's dtype, as every attention kernel does; the others read
# 16-bit inputs and compute in fp32.
AT_INPUT_DTYPE = (
    "tree_attention",
    "block_attention",
    "branch_attention",
    "ranked_attention",
    "soft_embed",
    "write_kv",
)
WITH_OUT = (
    *("tree_attention", "block_attention", "branch_attention", "ranked_attention"),
    *("merge_states", "unmask"),
)
# Ops whose requests are computed alone as well: the same bits, or a batch changes its requests.
ALONE = (
    *("tree_attention", "block_attention", "branch_attention", "ranked_attention"),
    *("rejection_sample", "rejection_sample_tree", "verify_greedy", "sample_and_score", "unmask"),
)
# Positions of the tensors among the arguments that an op changes.
MUTATED = {"write_kv": (2, 3), "commit_kv": (0, 1), "earn_credit": (0, 1)}


def public(op: str) -> Callable[..., Any]:
    """The public function of an op."""
    function: Any = pydecode
    for name in PUBLIC.get(op, op).split("."):
        function = getattr(function, name)
    return function


def maker(op: str) -> Callable[[Draw], Case]:
    for module in (attention_cases, decision_cases, cache_cases):
        if hasattr(module, op):
            return getattr(module, op)
    raise KeyError(op)


def dtypes(op: str) -> tuple[torch.dtype | None, ...]:
    """Float dtypes of an op's inputs; (None,) for an op of integers."""
    integers = ("jacobi_step", "verify_states", "pack_mask", "mask_from_parents", "tree_depths")
    if op in (*integers, "tree_from_links", "tree_links"):
        return (None,)
    return (torch.float32,) if op in ("dynamic_tree", "commit", "remask", "earn_credit") else DTYPES


class Outcome(NamedTuple):
    """What the cases of one (op, backend, dtype, device) came to."""

    op: str
    backend: str
    dtype: str
    device: str
    cases: int
    worst: float  # largest error as a share of the bound
    worst_case: str
    at_margin: int  # requests decided otherwise, where the reference's own margin is rounding
    failures: tuple[str, ...]
    skipped: str  # why nothing ran, or ""

    @property
    def ok(self) -> bool:
        return not self.failures


def check(
    op: str, backend: str, dtype: torch.dtype | None, device: str, *, seed: int, cases: int
) -> Outcome:
    """Random cases of one op; every one is made from the seed, the op, the dtype and its number."""
    draws = (
        Draw(
            random.Random(f"{seed} {op} {dtype} {i}").randrange(2**62),
            dtype or torch.float32,
            device,
        )
        for i in range(cases)
    )
    name = "-" if dtype is None else str(dtype).removeprefix("torch.")
    worst, worst_case, at_margin, failures, skipped, done = 0.0, "", 0, [], "", 0
    for d in draws:
        with one_thread():
            case = maker(op)(d)
        try:
            with one_thread() if backend == "reference" else nullcontext():
                share, margin, wrong = check_case(op, backend, case)
        except BackendUnavailable as reason:
            skipped = str(reason)
            continue
        except Exception as error:
            share, margin, wrong = torch.inf, 0, f"{type(error).__name__}: {error}"
        done, at_margin = done + 1, at_margin + margin
        if share >= worst:
            worst, worst_case = share, case.label
        if wrong:
            failures.append(f"{case.label}: {wrong}")
    skipped = "" if done else skipped
    return Outcome(
        op, backend, name, device, done, worst, worst_case, at_margin, tuple(failures), skipped
    )


def check_case(op: str, backend: str, case: Case) -> tuple[float, int, str]:
    """Worst share of the bound, requests decided at the margin, and what is wrong (or "")."""
    inputs = copied((case.args, case.kwargs))
    got = call(op, case, backend)
    if not unchanged(op, inputs, (case.args, case.kwargs)):
        return torch.inf, 0, "an input was changed"
    if op in WITH_OUT and (wrong := check_out(op, backend, case, got)):
        return torch.inf, 0, wrong
    if (one := alone(op, case)) is not None:
        by_itself = call(op, one, backend)
        if not all(same_bits(_one_nan(a[-1:]), _one_nan(b)) for a, b in zip(got, by_itself)):
            return torch.inf, 0, "the last request has other bits alone than in its batch"
    want = call(op, wide(case), "reference")
    with at_input_dtype() if op in AT_INPUT_DTYPE else nullcontext():
        plain = call(op, case, "reference")
    worst, margin = 0.0, 0
    decided_alike, tried = None, False
    for g, w in zip(got, want):
        if g.shape != w.shape:
            return torch.inf, 0, f"shape {list(g.shape)}, the reference has {list(w.shape)}"
        if not g.dtype.is_floating_point and not torch.equal(g.long(), w.long()):
            if not tried:
                decided_alike, tried = alike(op, case, got), True
            if decided_alike is None or not bool(decided_alike.all()):
                return torch.inf, margin, "a decision that no rounding error explains"
    if tried:  # other decisions have other scores: the requests that decided alike remain
        same = requests_alike(got, want)
        margin = int((~same).sum())
        same = same & requests_alike(plain, want)
        got, want, plain = ([x[same] for x in each] for each in (got, want, plain))
    for g, w, p in zip(got, want, plain):
        if g.dtype.is_floating_point:
            bound = share_of_bound(g, w, p, g.dtype)
            worst = max(worst, bound.worst)
    return worst, margin, f"error {worst:.3g} times the bound" if worst > 1 else ""


def call(op: str, case: Case, backend: str, **more: Any) -> list[Tensor]:
    """Results as a flat list, and the tensors that the op changes, which are copies."""
    args = list(case.args)
    for i in MUTATED.get(op, ()):
        args[i] = guarded(args[i])
    with one_thread() if backend == "reference" else nullcontext():
        result = public(op)(*args, **case.kwargs, **more, backend=backend)
    results = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    for i in MUTATED.get(op, ()):
        for x in args[i] if isinstance(args[i], list) else [args[i]]:
            if not guards_intact(x):
                raise AssertionError("a write outside of what the op may change")
            results.append(x)
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """For loops of tiny operations, whose threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alone(op: str, case: Case) -> Case | None:
    """The last request of a batch by itself, where its result must not depend on the others."""
    kwargs = case.kwargs
    attention = op.endswith("attention")
    if op not in ALONE or "cu_seqlens_q" in kwargs:
        return None
    if not attention and op != "verify_greedy" and not isinstance(kwargs.get("seed"), Tensor):
        return None  # a scalar seed is mixed with the request's index
    paged = kwargs.get("block_table") is not None
    shared: set[Any] = {"sinks", "draft_vocab"}  # names, and places among the arguments
    shared |= {1, 2} if attention and paged else set()
    shared |= {1 if op == "verify_greedy" else 0} if "row_index" in kwargs else set()
    if "draft_row_index" in kwargs:
        shared |= {2, "draft_logits", "draft_probs"}
    B = kwargs["row_index"].shape[0] if 0 in shared else case.args[0].shape[0]
    if B < 2:
        return None

    def last(name: Any, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(last(name, y) for y in x)
        whole = not isinstance(x, Tensor) or name in shared or x.dim() == 0 or x.shape[0] != B
        return x if whole or (name in ("k_scale", "v_scale") and x.dim() == 1) else x[-1:]

    args = tuple(last(i, x) for i, x in enumerate(case.args))
    return Case(args, {name: last(name, x) for name, x in kwargs.items()}, case.label)


def _one_nan(x: Tensor) -> Tensor:
    """NaN has many bit patterns; here it has one."""
    return torch.where(x.isnan(), torch.nan, x) if x.dtype.is_floating_point else x


# ---- guard bands and poison ---------------------------------------------------------------------

GUARD = 64  # elements before and after


def guarded(x: Any) -> Any:
    """A copy of a tensor (or a list of them) with the same strides, between guard bands of NaN."""
    if isinstance(x, list):
        return [guarded(y) for y in x]
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    storage = torch.full((size + 2 * GUARD,), torch.nan, dtype=torch.float32, device=x.device)
    storage = (
        storage.to(x.dtype) if x.dtype.is_floating_point else storage.nan_to_num(-77).to(x.dtype)
    )
    view = storage.as_strided(x.shape, x.stride(), GUARD)
    view.copy_(x)
    view._pydecode_guards = storage  # type: ignore[attr-defined]
    return view


def guards_intact(x: Tensor) -> bool:
    storage = x._pydecode_guards  # type: ignore[attr-defined]
    bands = torch.cat([storage[:GUARD], storage[-GUARD:]])
    return bool((bands.isnan() if bands.dtype.is_floating_point else bands == -77).all())


def check_out(op: str, backend: str, case: Case, got: list[Tensor]) -> str:
    """``out=`` on poisoned memory between guard bands gives the same bits."""
    out = guarded(torch.full_like(got[0], torch.nan if got[0].dtype.is_floating_point else -77))
    again = call(op, case, backend, out=out)
    if again[0].data_ptr() != out.data_ptr():
        return "out= is not what was returned"
    if not guards_intact(out):
        return "a write outside of out="
    if not all(same_bits(a, b) for a, b in zip(again, got)):
        return "other bits with out= than without"
    return ""


def copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.clone(), tree)


def unchanged(op: str, before: Any, after: Any) -> bool:
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after))
    return all(same_bits(a, b) for a, b in pairs if isinstance(a, Tensor))


# ---- the reference's own margin -----------------------------------------------------------------


def wide(case: Case) -> Case:
    """The same call in fp64; scales of the cache stay as they are."""

    def double(x: Any) -> Any:
        plain = isinstance(x, Tensor) and x.dtype.is_floating_point and x.element_size() > 1
        return x.double() if plain else x

    kwargs = {
        name: x if name in ("k_scale", "v_scale") else pytree.tree_map(double, x)
        for name, x in case.kwargs.items()
    }
    return Case(tuple(pytree.tree_map(double, list(case.args))), kwargs, case.label)


def alike(op: str, case: Case, got: list[Tensor]) -> Tensor | None:
    """bool [B]: the request was decided as the reference would under some rounding error."""
    result = None
    for nudged in nudges(case):
        same = requests_alike(got, call(op, nudged, "reference"))
        result = same if result is None else result | same
    return result


def requests_alike(got: Iterable[Tensor], want: Iterable[Tensor]) -> Tensor:
    """bool [B]: all integers of a request agree."""
    rows = [
        (g.long() == w.long()).flatten(1).all(1) if g.dim() > 1 else g.long() == w.long()
        for g, w in zip(got, want)
        if not g.dtype.is_floating_point
    ]
    return torch.stack(rows).all(0)


def nudges(case: Case) -> Iterator[Case]:
    """The case in fp64, its float inputs moved by a few roundings of fp32."""
    exact = wide(case)
    for i in range(16):
        generator = torch.Generator().manual_seed(i)

        def nudge(x: Any, generator: torch.Generator = generator) -> Any:
            if not isinstance(x, Tensor) or x.dtype != torch.float64 or x.dim() == 0:
                return x
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
            size = torch.where(x.isfinite(), x, 0.0).abs().amax() if x.numel() else 1.0
            return x + 2**-21 * noise * size

        args = pytree.tree_map(nudge, list(exact.args))
        yield Case(tuple(args), exact.kwargs, exact.label)


OPS = tuple(SCHEMAS)
