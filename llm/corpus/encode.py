"""What a worker process does: the documents of a unit to tokens. Everything here depends on the text and the settings alone."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from pathlib import Path

import numpy as np

from llm.corpus.conversations import Segment, Template
from llm.corpus.documents import Counts, Document, read_documents
from llm.corpus.masks import Spans, document_spans
from llm.corpus.options import ReadOptions
from llm.corpus.parts import DIGEST_BYTES, ROLES, PartWriter
from llm.corpus.plan import Task, Unit, handfuls
from llm.data.permutation import Permutation
from llm.log import UserError
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.tokenizer.fast import FastEncoder

FAST, REFERENCE = "fast", "reference"
UNIT_TAG, SOURCE_TAG = b"tally-unit/v1", b"tally-source/v1"
Encode = Callable[[list[str]], list[np.ndarray]]
BATCH_CHARS = 1 << 20  # by text, not by documents: enough to keep the encoder busy, little enough to hold


@dataclass(frozen=True)
class Request:
    """What the person asked for."""

    inputs: tuple[str, ...]
    out: Path
    tokenizer_path: str
    seq_len: int
    tokenizer_kind: str | None = None
    workers: int = 1
    encoder: str = FAST
    """FAST where it can be used, or REFERENCE."""
    val_ratio: float = 0.0
    shard_tokens: int = 1 << 27
    shuffle_seed: int | None = None
    """None: documents stay in the order of the file."""
    emit_jsonl: bool = False
    options: ReadOptions = ReadOptions()

    def __post_init__(self):
        for flag, value in (("--seq-len", self.seq_len), ("--workers", self.workers), ("--shard-tokens", self.shard_tokens)):
            if value < 1:
                raise UserError(f"{flag} is {value}: give 1 or more.")
        if not 0 <= self.val_ratio < 1:
            raise UserError(f"--val-ratio is {self.val_ratio}: give a share from 0 to below 1, for example 0.01.")


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common."""

    work: Path
    request: Request
    dtype: np.dtype
    known_units: frozenset[str]
    """Units that the dataset holds already: recognised and left out."""


_job: Job
_tokenizer: Tokenizer


def start_worker(job: Job) -> None:
    """Prepare this process, a child of the one that speaks to the person, for `run_task`."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the parent hears Ctrl-C too, and speaks for all
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    prepare(job)


def prepare(job: Job) -> None:
    """Prepare this process for `run_task`."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # processes are the parallelism
    global _job, _tokenizer
    _job, _tokenizer = job, load_tokenizer(job.request.tokenizer_path, job.request.tokenizer_kind)
    _fast_encoder.cache_clear()


def _leave_with_parent() -> None:
    parent_process().join()  # a killed parent cannot tell its workers
    os._exit(1)


@cache
def _fast_encoder() -> FastEncoder:
    return FastEncoder(_tokenizer.rank_encoder)


def run_task(task: Task, encoder: str) -> None:
    """Encode a task's units into a part; nothing comes back but the news that it is done. Raises FastPathWrong, and then leaves no part."""
    encode = _fast_encoder().encode_batch if encoder == FAST else _tokenizer.encode_batch
    with PartWriter(_job.work, task.key, _job.dtype, encoder) as part:
        for unit in task.units:
            encode_unit(unit, _job, _tokenizer, encode, part)


def encode_unit(unit: Unit, job: Job, tokenizer: Tokenizer, encode: Encode, part: PartWriter) -> None:
    """Write the unit's documents as tokens, each ended by end-of-text; without tokens if the dataset holds them already."""
    if job.known_units:
        counts = Counts()
        digests = [document_digest(document.identity()) for document in _documents(unit, job, counts)]
        if (unit_id := unit_id_of(digests)) in job.known_units:
            part.add_known(digests)
            part.end_unit(unit_id, counts, {})
            return
    counts, is_val, eos = Counts(), bytearray(), np.array(tokenizer.eos_id, job.dtype).tobytes()
    for batch in handfuls(_documents(unit, job, counts), lambda document: len(document.text), BATCH_CHARS):
        for document, (ids, spans) in zip(batch, encode_documents(batch, job.request.options.template, tokenizer, encode), strict=True):
            digest = document_digest(document.identity())
            is_val.append(_is_val(digest, job.request.val_ratio))
            part.add(ROLES[is_val[-1]], digest, ids, spans, eos, len(document.text.encode()))
    unit_id = unit_id_of([part.digests])
    part.end_unit(unit_id, counts, _orders(np.frombuffer(is_val, bool), unit_id, job.request.shuffle_seed))


def encode_documents(
    documents: list[Document], template: Template, tokenizer: Tokenizer, encode: Encode | None = None
) -> list[tuple[np.ndarray, Spans]]:
    """The ids of each document, without an end-of-text, and which of them and the end-of-text that will follow carry loss.

    `encode`: what gives the tokenizer's ids faster. Names of special tokens become those tokens only where the template has put them.
    """
    segments = [document.segments(template) for document in documents]
    texts = iter((encode or tokenizer.encode_batch)([segment.text for some in segments for segment in some if not segment.is_special]))
    special = {name: np.array([token], np.uint32) for name, token in tokenizer.special_ids.items()}
    pieces = [[special[segment.text] if segment.is_special else next(texts) for segment in some] for some in segments]
    ids = [some[0] if len(some) == 1 else np.concatenate(some) for some in pieces]
    masks = [_spans(*rest) if document.conversation else None for document, *rest in zip(documents, segments, pieces, strict=True)]
    return list(zip(ids, masks, strict=True))


def _spans(segments: list[Segment], pieces: list[np.ndarray]) -> np.ndarray:
    """The end-of-text carries loss where nothing else tells that the assistant's turn is over."""
    carries = [segment.is_assistant for segment in segments]
    return document_spans([*map(len, pieces), 1], [*carries, carries[-1]])


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Raises UserError when the tokenizer lacks a special token that the template writes."""
    missing = [name for name in template.special_in_use() if name not in tokenizer.special_ids]
    if missing:
        raise UserError(
            f"the chat template {template.name} has {missing[0]!r}, which is no special token of this tokenizer "
            f"({', '.join(tokenizer.special_ids)}). Give a --template that fits it, or a tokenizer that has ChatML's tokens, "
            f"as those of tools/train_tokenizer.py do."
        )


def unit_id_of(digests: Iterable[bytes]) -> str:
    """The identity of some documents in an order, whatever file they lie in. `digests` may come joined."""
    return _identity(UNIT_TAG, digests)


def source_id_of(digests: Iterable[bytes]) -> str:
    """The identity of a whole source: of all its documents, however it is cut into units. `digests` may come joined."""
    return _identity(SOURCE_TAG, digests)


def _identity(tag: bytes, digests: Iterable[bytes]) -> str:
    hasher = hashlib.sha256(tag)
    for digest in digests:
        hasher.update(digest)
    return hasher.hexdigest()


def ids_so_far(tag: bytes, digests: Iterable[bytes]) -> Iterator[str]:
    """After each document the id of a unit or source that ends with it."""
    hasher = hashlib.sha256(tag)
    for digest in digests:
        hasher.update(digest)
        yield hasher.copy().hexdigest()


def document_digest(content: bytes) -> bytes:
    """What stands for a document in the identity of its unit and source."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def _is_val(digest: bytes, ratio: float) -> bool:
    """By content: the same document falls on the same side in every file, run and order."""
    return int.from_bytes(digest[:8], "big") < ratio * 2**64


def _orders(is_val: np.ndarray, unit_id: str, shuffle_seed: int | None) -> dict[str, np.ndarray]:
    """For each role the order of its documents, of which the unit's documents in a shuffled order are the union."""
    if shuffle_seed is None or not len(is_val):
        return {}
    order = Permutation(len(is_val), shuffle_seed, unit_id, 0)(np.arange(len(is_val)))
    of_role = {"train": ~is_val, "val": is_val}
    return {role: (np.cumsum(chosen) - 1)[order[chosen[order]]] for role, chosen in of_role.items()}


def _documents(unit: Unit, job: Job, counts: Counts) -> Iterator[Document]:
    return read_documents(unit.source.path, unit.source.name, unit.start, unit.stop, job.request.options, counts)
