"""Tiny random models of several families of transformers, on its own attention and on ours."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as T

import pydecode.compat.transformers  # noqa: F401

DECODER = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,  # so that attention matters to the logits
    max_position_embeddings=64,
)
ENCODER = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.3,
    max_position_embeddings=64,
    **{f"{token}_token_id": i for i, token in enumerate(("pad", "bos", "eos", "cls", "sep"))},
)
BOTH = dict(
    vocab_size=61,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    init_std=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
WINDOW = dict(**DECODER, sliding_window=5)
ROPE = dict(rope_type="default", rope_theta=10000.0)
LATENT = dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=4)
# what stands for each family: causal, windowed, capped (full and sliding layers in turn), with
# sinks and experts, in chunks, with a V narrower than K
CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**WINDOW)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**WINDOW, attn_logit_softcapping=3.0)),
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**WINDOW, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE)
    ),
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(
            **DECODER, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
        )
    ),
    "deepseek": lambda: T.DeepseekV3ForCausalLM(
        T.DeepseekV3Config(
            **{**DECODER, "num_key_value_heads": 4} | LATENT,
            **dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1),
            **dict(moe_intermediate_size=16, first_k_dense_replace=1),
        )
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**ENCODER)),
    "modernbert": lambda: T.ModernBertForMaskedLM(
        T.ModernBertConfig(**ENCODER, local_attention=6, global_attn_every_n_layers=2)
    ),
    "bart": lambda: T.BartForConditionalGeneration(
        T.BartConfig(**BOTH, max_position_embeddings=64)
    ),
    "whisper": lambda: T.WhisperForConditionalGeneration(
        T.WhisperConfig(
            **BOTH,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=64,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "vit": lambda: T.ViTModel(
        T.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            initializer_range=0.3,
        )
    ),
}
NOT_SDPA = ("gemma2", "gpt_oss")  # which has no soft caps and no sinks


def twins(family: str) -> tuple[Any, Any]:
    """The same random weights on transformers' own attention, and on ours."""
    torch.manual_seed(3)
    model = (CAUSAL | OTHERS)[family]().eval()
    for name, x in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(x)
    ours = copy.deepcopy(model)
    model.set_attn_implementation("eager" if family in NOT_SDPA else "sdpa")
    ours.set_attn_implementation("pydecode")
    return model, ours
