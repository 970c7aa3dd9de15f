"""What the person at the keyboard sees: one logger, one error class, one progress bar; everybody else's chatter goes to a file."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

log = logging.getLogger("tally")
MISTAKE = 2  # exit code
RESULT = 25  # a level: what a command was asked for, shown even with --quiet; chatter about how it goes is INFO
TAGS = {logging.WARNING: ("warning: ", "33"), logging.ERROR: ("error: ", "31")}  # and their ANSI colours: yellow, red


class UserError(Exception):
    """A mistake of the user's, told in one paragraph: what was wrong with its value, where, what to do. Ends in exit code 2."""

    exit_code = MISTAKE
    told = False  # set once it has been printed, so that no second rank prints it again
    is_shared = False  # set when all ranks raise it at one place


class _Terminal(logging.Handler):
    """Writes to wherever the person looks, also after `route_output` has taken file descriptors 1 and 2 away."""

    stream: TextIO | None = None  # None: sys.stdout as it is now, so that tests and pipes can capture it
    rank = 0
    console = None  # a rich console while a bar or line is live: printing past it would tear it

    def emit(self, record: logging.LogRecord) -> None:
        if self.rank and record.levelno < logging.WARNING:
            return
        origin = f"[rank {self.rank}] " if self.rank else ""
        text = f"{origin}{tag(record.levelno, terminal())}{record.getMessage()}"
        try:
            if self.console:
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=terminal(), flush=True)
        except OSError:  # the terminal was closed: a run that lost its reader still saves, and its log file has every line
            self.stream, self.console = open(os.devnull, "w"), None  # noqa: SIM115 - for good


_handler = _Terminal(logging.INFO)
_early = MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)  # what is said before the log file is known
_early.buffer = deque(maxlen=1000)  # else a script that has no log file, such as a chat server, would keep every line for ever
log.addHandler(_handler)
log.addHandler(_early)
logging.addLevelName(RESULT, "RESULT")  # as it stands in log files
log.setLevel(logging.DEBUG)  # the log file of a run has every line, whatever the terminal shows
log.propagate = False


def terminal() -> TextIO:
    """The stream a person reads."""
    return _handler.stream or sys.stdout


def show(*, quiet: bool = False, verbose: bool = False) -> None:
    """What the person sees from now on: `quiet` leaves results, warnings and errors, `verbose` adds details."""
    _handler.setLevel(RESULT if quiet else logging.DEBUG if verbose else logging.INFO)


def result(text: str) -> None:
    """Say what the command was asked for."""
    log.log(RESULT, text)


def tag(level: int, stream: TextIO) -> str:
    """What warnings and errors begin with, in colour where a person looks and has not said NO_COLOR (no-color.org)."""
    word, colour = TAGS.get(level, ("", ""))
    plain = not word or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return word if plain else f"\x1b[1;{colour}m{word}\x1b[0m"


def _shows_live() -> bool:
    return not _handler.rank and _handler.level <= logging.INFO and terminal().isatty()


def clock(seconds: float) -> str:
    """7:05 or 1:00:00; every time left is told so."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def set_rank(rank: int) -> None:
    """From now on only rank 0 speaks below warning level, and the others say who they are."""
    _handler.rank = rank


def route_output(path: Path) -> None:
    """Send file descriptors 1 and 2 to `path` and keep the terminal for our own lines, which are copied to the file too.

    Third parties (torch, gloo, NCCL, DeepSpeed) write warnings from C++ as well, so replacing `sys.stderr` would not do.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    first = _handler.stream is None
    if first:
        _handler.stream = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if not first:
        return
    logging.captureWarnings(True)
    copy = logging.StreamHandler(sys.stderr)
    copy.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _early.setTarget(copy)
    _early.close()
    log.removeHandler(_early)
    log.addHandler(copy)
    logging.getLogger("py.warnings").addHandler(copy)
    sys.excepthook = _report_crash


def _report_crash(kind, error, trace) -> None:
    """A crash of ours must reach the person although standard error is a file by now."""
    sys.__excepthook__(kind, error, trace)
    import traceback

    print("".join(traceback.format_exception(kind, error, trace)), file=terminal(), flush=True)


class Progress:
    """Counts towards `total`; `advance` is cheap enough to be called for every item."""

    def __init__(self, total: int, what: str, unit: str, bar=None, task=None):
        self.total, self.what, self.unit = total, what, unit
        self.done, self._bar, self._task = 0, bar, task
        self._started_at = self._told_at = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif self.done and time.monotonic() - self._told_at > 10:  # a log file wants a line now and then, not a bar
            self._told_at = time.monotonic()
            left_s = (self._told_at - self._started_at) * max(0, self.total - self.done) / self.done
            log.info(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {clock(left_s)} left")


@contextmanager
def progress(total: int, what: str, unit: str = "") -> Iterator[Progress]:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing on ranks other than 0."""
    if not _shows_live():
        yield Progress(total, what, unit)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    counts = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn(), TimeRemainingColumn())
    with _live_console() as console, Bar(*columns, console=console) as bar:
        yield Progress(total, what, unit, bar, bar.add_task(what, total=total))


class LiveLine:
    """One line at the bottom of a terminal that is rewritten in place; `alive` is false where there is no terminal."""

    def __init__(self):
        self.alive = _shows_live()
        if self.alive:
            from rich.live import Live
            from rich.text import Text

            self._text = Text  # plain: rich would colour parts of numbers
            self._console = _live_console()
            self._live = Live(console=self._console.__enter__(), refresh_per_second=4, transient=True)
            self._live.start()

    def show(self, text: str) -> None:
        if self.alive:
            self._live.update(self._text(text))

    def close(self) -> None:
        if self.alive:
            self.alive = False
            with suppress(OSError):  # the terminal may be gone
                self._live.stop()
            self._console.__exit__(None, None, None)


@contextmanager
def _live_console() -> Iterator:
    from rich.console import Console

    _handler.console = Console(file=terminal())
    try:
        yield _handler.console
    finally:
        _handler.console = None
