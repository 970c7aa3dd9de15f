"""Hugging Face's families in Tally's words: config.json to ModelConfig and back, and which of their tensors make which of ours.

A family is a table. What a table cannot express is refused by the name of the field, in both directions, and nothing is left out silently.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from llm.config import ModelConfig
from llm.log import UserError


class Inexpressible(UserError):
    """The other side has no such model."""


@dataclass(frozen=True)
class Family:
    architecture: str
    keys: dict[str, tuple[str, ...]]
    """Field of ModelConfig -> its keys in config.json, which must agree with each other where there are several."""
    form: dict[str, Any]
    """Fields of ModelConfig that the family leaves no choice of."""
    constants: dict[str, Any]
    """Keys of config.json that must have this value; a key that is left out has it."""
    names: dict[str, tuple[str, ...]]
    """Our module -> theirs, in the order in which their rows follow each other in ours; * is the layer."""
    absent: dict[str, Any] = field(default_factory=dict)
    """What a key that config.json leaves out means, where that is not ModelConfig's default."""
    transposed: bool = False
    """Matrices inside the blocks are stored as [in, out]."""


def _keys(**keys: str) -> dict[str, tuple[str, ...]]:
    return {ours: tuple(theirs.split()) for ours, theirs in keys.items()}


_SIZES = _keys(
    n_layers="num_hidden_layers", d_model="hidden_size", n_heads="num_attention_heads", n_kv_heads="num_key_value_heads",
    d_ff="intermediate_size", seq_len="max_position_embeddings", vocab_size="vocab_size", tie_embeddings="tie_word_embeddings",
    init_std="initializer_range",
)  # fmt: skip
_LLAMA_KEYS = _SIZES | _keys(norm_eps="rms_norm_eps", d_head="head_dim")
_PLAIN = {"qk_norm": False, "parallel_blocks": False, "head_bias": False, "sliding_window": None, "logit_softcap": None}
_LLAMA_FORM = _PLAIN | {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "rotary_fraction": 1.0}
_LLAMA_NAMES = {
    "embed": ("model.embed_tokens",),
    "blocks.*.attn_norm": ("model.layers.*.input_layernorm",),
    "blocks.*.attn.qkv": ("model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"),
    "blocks.*.attn.q_norm": ("model.layers.*.self_attn.q_norm",),
    "blocks.*.attn.k_norm": ("model.layers.*.self_attn.k_norm",),
    "blocks.*.attn.out": ("model.layers.*.self_attn.o_proj",),
    "blocks.*.mlp_norm": ("model.layers.*.post_attention_layernorm",),
    "blocks.*.mlp.gate_up": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "blocks.*.mlp.down": ("model.layers.*.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}

# Llama first: of two families that fit it is taken. Defaults are those of transformers' own config classes.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        keys=_LLAMA_KEYS | _keys(bias="attention_bias mlp_bias"),
        form=_LLAMA_FORM,
        constants={"hidden_act": "silu"},
        names=_LLAMA_NAMES,
        absent={"rms_norm_eps": 1e-6},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        keys=_LLAMA_KEYS | _keys(sliding_window="sliding_window"),
        form={k: v for k, v in _LLAMA_FORM.items() if k != "sliding_window"} | {"bias": False},
        constants={"hidden_act": "silu"},
        names=_LLAMA_NAMES,
        absent={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        keys=_LLAMA_KEYS,
        form=_LLAMA_FORM | {"qk_norm": True, "bias": False},
        constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        names=_LLAMA_NAMES,
        absent={"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "phi": Family(
        "PhiForCausalLM",
        keys=_SIZES | _keys(norm_eps="layer_norm_eps"),
        form=_PLAIN | {"norm": "layernorm", "positions": "rope", "mlp": "gelu", "bias": True, "parallel_blocks": True, "head_bias": True},
        constants={"hidden_act": "gelu_new", "qk_layernorm": False},
        names={
            "embed": ("model.embed_tokens",),
            "blocks.*.attn_norm": ("model.layers.*.input_layernorm",),
            "blocks.*.attn.qkv": _LLAMA_NAMES["blocks.*.attn.qkv"],
            "blocks.*.attn.out": ("model.layers.*.self_attn.dense",),
            "blocks.*.mlp.up": ("model.layers.*.mlp.fc1",),
            "blocks.*.mlp.down": ("model.layers.*.mlp.fc2",),
            "norm": ("model.final_layernorm",),
            "head": ("lm_head",),
        },
        absent={"partial_rotary_factor": 0.5},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys=_keys(
            n_layers="n_layer", d_model="n_embd", n_heads="n_head", d_ff="n_inner", seq_len="n_positions", vocab_size="vocab_size",
            tie_embeddings="tie_word_embeddings", init_std="initializer_range", norm_eps="layer_norm_epsilon",
        ),  # fmt: skip
        form=_PLAIN | {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True},
        constants={
            "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        },  # fmt: skip
        names={
            "embed": ("transformer.wte",),
            "positions": ("transformer.wpe",),
            "blocks.*.attn_norm": ("transformer.h.*.ln_1",),
            "blocks.*.attn.qkv": ("transformer.h.*.attn.c_attn",),
            "blocks.*.attn.out": ("transformer.h.*.attn.c_proj",),
            "blocks.*.mlp_norm": ("transformer.h.*.ln_2",),
            "blocks.*.mlp.up": ("transformer.h.*.mlp.c_fc",),
            "blocks.*.mlp.down": ("transformer.h.*.mlp.c_proj",),
            "norm": ("transformer.ln_f",),
            "head": ("lm_head",),
        },
        absent={"tie_word_embeddings": True},
        transposed=True,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- config.json


def to_config_json(cfg: ModelConfig) -> dict:
    """`cfg` as the config.json of the family that it is of. Raises Inexpressible with the fields that none has."""
    misfits = {name: _misfits(cfg, family) for name, family in FAMILIES.items()}
    name = min(misfits, key=lambda n: len(misfits[n]))
    if misfits[name]:
        told = "\n".join(f"  - {line}" for line in misfits[name])
        raise Inexpressible(f"Hugging Face has no family for this model. The nearest is {name}, but for:\n{told}")
    family = FAMILIES[name]
    values = {key: getattr(cfg, ours) for ours, keys in family.keys.items() for key in keys}
    rope = _rope_keys(cfg) if cfg.positions == "rope" else {}
    return {"architectures": [family.architecture], "model_type": name} | values | family.constants | rope


def _misfits(cfg: ModelConfig, family: Family) -> list[str]:
    wanted = dict(family.form)
    if "n_kv_heads" not in family.keys:
        wanted["n_kv_heads"] = cfg.n_heads
    if "d_head" not in family.keys:
        wanted["d_head"] = cfg.d_model / cfg.n_heads
    return [f"model.{ours} is {getattr(cfg, ours)}, there it is {value}" for ours, value in wanted.items() if getattr(cfg, ours) != value]


def from_config_json(config: dict, where: str) -> ModelConfig:
    """The ModelConfig that a config.json means. Raises Inexpressible with the key that Tally has no equal of."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise Inexpressible(f"{where}: model_type is {name!r}, but only {', '.join(FAMILIES)} can be imported.")
    family = FAMILIES[name]
    if config.get("quantization_config"):
        raise Inexpressible(f"{where}: has a quantization_config. Import the checkpoint that it was quantized from.")
    for key, value in family.constants.items():
        if config.get(key, value) != value:
            raise Inexpressible(f"{where}: {key} is {config[key]!r}, but of {name} models only those with {value!r} can be imported.")
    fields = {ours: _agreed(config, keys, family, where) for ours, keys in family.keys.items()}
    fields = {ours: value for ours, value in fields.items() if value is not None}
    if name == "gpt2":
        fields.setdefault("d_ff", 4 * fields.get("d_model", 0))
    rope = _rope_fields(config, family, where) if family.form["positions"] == "rope" else {}
    try:
        return ModelConfig.model_validate({"model_name": name} | family.form | fields | rope)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise Inexpressible(f"{where}: is not a whole {name} config ({problems}).") from None


def _agreed(config: dict, keys: tuple[str, ...], family: Family, where: str) -> Any:
    values = [config.get(key, family.absent.get(key)) for key in keys]
    if len({bool(value) for value in values}) > 1:
        raise Inexpressible(f"{where}: {' and '.join(keys)} are {values}; Tally's models have the same for both.")
    return values[0]


# ---------------------------------------------------------------- rope

_ROPE_KEYS = {
    "rope_factor": "factor", "rope_original_seq_len": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor",
}  # fmt: skip
_ROPE_USES = {
    "none": (),
    "linear": ("rope_factor",),
    "yarn": ("rope_factor", "rope_original_seq_len"),
    "llama3": tuple(_ROPE_KEYS),
}
_YARN_CONSTANTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": None, "mscale_all_dim": None}


def _rope_keys(cfg: ModelConfig) -> dict:
    """As transformers 4 writes them, which 5 reads as well."""
    keys = {"rope_theta": cfg.rope_theta, "rope_scaling": None, "partial_rotary_factor": cfg.rotary_fraction}
    if cfg.rope_scaling != "none":
        keys["rope_scaling"] = {"rope_type": cfg.rope_scaling} | {_ROPE_KEYS[f]: getattr(cfg, f) for f in _ROPE_USES[cfg.rope_scaling]}
    return keys


def _rope_fields(config: dict, family: Family, where: str) -> dict:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise Inexpressible(f"{where}: {key} is {config[key]!r}, but should be an object with rope_type, factor and the like.")
        rope |= config.get(key) or {}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    kind = "none" if kind == "default" else kind
    theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    fraction = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", family.absent.get("partial_rotary_factor", 1.0)))
    if kind not in _ROPE_USES:
        raise Inexpressible(f"{where}: rope_type is {kind!r}, but only {', '.join(_ROPE_USES)} can be imported.")
    if kind == "yarn":
        rope = {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope
        rope = {key: value for key, value in rope.items() if key not in _YARN_CONSTANTS or _YARN_CONSTANTS[key] != value}
    theirs = {_ROPE_KEYS[f]: f for f in _ROPE_USES[kind]}
    if unknown := sorted(rope.keys() - theirs.keys()):
        raise Inexpressible(f"{where}: its rope has {unknown[0]} {rope[unknown[0]]!r}, which Tally's rope_scaling {kind} has no equal of.")
    return {"rope_theta": theta, "rotary_fraction": fraction, "rope_scaling": kind} | {theirs[key]: value for key, value in rope.items()}


# ---------------------------------------------------------------- names of tensors


class Part(NamedTuple):
    """One of their tensors and the rows that it has in ours."""

    name: str
    rows: int
    transposed: bool


def parts(cfg: ModelConfig, family: Family, name: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """What our parameter `name` consists of over there, in the order of its rows."""
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blocks\.(\d+)\.", name)
    pattern = re.sub(r"^blocks\.\d+\.", "blocks.*.", module)
    names, rows = family.names[pattern], [shape[0]]
    if len(names) == 3:  # q, k and v; two are gate and up
        rows = [heads * cfg.d_head for heads in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)]
    elif len(names) == 2:
        rows = [cfg.d_ff, cfg.d_ff]
    for theirs, n in zip(names, rows, strict=True):
        yield Part(f"{theirs.replace('*', layer[1]) if layer else theirs}.{kind}", n, family.transposed and layer is not None and len(shape) == 2)
