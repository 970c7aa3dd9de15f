"""A DeepSpeed JSON made complete from the run's config, which is the one authority; where they disagree is told all at once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.batch_plan import batch_plan
from llm.config import EngineConfig, RunConfig, shipped, unique_keys
from llm.dist import World
from llm.engine.protocol import EngineError
from llm.model.chunks import BUCKET_ELEMENTS

FOLDER = shipped("ds_configs")


def load_ds_config(cfg: RunConfig, world: World, n_params: int) -> dict:
    """The dictionary for deepspeed.initialize. Raises EngineError with every mismatch between the file and the run."""
    return complete(read_ds_config(cfg.engine), cfg, world, n_params, str(ds_config_path(cfg.engine)))


def read_ds_config(engine: EngineConfig) -> dict:
    """What the file holds, as it stands. Raises EngineError."""
    path = ds_config_path(engine)
    try:
        # not as YAML, which takes 1e-8 for a word
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as a DeepSpeed config: {error}. Check engine.ds_config.") from None
    if not isinstance(given, dict):
        raise EngineError(f"{path} holds a {type(given).__name__}, but a DeepSpeed config is a JSON object. Check engine.ds_config.")
    return given


def ds_config_path(engine: EngineConfig) -> Path:
    """The file engine.ds_config names, else the one for the stage in ds_configs/."""
    if engine.ds_config:
        return Path(engine.ds_config)
    offload = FOLDER / f"zero{engine.zero_stage}-offload.json"
    return offload if engine.offload and offload.exists() else FOLDER / f"zero{engine.zero_stage}.json"


def complete(given: dict, cfg: RunConfig, world: World, n_params: int, where: str) -> dict:
    """`given` with the run's values filled in."""
    ours, tuning = run_values(cfg, world), tuning_values(world, n_params)
    result, problems = json.loads(json.dumps(given)), list(_no_sections(given, ours))
    for path, value in leaves(given):
        if path in ours and value not in ("auto", ours[path][0]):
            problems.append(f"{path} is {json.dumps(value)} there, but {json.dumps(ours[path][0])} by {ours[path][1]}")
        elif value == "auto" and path not in ours | tuning:
            problems.append(f'{path} cannot be "auto": nothing in the run says what it should be')
        elif value == "auto" and path in tuning:
            put(result, path, tuning[path])
    if "scheduler" in given:
        problems.append("scheduler: the learning rate's course is train.schedule")
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise EngineError(
            f"{where} disagrees with the run's config, which decides:\n{lines}\n"
            f'Write "auto" in the DeepSpeed file, or change the run\'s config to what you mean.'
        )
    for path, (value, _) in ours.items():
        put(result, path, value)
    del result["optimizer"]  # the optimizer itself is handed to DeepSpeed, which would build another one from this
    return result


def _no_sections(given: dict, ours: dict) -> Iterator[str]:
    """A line for each key that has a value where DeepSpeed wants settings."""
    for section in dict.fromkeys(path.partition(".")[0] for path in ours if "." in path):
        if not isinstance(given.get(section, {}), dict):
            example = next(path for path in ours if path.startswith(f"{section}."))
            yield f"{section} is {json.dumps(given[section])} there, but holds settings, such as {example}"


def run_values(cfg: RunConfig, world: World) -> dict[str, tuple[Any, str]]:
    """What the run's config decides: DeepSpeed's key -> (value, the field it comes from)."""
    plan, train, engine = batch_plan(cfg, world.size), cfg.train, cfg.engine
    batch = "train.batch_tokens" if train.batch_tokens else "train.grad_accum"
    return {
        "train_batch_size": (plan.global_rows, f"train.batch_size, {batch} and the number of ranks"),
        "train_micro_batch_size_per_gpu": (plan.micro_rows, "train.batch_size"),
        "gradient_accumulation_steps": (plan.accumulation, batch),
        "gradient_clipping": (train.clip_norm or 0.0, "train.clip_norm"),
        "optimizer.type": ("AdamW", "Tally, which has this optimizer only"),
        "optimizer.params.lr": (train.lr, "train.lr"),
        "optimizer.params.betas": (list(train.betas), "train.betas"),
        "optimizer.params.eps": (train.adam_eps, "train.adam_eps"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
        "torch_autocast.enabled": (engine.precision == "bf16", "engine.precision"),
        "torch_autocast.dtype": ("bfloat16", "engine.precision"),
        "bf16.enabled": (False, "Tally, which computes bf16 by torch_autocast over fp32 weights"),
        "fp16.enabled": (False, "Tally, which does not offer fp16"),
        "zero_optimization.stage": (engine.zero_stage, "engine.zero_stage"),
        "zero_optimization.offload_optimizer.device": ("cpu" if engine.offload else "none", "engine.offload"),
        "zero_force_ds_cpu_optimizer": (False, "Tally, which offloads torch's fused AdamW: it is as fast and needs no compiler"),
    }


def tuning_values(world: World, n_params: int) -> dict[str, Any]:
    """Speed settings that depend on the machine and the model; a file may fix them to anything else."""
    bucket = min(BUCKET_ELEMENTS, n_params + n_params % 2)  # DeepSpeed wants an even one
    return {
        "zero_optimization.overlap_comm": world.size > 1 and world.device.startswith("cuda"),
        "zero_optimization.reduce_bucket_size": bucket,
        "zero_optimization.allgather_bucket_size": bucket,
    }


def leaves(tree: dict, prefix: str = ""):
    """(dotted path, value) of everything in `tree` that is not a mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def put(tree: dict, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
