"""SGLang's tree kernels (``sgl_kernel``, ``sglang.srt.speculative``) on pydecode's operators.

Every function has its peer's name, arguments, dtypes and mutations; what it returns goes into the
caller's tensors. Nothing here synchronises with the device. Seen: sgl_kernel and sglang main of
July 2026 (9fec359a6).

tree building     build_tree_kernel_efficient, reconstruct_indices_from_tree_mask
verification      verify_tree_greedy, tree_speculative_sampling_target_only,
                  chain_speculative_sampling_triton
cache             move_accept_tokens_to_target_kvcache, commit_accepted_kv (ours: its tensors),
                  get_src_tgt_cache_loc, move_kv_cache_native
diffusion models  dllm_post_process_fused
"""

from .build import TreeMaskMode, build_tree_kernel_efficient, reconstruct_indices_from_tree_mask
from .dllm import calculate_low_confidence_score, dllm_post_process, dllm_post_process_fused
from .kv import (
    commit_accepted_kv,
    get_src_tgt_cache_loc,
    move_accept_tokens_to_target_kvcache,
    move_kv_cache_native,
)
from .verify import (
    chain_speculative_sampling_triton,
    tree_speculative_sampling_target_only,
    verify_tree_greedy,
)

__all__ = [
    "TreeMaskMode",
    "build_tree_kernel_efficient",
    "calculate_low_confidence_score",
    "chain_speculative_sampling_triton",
    "commit_accepted_kv",
    "dllm_post_process",
    "dllm_post_process_fused",
    "get_src_tgt_cache_loc",
    "move_accept_tokens_to_target_kvcache",
    "move_kv_cache_native",
    "reconstruct_indices_from_tree_mask",
    "tree_speculative_sampling_target_only",
    "verify_tree_greedy",
]
