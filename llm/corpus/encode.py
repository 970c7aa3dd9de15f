"""What a worker process does: the documents of a unit to tokens. Everything here depends on the text and the settings alone."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import numpy as np

from llm.corpus.conversations import Segment, Template
from llm.corpus.documents import Counts, Document, read_documents
from llm.corpus.masks import Spans, document_spans, joined
from llm.corpus.options import ReadOptions
from llm.corpus.parts import DIGEST_BYTES, ROLES, EncodedUnit, write_part
from llm.corpus.plan import Task, Unit
from llm.data.permutation import Permutation
from llm.log import UserError
from llm.tokenizer import Tokenizer, load_tokenizer

_SOURCE_TAG = b"tally-source/v1"
BATCH_CHARS = 1 << 20  # by text, not by documents: enough to keep the encoder busy, little enough to hold


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common."""

    work: Path
    tokenizer_path: str
    tokenizer_kind: str | None
    dtype: np.dtype
    options: ReadOptions
    val_ratio: float
    shuffle_seed: int | None
    """None: documents stay in the order of the file."""
    known_units: frozenset[str]
    """Units that the dataset holds already: recognised and left out."""


_job: Job
_tokenizer: Tokenizer


def start_worker(job: Job) -> None:
    """Prepare this process for `run_task`."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # processes are the parallelism
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the parent hears Ctrl-C too, and speaks for all
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    global _job, _tokenizer
    _job, _tokenizer = job, load_tokenizer(job.tokenizer_path, job.tokenizer_kind)


def _leave_with_parent() -> None:
    parent_process().join()  # a killed parent cannot tell its workers
    os._exit(1)


def run_task(task: Task) -> None:
    """Encode a task's units into a part. Nothing but the news that it is done goes through the pipe."""
    write_part(_job.work, task.key, (encode_unit(unit, _job, _tokenizer) for unit in task.units), _job.dtype)


def encode_unit(unit: Unit, job: Job, tokenizer: Tokenizer) -> EncodedUnit:
    """The unit's documents as tokens, each ended by end-of-text; without tokens if the dataset holds them already."""
    if job.known_units:
        counts = Counts()
        digests = [document_digest(document.identity()) for document in _documents(unit, job, counts)]
        if (unit_id := unit_id_of(digests)) in job.known_units:
            return EncodedUnit(unit_id, digests, counts, {}, {}, {})
    counts, digests, encoded, masks, text_bytes = Counts(), [], [], [], []
    for batch in _batches(_documents(unit, job, counts)):
        for document, (ids, spans) in zip(batch, encode_documents(batch, job.options.template, tokenizer), strict=True):
            digests.append(document_digest(document.identity()))
            text_bytes.append(len(document.text.encode()))
            encoded.append(ids.astype(job.dtype))
            masks.append(spans)
    unit_id, n_bytes, tokens, spans = unit_id_of(digests), {}, {}, {}
    order = _order(len(digests), unit_id, job.shuffle_seed)
    is_val = np.array([_is_val(digest, job.val_ratio) for digest in digests], dtype=bool)
    for role, chosen in zip(ROLES, (order[~is_val[order]], order[is_val[order]]), strict=True):
        n_bytes[role] = sum(text_bytes[i] for i in chosen)
        tokens[role] = _joined([encoded[i] for i in chosen], tokenizer.eos_id, job.dtype)
        spans[role] = joined((masks[i], len(encoded[i]) + 1) for i in chosen)
    return EncodedUnit(unit_id, digests, counts, n_bytes, tokens, spans)


def encode_documents(documents: list[Document], template: Template, tokenizer: Tokenizer) -> list[tuple[np.ndarray, Spans]]:
    """The ids of each document, without an end-of-text, and which of them and the end-of-text that will follow carry loss.

    Names of special tokens become those tokens only where the template has put them.
    """
    segments = [document.segments(template) for document in documents]
    texts = iter(tokenizer.encode_batch([segment.text for some in segments for segment in some if not segment.is_special]))
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
    """The identity of some documents in an order, whatever file they lie in."""
    return _identity(b"tally-unit/v1", digests)


def source_id_of(digests: Iterable[bytes]) -> str:
    """The identity of a whole source: of all its documents, however it is cut into units. `digests` may come joined."""
    return _identity(_SOURCE_TAG, digests)


def _identity(tag: bytes, digests: Iterable[bytes]) -> str:
    hasher = hashlib.sha256(tag)
    for digest in digests:
        hasher.update(digest)
    return hasher.hexdigest()


def prefix_source_ids(digests: list[bytes], lengths: set[int]) -> dict[int, str]:
    """For each of these numbers of documents, the id of a source that ends after so many of them."""
    hasher, ids = hashlib.sha256(_SOURCE_TAG), {}
    for n_docs, digest in enumerate(digests, 1):
        hasher.update(digest)
        if n_docs in lengths:
            ids[n_docs] = hasher.copy().hexdigest()
    return ids


def document_digest(content: bytes) -> bytes:
    """What stands for a document in the identity of its unit and source."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def _is_val(digest: bytes, ratio: float) -> bool:
    """By content: the same document falls on the same side in every file, run and order."""
    return int.from_bytes(digest[:8], "big") < ratio * 2**64


def _order(n_docs: int, unit_id: str, shuffle_seed: int | None) -> np.ndarray:
    places = np.arange(n_docs)
    return places if shuffle_seed is None or n_docs == 0 else Permutation(n_docs, shuffle_seed, unit_id, 0)(places)


def _documents(unit: Unit, job: Job, counts: Counts) -> Iterator[Document]:
    return read_documents(unit.source.path, unit.source.name, unit.start, unit.stop, job.options, counts)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, n_chars = [], 0
    for document in documents:
        batch.append(document)
        n_chars += len(document.text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _joined(documents: list[np.ndarray], eos_id: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """All ids in one array with `eos_id` after each document, and the tokens of each."""
    lengths = np.array([len(ids) + 1 for ids in documents], dtype=np.int64)
    ends = np.cumsum(lengths)
    joined = np.empty(ends[-1] if len(ends) else 0, dtype)
    for ids, end in zip(documents, ends, strict=True):
        joined[end - 1 - len(ids) : end - 1] = ids
        joined[end - 1] = eos_id
    return joined, lengths
