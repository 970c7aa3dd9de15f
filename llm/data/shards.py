"""Shards: immutable files of token ids, written once, identified by content, checked whenever they are read.

The format stands in `shard_meta`.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from llm import durable

from .record import ShardError, write_record
from .shard_meta import CRC_BLOCK_BYTES, IDX_DTYPE, MASK_DTYPE, META_SUFFIX, ShardMeta, shard_id_of, token_dtype


class Shard:
    """A published shard, open for reading. Its tokens are mapped at first use; ids come out as int64, checked."""

    def __init__(self, meta: ShardMeta):
        self.meta = meta
        self._bin_path = str(meta.file("bin"))  # once: to make a path costs more than to read a row
        self._ends_are_checked = False

    @classmethod
    def open(cls, meta_path: Path | str) -> "Shard":
        """Check all that can be checked without reading tokens: a start must be quick with thousands of shards.

        The first use of the tokens adds the checksums of the first and the last block; `verify_shard` reads everything.
        """
        shard = cls(ShardMeta.read(Path(meta_path)))
        shard._check_meta()
        shard._check_sizes()
        return shard

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as int64."""
        ids = np.empty(stop - start, np.int64)
        self.read(start, stop, ids)
        return ids

    def read(self, start: int, stop: int, into: np.ndarray) -> None:
        """Ids [start, stop) into int64: the one place where stored ids are widened and held against the vocabulary."""
        assert 0 <= start < stop <= self.meta.n_tokens, (start, stop, self.meta.n_tokens)
        stored = self._bin[start:stop]
        vocab_size = self.meta.tokenizer["vocab_size"]
        if stored.max() >= vocab_size:
            at = int(np.argmax(stored >= vocab_size))
            raise self._damaged("bin", f"token {start + at:,} is id {stored[at]}, beyond the vocabulary of {vocab_size:,}")
        into[:] = stored

    @cached_property
    def doc_ends(self) -> np.ndarray:
        """The exclusive token end of each document, u64[n_docs]."""
        ends = self._read_whole("idx", IDX_DTYPE)
        if ends[-1] != self.meta.n_tokens or np.any(ends[1:] <= ends[:-1]):
            raise self._damaged("idx", "its document ends do not rise to the number of tokens")
        return ends

    def loss_mask(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the tokens [start, stop) carry loss, or None when all do."""
        if self._spans is None:
            return None
        starts, ends = self._spans
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, stop)
        steps = np.zeros(stop - start + 1, np.int8)  # +1 where a span opens, -1 where one closes
        steps[np.maximum(starts[first:last] - start, 0)] += 1
        steps[np.minimum(ends[first:last], stop) - start] -= 1
        return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray] | None:
        if "mask" not in self.meta.files:
            return None
        starts, lengths = self._read_whole("mask", MASK_DTYPE).reshape(-1, 2).astype(np.int64).T
        return starts, starts + lengths

    @property
    def _bin(self) -> np.ndarray:
        if not self._ends_are_checked:
            for block in {0, len(self.meta.files["bin"]["crc32"]) - 1}:
                self._read_block(block)
            self._ends_are_checked = True
        try:
            return _mapped(self._bin_path, self.meta.dtype, self.meta.shard_id)
        except OSError as error:
            raise self._gone(error) from None

    def _read_block(self, block: int) -> bytes:
        data = self._content("bin", block * CRC_BLOCK_BYTES, CRC_BLOCK_BYTES)
        if zlib.crc32(data) != self.meta.files["bin"]["crc32"][block]:
            block_tokens = CRC_BLOCK_BYTES // np.dtype(self.meta.dtype).itemsize
            stop = min((block + 1) * block_tokens, self.meta.n_tokens)
            raise self._damaged("bin", f"tokens {block * block_tokens:,} to {stop:,} do not match their checksum")
        return data

    def _read_whole(self, kind: str, dtype: np.dtype) -> np.ndarray:
        data = self._content(kind)
        if hashlib.sha256(data).hexdigest() != self.meta.files[kind]["sha256"]:
            raise self._damaged(kind, "its contents do not match the hash in its meta")
        return np.frombuffer(data, dtype)

    def _content(self, kind: str, start: int = 0, n_bytes: int = -1) -> bytes:
        try:
            with open(self.meta.file(kind), "rb") as file:
                file.seek(start)
                return file.read(n_bytes)
        except OSError as error:
            raise self._gone(error) from None

    def _gone(self, error: OSError) -> ShardError:
        """A UserError, so that all ranks of a run stop together and save."""
        return ShardError(f"{error.filename or self._bin_path}: opened before, now it cannot be read ({error.strerror}). {self.meta.remedy()}")

    def _check_meta(self) -> None:
        meta = self.meta
        if meta.shard_id != shard_id_of(meta.tokenizer["fingerprint"], meta.dtype, meta.n_tokens, meta.files):
            raise ShardError(f"{meta.path}: its shard_id does not follow from its dtype ({meta.dtype}), number of tokens "
                             f"({meta.n_tokens:,}) and hashes: it was edited. {meta.remedy()}")
        if meta.max_id >= meta.tokenizer["vocab_size"]:
            raise ShardError(f"{meta.path}: holds id {meta.max_id}, beyond its tokenizer's vocabulary of "
                             f"{meta.tokenizer['vocab_size']:,}. {meta.remedy()}")

    def _check_sizes(self) -> None:
        meta = self.meta
        for kind, record in meta.files.items():
            path = meta.file(kind)
            if not path.exists():
                raise ShardError(f"{path}: missing, though {meta.path.name} is there. The files of a shard stay together and "
                                 f"are renamed together. {meta.remedy()}")
            if path.stat().st_size != record["bytes"]:  # a short file reads as zeros once mapped, or kills the process
                raise self._damaged(kind, f"has {path.stat().st_size:,} bytes, its meta promises {record['bytes']:,}")
        if meta.files["bin"]["bytes"] != meta.n_tokens * np.dtype(meta.dtype).itemsize:
            raise self._damaged("bin", f"{meta.files['bin']['bytes']:,} bytes do not make {meta.n_tokens:,} {meta.dtype}")
        if meta.files["idx"]["bytes"] != meta.n_docs * IDX_DTYPE.itemsize:
            raise self._damaged("idx", f"{meta.files['idx']['bytes']:,} bytes do not make {meta.n_docs:,} document ends")

    def _damaged(self, kind: str, what: str) -> ShardError:
        return ShardError(f"{self.meta.file(kind)}: {what}: damaged after it was written. {self.meta.remedy()}")


@lru_cache(maxsize=256)
def _mapped(path: str, dtype: str, shard_id: str) -> np.ndarray:
    """The file as an array. Bounded: each mapping holds a file descriptor, and systems allow a process about 1,000."""
    mapped = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")
    return np.asarray(mapped)  # slicing a plain array is several times faster than slicing a memmap


def verify_shard(shard: Shard, progress=None) -> None:
    """Read every byte of a shard and hold it against its meta. `progress.advance(n)` hears of bytes of tokens read."""
    fresh, files = Shard.open(shard.meta.path), shard.meta.files
    digest = hashlib.sha256()
    for block in range(len(files["bin"]["crc32"])):
        data = fresh._read_block(block)
        digest.update(data)
        if progress:
            progress.advance(len(data))
    if digest.hexdigest() != files["bin"]["sha256"]:
        raise fresh._damaged("bin", "its contents do not match the hash in its meta")
    assert len(fresh.doc_ends) == shard.meta.n_docs
    fresh.loss_mask(0, 1)


def write_shard(
    folder: Path | str,
    name: str,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    dtype: np.dtype,
    tokenizer: dict,
    units: list[dict],
    role: str,
    seq_len: int,
    writer: dict,
    mask_spans: np.ndarray | None = None,
) -> ShardMeta:
    """Publish a shard from `parts` of (ids of whole documents, their lengths), hashing on the way; one part is held at a time.

    `tokenizer`: fingerprint, kind, vocab_size, eos_id, pad_id. `units`: at least unit_id and bytes (of text) each, in order.
    `mask_spans`: int[n, 2] of (start, length), in order and apart. Nothing appears under the final names unless all went well.
    """
    assert role in ("train", "val") and units, (role, units)
    assert tokenizer.keys() >= {"fingerprint", "kind", "vocab_size", "eos_id", "pad_id"}, tokenizer
    assert dtype == token_dtype(tokenizer["vocab_size"]), (dtype, tokenizer["vocab_size"])
    meta_path = Path(folder) / f"{name}{META_SUFFIX}"
    if meta_path.exists():
        raise ShardError(f"{meta_path}: a shard of this name exists already, and published shards are never changed. "
                         f"Choose another name or folder, or delete {name}.* first.")
    kinds = ["bin", "idx"] if mask_spans is None else ["bin", "idx", "mask"]
    with _unpublished(Path(folder), name, kinds) as files:
        counts = _write_parts(files["bin"], files["idx"], parts, dtype, tokenizer["vocab_size"])
        if mask_spans is not None:
            files["mask"].write(_checked_spans(mask_spans, counts["n_tokens"]))
        records = {kind: file.close() for kind, file in files.items()}
        meta = ShardMeta(
            path=meta_path,
            shard_id=shard_id_of(tokenizer["fingerprint"], dtype.name, counts["n_tokens"], records),
            n_bytes=sum(unit["bytes"] for unit in units),
            dtype=dtype.name,
            role=role,
            seq_len=seq_len,
            tokenizer=tokenizer,
            units=units,
            files=records,
            writer=writer,
            **counts,
        )
        for kind, file in files.items():
            os.replace(file.path, meta.file(kind))
        durable.fsync_folder(meta_path.parent)
        write_record(meta_path, meta.to_json())  # last: this is what makes the shard exist
    return meta


@contextmanager
def _unpublished(folder: Path, name: str, kinds: list[str]) -> Iterator[dict[str, "_HashingFile"]]:
    """Files under temporary names; those that were not renamed by the end are removed."""
    files = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            files[kind] = _HashingFile(folder / f"{name}.{kind}.tmp")
        yield files
    except OSError as error:
        raise ShardError(f"{folder}: cannot write shard {name} ({error.strerror}). Choose a folder that can be written to "
                         f"and has space; shards finished before are kept.") from error
    finally:
        for file in files.values():
            file.discard()


class _HashingFile:
    """A file that knows its size, SHA-256 and the CRC-32 of each block by the time it is written."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115  closed by close() or discard()
        self._sha256, self._size, self._crc32 = hashlib.sha256(), 0, []

    def write(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self._file.write(data)
        self._sha256.update(data)
        while data:
            filled = self._size % CRC_BLOCK_BYTES
            if filled == 0:
                self._crc32.append(0)
            head, data = data[: CRC_BLOCK_BYTES - filled], data[CRC_BLOCK_BYTES - filled :]
            self._crc32[-1] = zlib.crc32(head, self._crc32[-1])
            self._size += len(head)

    def close(self) -> dict:
        """Put it on the disk itself, and return what the meta says of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._sha256.hexdigest(), "crc32": self._crc32}

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def _write_parts(bin_file: _HashingFile, idx_file: _HashingFile, parts, dtype: np.dtype, vocab_size: int) -> dict:
    n_tokens, n_docs, min_id, max_id = 0, 0, vocab_size, -1
    for ids, lengths in parts:
        if len(lengths) == 0:
            continue
        assert ids.dtype.kind in "iu" and len(ids) == lengths.sum() and lengths.min() > 0, (ids.dtype, len(ids), lengths)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise ShardError(f"{bin_file.path.name}: token {n_tokens + at:,} would be id {ids[at]}, outside the vocabulary of "
                             f"{vocab_size:,}. These ids come from another tokenizer than the one given: give that one.")
        bin_file.write(ids.astype(dtype, copy=False))
        idx_file.write((n_tokens + np.cumsum(lengths, dtype=np.int64)).astype(IDX_DTYPE))
        n_tokens, n_docs = n_tokens + len(ids), n_docs + len(lengths)
        min_id, max_id = min(min_id, low), max(max_id, high)
    if n_tokens == 0:
        raise ShardError(f"{bin_file.path.name}: there are no tokens to write. Is the text empty?")
    return {"n_tokens": n_tokens, "n_docs": n_docs, "min_id": min_id, "max_id": max_id}


def _checked_spans(spans: np.ndarray, n_tokens: int) -> np.ndarray:
    starts, ends = spans[:, 0], spans[:, 0] + spans[:, 1]
    assert n_tokens < 2**32, n_tokens
    assert np.all(starts < ends) and np.all(ends[:-1] <= starts[1:]), "spans must be in order and apart"
    assert len(spans) == 0 or (starts[0] >= 0 and ends[-1] <= n_tokens), (spans, n_tokens)
    return spans.astype(MASK_DTYPE)
