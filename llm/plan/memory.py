"""Bytes that one rank holds at the fullest moment of a step, by kind, from the config alone.

Written down from what autograd saves (torch 2.13) and what DeepSpeed 0.19.8 allocates, and held against counts in the process by
tests/plan/test_memory.py. n is the number of ranks, N of parameters; all weights, gradients and moments are fp32: 4 bytes.
"""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

import json
from dataclasses import dataclass, fields
from functools import cache

from llm.config import EngineConfig, ModelConfig, RunConfig, shipped
from llm.model.chunks import BUCKET_ELEMENTS, CPU_CHUNK, CPU_SLICE, EAGER_QUERIES, GPU_CHUNK, GPU_SLICE
from llm.model.flops import count_params, matmul_weights

Z3_REUSE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance: what is needed again within so many stays gathered


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. Their sum is the most at any time, or a little more with a single micro-batch a step: gradients then
    come as activations go."""

    weights: int
    masters: int
    """The fp32 copies that ZeRO's optimizer moves; under plain torch the weights themselves are moved."""
    gradients: int
    moments: int
    activations: int
    """What autograd keeps from forward to backward, the bf16 copies of the weights among it."""
    buffers: int
    """Communication buckets, gathered weights, and for a moment the more of what the head with its loss needs, logits among it, and a block."""
    host: int = 0
    """In host memory: the optimizer's state when it is offloaded, and the copy that an asynchronous save takes."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def memory_of(cfg: RunConfig, ranks: int, device: str) -> Memory:
    """Of a run with train.batch_size rows a micro-batch on each of `ranks`. `device`: cpu or cuda, whose kernels save different things."""
    model, engine = cfg.model, cfg.engine
    stage, params = engine.zero_stage, count_params(model)
    tokens = cfg.train.batch_size * model.seq_len
    whole, share = 4 * params, 4 * -(-params // ranks)
    moments, masters = (2 * share, share) if stage else (2 * whole, 0)
    gradients = whole if stage < 2 else share
    kept, head_gradient = kept_bytes(cfg, device), 4 * model.vocab_size * model.d_model
    fullest = (
        _head_workspace(cfg, tokens, device) + _cached_copies(cfg) - _head_gradients(model, tokens),
        _block_workspace(model, engine, tokens, device) + _reduction(cfg, ranks, share, device),
        (share + 2 * head_gradient if stage else 0) - kept,  # AdamW, and its norm in fp64, when all else is gone
    )
    held = _standing_buffers(cfg, ranks, params, device) + (4 * model.seq_len * model.d_rotary if model.positions == "rope" else 0)
    host = share * (3 if cfg.checkpoint.async_save else 0)
    if engine.offload:
        host, masters, moments, gradients = host + masters + moments + share, 0, 0, 0
    return Memory(
        weights=share if stage == 3 else whole,
        masters=masters,
        gradients=gradients,
        moments=moments,
        activations=kept,
        buffers=held + max(fullest),
        host=host,
    )


# ---------------------------------------------------------------- activations


def kept_bytes(cfg: RunConfig, device: str) -> int:
    """What autograd keeps of one micro-batch's forward pass, bf16 copies of the weights included. The head keeps its gradients."""
    m, engine = cfg.model, cfg.engine
    tokens = cfg.train.batch_size * m.seq_len
    outside = tokens * (_norm_bytes(m, engine, device) + 8) + _head_gradients(m, tokens)  # the last norm, ids
    again = len(engine.recomputed_blocks(m.n_layers))  # keep their input alone
    block = tokens * block_bytes(m, engine, device) + _mask_bytes(cfg) + _copy_bytes(engine) * _block_weights(m)
    return again * tokens * 4 * m.d_model + (m.n_layers - again) * block + outside


def _head_gradients(m: ModelConfig, tokens: int) -> int:
    """Of its weight and of the hidden states: ready when the forward pass ends."""
    return 4 * m.d_model * (m.vocab_size + tokens)


def _block_weights(m: ModelConfig) -> int:
    """Of the maps of one block."""
    return (matmul_weights(m) - m.vocab_size * m.d_model) // m.n_layers


def _keys(m: ModelConfig) -> int:
    """That a query of eager attention looks at, on average: a part of queries ends where its keys do."""
    ends = range(EAGER_QUERIES, m.seq_len + EAGER_QUERIES, EAGER_QUERIES)
    return sum((min(end, m.seq_len) - end + EAGER_QUERIES) * min(end, m.seq_len) for end in ends) // m.seq_len


def block_bytes(m: ModelConfig, engine: EngineConfig, device: str) -> int:
    """What autograd keeps of one block for one token, masks left out."""
    c, fused = _compute_bytes(engine), engine.compile
    q, kv = m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    norms = (1 if m.parallel_blocks else 2) * _norm_bytes(m, engine, device)
    normed = m.d_model * _normed_bytes(m, engine)
    mlp = m.d_ff * c * (2 if m.mlp == "gelu" else 3 if fused else 4)
    turned = m.positions == "rope" or m.qk_norm
    if m.attention == "eager":
        attention = 5 * c * q + c * m.n_heads * _keys(m) + (c * (q + 2 * kv) if m.qk_norm and (device == "cuda" or c == 4) else 0)
    else:  # v is a view of qkv, so all of it stays; q and k are other tensors once they were turned or normalised
        attention = c * (q + 2 * kv) + (c * (q + kv) if turned else 0) + c * q + 4 * m.n_heads
    if m.qk_norm and device == "cpu" and not fused:
        attention += (12 - 2 * c) * (q + kv)  # torch's CPU form of the norm keeps its steps, in fp32
    return norms + normed + mlp + attention


def _normed_bytes(m: ModelConfig, engine: EngineConfig) -> int:
    """For each element of the width, what qkv and the MLP keep of what they multiply: each its own cast to bf16. DeepSpeed's linear map for ZeRO-3
    keeps the uncast input, which parallel branches share, and compiled makes it again."""
    if engine.zero_stage == 3 and engine.compile:
        return _compute_bytes(engine)
    uncast = engine.zero_stage == 3 or engine.precision == "fp32"
    return (1 if m.parallel_blocks else 2) * 4 if uncast else 4


def _copy_bytes(engine: EngineConfig) -> int:
    """Of a weight, for its copy in bf16 that the backward pass reads; under ZeRO-3 it reads the gathered weight."""
    return 2 if engine.precision == "bf16" and engine.zero_stage < 3 else 0


def _norm_bytes(m: ModelConfig, engine: EngineConfig, device: str) -> int:
    """Of one norm and token: its fp32 input, and statistics. torch's CPU form of the RMSNorm also keeps the input once scaled."""
    scaled = 4 * m.d_model if m.norm == "rmsnorm" and device == "cpu" and not engine.compile else 0
    return 4 * m.d_model + scaled + 8


def _mask_bytes(cfg: RunConfig) -> int:
    """Of one block and micro-batch: eager attention keeps no mask, SDPA one of numbers where it needs one."""
    m, rows = cfg.model, cfg.train.batch_size if cfg.data.document_mask else 1
    needed = m.attention != "eager" and (cfg.data.document_mask or (m.sliding_window or m.seq_len) < m.seq_len)
    return rows * m.seq_len**2 * _compute_bytes(cfg.engine) if needed else 0


def _compute_bytes(engine: EngineConfig) -> int:
    return {"bf16": 2, "fp32": 4}[engine.precision]  # resolved: llm.plan.hardware


# ---------------------------------------------------------------- for a moment


def _head_workspace(cfg: RunConfig, tokens: int, device: str) -> int:
    """Of the last chunk of logits: itself, hidden states and their gradients, and the weight's gradient, its bf16 copy and either the chunk's
    part of that gradient or what the loss takes: fp32 slices, or, compiled, the chunk's gradient beside it."""
    m, c = cfg.model, _compute_bytes(cfg.engine)
    most, of_slice = (CPU_CHUNK, CPU_SLICE) if device == "cpu" else (GPU_CHUNK, GPU_SLICE)
    weight, hidden = m.vocab_size * m.d_model, tokens * m.d_model
    n_chunks = -(-tokens * m.vocab_size // most)
    chunk, sums = tokens * m.vocab_size // n_chunks, 4 * weight * (n_chunks > 1)
    loss = c * chunk if cfg.engine.compile else 4 * min(chunk, of_slice) * (4 if m.logit_softcap else 2)
    return c * chunk + (4 + 2 * c) * hidden + 2 * weight + max(6 * weight, sums + loss)


def _cached_copies(cfg: RunConfig) -> int:
    """Nothing but autocast's cache holds the bf16 weights of blocks that are computed again, to the end of the forward pass; compiled ones
    bypass it."""
    engine, m = cfg.engine, cfg.model
    return 0 if engine.compile else len(engine.recomputed_blocks(m.n_layers)) * _copy_bytes(engine) * _block_weights(m)


def _block_workspace(m: ModelConfig, engine: EngineConfig, tokens: int, device: str) -> int:
    """What the backward pass of the last block adds: gradients of its widest tensors, and its own activations where it computes them again. Another
    block that does so finds room: the last has gone by then."""
    c, block = _compute_bytes(engine), block_bytes(m, engine, device)
    in_mlp, in_softmax = block + 5 * c * m.d_ff, (4 + 2 * c) * m.n_heads * min(EAGER_QUERIES, m.seq_len) if m.attention == "eager" else 0
    again = m.n_layers - 1 in engine.recomputed_blocks(m.n_layers)
    own = _copy_bytes(engine) * _block_weights(m) if again else -tokens * block  # they are among what is kept
    return tokens * (max(in_mlp, in_softmax) + 12 * m.d_model) + own


# ---------------------------------------------------------------- ranks


def _standing_buffers(cfg: RunConfig, ranks: int, params: int, device: str) -> int:
    """What stays allocated from one micro-batch to the next."""
    gathered = 4 * _gathered_elements(cfg.model, params) if ranks > 1 else 0
    return {0: 0, 1: _buckets(params, ranks, device), 2: 0, 3: 4 * min(BUCKET_ELEMENTS, params) + gathered}[cfg.engine.zero_stage]


def _gathered_elements(m: ModelConfig, params: int) -> int:
    """Weights that ZeRO-3 has whole on each rank when the forward pass ends: what is small, and what the backward pass needs soon."""
    return min(params, Z3_REUSE_ELEMENTS // 2 + _prefetched_elements() + _block_weights(m))


@cache
def _prefetched_elements() -> int:
    return json.loads((shipped("ds_configs") / "zero3.json").read_text())["zero_optimization"]["stage3_prefetch_bucket_size"]


def _reduction(cfg: RunConfig, ranks: int, share: int, device: str) -> int:
    """What reducing gradients takes in the backward pass beside what stays: buckets, their copies, and ZeRO-2's second set of its own part."""
    params = count_params(cfg.model)
    bucket, copies = 4 * min(BUCKET_ELEMENTS, params), 2 if ranks > 1 else 1
    return {0: 0, 1: 0, 2: share + _buckets(params, ranks, device) + (copies - 1) * bucket, 3: copies * bucket}[cfg.engine.zero_stage]


def _buckets(params: int, ranks: int, device: str) -> int:
    """ZeRO-1 and 2 fill one bucket while the other travels, where that overlaps (llm/engine/ds_config.py)."""
    return 4 * min(BUCKET_ELEMENTS, params) * (2 if ranks > 1 and device == "cuda" else 1)
