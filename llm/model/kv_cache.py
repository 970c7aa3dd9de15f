"""Keys and values of the tokens that generation has already been through."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llm.config import ModelConfig


class KVCache:
    """k and v of every layer, [n_layers, B, G, S, K] each, allocated once; the first `length` of S positions are filled."""

    def __init__(self, cfg: ModelConfig, rows: int, device: torch.device | str, dtype: torch.dtype, room: int):
        """`room`: S. On a CPU in fp32 whatever `dtype` is: in bf16 attention of one query takes 4 to 7 times as long there (torch 2.13)."""
        dtype = torch.float32 if torch.device(device).type == "cpu" else dtype
        shape = (cfg.n_layers, rows, cfg.n_kv_heads, room, cfg.d_head)
        self.k_LBGSK = torch.empty(shape, device=device, dtype=dtype)
        self.v_LBGSK = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def layer(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function that appends this layer's new k and v, [B, G, T, K], and returns all so far, [B, G, length + T, K]."""
        return partial(self._append, layer)

    def _append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k_BGTK.shape[2]
        assert end <= self.k_LBGSK.shape[3], (end, self.k_LBGSK.shape)
        self.k_LBGSK[layer, :, :, self.length : end] = k_BGTK
        self.v_LBGSK[layer, :, :, self.length : end] = v_BGTK
        return self.k_LBGSK[layer, :, :, :end], self.v_LBGSK[layer, :, :, :end]
