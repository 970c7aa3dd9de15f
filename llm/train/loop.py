"""The training loop: one step is agreed, taken, booked; everything a reader needs to follow it is on this page."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import DEBUG, ERROR, WARNING
from typing import TYPE_CHECKING, TypeVar

from llm.batch_plan import BatchPlan
from llm.checkpoint.saver import Fenced, SaveFailed
from llm.config import RunConfig, interval_steps
from llm.data.ledger import Ledger
from llm.data.stream import Batch, Stream, chain, count_targets, count_tokens, step_digest
from llm.dist import World
from llm.engine.attention_kernel import leave_cudnn
from llm.engine.process import collect_garbage
from llm.engine.protocol import Engine, Update
from llm.log import log
from llm.train.budget import Horizon, Sitting, horizon
from llm.train.exits import NeedsAPerson
from llm.train.faults import StopFlag
from llm.train.fit import train_step
from llm.train.guard import Recent, SpikeGuard, refused_in_a_row
from llm.train.metrics import Metrics, StepRecord
from llm.train.schedule import lr_at
from llm.train.stragglers import Stragglers
from llm.train.watchdog import Watchdog

if TYPE_CHECKING:
    from llm.train.keeper import Keeper

Result = TypeVar("Result")
REFUSED_IN_A_ROW = 3
FAILED_SAVES_IN_A_ROW = 3
NO_TARGETS = "no token of its rows carries loss"

_ADVICE_ON_REFUSALS = (
    "Lower train.lr (with --accept-change train.lr), or look at the data of these steps: tools/ledger.py skipped names what was skipped "
    "before. If the loss has rightly reached another level, train.spike_sigma=0 (with --accept-change train.spike_sigma) takes it as it is."
)
_ADVICE_ON_NORMS = (
    "The update has been applied, clipped to train.clip_norm if that is set. Should the loss not come back: --from-step {saved_step} goes on "
    "from the newest checkpoint before it, with a lower train.lr, for the same data come in the same order."
)


@dataclass
class Progress:
    """Where the run stands after its last applied update; a checkpoint holds exactly this and the engine's state."""

    step: int
    tokens_seen: int
    ledger: Ledger
    chain: str
    updates: int = 0
    """Applied ones: the optimizer's own count."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    recent: Recent = field(default_factory=dict)
    epoch_end: bool = False


@dataclass(frozen=True)
class Ready:
    """What a sitting trains with, on this rank."""

    cfg: RunConfig
    plan: BatchPlan
    world: World
    engine: Engine
    keeper: "Keeper"
    metrics: Metrics
    sitting: Sitting
    stop: StopFlag
    watchdog: Watchdog
    validate: Callable[[], dict[str, float]] | None
    measure: Callable[[], dict[str, float]] | None


def train_phase(ready: Ready, stream: Stream, at: Progress) -> str:
    """Train on the open phase until it, the budget or the sitting ends; returns why it stopped. Collective. `at` moves along.

    Samples are drawn by position alone: step t takes draws [consumed, consumed + global_rows) of the phase, however many ranks there are.
    """
    cfg, plan, world, engine, keeper, metrics, sitting = ready.cfg, ready.plan, ready.world, ready.engine, ready.keeper, ready.metrics, ready.sitting
    stop, watchdog = ready.stop, ready.watchdog
    validate = ready.validate and watchdog.during("validation", ready.validate)
    measure = ready.measure and watchdog.during("evaluation", ready.measure)
    phase = at.ledger.open_phase
    over = horizon(cfg, phase, plan.global_rows, at.step)
    intervals = cfg.checkpoint.save_every, cfg.train.eval_every, cfg.eval.every
    save_every, eval_every, tasks_every = (interval_steps(interval, over.length) for interval in intervals)
    saves_best = never_meet(save_every, eval_every, over)  # else nothing for keep_best to choose
    saved_step, failed_saves, why = at.step, 0, None
    problem: Exception | None = None
    refused = refused_in_a_row([s.step for s in phase.skipped if s.reason != NO_TARGETS], at.step)
    if not phase.consumed:
        at.recent.clear()  # what was usual for other data says nothing about these
    guard = SpikeGuard(cfg.train.spike_sigma, cfg.train.spike_window, at.recent)
    stragglers = Stragglers(world, cfg.log.log_every, metrics)

    def tell(level: int, text: str) -> None:
        """Once, for all ranks know the same."""
        log.log(level if world.rank == 0 else DEBUG, text)

    def attempt(part: Callable[[], int | None]) -> None:
        """Do a part of a save. It returns the step that is in a checkpoint now, or None when its files are still being written."""
        nonlocal saved_step, failed_saves
        started_at = time.monotonic()
        try:
            step = watchdog.during("saving", part)()
            if step is not None:
                saved_step, failed_saves = step, 0
                alone(metrics.seen, step, keeper.view)
        except Fenced as error:
            raise NeedsAPerson(f"The {error}. The last one is of step {saved_step:,}.") from None
        except SaveFailed as error:
            failed_saves += 1
            tell(ERROR, f"The {error}. Older ones are untouched; training goes on.")
            if failed_saves == FAILED_SAVES_IN_A_ROW:
                raise NeedsAPerson(f"{failed_saves} checkpoints in a row could not be saved. The {error}. {error.advice}") from None
        took_s = time.monotonic() - started_at
        sitting.saving_s += took_s
        # at the end one may still be on its way, and another has to follow
        sitting.slowest_save_s = max(sitting.slowest_save_s, took_s, 2 * keeper.write_s)

    def alone(work: Callable[..., Result], *args) -> Result | None:
        """Do what this rank does by itself. An error waits for the next boundary, where all ranks save and stop for it."""
        nonlocal problem
        try:
            return work(*args)
        except Exception as error:
            problem = problem or error

    def is_due(every: int) -> bool:
        return every > 0 and at.step % every == 0

    def save_now(wait: bool) -> None:
        attempt(keeper.finish)  # one at a time
        attempt(lambda: keeper.save(at, wait))

    while True:
        watchdog.step_boundary(at.step)
        alone(metrics.profiler.before, at.step + 1)
        started_at, saved_for_s = time.perf_counter(), sitting.saving_s
        drawn = at.ledger.open_phase.consumed
        batches = alone(stream.step, drawn) or []  # a damaged shard, say, is known to all before any of them computes
        data_wait_s = time.perf_counter() - started_at
        wants_stop = bool(stop) or (world.rank == 0 and sitting.over() is not None)  # one clock decides
        counts = alone(counts_of, batches) or [0, 0, 0]
        states = [int(wants_stop), int(problem is not None), int(keeper.written)]
        summed = world.sum_ints([*counts, *states, *stragglers.numbers()])
        n_targets, n_tokens, digest, stops, problems, ranks_written, *times = summed
        if times:
            alone(stragglers.judge, at.step, times)
        if ranks_written == world.size:
            attempt(keeper.finish)
        if stops or problems:
            break

        if n_targets:
            rate = lr_at(cfg.train, over, at.step)
            update = train_step(engine, stream, world, drawn, batches, n_targets, rate, lambda loss: guard.why_not(loss) is None)
            why = None if update.applied else guard.why_not(update.loss) or "a gradient was not finite on some rank (limit: any finite number)"
            refused = refused + 1 if why else 0
        else:  # a step of somebody's questions alone, where rows are few and short
            update, why = Update(math.nan, math.nan, applied=False), NO_TARGETS
        if why:
            tell(ERROR, f"step {at.step + 1:,}: {why}, so the update was not applied on any rank; its samples are noted as skipped.")
            alone(metrics.fault, at.step + 1, "skipped", why)
            is_spike = math.isfinite(update.loss) and guard.why_not(update.loss) is not None
            if refused >= REFUSED_IN_A_ROW and not is_spike and any(world.gather(leave_cudnn(cfg, world.device))):
                tell(WARNING, f"{refused} updates in a row were not finite: attention goes on with other kernels than cuDNN's.")
                refused = 0
            if refused >= REFUSED_IN_A_ROW:
                break
        rows = min(plan.global_rows, phase.total - drawn)
        at.ledger = at.ledger.advance(rows, at.step + 1, why)
        at.chain = chain(at.chain, digest)
        at.step, at.updates = at.step + 1, at.updates + update.applied
        at.tokens_seen += n_targets * update.applied
        sitting.count_step(n_targets * update.applied)
        seconds = time.perf_counter() - started_at - (sitting.saving_s - saved_for_s)
        alone(metrics.profiler.after, at.step)
        stragglers.add(engine.forward_clock.take(), data_wait_s, seconds)
        if update.applied:
            record = StepRecord(update.loss, rate, update.grad_norm, n_targets, n_tokens, seconds, data_wait_s)
            alone(metrics.step, at.step, at.ledger, record)
            at.metrics["train_loss"] = update.loss
            if odd := guard.applied(update.loss, update.grad_norm):
                tell(WARNING, f"step {at.step:,}: {odd}. {_ADVICE_ON_NORMS.format(saved_step=saved_step)}")
                alone(metrics.fault, at.step, "grad_norm_spike", odd)

        collect_garbage(at.step)
        at.epoch_end = phase.passes(drawn + rows) > phase.passes(drawn)
        done = at.ledger.open_phase is None or at.step == over.end
        if measure and (done or is_due(tasks_every)):
            measured = sitting.validation(measure)
            alone(metrics.tasks, at.step, measured)
        at.metrics.pop("val_loss", None)  # retention compares checkpoints by it: an old value must not stand for new weights
        if validate and (done or is_due(eval_every)):
            result = sitting.validation(validate)
            alone(metrics.validation, at.step, result)
            at.metrics |= {"val_loss": result["loss"] if math.isfinite(result["loss"]) else None, "val_step": float(at.step)}
        is_best = saves_best and keeper.is_among_best(at.metrics.get("val_loss"))
        if done or at.epoch_end or is_due(save_every) or is_best:
            save_now(wait=done)
        if done:
            break

    attempt(keeper.finish)
    if at.step > saved_step and refused < REFUSED_IN_A_ROW:
        save_now(wait=True)
    world.together(lambda: reraise(problem))
    if refused >= REFUSED_IN_A_ROW:
        raise NeedsAPerson(
            f"{refused} updates in a row were refused, the last at step {at.step + 1:,}: {why}. Nothing was saved since step {saved_step:,}. "
            f"{_ADVICE_ON_REFUSALS}"
        )
    if at.step > saved_step:
        raise NeedsAPerson(
            f"Steps {saved_step + 1:,} to {at.step:,} are in no checkpoint. Fix the cause above and run again: training resumes from "
            f"step {saved_step:,}."
        )
    if at.ledger.open_phase is None:
        return "phase finished"
    if at.step == over.end:
        return "budget spent"
    asked = next((name for name in world.gather(stop.signal_name) if name), None)
    return asked or world.broadcast(sitting.over())


def never_meet(save_every: int, eval_every: int, over: Horizon) -> bool:
    """Whether no step up to the end is both validated and saved, though some are either."""
    if not save_every or not eval_every:
        return False
    both = math.lcm(save_every, eval_every)
    return over.end // both == over.start // both


def counts_of(batches: list[Batch]) -> list[int]:
    """Targets that count, tokens of text, and the digest of what is fed: to be summed over ranks."""
    return [count_targets(batches), count_tokens(batches), step_digest(batches)]


def reraise(problem: Exception | None) -> None:
    if problem:
        raise problem
