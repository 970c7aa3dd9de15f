"""What a model has been trained on: phases, and how far each has come. Which samples were seen is computed, never stored.

A phase goes through the samples of its shards in the order of a permutation per epoch. Draw k of a phase, 0 <= k < total, is one
sample; a step takes the next B draws. So `consumed`, one number, says exactly which samples were seen, for any world size.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from llm.log import UserError

from .permutation import ALGORITHM, Permutation
from .record import sha256_of
from .shards import Shard

VERSION = 1
COUNT_DRAWS = 1 << 20
_STRICT = ConfigDict(extra="forbid")


class LedgerError(UserError):
    """The ledger cannot be read, or what is asked would break its promise that every sample is seen exactly once."""


def count_samples(n_tokens: int, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens, seq_len apart, the last one padded: each token but the first is a target exactly once."""
    return -(-(n_tokens - 1) // seq_len)


@dataclass(frozen=True)
class PhaseShard:
    """A shard as a phase holds it."""

    shard_id: str
    name: str
    n_tokens: PositiveInt
    n_samples: NonNegativeInt
    unit_ids: tuple[str, ...]
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Skipped:
    """The draws [start, stop): they were consumed by `step`, but its update was not applied."""

    start: NonNegativeInt
    stop: NonNegativeInt
    step: NonNegativeInt
    reason: str
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Phase:
    """A plan to go through `shards` `epochs` times, and how many of its draws are `consumed`."""

    name: str
    seed: int
    epochs: PositiveInt
    seq_len: PositiveInt
    shards: tuple[PhaseShard, ...]
    """Sorted by shard_id, so that names, listing order and world size cannot matter."""
    consumed: NonNegativeInt
    algorithm: str
    first_step: int | None
    """The optimizer step that took the first samples."""
    last_step: int | None
    """The latest one so far."""
    dataset: str
    """The name that the run's config has for these data."""
    skipped: tuple[Skipped, ...]
    """In order of steps."""
    __pydantic_config__ = _STRICT

    @classmethod
    def plan(cls, name: str, seed: int, epochs: int, seq_len: int, shards: list[Shard], dataset: str = "") -> "Phase":
        """A phase over these shards, with nothing consumed."""
        assert shards, "a phase without shards has no end"
        metas = sorted((shard.meta for shard in shards), key=lambda meta: meta.shard_id)
        assert len({meta.shard_id for meta in metas}) == len(metas), "find_shards gives each shard once"
        assert all(meta.role == "train" for meta in metas), "validation data is never offered"
        rows = (PhaseShard(m.shard_id, m.name, m.n_tokens, count_samples(m.n_tokens, seq_len), tuple(m.unit_ids)) for m in metas)
        return cls(name, seed, epochs, seq_len, tuple(rows), 0, ALGORITHM, None, None, dataset, ())

    def plan_id(self) -> str:
        """The same as long as the order and the samples are."""
        return sha256_of("phase", asdict(replace(self, consumed=0, first_step=None, last_step=None, skipped=())))

    @cached_property
    def shard_ends(self) -> np.ndarray:
        """Exclusive ends of the shards' samples, int64: sample i of the phase is in the first shard whose end is above i."""
        return np.cumsum([shard.n_samples for shard in self.shards], dtype=np.int64)

    @property
    def samples(self) -> int:
        """In one epoch."""
        return int(self.shard_ends[-1])

    @property
    def total(self) -> int:
        """Draws in all epochs."""
        return self.epochs * self.samples

    @property
    def is_done(self) -> bool:
        return self.consumed >= self.total

    def order(self, epoch: int) -> Permutation:
        """From a draw's place in its epoch to the sample it takes."""
        return Permutation(self.samples, self.seed, self.name, epoch)

    def samples_at(self, draws: np.ndarray) -> np.ndarray:
        """The sample of each draw, int64."""
        epochs, places = np.divmod(draws, self.samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):  # one, or two where a step goes over the end of an epoch
            here = epochs == epoch
            samples[here] = self.order(int(epoch))(places[here])
        return samples

    def draw_counts(self, start: int, stop: int) -> np.ndarray:
        """How many of the draws [start, stop) fall into each shard: exact, int64[n_shards]. 1e9 draws take a minute or two."""
        first, last = -(-start // self.samples), stop // self.samples
        if first < last:  # whole epochs take every sample: only what lies before and after needs counting
            around = self.draw_counts(start, first * self.samples) + self.draw_counts(last * self.samples, stop)
            return around + (last - first) * np.diff(self.shard_ends, prepend=0)
        counts = np.zeros(len(self.shards), np.int64)
        for at in range(start, stop, COUNT_DRAWS):
            shards = np.searchsorted(self.shard_ends, self.samples_at(np.arange(at, min(at + COUNT_DRAWS, stop))), side="right")
            counts += np.bincount(shards, minlength=len(counts))
        return counts

    def seen_samples(self, shard_index: int) -> np.ndarray:
        """Which samples of one shard were consumed at least once, bool[n_samples]: asks the inverse, so costs the shard only."""
        stop = int(self.shard_ends[shard_index])
        samples = np.arange(stop - self.shards[shard_index].n_samples, stop)
        if self.consumed >= self.samples:
            return np.ones(len(samples), bool)
        return self.order(0).inverse(samples) < self.consumed


@dataclass(frozen=True)
class Ledger:
    """All phases of a model's own history, in order. Only the last can be open."""

    phases: tuple[Phase, ...] = ()

    @property
    def open_phase(self) -> Phase | None:
        """The phase that still has draws to take."""
        return self.phases[-1] if self.phases and not self.phases[-1].is_done else None

    def open(self, phase: Phase, leave_unfinished: bool = False) -> "Ledger":
        """With one more phase. The one before must be done, or its rest is left for good with `leave_unfinished`."""
        if self.open_phase and not leave_unfinished:
            left = self.open_phase.total - self.open_phase.consumed
            raise LedgerError(f"phase {self.open_phase.name} still has {left:,} samples to train: finish it before {phase.name}.")
        if phase.name in {known.name for known in self.phases}:
            raise LedgerError(f"the ledger has a phase named {phase.name} already. A name also chooses the order: give another.")
        if phase.total == 0:
            raise LedgerError(f"phase {phase.name} has nothing to predict: its {len(phase.shards)} shards have one token each.")
        return Ledger((*self.phases, phase))

    def advance(self, n_samples: int, step: int, skipped_because: str | None = None) -> "Ledger":
        """After the optimizer step `step`, which took the next `n_samples` draws of the open phase; with a reason, its update was refused."""
        phase = self.open_phase
        assert phase and 0 <= n_samples <= phase.total - phase.consumed, (phase, n_samples)
        first_step = step if phase.first_step is None else phase.first_step
        stop = phase.consumed + n_samples
        skipped = (*phase.skipped, Skipped(phase.consumed, stop, step, skipped_because)) if skipped_because else phase.skipped
        moved = replace(phase, consumed=stop, first_step=first_step, last_step=step, skipped=skipped)
        return Ledger((*self.phases[:-1], moved))

    def units_held(self) -> set[str]:
        """The units of all phases: what is not in here is new."""
        return {unit_id for phase in self.phases for shard in phase.shards for unit_id in shard.unit_ids}

    def shards_held(self) -> set[str]:
        return {shard.shard_id for phase in self.phases for shard in phase.shards}

    def to_json(self) -> dict:
        return {"version": VERSION, "phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_json(cls, value: dict) -> "Ledger":
        """Read back what to_json gave. Raises LedgerError for anything else, naming the place."""
        try:
            saved = TypeAdapter(_Saved).validate_json(json.dumps(value), strict=True)  # json, where a list may become a tuple
        except ValidationError as error:
            places = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
            raise LedgerError(f"ledger: {places}. {_REMEDY}") from None
        if saved.version != VERSION:
            raise LedgerError(f"ledger: version {saved.version}, this program reads {VERSION}. Use the one that wrote it.")
        names = [phase.name for phase in saved.phases]
        if len(set(names)) < len(names):
            raise LedgerError(f"ledger: phases share a name: {', '.join(names)}. {_REMEDY}")
        for phase in saved.phases:
            _check(phase)
        return cls(saved.phases)


@dataclass(frozen=True)
class _Saved:
    version: int
    phases: tuple[Phase, ...]
    __pydantic_config__ = _STRICT


_REMEDY = "It was damaged or edited: use another checkpoint."


def _check(phase: Phase) -> None:
    where = f"ledger: phase {phase.name}"
    if phase.algorithm != ALGORITHM:
        raise LedgerError(f"{where}: ordered by {phase.algorithm}, this program has {ALGORITHM}. Use the one that wrote it.")
    ids = [shard.shard_id for shard in phase.shards]
    if not ids or ids != sorted(set(ids)):
        raise LedgerError(f"{where}: its shards must be sorted by shard_id, each there once. {_REMEDY}")
    for shard in phase.shards:
        if shard.n_samples != count_samples(shard.n_tokens, phase.seq_len):
            raise LedgerError(f"{where}: shard {shard.name} of {shard.n_tokens:,} tokens cannot have {shard.n_samples:,} samples "
                              f"of {phase.seq_len}. {_REMEDY}")
    if phase.consumed > phase.total:
        raise LedgerError(f"{where}: {phase.consumed:,} samples consumed of {phase.total:,}. {_REMEDY}")
    if any(not s.start < s.stop <= phase.consumed for s in phase.skipped):
        raise LedgerError(f"{where}: skipped samples that were not consumed. {_REMEDY}")


def new_shards(ledger: Ledger, shards: list[Shard]) -> list[Shard]:
    """Those of `shards` whose text no phase has held, by content: names, copies and order do not matter."""
    units, shard_ids = ledger.units_held(), ledger.shards_held()
    new = []
    for shard in shards:
        meta = shard.meta
        known = units.intersection(meta.unit_ids)
        if meta.shard_id in shard_ids or len(known) == len(set(meta.unit_ids)):
            continue
        if known:
            raise LedgerError(f"{meta.path}: {len(known)} of its {len(meta.unit_ids)} units of text are known already, the rest "
                              f"is new: training it would repeat what is known. Tokenize the new text alone, or into the dataset "
                              f"folder that has the known: only new text gets shards there.")
        units.update(meta.unit_ids)
        new.append(shard)
    return new


def seen(ledger: Ledger, unit_id: str) -> float:
    """The fraction of its shard's samples that were trained on at least once; recomputed from the plan."""
    masks: dict[tuple, np.ndarray] = {}
    for phase in ledger.phases:
        for index, shard in enumerate(phase.shards):
            if unit_id in shard.unit_ids:
                key = (shard.shard_id, phase.seq_len)
                masks[key] = masks.get(key, False) | phase.seen_samples(index)
    return max((float(mask.mean()) for mask in masks.values() if mask.size), default=0.0)


def seen_view(ledger: Ledger, earlier: dict | None = None) -> dict:
    """The ledger in words for people: file names, percentages and steps. Nothing reads it back.

    `earlier` is this program's own view of a moment ago, if it has one: then only the draws since are counted.
    """
    known = {phase["plan"]: phase for phase in (earlier or {"phases": []})["phases"]}
    return {"phases": [_phase_view(phase, known.get(phase.plan_id()), phase is ledger.open_phase) for phase in ledger.phases]}


def _phase_view(phase: Phase, earlier: dict | None, is_open: bool) -> dict:
    if earlier and earlier["samples_consumed"] <= phase.consumed:
        before = np.array([file["samples_drawn"] for file in earlier["files"]], np.int64)
        drawn = before + phase.draw_counts(earlier["samples_consumed"], phase.consumed)
    else:
        drawn = phase.draw_counts(0, phase.consumed)
    return {
        "phase": phase.name,
        "dataset": phase.dataset,
        "state": "done" if phase.is_done else "open" if is_open else "left unfinished",
        "percent_done": _percent(phase.consumed, phase.total),
        "epochs": phase.epochs,
        "first_step": phase.first_step,
        "last_step": phase.last_step,
        "samples_consumed": phase.consumed,
        "samples_skipped": [asdict(s) for s in phase.skipped],
        "plan": phase.plan_id(),
        "files": [
            {
                "file": f"{shard.name}.bin",
                "percent_seen": _percent(min(drawn, shard.n_samples), shard.n_samples),
                "tokens": shard.n_tokens,
                "samples_drawn": drawn,
                "shard_id": shard.shard_id,
            }
            for shard, drawn in zip(phase.shards, drawn.tolist(), strict=True)
        ],
    }


def _percent(part: int, whole: int) -> float:
    """Rounded down: 100.0 means all of it."""
    return 10_000 * part // max(1, whole) / 100
