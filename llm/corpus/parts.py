"""Parts: what a worker leaves in the work folder for one task, until shards are made of it.

KEY.digests                         16 bytes of SHA-256 of each document, in the order of the file, all units after each other
KEY.train.ids KEY.train.lengths     tokens in the shards' dtype and u32 tokens per document, of new units only; KEY.val.* likewise
KEY.json                            the commit record, written last: per unit what it holds
"""

import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from llm.corpus.documents import Counts
from llm.corpus.plan import Task, Unit
from llm.data.record import ShardError, read_record, write_record

FORMAT, VERSION = "tally-part", 2
ROLES = ("train", "val")
DIGEST_BYTES = 16
_LENGTH = np.dtype("<u4")
_PIECE_TOKENS = 1 << 21


@dataclass(frozen=True)
class PartUnit:
    """A unit in a part: its record, and where in the part's files it lies."""

    unit: Unit
    record: dict
    stem: Path
    at: dict[str, tuple[int, int]]
    """Role to (first token, first document)."""
    first_digest: int

    @property
    def unit_id(self) -> str:
        return self.record["unit_id"]

    def digests(self) -> bytes:
        """The digests of its documents, joined."""
        with open(f"{self.stem}.digests", "rb") as file:
            file.seek(self.first_digest * DIGEST_BYTES)
            return file.read(self.record["docs"] * DIGEST_BYTES)

    def pieces(self, role: str, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and tokens per document of this role, some documents at a time."""
        counts, (first_token, first_doc) = self.record[role], self.at[role]
        if not counts["docs"]:
            return
        lengths = np.fromfile(f"{self.stem}.{role}.lengths", _LENGTH, counts["docs"], offset=first_doc * _LENGTH.itemsize)
        ends = np.cumsum(lengths, dtype=np.int64)
        cuts = [*np.unique(np.searchsorted(ends, np.arange(_PIECE_TOKENS, ends[-1], _PIECE_TOKENS))), len(lengths)]
        with open(f"{self.stem}.{role}.ids", "rb") as file:
            file.seek(first_token * dtype.itemsize)
            for start, stop in pairwise([0, *(cut for cut in cuts if cut)]):
                yield np.fromfile(file, dtype, int(lengths[start:stop].sum(dtype=np.int64))), lengths[start:stop]


class PartWriter:
    """Writes a task's units while they are encoded: of a unit, no more is held than the lengths of its documents.

    A context: the record that makes the part exist is written at the end, when the rest is on the disk itself.
    """

    def __init__(self, folder: Path, key: str, dtype: np.dtype, encoder: str):
        self._stem, self._dtype, self._encoder, self._records = folder / key, dtype, encoder, []
        suffixes = ["digests", *(f"{role}.{kind}" for role in ROLES for kind in ("ids", "lengths"))]
        self._files = {suffix: open(f"{self._stem}.{suffix}", "w+b") for suffix in suffixes}  # noqa: SIM115  closed by __exit__
        self._begin()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, error, *_) -> None:
        try:
            if error is None:
                for file in self._files.values():
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            for file in self._files.values():
                file.close()
        if error is None:
            record = {"format": FORMAT, "version": VERSION, "encoder": self._encoder, "units": self._records}
            write_record(Path(f"{self._stem}.json"), record)

    def _begin(self) -> None:
        self.digests = bytearray()
        """Of the current unit's documents, joined."""
        self._lengths = {role: array("I") for role in ROLES}
        self._bytes = dict.fromkeys(ROLES, 0)
        self._starts = {role: self._files[f"{role}.ids"].tell() for role in ROLES}

    def add(self, role: str, digest: bytes, ids: np.ndarray, eos: bytes, n_bytes: int) -> None:
        """A document of the current unit; `eos`: the end-of-text token as bytes of the dtype."""
        file = self._files[f"{role}.ids"]
        file.write(ids.astype(self._dtype, copy=False))
        file.write(eos)
        self.digests += digest
        self._lengths[role].append(len(ids) + 1)
        self._bytes[role] += n_bytes

    def add_known(self, digests: Iterable[bytes]) -> None:
        """The current unit's documents, all of which the dataset holds already."""
        self.digests += b"".join(digests)

    def end_unit(self, unit_id: str, counts: Counts, orders: dict[str, np.ndarray]) -> None:
        """`orders`: role to the order its documents shall have; a role that is not in it keeps the order of the file."""
        self._files["digests"].write(self.digests)
        record = {"unit_id": unit_id, "docs": len(self.digests) // DIGEST_BYTES, "counts": asdict(counts)}
        for role in ROLES:
            lengths = np.array(self._lengths[role], _LENGTH)
            if role in orders:
                self._reorder(role, lengths, orders[role])
                lengths = lengths[orders[role]]
            self._files[f"{role}.lengths"].write(lengths)
            record[role] = {"tokens": int(lengths.sum(dtype=np.int64)), "docs": len(lengths), "bytes": self._bytes[role]}
        self._records.append(record)
        self._begin()

    def _reorder(self, role: str, lengths: np.ndarray, order: np.ndarray) -> None:
        if not len(lengths):
            return
        file, ends = self._files[f"{role}.ids"], np.cumsum(lengths, dtype=np.int64)
        file.flush()
        stored = np.memmap(file.name, self._dtype, "r", self._starts[role], int(ends[-1]))
        with TemporaryFile(dir=self._stem.parent) as shuffled:
            for i in order:
                shuffled.write(stored[ends[i] - lengths[i] : ends[i]])
            del stored
            shuffled.seek(0)
            file.seek(self._starts[role])
            shutil.copyfileobj(shuffled, file)


def is_finished(folder: Path, task: Task) -> bool:
    return (folder / f"{task.key}.json").exists()


def forget_parts(folder: Path, tasks: list[Task], encoder: str) -> None:
    """Undo those finished parts that were not made by this encoder."""
    for task in tasks:
        if is_finished(folder, task) and _record(folder, task)["encoder"] != encoder:
            (folder / f"{task.key}.json").unlink()


def _record(folder: Path, task: Task) -> dict:
    return read_record(folder / f"{task.key}.json", FORMAT, VERSION, f"Delete {folder} and run again.")


def read_part(folder: Path, task: Task) -> Iterator[PartUnit]:
    """The units of a finished task, in the task's order."""
    records = _record(folder, task)["units"]
    if len(records) != len(task.units):
        raise ShardError(f"{folder / task.key}.json: speaks of {len(records)} units, the task has {len(task.units)}. Delete {folder} and run again.")
    at, first_digest = dict.fromkeys(ROLES, (0, 0)), 0
    for unit, record in zip(task.units, records, strict=True):
        yield PartUnit(unit, record, folder / task.key, at, first_digest)
        at = {role: (at[role][0] + record[role]["tokens"], at[role][1] + record[role]["docs"]) for role in ROLES}
        first_digest += record["docs"]
