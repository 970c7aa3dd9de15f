"""Compressed files: .gz, .zst and .zip as streams of bytes, which end with an error when they expand beyond all measure."""

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path

from llm.corpus.column_files import pyarrow
from llm.log import UserError

SUFFIXES = (".gz", ".zst", ".zip")
MAX_EXPANSION, FREE_BYTES = 200, 64 << 20  # text seldom shrinks to less than a tenth; a bomb to a thousandth


def packing(path: Path) -> str:
    """How a file is packed, by its name: one of SUFFIXES, or nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in SUFFIXES else ""


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A .gz or .zst as the bytes inside. Raises UserError where they cannot be had."""
    with open(path, "rb") as file:
        with _told(path):
            inside = gzip.GzipFile(fileobj=file) if packing(path) == ".gz" else pyarrow().CompressedInputStream(file, "zstd")
        yield BufferedReader(_Bounded(inside, path, path.stat().st_size), 1 << 20)


@contextmanager
def opened_member(path: Path, member: str) -> Iterator[BufferedReader]:
    """A file inside a .zip."""
    with _archive(path) as archive:
        with _told(path):
            inside = archive.open(member)
        yield BufferedReader(_Bounded(inside, path, archive.getinfo(member).compress_size), 1 << 20)


def unpacked_size(path: Path) -> int:
    """Bytes of a plain file, or of what a .gz or .zst holds, which only reading it tells."""
    if packing(path) in ("", ".zip"):
        return path.stat().st_size
    with opened(path) as stream:
        return sum(map(len, iter(lambda: stream.read(1 << 20), b"")))


def members(path: Path) -> list[str]:
    """The names of the files inside a .zip, in order, without hidden ones."""
    with _archive(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))


def _archive(path: Path) -> zipfile.ZipFile:
    with _told(path):
        return zipfile.ZipFile(path)


class _Bounded(RawIOBase):
    def __init__(self, inside, path: Path, compressed_bytes: int):
        self._inside, self._path = inside, path
        self._limit, self._read = FREE_BYTES + MAX_EXPANSION * compressed_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        with _told(self._path):
            data = self._inside.read(len(target))
        self._read += len(data)
        if self._read > self._limit:
            raise UserError(f"{self._path}: more than {self._read:,} bytes come out of it, over {MAX_EXPANSION} times its size. That is no text; "
                            f"decompress it yourself if you trust it.")  # fmt: skip
        target[: len(data)] = data
        return len(data)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # an encrypted .zip is a RuntimeError
        raise UserError(f"{path}: cannot be decompressed ({error}). It is damaged, cut off or of another kind: fetch it again.") from None
