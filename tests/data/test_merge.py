"""Datasets made apart become one."""

import os

import pytest
from counting_shards import TOKENIZER, write_counting

from llm.data.manifest import find_shards, load_manifest, write_manifest
from llm.data.merge import merge_datasets
from llm.data.record import ShardError


def dataset(folder, first, n_tokens=100, name="text", **changes):
    meta = write_counting(folder, name, n_tokens, first, **changes)
    source = {"source_id": f"s{first}", "names": [f"{first}.txt"], "docs": 1, "bytes": 9, "unit_bytes": 4, "unit_ids": meta.unit_ids}
    write_manifest(folder, sources=[source], shards=[meta], tokenizer=meta.tokenizer, seq_len=meta.seq_len)
    return folder


def tokens_of(folder):
    return sorted(int(i) for shard in find_shards([folder], "train") for i in shard.tokens(0, shard.meta.n_tokens))


@pytest.mark.parametrize("links", [True, False])
def test_two_datasets_with_shards_of_one_name_become_one_and_again_changes_nothing(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    parts = [dataset(tmp_path / "a", 0), dataset(tmp_path / "b", 100)]
    merged = merge_datasets(parts, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == list(range(200)) and len(merged.sources) == 2
    assert merge_datasets(parts[::-1], tmp_path / "other").manifest_id == merged.manifest_id
    assert merge_datasets([*parts, dataset(tmp_path / "c", 200)], tmp_path / "out").manifest_id != merged.manifest_id
    assert tokens_of(tmp_path / "out") == list(range(300))
    assert len(list((tmp_path / "out").glob("*.bin"))) == 3 and not list((tmp_path / "out").glob("*.tmp"))
    assert tokens_of(tmp_path / "a") == list(range(100))


def test_interrupted_before_the_manifest_the_same_merge_goes_on(tmp_path, monkeypatch):
    from llm.data import merge

    parts = [dataset(tmp_path / "a", 0), dataset(tmp_path / "b", 100)]
    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_datasets(parts, tmp_path / "out")
    merge_datasets(parts, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == list(range(200)) and len(list((tmp_path / "out").glob("*.bin"))) == 2


def test_strangers_and_text_that_two_hold_are_refused_and_nothing_is_written(tmp_path):
    first = dataset(tmp_path / "a", 0)
    other = dataset(tmp_path / "b", 100, tokenizer=TOKENIZER | {"fingerprint": "cd" * 32})
    with pytest.raises(ShardError, match="one tokenizer"):
        merge_datasets([first, other], tmp_path / "out")
    twice = dataset(tmp_path / "c", 0, n_tokens=90, units=[{"unit_id": "unit-0-100", "bytes": 1}])
    with pytest.raises(ShardError, match=r"holds text \(0.txt\) that is in another shard of .*trained on twice"):
        merge_datasets([first, twice], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_that_went_wrong_is_not_taken(tmp_path, monkeypatch):
    from llm.data import merge

    def damaged(source, target):
        content = bytearray(source.read_bytes())
        content[-1] ^= 1 if source.suffix == ".bin" else 0
        target.write_bytes(content)

    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    monkeypatch.setattr(merge.shutil, "copyfile", damaged)
    with pytest.raises(ShardError, match="does not match the hash"):
        merge_datasets([dataset(tmp_path / "a", 0)], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
    with pytest.raises(ShardError, match="missing"):
        load_manifest(tmp_path / "out")
