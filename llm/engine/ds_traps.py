"""What a DeepSpeed JSON may say that costs speed, or exactness, without a word from DeepSpeed. Read from the sources of 0.19.8."""

from collections.abc import Callable
from typing import Any

from llm.config import RunConfig
from llm.dist import World
from llm.engine.ds_config import leaves, load_ds_config
from llm.log import log


def warn_of_traps(cfg: RunConfig, world: World, n_params: int) -> None:
    if world.rank == 0:
        for trap in traps(load_ds_config(cfg, world, n_params), cfg, world, n_params):
            log.warning(f"{cfg.engine.ds_config}: {trap}")


def traps(config: dict, cfg: RunConfig, world: World, n_params: int) -> list[str]:
    """A sentence for each trap that a completed config walks into; what it leaves out has DeepSpeed's default."""
    given = dict(leaves(config))
    found = []
    for path, default, is_trap, why in _traps(cfg, world, n_params):
        value = given.get(path, default)
        if is_trap(value):
            found.append(f"{path} is {value!r}{'' if path in given else ', by default'}: {why}")
    return found


Trap = tuple[str, Any, Callable[[Any], bool], str]


def _traps(cfg: RunConfig, world: World, n_params: int) -> list[Trap]:
    stage, several = cfg.engine.zero_stage, world.size > 1
    large = max(200_000_000, n_params // 8)
    zero, low = "zero_optimization.", ("bf16", "bfloat16", "fp16", "float16")
    all_stages = [
        (f"{zero}contiguous_gradients", True, lambda v: not v, "the device is waited for at every bucket; leave it true."),
        (f"{zero}round_robin_gradients", False, bool, "gradients are copied into another order at every step for nothing."),
        ("wall_clock_breakdown", False, bool, "the device is waited for many times in each step; only to look for a fault."),
        ("flops_profiler.enabled", False, bool, "it puts hooks on every module; only to look at one step."),
        ("communication_data_type", None, lambda v: v in low, "gradients that were summed in fp32 are rounded before they travel; fp32 keeps them."),
        ("data_types.grad_accum_dtype", None, lambda v: v in low, "gradients of micro-batches are summed in 16 bits; fp32 keeps what is small."),
    ]
    if cfg.engine.precision == "bf16":
        why = "gradients of Linear layers are reduced in bf16; [] has them travel in fp32."
        all_stages.append(("torch_autocast.lower_precision_safe_modules", None, lambda v: v != [], why))
    if several:
        why = f'so few buckets for {n_params:,} parameters leave nothing to overlap with; "auto" is 80 million.'
        all_stages.append((f"{zero}reduce_bucket_size", 500_000_000, lambda v: v > large, why))
    if several and world.device.startswith("cuda"):
        why = 'reducing gradients waits for the whole backward pass; "auto" is true here.'
        all_stages.append((f"{zero}overlap_comm", stage == 3, lambda v: not v, why))
    if stage == 3:
        why = f"below the model's {n_params:,} parameters, weights are freed and gathered again within a step."
        all_stages.append((f"{zero}stage3_max_live_parameters", 1_000_000_000, lambda v: v < n_params, why))
    return all_stages
