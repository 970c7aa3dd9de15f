"""Whether a file was trained on, in words for people."""

from collections.abc import Iterable
from pathlib import Path

from llm.corpus.seen_text import Answer, Asked, Records
from llm.data.lineage import Ancestor, History
from llm.data.overlap import cuts_for
from llm.data.phase import Phase
from llm.data.seen import percent

MOST_DOCUMENTS = 20


def answer_lines(file: Path, asked: Asked, told: Answer, records: Records) -> list[str]:
    """The verdict first, then what it rests on, then what could not be compared."""
    history = records.history
    units = {unit_id for unit in asked.units for unit_id in unit.unit_ids}
    not_compared = _not_compared(told, records) if told.documents else []
    whose = "the run" if len(history.runs) == 1 else "the run and its bases"
    return [
        f"{file}: {_verdict(told, history, bool(not_compared))}",
        f"  {told.known_units:,} of its {told.units:,} units of text are in the data of {whose}",
        *(line for run in history.runs for line in _unit_lines(run, units, history)),
        *_held_out_lines(units, records),
        *(_window_lines(told, records) if told.documents else []),
        *_document_lines(told),
        *(f"  not compared: {what}" for what in not_compared),
        *(f"  {what}" for what in history.unknown),
    ]


def _verdict(told: Answer, history: History, is_incomplete: bool) -> str:
    if told.trained_weight:
        return "fully" if told.is_whole else f"partly ({percent(told.share)})"
    imported = [base.run for base in history.bases if base.kind == "imported"]
    since = f" since the import of {imported[-1]}" if imported else ""
    since = since or (", as far as is recorded" if history.unknown else "")
    return f"never{since}{', but not all could be compared' if is_incomplete else ''}"


def _who(run: Ancestor, history: History) -> str:
    return "the run itself" if run is history.runs[-1] else f"its base run {run.name}"


def _steps(phases: Iterable[Phase]) -> str:
    begun = [phase for phase in phases if phase.first_step is not None]
    return f"steps {begun[0].first_step:,} to {begun[-1].last_step:,}" if begun else "not begun"


def _unit_lines(run: Ancestor, units: set[str], history: History) -> list[str]:
    by = "" if run is history.runs[-1] else f"{_who(run, history)}, "
    lines = []
    for phase in run.ledger.phases:
        shards = enumerate(phase.shards)
        here = [(index, s) for index, s in shards if units.intersection(s.unit_ids)]
        if not here:
            continue
        seen = [phase.seen_samples(index) for index, _ in here]
        share = sum(int(mask.sum()) for mask in seen) / max(1, sum(mask.size for mask in seen))
        n_units = len(units.intersection(unit for _, shard in here for unit in shard.unit_ids))
        lines.append(
            f"  {by}phase {phase.name} ({phase.dataset}), {_steps([phase])}: {n_units:,} units, "
            f"{percent(share)} of their {len(here):,} shards: "
            f"{', '.join(shard.name for _, shard in here[:5])}"
        )
    return lines


def _held_out_lines(units: set[str], records: Records) -> list[str]:
    shards = [s for s in records.at_hand.shards.values() if s.meta.role == "val"]
    theirs = [unit for shard in shards for unit in shard.meta.units if unit["unit_id"] in units]
    n_docs = sum(unit.get("docs", 0) for unit in theirs)
    told = f"  {n_docs:,} of its documents are held out for validation and never trained on"
    return [told] if n_docs else []


def _window_lines(told: Answer, records: Records) -> list[str]:
    history = records.history
    shards = [s.meta for s in records.shards if s.meta.shard_id not in told.unreadable]
    lines = [
        f"  compared: {told.documents:,} documents by {told.windows:,} windows of up to "
        f"{cuts_for(records.shards)[0][1]} tokens, with {len(shards):,} shards of "
        f"{sum(meta.n_tokens for meta in shards):,} tokens"
    ]
    for run, by_shard in zip(history.runs, told.by_run, strict=True):
        phases = [p for p in run.ledger.phases if by_shard.keys() & {s.shard_id for s in p.shards}]
        if phases:
            lines.append(
                f"  {by_shard.total():,} of {told.windows:,} windows trained on by "
                f"{_who(run, history)} (phase {', '.join(p.name for p in phases)}, "
                f"{_steps(phases)})"
            )
    others = {
        "stand in a phase, in samples that have not been taken": told.waiting,
        f"are tokenized, in shards that no phase holds: {', '.join(told.phaseless)}": (
            told.phaseless.total()
        ),
        "stand in validation shards, which are never trained on": (
            sum(found.held_out for found in told.found)
        ),
    }
    return lines + [f"  {n:,} windows {what}" for what, n in others.items() if n]


def _document_lines(told: Answer) -> list[str]:
    ranked = sorted(told.found, key=lambda found: -found.trained / found.windows)
    lines = []
    for found in ranked[:MOST_DOCUMENTS]:
        what = f"{found.found:,} of {found.windows:,} windows found, none trained on"
        if found.trained:
            what = f"{found.trained:,} of {found.windows:,} windows trained on"
        if found.trained_whole < found.trained:
            what += f", {found.trained_whole:,} in full"
        places = "; ".join(
            f"{source} document {n:,} in {shard}" for shard, source, n in found.places
        )
        lines.append(f"  document {found.document:,}: {what}: {places}")
    if len(ranked) > MOST_DOCUMENTS:
        more = len(ranked) - MOST_DOCUMENTS
        lines.append(f"  and {more:,} more documents; --documents FILE writes all")
    return lines


def _not_compared(told: Answer, records: Records) -> list[str]:
    """Which shards that the runs were trained on were not compared, and why."""
    at_hand, lines = records.at_hand, [*told.unreadable.values(), *records.at_hand.damage]
    compared = {s.meta.shard_id for s in records.shards}
    for run in records.history.runs:
        held = {s.shard_id: s for phase in run.ledger.phases for s in phase.shards}
        other = [s for s in held.values() if s.shard_id not in compared]
        for is_there, why in (
            (True, "which another tokenizer has made"),
            (False, f"not at hand: {at_hand.where()}; --data PATH says where they are now"),
        ):
            shards = [s for s in other if (s.shard_id in at_hand.shards) is is_there]
            if shards:
                lines.append(
                    f"{len(shards):,} shards of {sum(s.n_tokens for s in shards):,} tokens that "
                    f"{_who(run, records.history)} was trained on, such as {shards[0].name}, {why}"
                )
    return lines
