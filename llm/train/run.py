"""A sitting from start to end: open the data, find where the run stands, build model and engine, train phase after phase, tell what happened."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.lock import LockError, RunLock
from llm.checkpoint.resume import Checkpoint, newest
from llm.checkpoint.saver import SaveFailed
from llm.config import BatchPlan, ConfigError, RunConfig, batch_plan
from llm.data.ledger import Ledger
from llm.data.sampler import Sampler
from llm.data.seen import seen_view
from llm.data.shards import Shard
from llm.data.stream import Stream, eval_batches
from llm.dist import World
from llm.engine import Engine, process
from llm.engine.attention_kernel import attention_kernel, kernels_in_order
from llm.engine.protocol import autocast
from llm.log import log, result, route_output
from llm.model.flops import count_params, flops_per_token, peak_flops
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.train.anneal import CHANGED_BY_ANNEAL, Fork, find_fork
from llm.train.budget import Sitting, horizon
from llm.train.datasets import DatasetTokens, open_shards, pool
from llm.train.exits import ExitNote
from llm.train.faults import StopFlag
from llm.train.fit import fitted
from llm.train.keeper import Keeper, write_view
from llm.train.loop import Progress, train_phase
from llm.train.metrics import Metrics
from llm.train.phases import Wish, choose_phase, row_cut
from llm.train.probe import ACCEPT, Probe, probe_shards
from llm.train.start import build_loaded_engine, check_identity, open_source, position
from llm.train.starts import note_start
from llm.train.summary import tell_sitting
from llm.train.template import run_template
from llm.train.validate import reading_copy, token_byte_lengths, validate
from llm.train.watchdog import Watchdog

Measure = Callable[[Transformer, Tokenizer, World], dict[str, float]]
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
    restarted: bool = False
    """By the launcher, with the words of the first start: what these asked to begin may have begun."""
    write_samples: WriteSamples | None = None
    """Prompt -> what the model writes after it; asked on rank 0 after each validation."""


def train(cfg: RunConfig, world: World, options: Options, measure: Measure | None = None) -> None:
    """Train for one sitting. Collective. Raises UserError, the same on every rank.

    `measure`: what eval.every lets pass over the model, as a collective; it gives the same {"TASK/METRIC": value} on every rank.
    """
    sitting = world.together(lambda: Sitting(options.started_at, options.steps_today, options.minutes_today, options.tokens_today))
    run_cfg = cfg
    fork = find_fork(world, run_cfg, options.anneal, options.from_step) if options.anneal else None
    cfg = fork.config(run_cfg) if fork else run_cfg
    stop, lock, note = StopFlag(world.rank), RunLock(cfg.run_folder), ExitNote(cfg.log_folder, world)
    watchdog = Watchdog(cfg.train.hang_timeout_s, world.rank, note.write)
    try:
        with process.settled(world.device, cfg.engine.keep_memory), kernels_in_order(world.device):
            _train(cfg, world, options, measure, fork, sitting, stop, lock, note, watchdog)
    except Exception as error:
        if lost := note.failed(error):
            raise lost from error
        raise
    finally:
        watchdog.close()
        lock.release()
        stop.restore()


def _train(
    cfg: RunConfig,
    world: World,
    options: Options,
    measure: Measure | None,
    fork: Fork | None,
    sitting: Sitting,
    stop: StopFlag,
    lock: RunLock,
    note: ExitNote,
    watchdog: Watchdog,
) -> None:
    tokenizer = world.together(lambda: load_tokenizer(cfg.tokenizer.tokenizer_path, cfg.tokenizer.tokenizer_type))
    model_config = world.together(lambda: cfg.model.with_vocab(tokenizer.vocab_size))
    cfg = cfg.model_copy(update={"model": model_config})
    train_shards, val_shards = open_shards(cfg, tokenizer, world)

    # a folder that does not exist is not made yet: a mistake found below leaves nothing behind
    world.on_rank_0(lambda: _take_over(cfg.run_folder, lock, options.steal_lock) if cfg.run_folder.is_dir() else None)
    if options.fresh:
        world.on_rank_0(lambda: _move_aside(cfg.run_folder, lock))
        train_shards, val_shards = open_shards(cfg, tokenizer, world)  # again: data.save_bin=false keeps shards in the folder that was moved
    checkpoint = world.together(lambda: newest(world, cfg.run_folder, options.from_step if fork is None else None))
    begins = fork is not None and checkpoint is None
    checkpoint = world.together(fork.open) if begins else checkpoint
    if checkpoint:
        accepted = [*options.accept_change, *(CHANGED_BY_ANNEAL if begins else ())]
        world.together(lambda: check_identity(checkpoint, cfg, tokenizer, None if options.restarted else options.init_from, accepted))
    at = position(checkpoint)
    plan = world.together(lambda: batch_plan(cfg, world.size, checkpoint.manifest.global_rows if checkpoint else None))

    def choose(wish: Wish) -> Ledger | str:
        return world.together(lambda: choose_phase(at.ledger, train_shards, wish, cfg, at.step, plan.global_rows))

    has_begun = options.restarted and at.ledger.open_phase is not None
    chosen = choose(replace(options.wish, reset_epoch=options.wish.reset_epoch and not has_begun))
    if isinstance(chosen, str):
        if checkpoint and not begins:  # whoever saved it may have been killed before it wrote this
            world.on_rank_0(lambda: write_view(cfg.run_folder, seen_view(at.ledger)))
        result(chosen)
        return
    if fork:
        world.together(lambda: fork.check_data(chosen, plan.global_rows, at.step))
    source = world.together(lambda: open_source(options.init_from, tokenizer) if checkpoint is None else None)
    template = world.together(lambda: run_template(train_shards, checkpoint, source, options.accept_change))
    world.on_rank_0(lambda: _make_folders(cfg, lock))
    route_output(cfg.log_folder / f"rank-{world.rank}.log")
    note.begin(at, options.retry_anyway)
    if not cfg.train.batch_tokens:  # the run's own global batch, which another number of ranks cuts otherwise
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"grad_accum": plan.accumulation})})
    engine = build_loaded_engine(cfg, world, checkpoint, source)
    if cfg.train.batch_size == "auto":
        plan = world.together(lambda: fitted(cfg, plan, world, engine))
    probe = Probe(cfg, plan, world, engine, probe_shards(pool(train_shards), chosen))
    if checkpoint:
        world.together(lambda: probe.check(checkpoint.manifest, ACCEPT in options.accept_change))
    keeper = Keeper(cfg, plan, world, engine, tokenizer, checkpoint, lock, probe, template, is_fork=begins)
    _introduce(cfg, plan, world, checkpoint, at, chosen, engine.no_varlen)
    metrics = _metrics(cfg, world, sitting, DatasetTokens(train_shards))
    world.on_rank_0(lambda: metrics.start(at.step, note_start(cfg, world, plan, at.step)))
    validator = _validator(cfg, plan, world, engine, tokenizer, val_shards)
    if validator and options.write_samples:
        validate_alone = validator

        def validator() -> dict[str, float]:
            values = validate_alone()
            if texts := _write_samples(cfg, world, engine, tokenizer, options.write_samples):
                metrics.samples(at.step, texts)
            return values

    validator = validator and watchdog.during("validation", validator)
    measurer = watchdog.during("evaluation", lambda: _measured(cfg, world, engine, tokenizer, measure)) if measure else None
    first_step = at.step
    try:
        while isinstance(chosen, Ledger):
            at.ledger = chosen
            metrics.end_step, metrics.run_end_step = _end_steps(cfg, plan, at, sitting)
            with closing(world.together(lambda: _stream(at.ledger, train_shards, plan, world))) as stream:
                reason = train_phase(cfg, plan, world, engine, stream, at, sitting, stop, metrics, validator, measurer, keeper, watchdog)
            again = reason == "phase finished" and options.wish.only_new
            chosen = choose(replace(options.wish, reset_epoch=False)) if again else reason
    except Exception:
        _save_after_error(world, engine, keeper, at)
        raise
    finally:
        keeper.close()
        metrics.close()
    if world.rank == 0:
        tell_sitting(cfg, at, sitting, metrics, first_step, chosen, plan.global_rows)
    note.ended(chosen)


def _take_over(run: Path, lock: RunLock, by_force: bool) -> None:
    lock.take(by_force)
    folder.clean(run)


def _move_aside(run: Path, lock: RunLock) -> None:
    if folder.has_committed(run):
        aside = run.with_name(f"{run.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        run.rename(aside)
        lock.leave(aside)
        log.info(f"--fresh: the old run is now {aside}")


def _make_folders(cfg: RunConfig, lock: RunLock) -> None:
    looked_before = lock.owner is None  # for checkpoints, when the folder was not there to be locked
    probe = cfg.run_folder / ".tmp-probe"
    try:
        cfg.run_folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        if looked_before and folder.entries(cfg.run_folder):
            raise LockError(f"{cfg.run_folder}: another job has begun this run in the meantime. Run again to go on from its checkpoint.")
        cfg.log_folder.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or cfg.run_folder}: cannot be written ({error.strerror}). Checkpoints and logs go there: change "
            f"checkpoint.checkpoint_dir or log.out_dir, or the folder's permissions."
        ) from None


def _stream(ledger: Ledger, shards: dict[str, list[Shard]], plan: BatchPlan, world: World) -> Stream:
    sampler = Sampler(ledger.open_phase, pool(shards))
    return Stream(sampler, plan.global_rows, world.rank, world.size, plan.micro_rows)


def _end_steps(cfg: RunConfig, plan: BatchPlan, at: Progress, sitting: Sitting) -> tuple[int, int]:
    """The steps at which this sitting and the run end at the latest, for the progress line."""
    phase = at.ledger.open_phase
    run_end = min(horizon(cfg, phase, plan.global_rows, at.step).end, at.step + -(-(phase.total - phase.consumed) // plan.global_rows))
    today_end = at.step - sitting.steps_done + sitting.steps if sitting.steps else run_end
    return min(today_end, run_end), run_end


def _metrics(cfg: RunConfig, world: World, sitting: Sitting, by_dataset: DatasetTokens) -> Metrics:
    peak = None
    if world.device.startswith("cuda"):
        import torch

        peak = peak_flops(torch.cuda.get_device_name(world.device))
    return Metrics(
        cfg,
        sitting,
        by_dataset,
        speaks=world.rank == 0,
        device=world.device,
        flops_per_token=flops_per_token(cfg.model),
        peak_flops=peak * world.size if peak else None,
    )


def _validator(
    cfg: RunConfig, plan: BatchPlan, world: World, engine: Engine, tokenizer: Tokenizer, val_shards: list[Shard]
) -> Callable[[], dict[str, float]] | None:
    if not val_shards:
        return None
    byte_lengths = token_byte_lengths(tokenizer, cfg.model.vocab_size)

    def batches():
        return eval_batches(val_shards, cfg.model.seq_len, plan.micro_rows, world.rank, world.size, cfg.train.eval_rows, **row_cut(cfg))

    return lambda: validate(engine, batches, byte_lengths, world)


def _write_samples(cfg: RunConfig, world: World, engine: Engine, tokenizer: Tokenizer, write: WriteSamples) -> dict[str, str]:
    model = reading_copy(cfg, engine, world.device)
    try:
        with autocast(cfg.engine.precision, world.device):
            return write(cfg, model, tokenizer) if world.rank == 0 else {}
    except Exception as error:  # on this rank alone, and no reason to end training
        log.warning(f"The sample texts could not be written ({type(error).__name__}: {error}). Training goes on.")
        return {}


def _measured(cfg: RunConfig, world: World, engine: Engine, tokenizer: Tokenizer, measure: Measure) -> dict[str, float]:
    with autocast(cfg.engine.precision, world.device):
        return measure(reading_copy(cfg, engine, world.device), tokenizer, world)


def _save_after_error(world: World, engine: Engine, keeper: Keeper, at: Progress) -> None:
    """Save what was trained before an exception, where that is safe: alone (no rank waits elsewhere) and between two updates."""
    if world.size > 1 or engine.state()["optimizer_step"] != at.updates:
        return
    for part in (keeper.finish, lambda: keeper.save(at) if at.step > keeper.saved_step else None):
        try:
            part()
        except SaveFailed as failure:  # told, but the exception that brought us here is what the person must see
            log.error(f"The {failure}.")


def _introduce(
    cfg: RunConfig, plan: BatchPlan, world: World, checkpoint: Checkpoint | None, at: Progress, ledger: Ledger, no_varlen: str | None
) -> None:
    if world.rank:
        return
    phase, engine = ledger.open_phase, cfg.engine
    kind = f"ZeRO-{engine.zero_stage}" if engine.zero_stage else "torch" + (", DDP" if world.size > 1 else "")
    verb = "resumes" if checkpoint and checkpoint.folder.parent == cfg.run_folder else "forks"
    start = f"{verb} {checkpoint.folder} (saved on {checkpoint.manifest.world_size} ranks)" if checkpoint else "starts"
    size = f"{count_params(cfg.model):,} parameters"
    log.info(f"{cfg.checkpoint.run_name} {start} at step {at.step:,}: {size}, {kind}, {engine.precision}, {world.device}")
    log.info(f"batch: {plan}")
    kernel = attention_kernel(cfg.model, engine.precision, world.device, cfg.data.document_mask, no_varlen)
    log.info(f"attention: {kernel}; {'compiled' if engine.compile else 'not compiled (engine.compile)'}")
    cut = f" packed ({phase.padding:.1%} padding)" if phase.packing else ""
    log.info(
        f"phase {phase.name}: {phase.samples:,} samples{cut} x {phase.epochs} epochs from {len(phase.shards)} shards, {phase.consumed:,} consumed; "
        f"the schedule runs to step {horizon(cfg, phase, plan.global_rows, at.step).end:,}"
    )
