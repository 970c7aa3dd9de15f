"""The audit of a ledger: what its phases claim, recomputed the long way and held against every shortcut that the program takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .ledger import Ledger
from .packing import bins_of
from .phase import COUNT_DRAWS, Phase, Share
from .shards import Shard


@dataclass(frozen=True)
class PhaseAudit:
    """What walking through the consumed draws of one phase has found."""

    phase: Phase
    targets: int
    """Tokens that the applied steps of this phase predicted, as far as the ledger and the masks of the shards given say."""
    problems: list[str]

    @property
    def draws_each(self) -> list[tuple[Share, int, int, int]]:
        """For each share: its samples, how often each of them was drawn at least, and how many were drawn once more."""
        phase = self.phase
        sizes = [stop - start for start, stop in phase.share_bounds]
        counts = zip(phase.shares, sizes, phase.share_counts(phase.consumed).tolist(), strict=True)
        return [(share, size, *divmod(drawn, size)) for share, size, drawn in counts]


def audit_phase(phase: Phase, shards: dict[str, Shard], advance: Callable[[int], None] = lambda _: None) -> PhaseAudit:
    """Walk through all consumed draws of a phase. `shards`: those at hand, by shard_id; `advance(n)` hears of draws walked."""
    problems = [*_double_units(phase), *_bad_skips(phase)]
    targets_of = _Targets(phase, shards)
    times, targets = np.zeros(phase.samples, np.uint32), 0  # a small dataset of some weight may be drawn a million times
    for at in range(0, phase.consumed, COUNT_DRAWS):
        samples = phase.samples_at(np.arange(at, min(at + COUNT_DRAWS, phase.consumed)))
        np.add.at(times, samples, 1)
        targets += int(targets_of(samples).sum())
        advance(len(samples))
    problems += _uneven(phase, times)
    problems += _shortcut_problems(phase, times)
    skipped = sum(int(targets_of(phase.samples_at(np.arange(s.start, s.stop))).sum()) for s in phase.skipped)
    return PhaseAudit(phase, targets - skipped, problems)


def _double_units(phase: Phase) -> list[str]:
    units = [unit_id for shard in phase.shards for unit_id in set(shard.unit_ids)]
    n_double = len(units) - len(set(units))
    return [f"{n_double:,} units of text stand in more than one of its shards, and so would be trained on more than once"] if n_double else []


def _bad_skips(phase: Phase) -> list[str]:
    problems, end = [], 0
    for s in phase.skipped:
        if not end <= s.start < s.stop <= phase.consumed:
            problems.append(f"the skipped draws {s.start:,} to {s.stop:,} do not lie, in order, inside the {phase.consumed:,} consumed ones")
        if not (phase.first_step or 0) <= s.step <= (phase.last_step or 0):
            problems.append(f"the skipped step {s.step:,} is not one of its steps, {phase.first_step} to {phase.last_step}")
        end = s.stop
    return problems


def _uneven(phase: Phase, times: np.ndarray) -> list[str]:
    """In each share, every sample must have been drawn as often as every other, or once more where an epoch has begun."""
    problems = []
    for share, (start, stop) in zip(phase.shares, phase.share_bounds, strict=True):
        drawn = times[start:stop]
        if drawn.max(initial=0) - drawn.min(initial=drawn.max(initial=0)) > 1:
            of = f" of {share.name}" if len(phase.shares) > 1 else ""
            problems.append(f"samples{of} were drawn {drawn.min():,} to {drawn.max():,} times; each must be taken once before any is taken again")
    return problems


def _shortcut_problems(phase: Phase, times: np.ndarray) -> list[str]:
    """`draw_counts` (which skips whole epochs) and `seen_samples` (which asks the inverse) must say what the walk has found."""
    problems, counted, start = [], phase.draw_counts(0, phase.consumed), 0
    for index, (shard, end) in enumerate(zip(phase.shards, phase.shard_ends.tolist(), strict=True)):
        if counted[index] != (drawn := int(times[start:end].sum())):
            problems.append(f"shard {shard.name}: {counted[index]:,} draws counted, {drawn:,} walked")
        if not np.array_equal(phase.seen_samples(index), times[start:end] > 0):
            problems.append(f"shard {shard.name}: the samples said to be seen are not those that the draws took")
        start = end
    return problems


class _Targets:
    """How many tokens the sample of a phase predicts: seq_len, less in the last of a shard, and only what a mask leaves.

    Of shards that are not at hand, at most so many: nothing tells their masks and bins.
    """

    def __init__(self, phase: Phase, shards: dict[str, Shard]):
        self.phase = phase
        # how full a bin is only its shard can tell
        last = [phase.seq_len if phase.packing else s.n_tokens - 1 - (s.n_samples - 1) * phase.seq_len for s in phase.shards]
        self.last = np.array(last, np.int64)
        at_hand = {index: shards.get(s.shard_id) for index, s in enumerate(phase.shards)}
        self.masked = {
            index: _masked_targets(shard, phase) for index, shard in at_hand.items() if shard and ("mask" in shard.meta.files or phase.document_mask)
        }

    def shard_index(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.phase.shard_ends, samples, side="right")

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        index = self.shard_index(samples)
        ends = self.phase.shard_ends[index]
        targets = np.where(samples == ends - 1, self.last[index], self.phase.seq_len)
        for masked, counts in self.masked.items():
            here = index == masked
            targets[here] = counts[len(counts) - (ends[here] - samples[here])]
        return targets


def _masked_targets(shard: Shard, phase: Phase) -> np.ndarray:
    """Counted targets of each sample of a shard of which only some tokens carry loss, or whose documents are apart."""
    counted = shard.loss_mask(0, shard.meta.n_tokens)
    counted = np.ones(shard.meta.n_tokens, bool) if counted is None else counted
    if phase.document_mask:
        counted[shard.doc_ends[:-1].astype(np.int64)] = False
    if phase.packing:
        bins, before = bins_of(shard, phase.seq_len), np.r_[0, np.cumsum(counted, dtype=np.int64)]
        return np.add.reduceat(before[bins.stops] - before[bins.starts + 1], bins.first[:-1])
    return np.add.reduceat(counted[1:], np.arange(0, len(counted) - 1, phase.seq_len), dtype=np.int64)


def step_problems(ledger: Ledger, step: int) -> list[str]:
    """Where the steps of the phases do not join up into the steps 1 to `step`."""
    problems, last = [], 0
    for phase in ledger.phases:
        if (phase.first_step is None) != (phase.consumed == 0) or (phase.first_step is None) != (phase.last_step is None):
            problems.append(f"phase {phase.name}: {phase.consumed:,} samples consumed in steps {phase.first_step} to {phase.last_step}")
        elif phase.first_step is not None:
            if phase.first_step != last + 1:
                problems.append(f"phase {phase.name} begins at step {phase.first_step:,}, but the one before ends at {last:,}")
            if not 0 < phase.last_step - phase.first_step + 1 <= phase.consumed:
                problems.append(f"phase {phase.name}: steps {phase.first_step:,} to {phase.last_step:,} cannot have taken {phase.consumed:,} samples")
            last = phase.last_step
    if last != step:
        problems.append(f"the phases end at step {last:,}, the checkpoint is of step {step:,}")
    return problems
