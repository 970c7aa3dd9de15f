"""Which files there are and how they are cut.

Into units, whose borders never depend on the number of workers, and tasks: handfuls of units for one worker at a time.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from llm import durable
from llm.corpus import compressed
from llm.corpus.formats import is_cut, is_readable, kinds, unit_borders
from llm.corpus.options import ReadOptions
from llm.data.manifest import Manifest
from llm.data.record import sha256_of
from llm.log import UserError, log, progress

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 4 << 20, 512 << 20
UNITS_PER_SOURCE = 64
TASK_BYTES = 4 << 20
_TELLING_BYTES = 64 << 10
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One input file. The name is for people; identity comes from the contents."""

    path: Path
    name: str
    size: int
    mtime_ns: int
    packed: Path | None = None
    """What it was unpacked from, if so."""

    @property
    def given(self) -> Path:
        """The file that the person knows."""
        return self.packed or self.path


@dataclass(frozen=True)
class Unit:
    """Bytes [start, stop) of a source: whole records."""

    source: Source
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """Units that one worker encodes into one part. The key names that part in the work folder."""

    key: str
    units: tuple[Unit, ...]

    @property
    def n_bytes(self) -> int:
        return sum(unit.stop - unit.start for unit in self.units)


def find_sources(inputs: Iterable[Path | str], options: ReadOptions) -> list[Source]:
    """The files named, and those inside the folders named, in the order of their names."""
    try:
        found = [source for path in map(Path, inputs) for source in _sources_at(path, options)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}). Put that right, or leave it out.") from None
    return sorted({source.path: source for source in found}.values(), key=lambda source: (source.name, source.path))


def _sources_at(path: Path, options: ReadOptions) -> list[Source]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Give files, or folders that hold them, called {kinds()}.")
    if path.is_file():
        if not is_readable(path) and not options.format:
            raise UserError(f"{path}: cannot read files called *{path.suffix}; {kinds()} can be read. Say with --format what it is, or convert it.")
        return [_source(path, path.name)]
    files = _files_in(path)
    sources = [_source(file, str(file.relative_to(path.parent))) for file in files if is_readable(file)]
    if not sources:
        raise UserError(f"{path}: holds no file called {kinds()}. Give such files, or a folder that holds them.")
    if others := Counter(file.suffix or file.name for file in files if not is_readable(file)):
        log.warning(f"{path}: {others.total():,} files left out that cannot be read: {', '.join(suffix for suffix, _ in others.most_common(5))}")
    return sources


def _files_in(path: Path) -> list[Path]:
    """All files in a folder but hidden ones. Links to folders are not followed, for they may lead in circles; that is said."""
    files, links = [], []
    for at, folders, names in os.walk(path, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [link for link in (Path(at, name) for name in folders) if link.is_symlink()]
        files += [file for file in (Path(at, name) for name in names if not name.startswith(".")) if not file.is_fifo()]
    if links:
        log.warning(f"{path}: links to folders are not followed: {len(links):,}, for example {links[0]}. Name such folders beside it")
    return files


def _raise(error: OSError) -> NoReturn:
    raise error


def _source(path: Path, name: str) -> Source:
    status = path.stat()
    open(path, "rb").close()  # better refused now than in a worker
    shown = name.encode(errors="surrogateescape").decode(errors="replace")  # names of files may be any bytes
    return Source(path.absolute(), shown, status.st_size, status.st_mtime_ns)


def unpacked(sources: list[Source], work: Path, options: ReadOptions) -> list[Source]:
    """The sources, with plain files in `work` in the place of .gz and .zst ones, so that the same text gives the same units, packed or not.

    What an interrupted run has unpacked is used again.
    """
    packed = [source for source in sources if compressed.packing(source.path) in (".gz", ".zst") and is_cut(source.path, options)]
    plain = {}
    if packed:
        with progress(sum(source.size for source in packed), "unpacking", "bytes") as bar:
            for source in packed:
                plain[source.path] = _unpack(source, work)
                bar.advance(source.size)
    return [plain.get(source.path, source) for source in sources]


def _unpack(source: Source, work: Path) -> Source:
    key = sha256_of("unpacked", str(source.path), source.size, source.mtime_ns)[:32]
    path = work / f"{key}-{source.path.stem}"  # the name for messages
    if not path.exists():
        with durable.new_file(path) as fresh, open(fresh, "wb") as file, compressed.opened(source.path) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    return replace(source, path=path, size=path.stat().st_size, packed=source.path)


def unit_bytes_for(size: int) -> int:
    """A power of two that cuts a file of this size into about 64 units."""
    per_unit = max(1, size // UNITS_PER_SOURCE)
    return min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, 1 << (per_unit - 1).bit_length()))


def plan_units(sources: list[Source], options: ReadOptions, manifest: Manifest | None) -> tuple[list[Unit], dict[Path, int]]:
    """All units in the order of sources, and each source's unit size. A file that the manifest knows, perhaps by another name, keeps its size and
    old ends."""
    units, unit_bytes = [], {}
    by_name, by_beginning = _known(manifest)
    for source in sources:
        of_this_name = by_name.get(source.name, [])
        earlier = [entry for entry in of_this_name if _was(source, entry)]
        if not earlier and by_beginning:
            earlier = [entry for entry in by_beginning.get(beginning(source), []) if _was(source, entry)]
        unit_bytes[source.path] = (earlier or of_this_name)[0]["unit_bytes"] if earlier or of_this_name else unit_bytes_for(source.size)
        ends = [entry["bytes"] for entry in earlier]
        starts = unit_borders(source.path, source.size, unit_bytes[source.path], ends, options)
        units += [Unit(source, start, stop) for start, stop in zip(starts, [*starts[1:], source.size], strict=True)]
    return units, unit_bytes


def _known(manifest: Manifest | None) -> tuple[dict[str, list[dict]], dict[str | None, list[dict]]]:
    """The manifest's entries by name, and by what they begin with."""
    by_name: dict[str, list[dict]] = {}
    by_beginning: dict[str | None, list[dict]] = {}
    for entry in manifest.sources if manifest else ():
        for name in entry["names"]:
            by_name.setdefault(name, []).append(entry)
        if entry.get("beginning"):  # not in older versions
            by_beginning.setdefault(entry["beginning"], []).append(entry)
    return by_name, by_beginning


def _was(source: Source, entry: dict) -> bool:
    """Whether the manifest's entry is of this file, which may have grown since, and not of another of the same name."""
    return entry["bytes"] <= source.size and entry.get("ending") in (None, ending(source.path, entry["bytes"]))  # None: of an older version


def beginning(source: Source) -> str | None:
    """A hash of what stands first in a file, to know it by whatever it is called; None for a file so small that it is not looked for."""
    if source.size < _TELLING_BYTES:
        return None
    with open(source.path, "rb") as file:
        return hashlib.sha256(file.read(_TELLING_BYTES)).hexdigest()


def ending(path: Path, size: int) -> str:
    """A hash of what stands last in the first `size` bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, size - _TELLING_BYTES))
        return hashlib.sha256(file.read(min(size, _TELLING_BYTES))).hexdigest()


def plan_tasks(units: list[Unit], settings: dict) -> list[Task]:
    """Units by handfuls: small files would drown in overhead one by one. The key changes with whatever could change the part."""
    return [Task(_key(handful, settings), tuple(handful)) for handful in handfuls(units, lambda unit: unit.stop - unit.start, TASK_BYTES)]


def handfuls(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items side by side, as soon as their sizes come to `limit`."""
    handful, total = [], 0
    for item in items:
        handful.append(item)
        total += size(item)
        if total >= limit:
            yield handful
            handful, total = [], 0
    if handful:
        yield handful


def _key(units: list[Unit], settings: dict) -> str:
    what = [[os.fspath(u.source.path), u.source.size, u.source.mtime_ns, u.start, u.stop] for u in units]
    return sha256_of("part", settings, what)[:32]
