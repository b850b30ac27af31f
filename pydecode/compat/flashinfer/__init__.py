"""FlashInfer's functions on pydecode: sampling, merging of attention states, paged prefill.

``flashinfer.sampling`` is ``.sampling``, ``flashinfer.cascade`` is ``.merge``. Written for the
signatures seen at fb28d7242 (August 2026).
"""

from .masks import packbits, segment_packbits
from .merge import merge_state, merge_state_in_place, merge_states
from .prefill import BatchPrefillWithPagedKVCacheWrapper
from .sampling import (
    chain_speculative_sampling,
    sampling_from_logits,
    sampling_from_probs,
    top_k_top_p_sampling_from_logits,
)

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "chain_speculative_sampling",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "packbits",
    "sampling_from_logits",
    "sampling_from_probs",
    "segment_packbits",
    "top_k_top_p_sampling_from_logits",
]
