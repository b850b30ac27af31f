"""commit_kv in a tree decoder against stepwise decoding; its lengths, errors and empty cases."""

import pytest
import torch
from torch import Tensor

import pydecode

LAYERS, H, D, VOCAB = 2, 2, 8, 11


class TinyModel:
    """Two attention layers in fp64 with RoPE, on top of write_kv, tree_attention and commit_kv."""

    def __init__(self) -> None:
        self.embedding = torch.randn(VOCAB, H * D, dtype=torch.float64)
        self.weights = torch.randn(LAYERS, 4, H * D, H * D, dtype=torch.float64) / 4
        self.frequency = 10.0 ** -torch.arange(D // 2, dtype=torch.float64)

    def __call__(
        self,
        tokens: Tensor,
        caches: Tensor,
        table: Tensor,
        lengths: Tensor,
        depths: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """tokens [B, N], caches [2, LAYERS, pages, page_size, H, D] -> hidden [B, N, H * D]."""
        B, N = tokens.shape
        angle = (lengths[:, None] + depths)[..., None] * self.frequency
        x = self.embedding[tokens]
        for layer, (w_q, w_k, w_v, w_o) in enumerate(self.weights):
            q, k, v = ((x @ w).view(B, N, H, D) for w in (w_q, w_k, w_v))
            q = pydecode.write_kv(
                *(k, v, caches[0, layer], caches[1, layer]),
                **dict(positions=lengths[:, None] + torch.arange(N), block_table=table),
                **dict(cos=angle.cos(), sin=angle.sin(), q=q),
            )
            y = pydecode.tree_attention(
                *(q, caches[0, layer], caches[1, layer]),
                **dict(mask=mask, cache_seqlens=lengths, block_table=table),
            )
            x = x + torch.tanh(y.flatten(2) @ w_o)
        return x


def random_tree(num_nodes: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Depths, the mask of ancestors and oneself, and each node's path from the root."""
    paths = [[0]]
    for node in range(1, num_nodes):
        paths.append([*paths[int(torch.randint(0, node, ()))], node])
    mask = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)
    for node, path in enumerate(paths):
        mask[node, path] = True
    return torch.tensor([len(p) - 1 for p in paths]), mask, paths


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_tree_and_commit_leave_the_stepwise_cache(
    backend: str, page_size: int, as_list: bool
) -> None:
    B, T, steps = 3, 7, 4
    model = TinyModel()
    width = -(-(steps * T + T) // page_size)
    shape = (2, LAYERS, B * width, page_size, H, D)
    tree_cache, step_cache = torch.full((2, *shape), torch.nan, dtype=torch.float64)
    table = torch.randperm(B * width).view(B, width)
    lengths = torch.zeros(B, dtype=torch.int64)
    own = torch.ones(1, 1, 1, dtype=torch.bool)
    for _ in range(steps):
        trees = [random_tree(T) for _ in range(B)]
        tokens = torch.randint(0, VOCAB, (B, T))
        hidden = model(
            *(tokens, tree_cache, table, lengths),
            torch.stack([depths for depths, _, _ in trees]),
            torch.stack([mask for _, mask, _ in trees]),
        )
        # any node may be the last accepted one; the batch is ragged
        accepted = [trees[b][2][int(torch.randint(0, T, ()))] for b in range(B)]
        path = torch.tensor([nodes + [-1] * (T - len(nodes)) for nodes in accepted])
        caches = [list(x) for x in tree_cache] if as_list else list(tree_cache)
        new = pydecode.commit_kv(
            *(*caches, path, torch.tensor([len(nodes) - 1 for nodes in accepted])),
            **dict(cache_seqlens=lengths, block_table=table, backend=backend),
        )
        for b, nodes in enumerate(accepted):
            for depth, node in enumerate(nodes):
                at = slice(b, b + 1)
                stepwise = model(
                    *(tokens[at, node : node + 1], step_cache, table[at], lengths[at] + depth),
                    torch.zeros(1, 1, dtype=torch.int64),
                    own,
                )
                torch.testing.assert_close(hidden[b, node], stepwise[0, 0], rtol=0, atol=1e-12)
        lengths = new
        for b in range(B):
            at = torch.arange(int(lengths[b]))
            page, offset = table[b][at // page_size], at % page_size
            torch.testing.assert_close(
                tree_cache[:, :, page, offset], step_cache[:, :, page, offset], rtol=0, atol=1e-12
            )


def test_the_length_may_be_a_number() -> None:
    cache = torch.randn(2, 1, 2, 9, 1, 2)
    path, num_accepted = torch.tensor([[0, 2], [0, -1]]), torch.tensor([1, 0])
    new = pydecode.commit_kv(*cache, path, num_accepted, cache_seqlens=3)
    assert new.dtype == torch.int32
    assert new.tolist() == [5, 4]
    new = pydecode.commit_kv(*cache, path, num_accepted, cache_seqlens=torch.tensor(3))
    assert new.dtype == torch.int64
    assert new.tolist() == [5, 4]


def test_nothing_to_commit() -> None:
    cache = torch.randn(2, 1, 0, 9, 1, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert pydecode.commit_kv(*cache, none[:, None], none, cache_seqlens=none).shape == (0,)
    no_layers = torch.zeros(2, 0, 1, 9, 1, 2)
    path, n = torch.tensor([[0, 1]]), torch.tensor([1])
    assert pydecode.commit_kv(*no_layers, path, n, cache_seqlens=torch.tensor([4])).tolist() == [6]
    no_path = torch.zeros(1, 0, dtype=torch.int64)
    assert pydecode.commit_kv(*no_layers, no_path, n, cache_seqlens=7).tolist() == [7]


def good_arguments() -> dict:
    return dict(
        **dict(k_caches=torch.zeros(3, 2, 9, 1, 4), v_caches=torch.zeros(3, 2, 9, 1, 4)),
        **dict(path=torch.tensor([[0, 1], [0, 2]]), num_accepted=torch.tensor([1, 1])),
        cache_seqlens=torch.tensor([2, 3]),
    )


STAGED = torch.zeros(3, 2, 5, 1, 4)
BAD_ARGUMENTS = {
    "no layers": (dict(k_caches=[]), TypeError, "k_caches: expected a sequence of tensors"),
    "number": (dict(v_caches=3), TypeError, "v_caches: expected a sequence of tensors"),
    "one layer": (dict(k_caches=torch.zeros(2, 9, 1, 4)), ValueError, "k_caches: expected 5 dim"),
    "of lists": (dict(k_caches=[torch.zeros(3, 2, 9, 1, 4)]), ValueError, "k_caches: expected 4"),
    "unequal": (
        dict(k_caches=[torch.zeros(2, 9, 1, 4), torch.zeros(2, 8, 1, 4)]),
        *(ValueError, "k_caches: expected shape that of the first layer"),
    ),
    "mixed": (
        dict(v_caches=list(torch.zeros(3, 2, 9, 1, 4))),
        ValueError,
        "v_caches: expected the",
    ),
    "v": (dict(v_caches=torch.zeros(3, 2, 8, 1, 4)), ValueError, "v_caches: expected the layers"),
    "ints": (
        dict(k_caches=torch.zeros(3, 2, 9, 1, 4).int()),
        TypeError,
        "k_caches: expected dtype",
    ),
    "stride 0": (
        dict(v_caches=torch.zeros(1, 2, 9, 1, 4).expand(3, 2, 9, 1, 4)),
        *(ValueError, "v_caches: expected a cache without stride 0"),
    ),
    "batch": (
        dict(k_caches=torch.zeros(3, 5, 9, 1, 4), v_caches=torch.zeros(3, 5, 9, 1, 4)),
        *(ValueError, "k_caches: expected 2 requests .* need a block_table"),
    ),
    "path": (dict(path=torch.tensor([0, 1])), ValueError, "path: expected 2 dimensions"),
    "path dtype": (dict(path=torch.zeros(2, 2)), TypeError, "path: expected dtype int32, int64"),
    "num_accepted": (dict(num_accepted=torch.tensor([1])), ValueError, "num_accepted: expected"),
    "lengths": (
        dict(cache_seqlens=torch.tensor([1])),
        ValueError,
        "cache_seqlens: expected 0-d or",
    ),
    "no lengths": (dict(cache_seqlens=None), TypeError, "cache_seqlens: expected an integer"),
    "negative": (dict(cache_seqlens=-1), ValueError, "cache_seqlens: expected at least 0"),
    "table": (dict(block_table=torch.zeros(3, 1).int()), ValueError, "block_table: expected shape"),
    "source": (dict(source=STAGED), TypeError, "source: expected None or"),
    "source shape": (dict(source=(STAGED, STAGED[1:])), ValueError, r"source\[1\]: expected shape"),
    "source dtype": (
        dict(source=(STAGED.half(), STAGED)),
        TypeError,
        r"source\[0\]: expected dtype",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_errors_name_the_argument(case: str) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        pydecode.commit_kv(**{**good_arguments(), **change})


def test_interleaved_pools_compile() -> None:
    """K and V of all layers are views of one tensor, and the list is mutated in the graph."""
    table = torch.tensor([[3, 1], [2, 0]])

    def step(pool: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        for layer in range(2):
            pydecode.write_kv(
                *(k, k, pool[layer, :, 0], pool[layer, :, 1]),
                **dict(positions=torch.arange(3).expand(2, 3), block_table=table),
            )
        new = pydecode.commit_kv(
            *([pool[0, :, 0], pool[1, :, 0]], [pool[0, :, 1], pool[1, :, 1]]),
            *(torch.tensor([[0, 2], [0, 2]]), torch.tensor([1, 1])),
            **dict(cache_seqlens=torch.zeros(2, dtype=torch.int32), block_table=table),
        )
        return new, pool.sum()

    pool, k = torch.zeros(2, 4, 2, 4, 1, 8), torch.randn(2, 3, 1, 8)
    other = pool.clone()
    want = step(pool, k)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(other, k)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(pool, other)
    assert pool.any()
