"""Every setting of a run: types, ranges, and errors that name the field. No torch here, so that `--help` and planning stay fast.

A run is one YAML (or JSON) file plus `section.key=value` words. Field names are unique across sections, so a flat file loads as well.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from llm.log import UserError

VOCAB_MULTIPLE = 128  # padded vocabularies keep the head's matmul on aligned tiles
MAX_PROFILED = 100  # steps
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(UserError):
    """The config file or an override is wrong."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _interval(value: Any) -> int | str:
    """Check steps (a whole number, 0 = never) or a percentage of the phase, such as 10%."""
    text = str(value).strip()
    if text.endswith("%") and 0 < float(text[:-1]) <= 100:
        return text
    if isinstance(value, bool) or not text.isdigit():
        raise ValueError("give a number of steps (0: never) or a percentage of the phase such as 10%")
    return int(text)


Interval = Annotated[int | str, BeforeValidator(_interval)]


def _rows(value: Any) -> int | str:
    """Check a number of rows, or auto."""
    if value != "auto" and (isinstance(value, bool) or not str(value).isdigit() or int(value) < 1):
        raise ValueError("give a number of rows, at least 1, or auto")
    return value if value == "auto" else int(value)


Rows = Annotated[int | Literal["auto"], BeforeValidator(_rows)]  # one problem where it is neither, and not one for each


def _paths(value: Any) -> Any:
    """Check where data lie: one path, a list of them, or names for them."""
    paths = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("give a path, a list of paths, or a mapping of names to paths")
    return value


Paths = Annotated[str | list[str] | dict[str, str], BeforeValidator(_paths)]


def _step_range(value: Any) -> Any:
    """Check the first and the last step of what is profiled."""
    steps = list(value) if isinstance(value, list | tuple) else []
    if len(steps) != 2 or not all(type(step) is int for step in steps) or not 1 <= steps[0] <= steps[1] < steps[0] + MAX_PROFILED:
        raise ValueError(
            f"give the first and the last step, such as [10, 15], at most {MAX_PROFILED} in all: a trace has thousands of lines for each"
        )
    return value


StepRange = Annotated[tuple[int, int], BeforeValidator(_step_range)]


def interval_steps(interval: Interval, phase_steps: int) -> int:
    """The interval in optimizer steps for a phase of `phase_steps`; 0 means never."""
    if isinstance(interval, str):
        return max(1, round(float(interval[:-1]) / 100 * phase_steps))
    return interval


class ModelConfig(Section):
    """One decoder-only transformer. Letters in the code: D=d_model, H=n_heads, G=n_kv_heads, K=d_head, F=d_ff, V=vocab_size, T=seq_len."""

    model_name: str = "custom"
    n_layers: PositiveInt
    d_model: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None = Field(None, validate_default=True)
    """None: as many as n_heads (no grouped-query attention)."""
    d_head: PositiveInt | None = Field(None, validate_default=True)
    """None: d_model / n_heads."""
    d_ff: PositiveInt
    seq_len: PositiveInt
    vocab_size: PositiveInt | None = None
    """None: the tokenizer's, padded up to a multiple of 128."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: PositiveFloat = 1e-5
    positions: Literal["rope", "learned"] = Field("rope", validate_default=True)
    rope_theta: PositiveFloat = 10_000.0
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """This part of each head, its first dimensions, is turned by rope; the rest knows no position (Phi)."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How rope is stretched from rope_original_seq_len to rope_factor times as much."""
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    rope_original_seq_len: PositiveInt | None = Field(None, validate_default=True)
    """Tokens a row that the model was first trained with; llama3 and yarn need it."""
    rope_low_freq_factor: PositiveFloat = 1.0
    rope_high_freq_factor: PositiveFloat = 4.0
    """llama3: waves that fit rope_original_seq_len less than low times are slowed by rope_factor, more than high times left alone."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    """On all linear maps but the head, and on LayerNorms."""
    head_bias: bool = False
    parallel_blocks: bool = False
    """Attention and MLP read one norm and are added together (Phi)."""
    qk_norm: bool = False
    sliding_window: PositiveInt | None = None
    """Each token sees so many, itself and those right before it; None: all before it."""
    logit_softcap: PositiveFloat | None = None
    """Logits are bent to stay within it: cap * tanh(logits / cap)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """In training so much of ln(Z)^2 is added to the loss of each target, Z its softmax's denominator; PaLM has 1e-4."""
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02
    attention: Literal["sdpa", "eager"] = "sdpa"

    @field_validator("n_kv_heads")
    @classmethod
    def _group_heads(cls, given: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("n_heads")
        if given and heads and heads % given:
            raise ValueError(f"n_heads {heads} is not a multiple of it")
        return given or heads

    @field_validator("d_head")
    @classmethod
    def _split_width(cls, given: int | None, info: ValidationInfo) -> int | None:
        heads, width = info.data.get("n_heads"), info.data.get("d_model")
        if given is None and heads and width:
            if width % heads:
                raise ValueError(f"d_model {width} is not divisible by n_heads {heads}; change one of them or give d_head")
            given = width // heads
        return given

    @field_validator("positions")
    @classmethod
    def _rope_needs_pairs(cls, given: str, info: ValidationInfo) -> str:
        if given == "rope" and (info.data.get("d_head") or 0) % 2:
            raise ValueError(f"rope turns pairs of dimensions, so d_head must be even, not {info.data['d_head']}")
        return given

    @field_validator("rotary_fraction")
    @classmethod
    def _pairs_are_whole(cls, given: float, info: ValidationInfo) -> float:
        width = info.data.get("d_head") or 0
        if given < 1 and (int(width * given) % 2 or int(width * given) < 2):
            raise ValueError(f"of d_head {width} it leaves {int(width * given)} dimensions to turn, but they come in pairs")
        return given

    @field_validator("rope_original_seq_len")
    @classmethod
    def _scaling_has_a_start(cls, given: int | None, info: ValidationInfo) -> int | None:
        if given is None and info.data.get("rope_scaling") in ("llama3", "yarn"):
            raise ValueError(f"rope_scaling {info.data['rope_scaling']} needs the number of tokens a row that the model was first trained with")
        return given

    @property
    def d_rotary(self) -> int:
        """Dimensions of each head that rope turns."""
        return int(self.d_head * self.rotary_fraction)

    def with_vocab(self, tokenizer_vocab: int) -> "ModelConfig":
        """This config with `vocab_size` settled; refuses one that is smaller than the tokenizer's."""
        if self.vocab_size is None:
            padded = -(-tokenizer_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
            return self.model_copy(update={"vocab_size": padded})
        if self.vocab_size < tokenizer_vocab:
            raise ConfigError(
                f"model.vocab_size is {self.vocab_size:,} but the tokenizer has {tokenizer_vocab:,} tokens: its largest ids would "
                f"have no embedding. Leave vocab_size out (it is then taken from the tokenizer) or raise it."
            )
        return self


class TokenizerConfig(Section):
    tokenizer_path: str
    tokenizer_type: Literal["huggingface", "bpe", "tiktoken"] | None = None
    """None: recognised from what lies at tokenizer_path."""


class DataConfig(Section):
    data_path: Paths
    """Dataset folders made by tools/tokenize_parallel.py, single shards, or .jsonl files with one list of ids a line.

    A mapping gives them names for --dataset."""
    save_bin: bool = True
    """Keep the shard that an imported .jsonl becomes beside it; false: keep it in the run's folder."""
    rechunk: bool = False
    """Allow shards that were made for another seq_len."""
    document_mask: bool = False
    """Tokens see only those of their own document, positions begin with it, and its first token is not predicted from the one before."""
    packing: Literal["bestfit"] | None = Field(None, validate_default=True)
    """bestfit: a row holds whole documents, chosen to leave little of it empty; for conversations. None: windows of the text as it runs."""
    weights: dict[str, Annotated[int, Field(ge=1, le=1000)]] = {}
    """Out of the sum of all weights, so many samples come from the dataset of that name (one that is not named: 1). The phase lasts until
    each dataset has been passed `epochs` times, so a weighty one is passed more often. Empty: all samples alike, each once an epoch."""

    @field_validator("packing")
    @classmethod
    def _packing_needs_mask(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given and not info.data.get("document_mask"):
            raise ValueError("documents side by side have nothing to do with each other: it needs document_mask: true")
        return given

    @property
    def datasets(self) -> dict[str, str]:
        """Dataset name -> path; unnamed ones are called by the last part of their path, by all of it where several end alike."""
        if isinstance(self.data_path, dict):
            return self.data_path
        paths = [self.data_path] if isinstance(self.data_path, str) else self.data_path
        names = [Path(p).name for p in paths]
        return {p if names.count(name) > 1 else name: p for name, p in zip(names, paths, strict=True)}


class TrainConfig(Section):
    lr: PositiveFloat
    """Peak learning rate."""
    batch_size: Rows
    """Rows per rank and micro-batch. auto: as many as fit into memory, tried out at the start; the global batch is then batch_tokens."""
    grad_accum: PositiveInt | None = None
    batch_tokens: PositiveInt | None = None
    """Global batch in tokens; accumulation then follows from the number of ranks, and the run's numbers do not depend on it."""
    epochs: PositiveInt = 1
    total_step_budget: NonNegativeInt = 0
    """Steps of the whole run; 0: each phase brings its own, epochs x samples / batch."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: Interval = "2%"
    min_lr_ratio: Fraction = 0.1
    decay_steps: Interval = "20%"
    """wsd: steps of the final decay to min_lr_ratio, when total_step_budget says where the end is; 0: never decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices only; norms, biases and embeddings go without."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    adam_eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = 1.0
    """Global L2 norm; None leaves gradients alone."""
    spike_sigma: Annotated[float, Field(ge=0)] | None = 6.0
    """A step whose loss lies more than so many standard deviations above the mean of the last `spike_window` applied steps is skipped, and
    a gradient norm that does is reported; a loss may rise by half a nat in any case. 0 or None: only numbers that are not finite are."""
    spike_window: Annotated[int, Field(ge=32)] = 128
    """Steps; nothing is judged before half of them, and 32 at least, have been applied in the phase."""
    seed: NonNegativeInt = 1337
    hang_timeout_s: PositiveFloat | None = 1800.0
    """A rank that takes longer for one step shows where it is and leaves with code 75; 4 times as long at the start, in validation and in
    saving. None: waits for ever."""
    eval_every: Interval = "10%"
    eval_rows: NonNegativeInt = 256
    """Validation rows (of seq_len tokens) per evaluation; 0: all."""

    @field_validator("batch_tokens")
    @classmethod
    def _one_batch_size(cls, given: int | None, info: ValidationInfo) -> int | None:
        if given and info.data.get("grad_accum"):
            raise ValueError("give grad_accum or batch_tokens, not both: either one decides the global batch")
        return given


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: plain torch, with DDP on several ranks; 1-3: DeepSpeed ZeRO."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: autocast over fp32 weights. auto: bf16 where this machine is faster in it, decided once, when the run begins."""
    compile: bool = False
    activation_checkpointing: Fraction = 0.0
    """The share of the blocks, in whole ones, that do not keep their activations but compute them again in the backward pass; true: all."""
    offload: bool = False
    ds_config: str | None = None
    """A DeepSpeed JSON; None: ds_configs/zeroN.json of the chosen stage."""
    keep_memory: bool = True
    """On a CPU freed memory stays with the process, instead of going back and forth between it and the kernel in each step."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")

    @field_validator("offload")
    @classmethod
    def _offload_needs_zero(cls, given: bool, info: ValidationInfo) -> bool:
        if given and info.data.get("zero_stage") == 0:
            raise ValueError("offload is DeepSpeed's: it needs zero_stage 1, 2 or 3")
        return given

    def recomputed_blocks(self, n_layers: int) -> list[int]:
        """Those that do not keep their activations, spread evenly. The last is among them only where all are: its activations are the first
        to be needed again, when all others are still there, so that forgetting them would save nothing."""
        kept = n_layers - round(self.activation_checkpointing * n_layers)
        return [i for i in range(n_layers) if (i + 1) * kept // n_layers == i * kept // n_layers]


class CheckpointConfig(Section):
    checkpoint_dir: str = "checkpoints"
    """Runs live here, each in a folder of its name."""
    run_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """None: the config file's name."""
    save_every: Interval = "10%"
    keep_last: Annotated[int, Field(ge=1)] = 2
    keep_best: NonNegativeInt = 1
    """So many of the best by validation loss are kept too, among those measured on the same rows.
    Where save_every and eval_every never fall on one step, a validation that is among the best so
    far is followed by a save."""
    keep_epochs: bool = True
    """Keep the checkpoint at the end of each epoch."""
    keep_every: Interval = 0
    """Keep the first checkpoint at or after each multiple of so many steps, or of such a part of the phase; 0: not for this reason."""
    thin: bool = False
    """What is kept beyond keep_last loses Adam's moments, two thirds of its size: good for generate and --init-from, not for going on."""
    async_save: bool = True
    """Write in a thread while training goes on, from a copy in host memory: 12 bytes for each parameter, shared out over the ranks."""


class EvalConfig(Section):
    """What is measured while training goes on, as launch/evaluate_model.py measures it."""

    tasks: list[Literal["mmlu", "perplexity"]] = []
    every: Interval = "10%"
    """Steps between two measurements; one more at the end."""
    limit: PositiveInt | None = 100
    """So many questions of each subject, and documents of each text, the first ones; None: all."""
    mmlu: str = "data/raw/mmlu"
    """A folder in MMLU's own layout."""
    subjects: list[str] = []
    """Of MMLU, these only; empty: all."""
    shots: NonNegativeInt = 0
    """Examples before each question."""
    texts: list[str] = []
    """Files or folders of text, for perplexity."""


class LogConfig(Section):
    out_dir: str | None = None
    """Logs, metrics and TensorBoard files; None: the run's folder, under logs."""
    log_every: PositiveInt = 10
    tensorboard: bool = True
    sample_prompts: list[str] = []
    """Written on at each validation, to see how the texts get better."""
    sample_tokens: PositiveInt = 64
    profile: StepRange | None = None
    """First and last step of the run to profile on rank 0: a trace for chrome://tracing or Perfetto, and the ten costliest operations."""

    @field_validator("sample_prompts")
    @classmethod
    def _prompts_say_something(cls, given: list[str]) -> list[str]:
        if "" in given:
            raise ValueError("a prompt is empty; give each at least one character to write on from")
        return given


class RunConfig(Section):
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def in_precision(self, precision: str) -> "RunConfig":
        """This config with another engine.precision."""
        return self.model_copy(update={"engine": self.engine.model_copy(update={"precision": precision})})

    @property
    def run_folder(self) -> Path:
        return Path(self.checkpoint.checkpoint_dir) / self.checkpoint.run_name

    @property
    def log_folder(self) -> Path:
        return Path(self.log.out_dir) if self.log.out_dir else self.run_folder / "logs"


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in RunConfig.model_fields.items()}
OWNER = {key: name for name, section in SECTIONS.items() for key in section.model_fields}


# ---------------------------------------------------------------- loading


def load_config(path: str | Path | None = None, overrides: list[str] = (), *, preset: str | None = None) -> RunConfig:
    """Read a run's YAML or JSON, apply `section.key=value` overrides, check everything at once. Raises ConfigError."""
    path = find_preset(preset) if preset else Path(path) if path else None
    if path is None:
        raise ConfigError("No config given. Use --config FILE, or --model NAME for one of configs/.")
    tree = _nest(read_mapping(path), str(path))
    for word in overrides:
        _apply(tree, word)
    _merge_preset(tree, path)
    if tree.setdefault("checkpoint", {}).get("run_name") is None:
        tree["checkpoint"]["run_name"] = path.stem
    return check_config(tree, str(path))


def check_config(tree: dict, where: str) -> RunConfig:
    """Turn nested plain data into a RunConfig, or raise one ConfigError that lists every problem."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors()]
    raise ConfigError(f"{where} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(f"  - {p}" for p in problems))


def shipped(name: str) -> Path:
    """A folder that comes with the program, such as ds_configs: in the package where a wheel was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def config_folders() -> list[Path]:
    """Where recipes are looked for: ./configs, then those that come with the program."""
    return [folder for folder in (Path("configs"), shipped("configs")) if folder.is_dir()]


def find_preset(name: str) -> Path:
    """The recipe that `--model NAME` means."""
    folders = config_folders()
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in (".yaml", ".yml", ".json")):
        if path.is_file():
            return path
    known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
    where = " or ".join(map(str, folders))
    raise ConfigError(f"There is no config called '{name}' in {where}.{_did_you_mean(name, known)} There are: {', '.join(known)}.")


class _StrictLoader(yaml.SafeLoader):
    """YAML without Python objects, silently overwritten keys, and dates, which a run may well be named for."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = {str(k) for k in keys if keys.count(k) > 1}
        if twice:
            raise ConfigError(f"{node.start_mark.name}: {', '.join(sorted(twice))} is given twice.")
        return super().construct_mapping(node, deep)


def unique_keys(pairs: list[tuple]) -> dict:
    """For json's object_pairs_hook. Raises ValueError for a key that is given twice."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{', '.join(sorted({key for key in keys if keys.count(key) > 1}))} is given twice")
    return tree


def read_mapping(path: Path) -> dict:
    """Read a YAML or JSON file that must hold a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            # not by YAML alone: it takes no tabs, and reads a character beyond U+FFFF, which JSON escapes in two halves, as two
            tree = json.load(file, object_pairs_hook=unique_keys) if path.suffix == ".json" else yaml.load(file, _StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Recipes are in {config_folders()[-1]}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid YAML or JSON. {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, but a config is a mapping of section names to settings.")
    return tree


def _nest(tree: dict, where: str) -> dict:
    """Sections as they are; a field at top level goes to the section that owns it."""
    nested: dict = {}
    for key, value in tree.items():
        if key in SECTIONS:
            if not isinstance(value, dict | None):
                raise ConfigError(f"{where}: '{key}' is a section, so it holds a mapping, not {value!r}.")
            section, fields = key, value or {}
        elif key in OWNER:
            section, fields = OWNER[key], {key: value}
        else:
            raise ConfigError(f"{where}: unknown config key '{key}'.{_did_you_mean(str(key), [*SECTIONS, *OWNER])}")
        if twice := nested.get(section, {}).keys() & fields.keys():
            raise ConfigError(f"{where}: {section}.{min(twice)} is given twice, in its section and outside.")
        nested.setdefault(section, {}).update(fields)
    return nested


def _apply(tree: dict, word: str) -> None:
    path, equals, text = word.partition("=")
    section, _, key = path.rpartition(".")
    section = section or OWNER.get(key, "")
    if not equals:
        raise ConfigError(f"'{word}' is not an override: write section.key=value, for example train.lr=3e-4.")
    if section not in SECTIONS or key not in SECTIONS[section].model_fields:
        known = [f"{owner}.{k}" for k, owner in OWNER.items()]
        raise ConfigError(f"unknown config key '{path}'.{_did_you_mean(path, known)}")
    try:
        value = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError):
        value = text
    tree.setdefault(section, {})[key] = value


def _merge_preset(tree: dict, path: Path) -> None:
    """A file that names a model but gives no dimensions takes them from the preset of that name."""
    model = tree.get("model", {})
    if "model_name" in model and "n_layers" not in model:
        preset = find_preset(str(model["model_name"]))
        if preset.resolve() != path.resolve():
            tree["model"] = _nest(read_mapping(preset), str(preset)).get("model", {}) | model


def _problem(error: dict) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        section, key = (str(p) for p in (error["loc"][0], error["loc"][-1]))
        return f"unknown config key '{where}'.{_did_you_mean(key, list(SECTIONS.get(section, RunConfig).model_fields))}"
    if error["type"] == "missing":
        return f"'{where}' is missing."
    message = error["msg"].removeprefix("Value error, ")
    _, should, rest = message.partition(" should ")
    if should and error["type"] != "value_error":
        return f"{where} is {error['input']!r}, but should {rest}."
    return f"{where}: {message}." if error["input"] is None else f"{where} is {error['input']!r}: {message}."


def _did_you_mean(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
