"""--anneal: a fork of a run whose learning rate decays to its end, while the run itself, the trunk, goes on at its constant rate.

The fork is a run of its own in a folder beside the trunk's, checkpoints/<run>-anneal-<step>. It begins with the trunk's whole state, moments
and ledger included, and takes the samples that the trunk would take next; what it sees is in its own ledger, and the trunk's is untouched.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.manifest import Manifest, read_manifest
from llm.checkpoint.resume import Checkpoint, open_checkpoint
from llm.config import ConfigError, RunConfig, interval_steps
from llm.data.ledger import Ledger
from llm.dist import World
from llm.train.invariants import RESUMABLE

CHANGED_BY_ANNEAL = ("train.schedule", "train.warmup_steps", "train.decay_steps")


@dataclass(frozen=True)
class Fork:
    """Where a fork leaves its trunk, and over how many steps it decays."""

    trunk: str
    """The trunk's checkpoint; only read, for the trunk may be training at this moment."""
    name: str
    step: int
    decay_steps: int

    def open(self) -> Checkpoint:
        """The trunk's checkpoint, whose files rank 0 has verified."""
        return Checkpoint(Path(self.trunk), read_manifest(Path(self.trunk)))

    def config(self, cfg: RunConfig) -> RunConfig:
        """The fork's own: the trunk's with another name, and with the decay for a schedule."""
        decay = {"schedule": "wsd", "warmup_steps": 0, "decay_steps": self.decay_steps, "total_step_budget": self.step + self.decay_steps}
        changes = {"train": decay, "checkpoint": {"run_name": self.name}}
        if cfg.log.out_dir:
            changes["log"] = {"out_dir": str(Path(cfg.log.out_dir, self.name))}
        return cfg.model_copy(update={name: getattr(cfg, name).model_copy(update=change) for name, change in changes.items()})

    def check_data(self, ledger: Ledger, global_rows: int, step: int) -> None:
        """Refuse a decay that the data would cut off before its end."""
        phase, needed = ledger.open_phase, self.step + self.decay_steps - step
        left = -(-(phase.total - phase.consumed) // global_rows)
        if left < needed:
            tokens = left * global_rows * phase.seq_len
            raise ConfigError(
                f"--anneal: decaying takes {needed:,} more steps, but the data of phase {phase.name} ends after {left:,}. Give --anneal "
                f"{tokens:,} or less, or fork from an earlier step with --from-step."
            )


def find_fork(world: World, cfg: RunConfig, tokens: int, from_step: int | None) -> Fork:
    """The fork that --anneal means: an unfinished one of this run goes on; else a new one leaves at `from_step` or the newest step. Collective."""
    return Fork(**world.on_rank_0(lambda: asdict(_find_fork(cfg, tokens, from_step))))


def _find_fork(cfg: RunConfig, tokens: int, from_step: int | None) -> Fork:
    unfinished = None if from_step is not None else _unfinished(cfg)
    step = from_step if unfinished is None else unfinished
    trunk = open_checkpoint(cfg.run_folder, step, RESUMABLE)
    manifest = trunk.manifest
    _check_constant(cfg, manifest)
    decay_steps = -(-tokens // (manifest.global_rows * cfg.model.seq_len))
    return Fork(str(trunk.folder), f"{cfg.checkpoint.run_name}-anneal-{manifest.step}", manifest.step, decay_steps)


def _unfinished(cfg: RunConfig) -> int | None:
    """The step at which the youngest fork that is not at its end left the trunk."""
    steps = []
    for path in cfg.run_folder.parent.glob(f"{cfg.checkpoint.run_name}-anneal-*"):
        found, step = folder.entries(path), path.name.rpartition("-")[2]
        if found and step.isdigit():
            manifest = read_manifest(found[-1].path)
            steps += [int(step)] * (manifest.step < manifest.config["train"]["total_step_budget"])
    return max(steps, default=None)


def _check_constant(cfg: RunConfig, manifest: Manifest) -> None:
    """Refuse a trunk whose rate does not stand where it began: decaying it once more would give a model of neither schedule."""
    train = cfg.train
    if train.schedule not in ("wsd", "constant"):
        raise ConfigError(f"--anneal forks a run at a constant learning rate; train.schedule {train.schedule} decays by itself. Use wsd or constant.")
    if train.schedule == "wsd" and train.total_step_budget:
        begin = train.total_step_budget - interval_steps(train.decay_steps, train.total_step_budget)
        if manifest.step > begin:
            raise ConfigError(f"--anneal: step {manifest.step:,} is in the run's own decay since {begin:,}. Give --from-step {begin} or less.")
