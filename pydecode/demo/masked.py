"""sapiens: one-shot against iterative unmasking of antibody sequences, under several rules."""

import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import pydecode

from ..models import sapiens

# name -> (rule, its arguments); one shot is top_k with all positions at once
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "one shot": ("top_k", {"k": 10_000}),
    "top_k, 16 a step": ("top_k", {"k": 16}),
    "top_k, 4 a step": ("top_k", {"k": 4}),
    "top_k, stepwise": ("top_k", {"k": 1}),
    "threshold 0.5": ("threshold", {"threshold": 0.5}),
    "factor 1": ("factor", {"factor": 1.0}),
    "entropy_bound 2": ("entropy_bound", {"threshold": 2.0}),
    "segments 0.9, 0.4": ("segments", {"threshold": 0.9, "low": 0.4}),
    "prefix 0.5": ("prefix", {"threshold": 0.5}),
    "sequential, 4 a step": ("sequential", {"k": 4}),
}


class Filled(NamedTuple):
    """One rule's outcome over all sequences."""

    recovered: float
    passes: float  # forward passes a sequence
    tokens_per_pass: float
    seconds: float
    order: list[int]  # step at which each position of the first sequence was filled, 0: given


class Shown(NamedTuple):
    """What the plot is made from."""

    by_rule: dict[str, Filled]


def show(console: Console, *, share: float = 0.9, repeats: int = 2) -> Shown:
    """Masks ``share`` of each sequence and fills it in under every rule; prints the table."""
    model = sapiens.load()
    sequences = [model.encode(s) for s in sapiens.SEQUENCES.values()]
    console.rule(f"sapiens: {share:.0%} of {len(sequences)} antibody sequences masked")
    table = Table(
        Column("rule", no_wrap=True),
        "recovered share",
        "tokens a pass",
        "forward passes",
        f"tokens/s, batches of {repeats}",
        title="one-shot against iterative unmasking",
        title_justify="left",
    )
    by_rule: dict[str, Filled] = {}
    for name, (rule, arguments) in RULES.items():
        filled = _fill_all(model, sequences, share, repeats, rule, arguments)
        by_rule[name] = filled
        table.add_row(
            name,
            f"{filled.recovered:.1%}",
            f"{filled.tokens_per_pass:.1f}",
            f"{filled.passes:.1f}",
            f"{filled.tokens_per_pass * filled.passes / filled.seconds:.0f}",
        )
    console.print(table)
    return Shown(by_rule)


def _fill_all(
    model: Any,
    sequences: list[Tensor],
    share: float,
    repeats: int,
    rule: str,
    arguments: dict[str, Any],
) -> Filled:
    right = total = passes = 0
    order: list[int] = []
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(0)  # the same masks for every rule
    for truth in sequences:
        masked = [mask(truth, share, model.mask_id, generator) for _ in range(repeats)]
        tokens, hidden = (torch.stack(x) for x in zip(*masked))
        filled, steps = fill(model, tokens, rule, arguments)
        right += int((filled == truth)[hidden].sum())
        total += int(hidden.sum())
        passes += int(steps.amax(1).sum())
        order = order or steps[0].tolist()
    runs = repeats * len(sequences)
    seconds = (time.perf_counter() - begin) / runs
    return Filled(right / total, passes / runs, total / passes, seconds, order)


def mask(
    truth: Tensor, share: float, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks ``share`` of the residues (not the end markers); returns tokens and what is hidden."""
    residues = torch.arange(1, truth.shape[0] - 1)
    chosen = residues[torch.randperm(len(residues), generator=generator)]
    hidden = torch.zeros(truth.shape[0], dtype=torch.bool)
    hidden[chosen[: round(share * len(residues))]] = True
    return truth.masked_fill(hidden, mask_id), hidden


def fill(model: Any, tokens: Tensor, rule: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Unmasks [B, L] until nothing is masked; also the step at which each position was filled."""
    steps = torch.zeros_like(tokens)
    special = [0, 1, 2, 3]  # <s> <pad> </s> <unk> are no residues
    for step in range(1, tokens.shape[1] + 1):
        done = pydecode.unmask(
            tokens,
            model(tokens),
            mask_id=model.mask_id,
            rule=rule,
            exclude_ids=special,
            **arguments,
        )
        tokens = done.tokens
        steps[done.committed] = step
        if int(done.num_left.sum()) == 0:
            break
    return tokens, steps
