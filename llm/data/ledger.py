"""What a model has been trained on: its phases in order, how they are saved and read back, and which text is new to them."""

import json
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llm.log import UserError

from .packing import BESTFIT
from .permutation import ALGORITHM
from .phase import Phase, Skipped, count_windows
from .shards import Shard

VERSION = 2


class LedgerError(UserError):
    """The ledger cannot be read, or what is asked would break its promise that every sample is seen exactly once."""


@dataclass(frozen=True)
class Ledger:
    """All phases of a model's own history, in order. Only the last can be open."""

    phases: tuple[Phase, ...] = ()

    @property
    def open_phase(self) -> Phase | None:
        """The phase that still has draws to take."""
        return self.phases[-1] if self.phases and not self.phases[-1].is_done else None

    def open(self, phase: Phase) -> "Ledger":
        """With one more phase. The one before must be done."""
        if self.open_phase:
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
    __pydantic_config__ = ConfigDict(extra="forbid")


_REMEDY = "It was damaged or edited: use another checkpoint."


def _check(phase: Phase) -> None:
    where = f"ledger: phase {phase.name}"
    if phase.algorithm != ALGORITHM:
        raise LedgerError(f"{where}: ordered by {phase.algorithm}, this program has {ALGORITHM}. Use the one that wrote it.")
    if phase.packing not in (None, BESTFIT) or (phase.packing and not phase.document_mask):
        raise LedgerError(f"{where}: packed by {phase.packing}, this program has {BESTFIT} with a document mask. Use the one that wrote it.")
    ids = [shard.shard_id for shard in phase.shards]
    ends = list(accumulate(share.n_shards for share in phase.shares))
    if not ids or not ends or ends[-1] != len(ids) or all(share.is_replay for share in phase.shares):
        raise LedgerError(f"{where}: its shares do not fit its {len(ids)} shards. {_REMEDY}")
    by_share = [ids[stop - share.n_shards : stop] for share, stop in zip(phase.shares, ends, strict=True)]
    if len(set(ids)) < len(ids) or any(part != sorted(part) for part in by_share):
        raise LedgerError(f"{where}: its shards must be sorted by shard_id, each there once. {_REMEDY}")
    for shard in phase.shards:
        if not (shard.n_samples <= shard.n_tokens if phase.packing else shard.n_samples == count_windows(shard.n_tokens, phase.seq_len)):
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
                              f"is new: training it would repeat what is known. Give the new text in a file of its own, or tokenize it into "
                              f"the dataset folder that has the known: only new text gets shards there.")
        units.update(meta.unit_ids)
        new.append(shard)
    return new
