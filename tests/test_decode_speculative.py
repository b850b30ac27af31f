"""The speculative loop: greedy output is plain greedy's, sampled output has the target's law."""

import pytest
import torch
from scipy import stats
from tiny_causal import TableModel, TinyCausal

from pydecode.decode.drafters import ModelDrafter, PromptLookup
from pydecode.decode.prefill import prefill
from pydecode.decode.speculative import generate

PROMPTS = [[1, 2, 3, 4, 5, 1, 2, 3], [7], [5, 6, 5, 6, 5, 6, 5]]


def drafters(model: TinyCausal, batch: int) -> dict:
    """Every drafter, as a chain and as a tree, good and useless ones."""
    other = TinyCausal(99)
    return {
        "nothing": None,
        "lookup chain": PromptLookup(min_ngram=1, num_tokens=3, max_tokens=6),
        "lookup tree": PromptLookup(min_ngram=1, num_tokens=3, candidates=3),
        "the model itself": ModelDrafter(model, cache=model.new_cache(batch, 128)),
        "the model itself, tree": ModelDrafter(
            model, branching=(2, 2, 1), cache=model.new_cache(batch, 128)
        ),
        "the model itself, while sure": ModelDrafter(
            model, branching=(1,) * 8, cache=model.new_cache(batch, 128), min_confidence=0.6
        ),
        "shared cache": ModelDrafter(model),
        "shared cache, tree": ModelDrafter(model, branching=(3, 1, 1)),
        "another model": ModelDrafter(other, cache=other.new_cache(batch, 128)),
        "another model, while sure": ModelDrafter(
            other, cache=other.new_cache(batch, 128), min_confidence=0.5
        ),
        "another model, tree": ModelDrafter(
            other, branching=(2, 2), cache=other.new_cache(batch, 128)
        ),
    }


@pytest.mark.parametrize("name", drafters(TinyCausal(0), 1))
def test_greedy_is_plain_greedy(name: str) -> None:
    model = TinyCausal(int(torch.randint(1000, ())))
    want = [model.greedy(prompt, 24) for prompt in PROMPTS]
    got = generate(
        model,
        PROMPTS,
        cache=model.new_cache(3, 128),
        max_new_tokens=24,
        drafter=drafters(model, 3)[name],
        prefill_chunk=3,
    )
    assert got.tokens == want
    if name == "the model itself":  # every draft is right: 5 tokens a step, the last step cut
        assert got.steps == 5
    if name in ("the model itself", "the model itself, while sure"):
        assert got.accepted == got.drafted


@pytest.mark.parametrize("name", ["the model itself", "the model itself, tree", "lookup tree"])
def test_stop_token_inside_an_accepted_path(name: str) -> None:
    model = TinyCausal(3)
    plain = [model.greedy(prompt, 24) for prompt in PROMPTS]
    # a token that first appears in the middle of some step
    stop = {plain[0][2], plain[2][6]}
    want = [model.greedy(prompt, 24, stop) for prompt in PROMPTS]
    cache = model.new_cache(3, 128)
    drafter = drafters(model, 3)[name]
    got = generate(
        model, PROMPTS, cache=cache, max_new_tokens=24, drafter=drafter, stop_tokens=stop
    )
    assert got.tokens == want
    # the cache ends where the text does, so that the conversation can go on
    lengths = [len(p) + len(t) - 1 for p, t in zip(PROMPTS, want)]
    assert cache.lengths.tolist() == lengths


@pytest.mark.parametrize("name", ["the model itself", "the model itself, tree", "nothing"])
def test_should_stop_is_asked_token_by_token(name: str) -> None:
    """It sees every token once, in turn, and nothing behind the one that it ends."""
    model, seen = TinyCausal(3), {b: [] for b in range(3)}
    plain = [model.greedy(prompt, 24) for prompt in PROMPTS]
    lengths = [7, 24, 11]

    def should_stop(b: int, token: int) -> bool:
        seen[b].append(token)
        return len(seen[b]) == lengths[b]

    cache = model.new_cache(3, 128)
    drafter = drafters(model, 3)[name]
    got = generate(
        model, PROMPTS, cache=cache, max_new_tokens=24, drafter=drafter, should_stop=should_stop
    )
    assert got.tokens == [tokens[:n] for tokens, n in zip(plain, lengths)]
    assert list(seen.values()) == got.tokens
    assert cache.lengths.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, lengths)]


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 6, 7])
@pytest.mark.parametrize("name", ["the model itself", "the model itself, tree"])
def test_length_limit_inside_a_path(name: str, count: int) -> None:
    model = TinyCausal(4)
    got = generate(
        model,
        PROMPTS,
        cache=model.new_cache(3, 128),
        max_new_tokens=count,
        drafter=drafters(model, 3)[name],
    )
    assert got.tokens == [model.greedy(prompt, count) for prompt in PROMPTS]


def test_a_conversation_goes_on_in_the_same_cache() -> None:
    model = TinyCausal(5)
    cache = model.new_cache(1, 128)
    drafter = ModelDrafter(model)
    first = generate(model, [PROMPTS[0]], cache=cache, max_new_tokens=7, drafter=drafter)
    text = PROMPTS[0] + first.tokens[0]
    # the context in the cache is the text less its last token
    rest = generate(model, [text[-1:]], cache=cache, max_new_tokens=5, drafter=drafter)
    assert first.tokens[0] + rest.tokens[0] == model.greedy(PROMPTS[0], 12)


def test_streaming_and_counts() -> None:
    model, seen = TinyCausal(6), []
    got = generate(
        model,
        [PROMPTS[0]],
        cache=model.new_cache(1, 128),
        max_new_tokens=10,
        drafter=ModelDrafter(model),
        on_tokens=lambda b, new: seen.append((b, new)),
    )
    assert [t for _, new in seen for t in new] == got.tokens[0]
    assert len(seen) == got.steps == len(got.accepted[0])


def test_prompt_lookup_adapts() -> None:
    """On a text that repeats, the draft doubles up to its limit; after a miss it shrinks."""
    drafter = PromptLookup(num_tokens=4, max_tokens=10, min_ngram=2)
    sequence = [*range(30), 0, 1, 2]
    drafter.start([sequence], None)  # type: ignore[arg-type]
    last = torch.tensor([2])
    sizes = []
    for accepted in (4, 8, 3):
        draft = drafter.propose([sequence], last, None, [50])  # type: ignore[arg-type]
        sizes.append(draft.tokens.shape[1])
        assert draft.tokens[0].tolist() == list(range(3, 3 + sizes[-1]))
        drafter.update([accepted])
    assert sizes == [4, 8, 10]
    assert drafter.budget == [4]
    # a match of max_ngram tokens drafts max_tokens at once, until that is mostly rejected
    sequence[:] = [*range(30), *range(6)]
    drafter.start([sequence], None)  # type: ignore[arg-type]
    sizes = []
    for accepted in (2, 0):
        draft = drafter.propose([sequence], last, None, [50])  # type: ignore[arg-type]
        sizes.append(draft.tokens.shape[1])
        drafter.update([accepted])
    assert sizes == [10, 3]


def test_a_draft_ends_where_the_draft_model_is_unsure() -> None:
    """Each request's own: through its first token below the threshold, at most four."""
    model = TinyCausal(7)
    drafter = ModelDrafter(model, cache=model.new_cache(3, 128), min_confidence=0.6)
    lengths = []
    for prompt in PROMPTS:
        text, sure, n = list(prompt), True, 0
        while sure and n < 4:
            law = model.dense(text)[-1].softmax(-1)
            text.append(int(law.argmax()))
            sure, n = bool(law.max() >= 0.6), n + 1
        lengths.append(n)
    assert len(set(lengths)) > 1
    last = torch.tensor([p[-1] for p in PROMPTS])
    for room in ([9, 9, 9], [1, 9, 2]):
        cache = model.new_cache(3, 128)
        drafter.start(PROMPTS, cache)
        draft = drafter.propose(PROMPTS, last, cache, room)
        assert draft.num_drafts.tolist() == [min(n, r) for n, r in zip(lengths, room)]
    for prompt, n in zip(PROMPTS, lengths):  # alone, no pass is spent behind its end
        drafter = ModelDrafter(model, cache=model.new_cache(1, 128), min_confidence=0.6)
        drafter.start([prompt], cache)
        draft = drafter.propose([prompt], torch.tensor(prompt[-1:]), cache, [9])
        assert draft.tokens.shape == (1, n)
    with pytest.raises(ValueError, match="min_confidence: expected 0 with a tree"):
        ModelDrafter(model, branching=(2, 1), min_confidence=0.5)


@pytest.mark.parametrize("min_confidence", [0.0, 0.6])
def test_a_draft_cache_holds_what_it_says(min_confidence: float) -> None:
    """Behind accepted and rejected drafts, cut ones too: the K/V of the text, no token missing."""
    model, draft = TinyCausal(7), TinyCausal(8)
    own, fresh = draft.new_cache(1, 128), draft.new_cache(1, 128)
    for drafting in (model, draft):
        drafter = ModelDrafter(drafting, cache=own, min_confidence=min_confidence)
        cache = model.new_cache(1, 128)
        done = generate(model, PROMPTS[:1], cache=cache, max_new_tokens=24, drafter=drafter)
        own.lengths[:], fresh.lengths[:] = 0, 0
        prefill(drafting, [(PROMPTS[0] + done.tokens[0])[: drafter.valid[0]]], fresh, 512)
        held, want = (
            torch.stack([c.k, c.v])[:, :, c.block_table[0]].flatten(2, 3) for c in (own, fresh)
        )
        torch.testing.assert_close(
            held[:, :, : drafter.valid[0]], want[:, :, : drafter.valid[0]], rtol=0, atol=1e-4
        )


def test_empty_prompt_is_an_error() -> None:
    model = TinyCausal(0)
    with pytest.raises(ValueError, match="prompts: expected at least one token"):
        generate(model, [[1], []], cache=model.new_cache(2, 8), max_new_tokens=1)


B = 20_000
SAMPLED = {
    "plain": (None, None),
    "prompt lookup, delta drafts": (lambda d: PromptLookup(min_ngram=1, num_tokens=2), None),
    "prompt lookup, trie": (lambda d: PromptLookup(min_ngram=1, candidates=2), None),
    "chain, token rule": (lambda d: drawn(d, (1, 1)), "token"),
    "chain, block rule": (lambda d: drawn(d, (1, 1, 1)), "block"),
    "chain, while sure": (lambda d: drawn(d, (1, 1, 1), min_confidence=0.4), "block"),
    "tree, recursive": (lambda d: drawn(d, (2, 2)), "recursive"),
    "tree, traversal": (lambda d: drawn(d, (2, 1, 1)), "traversal"),
    "tree, k_seq": (lambda d: drawn(d, (3, 1)), "k_seq"),
}


def drawn(model: TableModel, branching: tuple[int, ...], **options: float) -> ModelDrafter:
    """Drafts with the seeds of the verification: the streams must not meet."""
    cache = model.new_cache(B, 32)
    options = dict(cache=cache, temperature=1.0, seed=SEEDS, **options)
    return ModelDrafter(model, branching=branching, **options)


SEEDS = torch.arange(B)


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-square of the joint of the new tokens against the exact law, small cells merged."""
    V, depth = law.shape[0], law.dim()
    index = (tokens * V ** torch.arange(depth - 1, -1, -1)).sum(1)
    seen = torch.bincount(index, minlength=law.numel()).double()
    expected = law.flatten() * len(tokens)
    small = expected < 10
    seen = torch.cat([seen[~small], seen[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    return float(stats.chisquare(seen[keep].numpy(), expected[keep].numpy()).pvalue)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_output_has_the_targets_law(name: str) -> None:
    """Five tokens of 20,000 requests, through several steps, against the enumerated joint law."""
    make, rule = SAMPLED[name]
    target, draft = TableModel(1), TableModel(2)
    prompt = [0, 1, 2, 0, 1]
    got = generate(
        target,
        [prompt] * B,
        cache=target.new_cache(B, 32),
        max_new_tokens=5,
        drafter=make(draft) if make else None,
        temperature=1.0,
        rule=rule,
        seed=SEEDS,
    )
    tokens = torch.tensor(got.tokens)
    assert p_value(tokens, target.law(prompt, 5)) > 1e-4
    if make:
        assert sum(map(sum, got.accepted)) > 0
    # the check can fail: another law is rejected
    assert p_value(tokens, draft.law(prompt, 5)) < 1e-4
