"""Ops by family: the headings of docs/performance.md, and one picture each."""

FAMILIES = (
    (
        "Attention",
        ("tree_attention", "block_attention", "branch_attention", "ranked_attention"),
    ),
    (
        "Verification",
        (
            *("rejection_sample", "rejection_sample_tree", "verify_greedy"),
            *("coupled_accept", "jacobi_step", "verify_states"),
        ),
    ),
    ("Diffusion", ("unmask", "sample_and_score", "commit", "remask", "earn_credit", "soft_embed")),
    ("Cache", ("commit_kv", "write_kv", "merge_states")),
    (
        "Trees",
        (
            *("pack_mask", "mask_from_parents", "tree_depths", "dynamic_tree"),
            *("tree_from_links", "tree_links"),
        ),
    ),
)
