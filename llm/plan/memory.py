"""Bytes that one rank holds at the fullest moment of a step, by kind, from the config alone.

Written down from what autograd saves (torch 2.13) and what DeepSpeed 0.19.8 allocates, and held against counts in the process by
tests/plan/test_measured.py. n is the number of ranks, N of parameters; all weights, gradients and moments are fp32: 4 bytes.
"""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from dataclasses import dataclass, fields

from llm.config import EngineConfig, ModelConfig, RunConfig
from llm.model.flops import count_params, matmul_weights

BUCKET_ELEMENTS = 80_000_000  # llm/engine/ds_config.py, which needs torch; a test holds them together
Z3_REUSE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance: what is needed again within so many stays gathered
Z3_PREFETCH_ELEMENTS = 50_000_000  # ds_configs/zero3.json
LOSS_CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}  # llm/model/loss.py
EAGER_QUERIES = 128  # llm/model/attention.py
LOSS_SLICE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


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
    """What autograd keeps from forward to backward, the bf16 copies of the weights among it, and the gradients that the head hands back."""
    logits: int
    """Of one chunk of rows, for a moment."""
    buffers: int
    """Communication buckets, gathered weights, slices of the loss, and what a block needs for a moment."""
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
    kept, logits = kept_bytes(cfg, device), logits_bytes(cfg, device)
    head = 4 * model.vocab_size * model.d_model  # the product that is added to the weight's gradient, and in bf16 a copy of the weight
    fullest = (
        logits + max(_loss_slices(cfg, tokens, device), head) + _cached_copies(cfg),
        _block_workspace(model, engine, tokens, device) + _reduction(cfg, ranks, share, device),
        (share + 8 * model.vocab_size * model.d_model if stage else 0) - kept,  # AdamW, and its norm in fp64, when all else is gone
    )
    held = _standing_buffers(cfg, ranks, params, device) + 4 * _rope_elements(model)
    host = share * (3 if cfg.checkpoint.async_save else 0)
    if engine.offload:
        host, masters, moments, gradients = host + masters + moments + share, 0, 0, 0
    return Memory(
        weights=share if stage == 3 else whole,
        masters=masters,
        gradients=gradients,
        moments=moments,
        activations=kept,
        logits=logits,
        buffers=held + max(fullest) - logits,
        host=host,
    )


# ---------------------------------------------------------------- activations


def kept_bytes(cfg: RunConfig, device: str) -> int:
    """What autograd keeps of one micro-batch's forward pass, with the bf16 copies of weights, and the gradients of the head's weight and input."""
    m, engine = cfg.model, cfg.engine
    tokens = cfg.train.batch_size * m.seq_len
    outside = _norm_bytes(m, engine, device) + 4 * m.d_model + 8 + 16  # the last norm, the gradient of what the head reads, ids and statistics
    mask, head = 0, m.vocab_size * m.d_model
    if engine.activation_checkpointing:
        block = 4 * m.d_model
        copies = 0
    else:
        block = block_bytes(m, engine, device)
        mask = _mask_bytes(cfg)
        copies = matmul_weights(m) - head
    copies *= _copy_bytes(engine)
    return tokens * (m.n_layers * block + outside) + m.n_layers * mask + copies + 4 * head


def logits_bytes(cfg: RunConfig, device: str) -> int:
    """Of the chunk that the loss reads, and writes its gradient over."""
    elements = cfg.train.batch_size * cfg.model.seq_len * cfg.model.vocab_size
    return min(elements, LOSS_CHUNK_ELEMENTS[device]) * _compute_bytes(cfg.engine)


def block_bytes(m: ModelConfig, engine: EngineConfig, device: str) -> int:
    """What autograd keeps of one block for one token, masks left out."""
    c, fused = _compute_bytes(engine), engine.compile
    q, kv = m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    norms = (1 if m.parallel_blocks else 2) * _norm_bytes(m, engine, device)
    normed = m.d_model * _normed_bytes(m, engine)
    mlp = m.d_ff * c * (2 if m.mlp == "gelu" else 3 if fused else 4)
    turned = m.positions == "rope" or m.qk_norm
    if m.attention == "eager":
        probabilities = m.n_heads * _eager_scores(m) // m.seq_len * (4 if fused or c == 4 else 6)
        attention = 4 * c * q + probabilities + (c * (q + 2 * kv) if m.qk_norm and (device == "cuda" or c == 4) else 0)
    else:  # v is a view of qkv, so all of it stays; q and k are other tensors once they were turned or normalised
        attention = c * (q + 2 * kv) + (c * (q + kv) if turned else 0) + c * q + 4 * m.n_heads
    if m.qk_norm and device == "cpu" and not fused:
        attention += (12 - 2 * c) * (q + kv)  # torch's CPU form of the norm keeps its steps, in fp32
    return norms + normed + mlp + attention


def _eager_scores(m: ModelConfig) -> int:
    """Of a head and row: queries are taken some at a time, and look at no key behind their own end."""
    stops = [min(start + EAGER_QUERIES, m.seq_len) for start in range(0, m.seq_len, EAGER_QUERIES)]
    return sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))


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
    """Of one block and micro-batch: eager attention keeps its mask as booleans, SDPA as numbers where it needs one."""
    m, rows = cfg.model, cfg.train.batch_size if cfg.data.document_mask else 1
    if m.attention == "eager":
        return rows * _eager_scores(m)
    needed = cfg.data.document_mask or (m.sliding_window or m.seq_len) < m.seq_len
    return rows * m.seq_len**2 * _compute_bytes(cfg.engine) if needed else 0


def _compute_bytes(engine: EngineConfig) -> int:
    return 2 if engine.precision == "bf16" else 4


# ---------------------------------------------------------------- for a moment


def _loss_slices(cfg: RunConfig, tokens: int, device: str) -> int:
    """The loss in fp32, slice by slice; compiled, a chunk at once, and the gradient of the logits is another tensor."""
    elements = min(tokens * cfg.model.vocab_size, LOSS_CHUNK_ELEMENTS[device])
    if cfg.engine.compile:
        return elements * _compute_bytes(cfg.engine)
    return 4 * min(elements, LOSS_SLICE_ELEMENTS[device]) * (3 if device == "cpu" else 2)


def _cached_copies(cfg: RunConfig) -> int:
    """With checkpointing nothing but autocast's cache holds the blocks' bf16 weights, to the end of the forward pass; compiled blocks bypass it."""
    engine, m = cfg.engine, cfg.model
    if not engine.activation_checkpointing or engine.compile:
        return 0
    return _copy_bytes(engine) * (matmul_weights(m) - m.vocab_size * m.d_model)


def _block_workspace(m: ModelConfig, engine: EngineConfig, tokens: int, device: str) -> int:
    """What the backward pass of one block adds: gradients of its widest tensors, and with checkpointing the block's own activations again."""
    c, block = _compute_bytes(engine), block_bytes(m, engine, device)
    in_mlp, in_softmax = block + 5 * c * m.d_ff, 14 * m.n_heads * m.seq_len if m.attention == "eager" else 0
    again = _copy_bytes(engine) * matmul_weights(m) // m.n_layers if engine.activation_checkpointing else 0
    return tokens * (max(in_mlp, in_softmax) + 12 * m.d_model - (0 if engine.activation_checkpointing else block)) + again


# ---------------------------------------------------------------- ranks


def _standing_buffers(cfg: RunConfig, ranks: int, params: int, device: str) -> int:
    """What stays allocated from one micro-batch to the next."""
    stage = cfg.engine.zero_stage
    if stage == 0:
        return 4 * params if ranks > 1 else 0  # DDP's buckets; while gradients accumulate without them, both are there
    if stage == 1:
        return _buckets(params, ranks, device)
    return 4 * min(BUCKET_ELEMENTS, params) + (4 * _gathered_elements(cfg.model, params) if ranks > 1 else 0) if stage == 3 else 0


def _gathered_elements(m: ModelConfig, params: int) -> int:
    """Weights that ZeRO-3 has whole on each rank when the forward pass ends: what is small, and what the backward pass needs soon."""
    block = (matmul_weights(m) - m.vocab_size * m.d_model) // m.n_layers
    return min(params, Z3_REUSE_ELEMENTS // 2 + Z3_PREFETCH_ELEMENTS + block)


def _reduction(cfg: RunConfig, ranks: int, share: int, device: str) -> int:
    """What reducing gradients takes in the backward pass beside what stays: buckets, their copies, and ZeRO-2's second set of its own part."""
    params = count_params(cfg.model)
    bucket, copies = 4 * min(BUCKET_ELEMENTS, params), 2 if ranks > 1 else 1
    return {0: 0, 1: 0, 2: share + _buckets(params, ranks, device) + (copies - 1) * bucket, 3: copies * bucket}[cfg.engine.zero_stage]


def _buckets(params: int, ranks: int, device: str) -> int:
    """ZeRO-1 and 2 fill one bucket while the other travels, where that overlaps (llm/engine/ds_config.py)."""
    return 4 * min(BUCKET_ELEMENTS, params) * (2 if ranks > 1 and device == "cuda" else 1)


def _rope_elements(m: ModelConfig) -> int:
    return m.seq_len * m.d_rotary if m.positions == "rope" else 0
