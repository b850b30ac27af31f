"""Self-speculative unmasking: several steps of masked-diffusion decoding verified in one forward.

SSD (Self Speculative Decoding, 2025) and FreeDave (2025, section 3). The model's own predictions
for the present state, taken in the order in which the rule would commit them, are drafts of the
states that stepwise decoding will pass through. One forward pass runs all of them side by side over
the shared cache; the walk goes on while a state's own successor is the next draft. The result, its
tokens and their order, is that of ``diffusion.generate`` at temperature 0 with the same arguments,
in fewer forward passes (up to the rounding of the model's own forward pass).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pydecode

from .diffusion import DiffusionResult, expect_rule, fill_after_eos, schedule
from .passes import prepare


def generate(
    model: Callable[..., Tensor],
    prompt: Tensor,
    *,
    length: int,
    block_length: int,
    mask_id: int,
    num_states: int = 4,
    rule: str = "top_k",
    steps_per_block: int | None = None,
    cache: str = "none",
    kv: tuple[Tensor, Tensor] | None = None,
    shift: int = 0,
    prompt_lengths: Tensor | None = None,
    eos_id: int | None = None,
    confidence: str | None = None,
    exclude_ids: Sequence[int] = (),
    **arguments: Any,
) -> DiffusionResult:
    """Generates what ``diffusion.generate`` does at temperature 0, verifying steps ahead of time.

    Args:
        model, prompt, length, block_length, mask_id, cache, kv, prompt_lengths, eos_id: as there.
            The model gets [B, num_states * n] rows in the passes that verify; ``cache.attend``
            keeps the states apart.
        num_states: states that a pass verifies, the certain next one included.
        rule, steps_per_block, arguments: a rule of ``commit`` and its numbers. Not "posterior",
            which draws, and not "external".
        shift: as there; 0 with a block_causal cache. With 1 the prompt has at least one token.
        confidence: of ``sample_and_score``; None: what the rule takes.

    The host reads one flag a pass.
    """
    expect_rule(rule, steps_per_block, arguments)
    if rule in ("posterior", "external"):
        raise ValueError(f"rule: expected one that follows from the logits, got {rule!r}")
    if isinstance(num_states, bool) or not isinstance(num_states, int) or num_states < 1:
        raise ValueError(f"num_states: expected an integer of at least 1, got {num_states!r}")
    passes = prepare(
        *(model, prompt, length, block_length, mask_id, cache, kv, shift, prompt_lengths)
    )
    B, P = prompt.shape
    if shift > P:
        raise ValueError("prompt: expected at least one token with shift=1, got none")
    confidence = confidence or ("neg_entropy" if rule.startswith("entropy") else "probability")
    ahead = torch.arange(num_states, device=prompt.device)

    def score(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = pydecode.sample_and_score(
            logits, confidence=confidence, exclude_ids=[mask_id, *exclude_ids]
        )
        return scores.tokens, scores.confidence

    def successor(state: Tensor, scored: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        """The state after step ``index`` [rows] of the block, states [rows, L]."""
        rows_masks = masks.repeat_interleave(len(index) // max(B, 1))
        numbers = arguments | schedule(rule, steps_per_block, rows_masks, index, 0)
        return pydecode.commit(state, *scored, mask_id=mask_id, rule=rule, **numbers).tokens

    tokens = torch.cat([prompt, prompt.new_full((B, length), mask_id)], dim=1)
    order, num_steps = torch.full_like(tokens, -1), prompt.new_zeros(B)
    for block in passes.blocks():
        window = slice(block.begin, block.stop)
        state = tokens[:, window]
        masks = (state == mask_id).sum(1)
        if not bool((masks > 0).any()):
            continue
        scored = score(passes(tokens, block, fresh=True)[:, : state.shape[1]])
        index, unfinished = torch.zeros_like(masks), True
        for _ in range(state.shape[1]):
            # draft: the steps to come, if the predictions stand
            drafts = [state]
            for i in range(num_states):
                drafts.append(successor(drafts[-1], scored, index + i))
            states = torch.stack(drafts[1:], dim=1)
            # verify: state 0 is certain; all states run in one pass, unless state 0 is the last
            best = torch.zeros_like(index)
            visited = (ahead == 0).expand(B, -1)
            unfinished = bool((states[:, 0] == mask_id).any())
            if unfinished:
                each = score(passes.branches(tokens, states, block))
                targets = successor(
                    states.flatten(0, 1),
                    (each[0].flatten(0, 1), each[1].flatten(0, 1)),
                    (index[:, None] + 1 + ahead).flatten(),
                ).view_as(states)
                best = pydecode.verify_states(states, targets, mask_id=mask_id)
                visited = walk(states, targets, best)
                scored = take(each[0], best), take(each[1], best)
            # accept: each state on the walk is one step, and fills what the one before it did not
            filled = torch.stack(drafts, dim=1) != mask_id
            new = take(filled[:, 1:], best) & ~filled[:, 0]
            step = num_steps[:, None] + (visited[..., None] & ~filled[:, 1:]).sum(1)
            order[:, window] = torch.where(new, step, order[:, window])
            taken = (visited & ~filled[:, :-1].all(2)).sum(1)
            num_steps, index = num_steps + taken, index + taken
            state = take(states, best)
            if not unfinished:
                break
        if unfinished:
            raise ValueError(f"model: logits of block {list(block)} that no rule can fill (NaN?)")
        tokens = torch.cat([tokens[:, : block.begin], state, tokens[:, block.stop :]], dim=1)
        tokens = fill_after_eos(tokens, P, block.stop, eos_id)
    return DiffusionResult(tokens, order[:, P:], num_steps, passes.count)


def take(x: Tensor, best: Tensor) -> Tensor:
    """[B, K, L] -> [B, L], one state a request."""
    return x.gather(1, best[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def walk(states: Tensor, targets: Tensor, best: Tensor) -> Tensor:
    """Which states the walk of ``verify_states`` to ``best`` [B] passes through, bool [B, K]."""
    at, visited = torch.zeros_like(best), [torch.ones_like(best, dtype=torch.bool)]
    for j in range(1, states.shape[1]):
        visited.append((states[:, j] == take(targets, at)).all(1) & (j <= best))
        at = torch.where(visited[j], j, at)
    return torch.stack(visited, dim=1)
