import hashlib
import json
import os
import shutil
from itertools import product

import numpy as np
import pytest
from counting_shards import TOKENIZER, write_counting

from llm.data import shards as shards_module
from llm.data.shards import Shard, ShardError, token_dtype, verify_shard, write_shard


@pytest.mark.parametrize(("vocab_size", "name"), [(4, "uint16"), (65535, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_exactly_as_long_as_they_fit(vocab_size, name):
    assert token_dtype(vocab_size).name == name
    assert np.array(vocab_size - 1).astype(token_dtype(vocab_size)) == vocab_size - 1


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_the_largest_id_survives_the_disk(tmp_path, vocab_size):
    top = vocab_size - 1
    write_counting(tmp_path, "x", 10, first=top - 9, tokenizer={**TOKENIZER, "vocab_size": vocab_size})
    shard = Shard.open(tmp_path / "x.meta.json")
    assert shard.tokens(0, 10).tolist() == list(range(top - 9, top + 1))
    assert (shard.meta.min_id, shard.meta.max_id) == (top - 9, top)
    assert shard.tokens(0, 10).dtype == np.int64


def test_a_shard_reads_back_what_was_written(tmp_path):
    meta = write_counting(tmp_path, "text.cached.8.20260101-00000", 100, first=5)
    shard = Shard.open(meta.path)
    assert shard.meta == meta
    assert shard.meta.name == "text.cached.8.20260101-00000"
    assert shard.tokens(0, 100).tolist() == list(range(5, 105))
    assert shard.tokens(98, 99).tolist() == [103]
    assert shard.doc_ends.tolist() == [*range(7, 100, 7), 100]
    assert shard.loss_mask(0, 100) is None
    assert (meta.n_tokens, meta.n_docs, meta.n_bytes, meta.unit_ids) == (100, 15, 300, ["unit-5-100"])
    assert sorted(p.name.removeprefix(meta.name) for p in tmp_path.iterdir()) == [".bin", ".idx", ".meta.json"]


def test_files_are_plain_little_endian_numbers(tmp_path):
    meta = write_counting(tmp_path, "x", 20, tokenizer={**TOKENIZER, "vocab_size": 300})
    assert np.fromfile(meta.file("bin"), "<u2").tolist() == list(range(20))
    assert np.fromfile(meta.file("idx"), "<u8").tolist() == [7, 14, 20]
    record = json.loads(meta.path.read_text())
    assert record["files"]["bin"]["sha256"] == hashlib.sha256(meta.file("bin").read_bytes()).hexdigest()
    own = record.pop("self_sha256")
    assert own == hashlib.sha256(json.dumps(["record", record], sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_parts_make_the_same_shard_as_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "CRC_BLOCK_BYTES", 64)  # so that blocks and parts end at different places
    ids, lengths = np.arange(100), np.full(20, 5)
    options = {"dtype": token_dtype(70_000), "tokenizer": TOKENIZER, "units": [{"unit_id": "u", "bytes": 0}],
               "role": "train", "seq_len": 8, "writer": {}}
    whole = write_shard(tmp_path, "whole", [(ids, lengths)], **options)
    parts = [(ids[:15].astype(np.uint16), lengths[:3]), (ids[:0], lengths[:0]), (ids[15:], lengths[3:])]
    cut = write_shard(tmp_path, "cut", iter(parts), **options)
    assert (cut.shard_id, cut.files, cut.n_docs) == (whole.shard_id, whole.files, whole.n_docs)
    assert len(whole.files["bin"]["crc32"]) == 7
    verify_shard(Shard.open(cut.path))


@pytest.mark.parametrize("change", [{"seq_len": 16}, {"role": "val"}, {"writer": {"backend": "other"}}])
def test_what_a_shard_is_made_for_is_not_its_identity(tmp_path, change):
    assert write_counting(tmp_path, "a", 50).shard_id == write_counting(tmp_path, "b", 50, **change).shard_id


@pytest.mark.parametrize("change", [
    {"first": 1}, {"n_tokens": 51}, {"doc_tokens": 8}, {"tokenizer": {**TOKENIZER, "fingerprint": "cd" * 32}},
    {"tokenizer": {**TOKENIZER, "vocab_size": 300}}, {"mask_spans": np.array([[0, 50]])},
])
def test_tokens_documents_tokenizer_dtype_and_mask_are_its_identity(tmp_path, change):
    assert write_counting(tmp_path, "a", 50).shard_id != write_counting(tmp_path, "b", **{"n_tokens": 50, **change}).shard_id


def test_a_renamed_shard_is_the_same_shard_by_its_new_name(tmp_path):
    old = write_counting(tmp_path, "old", 50)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("old", "new")))
    shard = Shard.open(tmp_path / "new.meta.json")
    assert (shard.meta.shard_id, shard.meta.name) == (old.shard_id, "new")
    assert shard.tokens(0, 50).tolist() == list(range(50))


def test_loss_mask_cuts_any_window_out_of_the_spans(tmp_path):
    spans = np.array([[0, 3], [3, 2], [10, 1], [20, 30], [99, 1]])
    shard = Shard.open(write_counting(tmp_path, "x", 100, mask_spans=spans).path)
    expected = np.zeros(100, bool)
    for start, length in spans:
        expected[start : start + length] = True
    for start in range(100):
        for stop in (start + 1, min(start + 12, 100), 100):
            assert np.array_equal(shard.loss_mask(start, stop), expected[start:stop]), (start, stop)


def test_a_mask_without_spans_means_that_nothing_carries_loss(tmp_path):
    shard = Shard.open(write_counting(tmp_path, "x", 20, mask_spans=np.zeros((0, 2), int)).path)
    assert not shard.loss_mask(0, 20).any()


@pytest.mark.parametrize("spans", [[[5, 3], [2, 1]], [[0, 5], [4, 2]], [[15, 6]], [[3, 0]]])
def test_spans_that_overlap_or_leave_the_shard_are_refused(tmp_path, spans):
    with pytest.raises(AssertionError):
        write_counting(tmp_path, "x", 20, mask_spans=np.array(spans))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bad", "what"), [([1, 300], "id 300"), ([-1, 1], "id -1")])
def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_left(tmp_path, bad, what):
    parts = [(np.arange(10), np.array([10])), (np.array(bad), np.array([2]))]
    with pytest.raises(ShardError, match=rf"x\.bin.*{what}.*vocabulary of 300.*tokenizer"):
        write_shard(tmp_path, "x", parts, dtype=token_dtype(300), tokenizer={**TOKENIZER, "vocab_size": 300},
                    units=[{"unit_id": "u", "bytes": 0}], role="train", seq_len=8, writer={})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path):
    def parts():
        yield np.arange(10), np.array([10])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "x", parts(), dtype=token_dtype(300), tokenizer={**TOKENIZER, "vocab_size": 300},
                    units=[{"unit_id": "u", "bytes": 0}], role="train", seq_len=8, writer={})
    assert list(tmp_path.iterdir()) == []


def test_no_tokens_make_no_shard(tmp_path):
    with pytest.raises(ShardError, match="no tokens.*empty"):
        write_shard(tmp_path, "x", [], dtype=token_dtype(300), tokenizer={**TOKENIZER, "vocab_size": 300},
                    units=[{"unit_id": "u", "bytes": 0}], role="train", seq_len=8, writer={})
    assert list(tmp_path.iterdir()) == []


def test_a_published_shard_is_never_overwritten(tmp_path):
    meta = write_counting(tmp_path, "x", 20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ShardError, match=r"x\.meta\.json.*exists already.*another name"):
        write_counting(tmp_path, "x", 30)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    verify_shard(Shard.open(meta.path))


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"from a writer killed before its meta")
    (tmp_path / "x.idx.tmp").write_bytes(b"from a writer killed earlier")
    verify_shard(Shard.open(write_counting(tmp_path, "x", 20).path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.meta.json"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks Linux for the name of an open file")
def test_the_meta_appears_last_and_only_after_everything_is_on_disk(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {b}"), real_replace(a, b)))
    write_counting(tmp_path, "x", 20, mask_spans=np.array([[0, 5]]))
    assert [event.replace(f"{tmp_path}", "").replace(" /", " ") for event in events] == [
        "fsync x.bin.tmp", "fsync x.idx.tmp", "fsync x.mask.tmp", "rename x.bin", "rename x.idx", "rename x.mask", "fsync ",
        "fsync .x.meta.json.new", "rename x.meta.json", "fsync ",
    ]


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ShardError, match=r"file.*cannot write shard x.*Choose a folder"):
        write_counting(tmp_path / "file", "x", 20)


def test_more_shards_than_a_process_may_have_files_can_be_in_use(tmp_path):
    resource = pytest.importorskip("resource")
    meta = write_counting(tmp_path, "x", 20)
    for copy, kind in product(range(400), ("bin", "idx", "meta.json")):
        shutil.copy(tmp_path / f"x.{kind}", tmp_path / f"{copy}.{kind}")
    shards = [Shard.open(meta.path.with_name(f"{copy}.meta.json")) for copy in range(400)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (340, hard))
    try:
        for _ in range(2):
            assert all(shard.tokens(19, 20).item() == 19 for shard in shards)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
