"""Files of text as documents: what a document is in each format, and the hygiene that all of them get.

A record is the bytes of one document in its file. Formats differ in what separates records and how one becomes text, no more.
"""

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm.log import UserError

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    index: int
    """Where it starts in the source, in bytes: known without reading what stands before."""


@dataclass(frozen=True)
class ReadOptions:
    separator: str | None = None
    """What stands between the documents of a .txt file; None: each file is one document."""
    text_field: str = "text"
    """The field of a .jsonl line that holds the text."""


def separator_from(argument: str | None) -> str | None:
    r"""The separator that a command line means: a shell passes \n as two characters."""
    return argument.replace("\\n", "\n").replace("\\t", "\t") if argument else None


@dataclass
class Counts:
    """What reading has met, good and bad."""

    records: int = 0
    empty: int = 0
    bad_utf8: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)
    """The first malformed records: where, and what was wrong."""

    def add(self, other: "Counts") -> None:
        self.records += other.records
        self.empty += other.empty
        self.bad_utf8 += other.bad_utf8
        self.malformed += other.malformed
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


@dataclass(frozen=True)
class Reader:
    separator: Callable[[ReadOptions], bytes | None]
    """None: the whole file is one record."""
    text: Callable[[str, ReadOptions], str]
    """The text of a record. Raises ValueError for a malformed one."""


def _json_text(line: str, options: ReadOptions) -> str:
    if not line.strip():
        return ""
    fields = json.loads(line)
    if not isinstance(fields, dict) or options.text_field not in fields:
        there = f"only {', '.join(map(repr, fields))}" if isinstance(fields, dict) else "the line is no JSON object"
        raise ValueError(f"no field {options.text_field!r}: {there}; --text-field names another")
    if not isinstance(fields[options.text_field], str):
        raise ValueError(f"field {options.text_field!r} is no string")
    return fields[options.text_field]


READERS = {
    ".txt": Reader(separator=lambda options: options.separator.encode() if options.separator else None, text=lambda record, _: record),
    ".jsonl": Reader(separator=lambda _: b"\n", text=_json_text),
}


def unit_borders(path: Path, size: int, unit_bytes: int, known_ends: list[int], options: ReadOptions) -> list[int]:
    """Where the units of a file start: at the first record from each multiple of `unit_bytes` on, and from each known end.

    A file's known ends are the sizes it had when it was tokenized before: what has been added since is in units of its own.
    """
    separator = READERS[path.suffix].separator(options)
    wanted = sorted({*range(unit_bytes, size, unit_bytes), *(end for end in known_ends if end < size)})
    if separator is None or not wanted:
        return [0]
    found = {0}
    with _mapped(path) as content:
        for position in wanted:
            before = content.find(separator, max(0, position - len(separator)))
            if before < 0:
                break
            found.add(before + len(separator))
    return sorted(border for border in found if border < size)


def read_documents(path: Path, name: str, start: int, stop: int, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """The documents whose records lie in bytes [start, stop), which must be borders. Empty and malformed ones are only counted."""
    reader = READERS[path.suffix]
    for position, record in _records(path, start, stop, reader.separator(options)):
        counts.records += 1
        content, was_bad = _decoded(record)
        try:
            text, had_surrogates = _without_surrogates(reader.text(content, options))
        except (ValueError, RecursionError) as error:
            counts.malformed += 1
            counts.examples = [*counts.examples, f"{path}, byte {position:,}: {error}"][:MAX_EXAMPLES]
            continue
        counts.bad_utf8 += was_bad or had_surrogates
        if text and not text.isspace():
            yield Document(text, name, position)
        else:
            counts.empty += 1


def _records(path: Path, start: int, stop: int, separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    if start == stop:  # a file of no bytes, which cannot be mapped
        yield start, b""
        return
    with _mapped(path) as content:
        if len(content) < stop:
            raise UserError(f"{path}: became shorter while it was read: {len(content):,} bytes, {stop:,} before. Run again.")
        while start < stop:
            found = content.find(separator, start, stop) if separator else -1
            end = found if found >= 0 else stop
            yield start, content[start:end]
            start = end + len(separator or b"")


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _decoded(record: bytes) -> tuple[str, bool]:
    """The record as text without a byte order mark, and whether something in it had to be replaced."""
    try:
        return record.decode().removeprefix("\ufeff"), False
    except UnicodeDecodeError:
        return record.decode(errors="replace").removeprefix("\ufeff"), True


def _without_surrogates(text: str) -> tuple[str, bool]:
    """JSON may spell half of a surrogate pair, which no encoding of Unicode can hold."""
    try:
        text.encode()
        return text, False
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
