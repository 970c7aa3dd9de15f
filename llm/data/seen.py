"""What the ledger says, in the terms of people: which files, how much of them, and whether a text was trained on."""

from dataclasses import asdict
from itertools import islice

import numpy as np

from .ledger import Ledger
from .phase import Phase


def seen_by_unit(ledger: Ledger) -> dict[str, float]:
    """For each unit that a phase holds, the fraction of its shard's samples that were trained on at least once."""
    masks: dict[tuple, np.ndarray] = {}
    units: dict[tuple, tuple[str, ...]] = {}
    for phase in ledger.phases:
        for index, shard in enumerate(phase.shards):
            key = (shard.shard_id, phase.seq_len, phase.packing)
            masks[key] = masks.get(key, False) | phase.seen_samples(index)
            units[key] = shard.unit_ids
    fractions: dict[str, float] = {}
    for key, mask in masks.items():
        fraction = float(mask.mean()) if mask.size else 0.0
        for unit_id in units[key]:
            fractions[unit_id] = max(fractions.get(unit_id, 0.0), fraction)
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
