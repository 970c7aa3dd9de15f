"""Parts: what a worker leaves in the work folder for one task, until shards are made of it.

KEY.digests                         16 bytes of SHA-256 of each document, in the order of the file, all units after each other
KEY.train.ids KEY.train.lengths     tokens in the shards' dtype and u32 tokens per document, of new units only; KEY.val.* likewise
KEY.train.spans                     (start, length) pairs of u32, counted from the unit's first token: what carries loss; of units with conversations
KEY.json                            the commit record, written last: per unit what it holds
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llm.corpus.documents import Counts
from llm.corpus.masks import Spans
from llm.corpus.plan import Task, Unit
from llm.data.record import ShardError, read_record, write_record

FORMAT, VERSION = "tally-part", 2
ROLES = ("train", "val")
DIGEST_BYTES = 16
_LENGTH = _SPAN = np.dtype("<u4")


@dataclass(frozen=True)
class EncodedUnit:
    """A unit in memory. `tokens`: role to (ids, tokens per document); empty when the dataset holds the unit already. `spans`: by role."""

    unit_id: str
    digests: list[bytes]
    counts: Counts
    n_bytes: dict[str, int]
    tokens: dict[str, tuple[np.ndarray, np.ndarray]]
    spans: dict[str, Spans]


@dataclass(frozen=True)
class PartUnit:
    """A unit in a part: its record, and where in the part's files it lies."""

    unit: Unit
    record: dict
    stem: Path
    at: dict[str, tuple[int, int, int]]
    """Role to (first token, first document, first span)."""
    first_digest: int

    @property
    def unit_id(self) -> str:
        return self.record["unit_id"]

    def digests(self) -> bytes:
        """The digests of its documents, joined."""
        with open(f"{self.stem}.digests", "rb") as file:
            file.seek(self.first_digest * DIGEST_BYTES)
            return file.read(self.record["docs"] * DIGEST_BYTES)

    def tokens(self, role: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids and tokens per document of this role; only for a role of which it has documents."""
        counts, (first_token, first_doc, _) = self.record[role], self.at[role]
        ids = np.memmap(f"{self.stem}.{role}.ids", dtype, "r", first_token * dtype.itemsize, counts["tokens"])
        lengths = np.memmap(f"{self.stem}.{role}.lengths", _LENGTH, "r", first_doc * _LENGTH.itemsize, counts["docs"])
        return ids, lengths

    def spans(self, role: str) -> Spans:
        """What carries loss, counted from this unit's first token of the role."""
        n_spans = self.record[role]["spans"]
        if n_spans is None:
            return None
        start = 2 * _SPAN.itemsize * self.at[role][2]
        return np.fromfile(f"{self.stem}.{role}.spans", _SPAN, 2 * n_spans, offset=start).reshape(-1, 2).astype(np.int64)


def write_part(folder: Path, key: str, units: Iterable[EncodedUnit], dtype: np.dtype) -> None:
    """Write the units one after the other, on the disk itself before the record says so."""
    suffixes = ["digests", *(f"{role}.{kind}" for role in ROLES for kind in ("ids", "lengths", "spans"))]
    files = {suffix: open(folder / f"{key}.{suffix}", "wb") for suffix in suffixes}  # noqa: SIM115  closed below
    try:
        records = [_write_unit(files, unit, dtype) for unit in units]
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    write_record(folder / f"{key}.json", {"format": FORMAT, "version": VERSION, "units": records})


def _write_unit(files: dict, unit: EncodedUnit, dtype: np.dtype) -> dict:
    files["digests"].write(b"".join(unit.digests))
    record = {"unit_id": unit.unit_id, "docs": len(unit.digests), "counts": asdict(unit.counts)}
    for role in ROLES:
        ids, lengths = unit.tokens.get(role, (np.empty(0, dtype), np.empty(0, _LENGTH)))
        files[f"{role}.ids"].write(ids.astype(dtype, copy=False))
        files[f"{role}.lengths"].write(lengths.astype(_LENGTH, copy=False))
        spans = unit.spans.get(role)
        if spans is not None:
            files[f"{role}.spans"].write(spans.astype(_SPAN))
        n_spans = None if spans is None else len(spans)
        record[role] = {"tokens": len(ids), "docs": len(lengths), "bytes": unit.n_bytes.get(role, 0), "spans": n_spans}
    return record


def is_finished(folder: Path, task: Task) -> bool:
    return (folder / f"{task.key}.json").exists()


def read_part(folder: Path, task: Task) -> Iterator[PartUnit]:
    """The units of a finished task, in the task's order."""
    path = folder / f"{task.key}.json"
    records = read_record(path, FORMAT, VERSION, f"Delete {folder} and run again.")["units"]
    if len(records) != len(task.units):
        raise ShardError(f"{path}: speaks of {len(records)} units, the task has {len(task.units)}. Delete {folder} and run again.")
    at, first_digest = dict.fromkeys(ROLES, (0, 0, 0)), 0
    for unit, record in zip(task.units, records, strict=True):
        yield PartUnit(unit, record, folder / task.key, at, first_digest)
        at = {role: tuple(n + (record[role][what] or 0) for n, what in zip(at[role], ("tokens", "docs", "spans"), strict=True)) for role in ROLES}
        first_digest += record["docs"]
