"""Two decoders written out in plain PyTorch, from the papers, sharing no code with llm.model: what the real one must agree with."""

import math

import torch
import torch.nn.functional as F

TINY = {"n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 40, "vocab_size": 50, "seq_len": 12}
LLAMA = TINY | {"n_kv_heads": 2, "norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": True, "tie_embeddings": False}
GPT2 = TINY | {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": True}


def llama_loss(w, tokens, targets):
    """Mean cross-entropy of a Llama with qk-norm, 4 query and 2 kv heads of width 6; `w` maps names to weights."""
    x = w["embed.weight"][tokens]
    for i in range(2):
        x = x + llama_attention(w, f"blocks.{i}.attn", rms(x, w[f"blocks.{i}.attn_norm.weight"]))
        h = rms(x, w[f"blocks.{i}.mlp_norm.weight"])
        gate, up = (h @ half.T for half in w[f"blocks.{i}.mlp.gate_up.weight"].split(40))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"blocks.{i}.mlp.down.weight"].T
    return F.cross_entropy((rms(x, w["norm.weight"]) @ w["head.weight"].T).flatten(0, 1), targets.flatten())


def llama_attention(w, at, h):
    wq, wk, wv = w[f"{at}.qkv.weight"].split([24, 12, 12])
    heads = []
    for head in range(4):
        group = head // 2
        q = spin(rms(h @ wq[6 * head : 6 * head + 6].T, w[f"{at}.q_norm.weight"]))
        k = spin(rms(h @ wk[6 * group : 6 * group + 6].T, w[f"{at}.k_norm.weight"]))
        heads.append(look(q, k, h @ wv[6 * group : 6 * group + 6].T))
    return torch.cat(heads, -1) @ w[f"{at}.out.weight"].T


def gpt2_loss(w, tokens, targets):
    """Mean cross-entropy of GPT-2 with 4 heads of width 6 and a tied head."""
    x = w["embed.weight"][tokens] + w["positions.weight"][: tokens.shape[1]]
    for i in range(2):
        at = f"blocks.{i}"
        q, k, v = affine(w, f"{at}.attn.qkv", center(w, f"{at}.attn_norm", x)).chunk(3, -1)
        heads = [look(*(part[..., 6 * n : 6 * n + 6] for part in (q, k, v))) for n in range(4)]
        x = x + affine(w, f"{at}.attn.out", torch.cat(heads, -1))
        u = affine(w, f"{at}.mlp.up", center(w, f"{at}.mlp_norm", x))
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + affine(w, f"{at}.mlp.down", gelu)
    return F.cross_entropy((center(w, "norm", x) @ w["embed.weight"].T).flatten(0, 1), targets.flatten())


def look(q, k, v):
    """One head: every token averages the values of those up to itself."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    later = torch.arange(q.shape[-2])[:, None] < torch.arange(q.shape[-2])
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ v


def spin(x):
    """Rotary positions as a product of complex numbers; dimension i is the real part, i + K/2 the imaginary one."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def center(w, at, x):
    x = x - x.mean(-1, keepdim=True)
    return rms(x, w[f"{at}.weight"]) + w[f"{at}.bias"]


def affine(w, at, x):
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]
