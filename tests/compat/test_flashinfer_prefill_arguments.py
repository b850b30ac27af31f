"""The arguments of FlashInfer's paged prefill wrapper: all of the peer's, served or refused."""

import inspect
from typing import Any

import pytest
import torch
from peer_flashinfer_prefill import random_batch
from test_flashinfer_prefill import DOUBLE, wrapper_for

from pydecode.compat.flashinfer import BatchPrefillWithPagedKVCacheWrapper

NAMES = {
    "__init__": """float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf
        paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend
        jit_args jit_kwargs""",
    "plan": """qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads
        num_kv_heads head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal
        pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale
        rope_theta q_data_type kv_data_type o_data_type non_blocking prefix_len_ptr
        token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens seq_lens_q
        block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv""",
    "run": """q paged_kv_cache args q_scale k_scale v_scale out lse return_lse enable_pdl
        window_left sinks kv_cache_sf skip_softmax_threshold_scale_factor use_fp16_softmax
        uses_spcompress""",
    "forward": """q paged_kv_cache causal pos_encoding_mode use_fp16_qk_reduction k_scale v_scale
        window_left logits_soft_cap sm_scale rope_scale rope_theta""",
}


OWN = {"whole_mask"}


@pytest.mark.parametrize("method", NAMES)
def test_arguments_are_those_of_the_peer(method: str) -> None:
    function = getattr(BatchPrefillWithPagedKVCacheWrapper, method)
    parameters = inspect.signature(function).parameters
    assert [name for name in parameters if name not in OWN][1:] == NAMES[method].split()
    for name in OWN & {*parameters}:
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY


BAD_PLANS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rope": (dict(pos_encoding_mode="ROPE_LLAMA"), NotImplementedError, "pos_encoding_mode"),
    "items": (dict(prefix_len_ptr=torch.ones(2)), NotImplementedError, "prefix_len_ptr"),
    "items2": (dict(token_pos_in_items_ptr=torch.ones(2)), NotImplementedError, "token_pos"),
    "items3": (dict(token_pos_in_items_len=3), NotImplementedError, "token_pos_in_items_len"),
    "items4": (dict(max_item_len_ptr=torch.ones(2)), NotImplementedError, "max_item_len_ptr"),
    "out": (dict(o_data_type="float16"), NotImplementedError, "o_data_type"),
    "nvfp4": (dict(kv_data_type="uint8"), NotImplementedError, "kv_data_type"),
    "rows": (dict(max_token_per_sequence=2), ValueError, "max_token_per_sequence"),
    "keys": (dict(max_sequence_kv=6), ValueError, "max_sequence_kv"),
    "table": (dict(block_tables=torch.zeros(2, 2).int()), ValueError, "block_tables"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_what_plan_refuses(name: str) -> None:
    bad, error, message = BAD_PLANS[name]
    with pytest.raises(error, match=message):
        wrapper_for(random_batch([3, 2], [9, 4]), **bad)


BAD_RUNS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale_factors": (dict(kv_cache_sf=torch.ones(1)), NotImplementedError, "kv_cache_sf"),
    "skip": (dict(skip_softmax_threshold_scale_factor=1.0), NotImplementedError, "skip_softmax"),
    "fp16": (dict(use_fp16_softmax=True), NotImplementedError, "use_fp16_softmax"),
    "sparse": (dict(uses_spcompress=True), NotImplementedError, "uses_spcompress"),
    "rows": (dict(q=torch.zeros(4, 2, 8, dtype=DOUBLE)), ValueError, r"qo_indptr\[-1\] = 5"),
    "heads": (dict(q=torch.zeros(5, 3, 8, dtype=DOUBLE)), ValueError, "planned"),
    "dtype": (dict(q=torch.zeros(5, 2, 8)), ValueError, "planned"),
    "page": (dict(paged_kv_cache=torch.zeros(9, 2, 4, 1, 8, dtype=DOUBLE)), ValueError, "planned"),
    "parts": (dict(paged_kv_cache=torch.zeros(9, 4, 1, 8)), ValueError, "paged_kv_cache"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_what_run_refuses(name: str) -> None:
    bad, error, message = BAD_RUNS[name]
    batch = random_batch([3, 2], [9, 4])
    call: dict[str, Any] = dict(q=batch.q, paged_kv_cache=(batch.k, batch.v), enable_pdl=True)
    wrapper = wrapper_for(batch)
    wrapper.run(**call)
    with pytest.raises(error, match=message):
        wrapper.run(**call | bad)
    with pytest.raises(NotImplementedError, match="args"):
        wrapper.run(batch.q, (batch.k, batch.v), torch.ones(1))


def test_what_the_constructor_refuses() -> None:
    make = BatchPrefillWithPagedKVCacheWrapper
    with pytest.raises(ValueError, match="kv_layout"):
        make(torch.empty(0), "HDN")
    with pytest.raises(NotImplementedError, match="jit_args"):
        make(torch.empty(0), jit_args=[1])
    with pytest.raises(NotImplementedError, match="backend"):
        make(torch.empty(0), backend="cudnn")
    with pytest.raises(ValueError, match="qo_indptr_buf"):
        make(torch.empty(0), use_cuda_graph=True)
    with pytest.raises(RuntimeError, match="plan"):
        make(torch.empty(0)).run(torch.zeros(1, 1, 1), torch.zeros(1, 2, 1, 1, 1))
    batch = random_batch([3, 2], [9, 4])._replace(last_page_len=torch.ones(3).int())
    with pytest.raises(ValueError, match="paged_kv_last_page_len"):
        wrapper_for(batch)
