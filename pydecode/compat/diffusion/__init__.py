"""What masked-diffusion code calls, with the peers' signatures, on pydecode: one module a peer.

- ``llada``: LLaDA's schedule and generator.
- ``fast_dllm``: Fast-dLLM's transfer rules, and its generators with and without caches.
- ``dream``: Dream's ``sample_tokens`` and ``diffusion_generate``.
- ``dinfer``: dInfer's decoders and transfer rules.
- ``dparallel``: dParallel's entropy rule.
- ``sdar``: SDAR's sampler and block-diffusion generator.

What all of them share, and where they differ from their peers:

- **The mask is never a choice.** Its logit counts as -inf, so a loop always ends; a peer whose
  model prefers the mask loops for ever. Confidences are of the law without the mask, which differs
  where a model gives the mask mass, as trained models hardly do.
- **Draws** are Philox draws. A function without ``seed=`` takes one from torch's generator of the
  device (so ``torch.manual_seed`` repeats a run, and nothing is read); with one, advance
  ``offset=`` each step. Same laws as the peers', other numbers.
- **Confidences** are fp32 (fp64 for fp64 logits) whatever the peer used: fp64 there, bf16 here. So
  rows surer than about 1 - 6e-8 tie, which fp64 still tells apart.
- **Ties** go to the lowest id and position, where torch.topk says nothing.
- Nothing of size V is made: no fp64 copy, no softmax, no shifted copy, no gather of rows.
"""

from . import dinfer, dparallel, dream, fast_dllm, llada, sdar

__all__ = ["dinfer", "dparallel", "dream", "fast_dllm", "llada", "sdar"]
