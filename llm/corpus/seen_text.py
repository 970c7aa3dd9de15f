"""Whether a text was trained on: by its units where a ledger knows them, else by its tokens."""

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
from llm.data.lineage import History
from llm.data.origin import documents_between
from llm.data.overlap import ALL, SOME, Overlap, cuts_for, find_windows
from llm.data.record import ShardError
from llm.data.seen import seen_by_unit
from llm.data.shards import Shard
from llm.tokenizer import Tokenizer

MOST_TOKENS = 1 << 23  # of documents that are compared at a time: about 1 GB of memory
MOST_PLACES, LOOKED_UP = 3, 64
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Records:
    """What an answer can rest on: the ledgers of a model's history, and shards."""

    history: History
    at_hand: ShardsAtHand
    fingerprint: str

    @property
    def shards(self) -> list[Shard]:
        """Those that can be compared: made with the model's tokenizer."""
        found = self.at_hand.shards.values()
        return [s for s in found if s.meta.tokenizer["fingerprint"] == self.fingerprint]


@dataclass(frozen=True)
class AskedUnit:
    """Documents that stand side by side, and would be recognised together."""

    unit_ids: list[str]
    n_docs: int
    weight: int
    """Bytes of text, or tokens where there is none."""


@dataclass(frozen=True)
class AskedDocument:
    number: int
    """In the file, from 0."""
    ids: np.ndarray
    """int64, without an end-of-text."""
    weight: int


@dataclass(frozen=True)
class Asked:
    """A file in question."""

    units: list[AskedUnit]
    documents: Callable[[], Iterator[AskedDocument]]
    """Gives all of them, in order."""


@dataclass(frozen=True)
class DocumentAnswer:
    """What was found of one document that was compared by its tokens."""

    document: int
    tokens: int
    windows: int
    found: int
    """Windows that stand in a shard, whatever became of that."""
    trained: int
    """Windows of which a sample was trained on."""
    trained_whole: int
    """Windows of which all samples were."""
    held_out: int
    by_run: dict[str, int]
    """Windows of which each run, or "base NAME", has trained on a sample."""
    places: list[tuple[str, str, int]]
    """(shard, source file, document in it from 0): where most of the windows stand."""


@dataclass
class Answer:
    """What is to be said of a file."""

    units: int
    weight: int
    known_units: int = 0
    trained_weight: float = 0.0
    is_whole: bool = True
    """All of it was trained on."""
    documents: int = 0
    """That were compared by their tokens."""
    windows: int = 0
    waiting: int = 0
    """Windows in a phase, but in samples that have not been taken."""
    phaseless: Counter = field(default_factory=Counter)
    """By the name of a training shard that no phase holds, windows that stand there alone."""
    by_run: list[Counter] = field(default_factory=list)
    """For each run of the history, by shard_id, windows that it has trained on."""
    found: list[DocumentAnswer] = field(default_factory=list)
    """The documents of which something was found."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """By shard_id, why a shard could not be compared."""

    @property
    def share(self) -> float:
        return self.trained_weight / max(1, self.weight)


def asked_text(
    path: Path,
    records: Records,
    options: ReadOptions,
    tokenizer: Tokenizer,
    advance: Advance,
) -> Asked:
    """A file of text or conversations. `advance(n)` hears of bytes read. Raises UserError."""
    known = {unit_id for run in records.history.runs for unit_id in run.ledger.units_held()}
    units = units_of_file(path, records.at_hand.sources, known, options, advance)

    def documents() -> Iterator[AskedDocument]:
        size, number = path.stat().st_size, 0
        read = read_documents(path, path.name, 0, size, options, Counts())
        for batch in handfuls(read, lambda document: len(document.text), BATCH_CHARS):
            encoded = encode_documents(batch, options.template, tokenizer)
            for document, (ids, _) in zip(batch, encoded, strict=True):
                yield AskedDocument(number, ids, len(document.text.encode()))
                number += 1

    return Asked([AskedUnit([u.unit_id], u.n_docs, u.n_bytes) for u in units], documents)


def asked_ids(path: Path, records: Records, tokenizer: Tokenizer) -> Asked:
    """A .jsonl of ids: known by its bytes if a run imported it as it is. Raises ShardError."""
    digest = _digest_in(import_name(path, tokenizer.fingerprint, 0))
    ledgers = [run.ledger for run in records.history.runs]
    held = [shard for ledger in ledgers for phase in ledger.phases for shard in phase.shards]
    units = {unit for s in held if _digest_in(s.name) == digest for unit in s.unit_ids}

    def documents() -> Iterator[AskedDocument]:
        for number, ids in enumerate(read_ids(path, tokenizer.vocab_size)):
            yield AskedDocument(number, _without_end(np.array(ids), tokenizer.eos_id), len(ids))

    weights = [document.weight for document in documents()]
    if not weights:
        raise ShardError(f"{path}: holds no list of token ids that is not empty.")
    return Asked([AskedUnit(sorted(units), len(weights), sum(weights))], documents)


def _digest_in(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def asked_shard(shard: Shard, fingerprint: str) -> Asked:
    """A shard's own documents. Raises ShardError where another tokenizer's would be compared.

    One for validation is known by none of its units, for these are of its file as a whole.
    """
    meta = shard.meta

    def documents() -> Iterator[AskedDocument]:
        if (its := meta.tokenizer["fingerprint"]) != fingerprint:
            raise ShardError(
                f"{meta.path}: made with tokenizer {its[:16]}, the model's is {fingerprint[:16]}, so "
                f"its ids cannot be compared. Ask for the text that it was made of."
            )
        start = 0
        for number, stop in enumerate(shard.doc_ends.tolist()):
            ids = _without_end(shard.tokens(start, stop), meta.tokenizer["eos_id"])
            yield AskedDocument(number, ids, stop - start)
            start = stop

    if meta.role == "val":
        return Asked([AskedUnit([], meta.n_docs, meta.n_tokens)], documents)
    if sum(unit.get("docs", 0) for unit in meta.units) == meta.n_docs:
        units = [AskedUnit([u["unit_id"]], u["docs"], u["bytes"]) for u in meta.units]
        return Asked(units, documents)
    return Asked([AskedUnit(meta.unit_ids, meta.n_docs, meta.n_tokens)], documents)


def _without_end(ids: np.ndarray, eos_id: int) -> np.ndarray:
    return ids[:-1] if len(ids) and ids[-1] == eos_id else ids


def answer(
    asked: Asked,
    records: Records,
    advance: Advance,
    every: Callable[[dict], None] = lambda _: None,
) -> Answer:
    """What the ledgers say of the file, and the shards of what no ledger knows.

    `advance(n)` hears of tokens of shards; `every` gets what was found of each document compared.
    """
    runs = records.history.runs
    by_unit = seen_by_unit(*(run.ledger for run in runs))
    told = Answer(len(asked.units), sum(unit.weight for unit in asked.units))
    told.by_run = [Counter() for _ in runs]
    is_answered = [_ask_ledgers(told, unit, by_unit) for unit in asked.units]
    if not all(is_answered):
        of_documents = np.repeat(is_answered, [unit.n_docs for unit in asked.units]).tolist()
        pairs = zip(of_documents, asked.documents(), strict=True)
        others = (document for is_known, document in pairs if not is_known)
        for batch in handfuls(others, lambda document: len(document.ids), MOST_TOKENS):
            _compare(told, batch, records, advance, every)
    return told


def _ask_ledgers(told: Answer, unit: AskedUnit, by_unit: dict[str, float]) -> bool:
    """Whether that settles it: text that a phase only holds so far may have come from elsewhere."""
    fractions = [by_unit.get(unit_id, 0.0) for unit_id in unit.unit_ids]
    told.known_units += bool(fractions) and by_unit.keys() >= set(unit.unit_ids)
    if not fractions or min(fractions) == 0:
        return False
    told.trained_weight += unit.weight * sum(fractions) / len(fractions)
    told.is_whole &= min(fractions) == 1
    return True


def _compare(
    told: Answer,
    batch: list[AskedDocument],
    records: Records,
    advance: Advance,
    every: Callable[[dict], None],
) -> None:
    shards, runs = records.shards, records.history.runs
    ledgers = [run.ledger for run in runs]
    cuts, ids = cuts_for(shards), [document.ids for document in batch]
    overlap, unreadable = find_windows(ids, shards, ledgers, advance, cuts)
    told.unreadable |= unreadable
    told.documents += len(batch)
    told.windows += len(overlap.compared)
    for counts, state in zip(told.by_run, overlap.state, strict=True):
        numbers = overlap.shard[state >= SOME].tolist()
        counts.update(shards[number].meta.shard_id for number in numbers)
    is_waiting = (overlap.trained < SOME) & overlap.in_phase
    is_phaseless = (overlap.shard >= 0) & ~overlap.in_phase & ~overlap.held_out
    told.waiting += int(is_waiting.sum())
    told.phaseless.update(shards[number].meta.name for number in overlap.shard[is_phaseless])
    *bases, itself = (run.name for run in runs)
    names = [*(f"base {name}" for name in bases), itself]
    for document, found in zip(batch, _found(overlap, batch, shards, names), strict=True):
        told.trained_weight += document.weight * found.trained / max(1, found.windows)
        told.is_whole &= found.trained_whole == found.windows
        if found.found:
            told.found.append(found)
        every(asdict(found))


def _found(
    overlap: Overlap,
    batch: list[AskedDocument],
    shards: list[Shard],
    runs: list[str],
) -> Iterator[DocumentAnswer]:
    def by_document(chosen: np.ndarray) -> list[int]:
        return np.bincount(overlap.compared.document[chosen], minlength=len(batch)).tolist()

    windows = by_document(np.ones(len(overlap.compared), bool))
    found, held_out = by_document(overlap.shard >= 0), by_document(overlap.held_out)
    some, whole = by_document(overlap.trained >= SOME), by_document(overlap.trained == ALL)
    by_run = [by_document(state >= SOME) for state in overlap.state]
    stop = 0
    for at, document in enumerate(batch):
        start, stop = stop, stop + windows[at]
        yield DocumentAnswer(
            document.number,
            len(document.ids),
            windows[at],
            found[at],
            some[at],
            whole[at],
            held_out[at],
            {run: counts[at] for run, counts in zip(runs, by_run, strict=True) if counts[at]},
            _places(overlap, slice(start, stop), shards) if found[at] else [],
        )


def _places(overlap: Overlap, here: slice, shards: list[Shard]) -> list[tuple[str, str, int]]:
    """Where most of the windows of one document stand, by some of them, trained on first."""
    order = np.argsort(-overlap.trained[here].astype(int), kind="stable")
    order = order[overlap.shard[here][order] >= 0]
    order = order[:: -(-len(order) // LOOKED_UP)]
    numbers, places = overlap.shard[here][order], overlap.place[here][order]
    found = Counter()
    for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
        ((source, document),) = documents_between(shards[number], place, place + 1)
        found[shards[number].meta.name, source, document] += 1
    return [place for place, _ in found.most_common(MOST_PLACES)]
