"""The worker processes: started, fed with tasks, and missed when one dies."""

import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from llm.corpus.encode import Job, run_task, start_worker
from llm.corpus.parts import is_finished
from llm.corpus.plan import Task
from llm.log import Progress, UserError, log, progress


def encode_all(tasks: list[Task], job: Job, workers: int) -> tuple[int, float]:
    """Have those parts made that are not there yet. Returns the bytes that it read for them, and the seconds."""
    waiting = [task for task in tasks if not is_finished(job.work, task)]
    if len(waiting) < len(tasks):
        log.info(f"continuing: {len(tasks) - len(waiting):,} of {len(tasks):,} parts are there already")
    total, todo = (sum(task.n_bytes for task in some) for some in (tasks, waiting))
    started_at = time.perf_counter()
    with progress(total, "tokenizing", "bytes") as bar:
        bar.advance(total - todo)
        if waiting:
            _run(waiting, job, min(workers, len(waiting)), bar)
    return todo, time.perf_counter() - started_at


def _run(tasks: list[Task], job: Job, workers: int, bar: Progress) -> None:
    # spawn: a forked child would inherit the encoder's locks without the threads that hold them
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(job,))
    try:
        futures = {pool.submit(run_task, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            bar.advance(futures[future].n_bytes)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died: somebody killed it, or the machine ran out of memory (fewer --workers need less). "
            "Run the same command again: finished parts are kept, and the result will be the same."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
