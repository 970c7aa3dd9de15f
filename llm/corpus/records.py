"""Records: the pieces that a file is made of, before anybody asks what they mean. How text is cut into them, and decoded."""

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


def cut(stream: BinaryIO, separator: re.Pattern | None, path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of the records of a stream that stands at byte `start`, up to byte `stop` or its end; both must be borders.

    One record at a time is in memory. A mapped file would be less work, and kill the process when somebody cuts it off meanwhile.
    """
    buffer, position, searched, more = b"", start, 0, True
    may_belong = (separator.pattern if separator else b"") + b" \t\r\n"
    while more:
        wanted = max(_CHUNK_BYTES, len(buffer))  # doubled, so that a huge record is not copied a thousand times
        chunk = stream.read(wanted if stop is None else min(wanted, stop - position - len(buffer)))
        buffer, more, at = buffer + chunk, bool(chunk), 0
        # a match that ends with the buffer may be longer when more has come
        while separator and (found := separator.search(buffer, max(at, searched))) and (found.end() < len(buffer) or not more):
            yield position + at, buffer[at : found.start()]
            at = searched = found.end()
        buffer, position = buffer[at:], position + at
        searched = len(buffer.rstrip(may_belong))  # before this no separator can be incomplete
        if len(buffer) > MAX_RECORD_BYTES:
            raise UserError(
                f"{path}: a single record of more than {MAX_RECORD_BYTES >> 20:,} MiB. A document must fit in memory: divide the file with "
                f"--separator (blank-lines, or what stands between its documents)."
            )
    if stop is not None and position + len(buffer) < stop:
        raise UserError(f"{path}: became shorter while it was read: {position + len(buffer):,} bytes, {stop:,} before. Run again.")
    if buffer or position == 0:
        yield position, buffer


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
