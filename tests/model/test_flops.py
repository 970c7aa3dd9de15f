import pytest
import torch
from plain_gpt import GPT2, LLAMA

from llm.config import ModelConfig
from llm.model.flops import count_params, flops_per_token, palm_flops_per_token, peak_flops
from llm.model.transformer import Transformer

REFERENCE = ModelConfig(n_layers=22, d_model=2048, n_heads=16, n_kv_heads=8, d_ff=5632, vocab_size=32768, seq_len=2048, qk_norm=True)


def params_on_meta(cfg: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(w.numel() for w in Transformer(cfg).parameters())


def test_the_reference_model_has_the_size_and_cost_of_the_notes():
    assert round(count_params(REFERENCE) / 1e9, 3) == 1.172
    assert round(flops_per_token(REFERENCE) / 1e9, 3) == 7.185
    assert round(palm_flops_per_token(REFERENCE) / 1e9, 3) == 7.738


def test_gpt2_has_its_124_million():
    cfg = ModelConfig(n_layers=12, d_model=768, n_heads=12, d_ff=3072, vocab_size=50257, seq_len=1024, norm="layernorm",
                      positions="learned", mlp="gelu", bias=True, tie_embeddings=True)  # fmt: skip
    assert count_params(cfg) == 124_439_808  # the published checkpoint


CHANGES = [{}, {"bias": True}, {"tie_embeddings": True}, {"tie_embeddings": False}, {"d_head": 10}, {"qk_norm": False},
           {"head_bias": True, "parallel_blocks": True}]  # fmt: skip
STYLES = {"llama": LLAMA, "gpt2": GPT2, "mixed": LLAMA | {"norm": "layernorm"}, "reference": REFERENCE.model_dump()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_counted_params_are_those_of_the_module(style, change):
    cfg = ModelConfig(**style | change)
    assert count_params(cfg) == params_on_meta(cfg)


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    cfg = ModelConfig(**LLAMA | {"attention": "eager"})  # eager computes the masked half too, as PaLM counts
    tokens = torch.zeros(1, cfg.seq_len, dtype=torch.int64)
    with torch.device("cpu"), FlopCounterMode(display=False) as counter:
        Transformer(cfg)(tokens, tokens).backward()
    assert counter.get_total_flops() == palm_flops_per_token(cfg) * cfg.seq_len


@pytest.mark.parametrize(("name", "teraflops"), [
    ("NVIDIA H200", 989.5), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GH200 480GB", 989.5),
])  # fmt: skip
def test_known_devices_have_their_dense_peak(name, teraflops):
    assert peak_flops(name) == pytest.approx(teraflops * 1e12)


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H20") is None
    assert peak_flops("AMD EPYC 9B45") is None
