"""pydecode.compat.vllm's unified_attention and its trees against plain loops over keys."""

import inspect
from typing import Any

import peer_vllm as peer
import pytest
import torch
from torch import Tensor

import pydecode
from pydecode.compat.vllm import pack_qq_bias, prepare_tree_attn_bias, unified_attention
from pydecode.compat.vllm.tree_attention import _prepare_tree_attn_bias

HQ, HKV, D = 4, 2, 8
CLOSE = dict(rtol=0, atol=2e-6)


def batch(rows: list[int], contexts: list[int], page: int = 4, dtype: Any = None) -> dict[str, Any]:
    """A packed batch over shuffled pages; K/V of the rows in flight are in the cache."""
    lengths = [n + c for n, c in zip(rows, contexts)]
    width = max(-(-n // page) for n in lengths) + 1
    table = torch.randperm(len(rows) * width).view(len(rows), width)
    cache = torch.randn(2, len(rows) * width, page, HKV, D)
    cache = cache.to(dtype) if dtype is not None else cache
    q = torch.randn(sum(rows), HQ, D)
    return dict(
        q=q,
        k=cache[0],
        v=cache[1],
        out=torch.full_like(q, torch.nan),
        cu_seqlens_q=torch.tensor([0, *rows]).cumsum(0).int(),
        max_seqlen_q=max(rows),
        seqused_k=torch.tensor(lengths, dtype=torch.int32),
        max_seqlen_k=max(lengths),
        softmax_scale=0.3,
        causal=True,
        window_size=(-1, -1),
        block_table=table.int(),
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )


def expected(call: dict[str, Any], scales: tuple[Any, Any] = (1.0, 1.0)) -> Tensor:
    """Row i of a request sees key j iff j <= context + i, less what bias and window hide."""
    out, left = torch.empty_like(call["q"], dtype=torch.float64), call["window_size"][0]
    bias = call.get("qq_bias")
    for b, length in enumerate(call["seqused_k"].tolist()):
        first, end = call["cu_seqlens_q"][b : b + 2].tolist()
        n, context = end - first, length - (end - first)
        page = call["k"].shape[1]
        at = [(call["block_table"][b, j // page], j % page) for j in range(length)]
        keys, values = (
            torch.stack([x[where].float() * scale for where in at] or [x[0, 0]])[:length]
            for x, scale in zip(
                (call["k"], call["v"]), [s[b] if hasattr(s, "dim") else s for s in scales]
            )
        )
        tree = bias if bias is None or bias.dim() == 2 else bias[b]
        sees = []
        for i in range(n):
            flight = [j <= i and (tree is None or tree[i, j] == 0) for j in range(n)]
            # the position of each key and of the row: in a tree, its depth below the context
            depth = [j for j in range(n)]
            if tree is not None:
                depth = [sum(tree[j, m] == 0 for m in range(j)) for j in range(n)]
            place = [*range(context), *(context + int(d) for d in depth)]
            row = [*[True] * context, *flight]
            own = context + int(depth[i])
            sees.append([s and (left < 0 or own - p <= left) for s, p in zip(row, place)])
        out[first:end] = peer.attend(
            call["q"][first:end], keys, values, sees, 0.3, call["softcap"], call.get("sinks")
        )
    return out


def check(call: dict[str, Any], scales: tuple[Any, Any] = (1.0, 1.0)) -> None:
    assert unified_attention(**call) is None
    torch.testing.assert_close(call["out"].double(), expected(call, scales), **CLOSE)


def random_bias(*shape: int) -> Tensor:
    """Trees: every node sees a parent before it and what that one sees."""
    if len(shape) == 3:
        return torch.stack([random_bias(*shape[1:]) for _ in range(shape[0])])
    sees = torch.eye(shape[0], dtype=torch.bool)
    for i in range(1, shape[0]):
        sees[i] |= sees[torch.randint(0, i, ())]
    return torch.where(sees, 0.0, -torch.inf)


@pytest.mark.parametrize("trial", range(12))
@pytest.mark.parametrize("form", ["causal", "shared", "a request"])
def test_random_batches(form: str, trial: int) -> None:
    rows, contexts = torch.randint(0, 8, (5,)).tolist(), torch.randint(0, 15, (5,)).tolist()
    rows[0] += 1  # some rows have no context, and some requests no rows
    call = batch(rows, contexts, page=(1, 3, 16)[trial % 3])
    if form != "causal":  # larger than the longest request, as a buffer may be
        n = max(rows) + trial % 2
        call["qq_bias"] = random_bias(n, n) if form == "shared" else random_bias(5, n, n)
    if trial >= 6:
        call |= dict(softcap=2.0, sinks=torch.randn(HQ))
    check(call)


@pytest.mark.parametrize("left", [0, 2, 5, 30])
@pytest.mark.parametrize("tree", [False, True])
def test_window(left: int, tree: bool) -> None:
    """Among the rows in flight too: vLLM counts slots, which are depths where there is no tree."""
    call = batch([9, 1, 4], [7, 12, 0])
    call["window_size"] = (left, 0)
    if tree:
        call["qq_bias"] = random_bias(3, 9, 9)
    check(call)


def test_a_wide_tree_keeps_its_context_in_the_window() -> None:
    """All nodes are one below the root; by slots the last ones would see nothing before it."""
    call = batch([6], [5])
    bias = torch.full((6, 6), -torch.inf).fill_diagonal_(0.0)
    bias[:, 0] = 0.0
    check({**call, "window_size": (3, 0), "qq_bias": bias})


def test_the_bias_shows_nothing_that_causality_hides() -> None:
    call = batch([5, 3], [4, 0])
    check({**call, "qq_bias": torch.zeros(5, 5)})
    causal = call["out"].clone()
    unified_attention(**call)
    torch.testing.assert_close(call["out"], causal, **CLOSE)


@pytest.mark.parametrize("window", [-1, 700])
def test_long_prefill(window: int) -> None:
    """More rows than are ever in flight, with a decoding request beside them."""
    call = batch([1100, 1, 3], [40, 9, 0], page=16)
    call["window_size"] = (window, 0)
    unified_attention(**call)
    rows = torch.tensor([0, 1, 699, 1023, 1024, 1099, 1100, 1101, 1103])
    request, row = [0] * 6 + [1, 2, 2], [0, 1, 699, 1023, 1024, 1099, 0, 0, 2]
    for r, b, i in zip(rows.tolist(), request, row):
        n = int(call["cu_seqlens_q"][b + 1] - call["cu_seqlens_q"][b])
        own = int(call["seqused_k"][b]) - n + i
        low = max(0, own - window) if window >= 0 else 0
        at = [(call["block_table"][b, j // 16], j % 16) for j in range(low, own + 1)]
        keys, values = (torch.stack([x[where] for where in at]) for x in (call["k"], call["v"]))
        want = peer.attend(call["q"][r : r + 1], keys, values, [[True] * len(at)], 0.3)
        torch.testing.assert_close(call["out"][r : r + 1].double(), want, **CLOSE)


@pytest.mark.parametrize("tree", [False, True])
def test_fp8_cache_and_its_scales(tree: bool) -> None:
    """All entries of [B, Hkv] count; vLLM's kernel reads the first. Other caches have no scale."""
    call = batch([3, 2], [6, 1], dtype=torch.float8_e4m3fn)
    if tree:
        call["qq_bias"] = random_bias(3, 3)
    k_scale, v_scale = torch.rand(2, HKV) + 0.5, torch.rand(2, HKV) + 0.5
    call |= dict(k_descale=k_scale, v_descale=v_scale)
    check(call, (k_scale[:, :, None], v_scale[:, :, None]))
    one = torch.tensor([1.7])
    check({**call, "k_descale": one.expand(2, HKV), "v_descale": one}, (1.7, 1.7))
    plain = batch([3], [6])
    check({**plain, "k_descale": torch.tensor(9.0), "v_descale": one})


def test_out_may_be_a_part_of_a_larger_tensor() -> None:
    call = batch([2, 3], [3, 3])
    whole = torch.full((9, HQ, D), 7.0)
    check({**call, "out": whole[1:6]})
    assert (whole[[0, 6, 7, 8]] == 7).all()


@pytest.mark.parametrize("form", ["shared", "a request", "window"])
def test_rows_past_the_end_hurt_nobody(form: str) -> None:
    call = batch([2, 3], [3, 3])
    if form == "window":
        call["window_size"] = (1, 0)
    else:
        call["qq_bias"] = random_bias(3, 3) if form == "shared" else random_bias(2, 3, 3)
    want = {**call, "out": torch.empty_like(call["out"])}
    unified_attention(**want)
    padded = torch.cat([call["q"], torch.full((4, HQ, D), torch.nan)])
    out = torch.empty_like(padded)
    unified_attention(**{**call, "q": padded, "out": out})
    assert torch.equal(out[:5], want["out"])
    assert not out[5:].any()


def test_packing_once_for_all_layers() -> None:
    call = batch([2, 5, 0, 3], [3, 3, 8, 0])
    for window, bias in (((-1, -1), random_bias(5, 5)), ((2, 0), random_bias(4, 6, 6))):
        call |= dict(window_size=window, qq_bias=bias)
        unified_attention(**call)
        packed = pack_qq_bias(bias, call["cu_seqlens_q"], 5, 10, window)
        once = {**call, "qq_bias": packed, "out": torch.empty_like(call["out"])}
        unified_attention(**once)
        assert torch.equal(once["out"], call["out"])


def test_empty() -> None:
    call = batch([2, 3], [3, 3])
    unified_attention(**call)
    want = call["out"].clone()
    unified_attention(**{**call, "qq_bias": torch.empty(0)})  # vLLM's "no tree at this level"
    assert torch.equal(want, call["out"])
    none = {n: call[n][:0] for n in ("q", "out", "seqused_k", "block_table")}
    none |= dict(cu_seqlens_q=torch.zeros(1).int(), max_seqlen_q=0)
    for bias in (None, torch.zeros(2, 2)):
        unified_attention(**{**call, **none, "qq_bias": bias})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("causal", False),
        ("q_descale", torch.ones(1)),
        ("alibi_slopes", torch.ones(HQ)),
        ("output_scale", torch.ones(1)),
        ("mm_prefix_range", torch.zeros(1, 1, 2)),
        ("use_alibi_sqrt", True),
    ],
)
def test_names_what_it_cannot_do(name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=name):
        unified_attention(**{**batch([1], [1]), name: value})


@pytest.mark.parametrize("shape", [(2, 2), (3, 3, 3), (3,), (3, 2)])
def test_a_bias_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qq_bias: expected .* got \["):
        unified_attention(**batch([3, 1], [1, 1]), qq_bias=torch.zeros(shape))


@pytest.mark.parametrize("value", [0.5, -1e30, torch.nan, torch.inf])
def test_checks_find_a_bias_that_is_none(value: float) -> None:
    bias = torch.zeros(3, 3)
    bias[2, 1] = value
    call = batch([3], [1])
    unified_attention(**call, qq_bias=bias)  # anything but 0 hides
    hidden = call["out"].clone()
    unified_attention(**call, qq_bias=torch.where(bias == 0, 0.0, -torch.inf))
    assert torch.equal(call["out"], hidden)
    with pydecode.checks(True):
        with pytest.raises(ValueError, match=r"qq_bias: expected 0 or -inf, got .* \[2, 1\]"):
            unified_attention(**call, qq_bias=bias)
        unified_attention(**call, qq_bias=random_bias(3, 3))


def test_bias_of_choices() -> None:
    """By their definition: 0 on the diagonal, in the root's column, and at every prefix."""
    choices = [(0,), (1,), (3,), (0, 0), (0, 2), (3, 1), (0, 2, 1), (3, 1, 0)]
    bias = prepare_tree_attn_bias(choices, [3, 3, 2], torch.float32, torch.device("cpu"))
    nodes = [(), *choices]
    for i, node in enumerate(nodes):
        for j, other in enumerate(nodes):
            assert bias[i, j] == (0 if node[: len(other)] == other else -torch.inf)
    assert bias.dtype == torch.float32
    assert prepare_tree_attn_bias([(0,)], dtype=torch.float16).dtype == torch.float16
    assert _prepare_tree_attn_bias is prepare_tree_attn_bias
    with pytest.raises(ValueError, match="sorted_tree_choices"):  # theirs makes another tree
        prepare_tree_attn_bias([(0,), (0, 0), (1,)])
    with pytest.raises(ValueError, match=r"depth_counts: expected \[2\]"):
        prepare_tree_attn_bias([(0,), (1,)], [1, 1])
    with pytest.raises(ValueError, match="prefix"):
        prepare_tree_attn_bias([(0,), (1, 0)])


def test_signature() -> None:
    """The positional part as TREE_ATTN passed it, and the optional part in order."""
    parameters = inspect.signature(unified_attention).parameters
    assert list(parameters)[:16] == list(batch([1], [1]))
    assert list(parameters)[16:] == [
        *("seq_threshold_3D", "num_par_softmax_segments", "softmax_segm_output"),
        *("softmax_segm_max", "softmax_segm_expsum", "alibi_slopes", "output_scale", "qq_bias"),
        *("sinks", "mm_prefix_range", "use_alibi_sqrt"),
    ]
