import math

import torch
from plain_gpt import GPT2, LLAMA

from llm.config import ModelConfig
from llm.model.init import build_model, init_weights
from llm.model.transformer import Transformer


def weights_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def test_a_weight_depends_on_name_and_seed_not_on_the_order_of_creation():
    first = weights_of(build_model(ModelConfig(**LLAMA), 7))
    torch.manual_seed(99)
    torch.randn(1000)
    deeper = weights_of(build_model(ModelConfig(**LLAMA | {"n_layers": 3, "qk_norm": False}), 7))
    for name in ("embed.weight", "blocks.1.attn.qkv.weight", "head.weight"):
        assert torch.equal(first[name], deeper[name]), name
    assert not torch.equal(first["head.weight"], weights_of(build_model(ModelConfig(**LLAMA), 8))["head.weight"])
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])


def test_initialising_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    build_model(ModelConfig(**GPT2), 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_weight_is_filled():
    model = Transformer(ModelConfig(**GPT2))
    with torch.no_grad():
        for w in model.parameters():
            w.fill_(float("nan"))
    init_weights(model, 7)
    assert all(w.isfinite().all() for w in model.parameters())


def test_scales_are_gpt2s():
    cfg = ModelConfig(**GPT2 | {"d_model": 128, "d_ff": 512, "n_layers": 8, "init_std": 0.02})
    weights = weights_of(build_model(cfg, 7))
    for name, w in weights.items():
        if name.endswith("norm.weight"):
            assert (w == 1).all()
        elif name.endswith("bias"):
            assert (w == 0).all()
        else:
            into_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(16) if into_residual else 0.02
            assert abs(w.std() / std - 1) < 0.05, name


def test_an_untrained_model_guesses_evenly():
    tokens = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    for style in (LLAMA, GPT2):
        loss = build_model(ModelConfig(**style), 7)(tokens, tokens.roll(-1, 1)) / tokens.numel()
        assert abs(loss.item() - math.log(50)) < 0.05
