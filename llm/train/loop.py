"""The training loop: one step is agreed, taken, booked; everything a reader needs to follow it is on this page."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm.checkpoint.saver import Fenced, SaveFailed
from llm.config import BatchPlan, RunConfig, interval_steps
from llm.data.ledger import Ledger
from llm.data.stream import Stream, chain, count_targets, step_digest
from llm.dist import World
from llm.engine.protocol import Engine, Update
from llm.log import UserError, log
from llm.train.budget import Sitting, horizon
from llm.train.exits import NeedsAPerson
from llm.train.faults import StopFlag
from llm.train.metrics import Metrics
from llm.train.schedule import lr_at
from llm.train.watchdog import Watchdog

if TYPE_CHECKING:
    from llm.train.keeper import Keeper

REFUSED_IN_A_ROW = 3
FAILED_SAVES_IN_A_ROW = 3


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
    epoch_end: bool = False


def train_phase(
    cfg: RunConfig,
    plan: BatchPlan,
    world: World,
    engine: Engine,
    stream: Stream,
    at: Progress,
    sitting: Sitting,
    stop: StopFlag,
    metrics: Metrics,
    validate: Callable[[], dict[str, float]] | None,
    keeper: "Keeper",
    watchdog: Watchdog,
) -> str:
    """Train on the open phase until it, the budget or the sitting ends; returns why it stopped. Collective. `at` moves along.

    Samples are drawn by position alone: step t takes draws [consumed, consumed + global_rows) of the phase, however many ranks there are.
    """
    phase = at.ledger.open_phase
    over = horizon(cfg, phase, plan.global_rows, at.step)
    save_every, eval_every = (interval_steps(i, over.length) for i in (cfg.checkpoint.save_every, cfg.train.eval_every))
    saved_step, refused, failed_saves = at.step, 0, 0

    def attempt(part: Callable[[], int | None]) -> None:
        """Do a part of a save. It returns the step that is in a checkpoint now, or None when its files are still being written."""
        nonlocal saved_step, failed_saves
        started_at = time.monotonic()
        try:
            step = watchdog.during("saving", part)()
            if step is not None:
                saved_step, failed_saves = step, 0
        except Fenced as error:
            raise NeedsAPerson(f"The {error}. The last one is of step {saved_step:,}.") from None
        except SaveFailed as error:
            failed_saves += 1
            log.error(f"The {error}. Older ones are untouched; training goes on.")
            if failed_saves == FAILED_SAVES_IN_A_ROW:
                raise NeedsAPerson(f"{failed_saves} checkpoints in a row could not be saved. The {error}. {error.advice}") from None
        # at the end one may still be on its way, and another has to follow
        sitting.slowest_save_s = max(sitting.slowest_save_s, time.monotonic() - started_at, 2 * keeper.write_s)

    def save_now(wait: bool) -> None:
        attempt(keeper.finish)  # one at a time
        attempt(lambda: keeper.save(at, wait))

    def accept(loss: float) -> bool:
        return math.isfinite(loss)

    while True:
        watchdog.step_boundary(at.step)
        started_at = time.perf_counter()
        drawn, problem = at.ledger.open_phase.consumed, None
        try:
            batches = stream.step(drawn)
        except UserError as error:  # a damaged shard, say: known to all ranks before any of them computes
            batches, problem = [], error
        data_wait_s = time.perf_counter() - started_at
        wants_stop = bool(stop) or (world.rank == 0 and sitting.over() is not None)  # one clock decides
        counts = [count_targets(batches), step_digest(batches), int(wants_stop), int(problem is not None), int(keeper.written)]
        n_targets, digest, stops, problems, ranks_written = world.sum_ints(counts)
        if ranks_written == world.size:
            attempt(keeper.finish)
        if stops or problems:
            break

        update = engine.train_step(batches, n_targets, lr_at(cfg.train, over, at.step), accept)

        if not update.applied:
            refused += 1
            log.error(f"step {at.step + 1:,}: {_why_refused(update)}, so the update was not applied on any rank; its samples are noted as skipped.")
            if refused == REFUSED_IN_A_ROW:
                break
        else:
            refused = 0
        rows = min(plan.global_rows, phase.total - drawn)
        at.ledger = at.ledger.advance(rows, at.step + 1, None if update.applied else _why_refused(update))
        at.chain = chain(at.chain, digest)
        at.step, at.updates = at.step + 1, at.updates + update.applied
        at.tokens_seen += n_targets * update.applied
        sitting.count_step()
        if update.applied:
            seconds = time.perf_counter() - started_at
            lr = lr_at(cfg.train, over, at.step - 1)
            metrics.step(
                at.step, loss=update.loss, lr=lr, grad_norm=update.grad_norm, tokens=n_targets, seconds=seconds, data_wait_s=data_wait_s
            )
            at.metrics["train_loss"] = update.loss

        at.epoch_end = (drawn + rows) // phase.samples > drawn // phase.samples
        done = at.ledger.open_phase is None or at.step == over.end
        if validate and ((eval_every and at.step % eval_every == 0) or done):
            result = validate()
            metrics.validation(at.step, result)
            at.metrics["val_loss"], at.metrics["val_step"] = result["loss"], float(at.step)
        elif at.metrics.get("val_step") != at.step:
            at.metrics.pop("val_loss", None)  # retention compares checkpoints by it: an old value must not stand for new weights
        if (save_every and at.step % save_every == 0) or at.epoch_end or done:
            save_now(wait=done)
        if done:
            break

    attempt(keeper.finish)
    if at.step > saved_step and refused < REFUSED_IN_A_ROW:
        save_now(wait=True)
    if problems:
        world.together(lambda: _reraise(problem))
    if refused == REFUSED_IN_A_ROW:
        raise NeedsAPerson(
            f"{refused} updates in a row were not finite, the last at step {at.step:,}. Nothing was saved since step {saved_step:,}. "
            f"Lower train.lr (with --accept-change train.lr) or look at the data of these steps with tools/ledger.py."
        )
    if at.step > saved_step:
        raise NeedsAPerson(f"Steps {saved_step + 1:,} to {at.step:,} are in no checkpoint. Mend that, then run again: they are taken anew.")
    if at.ledger.open_phase is None:
        return "phase finished"
    if at.step == over.end:
        return "budget spent"
    asked = next((name for name in world.gather(stop.signal_name) if name), None)
    return asked or world.broadcast(sitting.over())


def _why_refused(update: Update) -> str:
    return f"the loss was {update.loss}" if not math.isfinite(update.loss) else "a gradient was not finite"


def _reraise(problem: UserError | None) -> None:
    if problem:
        raise problem
