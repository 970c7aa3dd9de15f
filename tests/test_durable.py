"""llm/durable.py: writers at once, links, devices, modes.

Full disks and kills are in tests/faults/test_whole_files.py.
"""

import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from llm import durable

LIMIT_S = 60
CONTENTS = [letter * size for letter, size in (("a", 10), ("b", 200_000))]


def write_often(path: Path, content: str) -> None:
    for _ in range(40):
        durable.write_text(path, content)


def test_of_processes_that_write_one_file_at_once_a_reader_sees_one_and_whole(tmp_path):
    path = tmp_path / "results.json"
    durable.write_text(path, CONTENTS[0])
    writers = [
        get_context("fork").Process(target=write_often, args=(path, content))
        for content in CONTENTS
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_text())
    for writer in writers:
        writer.join(LIMIT_S)
    assert seen <= set(CONTENTS) and [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("elsewhere") / "file")
    durable.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (
        tmp_path / "elsewhere" / "file"
    ).read_text() == "new"
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_pipe_and_what_is_open_already_are_written_to_and_not_replaced(tmp_path):
    reads, writes = os.pipe()
    durable.write_text(Path(f"/dev/fd/{writes}"), "through a pipe")
    assert os.read(reads, 100) == b"through a pipe"
    with open(tmp_path / "log", "w") as file:  # as standard output is, behind > log
        durable.write_text(Path(f"/dev/fd/{file.fileno()}"), "from a command")
        assert os.fstat(file.fileno()).st_ino == (tmp_path / "log").stat().st_ino
    assert (tmp_path / "log").read_text() == "from a command"
    durable.write_text(Path("/dev/null"), "nowhere")
    assert Path("/dev/null").is_char_device()


def test_a_private_file_stays_private(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.touch(0o600)
    durable.write_text(path, "words")
    assert path.read_text() == "words" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("is_there", [False, True])
def test_an_error_while_it_is_written_leaves_what_was_there(tmp_path, is_there):
    path = tmp_path / "file"
    if is_there:
        path.write_text("old")
    with pytest.raises(ZeroDivisionError), durable.new_file(path) as fresh:
        fresh.write_text("half")
        raise ZeroDivisionError
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == (
        {"file": "old"} if is_there else {}
    )


def test_a_folder_is_there_with_all_in_it_or_not_at_all(tmp_path):
    for fails in (True, False):
        try:
            with durable.new_folder(tmp_path / "out") as fresh:
                assert list(fresh.iterdir()) == []
                (fresh / "inner").mkdir()
                (fresh / "inner" / "file").write_text("whole")
                assert not (tmp_path / "out").exists()
                assert not fails
        except AssertionError:
            assert fails and list(tmp_path.iterdir()) == []
    assert (tmp_path / "out" / "inner" / "file").read_text() == "whole" and len(
        list(tmp_path.iterdir())
    ) == 1
