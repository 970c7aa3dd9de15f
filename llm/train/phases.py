"""Which data this sitting trains on: the open phase goes on, a new one opens when asked, or there is nothing to do and why."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.template import template_file
from llm.config import ConfigError, RunConfig
from llm.data.ledger import Ledger, new_shards
from llm.data.packing import BESTFIT
from llm.data.phase import Phase, Portion
from llm.data.shards import Shard
from llm.train.datasets import pool


@dataclass(frozen=True)
class Wish:
    """What the person asks of the data."""

    only_new: bool = False
    reset_epoch: bool = False
    dataset: str | None = None
    replay: float | None = None
    """With only_new: this part of the new phase's samples are drawn from what earlier phases held."""

    def __post_init__(self):
        if self.replay is not None and not 0.0001 <= self.replay <= 0.9999:
            raise ConfigError(f"--replay is {self.replay:g}; give the part of the samples that old data shall have, such as 0.1.")
        if self.replay is not None and (self.reset_epoch or not self.only_new):
            raise ConfigError("--replay mixes old data into a phase of new data: it goes with --only-new, without --reset-epoch.")


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
        return _go_on(ledger, chosen, wish, cfg)
    if not ledger.phases or wish.reset_epoch:
        shards = new_shards(Ledger(), chosen)  # each text once, whatever it is called
    else:
        shards = new_shards(ledger, chosen)
        if not (wish.only_new and shards):
            return _nothing_to_do(ledger, shards, wish, cfg)
    portions = _by_weight(shards, datasets, cfg.data.weights)
    if wish.replay:
        portions = _with_replay(portions, [s for s in pool(datasets) if s.meta.shard_id in ledger.shards_held()], wish.replay)
    name = wish.dataset or ", ".join(datasets)
    phase = Phase.mix(f"p{len(ledger.phases)}", cfg.train.seed, cfg.train.epochs, cfg.model.seq_len, portions, name, **row_cut(cfg))
    if budget and step >= budget:
        needed = step + -(-phase.total // global_rows)
        return (
            f"The budget of {budget:,} steps is spent, and these {phase.total:,} samples need {needed - step:,} more: "
            f"give train.total_step_budget={needed}, or 0 to let each phase bring its own steps."
        )
    return ledger.open(phase)


def _by_weight(shards: list[Shard], datasets: dict[str, list[Shard]], weights: dict[str, int]) -> list[Portion]:
    """One portion of everything, or with data.weights one of each dataset; a shard that several hold is the first one's."""
    if not weights:
        return [Portion("", 1, shards)]
    if unknown := sorted(weights.keys() - datasets.keys()):
        raise ConfigError(f"data.weights: {', '.join(unknown)} is none of the datasets in data.data_path: {', '.join(datasets)}.")
    left, portions = {s.meta.shard_id: s for s in shards}, []
    for name, held in datasets.items():
        own = [left.pop(s.meta.shard_id) for s in held if s.meta.shard_id in left]
        if own:
            portions.append(Portion(name, weights.get(name, 1), own))
    return portions


def _with_replay(portions: list[Portion], old: list[Shard], part: float) -> list[Portion]:
    """`part` of all draws from `old`, to four decimals; between the others the weights stay in proportion."""
    if not old:
        raise ConfigError("--replay: no shard of an earlier phase is in data.data_path. Put their folder there, or leave --replay out.")
    of_10000, weight = round(part * 10_000), sum(p.weight for p in portions)
    new = [replace(p, name=p.name or "new", weight=p.weight * (10_000 - of_10000)) for p in portions]
    mixed = [*new, Portion("replay", weight * of_10000, old, is_replay=True)]
    common = math.gcd(*(p.weight for p in mixed))
    return [replace(p, weight=p.weight // common) for p in mixed]


def row_cut(cfg: RunConfig) -> dict:
    """How rows are made of documents, as a phase notes it."""
    return {"document_mask": cfg.data.document_mask, "packing": BESTFIT if cfg.data.packing else None}


def for_the_next_phase(phase: Phase, cfg: RunConfig) -> list[str]:
    """Settings that an open phase does not have, because it keeps those that it began with."""
    given, weights = [], {share.name: share.weight for share in phase.shares if not share.is_replay}
    if cfg.train.epochs != phase.epochs:
        given.append(f"train.epochs {cfg.train.epochs}")
    if weights.keys() <= {"", "new"}:  # one share of everything: what `_by_weight` and `_with_replay` call it
        is_as_given = not cfg.data.weights
    else:  # a replay has multiplied all of them by one number
        wanted = {name: cfg.data.weights.get(name, 1) for name in weights}
        is_as_given = len({Fraction(weights[name], wanted[name]) for name in weights}) == 1
    return given if is_as_given else [*given, f"data.weights {cfg.data.weights}"]


def _go_on(ledger: Ledger, chosen: list[Shard], wish: Wish, cfg: RunConfig) -> Ledger:
    phase = ledger.open_phase
    done = f"phase {phase.name} ({phase.dataset}) is at {phase.consumed / phase.total:.1%}"
    if (phase.document_mask, phase.packing) != tuple(row_cut(cfg).values()):
        packing = "bestfit" if phase.packing else None
        raise ConfigError(
            f"data.document_mask is {cfg.data.document_mask} and data.packing {cfg.data.packing}, but {done} and has {phase.document_mask} and "
            f"{packing}: its samples are cut so. Go back to these until it is finished; the next phase may have others."
        )
    if wish.reset_epoch:
        raise ConfigError(f"--reset-epoch begins another pass when one is finished, but {done}. Run without it to finish first.")
    if wish.dataset and not {s.shard_id for s in phase.shards} <= {s.meta.shard_id for s in chosen}:
        raise ConfigError(f"--dataset {wish.dataset}: {done} and holds other data. Run without --dataset to finish it first.")
    return ledger


def _budget_spent(budget: int, phase: Phase, global_rows: int) -> str:
    left = phase.total - phase.consumed
    return (
        f"The budget of {budget:,} steps is spent: this run is finished. Phase {phase.name} is at {phase.consumed / phase.total:.1%}; to train on "
        f"its other {left:,} samples too, give train.total_step_budget={budget + -(-left // global_rows)}."
    )


def use_of(run: Path) -> str:
    """The command that shows what a run has learned: a chat, if conversations were among it."""
    newest = folder.entries(run)
    is_assistant = newest and template_file(newest[-1].path)
    return f"python launch/chat.py {run}" if is_assistant else f"python launch/generate.py {run} --prompt TEXT"


def _nothing_to_do(ledger: Ledger, fresh: list[Shard], wish: Wish, cfg: RunConfig) -> str:
    if wish.only_new:
        return "Nothing new: every text in these datasets has been in a phase of this run already. Add files, tokenize them, and run again."
    seen = f"This run has finished all its phases ({len(ledger.phases)}): it is already trained on this data."
    new = f" {len(fresh)} shards are new: add --only-new to train on them." if fresh else " With new files: tokenize them and add --only-new."
    again = " For another pass over the same data: --reset-epoch."
    other = f" To use the model: {use_of(cfg.run_folder)}"
    return seen + new + again + other
