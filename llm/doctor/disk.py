"""The disk under a run's folder: whether it takes a checkpoint, how fast, and whether all ranks see the same one."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

from llm.dist import World
from llm.doctor.line import FAIL, OK, WARN, Line

PROBE_BYTES, BLOCK_BYTES = 64 << 20, 4 << 20
SLOW = 50e6  # bytes a second
LITTLE = 2e9
BYTES_PER_PARAM = 12  # a checkpoint holds the fp32 weight and two moments


def write_speed(folder: Path) -> Line:
    """Write 64 MB below `folder`, or where it will be made, make them durable, read them back, and leave nothing behind."""
    place = existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as probe:
            written, read = _write_and_read(Path(probe) / "probe")
    except OSError as error:
        return Line("run-folder", FAIL, f"{place}: {_why(error)}", _advice(error))
    found = f"{place}: {written / 1e6:,.0f} MB/s written and synced, {read / 1e6:,.0f} MB/s read back"
    slow = written < SLOW
    return Line("run-folder", WARN if slow else OK, found, "Saves will take long; checkpoint.async_save hides that while memory lasts.")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def _write_and_read(path: Path) -> tuple[float, float]:
    """Bytes a second of either."""
    block = os.urandom(BLOCK_BYTES)
    started_at = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(PROBE_BYTES // BLOCK_BYTES):
            rest = memoryview(block)
            while rest:  # a disk that has room for a part takes that without an error
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
        written_at = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read_from = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while got := file.read(BLOCK_BYTES):
            if got != block:
                raise OSError(errno.EIO, "what was read back is not what was written")
    return PROBE_BYTES / (written_at - started_at), PROBE_BYTES / (time.perf_counter() - read_from)


def _why(error: OSError) -> str:
    kinds = {
        errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "files may not grow so large here (ulimit -f)",
        errno.EROFS: "the file system is read-only", errno.EACCES: "this user may not write here", errno.EPERM: "this user may not write here",
        errno.ENOTDIR: "is a file, not a folder",
    }  # fmt: skip
    return f"{kinds.get(error.errno, 'cannot be written')} ({error.strerror})"


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room, or set checkpoint.checkpoint_dir to a disk that has some: no checkpoint could be saved."
    return "Set checkpoint.checkpoint_dir to a folder that can be written, or change this one's owner or mount: no checkpoint could be saved."


def free_space(folder: Path, params: int | None, kept: int | None) -> Line:
    """`params` of the model and how many checkpoints its run keeps, when a config says so."""
    free = shutil.disk_usage(existing(folder)).free
    if params is None:
        found = f"{free / 1e9:,.1f} GB; --config says what a checkpoint needs"
        return Line("free-space", WARN if free < LITTLE else OK, found, "Make room, or say with --config that it is enough.")
    one = BYTES_PER_PARAM * params
    at_most = one * (kept + 1)  # the next one is written before an old one goes
    found = f"{free / 1e9:,.1f} GB; a checkpoint has {one / 1e9:,.2f} GB, the run keeps {kept} and writes one more"
    advice = "Make room, set checkpoint.checkpoint_dir to another disk, or keep fewer (checkpoint.keep_last)."
    status = FAIL if free < one else WARN if free < at_most else OK
    return Line("free-space", status, found, advice)


def shared(folder: Path, world: World) -> Line:
    """Whether what rank 0 writes is there for all others. Collective."""
    place = world.on_rank_0(lambda: str(existing(folder)))
    path = world.on_rank_0(lambda: _mark(place))
    seen = world.gather(path is not None and Path(path).exists())
    world.barrier()
    if world.rank == 0 and path:
        Path(path).unlink(missing_ok=True)
    if path is None:
        return Line("shared-folder", WARN, f"{place} cannot be written, so nobody could look")
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    advice = "Checkpoints need one file system for all: mount it on every machine under the same path."
    found = f"{place} is not the same on ranks {', '.join(map(str, blind))}" if blind else f"{place} is the same on all ranks"
    return Line("shared-folder", FAIL if blind else OK, found, advice)


def _mark(place: str) -> str | None:
    try:
        handle, path = tempfile.mkstemp(prefix=".doctor-", dir=place)
        os.close(handle)
        return path
    except OSError:
        return None
