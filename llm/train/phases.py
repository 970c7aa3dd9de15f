"""Which data this sitting trains on: the open phase goes on, a new one opens when asked, or there is nothing to do and why."""

from dataclasses import dataclass

from llm.config import ConfigError, RunConfig
from llm.data.ledger import Ledger, Phase, new_shards
from llm.data.shards import Shard
from llm.train.datasets import pool


@dataclass(frozen=True)
class Wish:
    """What the person asks of the data."""

    only_new: bool = False
    reset_epoch: bool = False
    dataset: str | None = None


def choose_phase(
    ledger: Ledger, datasets: dict[str, list[Shard]], wish: Wish, cfg: RunConfig, step: int, global_rows: int
) -> Ledger | str:
    """The ledger with an open phase to train on, or a sentence that says why there is nothing to train and what the choices are."""
    if wish.dataset and wish.dataset not in datasets:
        raise ConfigError(f"--dataset {wish.dataset}: data.data_path has {', '.join(datasets)}.")
    chosen = datasets[wish.dataset] if wish.dataset else pool(datasets)
    budget = cfg.train.total_step_budget
    if ledger.open_phase:
        if budget and step >= budget:
            return _budget_spent(budget, ledger.open_phase, global_rows)
        return _go_on(ledger, chosen, wish)
    fresh = new_shards(ledger, chosen)
    if not ledger.phases or wish.reset_epoch:
        shards = new_shards(Ledger(), chosen)  # each text once, whatever it is called
    elif wish.only_new and fresh:
        shards = fresh
    else:
        return _nothing_to_do(ledger, fresh, wish, cfg)
    name = wish.dataset or ", ".join(datasets)
    phase = Phase.plan(f"p{len(ledger.phases)}", cfg.train.seed, cfg.train.epochs, cfg.model.seq_len, shards, name)
    if budget and step >= budget:
        needed = step + -(-phase.total // global_rows)
        return (
            f"The budget of {budget:,} steps is spent, and these {phase.total:,} samples need {needed - step:,} more: "
            f"give train.total_step_budget={needed}, or 0 to let each phase bring its own steps."
        )
    return ledger.open(phase)


def _go_on(ledger: Ledger, chosen: list[Shard], wish: Wish) -> Ledger:
    phase = ledger.open_phase
    done = f"phase {phase.name} ({phase.dataset}) is at {phase.consumed / phase.total:.1%}"
    if wish.reset_epoch:
        raise ConfigError(f"--reset-epoch begins another pass when one is finished, but {done}. Run without it to finish first.")
    if wish.dataset and {s.shard_id for s in phase.shards} != {s.meta.shard_id for s in chosen}:
        raise ConfigError(f"--dataset {wish.dataset}: {done} and holds other data. Run without --dataset to finish it first.")
    return ledger


def _budget_spent(budget: int, phase: Phase, global_rows: int) -> str:
    left = phase.total - phase.consumed
    return (
        f"The budget of {budget:,} steps is spent: this run is finished. Phase {phase.name} is at {phase.consumed / phase.total:.1%}; to train on "
        f"its other {left:,} samples too, give train.total_step_budget={budget + -(-left // global_rows)}."
    )


def _nothing_to_do(ledger: Ledger, fresh: list[Shard], wish: Wish, cfg: RunConfig) -> str:
    if wish.only_new:
        return "Nothing new: every text in these datasets has been in a phase of this run already. Add files, tokenize them, and run again."
    seen = f"This run has finished all of its {len(ledger.phases)} phases: it is already trained on this data."
    new = f" {len(fresh)} shards are new: add --only-new to train on them." if fresh else " With new files: tokenize them and add --only-new."
    again = " For another pass over the same data: --reset-epoch."
    other = f" To use the model: python launch/generate.py {cfg.run_folder} --prompt TEXT"
    return seen + new + again + other
