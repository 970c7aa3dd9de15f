"""The decoder: token ids in, logits or a loss out. GPT-2, Llama, Phi and Qwen differ only in what the config picks."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.attention import Attention, document_mask, positions_in_documents
from llm.model.kv_cache import KVCache
from llm.model.layers import MLP, Embedding, make_norm
from llm.model.loss import Head
from llm.model.rope import rope_tables
from llm.model.varlen import let_vary


class Block(nn.Module):
    """Attention, then MLP, each behind its norm and added to the residual stream; or both behind one norm, in parallel.

    The unit that is compiled and checkpointed.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg)
        self.mlp_norm = None if cfg.parallel_blocks else make_norm(cfg)
        self.mlp = MLP[cfg.mlp](cfg)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, remember: Callable | None = None, mask: Tensor | None = None) -> Tensor:
        normed = self.attn_norm(x)
        if self.mlp_norm is None:
            return x + self.attn(normed, rope, remember, mask) + self.mlp(normed)
        x = x + self.attn(normed, rope, remember, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Weights are whatever lay in memory until init_weights or a checkpoint fills them: use init.build_model."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.vocab_size, "the vocabulary size must be settled: ModelConfig.with_vocab"
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.positions == "learned":
            self.positions = Embedding(cfg.seq_len, cfg.d_model)
        else:
            cos, sin = rope_tables(cfg)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = make_norm(cfg)
        self.head = Head(cfg)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: KVCache | None = None,
        doc_ids_BT: Tensor | None = None, doc_starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """With targets the fp32 sum of cross-entropy (in training with z-loss) over those that are not -100, else logits_BTV.

        With doc_ids, tokens see only those of their own document, and positions begin with it; with `doc_starts` of them as well
        (llm/model/varlen.py), by varlen_attn in place of a mask.
        """
        if doc_starts is not None:
            let_vary(doc_starts)
        hidden_BTD = self.hidden(tokens_BT, cache, doc_ids_BT, doc_starts)
        return self.head(hidden_BTD) if targets_BT is None else self.head(hidden_BTD, targets_BT, self.cfg.z_loss if self.training else 0.0)

    def hidden(
        self, tokens_BT: Tensor, cache: KVCache | None = None, doc_ids_BT: Tensor | None = None, doc_starts: Tensor | None = None
    ) -> Tensor:
        """What the head reads, [B, T, D]. With a cache the tokens follow those it holds, and are added to it."""
        assert cache is None or doc_ids_BT is None, "a cache holds one document"
        start = cache.length if cache else 0
        stop = start + tokens_BT.shape[1]
        assert stop <= self.cfg.seq_len, (stop, self.cfg.seq_len)
        x_BTD, rope, mask, places = self.embed(tokens_BT), None, None, slice(start, stop)
        if doc_ids_BT is not None:
            places, mask = positions_in_documents(doc_ids_BT), document_mask(doc_ids_BT) if doc_starts is None else doc_starts
        if self.cfg.positions == "learned":
            x_BTD = x_BTD + self.positions(torch.arange(self.cfg.seq_len, device=tokens_BT.device)[places])
        else:
            rope = self.cos[places], self.sin[places]
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope, cache.layer(layer) if cache else None, mask)
        if cache:
            cache.length = stop
        return self.norm(x_BTD)
