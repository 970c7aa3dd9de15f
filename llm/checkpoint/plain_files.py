"""Reading a checkpoint's files: what the system refuses is told apart from what they hold."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.checkpoint.errors import Damaged, Unjudged, system_errors

_BLOCK_BYTES = 1 << 20
_PLAIN = (
    "Checkpoints consist of plain files, so somebody has put it there. Nothing was moved. Put the "
    "file itself in its place (for a link: "
    'cp --remove-destination "$(readlink -f FILE)" FILE), then run again.'
)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device"}


def open_plain(path: Path) -> int:
    """A handle to read a plain file. Raises ValueError for anything else (a link), and OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # no link leads elsewhere, no pipe hangs
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise ValueError("is a symbolic link") from None
        raise
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise ValueError(f"is {_KINDS.get(kind, 'something else')}, not a plain file")
    return handle


@contextmanager
def open_file(checkpoint: Path, name: str) -> Iterator[int]:
    """A handle to read a file of a checkpoint. Raises Damaged when it is missing, Unjudged when
    that cannot be told or it is no plain file; also for an OSError while it is read."""
    path = checkpoint / name
    with system_errors(path):
        try:
            handle = open_plain(path)
        except FileNotFoundError:
            if not _is_missing(checkpoint, name):
                raise
            raise Damaged(f"{path}: is missing") from None
        except ValueError as error:
            raise Unjudged(f"{path}: {error}. {_PLAIN}") from None
        try:
            yield handle
        finally:
            os.close(handle)


def _is_missing(checkpoint: Path, name: str) -> bool:
    """Whether the folders on the way to it can be listed and one lacks it. Raises OSError."""
    folder = checkpoint
    for part in name.split("/"):
        if part not in os.listdir(folder):
            return True
        folder = folder / part
    return False


def read_most(handle: int, most: int) -> bytes:
    """The content of an open file. Raises ValueError for more than `most` bytes, and OSError."""
    blocks, left = [], most + 1
    while left and (block := os.read(handle, min(left, _BLOCK_BYTES))):
        blocks.append(block)
        left -= len(block)
    if not left:
        raise ValueError(f"is larger than {most:,} bytes")
    return b"".join(blocks)


def sha256_of(handle: int) -> str:
    """Of an open file's content. Raises OSError."""
    digest = hashlib.sha256()
    while block := os.read(handle, _BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
