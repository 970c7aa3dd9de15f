"""Which files are read, and how they are cut."""

import os
from pathlib import Path

import pytest

from llm.corpus.options import ReadOptions
from llm.corpus.plan import MAX_UNIT_BYTES, MIN_UNIT_BYTES, TASK_BYTES, Source, Unit, find_sources, plan_tasks, plan_units, unit_bytes_for
from llm.log import UserError


def test_units_are_a_power_of_two_from_4_to_512_mib_about_64_to_a_source():
    assert unit_bytes_for(0) == unit_bytes_for(1 << 28) == MIN_UNIT_BYTES == 4 << 20
    assert unit_bytes_for((1 << 28) + 64) == 8 << 20
    assert unit_bytes_for(1 << 45) == MAX_UNIT_BYTES == 512 << 20


def test_a_folder_is_its_files_in_the_order_of_their_names_without_hidden_ones(tmp_path, capsys):
    for name in ("texts/b.txt", "texts/sub/a.jsonl", "texts/a.txt", "texts/.git/c.txt", "texts/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [source.name for source in find_sources([tmp_path / "texts"], ReadOptions())] == ["texts/a.txt", "texts/b.txt", "texts/sub/a.jsonl"]
    assert "1 files left out" in capsys.readouterr().out


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert len(find_sources([tmp_path / "a.txt", tmp_path], ReadOptions())) == 1


def test_inputs_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    refusals = {"missing.txt": "no such file", "a.pdf": "cannot read", "": "holds no file called"}
    for path, said in ((tmp_path / name, said) for name, said in refusals.items()):
        with pytest.raises(UserError, match=said):
            find_sources([path], ReadOptions())


def test_links_to_folders_are_told_and_files_that_cannot_be_opened_refused(tmp_path, capsys):
    for name in ("texts/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    (tmp_path / "texts" / "more").symlink_to(tmp_path / "elsewhere")
    assert [source.name for source in find_sources([tmp_path / "texts"], ReadOptions())] == ["texts/a.txt"]
    assert "links to folders are not followed" in capsys.readouterr().out
    (tmp_path / "texts" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="gone.txt: cannot be read"):
        find_sources([tmp_path / "texts"], ReadOptions())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", ["a.txt", "sub"])
def test_what_may_not_be_read_is_refused_and_never_left_out_unsaid(closed, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / closed).chmod(0)
    try:
        with pytest.raises(UserError, match=f"{closed}: cannot be read"):
            find_sources([tmp_path], ReadOptions())
    finally:
        (tmp_path / closed).chmod(0o700)


def test_a_name_that_is_no_utf8_can_be_shown(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    assert [source.name.partition("/")[2] for source in find_sources([tmp_path], ReadOptions())] == ["caf\ufffd.txt"]


def test_small_files_share_a_task_and_a_large_unit_has_its_own(tmp_path):
    source = Source(tmp_path / "a.txt", "a.txt", 0, 0)
    sizes = [100] * 5000 + [TASK_BYTES] + [TASK_BYTES * 4] + [7]
    tasks = plan_tasks([Unit(source, 0, size) for size in sizes], {})
    assert [len(task.units) for task in tasks] == [5001, 1, 1]


def test_the_key_of_a_task_changes_with_the_file_and_with_the_settings(tmp_path):
    units = [Unit(Source(tmp_path / "a.txt", "a.txt", 5, mtime), 0, 5) for mtime in (1, 2)]
    keys = {plan_tasks([unit], {"val_ratio": ratio})[0].key for unit in units for ratio in (0, 0.5)}
    assert len(keys) == 4


def test_every_byte_of_a_source_is_in_one_unit(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 1000)
    units, unit_bytes = plan_units(find_sources([tmp_path], ReadOptions()), ReadOptions(), None)
    assert (units[0].start, units[-1].stop) == (0, 14_000)
    assert list(unit_bytes.values()) == [MIN_UNIT_BYTES]
