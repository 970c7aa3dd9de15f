"""Records: the pieces that a file is made of, before anybody asks what they mean. How text is cut into them, and decoded."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llm.corpus.options import BLANK_LINES
from llm.log import UserError

MAX_RECORD_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_BLANK_LINES = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")
_HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # what escapes no byte


class Record(NamedTuple):
    position: int
    """Grows through the file. In plain text: bytes from its start, known without reading what stands before."""
    place: str
    """Where in the file it is, for people."""
    content: object
    """str: text; dict: fields; ValueError: why it is malformed. Bytes that are no UTF-8 stand as escapes (PEP 383) until `clean` sees them."""


def separator_of(separator: str | None) -> re.Pattern | None:
    if separator is None:
        return None
    return _BLANK_LINES if separator == BLANK_LINES else re.compile(re.escape(separator.encode()))


LINES = separator_of("\n")


def cut_mapped(path: Path, start: int, stop: int, separator: re.Pattern | None) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of the records in bytes [start, stop) of a file, which must be borders."""
    if start == stop:  # a file of no bytes, which cannot be mapped
        yield start, b""
        return
    with mapped(path) as content:
        if len(content) < stop:
            raise UserError(f"{path}: became shorter while it was read: {len(content):,} bytes, {stop:,} before. Run again.")
        while start < stop:
            found = separator.search(content, start, stop) if separator else None
            end, following = found.span() if found else (stop, stop)
            check_size(end - start, path)
            yield start, content[start:end]
            start = following


def cut_stream(stream: BinaryIO, separator: re.Pattern | None, path: Path) -> Iterator[tuple[int, bytes]]:
    """The same records of a stream, a record at a time in memory."""
    buffer, position, searched = bytearray(), 0, 0
    while chunk := stream.read(_CHUNK_BYTES):
        buffer += chunk
        start = 0
        # a match that ends with the buffer may be longer when more has come
        while separator and (found := separator.search(buffer, max(start, searched))) and found.end() < len(buffer):
            yield position + start, bytes(buffer[start : found.start()])
            start = searched = found.end()
        del buffer[:start]
        position += start
        searched = _resume_at(buffer, separator)
        check_size(len(buffer), path)
    start = 0
    for found in separator.finditer(bytes(buffer)) if separator else ():
        yield position + start, bytes(buffer[start : found.start()])
        start = found.end()
    if start < len(buffer) or position + start == 0:
        yield position + start, bytes(buffer[start:])


def _resume_at(buffer: bytearray, separator: re.Pattern | None) -> int:
    """From where on a separator may still be incomplete: before this no byte can belong to one that goes on."""
    at, may_belong = len(buffer), {*(separator.pattern if separator else b""), *b" \t\r\n"}
    while at > 0 and buffer[at - 1] in may_belong:
        at -= 1
    return at


def check_size(n_bytes: int, path: Path) -> None:
    if n_bytes > MAX_RECORD_BYTES:
        raise UserError(
            f"{path}: a single record of more than {MAX_RECORD_BYTES >> 20:,} MiB. A document must fit in memory: divide the file with "
            f"--separator (blank-lines, or what stands between its documents)."
        )


def mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def decoded(content: bytes) -> str:
    """Bytes as text without a byte order mark, those that are no UTF-8 as escapes."""
    return content.decode(errors="surrogateescape").removeprefix("\ufeff")


def clean(text: str) -> tuple[str, bool]:
    """Text that UTF-8 can hold, and whether something had to be replaced: escaped bytes, or half of a surrogate pair that JSON may spell."""
    try:
        text.encode()
        return text, False
    except UnicodeEncodeError:
        return _HALF_PAIR.sub("\ufffd", text).encode(errors="surrogateescape").decode(errors="replace"), True
