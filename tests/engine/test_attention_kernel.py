import functools
import math
from unittest import mock

import pytest
import torch
from engine_cases import make_engine, run_config
from ranks import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend
from varlen_stand_in import attend, stand_in

from llm.config import ModelConfig, RunConfig
from llm.dist import World
from llm.engine.attention_kernel import OFF_LIMIT, agreed_varlen_trouble, attention_kernel, leave_cudnn, training_kernels, varlen_off, varlen_trouble
from llm.model.attention import sdpa_attention, without_cudnn

CFG = ModelConfig(n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=8, seq_len=16, vocab_size=8)


def enabled() -> list:
    """torch's fused kernels as they may be taken now, in order."""
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)


ALL = enabled()
WITHOUT_CUDNN = [kernel for kernel in ALL if kernel != SDPBackend.CUDNN_ATTENTION]


@pytest.mark.parametrize(("change", "document_mask", "kernels"), [
    ({}, False, ALL),
    ({}, True, WITHOUT_CUDNN),
    ({"sliding_window": 4}, False, WITHOUT_CUDNN),
    ({"sliding_window": 16}, False, ALL),  # as long as a row: no mask
    ({"attention": "eager"}, False, ALL),
])  # fmt: skip
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_the_order_of_kernels_is_torchs_and_rows_with_a_mask_do_without_cudnn(change, document_mask, kernels, capability):
    assert len(WITHOUT_CUDNN) == len(ALL) - 1 >= 3
    with mock.patch("torch.cuda.get_device_capability", lambda device: capability), training_kernels(CFG.model_copy(update=change), document_mask):
        assert enabled() == kernels
        with pytest.raises(ValueError), without_cudnn():
            assert enabled() == WITHOUT_CUDNN
            raise ValueError
        assert enabled() == kernels
    assert enabled() == ALL


@pytest.mark.parametrize(("device", "change", "choice", "leaves"), [
    ("cuda:0", {}, SDPBackend.CUDNN_ATTENTION, True),
    ("cuda:0", {}, SDPBackend.FLASH_ATTENTION, False),
    ("cuda:0", {"attention": "eager"}, SDPBackend.CUDNN_ATTENTION, False),
    ("cpu", {}, SDPBackend.CUDNN_ATTENTION, False),
])  # fmt: skip
def test_cudnn_is_left_where_it_is_in_use_for_as_long_as_training_lasts(monkeypatch, device, change, choice, leaves):
    cfg = run_config(World(), {})
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=change)})
    fused_choice = mock.Mock(side_effect=[choice.value, SDPBackend.FLASH_ATTENTION.value])
    monkeypatch.setattr(torch, "_fused_sdp_choice", fused_choice)
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: torch.zeros(*shape))
    with training_kernels(cfg.model, False):
        assert leave_cudnn(cfg, device) == leaves
        assert enabled() == (WITHOUT_CUDNN if leaves else ALL)
        assert not leave_cudnn(cfg, device)
    assert enabled() == ALL


def test_code_that_was_compiled_is_compiled_anew_when_cudnn_is_left():
    cfg, graphs = run_config(World(), {}), CompileCounterWithBackend("eager")
    double = torch.compile(lambda x: 2 * x, backend=graphs)
    with training_kernels(cfg.model, False), mock.patch("llm.engine.attention_kernel._chosen_kernel", lambda *_, **__: SDPBackend.CUDNN_ATTENTION):
        double(torch.ones(3))
        assert graphs.frame_count == 1 and leave_cudnn(cfg, "cuda:0")
        double(torch.ones(3))
    assert graphs.frame_count == 2


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


@pytest.mark.parametrize(("no_varlen", "told"), [
    (None, "varlen_attn, flash kernel, each document by itself"),
    ("", "sdpa, flash kernel, masked"),
    ("it is off by nan here", "sdpa, flash kernel, masked (not varlen_attn: it is off by nan here)"),
])  # fmt: skip
def test_it_is_told_whether_documents_take_a_mask_and_why(no_varlen, told):
    assert attention_kernel(CFG, "bf16", "cpu", True, no_varlen) == told
    assert attention_kernel(CFG, "bf16", "cpu", False, no_varlen) == "sdpa, flash kernel"
    assert attention_kernel(CFG.model_copy(update={"attention": "eager"}), "bf16", "cpu", True, no_varlen) == "plain products (eager)"


@pytest.mark.parametrize("change", [{}, {"sliding_window": 4}, {"n_kv_heads": 4}], ids=str)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_trial_passes_what_does_as_a_mask_would(change, is_compiled):
    before, graphs = torch.get_rng_state(), CompileCounterWithBackend("aot_eager")
    with stand_in(dtype=torch.bfloat16), mock.patch("torch.compile", functools.partial(torch.compile, backend=graphs)):
        assert 0 < varlen_off(CFG.model_copy(update=change), "cpu", is_compiled) < OFF_LIMIT / 2
    assert graphs.frame_count == is_compiled
    assert torch.equal(torch.get_rng_state(), before)  # it goes into checkpoints


WRONG = {
    "all of the batch": lambda q, k, v, starts, *_, **how: attend(q, k, v, *2 * [starts[[0, -1]]], *2 * [len(q)], -1, True),
    "all of the row": lambda q, k, v, starts, _, T, *__, **how: attend(q, k, v, *2 * [torch.arange(0, len(q) + 1, T).int()], T, T, -1, True),
    "a key more": lambda *qkv, window_size, enable_gqa: attend(*qkv, window_size[0] + 1, True),
    "a key less": lambda *qkv, window_size, enable_gqa: attend(*qkv, window_size[0] - 1, True),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_trial_notices_a_kernel_that_sees_other_keys(wrong):
    change = {"sliding_window": 4} if "key" in wrong else {}
    with stand_in(dtype=torch.bfloat16), mock.patch("torch.nn.attention.varlen.varlen_attn", WRONG[wrong]):
        assert varlen_off(CFG.model_copy(update=change), "cpu", False) > 2 * OFF_LIMIT


def test_the_trial_notices_a_wrong_gradient():
    with stand_in(dtype=torch.bfloat16), mock.patch("varlen_stand_in.backward_operation", lambda gradient, q, k, v, *_: (q, k, v)):
        assert varlen_off(CFG, "cpu", False) > 2 * OFF_LIMIT


@pytest.mark.parametrize(("change", "precision", "device", "trouble"), [
    ({}, "bf16", "cpu", ""),
    ({"attention": "eager"}, "bf16", "cuda:0", ""),
    ({}, "fp32", "cuda:0", "it takes bf16, and engine.precision is fp32"),
    ({"sliding_window": 4}, "bf16", "cuda:0", f"in torch {torch.__version__} it has no sliding window"),
])  # fmt: skip
def test_what_needs_no_trial(change, precision, device, trouble):
    with stand_in("2.10"), mock.patch("llm.engine.attention_kernel.varlen_off", side_effect=AssertionError):
        assert varlen_trouble(CFG.model_copy(update=change), precision, device) == trouble


@pytest.mark.parametrize(("off", "trouble"), [
    (0.01, None),
    (0.5, "it is off by 5.0e-01 here"),
    (math.nan, "it is off by nan here"),
    (NotImplementedError("no kernel image\nfor this device"), "NotImplementedError: no kernel image"),
    (ImportError("cannot import name 'varlen_attn'"), "ImportError: cannot import name 'varlen_attn'"),
])  # fmt: skip
def test_what_comes_of_a_trial(off, trouble):
    with mock.patch("llm.engine.attention_kernel.varlen_off", side_effect=[off]):
        assert varlen_trouble(CFG, "bf16", "cuda:0") == trouble


@pytest.mark.skipif(torch.cuda.is_available(), reason="there would be a GPU")
def test_a_trial_that_cannot_even_begin_is_no_crash():
    assert "CUDA" in varlen_trouble(CFG, "bf16", "cuda:0") or "NVIDIA" in varlen_trouble(CFG, "bf16", "cuda:0")


def masked(world: World, engine: dict) -> RunConfig:
    cfg = run_config(world, engine)
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"document_mask": True})})


def test_a_compiled_block_under_zero_3_takes_a_mask_since_the_mark_on_its_tensor_is_lost():
    with mock.patch("llm.engine.attention_kernel.varlen_trouble", return_value=None):
        cases = [masked(World(), {"zero_stage": stage, "compile": is_compiled}) for stage, is_compiled in ((2, True), (3, False), (3, True))]
        told = [agreed_varlen_trouble(cfg, World()) for cfg in cases]
    assert told == [None, None, "under ZeRO-3 each number of documents would be compiled for"]


def told_by_engines(world, troubles: list) -> list:
    with mock.patch("llm.engine.attention_kernel.varlen_trouble", return_value=troubles[world.rank]):
        return [make_engine(how(world, {"zero_stage": 0}), world)[0].no_varlen for how in (masked, run_config)]


@pytest.mark.parametrize(("troubles", "agreed"), [([None, None], None), ([None, "rank 1's"], "rank 1's"), (["rank 0's", "rank 1's"], "rank 0's")])
def test_all_ranks_do_without_a_mask_or_none(tmp_path, troubles, agreed):
    assert run_ranks(told_by_engines, 2, tmp_path, troubles) == [[agreed, ""]] * 2
