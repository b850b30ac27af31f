"""Fast-dLLM v1 (LLaDA) on pydecode: transfer rules, and generators with and without caches.

Replaces llada/generate.py of NVlabs/Fast-dLLM, of 2025-06 (24cc59e) and of the later state with
``factor`` and batches. ``add_gumbel_noise`` is left out, see ``llada``.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .block_loop import dual_cache, no_cache, prefix_cache, run
from .fast_dllm_rules import get_transfer_index, get_transfer_index_dynamic
from .llada import get_num_transfer_tokens

__all__ = [
    "generate",
    "generate_with_dual_cache",
    "generate_with_prefix_cache",
    "get_num_transfer_tokens",
    "get_transfer_index",
    "get_transfer_index_dynamic",
]


def generate(
    model: Callable[..., Any],
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], Any] | None = None,
    *,
    bug_compatible: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, int]:
    """Fast-dLLM's generator without a cache: ``model(x).logits`` each step.

    Replaces ``generate``. Batches of any size (a request whose block is done waits for the others).
    The host reads one flag a step, whether the block has masks left, as theirs does.

    Args:
        prompt: [B, P] int64. steps: of the fixed schedule, all blocks together.
        threshold, factor: in place of the schedule; factor wins.
        step_callback: called with the step's number, counted over all blocks.
        bug_compatible: see ``get_transfer_index_dynamic``. seed: int or [B]; None: from torch's
            generator.

    Returns:
        (x [B, P + gen_length] int64, number of forwards).

    Raises:
        ValueError: lengths that do not divide; a model whose logits fill nothing (NaN), where
            theirs hangs. NotImplementedError: an unknown ``remasking``.
    """

    return run(
        no_cache,
        *(model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id),
        *(threshold, factor, step_callback, bug_compatible, seed),
    )


def generate_with_prefix_cache(
    model: Callable[..., Any],
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], Any] | None = None,
    *,
    bug_compatible: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, int]:
    """Fast-dLLM's generator with a prefix cache: a block's first step is a full forward, whose K/V
    before the block serve its other steps, ``model(x[:, start:], past_key_values=..,
    use_cache=True)``.

    Replaces ``generate_with_prefix_cache``; all else as ``generate``. ``past_key_values`` is a list
    of tuples of [B, H, N, D], cut to views. 24cc59e forwards once more at the end of each block, to
    no effect; the later state and ours do not. Nor is there their second argmax, which nobody uses.
    """

    return run(
        prefix_cache,
        *(model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id),
        *(threshold, factor, step_callback, bug_compatible, seed),
    )


def generate_with_dual_cache(
    model: Callable[..., Any],
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], Any] | None = None,
    *,
    bug_compatible: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, int]:
    """Fast-dLLM's generator with a dual cache: after a block's first step only the block is
    forwarded, ``model(x[:, start:end], past_key_values=.., use_cache=True, replace_position=..)``.

    Replaces ``generate_with_dual_cache``; all else as ``generate_with_prefix_cache``.
    ``replace_position`` [B, N] bool is true at the block. Their newest state stops a block after
    ``steps`` / blocks forwards, masks or not; ours, like the states before, when it is filled.
    """

    return run(
        dual_cache,
        *(model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id),
        *(threshold, factor, step_callback, bug_compatible, seed),
    )
