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
        backend: of tree, block and branch attention and ``merge_states``; None: the fastest. With
            "triton" their kernels are compiled for every tile and number of splits that 1 to
            ``max_rows`` rows in flight take, over pages of ``page_size`` and a dense cache, of
            ``cache_dtype`` (default ``dtype``; fp8: scales are tensors), with a mask and without.
            Windows, soft caps, sinks and packed batches are other binaries: call those once.

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
    for name, size in (("page_size", page_size), ("max_rows", max_rows)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
    if cache_dtype not in (None, dtype, *FP8):
        raise TypeError(f"cache_dtype: expected None, {dtype} or an fp8 dtype, got {cache_dtype!r}")
    model = _Model(
        *(num_heads, num_kv_heads, head_dim, dtype, vocab_size, device),
        *(backend, page_size, cache_dtype or dtype, max_rows),
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
    rank = ranks.block_causal(N, 2, device=m.device)
    ranked_attention(m.q(), m.kv(), m.kv(), q_rank=rank, k_rank=rank)


def _merge_states(m: _Model) -> None:
    dtype = torch.float64 if m.dtype == torch.float64 else torch.float32
    lse = torch.zeros(2, 1, m.num_heads, N, dtype=dtype, device=m.device)
    merge_states(m.q(2, 1, N), lse, backend=m.backend)


def _write_kv(m: _Model) -> None:
    angle = m.zeros(1, N, m.head_dim // 2)
    positions = torch.arange(N, device=m.device)[None]
    table = m.context()["block_table"]
    options: dict[str, Any] = dict(positions=positions, block_table=table)
    write_kv(m.kv(), m.kv(), *m.cache(), cos=angle, sin=angle, q=m.q(), **options)


def _commit_kv(m: _Model) -> None:
    k_cache, v_cache = m.cache()
    path, num_accepted = m.ids([[0, 2, -1, -1]]), m.ids([1])
    commit_kv(k_cache[None], v_cache[None], path, num_accepted, **m.context())


CALLS: dict[str, Callable[[_Model], Any]] = {
    "tree_attention": lambda m: _attend(tree_attention, m, mask="causal"),
    "block_attention": lambda m: _attend(block_attention, m, replace_at=0),
    "branch_attention": lambda m: _attend(branch_attention, m, 2),
    "ranked_attention": _ranked_attention,
    "merge_states": _merge_states,
    "verify_greedy": lambda m: verify_greedy(m.tokens(), m.logits(), parents=m.parents()),
    "rejection_sample": lambda m: rejection_sample(m.logits(), m.tokens(N - 1), m.logits(N - 1)),
    "rejection_sample_tree": lambda m: rejection_sample_tree(
        m.logits(), m.tokens(), m.parents(), draft_logits=m.logits()
    ),
    "coupled_accept": lambda m: coupled_accept(m.logits(), m.logits(), m.tokens(), ratio=0.5),
    "jacobi_step": lambda m: jacobi_step(m.tokens(), m.tokens()),
    "verify_states": lambda m: verify_states(m.tokens()[:, None], m.tokens()[:, None], mask_id=0),
    "sample_and_score": lambda m: sample_and_score(m.logits()),
    "unmask": lambda m: unmask(m.tokens(), m.logits(), mask_id=0, rule="threshold", threshold=0.5),
    "commit": lambda m: commit(
        m.tokens(), m.tokens(), m.scores(), mask_id=0, rule="threshold", threshold=0.5
    ),
    "remask": lambda m: remask(m.tokens(), m.scores(), r=1, mask_id=0),
    "earn_credit": lambda m: earn_credit(
        m.tokens()[..., None], m.scores()[..., None], m.tokens(), m.scores()
    ),
    "soft_embed": lambda m: soft_embed(
        m.logits(), m.zeros(m.vocab_size, 8), mask_id=0, top_p=0.9, ratio=0.5
    ),
    "commit_kv": _commit_kv,
    "write_kv": _write_kv,
    "pack_mask": lambda m: trees.pack_mask(m.tokens()[:, None].expand(1, N, N) == 0),
    "mask_from_parents": lambda m: trees.mask_from_parents(m.parents()),
    "tree_depths": lambda m: trees.depths(m.parents()),
    "dynamic_tree": lambda m: trees.dynamic(m.scores(), m.tokens(), m.parents(), num_nodes=3),
    "tree_from_links": lambda m: trees.from_links(m.parents(), m.parents()),
    "tree_links": lambda m: trees.links(m.parents()),
}
