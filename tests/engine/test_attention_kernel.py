from unittest import mock

import pytest
import torch

from llm.config import ModelConfig
from llm.engine.attention_kernel import HOPPER_ORDER, attention_kernel, kernels_in_order
from llm.model.attention import sdpa_attention

CFG = ModelConfig(n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=8, seq_len=16, vocab_size=8)


@pytest.mark.parametrize(("capability", "is_changed"), [((9, 0), True), ((8, 0), False)])
def test_cudnn_is_asked_first_on_hopper_only_and_afterwards_all_is_as_before(capability, is_changed):
    before = torch._C._get_sdp_priority_order()
    with mock.patch("torch.cuda.get_device_capability", lambda device: capability), kernels_in_order("cuda:0"):
        order = torch._C._get_sdp_priority_order()
    assert (order[0] == HOPPER_ORDER[0].value) == is_changed == (order != before)
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize(("change", "is_masked", "told"), [
    ({}, False, "sdpa, flash kernel"),
    ({}, True, "sdpa, flash kernel, masked"),
    ({"sliding_window": 4}, False, "sdpa, flash kernel, masked"),
    ({"attention": "eager"}, False, "plain products (eager)"),
])  # fmt: skip
def test_the_kernel_that_runs_is_told(change, is_masked, told):
    assert attention_kernel(CFG.model_copy(update=change), "bf16", "cpu", is_masked) == told


def test_and_it_is_the_one_that_runs():
    q, k = torch.ones(1, 4, 16, 8, requires_grad=True), torch.ones(1, 2, 16, 8)
    with torch.profiler.profile() as profile:
        sdpa_attention(q, k, k)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in profile.key_averages()}
