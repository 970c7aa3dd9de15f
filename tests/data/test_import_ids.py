import json
import os
import subprocess
import sys

import pytest
from counting_shards import TOKENIZER, write_counting

from llm.data.grown_ids import settle
from llm.data.import_ids import import_ids
from llm.data.ledger import Ledger, LedgerError, new_shards
from llm.data.manifest import find_shards
from llm.data.phase import Phase
from llm.data.shards import Shard, ShardError


def write_lists(path, lists):
    path.write_text("".join(json.dumps(ids) + "\n" for ids in lists))
    return path


def test_each_line_becomes_one_document(tmp_path):
    lists = [[5, 6, 0], [7, 0], list(range(1, 3000)) + [0]]
    meta = import_ids(write_lists(tmp_path / "mine.jsonl", lists), tmp_path / "out", TOKENIZER, 8)
    shard = Shard.open(meta.path)
    assert shard.tokens(0, meta.n_tokens).tolist() == sum(lists, [])
    assert shard.doc_ends.tolist() == [3, 5, 3005]
    assert (meta.role, meta.seq_len, meta.n_bytes) == ("train", 8, 0)
    assert meta.name.startswith("mine.cached.8.")
    assert [s.meta.shard_id for s in find_shards([meta.path], "train")] == [meta.shard_id]


def test_many_lines_keep_their_order(tmp_path):
    lists = [[i, 0] for i in range(1, 3001)]
    shard = Shard.open(import_ids(write_lists(tmp_path / "x.jsonl", lists), tmp_path, TOKENIZER, 8).path)
    assert shard.tokens(0, 6000).tolist() == sum(lists, [])


def test_the_same_file_is_imported_once_under_any_folder_name(tmp_path):
    path = write_lists(tmp_path / "x.jsonl", [[1, 0], [2, 0]])
    first = import_ids(path, tmp_path / "out", TOKENIZER, 8)
    written_at = os.stat(first.file("bin")).st_mtime_ns
    assert import_ids(path, tmp_path / "out", TOKENIZER, 8) == first
    assert os.stat(first.file("bin")).st_mtime_ns == written_at
    renamed = path.rename(tmp_path / "y.jsonl")
    again = import_ids(renamed, tmp_path / "out", TOKENIZER, 8)
    assert (again.shard_id, again.unit_ids) == (first.shard_id, first.unit_ids)


def test_changed_contents_and_other_tokenizers_make_other_units(tmp_path):
    path = write_lists(tmp_path / "x.jsonl", [[1, 0]])
    first = import_ids(path, tmp_path, TOKENIZER, 8)
    other = import_ids(path, tmp_path, {**TOKENIZER, "fingerprint": "cd" * 32}, 8)
    changed = import_ids(write_lists(path, [[2, 0]]), tmp_path, TOKENIZER, 8)
    assert len({first.unit_ids[0], other.unit_ids[0], changed.unit_ids[0]}) == 3


def test_a_file_that_has_grown_is_not_taken_for_a_new_text(tmp_path):
    path = write_lists(tmp_path / "x.jsonl", [[i, 0] for i in range(1, 101)])
    first = Shard.open(import_ids(path, tmp_path, TOKENIZER, 8).path)
    ledger = Ledger().open(Phase.plan("p0", 3, 1, 8, [first]))
    grown = Shard.open(import_ids(write_lists(path, [[i, 0] for i in range(1, 301)]), tmp_path, TOKENIZER, 8).path)
    with pytest.raises(LedgerError, match="1 of its 4 units of text are known already, the rest is new.*in a file of its own"):
        new_shards(ledger, [grown])
    rest = Shard.open(import_ids(write_lists(tmp_path / "y.jsonl", [[i, 0] for i in range(101, 301)]), tmp_path, TOKENIZER, 8).path)
    assert new_shards(ledger, [first, rest]) == [rest]


def test_a_run_that_was_fed_twice_by_an_earlier_version_goes_on_with_the_new_lines_alone(tmp_path):
    def imported(last: int) -> Shard:
        path = write_lists(tmp_path / "x.jsonl", [[i, 0] for i in range(1, last)])
        return Shard.open(import_ids(path, tmp_path / "out", TOKENIZER, 8).path)

    ledger = Ledger()
    for name, last in (("p0", 21), ("p1", 31)):  # the first 20 lists again in p1
        phase = Phase.plan(name, 3, 1, 8, [imported(last)])
        ledger = ledger.open(phase).advance(phase.total, 1)
    grown = imported(41)
    settled = settle([grown], ledger)
    assert settled.refused == []
    old, new = settled.shards[grown.meta.shard_id]
    assert old.meta.shard_id == ledger.phases[1].shards[0].shard_id
    assert new.tokens(0, 20).tolist() == sum([[i, 0] for i in range(31, 41)], [])
    assert new_shards(ledger, [old, new]) == [new]


IMPORTER = """
import sys
from counting_shards import TOKENIZER
from llm.data.import_ids import import_ids
from llm.data.shards import Shard, verify_shard
print("ready", flush=True)
sys.stdin.readline()
verify_shard(Shard.open(import_ids(sys.argv[1], sys.argv[2], TOKENIZER, 8).path))
"""


def test_runs_that_begin_at_once_on_one_file_find_one_whole_shard(tmp_path):
    path = write_lists(tmp_path / "x.jsonl", [list(range(1, 400))] * 3000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", IMPORTER, str(path), str(tmp_path / "out")]
    runs = [subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 3
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    assert [(run.communicate(timeout=60), run.returncode)[1] for run in runs] == [0, 0, 0]
    assert len(list((tmp_path / "out").iterdir())) == 4  # its three files and the lock


def test_the_ids_of_a_shard_import_as_that_shard(tmp_path):
    shard = Shard.open(write_counting(tmp_path, "x", 50).path)
    starts = [0, *shard.doc_ends[:-1].tolist()]
    lists = [shard.tokens(a, b).tolist() for a, b in zip(starts, shard.doc_ends.tolist(), strict=True)]
    assert import_ids(write_lists(tmp_path / "x.jsonl", lists), tmp_path, TOKENIZER, 8).shard_id == shard.meta.shard_id


@pytest.mark.parametrize(("line", "what"), [
    ("[1, 70000]", "id 70000 is outside the vocabulary of 70,000.*tokenizer_path"),
    ("[-1]", "id -1 is outside"),
    ("[123456789012345678901234567890]", "is outside"),
    ("[1, 2.0]", "not a list of whole numbers"),
    ("[1, true]", "not a list of whole numbers"),
    ('["1"]', "not a list of whole numbers"),
    ("[[1]]", "not a list of whole numbers"),
    ('{"ids": [1]}', "not a list of whole numbers"),
    ("7", "not a list of whole numbers"),
    ("[1, 2", "not JSON"),
])
def test_a_bad_line_is_named_by_its_number_and_nothing_is_written(tmp_path, line, what):
    (tmp_path / "x.jsonl").write_text(f"[1, 0]\n\n{line}\n[2, 0]\n")
    with pytest.raises(ShardError, match=rf"x\.jsonl:3: .*{what}"):
        import_ids(tmp_path / "x.jsonl", tmp_path / "out", TOKENIZER, 8)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ["", "\n\n", "[]\n"])
def test_a_file_without_ids_is_refused(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ShardError, match="no tokens"):
        import_ids(tmp_path / "x.jsonl", tmp_path / "out", TOKENIZER, 8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"none\.jsonl: cannot be read"):
        import_ids(tmp_path / "none.jsonl", tmp_path / "out", TOKENIZER, 8)


def test_lists_without_end_of_text_are_taken_as_they_are_with_a_warning(tmp_path, capsys):
    meta = import_ids(write_lists(tmp_path / "x.jsonl", [[1, 2], [3, 0], [4]]), tmp_path, TOKENIZER, 8)
    assert meta.n_tokens == 5
    assert "2 of 3 lists do not end with the end-of-text id 0" in capsys.readouterr().out
