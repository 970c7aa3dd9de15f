"""One model and one thread that writes with it, one request after another; a bounded queue of those that wait."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from llm.chat.prompt import PromptError
from llm.chat.session import Assistant
from llm.checkpoint import folder
from llm.checkpoint.manifest import NAME
from llm.generate.generator import Writing
from llm.log import UserError, log


class Busy(Exception):
    """As many requests wait as may."""


@dataclass
class Job:
    """A request on its way: `begin` is called in the worker's thread with the model, and what it writes arrives in `events`."""

    model: str
    begin: Callable[[Assistant, Callable[[], bool]], Writing]
    events: SimpleQueue = field(default_factory=SimpleQueue)
    """Pieces of text (no more of them than tokens were asked for), then the Writing or the exception that ended it."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody listens any more: the next token is the last, or it never begins."""
        self.cancelled.set()


def choices(run: Path, step: int | None) -> dict[str, tuple[Path, int | None]]:
    """What a client may ask for, by name: first the checkpoint that was named, then the others of its run, newest first.

    Only these names lead to files, and no part of a request is ever made into a path.
    """
    run = run.resolve() if folder.is_there(run) else run
    if folder.is_there(run / NAME):
        return {f"{run.parent.name}/{run.name}": (run, None)}
    others = reversed(folder.entries(run, thinned=True))
    return {run.name: (run, step)} | {f"{run.name}/{entry.path.name}": (entry.path, None) for entry in others}


class Worker:
    """`load(path, step)` gives an Assistant. Loads the first of `choices` at once, others when they are asked for."""

    def __init__(self, choices: dict[str, tuple[Path, int | None]], load: Callable[[Path, int | None], Assistant], n_waiting: int):
        if n_waiting < 1:
            raise UserError(f"--queue is {n_waiting}, but should be at least 1.")
        self.choices, self._load, self._n_waiting = choices, load, n_waiting
        self._name, self._assistant = "", None
        self.seq_len = self._chosen(next(iter(choices))).model.cfg.seq_len
        self._waiting: list[Job] = []
        self._changed, self._is_closed = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="writing", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises Busy."""
        with self._changed:
            self._waiting = [other for other in self._waiting if not other.cancelled.is_set()]  # who has left holds no place
            if self._is_closed.is_set() or len(self._waiting) >= self._n_waiting:
                raise Busy
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End the thread, in the middle of an answer if need be; who waits is told."""
        with self._changed:
            self._is_closed.set()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while job := self._next():
            if not job.cancelled.is_set():
                job.events.put(self._write(job))
        for job in self._waiting:
            job.events.put(UserError("the server is stopping"))

    def _next(self) -> Job | None:
        """The job that has waited longest; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed.is_set())
            return None if self._is_closed.is_set() else self._waiting.pop(0)

    def _write(self, job: Job) -> Writing | Exception:
        try:
            is_over = lambda: job.cancelled.is_set() or self._is_closed.is_set()  # noqa: E731
            writing = job.begin(self._chosen(job.model), is_over)
            for piece in writing:
                job.events.put(piece)
            return writing
        except Exception as error:  # whatever one request meets, the next is answered
            if not isinstance(error, PromptError):
                log.error(f"a request failed: {type(error).__name__}: {error}")
            return error

    def _chosen(self, name: str) -> Assistant:
        """The model of this name; a second one is never in memory."""
        if name != self._name:
            self._name, self._assistant = "", None
            self._name, self._assistant = name, self._load(*self.choices[name])
        return self._assistant
