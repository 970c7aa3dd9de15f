"""Weights in oneDNN's layout compute what they computed before."""

import pytest
import torch
from hardware import PACKS_BF16, needs_fast_bf16
from torch import nn

from llm.config import ModelConfig
from llm.model.init import build_model
from llm.model.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_fast_bf16)])
@torch.inference_mode()
def test_a_packed_model_gives_the_logits_of_the_plain_one(dtype):
    size = dict(n_layers=2, d_model=48, n_heads=4, d_ff=72, seq_len=32, vocab_size=200)
    cfg = ModelConfig(**size, logit_softcap=20.0, bias=True, tie_embeddings=True, init_std=0.3)
    model, tokens = build_model(cfg, 1).eval(), torch.arange(64).view(2, 32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = (weight + 0.1).to(dtype)  # biases matter too
    before, loss = [model(tokens[:, :length]) for length in (1, 7, 32)], model(tokens, tokens)
    pack(model)
    assert [module for module in model.modules() if isinstance(module, nn.Linear)] == [model.head]
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 9
    assert (model.dtype, model.device.type) == (dtype, "cpu")
    for length, logits in zip((1, 7, 32), before, strict=True):
        torch.testing.assert_close(model(tokens[:, :length]), logits, atol=1e-4 if dtype == torch.float32 else 0.25, rtol=1e-2)
    torch.testing.assert_close(model(tokens, tokens), loss, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


@pytest.mark.skipif(PACKS_BF16, reason="this CPU packs bf16")
@torch.inference_mode()
def test_weights_that_this_cpu_cannot_pack_stay_as_they_are():
    cfg = ModelConfig(n_layers=1, d_model=48, n_heads=4, d_ff=72, seq_len=32, vocab_size=200)
    model = build_model(cfg, 1).eval().to(torch.bfloat16)
    tokens = torch.arange(32)[None]
    before = model(tokens)
    pack(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(model(tokens), before)
