"""What can be wrong with a checkpoint: its content, as a hash proves; or that nobody here can tell; or that it is gone."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.cli import NEEDS_A_PERSON, RETRY
from llm.log import UserError

# What may be over a moment later, without anybody's help. A disk that answers EIO may be failing for
# good, and a limit on open files may be too low: launchers end such retries (see clusters/).
_TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR,
    errno.ETIMEDOUT, errno.EBUSY, errno.ENOLINK, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN, errno.EREMOTEIO,
}  # fmt: skip
_DENIED = {errno.EACCES, errno.EPERM}


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run."""


class Damaged(CheckpointError):
    """Its content is not what was saved, as a hash, a size or a list of files proves. Only this may be moved to quarantine."""


class Unjudged(CheckpointError):
    """Whether it is what was saved cannot be told here, or it is sealed and contradicts itself. It stays where it is."""

    exit_code = NEEDS_A_PERSON


class Unreadable(Unjudged):
    """The operating system did not let it be read. Exit code 75 where a retry may help, else 3."""

    def __init__(self, path: Path, error: OSError):
        path = error.filename if isinstance(error.filename, str | Path) else path
        if error.errno in _TRANSIENT:
            self.exit_code = RETRY
        super().__init__(f"{path}: cannot be read ({system_answer(error)}), so nothing is known of its content. {_advice(error)}")


class Gone(CheckpointError):
    """It was there, and was deleted or renamed while it was read."""

    exit_code = RETRY

    def __init__(self, checkpoint: Path):
        super().__init__(
            f"{checkpoint}: was deleted while it was read, as a run that trains deletes its older checkpoints (checkpoint.keep_last). "
            f"Run again to read the newest one."
        )


def system_answer(error: OSError) -> str:
    """'EACCES, Permission denied'."""
    name = errno.errorcode.get(error.errno, f"errno {error.errno}")
    return f"{name}, {os.strerror(error.errno)}" if error.errno else str(error)


def _advice(error: OSError) -> str:
    if error.errno in _DENIED:
        return "Nothing was moved. Run as a user who may read it, or change its permissions, then run again."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Nothing was moved. Too many files are open: run again, with a higher 'ulimit -n' if that does not help."
    return "Nothing was moved. Look at the disk or the mount that it is on, then run again."


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raises Unreadable in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise Unreadable(path, error) from None


def is_gone(path: Path) -> bool:
    """Whether the folder that it lay in can be listed, and does not have it any more."""
    try:
        return path.name not in os.listdir(path.parent)
    except OSError:
        return False
