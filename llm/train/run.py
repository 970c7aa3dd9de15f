"""A sitting from start to end: open the data, find where the run stands, build model and engine, train phase after phase, tell what happened."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from llm import dist
from llm.batch_plan import BatchPlan
from llm.checkpoint.hashes import file_sha256
from llm.checkpoint.lock import RunLock
from llm.checkpoint.manifest import NAME
from llm.checkpoint.resume import Checkpoint
from llm.checkpoint.saver import SaveFailed
from llm.config import RunConfig
from llm.data.ledger import Ledger
from llm.data.sampler import Sampler
from llm.data.seen import seen_view
from llm.data.shards import Shard
from llm.data.stream import Stream, eval_batches
from llm.dist import World, is_lost_rank, is_restarted
from llm.engine import Engine, process
from llm.engine.attention_kernel import attention_kernel, training_kernels
from llm.engine.protocol import autocast
from llm.log import log, result
from llm.model.flops import count_params
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer
from llm.train.anneal import Fork, find_fork
from llm.train.budget import Sitting, horizon
from llm.train.datasets import DatasetTokens, pool
from llm.train.drift import check_same
from llm.train.exits import ExitNote, NeedsAPerson
from llm.train.faults import StopFlag
from llm.train.fit import fitted
from llm.train.keeper import Keeper, write_view
from llm.train.loop import Progress, Ready, reraise, train_phase
from llm.train.metrics import Metrics
from llm.train.phases import for_the_next_phase, row_cut
from llm.train.probe import ACCEPT, Probe, probe_shards
from llm.train.start import Found, Options, WriteSamples, build_loaded_engine, find, make_folders, open_rank_log, open_source
from llm.train.starts import note_start
from llm.train.summary import tell_sitting
from llm.train.template import run_template
from llm.train.validate import measure_digest, reading_copy, token_byte_lengths, validate
from llm.train.watchdog import Watchdog, collective_timeout_s

Measure = Callable[[Transformer, Tokenizer, World], dict[str, float]]
ReadTasks = Callable[[RunConfig, World], Measure | None]


def train(cfg: RunConfig, world: World, options: Options, read_tasks: ReadTasks | None = None) -> None:
    """Train for one sitting. Collective. Raises UserError, the same on every rank.

    `read_tasks`: what gives, as a collective, what eval.every lets pass over the model. That is a collective as well, and gives the
    same {"TASK/METRIC": value} on every rank.
    """
    check_same(world, cfg, options.asked)
    dist.set_timeout(collective_timeout_s(cfg.train.hang_timeout_s))
    measure = read_tasks(cfg, world) if read_tasks else None
    sitting = world.together(lambda: Sitting(options.started_at, options.steps_today, options.minutes_today, options.tokens_today))
    fork = find_fork(world, cfg, options.anneal, options.from_step) if options.anneal else None
    cfg = fork.config(cfg) if fork else cfg
    world.together(lambda: _refuse_to_begin_again(options))
    with _guarded(cfg, world) as guards:
        found = find(cfg, world, options, fork, guards.lock)
        has_begun = is_restarted() and found.at.ledger.open_phase is not None
        chosen = found.choose(replace(options.wish, reset_epoch=options.wish.reset_epoch and not has_begun))
        if isinstance(chosen, str):
            if found.checkpoint and not found.begins_fork:  # whoever saved it may have been killed before it wrote this
                world.on_rank_0(lambda: write_view(cfg.run_folder, seen_view(found.at.ledger)))
            result(chosen)
            return
        ready = _prepare(found, chosen, options, measure, fork, sitting, guards)
        guards.note.ended(_train(found, chosen, options, ready))


def _refuse_to_begin_again(options: Options) -> None:
    """A launcher starts its ranks anew with the very words of the first time, when what they had begun is to go on. --init-from and --reset-epoch
    then begin nothing; these two would undo it."""
    if is_restarted() and (again := {"--fresh", "--from-step"}.intersection(options.begins_with)):
        flag = min(again)
        raise NeedsAPerson(f"{flag}: this is a restart, and it would begin where the first start began. Start again without {flag} to go on.")


@dataclass(frozen=True)
class Guards:
    """What stands around a sitting, whatever happens in it."""

    stop: StopFlag
    lock: RunLock
    note: ExitNote
    watchdog: Watchdog


@contextmanager
def _guarded(cfg: RunConfig, world: World) -> Iterator[Guards]:
    stop, lock, note = StopFlag(world.rank), RunLock(cfg.run_folder), ExitNote(cfg, world)
    watchdog = Watchdog(cfg.train.hang_timeout_s, world.rank, note.hung)
    if world.failures:
        world.failures.before_leaving = lock.release
    try:
        with process.settled(world.device, cfg.engine.keep_memory), training_kernels(cfg.model, cfg.data.document_mask):
            yield Guards(stop, lock, note, watchdog)
    except Exception as error:
        if cause := note.failed(error):
            raise cause from error
        raise
    finally:
        note.close()
        watchdog.close()
        lock.release()
        stop.restore()


def _train(found: Found, ledger: Ledger, options: Options, ready: Ready) -> str:
    """The open phase, and with --only-new those that follow it; then tell what was done. Returns why it ended."""
    at, first_step, why = found.at, found.at.step, None
    try:
        while why is None:
            at.ledger = ledger
            ready.metrics.end_step, ready.metrics.run_end_step = _end_steps(ready, at)
            with closing(ready.world.together(lambda: _stream(at.ledger, found.train_shards, ready.plan, ready.world))) as stream:
                why = train_phase(ready, stream, at)
            if why == "phase finished" and options.wish.only_new:
                chosen = found.choose(replace(options.wish, reset_epoch=False))
                ledger, why = (chosen, None) if isinstance(chosen, Ledger) else (ledger, chosen)
    except NeedsAPerson as error:  # the loop has saved what may be saved
        problem = error
        ready.world.together(lambda: reraise(problem))  # all ranks have it, and one tells it
    except Exception as error:
        save_after_error(ready, at, error)
        raise
    finally:
        ready.keeper.close()
        ready.metrics.close()
    if ready.world.rank == 0:
        tell_sitting(ready.cfg, at, ready.sitting, ready.metrics, first_step, why, ready.plan.global_rows, options.begins_with)
    return why


def _prepare(found: Found, ledger: Ledger, options: Options, measure: Measure | None, fork: Fork | None, sitting: Sitting, guards: Guards) -> Ready:
    """Check what is left to check, then begin to write: folders, logs, the model in its engine with the checkpoint's state in it."""
    cfg, world, at, plan, checkpoint, tokenizer = found.cfg, found.world, found.at, found.plan, found.checkpoint, found.tokenizer
    if fork:
        world.together(lambda: fork.check_data(ledger, plan.global_rows, at.step))
    source = open_source(world, options, cfg, tokenizer) if checkpoint is None else None
    world.refuse_differences(f"--init-from {options.init_from}", file_sha256(source.folder / NAME) if source else "")
    template = world.together(lambda: run_template(found.train_shards, checkpoint, source, options.accept_change))
    world.refuse_differences("data.data_path, the template of its conversations", json.dumps(template, sort_keys=True))

    world.on_rank_0(lambda: make_folders(cfg, guards.lock, options.fresh))
    world.together(lambda: open_rank_log(cfg, world.rank))
    guards.note.begin(at, options.retry_anyway)

    if not cfg.train.batch_tokens:  # the run's own global batch, which another number of ranks cuts otherwise
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"grad_accum": plan.accumulation})})
    engine = build_loaded_engine(cfg, world, checkpoint, source)
    dist.set_timeout(collective_timeout_s(cfg.train.hang_timeout_s))  # of the groups that the engine has made
    if cfg.train.batch_size == "auto":
        plan = world.together(lambda: fitted(cfg, plan, world, engine))
    probe = Probe(cfg, plan, world, engine, probe_shards(pool(found.train_shards), ledger))
    if checkpoint:
        world.together(lambda: probe.check(checkpoint.manifest, ACCEPT in options.accept_change))
    measure_of = measure_digest(found.val_shards, cfg)
    keeper = Keeper(
        cfg, plan, world, engine, tokenizer, checkpoint, guards.lock, probe, template, measure_of,
        is_fork=found.begins_fork, source=source,
    )  # fmt: skip
    _introduce(cfg, plan, world, checkpoint, at, ledger, engine.no_varlen)

    metrics = Metrics(cfg, world, sitting, DatasetTokens(found.train_shards))
    world.on_rank_0(lambda: metrics.start(at.step, note_start(cfg, world, plan, at.step)))
    validator = _validator(found, cfg, plan, engine, metrics, options.write_samples)
    measurer = (lambda: _measured(cfg, world, engine, tokenizer, measure)) if measure else None
    return Ready(cfg, plan, world, engine, keeper, metrics, sitting, guards.stop, guards.watchdog, validator, measurer)


def _stream(ledger: Ledger, shards: dict[str, list[Shard]], plan: BatchPlan, world: World) -> Stream:
    sampler = Sampler(ledger.open_phase, pool(shards))
    return Stream(sampler, plan.global_rows, world.rank, world.size, plan.micro_rows)


def _end_steps(ready: Ready, at: Progress) -> tuple[int, int]:
    """The steps at which this sitting and the run end at the latest, for the progress line."""
    phase, rows, sitting = at.ledger.open_phase, ready.plan.global_rows, ready.sitting
    run_end = min(horizon(ready.cfg, phase, rows, at.step).end, at.step + -(-(phase.total - phase.consumed) // rows))
    today_end = at.step - sitting.steps_done + sitting.steps if sitting.steps else run_end
    return min(today_end, run_end), run_end


def _validator(
    found: Found, cfg: RunConfig, plan: BatchPlan, engine: Engine, metrics: Metrics, write_samples: WriteSamples | None
) -> Callable[[], dict[str, float]] | None:
    """What measures the validation loss and shows samples beside it; None without validation data."""
    if not found.val_shards:
        return None
    world, byte_lengths = found.world, token_byte_lengths(found.tokenizer, cfg.model.vocab_size)

    def batches():
        return eval_batches(found.val_shards, cfg.model.seq_len, plan.micro_rows, world.rank, world.size, cfg.train.eval_rows, **row_cut(cfg))

    def validated() -> dict[str, float]:
        values = validate(engine, batches, byte_lengths, world)
        if write_samples and (texts := _write_samples(cfg, world, engine, found.tokenizer, write_samples)):
            metrics.samples(found.at.step, texts)
        return values

    return validated


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


def save_after_error(ready: Ready, at: Progress, error: Exception) -> None:
    """Save what was trained before an exception, or say why not. Raises nothing.

    It can be saved between two updates, where no rank waits elsewhere: alone, or when all ranks raise at one place.
    """
    keeper = ready.keeper
    if ready.world.size > 1 and not getattr(error, "is_shared", False):
        why = "the other ranks wait for this one within a step"
    elif ready.engine.state()["optimizer_step"] != at.updates:
        why = "it came while an update was applied"
    else:
        why = None
        for part in (keeper.finish, lambda: keeper.save(at) if at.step > keeper.saved_step else None):
            try:
                part()
            except SaveFailed as failure:  # told, but the exception that brought us here is what the person must see
                why = str(failure)
            except Exception as failure:
                why = f"{type(failure).__name__}: {failure}"
    if why and at.step >= keeper.saved_step and not is_lost_rank(error):
        log.error(
            f"Nothing could be saved after an error at step {at.step:,}: {why}. The newest checkpoint is of step "
            f"{keeper.saved_step:,}; what came after it is trained again."
        )


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
    layers = cfg.model.n_layers
    again = f"; {len(engine.recomputed_blocks(layers))} of {layers} blocks recomputed" if engine.activation_checkpointing else ""
    log.info(f"attention: {kernel}; {'compiled' if engine.compile else 'not compiled (engine.compile)'}{again}")
    cut = f" packed ({phase.padding:.1%} padding)" if phase.packing else ""
    kept = "".join(f" ({setting} is for the next phase)" for setting in for_the_next_phase(phase, cfg))
    log.info(
        f"phase {phase.name}: {phase.samples:,} samples{cut} x {phase.epochs} epochs{kept} from {len(phase.shards)} shards, {phase.consumed:,} "
        f"consumed; the schedule runs to step {horizon(cfg, phase, plan.global_rows, at.step).end:,}"
    )
