"""SDAR's sampler against its law; its generator against its loop in plain words."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from fake_diffusion import MASK, BlockModel, table
from peer_diffusion import proposals, sdar_literal_top_k, sdar_step
from peer_diffusion_loops import quotas
from reads import Reads
from torch import Tensor

from pydecode.compat.diffusion.sdar import (
    block_diffusion_generate,
    sample_with_temperature_topk_topp,
)

STRATEGIES = (
    "low_confidence_dynamic",
    "low_confidence_static",
    "sequential",
    "entropy_bounded",
)


def law_of(row: Tensor, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The k largest of the tempered law, renormalised; of these the nucleus."""
    p = torch.softmax(row / (temperature or 1.0), -1).tolist()
    kept = sorted(range(len(p)), key=lambda v: -p[v])
    if top_k > 0:
        kept = kept[:top_k]
    total, mass, nucleus = sum(p[v] for v in kept), 0.0, []
    for v in kept:
        if top_p >= 1 or mass <= top_p:
            nucleus.append(v)
        mass += p[v] / total
    total = sum(p[v] for v in nucleus)
    return {v: p[v] / total for v in nucleus}


FILTERS = [(0, 1.0), (4, 1.0), (0, 0.8), (4, 0.7)]


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.6])
def test_sampler(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 4, 12, dtype=torch.float64) * 2
    tokens, p = sample_with_temperature_topk_topp(logits, temperature, top_k, top_p, seed=2)
    assert (tokens.shape, tokens.dtype, p.dtype) == ((20, 4), torch.int64, torch.float64)
    for row, v, q in zip(logits.flatten(0, 1), tokens.flatten().tolist(), p.flatten().tolist()):
        assert q == pytest.approx(law_of(row, temperature, top_k, top_p)[v], abs=1e-9)
        assert v == int(row.argmax()) or temperature > 0
    row = torch.tensor([0.0, 1.0, 2.2, -1.0, 2.0, 0.5, -2.0], dtype=torch.float64)
    if temperature > 0:
        torch.manual_seed(41)
        drawn, _ = sample_with_temperature_topk_topp(
            row.expand(5000, 1, 7), temperature, top_k, top_p
        )
        law = law_of(row, temperature, top_k, top_p)
        assert set(drawn.flatten().tolist()) == set(law)
        counts = [(drawn == v).sum().item() for v in law]
        assert scipy.stats.chisquare(counts, [5000 * q for q in law.values()]).pvalue > 1e-4


def test_sampler_dtype() -> None:
    _, p = sample_with_temperature_topk_topp(torch.randn(2, 3, 9, dtype=torch.bfloat16))
    assert p.dtype == torch.bfloat16


# ---- the generator -------------------------------------------------------------------------------


def loop(
    model: Any,
    prompt: Tensor,
    strategy: str,
    *,
    gen_length: int,
    block_length: int,
    denoising_steps: int,
    stops: tuple[int, ...] = (),
    literal: bool = False,
    tau: float = 0.85,
    top_k: int = 0,
) -> Tensor:
    """SDAR's loop at temperature 0, one request; literal: committed rows are in its top-k."""
    model.eval()
    P, cache = prompt.shape[1], SimpleNamespace()
    blocks = -(-(P + gen_length) // block_length)
    x = prompt.new_full((1, blocks * block_length), MASK)
    x[:, :P] = prompt
    block_of = torch.arange(x.shape[1]) // block_length

    def forward(tokens: Tensor, start: int, end: int, store_kv: bool) -> Any:
        return model(
            tokens,
            attention_mask=(block_of[start:end, None] >= block_of[None, :end])[None].float(),
            position_ids=torch.arange(start, end)[None],
            past_key_values=cache,
            use_cache=True,
            store_kv=store_kv,
        )

    first = P // block_length
    if first:
        forward(x[:, : first * block_length], 0, first * block_length, True)
    for n in range(first, blocks):
        start, end = n * block_length, (n + 1) * block_length
        block = x[:, start:end].clone()
        schedule = [*quotas(block_length, denoising_steps), 0]
        if strategy == "entropy_bounded":
            schedule = [0] * (block_length + 1)
        for quota in schedule:
            masked = [i for i, t in enumerate(block[0].tolist()) if t == MASK]
            if not masked:
                forward(block, start, end, True)
                break
            logits = forward(block, start, end, False).logits[0]
            token, c, h = proposals(logits, masked)
            if top_k > 0:  # scores are of the filtered law
                laws = {i: law_of(logits[i], 0.0, top_k, 1.0).values() for i in masked}
                c = {i: max(law) for i, law in laws.items()}
                h = {i: -sum(q * math.log(q) for q in law) for i, law in laws.items()}
            chosen = sdar_step(strategy, c, h, quota, length=block_length, tau=tau)
            if literal and len(chosen) < quota:
                chosen = sdar_literal_top_k(c, quota, block_length)
                token |= {i: int(logits[i].argmax()) for i in chosen}
            for i in chosen:
                block[0, i] = token[i]
        x[:, start:end] = block
        if any(s in x[0, P:].tolist() for s in stops):
            break
    return x


def ours_of(model: Any, prompt: Tensor, strategy: str, **more: Any) -> Tensor:
    return block_diffusion_generate(
        model,
        {"input_ids": prompt},
        MASK,
        remasking_strategy=strategy,
        **{
            "temperature": 0.0,
            "past_key_values": SimpleNamespace(),
            "gen_length": 7,
            "block_length": 4,
            "denoising_steps": 4,
            **more,
        },
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("P", [1, 6, 8])
def test_equals_the_loop(strategy: str, P: int) -> None:
    """Prompts shorter than a block, with a tail, and of whole blocks; the same calls."""
    for steps, tau, top_k in ((4, 0.6, 0), (3, 0.3, 3), (1, 0.85, 0), (6, 0.5, 0), (4, 0.7, 2)):
        prompt, logits = torch.randint(0, MASK, (1, P)), table(sure=2.0)
        shape = dict(gen_length=7, block_length=4, denoising_steps=steps, top_k=top_k)
        model, twin = BlockModel(logits), BlockModel(logits)
        x = ours_of(model, prompt, strategy, confidence_threshold=tau, eb_threshold=tau, **shape)
        want = loop(twin, prompt, strategy, tau=tau, **shape)
        assert x.tolist() == want.tolist()
        assert model.calls == twin.calls


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches(strategy: str) -> None:
    """Theirs takes one request. One that is done waits: the calls differ, its tokens do not."""
    prompt, logits = torch.randint(0, MASK, (5, 6)), table(sure=2.0)
    shape = dict(gen_length=7, block_length=4, denoising_steps=4)
    x = ours_of(BlockModel(logits), prompt, strategy, eb_threshold=0.85, **shape)
    for b in range(5):
        want = loop(BlockModel(logits), prompt[b : b + 1], strategy, **shape)
        assert x[b].tolist() == want[0].tolist()


def test_committed_tokens_stay() -> None:
    """Theirs overwrites them where the quota exceeds the masks left."""
    shape, changed = dict(gen_length=8, block_length=8, denoising_steps=2), 0
    for seed in range(8):
        logits, prompt = table(seed, sure=3.0), torch.arange(8)[None]
        how = dict(strategy="low_confidence_dynamic", tau=0.45, **shape)
        x = ours_of(
            BlockModel(logits), prompt, "low_confidence_dynamic", confidence_threshold=0.45, **shape
        )
        literal = loop(BlockModel(logits), prompt, literal=True, **how)
        assert x.tolist() == loop(BlockModel(logits), prompt, **how).tolist()
        changed += x.tolist() != literal.tolist()
    assert changed > 2  # so the literal loop does show the fault


def test_stopping() -> None:
    prompt, logits = torch.randint(6, MASK, (1, 4)), table(sure=2.0)
    shape = dict(gen_length=24, block_length=4, denoising_steps=4)
    stops = (0, 1, 2)
    x = ours_of(BlockModel(logits), prompt, "sequential", stopping_criteria_idx=stops, **shape)
    assert (
        x.tolist() == loop(BlockModel(logits), prompt, "sequential", stops=stops, **shape).tolist()
    )
    full = ours_of(BlockModel(logits), prompt, "sequential", **shape)
    done = (x != MASK).sum()
    assert torch.equal(x[0, :done], full[0, :done])
    # a batch goes on until every request has stopped
    pair = torch.cat([prompt, (prompt - 5) % MASK])
    both = ours_of(BlockModel(logits), pair, "sequential", stopping_criteria_idx=stops, **shape)
    assert (both[0] != MASK).sum() >= done


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_that_prefers_the_mask(strategy: str) -> None:
    """Theirs leaves masks in place and the block out of the cache, or runs out of its schedule."""
    x = ours_of(
        BlockModel(table(mask_logit=50.0)),
        torch.randint(0, MASK, (2, 5)),
        strategy,
        eb_threshold=0.1,
    )
    assert not (x == MASK).any()


def test_one_read_a_step() -> None:
    model = BlockModel(table())
    with Reads() as reads:
        ours_of(
            model,
            torch.randint(0, MASK, (1, 5)),
            "low_confidence_static",
            gen_length=11,
        )
    assert reads.count == len(model.calls) - 1  # none for the prefill


def test_transformers_cache_by_default() -> None:
    cache = pytest.importorskip("transformers").DynamicCache
    seen = []

    class Model(BlockModel):
        def __call__(self, x: Tensor, **given: Any) -> Any:
            seen.append(type(given["past_key_values"]))
            return super().__call__(x, **given)

    ours_of(Model(table()), torch.randint(0, MASK, (1, 5)), "sequential", past_key_values=None)
    assert set(seen) == {cache}


def test_draws() -> None:
    prompt = torch.randint(0, MASK, (3, 4))

    def once(**seed: Any) -> list[list[int]]:
        return ours_of(
            BlockModel(table(sure=1.0)), prompt, STRATEGIES[0], temperature=1.0, **seed
        ).tolist()

    torch.manual_seed(3)
    first = once()
    assert first != once()
    torch.manual_seed(3)
    assert first == once()
    assert once(seed=1) != once(seed=2)
    seeds = torch.tensor([5, 6, 7])
    assert once(seed=seeds)[1] == once(seed=torch.tensor([0, 6, 1]))[1]


def test_errors() -> None:
    prompt, model = torch.randint(0, MASK, (1, 4)), BlockModel(table())
    with pytest.raises(ValueError, match="remasking_strategy"):
        ours_of(model, prompt, "best")
    with pytest.raises(ValueError, match="eb_threshold"):
        ours_of(model, prompt, "entropy_bounded")
    with pytest.raises(ValueError, match="model"):
        ours_of(BlockModel(table() * torch.nan), prompt, "sequential")
