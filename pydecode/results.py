"""What the ops return."""

from typing import NamedTuple

from torch import Tensor


class Verified(NamedTuple):
    """A verification's outcome. An undecided request has tokens and path all -1, num_accepted 0."""

    tokens: Tensor  # int64 [B, G+1 | max_depth+1]: accepted drafts, correction or bonus, then -1
    num_accepted: Tensor  # int32 [B]: accepted drafts, so tokens[b, : num_accepted[b]+1] is emitted
    path: Tensor  # int32, tokens' shape: accepted nodes, root (0) first, then -1
    # fp32 (fp64 for fp64 inputs), tokens' shape: of the emitted tokens, 0 elsewhere
    logprobs: Tensor | None = None


class Scores(NamedTuple):
    """One sampled token a row, and how sure the model is of it."""

    tokens: Tensor  # int64 [...]
    confidence: Tensor  # fp32 (fp64 for fp64 logits) [...], larger is surer
    lse: Tensor  # likewise, log-sum-exp of the untempered logits


class Unmasked(NamedTuple):
    """A step of unmasking."""

    tokens: Tensor  # int64 [B, L]
    committed: Tensor  # bool [B, L]: filled by this call
    num_committed: Tensor  # int32 [B]
    num_left: Tensor  # int32 [B]: masks left in the window
    confidence: Tensor  # fp32 (fp64 for fp64 logits) [B, L], -inf where no row was read
