"""What may change between two sittings of one run: nothing that makes it another model, the numbers only when told, the machine freely."""

from collections.abc import Collection
from logging import INFO, WARNING
from pathlib import Path

from llm.checkpoint.slices import CheckpointError
from llm.config import SECTIONS, ConfigError, RunConfig
from llm.dist import World
from llm.log import log

# Everything in `model` but how attention is computed and z-loss, and the seed that the data order comes from, is identity. Changes that
# alter the numbers but not what the model is (trajectory) need --accept-change; ranks, stages, micro-batches and intervals are free.
IDENTITY = {"train.seed"}
FREE_MODEL = {"model.attention", "model.model_name"}
# How rope is stretched to longer rows, which a model is fine-tuned for: a new run may change it for
# another's weights when told.
STRETCH = {
    "model.rope_theta",
    "model.rope_scaling",
    "model.rope_factor",
    "model.rope_original_seq_len",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
}
TRAJECTORY = {
    f"train.{key}"
    for key in (
        "lr", "batch_tokens", "schedule", "warmup_steps", "min_lr_ratio", "decay_steps", "weight_decay", "betas", "adam_eps", "clip_norm",
        "spike_sigma", "spike_window",
    )
} | {"engine.precision", "model.z_loss"}


def check_drift(saved: dict, cfg: RunConfig, accepted: list[str]) -> None:
    """Compare a checkpoint's config with today's; raises CheckpointError that lists every change which is not allowed."""
    before, now = _defaults() | _flat(saved), _flat(cfg.model_dump(mode="json"))
    changed = {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}
    identity = {k for k in changed if k in IDENTITY or (k.startswith("model.") and k not in FREE_MODEL | TRAJECTORY)}
    trajectory = {k for k in changed if k in TRAJECTORY}
    shown = {key: f"{key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in changed.items()}
    if identity:
        raise CheckpointError(
            "This run was started with other settings, and they make it another model:\n"
            + "\n".join(f"  - {shown[k]}" for k in sorted(identity))
            + "\nGo back to the old values, or start another run with checkpoint.run_name=NAME."
        )
    refused = sorted(trajectory - set(accepted))
    if refused:
        raise CheckpointError(
            "These settings change the course of the run:\n"
            + "\n".join(f"  - {shown[k]}" for k in refused)
            + f"\nGo back to the old values, or accept with {' '.join(f'--accept-change {k}' for k in refused)}."
        )
    for key in sorted(changed.keys() - identity - set(refused)):
        log.debug(shown[key]) if key not in trajectory else log.warning(f"accepted: {shown[key]}.")


# What a new run may choose anew for another's weights; with learned positions shapes tie seq_len.
FREE_OF_SOURCE = FREE_MODEL | {"model.z_loss", "model.seq_len", "model.init_std"}


def check_source(source: Path, saved: dict, cfg: RunConfig, accepted: Collection[str]) -> None:
    """Compare the model of the weights that a new run starts from with its own; log what differs.

    Raises CheckpointError that lists every setting for which they would be another model's weights.
    """
    before, now = _defaults() | _flat(saved), _flat({"model": cfg.model.model_dump(mode="json")})
    changed = {
        key: f"{key}: {before.get(key)!r} there, {value!r} here"
        for key, value in now.items()
        if before.get(key) != value
    }
    refused = sorted(changed.keys() - FREE_OF_SOURCE - STRETCH)
    if refused:
        raise CheckpointError(
            f"--init-from {source}: its weights were trained as another model than this one:\n"
            + "\n".join(f"  - {changed[key]}" for key in refused)
            + "\nUse the values that they were trained with."
        )
    stretched = sorted(changed.keys() & STRETCH - set(accepted))
    if stretched:
        raise CheckpointError(
            f"--init-from {source}: its weights were trained with other positions:\n"
            + "\n".join(f"  - {changed[key]}" for key in stretched)
            + "\nUse the values that they were trained with. To stretch the model to longer rows "
            + f"on purpose, give {' '.join(f'--accept-change {key}' for key in stretched)}."
        )
    for key in sorted(changed):
        level = WARNING if key in STRETCH else INFO
        log.log(level, f"--init-from: {key} {before.get(key)!r} → {now[key]!r} for these weights.")


def check_same(world: World, cfg: RunConfig, asked: dict) -> None:
    """Refuse ranks that were started with other settings than rank 0, from another copy of the file, say. Collective.

    `asked`: the flags of the command line by name. Raises ConfigError on every rank, before anything that only some would take part in.
    """
    of_ranks = world.gather(_flat(cfg.model_dump(mode="json")) | asked)
    world.together(lambda: _refuse_other_settings(of_ranks))


def _refuse_other_settings(of_ranks: list[dict]) -> None:
    for rank, theirs in enumerate(of_ranks):
        for key, value in theirs.items():
            if value != of_ranks[0][key]:
                raise ConfigError(
                    f"{key} is {of_ranks[0][key]!r} on rank 0, but {value!r} on rank {rank}. Start all ranks with one config and one command."
                )


def _defaults() -> dict:
    """What a field had before it existed, for checkpoints that are older than it."""
    fields = {f"{name}.{key}": field for name, section in SECTIONS.items() for key, field in section.model_fields.items()}
    return {path: field.default for path, field in fields.items() if not field.is_required()}


def _flat(config: dict) -> dict:
    return {f"{section}.{key}": value for section, fields in config.items() for key, value in fields.items()}
