"""Every op's schema: the table of contents of pydecode.

``pydecode::<op>`` is defined once, from this table. A backend's function takes the same arguments
in the same order, less the last one, ``backend``.

Conventions:
- A number that a server changes between steps is a pair: ``x`` is its value when the caller gave a
  Python number, ``x_tensor`` is the device tensor (0-d or [B]) when the caller gave one. The tensor
  wins. Integers are SymInt, so that torch.compile keeps one graph for all of their values.
- An op always returns the same number of fresh tensors; one that was not asked for has size 0.
- ``<op>.out`` is derived from the functional schema: same arguments, then one mutated tensor for
  each result, and no return value.
- -1 stands for "none" in ``window_size``, ``max_commit``, ``window_length`` and ``max_depth``.
"""

# ---- attention ----------------------------------------------------------------------------------

_CACHE_SCALES = "float k_scale, Tensor? k_scale_tensor, float v_scale, Tensor? v_scale_tensor"
_ATTENTION_TAIL = (
    "SymInt num_tokens, Tensor? num_tokens_tensor, Tensor? positions, float softmax_scale, "
    f"float softcap, int window_size, Tensor? sinks, {_CACHE_SCALES}"
)
_OUT_LSE = "(Tensor out, Tensor lse)"

# ---- sampling -----------------------------------------------------------------------------------

_SEEDS = "SymInt seed, Tensor? seed_tensor, SymInt offset, Tensor? offset_tensor"
_FILTERS = (
    "float temperature, Tensor? temperature_tensor, SymInt top_k, Tensor? top_k_tensor, "
    "float top_p, Tensor? top_p_tensor, float min_p, Tensor? min_p_tensor"
)
_VERIFY_TAIL = (
    "SymInt num_drafts, Tensor? num_drafts_tensor, Tensor? row_index, Tensor? draft_row_index, "
    f"Tensor? draft_vocab, Tensor? allowed, {_FILTERS}, float draft_temperature, "
    "Tensor? draft_temperature_tensor, bool filter_draft, str rule"
)
_VERIFY_RANDOM = (
    f"{_SEEDS}, SymInt positions, Tensor? positions_tensor, Tensor? uniforms, bool return_logprobs"
)
_ROW_SAMPLING = (
    f"{_FILTERS}, str filter_order, str confidence, bool tempered, int[] exclude_ids, "
    "Tensor? exclude_ids_tensor, Tensor? bias_ids, Tensor? bias, Tensor? allowed, str sampler, "
    f"{_SEEDS}, Tensor? positions, Tensor? uniforms"
)
_RULE = (
    "str rule, SymInt k, Tensor? k_tensor, float threshold, Tensor? threshold_tensor, float slack, "
    "Tensor? slack_tensor, float factor, Tensor? factor_tensor, float low, Tensor? low_tensor, "
    "float keep, Tensor? keep_tensor, bool strict, int min_commit, int max_commit"
)
_UNMASKED = (
    "(Tensor tokens, Tensor committed, Tensor num_committed, Tensor num_left, Tensor confidence"
)

SCHEMAS: dict[str, str] = {
    # attention
    "tree_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, Tensor? mask, "
        "bool causal, SymInt cache_seqlens, Tensor? cache_seqlens_tensor, Tensor? block_table, "
        f"{_ATTENTION_TAIL}, Tensor? cu_seqlens_q, int max_seqlen_q, bool return_lse, "
        f"str backend) -> {_OUT_LSE}"
    ),
    "block_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, Tensor? mask, "
        "bool causal, Tensor? causal_tensor, SymInt cache_seqlens, Tensor? cache_seqlens_tensor, "
        "SymInt replace_at, Tensor? replace_at_tensor, SymInt cache_starts, "
        f"Tensor? cache_starts_tensor, Tensor? block_table, {_ATTENTION_TAIL}, "
        f"Tensor? cu_seqlens_q, int max_seqlen_q, bool return_lse, str backend) -> {_OUT_LSE}"
    ),
    "branch_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, bool causal, "
        "Tensor? causal_tensor, SymInt cache_seqlens, Tensor? cache_seqlens_tensor, "
        "SymInt replace_at, Tensor? replace_at_tensor, SymInt cache_starts, "
        "Tensor? cache_starts_tensor, SymInt num_branches, Tensor? num_branches_tensor, "
        f"Tensor? block_table, {_ATTENTION_TAIL}, bool return_lse, str backend) -> {_OUT_LSE}"
    ),
    "ranked_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor q_rank, Tensor k_rank, Tensor? mask, bool strict, "
        "SymInt cache_seqlens, Tensor? cache_seqlens_tensor, Tensor? block_table, "
        f"{_ATTENTION_TAIL}, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, "
        f"int max_seqlen_k, bool return_lse, str backend) -> {_OUT_LSE}"
    ),
    "merge_states": (
        "(Tensor[] outs, Tensor[] lses, Tensor? temperatures, Tensor? scales, Tensor? mask, "
        f"float log_base, str backend) -> {_OUT_LSE}"
    ),
    # verification of drafts
    "verify_greedy": (
        "(Tensor draft_tokens, Tensor target, Tensor? parents, SymInt num_drafts, "
        "Tensor? num_drafts_tensor, int max_depth, str rule, SymInt top_k, Tensor? top_k_tensor, "
        "int distance, float posterior_threshold, float posterior_alpha, float temperature, "
        "Tensor? temperature_tensor, Tensor? row_index, Tensor? allowed, bool first_match, "
        "str backend) -> (Tensor tokens, Tensor num_accepted, Tensor path)"
    ),
    "rejection_sample": (
        "(Tensor? target_logits, Tensor draft_tokens, Tensor? draft_logits, Tensor? draft_probs, "
        f"Tensor? target_probs, {_VERIFY_TAIL}, {_VERIFY_RANDOM}, bool return_num_passed, "
        "str backend) -> (Tensor tokens, Tensor num_accepted, Tensor path, Tensor logprobs, "
        "Tensor num_passed)"
    ),
    "rejection_sample_tree": (
        "(Tensor? target_logits, Tensor draft_tokens, Tensor parents, Tensor? draft_probs, "
        f"Tensor? draft_logits, Tensor? target_probs, {_VERIFY_TAIL}, int max_depth, "
        f"float threshold_single, float threshold_acc, {_VERIFY_RANDOM}, str backend) "
        "-> (Tensor tokens, Tensor num_accepted, Tensor path, Tensor logprobs)"
    ),
    "coupled_accept": (
        "(Tensor draft_logits, Tensor verifier_logits, Tensor tokens, float ratio, "
        f"Tensor? ratio_tensor, float temperature, Tensor? temperature_tensor, {_SEEDS}, "
        "Tensor? positions, bool force_first, str backend) -> Tensor"
    ),
    "jacobi_step": (
        "(Tensor draft, Tensor target, SymInt num_valid, Tensor? num_valid_tensor, str backend) "
        "-> (Tensor num_accepted, Tensor next_draft, Tensor converged)"
    ),
    "verify_states": (
        "(Tensor states, Tensor targets, int mask_id, str rule, Tensor? graph, str backend) "
        "-> Tensor"
    ),
    # diffusion
    "sample_and_score": (
        f"(Tensor logits, Tensor? row_index, bool probs, {_ROW_SAMPLING}, str backend) "
        "-> (Tensor tokens, Tensor confidence, Tensor lse)"
    ),
    "unmask": (
        "(Tensor tokens, Tensor logits, int mask_id, Tensor? masked, int shift, "
        "SymInt window_start, Tensor? window_start_tensor, int window_length, "
        f"Tensor? external_score, {_RULE}, {_ROW_SAMPLING}, bool return_proposals, str backend) "
        f"-> {_UNMASKED}, Tensor proposals)"
    ),
    "commit": (
        "(Tensor tokens, Tensor proposals, Tensor scores, int mask_id, SymInt window_start, "
        f"Tensor? window_start_tensor, int window_length, Tensor? external_score, {_RULE}, "
        f"{_SEEDS}, Tensor? positions, Tensor? uniforms, str backend) -> {_UNMASKED})"
    ),
    "remask": (
        "(Tensor tokens, Tensor scores, SymInt r, Tensor? r_tensor, int mask_id, str backend) "
        "-> Tensor"
    ),
    "earn_credit": (
        "(Tensor(a!) credit_ids, Tensor(b!) credit, Tensor tokens, Tensor confidence, "
        "Tensor? alive, float gamma, float decay, float alpha, str backend) -> Tensor"
    ),
    "soft_embed": (
        "(Tensor logits, Tensor embedding, int mask_id, float top_p, Tensor? top_p_tensor, "
        "float ratio, Tensor? ratio_tensor, str backend) -> (Tensor embeddings, Tensor entropy)"
    ),
    # cache and trees
    "commit_kv": (
        "(Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor path, Tensor num_accepted, "
        "Tensor cache_seqlens, Tensor? block_table, Tensor? k_rows, Tensor? v_rows, str backend) "
        "-> Tensor"
    ),
    "write_kv": (
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
        "Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved, Tensor? q, "
        f"{_CACHE_SCALES}, str backend) -> Tensor"
    ),
    "pack_mask": "(Tensor mask, str backend) -> Tensor",
    "mask_from_parents": "(Tensor parents, str backend) -> Tensor",
    "tree_depths": "(Tensor parents, str backend) -> Tensor",
    "dynamic_tree": (
        "(Tensor scores, Tensor tokens, Tensor parents, int num_nodes, str backend) "
        "-> (Tensor parents, Tensor depths, Tensor mask, Tensor choice)"
    ),
    "tree_from_links": (
        "(Tensor first_child, Tensor next_sibling, str backend) -> (Tensor parents, Tensor order)"
    ),
    "tree_links": "(Tensor parents, str backend) -> (Tensor first_child, Tensor next_sibling)",
}

# Ops that also have the overload <op>.out.
OUT_OVERLOADS = (
    "tree_attention",
    "block_attention",
    "branch_attention",
    "ranked_attention",
    "merge_states",
    "unmask",
)


def out_schema(op: str) -> str:
    """The schema of ``<op>.out``: the results become mutated arguments, nothing is returned."""
    arguments, results = SCHEMAS[op].split(" -> ")
    names = [result.split()[-1] for result in results.strip("()").split(", ")]
    # a keyword called just "out" would be Dynamo's own affair, which wants it contiguous
    mutated = ", ".join(f"Tensor({chr(ord('a') + i)}!) out_{n}" for i, n in enumerate(names))
    return f"{arguments[:-1]}, *, {mutated}) -> ()"


def argument_names(op: str) -> list[str]:
    """Argument names of an op in schema order, ``backend`` included."""
    arguments = SCHEMAS[op].split(" -> ")[0].strip("()")
    return [argument.split()[-1] for argument in arguments.split(", ")]
