"""How many weights and how much arithmetic a config means. No torch: planning must answer at once.

A multiply-add counts as 2, and the backward pass as twice the forward: 6 FLOPs per matmul weight and token.
"""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from llm.config import ModelConfig

# dense bf16 without sparsity, from the makers' data sheets; the first entry counts whose words are all in the device's name
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.5,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "A100": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def matmul_weights(cfg: ModelConfig) -> int:
    """Weights that every token is multiplied with: the blocks and the head, not the embedding tables."""
    qkv = cfg.d_model * (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
    out = cfg.n_heads * cfg.d_head * cfg.d_model
    mlp = cfg.d_model * cfg.d_ff * (3 if cfg.mlp == "swiglu" else 2)
    return cfg.n_layers * (qkv + out + mlp) + cfg.d_model * cfg.vocab_size


def count_params(cfg: ModelConfig) -> int:
    """All weights, tied ones once."""
    norm = cfg.d_model * (2 if cfg.norm == "layernorm" and cfg.bias else 1)
    norms = cfg.n_layers * norm * (1 if cfg.parallel_blocks else 2) + norm
    qk_norms = 2 * cfg.d_head if cfg.qk_norm else 0
    up = cfg.d_ff * (2 if cfg.mlp == "swiglu" else 1)
    biases = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head + up + 2 * cfg.d_model if cfg.bias else 0
    embedding = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model
    positions = cfg.seq_len * cfg.d_model if cfg.positions == "learned" else 0
    head_bias = cfg.vocab_size if cfg.head_bias else 0
    return matmul_weights(cfg) + cfg.n_layers * (qk_norms + biases) + norms + embedding + positions + head_bias


def flops_per_token(cfg: ModelConfig) -> int:
    """Forward and backward FLOPs of one training token; attention only where mask and window let it look, (T + 1)/2 keys on average or less."""
    T, W = cfg.seq_len, min(cfg.sliding_window or cfg.seq_len, cfg.seq_len)
    twice_keys = (W * (W + 1) + (T - W) * 2 * W) // T  # the first W tokens see 1 to W keys, the others W
    return 6 * matmul_weights(cfg) + 6 * cfg.n_layers * cfg.n_heads * cfg.d_head * twice_keys


def palm_flops_per_token(cfg: ModelConfig) -> int:
    """The same with the masked half of attention, as most published MFU figures count. Source: PaLM, appendix B (arXiv 2204.02311)."""
    return 6 * matmul_weights(cfg) + 12 * cfg.n_layers * cfg.n_heads * cfg.d_head * cfg.seq_len


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of the device at best; None when it is not in the table, a CPU for instance."""
    words = device_name.replace("-", " ").split()
    found = (tflops for key, tflops in PEAK_TFLOPS.items() if set(key.split()) <= set(words))
    return next((tflops * 1e12 for tflops in found), None)
