"""Which files can be read, and how each is: its container by name and first bytes, the shape of its records by their fields."""

import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from llm.corpus import column_files, compressed, text_files
from llm.corpus.compressed import packing
from llm.corpus.options import ReadOptions
from llm.corpus.records import LINES, Record, separator_of
from llm.corpus.shapes import SHAPES, shape_for
from llm.data.manifest import FILE_NAME
from llm.log import UserError, log

_LOOK_AT = 50  # records whose fields are looked at
_NOT_TEXT = {"dataset_info.json", "dataset_dict.json", "state.json", FILE_NAME}  # beside the Arrow files of Hugging Face's datasets, and our shards
_OF_A_SHARD = re.compile(r"\.cached\.\d+\.")
_NO_PLAIN_TEXT = {  # first bytes, and what to do
    b"\x1f\x8b": "a gzip file. Call it *.gz",
    b"\x28\xb5\x2f\xfd": "a zstandard file. Call it *.zst",
    b"PK\x03\x04": "a zip archive (or a document of an office program, to be saved as text). Call it *.zip",
    b"%PDF-": "a PDF. Extract its text first",
    b"\xff\xfe": "UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8",
}


@dataclass(frozen=True)
class Reader:
    """How the records of one kind of file are had. To add a kind: these functions and a row in READERS."""

    suffixes: tuple[str, ...]
    stream: Callable[..., Iterator[Record]] | None = None
    """From (stream, options, path): bytes in order, so from inside a compressed file too. With borders, (start, stop) of a part may follow."""
    part: Callable[[Path, int, int, ReadOptions], Iterator[Record]] | None = None
    """From bytes [start, stop) of a file, which are borders, where bytes in order will not do."""
    borders: Callable[[Path, list[int], ReadOptions], list[int]] | None = None
    """Where units start, given where they should; None: the file is one unit."""


READERS = {
    "txt": Reader(
        (".txt", ".text"), text_files.text_stream,
        borders=lambda path, wanted, options: text_files.unit_borders(path, separator_of(options.separator), wanted),
    ),
    "jsonl": Reader(
        (".jsonl", ".ndjson"), text_files.jsonl_stream,
        borders=lambda path, wanted, _: text_files.unit_borders(path, LINES, wanted),
    ),
    "json": Reader((".json",), text_files.json_stream),
    "csv": Reader((".csv",), text_files.csv_stream),
    "tsv": Reader((".tsv", ".tab"), text_files.tsv_stream),
    "parquet": Reader((".parquet",), None, column_files.parquet_records, lambda path, wanted, _: column_files.parquet_borders(path, wanted)),
    "arrow": Reader((".arrow", ".feather"), None, column_files.arrow_records),
}  # fmt: skip
SUFFIXES = {suffix: name for name, reader in READERS.items() for suffix in reader.suffixes}


def kinds() -> str:
    """For people: what can be read."""
    return f"{', '.join(SUFFIXES)} (also {', '.join(compressed.SUFFIXES)})"


def check_format(word: str | None) -> None:
    """Raises UserError for a --format that names nothing."""
    unknown = [part for part in word.split(",") if part not in READERS and part not in SHAPES] if word else []
    if unknown:
        raise UserError(
            f"--format {word}: {unknown[0]!r} is neither a kind of file ({', '.join(READERS)}) nor a shape of records ({', '.join(SHAPES)})."
        )


def is_readable(path: Path) -> bool:
    """By its name alone."""
    is_other = path.name in _NOT_TEXT or _OF_A_SHARD.search(path.name)
    return packing(path) == ".zip" or (_kind_by_name(path) is not None and not is_other)


def _kind_by_name(path: Path) -> str | None:
    name = path.with_suffix("") if packing(path) else path
    return SUFFIXES.get(name.suffix.lower())


def _said(options: ReadOptions, names: Iterable[str]) -> str | None:
    """The one of these names that --format says."""
    return next((word for word in (options.format or "").split(",") if word in names), None)


def container_of(path: Path, options: ReadOptions) -> str:
    """The name in READERS, of a file that is no .zip. First bytes win over the name: many .json files are JSON lines."""
    if forced := _said(options, READERS):
        return forced
    with compressed.opened(path) if packing(path) else open(path, "rb") as file:
        head = file.read(1 << 16)
    if head.startswith(column_files.ARROW_MAGIC):
        return "arrow"
    if head.startswith(column_files.PARQUET_MAGIC):
        return "parquet"
    if what := next((what for first, what in _NO_PLAIN_TEXT.items() if head.startswith(first)), None):
        raise UserError(f"{path}: is, by its first bytes, {what}. If it is text all the same, say so with --format.")
    by_name = _kind_by_name(path)
    if by_name == "json" and text_files.is_json_lines(head.removeprefix(BOM_UTF8).lstrip()):
        return "jsonl"
    if by_name is None:
        raise UserError(f"{path}: cannot tell what kind of file this is. Say it: --format {', '.join(READERS)}.")
    return by_name


def read_records(path: Path, start: int, stop: int, options: ReadOptions) -> Iterator[Record]:
    """The records in bytes [start, stop) of a file; of a compressed one or one that cannot be cut, all."""
    if packing(path) == ".zip":
        yield from _zipped(path, options)
        return
    container = container_of(path, options)
    if packing(path):
        with compressed.opened(path) as stream:
            yield from _of_stream(container, path)(stream, options, path)
    elif (reader := READERS[container]).part:
        yield from reader.part(path, start, stop, options)
    else:
        with open(path, "rb", 1 << 20) as stream:
            stream.seek(start)
            yield from reader.stream(stream, options, path, *((start, stop) if reader.borders else ()))


def _of_stream(container: str, path: Path):
    stream = READERS[container].stream
    if not stream:
        raise UserError(f"{path}: {container} files are compressed inside and cannot be read from within {path.suffix}. Unpack it first.")
    return stream


def _zipped(path: Path, options: ReadOptions) -> Iterator[Record]:
    forced = _said(options, READERS)
    names = compressed.members(path)
    left_out = [name for name in names if not forced and (_kind_by_name(Path(name)) is None or packing(Path(name)))]
    if left_out:
        log.warning(f"{path}: {len(left_out):,} files inside left out, none of {', '.join(SUFFIXES)}: {', '.join(left_out[:5])}")
    if len(left_out) == len(names):
        raise UserError(f"{path}: holds no file that can be read. Unpack it, or say what its files are with --format.")
    number = 0
    for name in names:
        if name not in left_out:
            with compressed.opened_member(path, name) as stream:
                for record in _of_stream(forced or _kind_by_name(Path(name)), path)(stream, options, path):
                    yield record._replace(position=number, place=f"{name}, {record.place}")
                    number += 1


def unit_borders(path: Path, size: int, unit_bytes: int, known_ends: list[int], options: ReadOptions) -> list[int]:
    """Where the units of a file start: at the first record from each multiple of `unit_bytes` on, and from each known end.

    A file's known ends are the sizes it had when it was tokenized before: what has been added since is in units of its own.
    """
    wanted = wanted_borders(size, unit_bytes, known_ends)
    borders = None if packing(path) or size == 0 else READERS[container_of(path, options)].borders
    return sorted(border for border in (borders(path, wanted, options) if borders else [0]) if border < size or border == 0)


def wanted_borders(size: int, unit_bytes: int, known_ends: list[int]) -> list[int]:
    """Where units should start, were there a record; a record that starts at or after one of these is after that border."""
    return sorted({*range(unit_bytes, size, unit_bytes), *(end for end in known_ends if end < size)})


def is_cut(path: Path, options: ReadOptions) -> bool:
    """Whether a file of this kind is cut in units when it is large, perhaps after unpacking."""
    return packing(path) != ".zip" and READERS[container_of(path, options)].borders is not None


def shape_of(path: Path, options: ReadOptions) -> str:
    """The name in SHAPES of a file's records: said with --format, or that of most of its first records."""
    status = path.stat()
    return _shape_of(path, status.st_size, status.st_mtime_ns, options)


@lru_cache(maxsize=4096)
def _shape_of(path: Path, size: int, _: int, options: ReadOptions) -> str:
    if (forced := _said(options, SHAPES)) or options.text_field:
        return forced or "text"
    found = Counter()
    for record in islice(read_records(path, 0, size, options), _LOOK_AT):
        if isinstance(record.content, dict):
            found[shape_for(renamed(record.content, options))] += 1
        elif record.content and isinstance(record.content, str):
            found["text"] += 1
    del found[None]
    return found.most_common(1)[0][0] if found else "text"


def renamed(fields: dict, options: ReadOptions) -> dict:
    """The fields, also under the names that --field gives them."""
    return {**fields, **{ours: fields[theirs] for ours, theirs in options.fields if theirs in fields}} if options.fields else fields


def tell_formats(paths: Iterable[Path], options: ReadOptions) -> None:
    """Say in a line what has been recognised."""
    found: dict[str, list[str]] = {}
    for path in paths:
        kind = "zip" if packing(path) == ".zip" else container_of(path, options) + packing(path)
        found.setdefault(f"{kind}, {SHAPES[shape_of(path, options)].said}", []).append(path.name)
    for said, names in found.items():
        log.info(f"reading as {said}: {', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}")
