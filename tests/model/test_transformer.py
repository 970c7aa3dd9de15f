import pytest
import torch
from plain_gpt import GPT2, LLAMA, gpt2_loss, llama_loss

from llm.config import ModelConfig
from llm.model import attention
from llm.model.init import build_model
from llm.model.kv_cache import KVCache
from llm.model.transformer import Transformer

STYLES = pytest.mark.parametrize("style", [LLAMA, GPT2], ids=["llama", "gpt2"])


def lively_model(style: dict, seed: int = 1, **changes) -> Transformer:
    """A model whose every weight matters: norms not one, biases not zero, attention not flat."""
    model = build_model(ModelConfig(**style | {"init_std": 0.3} | changes), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def some_tokens(*shape, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("style", "plain_loss"), [(LLAMA, llama_loss), (GPT2, gpt2_loss)], ids=["llama", "gpt2"])
def test_loss_and_every_gradient_equal_a_plain_implementation(style, plain_loss):
    model = lively_model(style)
    tokens, targets = some_tokens(3, 12), some_tokens(3, 12, seed=3)
    targets[0, 4:9] = -100
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    expected = plain_loss(weights, tokens, targets)
    loss = model(tokens, targets) / (targets != -100).sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.backward()
    for name, w in model.named_parameters():
        torch.testing.assert_close(w.grad, weights[name].grad, atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@STYLES
def test_sdpa_and_eager_attention_give_the_same_loss_and_gradients(style, monkeypatch):
    monkeypatch.setattr(attention, "EAGER_QUERIES", 5)  # three parts of these rows of 12
    sdpa, eager = lively_model(style, attention="sdpa"), lively_model(style, attention="eager")
    tokens = some_tokens(2, 12)
    losses = [model(tokens, tokens) for model in (sdpa, eager)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for a, b in zip(sdpa.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


@STYLES
def test_no_token_sees_a_later_one(style):
    model, tokens = lively_model(style), some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@STYLES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("steps", [[12], [1] * 12, [5, 1, 4, 2]], ids=["at once", "one by one", "in pieces"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(style, attention, steps):
    model, tokens = lively_model(style, attention=attention), some_tokens(2, 12)
    cache = KVCache(model.cfg, 2, "cpu", torch.float32, model.cfg.seq_len)
    pieces = [model(piece, cache=cache) for piece in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-4, rtol=1e-4)
    assert cache.length == 12


@torch.no_grad()
def test_rotary_attention_depends_on_distance_only():
    model, tokens = lively_model(LLAMA), some_tokens(1, 6)
    cache = KVCache(model.cfg, 1, "cpu", torch.float32, model.cfg.seq_len)
    cache.length = 5
    shifted = model.hidden(tokens, _Forgetful(cache))
    torch.testing.assert_close(shifted, model.hidden(tokens), atol=1e-4, rtol=1e-4)


class _Forgetful:
    """A cache that counts the positions it starts with but does not show what lies there."""

    def __init__(self, cache: KVCache):
        self.cache, self.length = cache, cache.length

    def layer(self, layer: int):
        append, hidden = self.cache.layer(layer), self.cache.length
        return lambda k, v: tuple(x[:, :, hidden:] for x in append(k, v))


@STYLES
def test_bf16_autocast_gives_an_fp32_loss_near_the_fp32_one(style):
    model, tokens = build_model(ModelConfig(**style), 1), some_tokens(2, 12)
    exact = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, tokens)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=5e-3, atol=0)


def test_tied_weights_are_one_parameter():
    tied, untied = (build_model(ModelConfig(**GPT2 | {"tie_embeddings": t}), 1) for t in (True, False))
    names = [name for name, _ in untied.named_parameters()]
    assert [name for name, _ in tied.named_parameters()] == [n for n in names if n != "head.weight"]
    assert tied.head.weight is tied.embed.weight


def test_rope_tables_are_not_saved_and_move_with_the_model():
    model = build_model(ModelConfig(**LLAMA), 1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert model.to("meta").cos.device.type == "meta"
    assert model(torch.empty(2, 12, dtype=torch.int64, device="meta")).shape == (2, 12, 50)


@STYLES
def test_a_block_compiles_without_graph_breaks(style):
    model, tokens = build_model(ModelConfig(**style), 1), some_tokens(2, 12)
    expected = model(tokens, tokens)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(model(tokens, tokens), expected)
