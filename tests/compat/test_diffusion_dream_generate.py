"""Dream's generator against its loop in plain words."""

import math
from typing import Any

import pytest
import scipy.stats
import torch
from fake_diffusion import MASK, FullModel, table
from peer_diffusion import dream_law, surest
from reads import Reads
from torch import Tensor

from pydecode.compat.diffusion.dream import DreamModelOutput, diffusion_generate


def loop(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None,
    *,
    new: int,
    steps: int,
    alg: str,
    eps: float = 1e-3,
    top_p: float | None = None,
    top_k: int | None = None,
    hook: Any = None,
) -> list[list[list[int]]]:
    """Dream's loop at temperature 0, a batch of equal lengths; the history of x."""
    B, P = prompt.shape
    x = torch.cat([prompt, prompt.new_full((B, new), MASK)], 1)
    mask: Any = "full"
    tok_idx = None
    if attention_mask is not None and bool((attention_mask == 0).any()):
        valid = torch.cat([attention_mask, attention_mask.new_ones(B, new)], 1).bool()
        tok_idx = torch.tensor(
            [
                [max(sum(row[: i + 1]) - 1, 0) if row[i] else 1 for i in range(len(row))]
                for row in valid.long().tolist()
            ]
        )
        mask = (valid[:, :, None] & valid[:, None, :])[:, None]
    times = torch.linspace(1, eps, steps + 1)
    history = []
    for i in range(steps):
        logits = model(x, mask, tok_idx).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        if hook is not None:
            logits = hook(i, x, logits)
        masked = [[j for j in range(P + new) if row[j] == MASK] for row in x.tolist()]
        part = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        for b in range(B):
            laws = {j: dream_law(logits[b, j], 0.0, top_p, top_k) for j in masked[b]}
            score = {}
            for j, law in laws.items():
                ranked = [*sorted(law.values(), reverse=True), 0.0]
                score[j] = {
                    "maskgit_plus": ranked[0],
                    "topk_margin": ranked[0] - ranked[1],
                    "entropy": sum(q * math.log(q) for q in law.values() if q > 0),
                }[alg]
            for j in surest(score)[: int(len(masked[b]) * part)]:
                x[b, j] = max(laws[j], key=lambda v: laws[j][v])
        history.append(x.tolist())
    return history


def generate(model: Any, prompt: Tensor, **settings: Any) -> DreamModelOutput:
    out = diffusion_generate(
        model,
        prompt,
        mask_token_id=MASK,
        return_dict_in_generate=True,
        output_history=True,
        **settings,
    )
    assert isinstance(out, DreamModelOutput)
    return out


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(alg: str, padded: bool) -> None:
    prompt = torch.randint(0, MASK, (3, 4))
    attention_mask = torch.ones(3, 4, dtype=torch.long)
    if padded:
        attention_mask = (torch.arange(4) >= torch.tensor([[0], [1], [3]])).long()
    for steps, top_p, top_k in ((4, None, None), (7, 0.75, 3)):
        model, twin = FullModel(table(sure=1.5)), FullModel(table(sure=1.5))
        how: dict[str, Any] = dict(
            attention_mask=attention_mask, steps=steps, alg=alg, top_p=top_p, top_k=top_k
        )
        out = generate(model, prompt, max_new_tokens=8, **how)
        want = loop(twin, prompt, new=8, **how)
        assert out.history is not None
        assert [x.tolist() for x in out.history] == want
        assert out.sequences.tolist() == want[-1]
        assert model.calls == twin.calls
        assert not (out.sequences == MASK).any()


def test_hooks_see_shifted_logits() -> None:
    seen: list[Any] = []

    def hook(step: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits.flip(-1) * (step + 1)

    def tokens_hook(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        seen.append((step, None if logits is None else logits.shape))
        return x if step != 1 else x.clamp(max=5)

    prompt = torch.randint(0, MASK, (2, 4))
    logits = table(sure=1.5)
    logits[:, 0] = -40.0  # flipped, column 0 is where the mask was
    how: dict[str, Any] = dict(steps=4, alg="maskgit_plus")
    out = generate(
        FullModel(logits), prompt, max_length=10, generation_logits_hook_func=hook, **how
    )
    want = loop(FullModel(logits), prompt, None, new=6, hook=hook, **how)
    # the reference lets the mask's flipped column compete with nothing: it is -40 there too
    assert out.sequences.tolist() == want[-1]
    out = generate(
        FullModel(logits), prompt, max_length=10, generation_tokens_hook_func=tokens_hook, **how
    )
    assert seen[0] == (None, None)
    assert [s for s, _ in seen[1:]] == [0, 1, 2, 3]
    assert seen[1][1] == (2, 10, 24)
    assert out.history is not None
    assert out.history[1].max() <= 5


def test_origin() -> None:
    """Each mask goes with probability 1 - s/t, all in the last step; the token is the argmax."""
    prompt = torch.randint(0, MASK, (1, 3)).expand(600, 3)
    model = FullModel(table(sure=1.5))
    torch.manual_seed(31)
    out = generate(model, prompt, max_new_tokens=6, steps=4, eps=0.2)
    assert out.history is not None
    times, left = torch.linspace(1, 0.2, 5), 3600
    for i, x in enumerate(out.history):
        share = 1 - times[i + 1] / times[i] if i < 3 else 1
        now = int((x == MASK).sum())
        assert abs(left - now - left * share) < 4.5 * (left * 0.25) ** 0.5 + 0.01
        left = now
    assert left == 0
    assert len({tuple(x) for x in (out.history[0] == MASK).tolist()}) > 30
    first = FullModel(table(sure=1.5))(torch.cat([prompt, prompt.new_full((600, 6), MASK)], 1))
    want = first.logits[:, 2:8].argmax(-1)  # position 3's token is row 2's
    filled = out.history[0][:, 3:] != MASK
    assert torch.equal(out.history[0][:, 3:][filled], want[filled])


def test_alg_temp_draws_positions_without_replacement() -> None:
    """Pairs of positions of the first step follow softmax(c / alg_temp), one after the other."""
    prompt = torch.randint(0, MASK, (1, 3)).expand(2000, 3)
    logits = table(sure=0.7)
    how: dict[str, Any] = dict(max_new_tokens=4, steps=2, eps=0.0, alg="maskgit_plus")
    out = generate(FullModel(logits), prompt, alg_temp=0.1, seed=5, **how)
    x = torch.cat([prompt[:1], prompt.new_full((1, 4), MASK)], 1)
    c = torch.softmax(FullModel(logits)(x).logits[0, 2:6], -1).max(-1).values
    w = torch.softmax(c / 0.1, -1).tolist()
    law = {
        (i, j): w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])
        for i in range(4)
        for j in range(i + 1, 4)
    }
    assert out.history is not None
    filled = [tuple(row.nonzero()[:, 0].tolist()) for row in out.history[0][:, 3:] != MASK]
    counts = [filled.count(pair) for pair in law]
    assert sum(counts) == 2000
    assert scipy.stats.chisquare(counts, [2000 * q for q in law.values()]).pvalue > 1e-4
    assert not (out.sequences == MASK).any()
    again = generate(FullModel(logits), prompt, alg_temp=0.1, seed=torch.arange(2000), **how)
    alone = generate(FullModel(logits), prompt[:1], alg_temp=0.1, seed=torch.tensor([7]), **how)
    assert again.sequences[7].tolist() == alone.sequences[0].tolist()


def test_unequal_numbers_of_masks() -> None:
    """Theirs commits the mean number, and turns tokens back into masks; ours each its own."""
    prompt = torch.randint(0, MASK, (2, 8))
    prompt[0, 1:7] = MASK
    out = generate(FullModel(table()), prompt, max_new_tokens=2, steps=4, alg="entropy")
    assert out.history is not None
    left = torch.stack([(x == MASK).sum(-1) for x in out.history])
    assert (left.diff(dim=0) <= 0).all()
    assert left[-1].tolist() == [0, 0]
    before = torch.cat([prompt, prompt.new_full((2, 2), MASK)], 1)
    for x in out.history:
        assert torch.equal(x[before != MASK], before[before != MASK])
        before = x


@pytest.mark.parametrize("alg", ["origin", "entropy"])
@pytest.mark.parametrize("alg_temp", [None, 0.3])
def test_reads_nothing_in_the_loop(alg: str, alg_temp: float | None) -> None:
    prompt = torch.randint(0, MASK, (2, 4))
    settings: dict[str, Any] = dict(max_new_tokens=4, steps=3, alg=alg, alg_temp=alg_temp)
    with Reads() as reads:
        generate(FullModel(table()), prompt, temperature=0.3, **settings)
    assert reads.count == 0
    model = FullModel(table(mask_logit=50.0))  # theirs leaves masks
    assert not (generate(model, prompt, **settings).sequences == MASK).any()


def test_settings() -> None:
    class Config:
        mask_token_id, steps, alg, max_new_tokens = MASK, 3, "entropy", 5

    prompt = torch.randint(0, MASK, (2, 4))
    model = FullModel(table())
    model.config = Config()  # type: ignore[attr-defined]
    x = diffusion_generate(model, prompt)
    assert isinstance(x, Tensor)
    assert (x.shape, len(model.calls)) == ((2, 9), 3)
    given = Config()
    given.steps = 2
    x = diffusion_generate(model, prompt, given, max_new_tokens=2, num_return_sequences=3)
    assert isinstance(x, Tensor)
    assert (x.shape, len(model.calls)) == ((6, 6), 5)
    assert x[:, :4].tolist() == prompt.repeat_interleave(3, 0).tolist()
    # a stock generation config gives its mask token, and none of its sampling
    other = FullModel(table())
    other.generation_config = Config()  # type: ignore[attr-defined]
    x = diffusion_generate(other, prompt, max_new_tokens=2, steps=1)
    assert isinstance(x, Tensor)
    assert (x.shape, len(other.calls)) == ((2, 6), 1)
    with pytest.raises(TypeError, match="stpes"):
        diffusion_generate(model, prompt, stpes=3)
    with pytest.raises(ValueError, match="alg"):
        diffusion_generate(model, prompt, alg="confidence_threshold")
    with pytest.raises(ValueError, match="mask_token_id"):
        diffusion_generate(FullModel(table()), prompt)
    with pytest.raises(ValueError, match="max_length"):
        diffusion_generate(FullModel(table()), prompt, max_length=4, mask_token_id=MASK)
    x = diffusion_generate(FullModel(table()), prompt, steps=1, mask_token_id=MASK)
    assert isinstance(x, Tensor)
    assert x.shape == (2, 24)
