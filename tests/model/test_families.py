"""What the families pick from the one decoder: each preset's size, and the parts that GPT-2 and Llama 2 do not have."""

import pytest
import torch
from plain_gpt import GPT2, LLAMA
from test_flops import params_on_meta
from test_transformer import lively_model, some_tokens

from llm.config import ConfigError, ModelConfig, check_config, load_config
from llm.model.flops import count_params, flops_per_token
from llm.model.init import build_model
from llm.model.kv_cache import KVCache

PHI = GPT2 | {"positions": "rope", "parallel_blocks": True, "head_bias": True, "rotary_fraction": 0.4, "d_head": 10, "tie_embeddings": False}
WINDOW = LLAMA | {"sliding_window": 4}


@pytest.mark.parametrize(("name", "published"), [
    ("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("tinyllama-1.1b", 1_100_048_384),
    ("mistral-7b", 7_241_732_096), ("phi-1_5", 1_418_270_720), ("phi-2", 2_779_683_840), ("qwen3-0.6b", 596_049_920),
])  # fmt: skip
def test_a_preset_has_the_published_number_of_parameters(name, published):
    cfg = load_config(preset=name).model
    assert (count_params(cfg), params_on_meta(cfg)) == (published, published)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_a_window_no_token_sees_further_back(attention):
    model, tokens = lively_model(WINDOW | {"n_layers": 1}, attention=attention), some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 50
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [3, 4, 5, 6]  # itself and the three after it


@pytest.mark.parametrize("style", [WINDOW, PHI, LLAMA | {"logit_softcap": 2.0}], ids=["window", "phi", "softcap"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(style, attention):
    model, tokens = lively_model(style, attention=attention), some_tokens(2, 12)
    cache = KVCache(model.cfg, 2, "cpu", torch.float32, model.cfg.seq_len)
    pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


def test_a_window_costs_the_keys_that_it_leaves():
    cfg = ModelConfig(**WINDOW)
    seen = sum(min(t + 1, 4) for t in range(12))
    full = flops_per_token(ModelConfig(**LLAMA))
    per_key = 12 * cfg.n_layers * cfg.n_heads * cfg.d_head
    assert full - flops_per_token(cfg) == per_key * (78 - seen) // 12  # 12 x 13 / 2 keys without a window


def test_only_the_first_dimensions_of_a_head_are_turned():
    from llm.model.layers import rotate

    x, angle = torch.randn(1, 3, 2, 10), torch.full((3, 1, 2), 0.5)
    turned = rotate(x, angle.cos(), angle.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4].norm(dim=-1), x[..., :4].norm(dim=-1))
    assert (turned[..., :4] != x[..., :4]).all()


def test_logits_stay_within_the_soft_cap_and_small_ones_are_as_they_were():
    capped, free = (build_model(ModelConfig(**LLAMA | {"init_std": 2.0} | change), 1) for change in ({"logit_softcap": 3.0}, {}))
    tokens = some_tokens(2, 12)
    torch.testing.assert_close(capped(tokens), 3 * torch.tanh(free(tokens) / 3))
    assert free(tokens).abs().max() > 3 >= capped(tokens).abs().max()


def test_validation_is_without_z_loss():
    model, plain = (build_model(ModelConfig(**LLAMA | change), 1) for change in ({"z_loss": 0.5}, {}))
    tokens = some_tokens(2, 12)
    assert model(tokens, tokens) > plain(tokens, tokens) + 1
    assert torch.equal(model.eval()(tokens, tokens), plain(tokens, tokens))


@pytest.mark.parametrize(("change", "complaint"), [
    ({"rotary_fraction": 0.5, "d_head": 6}, "model.rotary_fraction is 0.5: of d_head 6 it leaves 3 dimensions"),
    ({"rope_scaling": "llama3"}, "model.rope_original_seq_len: rope_scaling llama3 needs"),
    ({"rotary_fraction": 1.5}, "model.rotary_fraction is 1.5, but should be less than or equal to 1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change, complaint):
    tree = {"model": LLAMA | change, "tokenizer": {"tokenizer_path": "t"}, "data": {"data_path": "d"}, "train": {"lr": 1, "batch_size": 1}}
    with pytest.raises(ConfigError, match=complaint):
        check_config(tree, "test")
