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
COMMIT_KV, WRITE_KV = "triton_kernels/commit_kv.py", "triton_kernels/write_kv.py"
IN_COMMIT_KV, IN_WRITE_KV = "tests/triton/test_commit_kv.py", "tests/triton/test_write_kv.py"
IN_TREES, IN_DECISIONS = "tests/triton/test_trees.py", "tests/triton/test_decisions.py"

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
    Mutant(
        "a row that is not merged keeps its out, not its lse",
        REFERENCE + "merge_states.py",
        "lse = torch.where(mask.unsqueeze(-2), lse, lses[0])",
        "pass",
        "tests/test_merge_states.py -k mask_and_out",
    ),
    # rows
    Mutant(
        "masked rows outside the window read",
        REFERENCE + "unmask.py",
        "read = read & in_window(tokens, start, window_length)",
        "read = read & True",
        "tests/test_unmask.py -k proposals",
    ),
    Mutant(
        "proposals where nothing was read",
        REFERENCE + "unmask.py",
        "proposed = read & (proposals >= 0)",
        "proposed = proposals >= 0",
        "tests/test_unmask.py -k proposals",
    ),
    Mutant(
        "masked rows told by their tokens all the same",
        REFERENCE + "unmask.py",
        "read = (tokens == mask_id) if masked is None else masked",
        "read = tokens == mask_id",
        "tests/test_unmask.py -k masked_and_proposals",
    ),
    Mutant(
        "probabilities read as logits",
        REFERENCE + "sample_and_score.py",
        "x = x.to(compute_dtype(x.dtype)).log()",
        "x = x.to(compute_dtype(x.dtype))",
        "tests/test_row_extensions.py -k probabilities",
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
        "triton_kernels/attention_steps.py",
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
        "if (split < S.SPLITS - 1) | (anyone == 0):",
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
        "triton_kernels/decode_plan.py",
        "splits = splits or splits_of(rows, G, Hkv, ",
        "splits = splits or splits_of(rows, G, Hkv * batch * 40, ",
        AT_EDGES + " -k alone",
        INTERPRETED,
    ),
    Mutant(
        "a packed row of two requests written by both",
        DECODE,
        "valid = valid & ~claimed(token, cu, b, rows, total)",
        "valid = valid & ~claimed(token, cu, b * 0, rows, total)",
        AT_EDGES + " -k overlap",
        INTERPRETED,
    ),
    Mutant(
        "rows past max_seqlen_q taken for a request's",
        "triton_kernels/decode_combine.py",
        "tl.where(good, tl.minimum(high, low + rows), low)",
        "tl.where(good, high, low)",
        AT_EDGES + " -k rows_of_no",
        INTERPRETED,
    ),
    Mutant(
        "empty packed rows that keep what the memory held",
        "triton_kernels/decode_combine.py",
        "free = (token < total) & ~claimed(",
        "free = (token < total) & claimed(",
        AT_EDGES + " -k rows_of_no",
        INTERPRETED,
    ),
    Mutant(
        "the last chunk of head dims read past the row",
        "triton_kernels/attention_steps.py",
        "seen = valid[:, None] & (d + o_c < D)[None, :]",
        "seen = valid[:, None] & (d + o_c < D + CHUNK)[None, :]",
        IN_DECODE + " -k sizes",
        INTERPRETED,
    ),
    Mutant(
        "a plan that forgets the window",
        "triton_kernels/decode_attention.py",
        "softmax_scale, softcap, window_size, max_seqlen_q, return_lse, block,",
        "softmax_scale, softcap, max_seqlen_q, return_lse, block,",
        AT_EDGES + " -k plans",
        INTERPRETED,
    ),
    # merging in Triton
    Mutant(
        "rows that are not merged are merged, and others not",
        "triton_kernels/merge_states.py",
        "kept = real & (tl.load(merged + at, mask=real, other=1) == 0)",
        "kept = real & (tl.load(merged + at, mask=real, other=1) != 0)",
        "tests/triton/test_merge_states.py -k not_merged",
        INTERPRETED,
    ),
    Mutant(
        "the lse of a row that is not merged goes through the logarithms",
        "triton_kernels/merge_states.py",
        "log = tl.where(kept, tl.load(lses[0] + at, mask=kept, other=0.0), log)",
        "log = log",
        "tests/triton/test_merge_states.py -k not_merged",
        INTERPRETED,
    ),
    Mutant(
        "an empty part heard when its weight is 0",
        "triton_kernels/merge_states.py",
        'l = tl.where(l == float("-inf"), l, l * weight)',
        "l = l * weight",
        "tests/triton/test_merge_states.py -k empty",
        INTERPRETED,
    ),
    # caches in Triton
    Mutant(
        "a path moved from its end",
        COMMIT_KV,
        "for i in range(first, last + 1, MOVES):",
        "for i in range(first + (last - first) // MOVES * MOVES, first - 1, -MOVES):",
        IN_COMMIT_KV + " -k overlap",
        INTERPRETED,
    ),
    Mutant(
        "one row more that stays where it is",
        COMMIT_KV,
        "first = still if k_rows is None else 0",
        "first = still + 1 if k_rows is None else 0",
        IN_COMMIT_KV + " -k overlap",
        INTERPRETED,
    ),
    Mutant(
        "a path whose order is checked at its beginning only",
        COMMIT_KV,
        "for i in range(0, tl.minimum(n + 1, P), PATH):",
        "for i in range(0, tl.minimum(n + 1, PATH), PATH):",
        IN_COMMIT_KV + " -k hundreds",
        INTERPRETED,
    ),
    Mutant(
        "words as wide as strides allow, wherever the cache begins",
        COMMIT_KV,
        "return gcd(most, x.data_ptr(), *(",
        "return gcd(most, *(",
        IN_COMMIT_KV + " -k words",
        INTERPRETED,
    ),
    Mutant(
        "a row written to the page past the pool",
        "triton_kernels/cache_slots.py",
        "(page >= 0) & (page < pages)",
        "(page >= 0) & (page <= pages)",
        IN_WRITE_KV + " -k every_bit",
        INTERPRETED,
    ),
    Mutant(
        "a position equal to the capacity taken as one of the cache's",
        "triton_kernels/cache_slots.py",
        "(positions < page_size.to(tl.int64) * width)",
        "(positions <= page_size.to(tl.int64) * width)",
        IN_WRITE_KV + " -k every_bit",
        INTERPRETED,
    ),
    Mutant(
        "interleaved pairs turned the other way",
        WRITE_KV,
        "tl.join(x1 * c - x2 * s, x1 * s + x2 * c)",
        "tl.join(x1 * c + x2 * s, x2 * c - x1 * s)",
        IN_WRITE_KV + " -k rope",
        INTERPRETED,
    ),
    Mutant(
        "scales of requests read as one request's",
        WRITE_KV,
        "tl.load(scale + b * strides[0] + h * strides[1]",
        "tl.load(scale + h * strides[1]",
        IN_WRITE_KV + " -k fp8",
        INTERPRETED,
    ),
    Mutant(
        "fp8 ties that go away from zero",
        "triton_kernels/numerics.py",
        "odd = (size >> DROPPED) & 1",
        "odd = 1",
        IN_WRITE_KV + " -k rounds",
        INTERPRETED,
    ),
    Mutant(
        "fp8 that does not saturate",
        "triton_kernels/numerics.py",
        "size = tl.minimum(size, LARGEST)",
        "size = tl.minimum(size, LARGEST + (1 << 23))",
        IN_WRITE_KV + " -k rounds",
        INTERPRETED,
    ),
    # trees and small decisions in Triton
    Mutant(
        "a parent that comes later is followed",
        "triton_kernels/ancestors.py",
        "linked = (parent >= 0) & (parent < i)",
        "linked = (parent >= 0) & (parent < i + 2)",
        IN_TREES + " -k masks",
        INTERPRETED,
    ),
    Mutant(
        "a word whose sign is another bit",
        "triton_kernels/pack_mask.py",
        "<< bit.to(tl.int64)[None, :]",
        "<< (bit % 63).to(tl.int64)[None, :]",
        IN_TREES + " -k pack",
        INTERPRETED,
    ),
    Mutant(
        "ties in a beam that go to the highest index",
        "triton_kernels/dynamic_tree.py",
        "(tl.cumsum(tie.to(tl.int32), 0) <= room)",
        "(tl.cumsum(tie.to(tl.int32), 0) > tl.sum(tie.to(tl.int32)) - room)",
        IN_TREES + " -k beam",
        INTERPRETED,
    ),
    Mutant(
        "-0 ranked below 0",
        "triton_kernels/ancestors.py",
        "tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)",
        "x.to(tl.int32, bitcast=True)",
        IN_DECISIONS + " -k remask",
        INTERPRETED,
    ),
    Mutant(
        "a Jacobi draft that begins one token late",
        "triton_kernels/jacobi_step.py",
        "accepted + o.to(tl.int64)",
        "accepted + o.to(tl.int64) + 1",
        IN_DECISIONS + " -k jacobi",
        INTERPRETED,
    ),
    Mutant(
        "of equal states the last",
        "triton_kernels/verify_states.py",
        "at = tl.min(tl.where(child, k, STATES)).to(tl.int64)",
        "at = tl.max(tl.where(child, k, -1)).to(tl.int64)",
        IN_DECISIONS + " -k states",
        INTERPRETED,
    ),
    Mutant(
        "all the ties at the border masked again",
        "triton_kernels/remask.py",
        "(tl.cumsum(tie, 0) <= room)",
        "(room > 0)",
        IN_DECISIONS + " -k remask",
        INTERPRETED,
    ),
]
