"""What can be wrong with a checkpoint: proven damage, something that nobody can judge, or gone."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.cli import NEEDS_A_PERSON, RETRY
from llm.log import UserError

# What may be over a moment later, without anybody's help. A disk that answers EIO may be failing
# for good, and a limit on open files may be too low: launchers end such retries (see clusters/).
_PASSING = (
    "EIO ESTALE EMFILE ENFILE ENOMEM EAGAIN EINTR ETIMEDOUT EBUSY ENOLINK EHOSTDOWN EHOSTUNREACH "
    "ECONNRESET ECONNREFUSED ENOTCONN EREMOTEIO"
)
_TRANSIENT = {getattr(errno, name, None) for name in _PASSING.split()}  # not every system has all
_DENIED = {errno.EACCES, errno.EPERM}


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run."""


class Damaged(CheckpointError):
    """A hash, a size or a missing file proves that its content is not what was saved.

    Only this may be moved to quarantine.
    """


class Unjudged(CheckpointError):
    """Whether it is what was saved cannot be told here, or it is sealed and contradicts itself.

    It stays where it is.
    """

    exit_code = NEEDS_A_PERSON


class Unreadable(Unjudged):
    """The operating system did not let it be read. Exit code 75 where a retry may help, else 3."""

    def __init__(self, path: Path, error: OSError):
        path = error.filename if isinstance(error.filename, str | Path) else path
        if error.errno in _TRANSIENT:
            self.exit_code = RETRY
        super().__init__(
            f"{path}: cannot be read ({_answer(error)}), so nothing is known of its content. "
            f"Nothing was moved. {_advice(error)}"
        )


class Gone(CheckpointError):
    """It was there, and was deleted or renamed while it was read."""

    exit_code = RETRY

    def __init__(self, checkpoint: Path):
        super().__init__(
            f"{checkpoint}: was deleted while it was read, as a run that trains deletes its older "
            f"checkpoints (checkpoint.keep_last). Run again to read the newest one."
        )


def _answer(error: OSError) -> str:
    """'EACCES, Permission denied'."""
    name = errno.errorcode.get(error.errno, f"errno {error.errno}")
    return f"{name}, {os.strerror(error.errno)}" if error.errno else str(error)


def _advice(error: OSError) -> str:
    if error.errno in _DENIED:
        return "Run as a user who may read it, or change its permissions, then run again."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            "Too many files are open: run again, with a higher 'ulimit -n' if that does not help."
        )
    return "Look at the disk or the mount that it is on, then run again."


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
