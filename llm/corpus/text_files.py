"""Readers of text: .txt, .jsonl, .json, .csv, .tsv."""

import codecs
import csv
import json
import mmap
import re
from collections.abc import Iterator
from functools import partial
from io import BufferedReader, TextIOWrapper
from itertools import chain, starmap
from pathlib import Path
from typing import BinaryIO

from llm.corpus.options import ReadOptions
from llm.corpus.records import LINES, Record, cut, decoded, separator_of
from llm.log import UserError

MAX_JSON_BYTES = 256 << 20  # of a value that must be in memory as a whole
MAX_CELL_BYTES = 64 << 20
_SPACE = re.compile(r"[\s,]*")  # between the values of an array


def text_stream(stream: BinaryIO, options: ReadOptions, path: Path, *span: int) -> Iterator[Record]:
    return starmap(_text, cut(stream, separator_of(options.separator), path, *span))


def jsonl_stream(stream: BinaryIO, _: ReadOptions, path: Path, *span: int) -> Iterator[Record]:
    return starmap(_json_line, cut(stream, LINES, path, *span))


def _text(position: int, content: bytes) -> Record:
    return Record(position, f"byte {position:,}", decoded(content))


def _json_line(position: int, content: bytes) -> Record:
    text = decoded(content)
    try:
        value = json.loads(text) if text and not text.isspace() else ""
    except (ValueError, RecursionError) as error:
        value = error
    return Record(position, f"byte {position:,}", _or_malformed(value, "line"))


def _or_malformed(value, what: str) -> object:
    """A JSON value that can be a record, or else why it cannot."""
    return value if isinstance(value, (dict, str, Exception)) else ValueError(f"the {what} is no JSON object")


def unit_borders(path: Path, separator: re.Pattern | None, wanted: list[int]) -> list[int]:
    """The first record from each wanted position on."""
    if separator is None or not wanted:
        return [0]
    overlap = 1 if separator is LINES else len(separator.pattern)
    found = [0]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for position in wanted:
            if position <= found[-1]:
                continue  # inside a record that was longer than a unit
            border = separator.search(content, max(0, position - overlap))
            while border and border.end() < position:
                border = separator.search(content, border.end())
            if not border:
                break
            found.append(border.end())
    return found


# .json: an array of records, an object that holds or is them, or lines under the wrong name


def json_stream(stream: BufferedReader, options: ReadOptions, path: Path) -> Iterator[Record]:
    """Elements of an array one at a time; an object whole: SQuAD's data, or a dictionary of named records."""
    body = stream.peek(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if body.startswith(b"["):
        yield from _array(stream, path)
    elif is_json_lines(body):
        yield from jsonl_stream(stream, options, path)
    else:
        yield from _object(stream.read(MAX_JSON_BYTES + 1), path)


def is_json_lines(head: bytes) -> bool:
    """Whether the first line is an object by itself and something comes after it."""
    line, _, rest = head.partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _array(stream: BinaryIO, path: Path) -> Iterator[Record]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    scan, number, done = json.JSONDecoder().raw_decode, 0, False
    text = decoder.decode(stream.read(1 << 20))
    at = text.index("[") + 1
    while True:
        at = _SPACE.match(text, at).end()
        try:
            if text.startswith("]", at):
                break
            value, end = scan(text, at)
            if end == len(text) and not done:
                raise ValueError  # a number may go on
            number, at = number + 1, end
            yield Record(number, f"element {number:,}", _or_malformed(value, "element"))
        except (ValueError, RecursionError) as error:
            if done or isinstance(error, RecursionError) or len(text) - at > MAX_JSON_BYTES:
                raise _broken(path, f"element {number + 1:,} of its array", error) from None
            chunk = stream.read(max(1 << 20, len(text) - at))  # doubled, so that a huge element is not scanned a thousand times
            done = not chunk
            text, at = text[at:] + decoder.decode(chunk, final=done), 0
    if (text[at + 1 :] + decoder.decode(stream.read(1 << 20))).strip():
        raise _broken(path, "what follows its array", "there should be nothing")


def _object(content: bytes, path: Path) -> Iterator[Record]:
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{path}: one JSON object of more than {MAX_JSON_BYTES >> 20} MiB, which cannot be read in pieces. Make it JSON lines.")
    text = decoded(content)
    try:
        value = json.loads(text) if text.strip() else ""
    except (ValueError, RecursionError) as error:
        raise _broken(path, "its only value", error) from None
    for number, record in enumerate(_records_in(value), 1):
        yield Record(number, f"record {number:,}", record)


def _records_in(value) -> Iterator[object]:
    if not isinstance(value, dict):
        yield _or_malformed(value, "value")
    elif isinstance(value.get("data"), list):  # SQuAD
        for article in value["data"]:
            yield from _questions(article) if isinstance(article, dict) and "paragraphs" in article else (article,)
    elif value and all(isinstance(item, dict) for item in value.values()):
        for word, item in value.items():
            yield {"word": word, **item}
    elif value and all(isinstance(item, str) for item in value.values()) and len(value) > 8:
        for word, item in value.items():
            yield {"word": word, "definition": item}
    else:
        yield value


def _questions(article: dict) -> Iterator[dict]:
    for paragraph in article["paragraphs"]:
        for question in paragraph.get("qas", ()):
            yield {"context": paragraph.get("context", ""), **question}


def _broken(path: Path, where: str, error) -> UserError:
    return UserError(f"{path}: {where} is not JSON ({error}). What follows cannot be found without it: repair the file, or leave it out.")


# .csv and .tsv


def csv_stream(stream: BinaryIO, _: ReadOptions, path: Path, delimiter: str = ",") -> Iterator[Record]:
    """Rows as fields. The first row names them, unless it looks like MMLU's, which has no header: a question, four choices, a letter."""
    csv.field_size_limit(MAX_CELL_BYTES)
    lines = TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = lines.readline()
    if delimiter == "," and first.count(";") > first.count(","):
        delimiter = ";"
    rows = csv.reader(chain([first] if first else [], lines), delimiter=delimiter, strict=True)
    names = None
    for number, (line, row) in enumerate(_rows(rows, path)):
        if names is None and isinstance(row, list):
            is_header = not (len(row) == len(_MMLU) and row[-1] in list("ABCD"))
            names = row if is_header else _MMLU
            if is_header:
                continue
        yield Record(number, f"line {line:,}", _fields(row, names))


tsv_stream = partial(csv_stream, delimiter="\t")
_MMLU = ["question", "A", "B", "C", "D", "answer"]


def _rows(rows, path: Path) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(line, row) pairs, a row that is malformed by itself as its error."""
    while True:
        line = rows.line_num + 1
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):  # all that follows went into one cell
                raise UserError(f"{path}, line {line:,}: a quote opens here that is not closed ({error}). Repair or drop the file.") from None
            yield line, error


def _fields(row: list[str] | csv.Error, names: list[str] | None):
    if isinstance(row, csv.Error):
        return ValueError(str(row))
    if not row:
        return ""
    if len(row) != len(names):
        return ValueError(f"{len(row)} cells, and the header has {len(names)}")
    return dict(zip(names, row, strict=True))
