"""SmolLM2-135M-Instruct: plain decoding against chains and trees, with honest baselines."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from torch import Tensor

from ..decode.cache import PagedCache
from ..decode.drafters import Drafter, ModelDrafter, PromptLookup
from ..decode.speculative import generate
from ..models import smollm2

CHAT = "Explain in a few sentences why the sky is blue during the day and red at sunset."
TEXT = (
    "The harbour of the old town was built in three stages. The first stage, finished in 1782, "
    "gave shelter to forty fishing boats and a single customs house. The second stage, finished in "
    "1811, added a stone pier of two hundred metres, a lighthouse and a covered market. The third "
    "stage, finished in 1846, brought a dry dock, four warehouses and a railway siding, which "
    "carried grain to the mills in the valley and coal back to the ships."
)
REWRITE = f"Repeat the following text, but write 'bay' instead of 'harbour'.\n\n{TEXT}"
REWRITE_PREFIX = "The bay of the old town was built in three stages. The first stage,"

# Every second layer of the middle of the network; a draft costs 25 of 30 layers.
SKIPPED = (10, 12, 14, 16, 18)


class Outcome(NamedTuple):
    """One method on one prompt."""

    tokens: list[int]
    seconds: list[float]  # one a round, prompt pass included
    passes: int
    accepted: list[int]  # accepted drafts of each verification step, empty for Hugging Face's own
    drafted: int
    num_accepted: int


class Shown(NamedTuple):
    """What the plot is made from: outcomes by prompt, dtype and method."""

    outcomes: dict[tuple[str, str, str], Outcome]


class Method(NamedTuple):
    name: str
    run: Callable[[list[int], int, Callable[..., None] | None], Outcome]
    baseline: bool = False


def show(
    console: Console, *, max_new_tokens: int, rounds: int, backend: str | None = None
) -> Shown:
    """Runs every method on every prompt, streams one answer each, prints the tables.

    ``backend``: of attention; the model moves to the GPU if that backend runs there alone.
    """
    if importlib.util.find_spec("transformers"):  # its bars would run through ours
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
    with _progress(console) as progress:
        progress.add_task(
            "loading SmolLM2-135M-Instruct (the first time 20 s; 540 MB are kept in "
            "$PYDECODE_CACHE, default ~/.cache/pydecode)",
            total=None,
        )
        lm, tokenizer = smollm2.load(torch.float32)
    lm.backend = backend
    if backend in ("triton", "cuda") and torch.cuda.is_available():
        lm.model.to("cuda")
    prompts = {
        "chat": _chat(tokenizer, CHAT, ""),
        "rewrite": _chat(tokenizer, REWRITE, REWRITE_PREFIX),
    }
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    # fp32 first, once: there the texts must be identical; then bf16, timed
    for dtype, repeats in ((torch.float32, 1), (torch.bfloat16, rounds)):
        lm.model.to(dtype)
        name = str(dtype).removeprefix("torch.")
        methods = _methods(lm)
        for prompt, ids in prompts.items():
            if dtype == torch.float32:
                _stream(console, tokenizer, prompt, ids, methods, max_new_tokens)
            with _progress(console) as progress:
                task = progress.add_task("", total=(repeats + 1) * len(methods))
                # interleaved, and one warm-up round that is not timed (in fp32: not needed)
                for i in range(repeats + (dtype != torch.float32)):
                    for method in methods:
                        progress.update(
                            task, description=f"{prompt}, {name}: {method.name}", advance=1
                        )
                        outcome = method.run(ids, max_new_tokens, None)
                        key = (prompt, name, method.name)
                        if i == 0 or key not in outcomes:
                            first = outcome if repeats == 1 else outcome._replace(seconds=[])
                            outcomes[key] = first
                        else:
                            outcomes[key].seconds.extend(outcome.seconds)
            console.print(_table(lm, prompt, ids, name, methods, outcomes))
    return Shown(outcomes)


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _chat(tokenizer: Any, question: str, answer: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + answer, add_special_tokens=False).input_ids


# ---- methods ----------------------------------------------------------------------------------


def _methods(lm: Any) -> list[Method]:
    return [
        Method("HF generate", _hugging_face(lm, None), baseline=True),
        Method("HF lookup, K=4", _hugging_face(lm, 4), baseline=True),
        Method("HF lookup, K=12", _hugging_face(lm, 12), baseline=True),
        Method("HF lookup, K=32", _hugging_face(lm, 32), baseline=True),
        Method("plain greedy", _ours(lm, lambda: None)),
        Method("chain, lookup, K<=32", _ours(lm, PromptLookup)),
        Method("tree, lookup, K<=32", _ours(lm, lambda: PromptLookup(candidates=3))),
        Method("chain, skipped layers", _ours(lm, lambda: ModelDrafter(lm.skipping(SKIPPED)))),
    ]


def _ours(lm: Any, make_drafter: Callable[[], Drafter | None]) -> Callable[..., Outcome]:
    def run(ids: list[int], count: int, on_tokens: Callable[..., None] | None) -> Outcome:
        # room for the drafted rows of the last step as well
        cache: PagedCache = lm.new_cache(1, len(ids) + count + 128)
        begin = time.perf_counter()
        done = generate(
            lm,
            [ids],
            cache=cache,
            max_new_tokens=count,
            drafter=make_drafter(),
            stop_tokens=lm.eos_token_ids,
            on_tokens=on_tokens,
        )
        seconds = time.perf_counter() - begin
        accepted, drafted = done.accepted[0], done.drafted[0]
        return Outcome(done.tokens[0], [seconds], done.steps, accepted, sum(drafted), sum(accepted))

    return run


def _hugging_face(lm: Any, lookup: int | None) -> Callable[..., Outcome]:
    """Its own ``generate`` with its own cache and SDPA attention, on the same weights."""

    def run(ids: list[int], count: int, on_tokens: Callable[..., None] | None) -> Outcome:
        rows: list[int] = []

        def count_rows(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            rows.append(kwargs["input_ids"].shape[1])

        extra = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
        prompt = torch.tensor([ids], device=lm.device)
        hook = lm.model.register_forward_pre_hook(count_rows, with_kwargs=True)
        lm.model.set_attn_implementation("sdpa")
        try:
            begin = time.perf_counter()
            with torch.inference_mode():
                done = lm.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=count,
                    do_sample=False,
                    **extra,
                )
            seconds = time.perf_counter() - begin
        finally:
            hook.remove()
            lm.model.set_attn_implementation("pydecode")
        tokens = done[0, len(ids) :].tolist()
        # every pass but the first feeds one token that is no draft; the first feeds the prompt
        drafted = sum(rows) - len(ids) - (len(rows) - 1)
        return Outcome(tokens, [seconds], len(rows), [], drafted, len(tokens) - len(rows))

    return run


# ---- output -----------------------------------------------------------------------------------


def _stream(
    console: Console,
    tokenizer: Any,
    prompt: str,
    ids: list[int],
    methods: list[Method],
    count: int,
) -> None:
    """Streams one answer: accepted drafts in green, the model's own tokens plain."""
    method = next(m for m in methods if m.name.startswith("tree, lookup"))
    console.rule(f"{prompt}: {method.name}, accepted drafts in [green]green[/green]")
    prefix = REWRITE_PREFIX if prompt == "rewrite" else ""
    console.print(f"[dim]{prefix}[/dim]", end="")

    def on_tokens(request: int, new: list[int]) -> None:
        *drafts, own = new
        console.print(f"[green]{_escaped(tokenizer.decode(drafts))}[/green]", end="")
        console.print(_escaped(tokenizer.decode([own], skip_special_tokens=True)), end="")

    method.run(ids, count, on_tokens)
    console.print("\n")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _table(
    lm: Any,
    prompt: str,
    ids: list[int],
    dtype: str,
    methods: list[Method],
    outcomes: dict[tuple[str, str, str], Outcome],
) -> Table:
    plain = outcomes[prompt, dtype, "plain greedy"]
    timed = len(plain.seconds) > 1  # one cold round proves identity, and is no measurement
    columns = ["tokens", "passes", "a pass", "accepted"]
    if timed:
        columns += ["tokens/s (min..max)", "x plain", "x HF"]
    table = Table(
        *(Column(name, no_wrap=name == "method") for name in ("method", *columns, "same as plain")),
        title=f"{prompt}, {dtype}, {len(ids)} prompt tokens, {torch.get_num_threads()} threads",
        title_justify="left",
        caption=f"tokens/s: median of {len(plain.seconds)} interleaved rounds, prompt included; "
        "HF: Hugging Face's generate; lookup: prompt lookup; gap: of the two tokens' logits"
        if timed
        else None,
        caption_justify="left",
    )
    bases = [statistics.median(_speeds(plain))]
    bases.append(statistics.median(_speeds(outcomes[prompt, dtype, methods[0].name])))
    for method in methods:
        outcome = outcomes[prompt, dtype, method.name]
        share = f"{outcome.num_accepted / outcome.drafted:.0%}" if outcome.drafted else "-"
        cells = [
            str(len(outcome.tokens)),
            str(outcome.passes),
            f"{len(outcome.tokens) / outcome.passes:.2f}",
            f"{outcome.num_accepted}/{outcome.drafted} {share}" if outcome.drafted else "-",
        ]
        if timed:
            speeds = _speeds(outcome)
            speed = statistics.median(speeds)
            cells.append(f"{speed:.1f} ({min(speeds):.1f}..{max(speeds):.1f})")
            cells += [f"{speed / base:.2f}" for base in bases]
        table.add_row(
            method.name,
            *cells,
            _identical(lm, ids, plain.tokens, outcome.tokens),
            style="dim" if method.baseline else None,
        )
    return table


def _speeds(outcome: Outcome) -> list[float]:
    return [len(outcome.tokens) / s for s in outcome.seconds]


def _identical(lm: Any, ids: list[int], plain: list[int], tokens: list[int]) -> str:
    """Yes, or the first differing position and the gap of the two tokens' logits there."""
    if tokens == plain:
        return "[green]yes[/green]"
    same = next(
        (i for i, (a, b) in enumerate(zip(plain, tokens)) if a != b), min(len(plain), len(tokens))
    )
    if same == min(len(plain), len(tokens)):
        return f"[yellow]ends at {same}[/yellow]"
    logits = _logits_after(lm, ids + plain[:same])
    gap = abs(float(logits[plain[same]] - logits[tokens[same]]))
    return f"[yellow]to {same}, gap {gap:.3f}[/yellow]"


def _logits_after(lm: Any, ids: list[int]) -> Tensor:
    cache = lm.new_cache(1, len(ids))
    rows = torch.tensor([ids])
    keep = torch.tensor([len(ids) - 1])
    return lm(rows, torch.arange(len(ids))[None], cache, "causal", keep=keep)[0, 0].float()
