"""Parts: what a worker leaves in the work folder for one task, until shards are made of it.

KEY.digests                         16 bytes of SHA-256 of each document, in the order of the file, all units after each other
KEY.train.ids KEY.train.lengths     tokens in the shards' dtype and u32 tokens per document, of new units only; KEY.val.* likewise
KEY.train.spans                     (start, length) pairs of u32, counted from the unit's first token: what carries loss; of units with conversations
KEY.json                            the commit record, written last: per unit what it holds, and at which byte of each file it begins
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
from llm.corpus.masks import Spans, joined
from llm.corpus.plan import Task, Unit
from llm.data.record import ShardError, read_record, write_record

FORMAT, VERSION = "tally-part", 3
ROLES = ("train", "val")
DIGEST_BYTES = 16
_LENGTH = _SPAN = np.dtype("<u4")
_PIECE_TOKENS = 1 << 21


@dataclass(frozen=True)
class PartUnit:
    """A unit in a part, with its record."""

    unit: Unit
    record: dict
    stem: Path

    @property
    def unit_id(self) -> str:
        return self.record["unit_id"]

    def digests(self) -> bytes:
        """The digests of its documents, joined."""
        return self._read("digests", np.uint8, self.record["docs"] * DIGEST_BYTES).tobytes()

    def pieces(self, role: str, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and tokens per document of this role, some documents at a time."""
        if not self.record[role]["docs"]:
            return
        lengths = self._read(f"{role}.lengths", _LENGTH, self.record[role]["docs"])
        ends = np.cumsum(lengths, dtype=np.int64)
        cuts = [*np.unique(np.searchsorted(ends, np.arange(_PIECE_TOKENS, ends[-1], _PIECE_TOKENS))), len(lengths)]
        with open(f"{self.stem}.{role}.ids", "rb") as file:
            file.seek(self.record["at"][f"{role}.ids"])
            for start, stop in pairwise([0, *(cut for cut in cuts if cut)]):
                yield np.fromfile(file, dtype, int(lengths[start:stop].sum(dtype=np.int64))), lengths[start:stop]

    def spans(self, role: str) -> Spans:
        """What carries loss, counted from this unit's first token of the role."""
        n_spans = self.record[role]["spans"]
        if n_spans is None:
            return None
        return self._read(f"{role}.spans", _SPAN, 2 * n_spans).reshape(-1, 2).astype(np.int64)

    def _read(self, kind: str, dtype: np.dtype, count: int) -> np.ndarray:
        return np.fromfile(f"{self.stem}.{kind}", dtype, count, offset=self.record["at"][kind])


class PartWriter:
    """Writes a task's units while they are encoded: of a unit, no more is held than the lengths of its documents.

    A context: the record that makes the part exist is written at the end, when the rest is on the disk itself.
    """

    def __init__(self, folder: Path, key: str, dtype: np.dtype, encoder: str):
        self._stem, self._dtype, self._encoder, self._records = folder / key, dtype, encoder, []
        suffixes = ["digests", *(f"{role}.{kind}" for role in ROLES for kind in ("ids", "lengths", "spans"))]
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
        self._spans = {role: [] for role in ROLES}
        self._bytes = dict.fromkeys(ROLES, 0)
        self._at = {kind: file.tell() for kind, file in self._files.items()}

    def add(self, role: str, digest: bytes, ids: np.ndarray, spans: Spans, eos: bytes, n_bytes: int) -> None:
        """A document of the current unit; `eos`: the end-of-text token as bytes of the dtype, which `spans` count too."""
        file = self._files[f"{role}.ids"]
        file.write(ids.astype(self._dtype, copy=False))
        file.write(eos)
        self.digests += digest
        self._lengths[role].append(len(ids) + 1)
        self._spans[role].append(spans)
        self._bytes[role] += n_bytes

    def add_known(self, digests: Iterable[bytes]) -> None:
        """The current unit's documents, all of which the dataset holds already."""
        self.digests += b"".join(digests)

    def end_unit(self, unit_id: str, counts: Counts, orders: dict[str, np.ndarray]) -> None:
        """`orders`: role to the order its documents shall have; a role that is not in it keeps the order of the file."""
        self._files["digests"].write(self.digests)
        record = {"unit_id": unit_id, "docs": len(self.digests) // DIGEST_BYTES, "counts": asdict(counts), "at": self._at}
        for role in ROLES:
            lengths, masks = np.array(self._lengths[role], _LENGTH), self._spans[role]
            if role in orders:
                self._reorder(role, lengths, orders[role])
                lengths, masks = lengths[orders[role]], [masks[i] for i in orders[role]]
            self._files[f"{role}.lengths"].write(lengths)
            n_spans = self._write_spans(role, masks, lengths)
            record[role] = {"tokens": int(lengths.sum(dtype=np.int64)), "docs": len(lengths), "bytes": self._bytes[role], "spans": n_spans}
        self._records.append(record)
        self._begin()

    def _write_spans(self, role: str, masks: list[Spans], lengths: np.ndarray) -> int | None:
        """How many spans the unit has; None when all of it carries loss."""
        if all(spans is None for spans in masks):
            return None
        spans = joined(zip(masks, lengths.tolist(), strict=True))
        self._files[f"{role}.spans"].write(spans.astype(_SPAN))
        return len(spans)

    def _reorder(self, role: str, lengths: np.ndarray, order: np.ndarray) -> None:
        if not len(lengths):
            return
        file, ends = self._files[f"{role}.ids"], np.cumsum(lengths, dtype=np.int64)
        file.flush()
        stored = np.memmap(file.name, self._dtype, "r", self._at[f"{role}.ids"], int(ends[-1]))
        with TemporaryFile(dir=self._stem.parent) as shuffled:
            for i in order:
                shuffled.write(stored[ends[i] - lengths[i] : ends[i]])
            del stored
            shuffled.seek(0)
            file.seek(self._at[f"{role}.ids"])
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
    for unit, record in zip(task.units, records, strict=True):
        yield PartUnit(unit, record, folder / task.key)
