"""What a sitting begins with: what it is asked, its data and position, weights, moments and generators of a checkpoint, or another run's weights."""

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from llm.batch_plan import BatchPlan, batch_plan
from llm.checkpoint import folder
from llm.checkpoint.lock import LockError, RunLock
from llm.checkpoint.resume import Checkpoint, newest, open_checkpoint
from llm.checkpoint.rng import load_rng_state
from llm.checkpoint.slices import CheckpointError, state_hash
from llm.config import ConfigError, RunConfig
from llm.data.ledger import Ledger, LedgerError
from llm.data.shards import Shard
from llm.dist import World, is_restarted
from llm.engine import Engine, build_engine
from llm.engine.precision import resolve_precision
from llm.log import log, route_output
from llm.model.huggingface_weights import parameter_shapes
from llm.model.init import build_model
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.train import log_owner
from llm.train.anneal import CHANGED_BY_ANNEAL, Fork
from llm.train.datasets import open_shards, settle_imports
from llm.train.drift import check_drift, check_source
from llm.train.invariants import RESUMABLE
from llm.train.loop import Progress
from llm.train.phases import Wish, choose_phase

WriteSamples = Callable[[RunConfig, Transformer, Tokenizer], dict[str, str]]


@dataclass(frozen=True)
class Options:
    """What the command line asks of this sitting, beside the config."""

    started_at: float
    """time.monotonic() when the program started: --minutes-today counts from there."""
    steps_today: int | None = None
    minutes_today: float | None = None
    tokens_today: int | None = None
    wish: Wish = Wish()
    init_from: str | None = None
    anneal: int | None = None
    """Train a fork of the run for so many tokens, with the learning rate going down to its floor."""
    fresh: bool = False
    accept_change: tuple[str, ...] = ()
    from_step: int | None = None
    """Go on from the checkpoint of this step, beside the newer ones."""
    steal_lock: bool = False
    retry_anyway: bool = False
    write_samples: WriteSamples | None = None
    """Prompt -> what the model writes after it; asked on rank 0 after each validation."""

    @property
    def asked(self) -> dict:
        """The flags and what they say, for ranks to compare."""
        given = asdict(replace(self, write_samples=None))
        of_data = given.pop("wish")
        del given["started_at"], given["write_samples"]
        return {f"--{key.replace('_', '-')}": value for key, value in (given | of_data).items()}

    @property
    def begins_with(self) -> list[str]:
        """The flags that say how something begins: given once more they would begin it once more, or be refused."""
        given = {
            "--fresh": self.fresh,
            "--from-step": self.from_step is not None and self.anneal is None,
            "--init-from": self.init_from is not None,
            "--reset-epoch": self.wish.reset_epoch,
        }
        return [flag for flag, is_given in given.items() if is_given]


@dataclass(frozen=True)
class Found:
    """What a sitting begins with: the data, and where the run stands. All of it is checked, and the same on every rank."""

    cfg: RunConfig
    """With the vocabulary and the precision resolved."""
    world: World
    tokenizer: Tokenizer
    train_shards: dict[str, list[Shard]]
    val_shards: list[Shard]
    checkpoint: Checkpoint | None
    begins_fork: bool
    """The checkpoint is the trunk's: this run begins with it a history of its own."""
    at: Progress
    plan: BatchPlan
    refused: list[str]
    """Why files of ids that were changed since the run was trained on them are in no new phase."""

    def choose(self, wish: Wish) -> Ledger | str:
        """The ledger with a phase to train on, or why there is nothing to train. Collective. Raises UserError."""
        return self.world.together(lambda: self._chosen(wish))

    def _chosen(self, wish: Wish) -> Ledger | str:
        begins_phase = self.at.ledger.open_phase is None and (wish.only_new or wish.reset_epoch)
        if begins_phase and self.refused:
            raise LedgerError(self.refused[0])
        return choose_phase(self.at.ledger, self.train_shards, wish, self.cfg, self.at.step, self.plan.global_rows)


def find(cfg: RunConfig, world: World, options: Options, fork: Fork | None, lock: RunLock) -> Found:
    """Open the data and the newest checkpoint, and take the lock of a folder that is there. One that is not is not made yet."""
    tokenizer = world.together(lambda: load_tokenizer(cfg.tokenizer.tokenizer_path, cfg.tokenizer.tokenizer_type))
    world.refuse_differences(f"tokenizer.tokenizer_path {cfg.tokenizer.tokenizer_path}", tokenizer.fingerprint)
    cfg = cfg.model_copy(update={"model": world.together(lambda: cfg.model.with_vocab(tokenizer.vocab_size))})
    train_shards, val_shards = open_shards(cfg, tokenizer, world)
    world.on_rank_0(lambda: _take_over(cfg.run_folder, lock, options.steal_lock))
    step = options.from_step if fork is None else None
    own = None
    if not options.fresh:
        own = world.together(lambda: newest(world, cfg.run_folder, step, RESUMABLE))
    checkpoint = world.together(fork.open) if fork and own is None else own
    cfg = resolve_precision(cfg, world, checkpoint.manifest.config["engine"]["precision"] if checkpoint else None)
    if checkpoint:
        accepted = [*options.accept_change, *(CHANGED_BY_ANNEAL if own is None else ())]
        init_from = None if is_restarted() else options.init_from  # the launcher's words are those of the first start
        world.on_rank_0(lambda: _check_identity(checkpoint, cfg, tokenizer, init_from, accepted))  # once, and told once
    plan = world.together(lambda: batch_plan(cfg, world.size, checkpoint.manifest.global_rows if checkpoint else None))
    position = _position(checkpoint)
    train_shards, refused = settle_imports(train_shards, position.ledger, world)
    return Found(cfg, world, tokenizer, train_shards, val_shards, checkpoint, checkpoint is not own, position, plan, refused)


def _take_over(run: Path, lock: RunLock, by_force: bool) -> None:
    """The folder of a run, if it is there."""
    if folder.is_there(run):
        lock.take(by_force)
        folder.clean(run)


def make_folders(cfg: RunConfig, lock: RunLock, fresh: bool) -> None:
    """Make the run's folder ours to write in; with `fresh`, after what was there has gone aside."""
    log_owner.check(cfg)
    if fresh and folder.has_committed(cfg.run_folder):
        _move_aside(cfg, lock)
    looked_before = lock.owner is None  # for checkpoints, when the folder was not there to be locked
    try:
        cfg.run_folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        if looked_before and folder.entries(cfg.run_folder):
            raise LockError(f"{cfg.run_folder}: another job has begun this run in the meantime. Run again to go on from its checkpoint.")
        for path in (cfg.run_folder, cfg.log_folder):
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".tmp-probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        log_owner.sign(cfg)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or cfg.run_folder}: cannot be written ({error.strerror}). Checkpoints and logs go there: change "
            f"checkpoint.checkpoint_dir or log.out_dir, or the folder's permissions."
        ) from None


def _move_aside(cfg: RunConfig, lock: RunLock) -> None:
    suffix = f".before-{time.strftime('%Y%m%dT%H%M%S')}"
    aside = cfg.run_folder.with_name(cfg.run_folder.name + suffix)
    cfg.run_folder.rename(aside)
    lock.leave(aside)
    for imported in aside.glob("*.imported"):  # with data.save_bin=false: this sitting's data, found or made there a moment ago
        cfg.run_folder.mkdir(exist_ok=True)
        imported.rename(cfg.run_folder / imported.name)
    log.info(f"--fresh: the old run is now {aside}")
    if cfg.log_folder.is_dir():  # log.out_dir: beside the run, so it has not moved along
        logs = cfg.log_folder.with_name(cfg.log_folder.name + suffix)
        cfg.log_folder.rename(logs)
        log.info(f"--fresh: its logs are now {logs}")


def open_rank_log(cfg: RunConfig, rank: int) -> None:
    """Have what this rank and its libraries say in a file of the run's logs."""
    path = cfg.log_folder / f"rank-{rank}.log"
    try:
        cfg.log_folder.mkdir(parents=True, exist_ok=True)  # of this host, where the folder is not one that all share
        route_output(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: rank {rank} on host {socket.gethostname()} cannot write its log there ({error.strerror}). Change log.out_dir, or "
            f"the folder's permissions."
        ) from None


def _check_identity(checkpoint: Checkpoint, cfg: RunConfig, tokenizer: Tokenizer, init_from: str | None, accepted: list[str]) -> None:
    """Refuse to go on with another tokenizer, another model or settings that nobody has accepted."""
    saved = checkpoint.manifest.tokenizer_fingerprint
    if saved != tokenizer.fingerprint:
        raise CheckpointError(
            f"{cfg.tokenizer.tokenizer_path}: this is another tokenizer than the run's: fingerprint {tokenizer.fingerprint[:16]}, the run "
            f"was trained with {saved[:16]}. That one lies in {checkpoint.folder / 'tokenizer'}; point tokenizer.tokenizer_path there, "
            f"or start another run with checkpoint.run_name=NAME."
        )
    if init_from:
        raise ConfigError(
            f"--init-from starts a new run, but {cfg.run_folder} has a checkpoint of step {checkpoint.manifest.step:,}. "
            f"Choose another checkpoint.run_name, or leave --init-from out to go on."
        )
    check_drift(checkpoint.manifest.config, cfg, accepted)


def _position(checkpoint: Checkpoint | None) -> Progress:
    """Where a checkpoint stands; the very beginning without one."""
    if checkpoint is None:
        return Progress(step=0, tokens_seen=0, ledger=Ledger(()), chain="")
    manifest = checkpoint.manifest
    return Progress(
        manifest.step,
        manifest.tokens_seen,
        Ledger.from_json(manifest.ledger),
        manifest.chain,
        manifest.engine["optimizer_step"],
        dict(manifest.metrics),
        recent={key: list(values) for key, values in manifest.recent.items()},
    )


def build_loaded_engine(cfg: RunConfig, world: World, checkpoint: Checkpoint | None, source: Checkpoint | None) -> Engine:
    """Model and engine with the checkpoint's state in them, verified by its state hash."""
    model = build_model(cfg.model, cfg.train.seed)
    if source:
        world.together(lambda: _copy_weights(source, model))
    engine = world.together(lambda: build_engine(cfg, world, model))
    if checkpoint is None:
        return engine
    engine.load_slices(checkpoint.reader)
    engine.load_state(checkpoint.manifest.engine)
    (loaded,) = world.sum_ints([state_hash(engine.local_slices())])
    if loaded != checkpoint.manifest.state_hash:
        raise CheckpointError(
            f"{checkpoint.folder}: the state that was loaded has hash {loaded}, the checkpoint was saved with {checkpoint.manifest.state_hash}. "
            f"Its files are sound, so this is a fault of the program or of this machine's memory; nothing was changed."
        )
    rng = checkpoint.folder / f"rank-{world.rank:05d}-of-{world.size:05d}.json"
    world.together(lambda: load_rng_state(rng) if folder.is_there(rng) else None)
    return engine


def open_source(
    world: World, options: Options, cfg: RunConfig, tokenizer: Tokenizer
) -> Checkpoint | None:
    """The checkpoint that --init-from names, whose weights mean the same in this run's model.

    Collective; writes nothing. Raises UserError.
    """
    if options.init_from is None:
        return None
    source = world.together(lambda: _open_source(options.init_from, cfg, tokenizer))
    saved, accepted = source.manifest.config, options.accept_change
    world.on_rank_0(lambda: check_source(source.folder, saved, cfg, accepted))  # and told once
    world.together(lambda: _check_shapes(source, cfg))
    return source


def _open_source(init_from: str, cfg: RunConfig, tokenizer: Tokenizer) -> Checkpoint:
    source = open_checkpoint(init_from)
    if source.folder.resolve().is_relative_to(cfg.run_folder.resolve()):
        raise ConfigError(f"--init-from {init_from} is the run that --fresh moves aside. Choose another checkpoint.run_name for the new one.")
    theirs = source.manifest.tokenizer_fingerprint
    if theirs != tokenizer.fingerprint:
        raise CheckpointError(
            f"{source.folder}: was trained with tokenizer {theirs[:16]}, this run uses {tokenizer.fingerprint[:16]}, and its weights mean "
            f"nothing for other ids. Set tokenizer.tokenizer_path={source.folder / 'tokenizer'}."
        )
    return source


def _check_shapes(source: Checkpoint, cfg: RunConfig) -> None:
    here, there = dict(parameter_shapes(cfg.model)), dict(source.manifest.shapes)
    if here != there:
        odd = [f"{n}: {there.get(n)} there, {here.get(n)} here" for n in sorted({*here, *there}) if there.get(n) != here.get(n)]
        raise CheckpointError(f"{source.folder}: its model has other dimensions ({'; '.join(odd[:3])}). Use the same model section.")


def _copy_weights(source: Checkpoint, model: nn.Module) -> None:
    """Weights alone: a new run has its own moments and ledger."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(source.reader.read_full(name))
    log.info(f"weights from {source.folder}")
