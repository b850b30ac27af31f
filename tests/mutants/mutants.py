"""One-line faults, and the tests that must notice them.

``old`` occurs exactly once in ``file``. ``tests`` are pytest's arguments, one line: files, ids, -k.
Each fault is one that a kernel of ours, or a peer, has had or could have.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str
    env: tuple[tuple[str, str], ...] = ()  # more of the environment of its tests


REFERENCE = "pydecode/reference/"
ATTENTION = REFERENCE + "attention.py"
CHAIN = REFERENCE + "rejection_sample.py"
DECODE = "triton_kernels/decode_kernel.py"
IN_DECODE = "tests/triton/test_decode_attention.py"
AT_EDGES = "tests/triton/test_decode_edges.py"
INTERPRETED = (("TRITON_INTERPRET", "1"),)

MUTANTS = [
    # attention
    Mutant(
        "a mask's bit read from its neighbour",
        ATTENTION,
        "(mask[..., j // 64] >> (j % 64)) & 1 == 1",
        "(mask[..., j // 64] >> ((j + 1) % 64)) & 1 == 1",
        "tests/test_tree_attention.py",
    ),
    Mutant(
        "the last cached key lost",
        ATTENTION,
        "n = min(max(int(stop[b]), 0), capacity) if on_cpu else capacity",
        "n = min(max(int(stop[b]) - 1, 0), capacity) if on_cpu else capacity",
        "tests/test_tree_attention.py",
    ),
    Mutant(
        "a hole that hides one key less",
        ATTENTION,
        "(at >= hole[b]) & (at < hole_end[b])",
        "(at > hole[b]) & (at < hole_end[b])",
        "tests/test_block_attention.py",
    ),
    Mutant(
        "masked values multiplied by zero, not selected away",
        ATTENTION,
        "out = p @ torch.where(v.isfinite(), v, 0.0)",
        "out = p @ v",
        "tests/test_hostile_attention.py",
    ),
    Mutant(
        "a soft cap without its outer factor",
        ATTENTION,
        "s = softcap * torch.tanh(s / softcap)",
        "s = torch.tanh(s / softcap)",
        "tests/test_tree_attention.py",
    ),
    Mutant(
        "the scale of the cache applied to fresh rows as well",
        ATTENTION,
        "torch.cat([x[:cached] * scale, x[cached:]])",
        "torch.cat([x[:cached] * scale, x[cached:] * scale])",
        "tests/test_tree_attention.py",
    ),
    Mutant(
        "states merged without the running maximum",
        REFERENCE + "merge_states.py",
        "base = torch.where(top == -torch.inf, 0.0, top)",
        "base = torch.zeros_like(top)",
        "tests/test_merge_states.py",
    ),
    # verification
    Mutant(
        "a draw of exactly 0 accepts an impossible token",
        CHAIN,
        "accept = inside & (q_x > 0) & (u[:, :G] * q_x < p_x)",
        "accept = inside & (q_x > 0) & (u[:, :G] * q_x <= p_x)",
        "tests/test_rejection_sample.py tests/test_rejection_sample_edges.py",
    ),
    Mutant(
        "the correction drawn from p, not from the residual",
        CHAIN,
        "no_residual = (tau == n) | ~(w > 0).any(-1)",
        "no_residual = (tau <= n) | ~(w > 0).any(-1)",
        "tests/test_rejection_sample_laws.py",
    ),
    Mutant(
        "block verification without pi in its residual mass",
        CHAIN,
        "(scale[:, :G, None] * p - q).relu()",
        "(p - q).relu()",
        "tests/test_rejection_sample_laws.py",
    ),
    Mutant(
        "drafting's noise used again for the correction",
        CHAIN,
        "philox.uniform(philox.RESAMPLE, key, at, position, i.new_full((1,), -1))",
        "philox.uniform(philox.ACCEPT, key, at, position, i.new_full((1,), 0))",
        "tests/test_rejection_sample.py tests/test_rejection_sample_laws.py",
    ),
    Mutant(
        "traversal that forgets what a deletion left",
        REFERENCE + "traversal.py",
        "a[b, n] = torch.where(reject, a_next, a_n)",
        "a[b, n] = a_n",
        "tests/test_rejection_sample_tree_laws.py -k traversal",
    ),
    Mutant(
        "top-k that drops ties with the k-th largest",
        REFERENCE + "laws.py",
        "(x >= kth) | (k <= 0)",
        "(x > kth) | (k <= 0)",
        "tests/test_sample_and_score.py tests/test_rejection_sample.py",
    ),
    # diffusion
    Mutant(
        "the factor rule off by one",
        REFERENCE + "commit_rules.py",
        "c < 1 - rule.factor / (n + 1)",
        "c < 1 - rule.factor / n",
        "tests/test_commit_rules.py",
    ),
    Mutant(
        "ties that go to the last position",
        REFERENCE + "commit_rules.py",
        "by_key = key.masked_fill(~eligible, 0).sort(dim=-1, descending=True, stable=True).indices",
        "by_key = key.masked_fill(~eligible, 0).flip(-1).sort(dim=-1, descending=True, stable=True)"
        ".indices.neg().add(key.shape[-1] - 1)",
        "tests/test_commit_rules.py",
    ),
    # cache
    Mutant(
        "a commit whose length forgets the root",
        REFERENCE + "commit_kv.py",
        "good, cache_seqlens + num_accepted.to(cache_seqlens.dtype) + 1, cache_seqlens",
        "good, cache_seqlens + num_accepted.to(cache_seqlens.dtype), cache_seqlens",
        "tests/test_commit_kv.py",
    ),
    Mutant(
        "slots computed in 32 bits",
        REFERENCE + "slots.py",
        "valid = valid & (page >= 0) & (page < pages)",
        "page = page.int(); valid = valid & (page >= 0) & (page <= pages)",
        "tests/test_write_kv.py tests/test_commit_kv.py",
    ),
    # the decode kernel
    Mutant(
        "a page id equal to the pool's size taken as mapped",
        DECODE,
        "seen = (page >= 0) & (page < num_pages)",
        "seen = (page >= 0) & (page <= num_pages)",
        AT_EDGES + " -k outside_the_pool",
        INTERPRETED,
    ),
    Mutant(
        "the second half of a mask's word read as the first",
        DECODE,
        ">> (t % 2 * 32)",
        ">> 0",
        IN_DECODE + " -k packed_masks",
        INTERPRETED,
    ),
    Mutant(
        "a hole that keeps its last key",
        DECODE,
        "hole_high = clamp(start + n, 0, capacity)",
        "hole_high = clamp(start + n - 1, 0, capacity)",
        IN_DECODE + " -k hole",
        INTERPRETED,
    ),
    Mutant(
        "full tiles that begin inside a row's window",
        DECODE,
        "low_all = tl.maximum(low, tl.max(tl.where(valid, lowest, 0), 0))",
        "low_all = tl.maximum(low, tl.min(tl.where(valid, lowest, capacity), 0))",
        IN_DECODE + " -k many_tiles",
        INTERPRETED,
    ),
    Mutant(
        "a branch that sees its siblings",
        DECODE,
        "sees & (c[:, None] == c_j[None, :])",
        "sees & (c[:, None] >= c_j[None, :])",
        IN_DECODE + " -k branch",
        INTERPRETED,
    ),
    Mutant(
        "v_scale on rows that are not in the cache",
        DECODE,
        "if v_scale is not None and k_rows is None:",
        "if v_scale is not None and k_rows is not None:",
        IN_DECODE + " -k fp8",
        INTERPRETED,
    ),
    Mutant(
        "a sink for rows past num_tokens",
        DECODE,
        'b_lse = tl.where(valid, b_lse, float("inf"))',
        "b_lse = b_lse",
        IN_DECODE + " -k ragged",
        INTERPRETED,
    ),
    Mutant(
        "rows in flight counted in every split",
        DECODE,
        "if (split < SPLITS - 1) | (anyone == 0):",
        "if anyone == 0:",
        IN_DECODE + " -k sizes",
        INTERPRETED,
    ),
    Mutant(
        "an unseen NaN multiplied by 0",
        "triton_kernels/attention_steps.py",
        "tl.where(finite, v, 0.0).to(v.dtype)",
        "v",
        AT_EDGES + " -k nan",
        INTERPRETED,
    ),
    Mutant(
        "splits that follow the batch",
        "triton_kernels/decode_attention.py",
        "splits = splits_of(rows, Hq // Hkv, Hkv, ",
        "splits = splits_of(rows, Hq // Hkv, Hkv * batch * 40, ",
        AT_EDGES + " -k alone",
        INTERPRETED,
    ),
    # merging in Triton
    Mutant(
        "an empty part heard when its weight is 0",
        "triton_kernels/merge_states.py",
        'l = tl.where(l == float("-inf"), l, l * weight)',
        "l = l * weight",
        "tests/triton/test_merge_states.py -k empty",
        INTERPRETED,
    ),
]
