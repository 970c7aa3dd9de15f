"""Files written past the page cache: whole, hashed as the disk has them, and refused when the disk has something else."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from llm import durable
from llm.checkpoint import direct

PAGE_ELEMENTS = direct.PAGE // 4


@pytest.fixture(params=["past the cache", "through the cache"])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(direct, "BLOCK_BYTES", 2 * direct.PAGE)
    if request.param == "through the cache":
        monkeypatch.setattr(direct.os, "O_DIRECT", 0, raising=False)


@pytest.mark.parametrize("numel", [1, PAGE_ELEMENTS, 2 * PAGE_ELEMENTS, 2 * PAGE_ELEMENTS + 1, 40 * PAGE_ELEMENTS - 1])
def test_the_file_holds_the_row_of_tensors_and_its_hash_is_theirs(tmp_path, small_blocks, numel):
    values = torch.arange(numel, dtype=torch.float32)
    values[0] = float("nan")
    cuts = sorted({0, numel // 3, numel // 2, numel})
    row = [values[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    size, sha256 = direct.write_checked(tmp_path / "x", row)
    content = (tmp_path / "x").read_bytes()
    assert content == values.numpy().tobytes() and size == len(content)
    assert sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("lie", ["a bit", "nothing"])
def test_a_disk_that_gives_back_something_else_fails_the_write(tmp_path, monkeypatch, small_blocks, lie):
    real = os.preadv

    def lying(handle, buffers, offset):
        n = real(handle, buffers, offset)
        if offset != 4 * direct.PAGE:  # only one block in the middle
            return n
        if lie == "a bit":
            buffers[0][100] ^= 8
        return n if lie == "a bit" else 0

    monkeypatch.setattr(direct.os, "preadv", lying)
    with pytest.raises(OSError, match="read back is not what was written.*x'"):
        direct.write_checked(tmp_path / "x", [torch.randn(10 * PAGE_ELEMENTS)])


def test_a_disk_that_fills_up_in_the_middle_of_a_block_is_told_as_such(tmp_path, monkeypatch, small_blocks):
    real, room = os.pwrite, 5 * direct.PAGE + 100

    def nearly_full(handle, content, offset):
        fits = max(0, min(len(content), room - offset))
        if not fits:
            raise OSError(28, "No space left on device")
        real(handle, content[: fits // direct.PAGE * direct.PAGE], offset)
        return fits

    monkeypatch.setattr(direct.os, "pwrite", nearly_full)
    with pytest.raises(OSError, match="No space left on device.*x'"):
        direct.write_checked(tmp_path / "x", [torch.randn(10 * PAGE_ELEMENTS)])


def test_a_file_system_without_direct_writes_is_written_through_the_cache(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, mode=0o777):
        handle = real(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            os.close(handle)
            raise OSError(22, "Invalid argument")
        return handle

    monkeypatch.setattr(direct.os, "open", refusing)
    direct.write_checked(tmp_path / "x", [torch.ones(5)])
    assert (tmp_path / "x").read_bytes() == torch.ones(5).numpy().tobytes()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that cannot sync folders")
def test_a_file_system_that_cannot_sync_folders_fails_no_save():
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc", os.O_RDONLY))
    durable.fsync_folder(Path("/proc"))
