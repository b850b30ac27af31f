"""_speculative_sampling: theirs by its documentation, by its law, and inside their own loop."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peer_transformers import p_value, speculative_sampling, text_law  # noqa: E402
from tiny_llama import tiny_llama  # noqa: E402
from transformers.generation import utils as theirs  # noqa: E402

from pydecode.compat.transformers import _speculative_sampling  # noqa: E402

V = 5


def fixed(monkeypatch: pytest.MonkeyPatch, uniforms: list[float]) -> None:
    """The next draws."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.tensor(uniforms).view(shape))


def sharp(*shape: int) -> Tensor:
    """Logits of which some are -inf, as processors leave them, and two rows may be equal."""
    logits = torch.randn(*shape) * 2
    return logits.masked_fill(torch.rand(shape) < 0.25, -torch.inf).index_fill(
        -1, torch.randint(shape[-1], (1,)), 1.0
    )


def lists(x: Tensor) -> Any:
    return x.double().softmax(-1)[0].tolist()


def test_same_signature() -> None:
    want = list(inspect.signature(theirs._speculative_sampling).parameters.values())
    got = list(inspect.signature(_speculative_sampling).parameters.values())
    assert [x.name for x in got[: len(want)]] == [x.name for x in want]
    assert [x.default for x in got[: len(want)]] == [x.default for x in want]


def test_equals_the_documented_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for _ in range(2000):
        G = int(torch.randint(1, 5, ()))
        q, p = sharp(1, G, V), sharp(1, G + 1, V)
        if torch.rand(()) < 0.3:
            p[:, 0] = q[:, 0]
        ids = torch.randint(V, (1, 3 + G))
        if torch.rand(()) < 0.8:  # drawn, as an assistant draws
            ids[0, 3:] = torch.multinomial(q[0].softmax(-1), 1)[:, 0]
        uniforms = torch.rand(G + 1).tolist()
        weight = 0.7 if torch.rand(()) < 0.3 else None
        is_done = bool(torch.rand(()) < 0.3)
        fixed(monkeypatch, uniforms)
        tokens, matches = _speculative_sampling(ids, q, G, p, weight, is_done)
        monkeypatch.undo()
        want = speculative_sampling(
            ids[0, 3:].tolist(), lists(q), lists(p), uniforms, weight, is_done
        )
        assert (tokens.tolist()[0], int(matches)) == want
        assert tokens.dtype == torch.int64
        assert matches.shape == ()
        assert matches.dtype == torch.int64
        seen.add((G - len(want[0]), is_done))
    assert len(seen) >= 8  # rejections at every place, with and without is_done


@pytest.mark.parametrize("weight", [None, 0.6])
def test_same_law_as_theirs(weight: float | None) -> None:
    """Their function and ours against each other's frequencies, every token possible."""
    q, p = torch.randn(1, 2, V), torch.randn(1, 3, V)
    ids = torch.multinomial(q[0].softmax(-1), 1).T
    counts = []
    for function in (_speculative_sampling, theirs._speculative_sampling):
        rows = []
        for _ in range(1500):
            tokens, matches = function(ids, q, 2, p, assistant_ensemble_weight=weight)
            assert tokens.shape[1] == int(matches) + 1
            rows.append([*tokens[0].tolist(), V, V][:3])
        index = (torch.tensor(rows) * (V + 1) ** torch.arange(3)).sum(1)
        counts.append(torch.bincount(index, minlength=(V + 1) ** 3))
    table = torch.stack(counts)
    table = table[:, table.sum(0) >= 10].numpy()
    from scipy import stats

    assert stats.chi2_contingency(table).pvalue > 1e-4


# ---- where theirs goes wrong ---------------------------------------------------------------------


def test_a_coin_of_zero_accepts_nothing_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs accepts token 0, to which the model gives no probability, at a coin of exactly 0."""
    q, p = torch.zeros(1, 1, V), torch.zeros(1, 2, V)
    p[..., 0] = -torch.inf
    for weight in (None, 0.5):  # and at 1 - w under an ensemble weight
        fixed(monkeypatch, [0.0, 0.5])
        tokens, matches = _speculative_sampling(torch.tensor([[3, 0]]), q, 1, p, weight)
        assert int(matches) == 0
        assert tokens.shape == (1, 1)
        assert int(tokens) != 0
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert int(theirs._speculative_sampling(torch.tensor([[3, 0]]), q, 1, p)[1]) == 1


def test_no_residual_falls_back_to_p(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = q, and a candidate of no probability: their residual is 0 / 0, and multinomial raises."""
    q = torch.tensor([[[-torch.inf, 0.0, 0.0]]])
    p = torch.cat([q, q], 1)
    for u, want in ((0.2, 1), (0.8, 2)):
        fixed(monkeypatch, [0.5, u])
        tokens, matches = _speculative_sampling(torch.tensor([[0]]), q, 1, p)
        assert (tokens.tolist(), int(matches)) == ([[want]], 0)
    with pytest.raises(RuntimeError, match="probability"):
        theirs._speculative_sampling(torch.tensor([[0]]), q, 1, p)


def test_bool_in_fifth_place_is_is_done_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, V)
    p = torch.zeros(1, 3, V)
    for is_done, want in ((True, ([[1, 2]], 1)), (False, ([[1, 2, 4]], 2))):
        fixed(monkeypatch, [0.9, 0.9, 0.9])
        tokens, matches = _speculative_sampling(torch.tensor([[9, 1, 2]]), q, 2, p, is_done)
        assert (tokens.tolist(), int(matches)) == want


def test_what_cannot_be_served_raises() -> None:
    q, p, ids = torch.zeros(1, 1, V), torch.zeros(1, 2, V), torch.tensor([[1]])
    with pytest.raises(ValueError, match="candidate_input_ids: expected a batch of 1, got 2"):
        _speculative_sampling(ids.expand(2, 1), q, 1, p)
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match="assistant_ensemble_weight"):
            _speculative_sampling(ids, q, 1, p, weight)
    for bad in (p.clone(), q.clone()):
        bad[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            _speculative_sampling(
                ids, bad if bad.shape[1] == 1 else q, 1, bad if bad.shape[1] == 2 else p
            )


def test_inside_their_assisted_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """generate(assistant_model=...) while sampling, with ours in theirs' place: the model's law."""
    model, assistant = (tiny_llama(seed, vocab_size=V) for seed in (0, 1))
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        tokens, matches = _speculative_sampling(*args, **kwargs)
        calls.append(int(matches))
        return tokens, matches

    monkeypatch.setattr(theirs, "_speculative_sampling", counting)
    prompt = torch.tensor([[1, 2, 3]])
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    options = dict(max_new_tokens=3, do_sample=True, top_k=4, temperature=1.5, eos_token_id=None)
    rows = [
        model.generate(prompt, assistant_model=assistant, pad_token_id=0, **options)[0, 3:]
        for _ in range(300)
    ]
    assert 0 < sum(calls) < 2 * len(calls)
    processors = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(1.5), transformers.TopKLogitsWarper(4)]
    )
    texts = torch.stack(rows)[:, :2]  # the first two, so that cells are filled
    assert p_value(texts, text_law(model, [1, 2, 3], 2, processors), V) > 1e-4
    assert p_value(texts, text_law(assistant, [1, 2, 3], 2, processors), V) < 1e-4
