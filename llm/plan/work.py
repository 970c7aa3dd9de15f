"""How much there is to do: tokens and steps from the data on disk, checkpoints and the disk they need, hours and sittings."""

from dataclasses import dataclass
from pathlib import Path

from llm.config import RunConfig, interval_steps
from llm.data.ledger import Ledger
from llm.data.manifest import find_shards
from llm.data.shards import Shard
from llm.model.flops import count_params
from llm.plan.hardware import PlanError
from llm.train.budget import phase_steps
from llm.train.phases import Wish, choose_phase

TOKENS_PER_PARAMETER = 20  # Chinchilla, arXiv 2203.15556
ASSUMED_VOCABULARY = 32_768


@dataclass(frozen=True)
class Work:
    """What a run has to do. `notes`: one sentence for each number that was found or assumed."""

    steps: int
    tokens: int
    passes: float | None
    """How often each sample of the data is seen; None without data."""
    phase_steps: int
    """What percentages in the config are of."""
    dataset_bytes: int
    notes: tuple[str, ...]


def find_data(cfg: RunConfig) -> dict[str, list[Shard]]:
    """Training shards by dataset; empty where no data is. Raises ShardError for what is there and wrong."""
    found = {}
    for name, path in cfg.data.datasets.items():
        imported = Path(path).with_name(f"{Path(path).stem}.imported")
        path = imported if path.endswith(".jsonl") and imported.is_dir() else Path(path)
        if path.exists() and path.suffix != ".jsonl":
            found[name] = find_shards(sorted(path.glob("*.meta.json")) if path.name.endswith(".imported") else [path], "train")
    return found


def settle_vocabulary(cfg: RunConfig, data: dict[str, list[Shard]]) -> tuple[RunConfig, str | None]:
    """The config with its vocabulary known, and a note where it had to be assumed: the data's, the tokenizer's, or a usual one."""
    note = None
    shards = [shard for found in data.values() for shard in found]
    if shards:
        vocabulary = shards[0].meta.tokenizer["vocab_size"]
    elif cfg.model.vocab_size:
        return cfg, None
    elif Path(cfg.tokenizer.tokenizer_path).exists():
        from llm.tokenizer import load_tokenizer

        vocabulary = load_tokenizer(cfg.tokenizer.tokenizer_path, cfg.tokenizer.tokenizer_type).vocab_size
    else:
        vocabulary = ASSUMED_VOCABULARY
        note = f"vocabulary: assumed {vocabulary:,}, since neither data nor a tokenizer is there; model.vocab_size=N says otherwise"
    return cfg.model_copy(update={"model": cfg.model.with_vocab(vocabulary)}), note


def work_of(cfg: RunConfig, data: dict[str, list[Shard]], global_rows: int, tokens: int | None = None) -> Work:
    """Steps and tokens of the run: as `tokens` says, else the config's step budget, else one phase over the data found, else an assumption."""
    step_tokens, notes, phase, budget = global_rows * cfg.model.seq_len, [], None, cfg.train.total_step_budget
    if data:
        unbudgeted = cfg.model_copy(update={"train": cfg.train.model_copy(update={"total_step_budget": 0})})
        phase = choose_phase(Ledger(()), data, Wish(), unbudgeted, 0, global_rows).open_phase
        n_tokens = sum(shard.n_tokens for shard in phase.shards)
        notes.append(f"data: {n_tokens:,} tokens in {len(phase.shards)} shards, {phase.samples:,} samples x {phase.epochs} epochs, found on disk")
        notes += _other_length(cfg, data)
    else:
        notes.append(f"data: none at {', '.join(cfg.data.datasets.values())}")
    if missing := sorted(cfg.data.datasets.keys() - data.keys()) if data else []:
        notes.append(f"data: nothing yet at {', '.join(cfg.data.datasets[name] for name in missing)}, so it is not counted")
    if tokens:
        steps = -(-tokens // step_tokens)
        notes.append(f"steps: {steps:,} for the {tokens:,} tokens of --tokens")
    elif budget and phase and phase_steps(phase, global_rows) < budget:
        steps = phase_steps(phase, global_rows)
        notes.append(f"steps: {steps:,}, since the data end before train.total_step_budget {budget:,}; more epochs or more text would fill it")
    elif budget:
        steps = budget
        notes.append(f"steps: {steps:,}, train.total_step_budget")
    elif phase:
        steps = phase_steps(phase, global_rows)
        notes.append(f"steps: {steps:,} for all samples, as training would count them")
    else:
        steps = -(-TOKENS_PER_PARAMETER * count_params(cfg.model) // step_tokens)
        notes.append(f"steps: assumed {steps:,}, {TOKENS_PER_PARAMETER} tokens for each parameter (arXiv 2203.15556); --tokens N says otherwise")
    rows = steps * global_rows if tokens or not phase else min(steps * global_rows, phase.total)
    passes = rows / phase.samples if phase and phase.samples else None
    in_phase = budget or (phase_steps(phase, global_rows) if phase else steps)
    size = sum(file["bytes"] for found in data.values() for shard in found for file in shard.meta.files.values())
    return Work(steps, steps * step_tokens, passes, in_phase, size, tuple(notes))


def _other_length(cfg: RunConfig, data: dict[str, list[Shard]]) -> list[str]:
    other = {shard.meta.seq_len for found in data.values() for shard in found} - {cfg.model.seq_len}
    if not other or cfg.data.rechunk:
        return []
    return [f"data: made for rows of {other.pop()}, model.seq_len is {cfg.model.seq_len}: training will want --rechunk"]


# ---------------------------------------------------------------- disk


@dataclass(frozen=True)
class Disk:
    """Bytes on disk."""

    checkpoint: int
    """One whole checkpoint: fp32 weights and both moments."""
    checkpoints: int
    """All that retention keeps at the end, and the one being written."""
    count: int
    dataset: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.dataset


def disk_of(cfg: RunConfig, work: Work) -> Disk:
    """The most that the run's checkpoints and data will take. One that is kept for two reasons counts twice: too much, never too little."""
    keep, params = cfg.checkpoint, count_params(cfg.model)
    every = interval_steps(keep.keep_every, work.phase_steps)
    beyond = keep.keep_best + (int(work.passes or 0) if keep.keep_epochs else 0) + (work.steps // every if every else 0)
    whole = keep.keep_last + 2  # the one that a sitting resumed from stays, and one is written before another goes
    saves = _saves(cfg, work)
    whole, beyond = min(whole, saves), min(beyond, max(0, saves - whole))
    size = 12 * params
    return Disk(size, whole * size + beyond * (4 * params if keep.thin else size), whole + beyond, work.dataset_bytes)


def _saves(cfg: RunConfig, work: Work) -> int:
    every = interval_steps(cfg.checkpoint.save_every, work.phase_steps)
    return (work.steps // every if every else 0) + int(work.passes or 0) + 2  # ends of epochs, of the run, and of a sitting


# ---------------------------------------------------------------- time


def evaluation_flops(cfg: RunConfig, work: Work, flops_per_token: int) -> float:
    """Forward FLOPs of all validations of the run; eval_rows 0 counts as 256 rows."""
    every = interval_steps(cfg.train.eval_every, work.phase_steps)
    evaluations = work.steps // every + 1 if every else 1
    return evaluations * (cfg.train.eval_rows or 256) * cfg.model.seq_len * flops_per_token / 3


def steps_in(seconds: float, cfg: RunConfig, global_rows: int, tokens_per_s: float) -> int:
    """Steps of `global_rows` that fit into so many seconds of training and validating, within train.total_step_budget.

    At least twice the warm-up: a run that ends in it has learned nothing.
    """
    train, step_tokens = cfg.train, global_rows * cfg.model.seq_len
    most = train.total_step_budget or int(seconds * tokens_per_s / step_tokens)
    every = interval_steps(train.eval_every, most) or most
    validation_tokens = (train.eval_rows or 256) * cfg.model.seq_len / 3  # the forward pass alone
    steps = int(seconds * tokens_per_s / (step_tokens + validation_tokens / max(1, every)))
    least = 2 * interval_steps(train.warmup_steps, most)
    return max(1, least, min(steps, most))


def positive(**values: float | None) -> None:
    """Raises PlanError for a flag that is given and not above 0."""
    for flag, value in values.items():
        if value is not None and value <= 0:
            raise PlanError(f"--{flag.replace('_', '-')} is {value:g}; give a number above 0.")
