"""Loads everything that a model will call, so that the first call can be captured."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ranks, trees
from .backends import triton_kernels
from .block_attention import block_attention
from .branch_attention import branch_attention
from .commit import commit
from .commit_kv import commit_kv
from .coupled_accept import coupled_accept
from .earn_credit import earn_credit
from .jacobi_step import jacobi_step
from .merge_states import merge_states
from .ranked_attention import ranked_attention
from .rejection_sample import rejection_sample
from .rejection_sample_tree import rejection_sample_tree
from .remask import remask
from .sample_and_score import sample_and_score
from .soft_embed import soft_embed
from .tree_attention import tree_attention
from .unmask import unmask
from .validation import FLOATS, FP8
from .verify_greedy import verify_greedy
from .verify_states import verify_states
from .write_kv import write_kv

N = 4  # rows in flight, tree nodes, block length
LONG = 129  # rows of a prompt that fills the widest tile of prefill
PAGE_SIZE = 16


def warmup(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    vocab_size: int,
    device: torch.device | str,
    ops: Iterable[str] | None = None,
    backend: str | None = None,
    page_size: int = PAGE_SIZE,
    cache_dtype: torch.dtype | None = None,
    max_rows: int = 64,
    max_drafts: int = 8,
) -> None:
    """Loads and compiles everything that such a model will call, by one tiny call of each op.

    Afterwards every op can be captured in a CUDA graph as its first call. The global random state
    is not touched.

    Args:
        num_heads, num_kv_heads, head_dim: Hq, Hkv and D; Hq a multiple of Hkv.
        dtype: of the activations and the cache, fp16, bf16, fp32 or fp64.
        vocab_size: V, at least 2.
        device: where the model runs.
        ops: names of ops as ``torch.ops.pydecode`` has them, such as "tree_attention"; None: all.
        backend: of every op that has it; None: the fastest. With "triton" tree, block and branch
            attention are compiled for every tile and number of splits that 1 to ``max_rows`` rows
            in flight take, over pages of ``page_size`` and a dense cache, of ``cache_dtype``
            (default ``dtype``; fp8: scales are tensors), with a mask and without;
            ``ranked_attention`` for short and long prompts, padded and over pages; what samples
            with its defaults, with temperatures, and with temperatures, top-k and top-p, as tensors
            a request; chains of 1 to ``max_drafts`` drafts. Windows, soft caps, sinks, packed
            batches, masks of tokens, numbers in the place of tensors and other rules are other
            binaries: call those once.

    Raises:
        ValueError, TypeError: a size, dtype, device or op that does not exist, by name.

    >>> import torch, pydecode
    >>> pydecode.warmup(
    ...     num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, vocab_size=32,
    ...     device="cpu", ops=["tree_attention", "write_kv"],
    ... )
    """
    sizes = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for name, size in (*sizes.items(), ("vocab_size", vocab_size)):
        smallest = 2 if name == "vocab_size" else 1
        if isinstance(size, bool) or not isinstance(size, int) or size < smallest:
            raise ValueError(f"{name}: expected an int >= {smallest}, got {size!r}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}"
        )
    if dtype not in FLOATS:
        known = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"dtype: expected one of {known}, got {dtype!r}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch device, got {device!r}") from error
    if isinstance(ops, str):
        raise TypeError(f"ops: expected None or several names, got the string {ops!r}")
    names = list(CALLS) if ops is None else list(ops)
    unknown = [op for op in names if op not in CALLS]
    if unknown:
        raise ValueError(f"ops: expected names out of {', '.join(CALLS)}, got {unknown[0]!r}")
    limits = dict(page_size=page_size, max_rows=max_rows, max_drafts=max_drafts)
    for name, size in limits.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
    if cache_dtype not in (None, dtype, *FP8):
        raise TypeError(f"cache_dtype: expected None, {dtype} or an fp8 dtype, got {cache_dtype!r}")
    model = _Model(
        *(num_heads, num_kv_heads, head_dim, dtype, vocab_size, device),
        *(backend, page_size, cache_dtype or dtype, max_rows, max_drafts),
    )
    with torch.no_grad():
        for op in names:
            CALLS[op](model)


class _Model(NamedTuple):
    """A model's sizes, and tiny inputs of them: one request, N rows, two pages."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    vocab_size: int
    device: torch.device
    backend: str | None  # of what has more than one
    page_size: int
    cache_dtype: torch.dtype
    max_rows: int
    max_drafts: int

    def q(self, *shape: int) -> Tensor:
        return self.zeros(*(shape or (1, N)), self.num_heads, self.head_dim)

    def kv(self, *shape: int) -> Tensor:
        return self.zeros(*(shape or (1, N)), self.num_kv_heads, self.head_dim)

    def context(self) -> dict[str, Any]:
        return dict(cache_seqlens=self.ids([PAGE_SIZE + 1]), block_table=self.ids([[0, 1]]))

    def cache(self) -> tuple[Tensor, Tensor]:
        return self.kv(2, PAGE_SIZE), self.kv(2, PAGE_SIZE)

    def logits(self, rows: int = N) -> Tensor:
        return self.zeros(1, rows, self.vocab_size)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def ids(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def tokens(self, rows: int = N) -> Tensor:
        return torch.zeros(1, rows, dtype=torch.int64, device=self.device)

    def scores(self) -> Tensor:
        return torch.zeros(1, N, device=self.device)

    def parents(self) -> Tensor:
        return self.ids([[-1, 0, 0, 1]])


def _attend(op: Callable[..., Any], m: _Model, *branches: int, **more: Any) -> None:
    rows = (1, *branches, N)
    if m.backend != "triton":
        context = dict(m.context(), **more, backend=m.backend)
        op(m.q(*rows), *m.cache(), m.kv(*rows), m.kv(*rows), **context)
        return
    plan, devices = triton_kernels("decode_plan"), triton_kernels("devices")
    group, arch = m.num_heads // m.num_kv_heads, devices.architecture(m.q())
    sizes = (m.max_rows, group, m.num_kv_heads, m.head_dim, m.dtype, arch)
    pages = [m.kv(2, m.page_size).to(m.cache_dtype) for _ in range(2)]
    paged = dict(cache_seqlens=m.ids([m.page_size]), block_table=m.ids([[0, 1]]))
    dense = dict(cache_seqlens=m.ids([m.page_size]))
    if m.cache_dtype in FP8:
        ones = torch.ones(m.num_kv_heads, device=m.device)
        more = dict(more, k_scale=ones, v_scale=ones)
    for n in plan.rows_to_warm(*sizes):
        rows = (1, *branches, -(-n // (branches or (1,))[0]))
        own = m.q(*rows), m.kv(*rows), m.kv(*rows)
        for caches, where in ((pages, paged), ([x[:1] for x in pages], dense)):
            kwargs: dict[str, Any] = dict(where, **more, backend="triton")
            op(own[0], *caches, *own[1:], **kwargs)
            if "mask" in more:
                words = torch.zeros(1, rows[1], -(-rows[1] // 64), device=m.device).long()
                op(own[0], *caches, *own[1:], **dict(kwargs, mask=words))


def _ranked_attention(m: _Model) -> None:
    for n in (N, LONG) if m.backend == "triton" else (N,):
        rank = ranks.block_causal(n, 2, device=m.device)
        rows: dict[str, Any] = dict(q_rank=rank, k_rank=rank, backend=m.backend)
        ranked_attention(m.q(1, n), m.kv(1, n), m.kv(1, n), **rows)
        pages = -(-n // m.page_size)
        caches = [m.kv(pages, m.page_size).to(m.cache_dtype) for _ in range(2)]
        if m.cache_dtype in FP8:
            ones = torch.ones(m.num_kv_heads, device=m.device)
            rows |= dict(k_scale=ones, v_scale=ones)
        if m.backend == "triton":
            table = m.ids([list(range(pages))])
            ranked_attention(
                m.q(1, n), *caches, **rows, block_table=table, cache_seqlens=m.ids([n])
            )


def _merge_states(m: _Model) -> None:
    dtype = torch.float64 if m.dtype == torch.float64 else torch.float32
    lse = torch.zeros(2, 1, m.num_heads, N, dtype=dtype, device=m.device)
    merge_states(m.q(2, 1, N), lse, backend=m.backend)


def _sample(m: _Model, op: Callable[..., Any], *args: Any, **more: Any) -> None:
    """By its defaults, and in Triton as engines sample: with numbers of each request."""
    calls: list[dict[str, Any]] = [{}]
    if m.backend == "triton":
        warm = dict(temperature=torch.ones(1, device=m.device))
        share = torch.full((1,), 0.9, device=m.device)
        calls += [warm, dict(warm, top_k=m.ids([1]), top_p=share)]
    for numbers in calls:
        op(*args, **more, **numbers, backend=m.backend)


def _chains(m: _Model) -> Iterable[int]:
    """Numbers of drafts; in Triton one for each power of two that a binary holds."""
    if m.backend != "triton":
        return (N - 1,)
    return {G.bit_length(): G for G in range(1, m.max_drafts + 1)}.values()


def _rejection_sample(m: _Model) -> None:
    for G in _chains(m):
        for rule in ("token", "block") if m.backend == "triton" else ("token",):
            chain = m.logits(G + 1), m.tokens(G), m.logits(G)
            _sample(m, rejection_sample, *chain, rule=rule)


def _coupled_accept(m: _Model) -> None:
    for M in _chains(m):
        coupled_accept(m.logits(M), m.logits(M), m.tokens(M), ratio=0.5, backend=m.backend)


def _rejection_sample_tree(m: _Model) -> None:
    tree = m.logits(), m.tokens(), m.parents()
    _sample(m, rejection_sample_tree, *tree, draft_logits=m.logits())


def _verify_greedy(m: _Model) -> None:
    verify_greedy(m.tokens(), m.logits(), parents=m.parents(), backend=m.backend)
    if m.backend == "triton":  # chains
        verify_greedy(m.tokens(N - 1), m.logits(), backend=m.backend)


def _unmask(m: _Model) -> None:
    given = dict(mask_id=0, rule="threshold", threshold=0.5)
    _sample(m, unmask, m.tokens(), m.logits(), **given)


def _pack_mask(m: _Model) -> None:
    for n in (3, N, 16) if m.backend == "triton" else (N,):  # how 16 divides n and n n
        mask = torch.ones(1, n, n, dtype=torch.bool, device=m.device)
        trees.pack_mask(mask, backend=m.backend)


def _soft_embed(m: _Model) -> None:
    table = m.zeros(m.vocab_size, 8)
    soft_embed(m.logits(), table, mask_id=0, top_p=0.9, ratio=0.5, backend=m.backend)


def _write_kv(m: _Model) -> None:
    angle = m.zeros(1, N, m.head_dim // 2)
    positions = torch.arange(N, device=m.device)[None]
    options: dict[str, Any] = dict(m.context(), positions=positions, backend=m.backend)
    del options["cache_seqlens"]
    write_kv(m.kv(), m.kv(), *m.cache(), cos=angle, sin=angle, q=m.q(), **options)


def _commit_kv(m: _Model) -> None:
    k_cache, v_cache = m.cache()
    path, num_accepted = m.ids([[0, 2, -1, -1]]), m.ids([1])
    places = m.context()
    commit_kv(k_cache[None], v_cache[None], path, num_accepted, **places, backend=m.backend)


CALLS: dict[str, Callable[[_Model], Any]] = {
    "tree_attention": lambda m: _attend(tree_attention, m, mask="causal"),
    "block_attention": lambda m: _attend(block_attention, m, replace_at=0),
    "branch_attention": lambda m: _attend(branch_attention, m, 2),
    "ranked_attention": _ranked_attention,
    "merge_states": _merge_states,
    "verify_greedy": _verify_greedy,
    "rejection_sample": _rejection_sample,
    "rejection_sample_tree": _rejection_sample_tree,
    "coupled_accept": _coupled_accept,
    "jacobi_step": lambda m: jacobi_step(m.tokens(), m.tokens(), backend=m.backend),
    "verify_states": lambda m: verify_states(
        m.tokens()[:, None], m.tokens()[:, None], mask_id=0, backend=m.backend
    ),
    "sample_and_score": lambda m: _sample(m, sample_and_score, m.logits()),
    "unmask": _unmask,
    "commit": lambda m: commit(
        *(m.tokens(), m.tokens(), m.scores()),
        mask_id=0,
        rule="threshold",
        threshold=0.5,
        backend=m.backend,
    ),
    "remask": lambda m: remask(m.tokens(), m.scores(), r=1, mask_id=0, backend=m.backend),
    "earn_credit": lambda m: earn_credit(
        m.tokens()[..., None], m.scores()[..., None], m.tokens(), m.scores()
    ),
    "soft_embed": _soft_embed,
    "commit_kv": _commit_kv,
    "write_kv": _write_kv,
    "pack_mask": _pack_mask,
    "mask_from_parents": lambda m: trees.mask_from_parents(m.parents(), backend=m.backend),
    "tree_depths": lambda m: trees.depths(m.parents()),
    "dynamic_tree": lambda m: trees.dynamic(
        m.scores(), m.tokens(), m.parents(), num_nodes=3, backend=m.backend
    ),
    "tree_from_links": lambda m: trees.from_links(m.parents(), m.parents()),
    "tree_links": lambda m: trees.links(m.parents()),
}
