"""One file of fp32 values: written past the page cache, made durable, then read back from the device, compared with memory and hashed."""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 8 << 20
SLOTS = 4  # blocks under way: the host memory of a save
PAGE = 4096  # what direct I/O wants offsets, lengths and addresses to be multiples of


def write_checked(path: Path, row: list["torch.Tensor"]) -> tuple[int, str]:
    """Write 1-D fp32 tensors one after another to a new file; returns its size in bytes and SHA-256. Raises OSError.

    The hash is of memory, and what came back from the device after fsync is equal to memory, byte
    for byte. Where direct I/O is to be had (most local disks), it has not been in the page cache;
    elsewhere the cache is asked to drop the file first, which a file system may ignore. A device's
    own cache may answer in either case. Hashing is slower than many disks, so it has a thread of
    its own beside both the writing and the reading, and neither waits for it.
    """
    blocks, size = list(_blocks(row)), 4 * sum(len(t) for t in row)
    handle, is_direct = _create(path)
    try:
        with ThreadPoolExecutor(1) as beside, ThreadPoolExecutor(2) as pool:
            hashing = beside.submit(_sha256, blocks)
            buffers = [np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8) for _ in range(SLOTS)]  # aligned to pages

            def write(i: int) -> None:
                _write_all(handle, _fill(buffers[i % SLOTS], blocks[i]), i * BLOCK_BYTES, is_direct)

            def read(i: int) -> None:
                _check_same(buffers[i % SLOTS], blocks[i], handle, i * BLOCK_BYTES)

            for _ in _in_order(pool, write, len(blocks)):
                pass
            os.ftruncate(handle, size)  # the last block is padded
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            for _ in _in_order(pool, read, len(blocks)):
                pass
            return size, hashing.result()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def _sha256(blocks: list[list["torch.Tensor"]]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        for values in block:
            digest.update(values.detach().cpu().numpy())  # lets go of Python's lock
    return digest.hexdigest()


def _blocks(row: list["torch.Tensor"]) -> Iterator[list["torch.Tensor"]]:
    """The row cut into blocks of BLOCK_BYTES, each a list of views; the last may be shorter."""
    block, room = [], BLOCK_BYTES // 4
    for tensor in row:
        while len(tensor):
            block.append(tensor[:room])
            tensor, room = tensor[room:], room - len(block[-1])
            if room == 0:
                yield block
                block, room = [], BLOCK_BYTES // 4
    if block:
        yield block


def _in_order(pool: ThreadPoolExecutor, work: Callable[[int], object], n: int) -> Iterator:
    """work(0), work(1), ... in order, done by the pool. work(i) begins after the result of work(i - SLOTS) has been used."""
    begun = deque()
    for i in range(n):
        begun.append(pool.submit(work, i))
        if len(begun) == SLOTS:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _fill(buffer: np.ndarray, block: list["torch.Tensor"]) -> np.ndarray:
    """The block's bytes in `buffer`, with zeros up to a whole page."""
    import torch

    target, numel = torch.from_numpy(buffer.view(np.float32)), 0
    for values in block:
        target[numel : numel + len(values)].copy_(values.detach())
        numel += len(values)
    end = -(-4 * numel // PAGE) * PAGE
    buffer[4 * numel : end] = 0
    return buffer[:end]


def _check_same(buffer: np.ndarray, block: list["torch.Tensor"], handle: int, offset: int) -> None:
    """Read what the file holds at `offset` into `buffer`. Raises OSError unless it is the block."""
    got, nbytes = 0, 4 * sum(len(values) for values in block)
    while got < nbytes and (n := os.preadv(handle, [buffer[got:]], offset + got)):
        got += n
    bits, at = buffer[: min(got, nbytes) // 4 * 4].view(np.uint32), 0
    for values in block:
        ours = values.detach().cpu().numpy().view(np.uint32)  # bits, for a NaN is not equal to itself
        if not np.array_equal(ours, bits[at : at + len(ours)]):
            raise OSError(errno.EIO, "what was read back is not what was written; the disk or its driver is failing")
        at += len(ours)


def _create(path: Path) -> tuple[int, bool]:
    """A handle of a new file, and whether it goes past the page cache."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems refuse only after they have made it
    return os.open(path, flags, 0o644), False


def _write_all(handle: int, content: np.ndarray, offset: int, is_direct: bool) -> None:
    done = 0
    while done < len(content):
        try:
            done += os.pwrite(handle, content[done:], offset + done)
        except OSError as error:  # a limit inside a page, or a file system that refuses only now: through the cache, or to the true error
            if error.errno != errno.EINVAL or not is_direct:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~os.O_DIRECT)
            is_direct = False
