"""All initial weights in one place. A weight depends on its name, shape and the seed alone, not on the order of creation or the device."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

import hashlib
import math

import torch

from llm.config import ModelConfig
from llm.model.transformer import Transformer

INTO_RESIDUAL = ("attn.out.weight", "mlp.down.weight")


def build_model(cfg: ModelConfig, seed: int) -> Transformer:
    """A Transformer on the CPU, in fp32, freshly initialised."""
    model = Transformer(cfg)
    init_weights(model, seed)
    return model


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Norms at one, biases at zero, all else normal(0, init_std); what writes to the residual stream 1/sqrt(2 n_layers) of that.

    Source: GPT-2 (Radford et al. 2019, section 2.3).
    """
    std, residual_std = model.cfg.init_std, model.cfg.init_std / math.sqrt(2 * model.cfg.n_layers)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            weight.copy_(_normal(name, seed, weight.shape) * (residual_std if name.endswith(INTO_RESIDUAL) else std))


def _normal(name: str, seed: int, shape: torch.Size) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits
    return torch.randn(shape, generator=generator)
