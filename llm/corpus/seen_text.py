"""Whether a text was trained on: by its units of text where a ledger knows them, else by windows of its tokens."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from llm.corpus.documents import Counts, read_documents
from llm.corpus.encode import BATCH_CHARS, encode_documents
from llm.corpus.options import ReadOptions
from llm.corpus.plan import handfuls
from llm.corpus.recognise import units_of_file
from llm.data.at_hand import ShardsAtHand
from llm.data.import_ids import import_name, read_ids
from llm.data.ledger import Ledger
from llm.data.lineage import Ancestor, History
from llm.data.origin import documents_between
from llm.data.overlap import ALL, LENGTHS, NONE, SOME, Overlap, find_windows
from llm.data.phase import Phase
from llm.data.seen import percent, seen_by_unit
from llm.data.shards import Shard
from llm.tokenizer import Tokenizer

MOST_TOKENS = 1 << 23  # of documents that are compared at a time: about 1 GB of memory
MOST_PLACES, LOOKED_UP = 3, 64
Advance = Callable[[int], None]


@dataclass(frozen=True)
class AskedUnit:
    """Documents that stand side by side, and would be recognised together."""

    unit_ids: list[str]
    n_docs: int
    weight: int
    """Bytes of text, or tokens where there is none."""


@dataclass(frozen=True)
class Asked:
    """A file in question."""

    units: list[AskedUnit]
    documents: Callable[[], Iterator[tuple[np.ndarray, int]]]
    """Gives ids, without an end-of-text, and weight of each document, in order."""


@dataclass(frozen=True)
class DocumentAnswer:
    """What was found of one document that no ledger knows as part of a unit."""

    document: int
    """In the file, from 0."""
    tokens: int
    windows: int
    found: int
    """Windows that stand in a shard, whatever became of that."""
    trained: int
    """Windows of which a sample was trained on."""
    trained_whole: int
    """Windows of which all samples were."""
    held_out: int
    by_run: list[int]
    """Windows trained on, by each run of the model's history."""
    places: list[tuple[str, str, int]]
    """(shard, source file, document in it from 0): where most of the windows stand."""


@dataclass
class Answer:
    """What is to be said of a file."""

    known_units: int = 0
    units: int = 0
    weight: float = 0.0
    trained_weight: float = 0.0
    is_whole: bool = True
    """All of it was trained on."""
    windows: int = 0
    documents: int = 0
    """That were compared by windows."""
    waiting: int = 0
    """Windows in a phase, but in samples that have not been taken."""
    phaseless: Counter = field(default_factory=Counter)
    """Windows in training shards that no phase holds, by shard."""
    found: list[DocumentAnswer] = field(default_factory=list)
    """The documents of which something was found."""
    shards_by_run: list[Counter] = field(default_factory=list)
    """For each run, windows trained on by shard_id."""
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.trained_weight / max(1.0, self.weight)


def asked_text(
    path: Path, sources: list[dict], known: set[str], options: ReadOptions, tokenizer: Tokenizer, advance: Advance
) -> Asked:
    """A file of text or conversations. Raises UserError."""
    units = units_of_file(path, sources, known, options, advance)

    def documents() -> Iterator[tuple[np.ndarray, int]]:
        read = read_documents(path, path.name, 0, path.stat().st_size, options, Counts())
        for batch in handfuls(read, lambda document: len(document.text), BATCH_CHARS):
            encoded = encode_documents(batch, options.template, tokenizer)
            for document, (ids, _) in zip(batch, encoded, strict=True):
                yield ids, len(document.text.encode())

    return Asked([AskedUnit([unit.unit_id], unit.n_docs, unit.n_bytes) for unit in units], documents)


def asked_ids(path: Path, ledgers: list[Ledger], tokenizer: Tokenizer) -> Asked:
    """A .jsonl of ids: known by its bytes if a run imported it as it is. Raises ShardError."""
    digest = import_name(path, tokenizer.fingerprint, 0).rsplit(".")[-1]
    shards = [s for ledger in ledgers for phase in ledger.phases for s in phase.shards]
    units = [unit_id for s in shards if s.name.rsplit(".")[-1] == digest for unit_id in s.unit_ids]

    def documents() -> Iterator[tuple[np.ndarray, int]]:
        for ids in read_ids(path, tokenizer.vocab_size):
            yield _without_end(np.array(ids), tokenizer.eos_id), len(ids)

    sizes = [size for _, size in documents()]
    return Asked([AskedUnit(sorted(set(units)), len(sizes), sum(sizes))], documents)


def asked_shard(shard: Shard) -> Asked:
    """A shard's own documents; one for validation is known by none of its units, for these are of its file as a whole."""
    def documents() -> Iterator[tuple[np.ndarray, int]]:
        start = 0
        for stop in shard.doc_ends.tolist():
            yield _without_end(shard.tokens(start, stop), shard.meta.tokenizer["eos_id"]), stop - start
            start = stop

    meta = shard.meta
    whole = [AskedUnit(meta.unit_ids, meta.n_docs, meta.n_tokens)]
    if meta.role == "val":
        whole = [AskedUnit([], meta.n_docs, meta.n_tokens)]
    elif sum(unit.get("docs", 0) for unit in meta.units) == meta.n_docs:
        whole = [AskedUnit([unit["unit_id"]], unit["docs"], unit["bytes"]) for unit in meta.units]
    return Asked(whole, documents)


def _without_end(ids: np.ndarray, eos_id: int) -> np.ndarray:
    return ids[:-1] if len(ids) and ids[-1] == eos_id else ids


def answer(
    asked: Asked, runs: list[Ancestor], shards: list[Shard], advance: Advance, every: Callable[[dict], None] = lambda _: None
) -> Answer:
    """Ask the ledgers of `runs`, and `shards` for what they do not know. `every`: gets the record of each document compared."""
    by_unit = seen_by_unit(*(run.ledger for run in runs))
    told = Answer(units=len(asked.units), weight=float(sum(unit.weight for unit in asked.units)))
    told.shards_by_run = [Counter() for _ in runs]
    is_answered = []
    for unit in asked.units:
        fractions = [by_unit.get(unit_id, 0.0) for unit_id in unit.unit_ids]
        is_answered.append(bool(fractions) and min(fractions) > 0)  # else its text may be elsewhere too
        told.known_units += bool(fractions) and by_unit.keys() >= set(unit.unit_ids)
        if is_answered[-1]:
            told.trained_weight += unit.weight * sum(fractions) / len(fractions)
            told.is_whole &= min(fractions) == 1.0
    if not all(is_answered):
        of_documents = np.repeat(is_answered, [unit.n_docs for unit in asked.units]).tolist()
        numbered = zip(range(len(of_documents)), of_documents, asked.documents(), strict=True)
        others = ((number, *document) for number, is_known, document in numbered if not is_known)
        for batch in handfuls(others, lambda document: len(document[1]), MOST_TOKENS):
            _compare(told, batch, runs, shards, advance, every)
    return told


def _compare(
    told: Answer, batch: list[tuple[int, np.ndarray, int]], runs: list[Ancestor], shards: list[Shard], advance: Advance, every
) -> None:
    overlap, unreadable = find_windows([ids for _, ids, _ in batch], shards, [run.ledger for run in runs], advance)
    told.unreadable |= unreadable
    told.documents, told.windows = told.documents + len(batch), told.windows + len(overlap.compared)
    is_found, is_trained = overlap.shard >= 0, overlap.trained >= SOME
    for run, state in enumerate(overlap.state):
        told.shards_by_run[run].update(shards[n].meta.shard_id for n in overlap.shard[state >= SOME].tolist())
    told.waiting += int((~is_trained & overlap.in_phase).sum())
    phaseless = is_found & ~is_trained & ~overlap.in_phase & ~overlap.held_out
    told.phaseless.update(shards[n].meta.name for n in overlap.shard[phaseless].tolist())
    for (*_, weight), record in zip(batch, _records(overlap, batch, shards), strict=True):
        told.trained_weight += weight * record.trained / max(1, record.windows)
        told.is_whole &= record.trained_whole == record.windows
        if record.found:
            told.found.append(record)
        of_runs = {run.name: n for run, n in zip(runs, record.by_run, strict=True) if n}
        every(asdict(record) | {"by_run": of_runs})


def _records(overlap: Overlap, batch: list[tuple[int, np.ndarray, int]], shards: list[Shard]) -> Iterator[DocumentAnswer]:
    document, n = overlap.compared.document, len(batch)
    ends = np.cumsum(np.bincount(document, minlength=n)).tolist()

    def counted(chosen: np.ndarray) -> list[int]:
        return np.bincount(document[chosen], minlength=n).tolist()

    columns = [
        counted(document >= 0), counted(overlap.shard >= 0), counted(overlap.trained >= SOME), counted(overlap.trained == ALL),
        counted(overlap.held_out),
    ]  # fmt: skip
    by_run = list(zip(*(counted(state > NONE) for state in overlap.state), strict=True))
    start = 0
    for at, (number, ids, _) in enumerate(batch):
        here, start = slice(start, ends[at]), ends[at]
        places = _places(overlap, here, shards) if columns[1][at] else []
        yield DocumentAnswer(number, len(ids), *(column[at] for column in columns), list(by_run[at]), places)


def _places(overlap: Overlap, here: slice, shards: list[Shard]) -> list[tuple[str, str, int]]:
    """Where most of the windows of one document stand, trained on first."""
    found = Counter()
    order = np.argsort(-overlap.trained[here].astype(int), kind="stable")
    order = order[overlap.shard[here][order] >= 0]
    order = order[:: -(-len(order) // LOOKED_UP)]
    for number, place in zip(overlap.shard[here][order].tolist(), overlap.place[here][order].tolist(), strict=True):
        ((source, document),) = documents_between(shards[number], place, place + 1)
        found[shards[number].meta.name, source, document] += 1
    return [place for place, _ in found.most_common(MOST_PLACES)]


# ---------------------------------------------------------------- for people


def answer_lines(
    file: Path, asked: Asked, told: Answer, history: History, at_hand: ShardsAtHand, shards: list[Shard], most_documents: int
) -> list[str]:
    """The answer in words: the verdict first, then what it rests on. `shards`: those that were compared."""
    compared = {shard.meta.shard_id for shard in shards} - told.unreadable.keys()
    missing = _missing(history, at_hand, compared) if told.documents else []
    units = {unit_id for unit in asked.units for unit_id in unit.unit_ids}
    lines = [f"{file}: {_verdict(told, history, bool(missing))}"]
    lines.append(f"  {told.known_units:,} of its {told.units:,} units of text are in the data of {_whose(history)}")
    for run in history.runs:
        lines += [line for phase in run.ledger.phases for line in _phase_lines(phase, units, _by(run, history))]
    held_out = sum(u.get("docs", 0) for s in at_hand.shards.values() if s.meta.role == "val" for u in s.meta.units if u["unit_id"] in units)
    if held_out:
        lines.append(f"  {held_out:,} of its documents are held out for validation and never trained on")
    if told.documents:
        lines += _window_lines(told, history, sum(shard.meta.n_tokens for shard in shards if shard.meta.shard_id in compared), len(compared))
        lines += _document_lines(told, most_documents)
    lines += [f"  not compared: {what}" for what in (*missing, *told.unreadable.values())]
    return lines + [f"  {what}" for what in history.unknown]


def _verdict(told: Answer, history: History, is_missing: bool) -> str:
    if told.trained_weight:
        return "fully" if told.is_whole else f"partly ({percent(told.share)})"
    imported = [base.run for base in history.bases if base.kind == "imported"]
    since = f" since the import of {imported[-1]}" if imported else ", as far as is recorded" if history.unknown else ""
    return f"never{since}" + (", but not all could be compared" if is_missing else "")


def _whose(history: History) -> str:
    return "the run" if len(history.runs) == 1 else "the run and its bases"


def _by(run: Ancestor, history: History) -> str:
    return "" if run is history.runs[-1] else f"its base run {run.name}, "


def _phase_lines(phase: Phase, units: set[str], by: str) -> list[str]:
    here = [(index, shard) for index, shard in enumerate(phase.shards) if units.intersection(shard.unit_ids)]
    if not here:
        return []
    seen = [phase.seen_samples(index) for index, _ in here]
    share = sum(int(mask.sum()) for mask in seen) / max(1, sum(mask.size for mask in seen))
    n_units = len(units.intersection(unit for _, shard in here for unit in shard.unit_ids))
    names = ", ".join(shard.name for _, shard in here[:5])
    return [f"  {by}phase {phase.name} ({phase.dataset}), {_steps([phase])}: {n_units:,} units, "
            f"{percent(share)} of their {len(here):,} shards: {names}"]  # fmt: skip


def _steps(phases: list[Phase]) -> str:
    begun = [phase for phase in phases if phase.first_step is not None]
    return f"steps {begun[0].first_step:,} to {begun[-1].last_step:,}" if begun else "not begun"


def _window_lines(told: Answer, history: History, n_tokens: int, n_shards: int) -> list[str]:
    lines = [f"  compared: {told.documents:,} documents by {told.windows:,} windows of up to {LENGTHS[0]} tokens, with "
             f"{n_shards:,} shards of {n_tokens:,} tokens"]  # fmt: skip
    for run, found in zip(history.runs, told.shards_by_run, strict=True):
        phases = [phase for phase in run.ledger.phases if found.keys() & {shard.shard_id for shard in phase.shards}]
        if phases:
            names = ", ".join(phase.name for phase in phases)
            who = "the run itself" if run is history.runs[-1] else f"its base run {run.name}"
            lines.append(f"  {found.total():,} of {told.windows:,} windows trained on by {who} (phase {names}, {_steps(phases)})")
    if told.waiting:
        lines.append(f"  {told.waiting:,} windows stand in a phase, in samples that have not been taken")
    if told.phaseless:
        names = ", ".join(told.phaseless)
        lines.append(f"  {told.phaseless.total():,} windows are tokenized, in shards that no phase holds: {names}")
    if n_held_out := sum(record.held_out for record in told.found):
        lines.append(f"  {n_held_out:,} windows stand in validation shards, which are never trained on")
    return lines


def _document_lines(told: Answer, most: int) -> list[str]:
    ranked = sorted(told.found, key=lambda record: -record.trained / record.windows)
    lines = []
    for record in ranked[:most]:
        what = f"{record.found:,} of {record.windows:,} windows found, none trained on"
        if record.trained:
            in_full = "" if record.trained_whole == record.trained else f", {record.trained_whole:,} in full"
            what = f"{record.trained:,} of {record.windows:,} windows trained on{in_full}"
        places = "; ".join(f"{source} document {document:,} in {shard}" for shard, source, document in record.places)
        lines.append(f"  document {record.document:,}: {what}: {places}")
    if len(ranked) > most:
        lines.append(f"  and {len(ranked) - most:,} more documents of which something was found; --documents FILE writes all")
    return lines


def _missing(history: History, at_hand: ShardsAtHand, compared: set[str]) -> list[str]:
    """Shards that the runs were trained on and that were not compared."""
    lines = []
    for run in history.runs:
        shards = {s.shard_id: s for phase in run.ledger.phases for s in phase.shards if s.shard_id not in compared}.values()
        for there, why in ((True, "which another tokenizer made or which are damaged"), (False, f"not at hand: {at_hand.where()}")):
            chosen = [s for s in shards if (s.shard_id in at_hand.shards) is there]
            if chosen:
                whose = f"its base run {run.name}" if run is not history.runs[-1] else "the run"
                lines.append(f"{len(chosen):,} shards of {sum(s.n_tokens for s in chosen):,} tokens that {whose} was trained on, such as "
                             f"{chosen[0].name}, {why}")  # fmt: skip
    return lines
