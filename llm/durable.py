"""Files that are there whole or not at all, also after a full disk, a kill or a power cut."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to. After the block its file is made durable and replaces `path`.

    A reader finds the old content or the new, never a part. An error in the block leaves `path` as
    it was. A symbolic link stays and its target is replaced; a pipe or a device is written to
    directly. Waits for another process that is writing `path`. Raises OSError.
    """
    if _is_stream(path):
        yield path
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    fresh = path.with_name(f".{path.name}.new")  # the same each time: what a kill leaves is reused
    try:
        handle = _open_alone(fresh)
    except OSError as error:
        error.filename = str(path)  # nobody knows the other name
        raise
    try:
        yield fresh
        _fsync(fresh)
        with suppress(OSError):  # there is no old file, or its file system knows no modes
            fresh.chmod(path.stat().st_mode & 0o777 | 0o200)  # as before, and replaceable
        os.replace(fresh, path)  # atomic, but durable only once the folder is
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    fsync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. After the block it is made durable and renamed to `path`.

    That must not exist, or be an empty folder. After an error nothing is left. Raises OSError.
    """
    fresh = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for folder, _, names in os.walk(fresh):
            for name in names:
                _fsync(Path(folder, name))
            fsync_folder(Path(folder))
        fresh.rename(path)  # refuses a folder that is not empty
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` as a whole. Raises OSError."""
    with new_file(path) as fresh:
        fresh.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` as a whole, in UTF-8. Raises OSError."""
    write_bytes(path, text.encode())


def fsync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut, where its file system supports that."""
    try:
        _fsync(folder)
    except OSError as error:
        # what some network and FUSE file systems answer for any folder
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_stream(path: Path) -> bool:
    """Whether `path` is no plain file, or stands for a file that this process has open already."""
    open_files = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
    return path.exists() and (not path.is_file() or path.parent in open_files)


def _open_alone(fresh: Path) -> int:
    """Create an empty file that no other process writes: two would publish a mix of their bytes."""
    while True:
        handle = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # the file system knows no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(fresh)):
                os.ftruncate(handle, 0)
                return handle
        os.close(handle)  # the other process has published or removed it meanwhile
