"""SmolLM2 through transformers' ``generate``: its own loops beside ours, in one interleaved run.

``python -m pydecode.bench.transformers_generate`` prints a table a prompt and dtype, and leaves a
JSON file under bench/results/cpu. The draft model of the assisted rows is SmolLM2 less 5 of its 30
layers, which is too dear to pay: those rows compare the loops, not the method.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pydecode.check.report import machine
from pydecode.compat.transformers import PydecodeCache, assisted, prompt_lookup
from pydecode.demo.causal import CHAT, REWRITE, REWRITE_PREFIX, SKIPPED
from pydecode.models import smollm2

from .timing import Spread

RESULTS = Path(__file__).parent / "results" / "cpu"
PLAIN = "HF"
Run = Callable[[Tensor], Tensor]


def methods(lm: Any, count: int) -> dict[str, tuple[Run, str]]:
    """Name -> (prompt -> text, the name of what it is compared with beside PLAIN)."""
    model, draft = lm.model, lm.skipping(SKIPPED).model

    def run(attention: str = "sdpa", **options: Any) -> Run:
        def generate(ids: Tensor) -> Tensor:
            more = dict(options)
            if "past_key_values" in more:
                more["past_key_values"] = PydecodeCache(model, ids.shape[1] + count)
            model.set_attn_implementation(attention)
            length = dict(max_new_tokens=count, do_sample=False)
            return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **more)

        return generate

    theirs = "HF lookup, K=10"
    return {
        PLAIN: (run(), ""),
        "HF, our cache": (run("pydecode", past_key_values=True), ""),
        "HF lookup, K=4": (run(prompt_lookup_num_tokens=4), ""),
        theirs: (run(prompt_lookup_num_tokens=10), ""),
        "HF lookup, K=32": (run(prompt_lookup_num_tokens=32), ""),
        "ours, prompt_lookup()": (run(custom_generate=prompt_lookup()), theirs),
        "ours, candidates=3": (
            run(custom_generate=prompt_lookup(candidates=3)),
            theirs,
        ),
        "HF assisted": (run(assistant_model=draft), ""),
        "ours, assisted()": (run(custom_generate=assisted(draft)), "HF assisted"),
    }


def prompts(tokenizer: Any) -> dict[str, Tensor]:
    texts = {}
    for name, question, begun in (("chat", CHAT, ""), ("rewrite", REWRITE, REWRITE_PREFIX)):
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + begun, add_special_tokens=False, return_tensors="pt").input_ids
        texts[name] = ids
    return texts


def race(lm: Any, runs: dict[str, tuple[Run, str]], ids: Tensor, rounds: int) -> dict[str, Any]:
    """Per method the passes, the tokens and one time a round; round 0 is not timed."""
    passes = [0]
    # our loops call the model as well; a draft shares its layers but not this module
    hook = lm.model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    outcome: dict[str, Any] = {name: dict(seconds=[]) for name in runs}
    try:
        for i in range(rounds + 1):
            for name, (run, _) in runs.items():
                passes[0] = 0
                begin = time.perf_counter()
                tokens = run(ids)[0, ids.shape[1] :].tolist()
                seconds = time.perf_counter() - begin
                outcome[name].update(passes=passes[0], tokens=tokens)
                if i:
                    outcome[name]["seconds"].append(seconds)
    finally:
        hook.remove()
    return outcome


def rows_of(
    runs: dict[str, tuple[Run, str]], outcome: dict[str, Any], prompt: str, dtype: str, ids: Tensor
) -> list[dict[str, Any]]:
    rows = []
    for name, (_, rival) in runs.items():
        mine = outcome[name]

        def ratio(to: str, mine: Any = mine) -> Spread:
            """How many times faster, paired round by round."""
            pairs = zip(outcome[to]["seconds"], mine["seconds"])
            return Spread.of([theirs / ours for theirs, ours in pairs])

        rows.append(
            dict(
                prompt=prompt,
                dtype=dtype,
                method=name,
                prompt_tokens=ids.shape[1],
                tokens=len(mine["tokens"]),
                passes=mine["passes"],
                seconds=Spread.of(mine["seconds"])._asdict(),
                x_plain=ratio(PLAIN)._asdict(),
                rival=rival,
                x_rival=ratio(rival)._asdict() if rival in runs else None,
                identical=mine["tokens"] == outcome[PLAIN]["tokens"],
            )
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    result = Table(
        title=f"{first['prompt']}, {first['dtype']}, {first['prompt_tokens']} prompt tokens, "
        f"{torch.get_num_threads()} threads",
        title_justify="left",
        caption="HF: transformers; x: times faster, median (p20..p80) of pairs of a round; rival: "
        "HF's lookup with K=10, or its assisted loop; passes: the draft model's too",
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for name in ("tokens", "passes", "s", "x plain", "x rival", "same text"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            row["method"],
            str(row["tokens"]),
            str(row["passes"]),
            f"{row['seconds']['median']:.2f}",
            _spread(row["x_plain"]),
            _spread(row["x_rival"]) if row["x_rival"] else "",
            "yes" if row["identical"] else "no",
        )
    return result


def _spread(x: dict[str, float]) -> str:
    return f"{x['median']:.2f} ({x['p20']:.2f}..{x['p80']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS / "transformers_generate.json")
    arguments = parser.parse_args()
    console, rows = Console(), []
    lm, tokenizer = smollm2.load(torch.float32)
    for dtype in arguments.dtypes:
        lm.model.to(getattr(torch, dtype))
        runs = methods(lm, arguments.tokens)
        runs = {k: v for k, v in runs.items() if arguments.only in k or k == PLAIN}
        for prompt, ids in prompts(tokenizer).items():
            new = rows_of(runs, race(lm, runs, ids, arguments.rounds), prompt, dtype, ids)
            console.print(table(new))
            rows += new
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = dict(kind="transformers_generate", machine=machine("cpu"), rows=rows)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
