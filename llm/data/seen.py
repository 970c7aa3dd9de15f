"""What the ledger says, in the terms of people: which files, how much of them, and whether a text was trained on."""

from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from .ledger import Ledger
from .phase import Phase, PhaseShard


@dataclass(frozen=True)
class SeenShard:
    """A shard as some phases have cut it, and which of its samples they have taken at least once."""

    phase: Phase
    """The last of them."""
    shard: PhaseShard
    seen: np.ndarray
    """bool[n_samples]"""

    @property
    def fraction(self) -> float:
        return float(self.seen.mean()) if self.seen.size else 0.0


def seen_shards(ledger: Ledger) -> list[SeenShard]:
    """Those of all phases. One that phases have cut in several ways is there once for each."""
    found: dict[tuple, SeenShard] = {}
    for phase in ledger.phases:
        for index, shard in enumerate(phase.shards):
            key, seen = (shard.shard_id, phase.seq_len, phase.packing), phase.seen_samples(index)
            found[key] = SeenShard(phase, shard, seen | found[key].seen if key in found else seen)
    return list(found.values())


def seen_by_unit(*ledgers: Ledger) -> dict[str, float]:
    """For each unit that a phase of these ledgers holds, how much of its shard was trained on."""
    fractions: dict[str, float] = {}
    for found in (seen for ledger in ledgers for seen in seen_shards(ledger)):
        for unit_id in found.shard.unit_ids:
            fractions[unit_id] = max(fractions.get(unit_id, 0.0), found.fraction)
    return fractions


def seen_view(ledger: Ledger, earlier: dict | None = None) -> dict:
    """The ledger in words for people: file names, percentages and steps. Nothing reads it back.

    `earlier` is this program's own view of a moment ago, if it has one: then only the draws since are counted.
    """
    known = {phase["plan"]: phase for phase in (earlier or {"phases": []})["phases"]}
    return {"phases": [_phase_view(phase, known.get(phase.plan_id())) for phase in ledger.phases]}


def view_lines(view: dict) -> list[str]:
    """`seen_view` as lines of text."""
    lines = []
    for phase in view["phases"]:
        steps = f"steps {phase['first_step']:,} to {phase['last_step']:,}" if phase["first_step"] else "not begun"
        done = f"{phase['percent_done']:.2f} % of {phase['epochs']} epochs"
        lines.append(f"\nphase {phase['phase']} ({phase['dataset']}), {phase['state']}: {done}, {steps}")
        files = iter(phase["files"])
        for share in phase["shares"]:
            if len(phase["shares"]) > 1:
                lines.append(f"  {share['percent_of_draws']:6.2f} %  of the samples from {share['name']}:")
            lines += [f"  {file['percent_seen']:6.2f} %  {file['tokens']:>14,} tokens  {file['file']}" for file in islice(files, share["files"])]
    return lines


def _phase_view(phase: Phase, earlier: dict | None) -> dict:
    if earlier and earlier["samples_consumed"] <= phase.consumed:
        before = np.array([file["samples_drawn"] for file in earlier["files"]], np.int64)
        drawn = before + phase.draw_counts(earlier["samples_consumed"], phase.consumed)
    else:
        drawn = phase.draw_counts(0, phase.consumed)
    weights = sum(share.weight for share in phase.shares)
    return {
        "phase": phase.name,
        "dataset": phase.dataset,
        "state": "done" if phase.is_done else "open",
        "percent_done": _percent(phase.consumed, phase.total),
        "epochs": phase.epochs,
        "shares": [{"name": s.name, "files": s.n_shards, "percent_of_draws": _percent(s.weight, weights)} for s in phase.shares],
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


def percent(fraction: float) -> str:
    """Rounded down: 100.00 % means all of it."""
    return f"{int(fraction * 10_000) / 100:.2f} %"
