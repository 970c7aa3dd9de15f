"""The yardstick: a training step as a minimal nanoGPT-style script does it, written for this comparison and sharing no code with llm.

One file, mean loss over fp32 logits, AdamW, clipping, autocast, and torch.compile over the whole model. It takes Tally's ModelConfig
for its dimensions, so that both do the same arithmetic: `benchmarks/step.py` runs the two side by side.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def norm(cfg):
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


def apply_rope(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
        self.c_attn = nn.Linear(cfg.d_model, (self.n_head + 2 * self.n_kv_head) * self.head_size, bias=cfg.bias)
        self.c_proj = nn.Linear(self.n_head * self.head_size, cfg.d_model, bias=cfg.bias)
        self.q_norm = nn.RMSNorm(self.head_size, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, rope):
        B, T, _ = x.size()
        kv = self.n_kv_head * self.head_size
        q, k, v = self.c_attn(x).split([self.n_head * self.head_size, kv, kv], dim=2)
        q = self.q_norm(q.view(B, T, self.n_head, self.head_size)).transpose(1, 2)
        k = self.k_norm(k.view(B, T, self.n_kv_head, self.head_size)).transpose(1, 2)
        v = v.view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # qk-norm leaves them in fp32 under autocast
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.swiglu = cfg.mlp == "swiglu"
        self.c_fc = nn.Linear(cfg.d_model, cfg.d_ff, bias=cfg.bias)
        self.c_up = nn.Linear(cfg.d_model, cfg.d_ff, bias=cfg.bias) if self.swiglu else None
        self.c_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=cfg.bias)

    def forward(self, x):
        if self.swiglu:
            return self.c_proj(F.silu(self.c_fc(x)) * self.c_up(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = norm(cfg), CausalSelfAttention(cfg), norm(cfg), MLP(cfg)

    def forward(self, x, rope):
        x = x + self.attn(self.ln_1(x), rope)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.wpe = nn.Embedding(cfg.seq_len, cfg.d_model) if cfg.positions == "learned" else None
        if cfg.positions == "rope":
            angles = torch.outer(torch.arange(cfg.seq_len), cfg.rope_theta ** (-torch.arange(0, cfg.d_head, 2) / cfg.d_head))
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = norm(cfg)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=cfg.init_std / math.sqrt(2 * cfg.n_layers))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets):
        T, rope = idx.size(1), None
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(T, device=idx.device))
        else:
            rope = self.cos[:T], self.sin[:T]
        for block in self.h:
            x = block(x, rope)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1), ignore_index=-100)


class Loop:
    """One optimizer step per call of `step`, with any model that gives a mean loss.

    Its AdamW is fused, also on a CPU, where nanoGPT's own is not: the harder yardstick.
    """

    def __init__(self, cfg, device: str, compiled: bool, model: nn.Module | None = None):
        self.model = (model or GPT(cfg.model)).to(device)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": cfg.train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr, betas=cfg.train.betas, fused=True)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.device, self.clip_norm = device, cfg.train.clip_norm
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.engine.precision == "bf16")

    def step(self, batches) -> torch.Tensor:
        for x, y in batches:
            with self.autocast:
                loss = self.forward(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)) / len(batches)
            loss.backward()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach() * len(batches)
