"""Processes started by mpirun: rank 0 speaks to the person, plans and hands out tasks; the others take one when they have finished one."""

from concurrent.futures import Executor
from contextlib import AbstractContextManager

from llm.dist import mpi_ranks
from llm.log import UserError

_opened = False


def ranks() -> int:
    """Of this run; 1 without mpirun. Raises UserError when they cannot talk to each other."""
    if (n := mpi_ranks()) > 1 and (size := _library().COMM_WORLD.Get_size()) != n:
        raise UserError(
            f"mpirun has started {n} processes, and mpi4py sees {size}: it was built for another MPI. Use the mpirun beside this Python "
            f"(pip install 'tally-llm[mpi]' brings both)."
        )
    return n


def is_server() -> bool:
    """Whether this process only waits for tasks."""
    return ranks() > 1 and _library().COMM_WORLD.Get_rank() > 0


def serve() -> None:
    """Do tasks until rank 0 has no more."""
    with root_executor():
        pass


def release() -> None:
    """Rank 0, at its end: let the others go, also when it never came to have a task for them."""
    if ranks() > 1 and not _opened:
        serve()


def root_executor(**options) -> AbstractContextManager[Executor]:
    """On rank 0 what hands out tasks to the others; these stay in it until rank 0 leaves. Collective, once in a run."""
    from mpi4py.futures import MPICommExecutor

    global _opened
    _opened = True
    return MPICommExecutor(_library().COMM_WORLD, root=0, **options)


def _library():
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"started by mpirun, and mpi4py is missing ({error}). Install it: pip install 'tally-llm[mpi]'") from None
    return MPI
