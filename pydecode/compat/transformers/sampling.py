"""``transformers.generation.utils._speculative_sampling`` on ``rejection_sample``."""

import torch
from torch import Tensor

import pydecode


def _speculative_sampling(
    candidate_input_ids: Tensor,
    candidate_logits: Tensor,
    candidate_length: int,
    new_logits: Tensor,
    assistant_ensemble_weight: float | bool | None = None,
    is_done_candidate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Accepts a prefix of the candidates and samples one more token, on ``rejection_sample``.

    Replaces ``transformers.generation.utils._speculative_sampling`` (seen in 5.23), which assisted
    generation calls while it samples. To have that use ours::

        transformers.generation.utils._speculative_sampling = (
            pydecode.compat.transformers._speculative_sampling)

    Args:
        candidate_input_ids: [1, L] int64, the text with the candidates at its end.
        candidate_logits: [1, G, V], what the candidates were drawn from, processed.
        candidate_length: G.
        new_logits: [1, G+1, V], of the model, processed.
        assistant_ensemble_weight: w in (0, 1] relaxes acceptance to w p + (1 - w) q. A bool here is
            ``is_done_candidate``, which was the fifth argument of earlier versions.
        is_done_candidate: the candidates end in a stop: if all are accepted, no token follows them.

    Returns:
        (valid_tokens [1, n+1] int64, n_matches, 0-d int64). The width follows the data, as
        theirs does: one host read.

    The coins are ``torch.rand``'s, so ``torch.manual_seed`` repeats a run; not theirs one by one.

    Where ours differs: a candidate that the model gives no probability is never accepted (theirs
    takes it at a coin of exactly 0, and under an ensemble weight at 1 - w: text that the model's
    own top_k forbids); a residual of all zeros falls back to p (theirs divides by zero, and
    ``torch.multinomial`` raises).

    Raises:
        ValueError: a batch of more than one, a weight outside (0, 1], NaN among the logits read.
    """
    weight: float | None = assistant_ensemble_weight
    if isinstance(weight, bool):
        weight, is_done_candidate = None, weight
    batch, length = candidate_input_ids.shape
    if batch != 1:
        raise ValueError(f"candidate_input_ids: expected a batch of 1, got {batch}")
    G = candidate_length
    uniforms = torch.rand(1, G + 1, device=new_logits.device)
    if weight is not None:
        w = float(weight)
        if not 0 < w <= 1:
            raise ValueError(f"assistant_ensemble_weight: expected in (0, 1], got {w}")
        # u q < w p + (1 - w) q  iff  (u - (1 - w)) / w q < p; the residual is p's either way
        uniforms[:, :G].sub_(1 - w).div_(w).clamp_(min=0)
    verified = pydecode.rejection_sample(
        new_logits,
        candidate_input_ids[..., length - G :],
        candidate_logits,
        filter_draft=False,
        uniforms=uniforms,
    )
    row = verified.tokens.tolist()[0]  # one host read
    emitted = row.index(-1) if row[-1] < 0 else G + 1
    if emitted == 0:  # undecided
        raise ValueError("new_logits, candidate_logits: expected no NaN and something allowed")
    n_matches = emitted - 1
    if emitted > G and is_done_candidate:
        emitted, n_matches = G, G - 1
    # the first of a contiguous row (a slice takes the host half as long again), and a filled 0-d
    valid = verified.tokens.as_strided((1, emitted), (G + 1, 1))
    return valid, valid.new_full((), n_matches)
