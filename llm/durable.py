"""Files that are there whole or not at all, also after a power cut."""

import errno
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace `path` so that a reader finds the old content or the new, never a part. Raises OSError."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)  # rename is atomic, but durable only once the folder is
        fsync_folder(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut, as far as its file system lets that be asked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # what some network and FUSE file systems answer for any folder
            raise
    finally:
        os.close(handle)
