"""Shards from a .jsonl with one list of token ids a line, each line a document."""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path

import numpy as np

from llm.log import log

from .record import ShardError
from .shard_meta import META_SUFFIX, ShardMeta, token_dtype
from .shards import Shard, write_shard

BACKEND = "import_ids"
BATCH_LINES = 1024
UNIT_LINES = 64  # two files that begin with so many lines alike are no accident


def import_ids(jsonl: Path | str, folder: Path | str, tokenizer: dict, seq_len: int) -> ShardMeta:
    """A train shard in `folder` of all lists of ids in the file.

    The shard is named by the contents of the file, so importing it again only finds the shard
    there, also when two runs begin at once. A last line that breaks off is left out, with a
    warning: whoever writes it has not finished. Raises ShardError that names the line.
    """
    path = Path(jsonl)
    meta_path = (
        Path(folder) / f"{import_name(path, tokenizer['fingerprint'], seq_len)}{META_SUFFIX}"
    )
    with nullcontext() if meta_path.exists() else one_writer(Path(folder)):
        if meta_path.exists():
            return Shard.open(meta_path).meta
        lines = (line for _, line in whole_lines(path, warn=False))
        return write_imported(
            Path(folder),
            meta_path.name.removesuffix(META_SUFFIX),
            _id_batches(path, tokenizer["vocab_size"], tokenizer["eos_id"]),
            tokenizer,
            seq_len,
            path.name,
            line_unit_ids(lines, tokenizer["fingerprint"]),
        )


def import_name(jsonl: Path, fingerprint: str, seq_len: int) -> str:
    """The name of the shard that a file as it is now becomes: of its bytes and the tokenizer.

    The same ids under another tokenizer are another text.
    """
    digest = hashlib.sha256(fingerprint.encode())
    try:
        with open(jsonl, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    except OSError as error:
        raise ShardError(
            f"{jsonl}: cannot be read ({error.strerror}). "
            f"Give a file with one list of token ids a line."
        ) from None
    return imported_name(jsonl.name.removesuffix(".jsonl"), seq_len, digest.hexdigest())


def imported_name(stem: str, seq_len: int, digest: str) -> str:
    return f"{stem}.cached.{seq_len}.{digest[:12]}"


def write_imported(
    folder: Path,
    name: str,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    tokenizer: dict,
    seq_len: int,
    source: str,
    unit_ids: Iterable[str],
) -> ShardMeta:
    """Publish a shard of ids that came without text. `source`: the file's name, for people."""
    return write_shard(
        folder,
        name,
        parts,
        dtype=token_dtype(tokenizer["vocab_size"]),
        tokenizer=tokenizer,
        units=[{"unit_id": unit_id, "name": source, "bytes": 0} for unit_id in unit_ids],
        role="train",
        seq_len=seq_len,
        writer={"backend": BACKEND},
    )


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process imports into `folder`. Raises ShardError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held to the end
    except OSError as error:
        raise ShardError(
            f"{folder}: cannot be written ({error.strerror}). "
            f"data.save_bin=false keeps the shard in the run's folder."
        ) from None
    with lock:
        with suppress(OSError):  # a file system that knows no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_ids(path: Path, vocab_size: int) -> Iterator[list[int]]:
    """The lists of ids of a .jsonl, without empty ones. Raises ShardError that names the line."""
    for number, line in whole_lines(path, warn=True):
        if ids := _id_list(line, f"{path}:{number}", vocab_size):
            yield ids


def holds_ids(path: Path) -> bool:
    """Whether the first line of a .jsonl that is not blank is a list of whole numbers."""
    with suppress(OSError, ValueError):
        first = next((line for _, line in whole_lines(path, warn=False) if line.strip()), b"")
        found = json.loads(first)
        return isinstance(found, list) and set(map(type, found)) <= {int}
    return False


def whole_lines(path: Path, warn: bool) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers from 1, but for a last one that breaks off."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") or _is_json(line):
                yield number, line
            elif warn and line.strip():
                log.warning(
                    f"{path}:{number}: the last line breaks off; it is left out until it is whole"
                )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def line_unit_ids(lines: Iterable[bytes], fingerprint: str) -> list[str]:
    """Of the lines up to UNIT_LINES, twice, four times as many and so on.

    So files that begin alike are told from those that do not.
    """
    ids, end, number, unit = [], 0, 0, hashlib.sha256(fingerprint.encode())
    for number, line in enumerate(lines, 1):
        unit.update(line.strip() + b"\n")
        if number == UNIT_LINES << len(ids):
            ids.append(unit.hexdigest())
            end, unit = number, hashlib.sha256(fingerprint.encode())
    return ids if ids and number == end else [*ids, unit.hexdigest()]


def _id_batches(
    path: Path, vocab_size: int, eos_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    n_docs, n_open = 0, 0
    documents = read_ids(path, vocab_size)
    while batch := list(islice(documents, BATCH_LINES)):
        n_docs, n_open = n_docs + len(batch), n_open + sum(ids[-1] != eos_id for ids in batch)
        yield (
            np.concatenate([np.array(ids, np.int64) for ids in batch]),
            np.array([len(ids) for ids in batch]),
        )
    if n_open:
        log.warning(
            f"{path}: {n_open:,} of {n_docs:,} lists do not end with the end-of-text id {eos_id}; "
            f"they run into the next one as they are"
        )


def _id_list(line: bytes, where: str, vocab_size: int) -> list[int]:
    try:
        ids = json.loads(line) if line.strip() else []
    except ValueError:
        raise ShardError(
            f"{where}: not JSON. Each line must be one list of token ids, like [17, 4, 0]."
        ) from None
    if not isinstance(ids, list) or not set(map(type, ids)) <= {
        int
    }:  # type(): True is an int by isinstance
        raise ShardError(
            f"{where}: not a list of whole numbers. Each line must be one list of token ids, "
            f"like [17, 4, 0]."
        )
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ShardError(
            f"{where}: id {wrong} is outside the vocabulary of {vocab_size:,}. "
            f"These ids come from another tokenizer: set tokenizer_path to that one."
        )
    return ids
