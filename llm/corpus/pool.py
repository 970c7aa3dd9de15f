"""The worker processes: started, fed with tasks, and missed when one dies."""

import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from llm.corpus import mpi
from llm.corpus.encode import REFERENCE, Job, prepare, run_task, start_worker
from llm.corpus.parts import forget_parts, is_finished
from llm.corpus.plan import Task
from llm.log import UserError, log, progress
from llm.tokenizer.fast import FastPathWrong


def encode_all(tasks: list[Task], job: Job, workers: int, encoder: str) -> tuple[int, float]:
    """Have those parts made that are not there yet. Returns the bytes that it read for them, and the seconds.

    `encoder`: FAST, until it is found wrong anywhere, and then what it has made is made again by the reference; or REFERENCE.
    """
    waiting = [task for task in tasks if not is_finished(job.work, task)]
    if len(waiting) < len(tasks):
        log.info(f"continuing: {len(tasks) - len(waiting):,} of {len(tasks):,} parts are there already")
    todo, started_at = sum(task.n_bytes for task in waiting), time.perf_counter()
    try:
        with _processes(job, min(workers, len(waiting))) as pool:
            try:
                _run(tasks, job, pool, encoder)
            except FastPathWrong as error:
                log.warning(f"the fast encoder is not used: {error}. Encoding all with the reference, which takes about ten times as long")
                forget_parts(job.work, tasks, REFERENCE)
                _run(tasks, job, pool, REFERENCE)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died: somebody killed it, or the machine ran out of memory (fewer --workers need less). "
            "Run the same command again: finished parts are kept, and the result will be the same."
        ) from None
    return todo, time.perf_counter() - started_at


def _run(tasks: list[Task], job: Job, pool: Executor, encoder: str) -> None:
    waiting = [task for task in tasks if not is_finished(job.work, task)]
    total, todo = (sum(task.n_bytes for task in some) for some in (tasks, waiting))
    with progress(total, "tokenizing", "bytes") as bar:
        bar.advance(total - todo)
        futures = {pool.submit(run_task, task, encoder): task for task in waiting}
        try:
            for future in as_completed(futures):
                future.result()
                bar.advance(futures[future].n_bytes)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


@contextmanager
def _processes(job: Job, workers: int) -> Iterator[Executor]:
    """The processes that encode: those of mpirun that wait in `serve`, or else children of this one."""
    if mpi.ranks() > 1:
        with mpi.root_executor(initializer=prepare, initargs=(job,)) as executor:
            yield executor
        return
    # spawn: a forked child would inherit the encoder's locks without the threads that hold them
    pool = ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn"), initializer=start_worker, initargs=(job,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
