import shutil

import pytest
from counting_shards import TOKENIZER, counting_shards, write_counting

from llm.data.manifest import check_compatible, find_shards, load_manifest, write_manifest
from llm.data.shards import ShardError


def source(name: str, *unit_ids: str) -> dict:
    return {"source_id": f"source-{'-'.join(unit_ids)}", "names": [name], "docs": 1, "bytes": 9, "unit_bytes": 4 << 20,
            "unit_ids": list(unit_ids)}


def publish(folder, shards, sources=()):
    return write_manifest(folder, sources=list(sources), shards=[s.meta for s in shards], tokenizer=TOKENIZER, seq_len=8)


def names(shards) -> list[str]:
    return [shard.meta.name for shard in shards]


def test_a_manifest_reads_back_and_lists_every_shard(tmp_path):
    shards = counting_shards(tmp_path, [20, 30])
    written = publish(tmp_path, shards, [source("a.txt", "unit-0-20", "unit-20-30")])
    assert load_manifest(tmp_path) == written
    assert [(s["shard_id"], s["path"], s["n_tokens"], s["role"], s["unit_ids"]) for s in written.shards] == [
        (shards[0].meta.shard_id, "text-00000.meta.json", 20, "train", ["unit-0-20"]),
        (shards[1].meta.shard_id, "text-00001.meta.json", 30, "train", ["unit-20-30"]),
    ]


def test_new_shards_are_appended_and_old_ones_stay(tmp_path):
    shards = counting_shards(tmp_path, [20, 30, 40])
    first = publish(tmp_path, shards[:2], [source("a.txt", "u1")])
    second = publish(tmp_path, shards[1:], [source("copy of a.txt", "u1"), source("b.txt", "u2")])
    assert second.shards[:2] == first.shards and len(second.shards) == 3
    assert [s["names"] for s in second.sources] == [["a.txt", "copy of a.txt"], ["b.txt"]]
    assert second.manifest_id != first.manifest_id
    assert publish(tmp_path, shards, second.sources) == second


def test_the_manifest_id_depends_on_contents_only(tmp_path):
    shards = counting_shards(tmp_path / "a", [20, 30])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in list((tmp_path / "b").iterdir()):
        path.rename(path.with_name(path.name.replace("text", "renamed")))
    copies = [find_shards([tmp_path / "b" / f"renamed-0000{i}.bin"], "train")[0] for i in (1, 0)]
    assert publish(tmp_path / "a", shards).manifest_id == publish(tmp_path / "b", copies).manifest_id


@pytest.mark.parametrize(("tokenizer", "seq_len", "values"), [
    ({**TOKENIZER, "fingerprint": "cd" * 32}, 8, "abab.*cdcd"), (TOKENIZER, 16, "seq_len 8.*16"),
])
def test_a_folder_keeps_to_one_tokenizer_and_seq_len(tmp_path, tokenizer, seq_len, values):
    publish(tmp_path, counting_shards(tmp_path, [20]))
    with pytest.raises(ShardError, match=rf"manifest\.json: .*{values}.*another folder"):
        write_manifest(tmp_path, sources=[], shards=[], tokenizer=tokenizer, seq_len=seq_len)


def test_shards_are_found_in_folders_and_by_file(tmp_path):
    shards = counting_shards(tmp_path / "a", [20, 30]) + [None]
    shards[2] = find_shards([write_counting(tmp_path / "b", "loose", 40, first=500).path], "train")[0]
    publish(tmp_path / "a", shards[:2])
    found = find_shards([str(tmp_path / "a"), tmp_path / "b" / "loose.bin"], "train")
    assert names(found) == ["text-00000", "text-00001", "loose"]
    assert names(find_shards([tmp_path / "b" / "loose.meta.json"], "train")) == ["loose"]


def test_a_shard_that_the_manifest_does_not_list_is_not_used(tmp_path):
    shards = counting_shards(tmp_path, [20, 30])
    publish(tmp_path, shards[:1])
    assert names(find_shards([tmp_path], "train")) == ["text-00000"]


def test_train_and_val_shards_are_kept_apart(tmp_path):
    train = counting_shards(tmp_path, [20])
    val = write_counting(tmp_path, "text-val", 30, first=100, role="val")
    publish(tmp_path, [*train, *find_shards([val.path], "val")])
    assert names(find_shards([tmp_path], "train")) == ["text-00000"]
    assert names(find_shards([tmp_path], "val")) == ["text-val"]
    with pytest.raises(ShardError, match=r"no training shards in .*text-val\.bin"):
        find_shards([tmp_path / "text-val.bin"], "train")


def test_copies_and_folders_given_twice_are_used_once_with_a_warning(tmp_path, capsys):
    publish(tmp_path / "a", counting_shards(tmp_path / "a", [20]))
    write_counting(tmp_path / "b", "copy", 20)
    found = find_shards([tmp_path / "a", tmp_path / "b" / "copy.bin", tmp_path / "a"], "train")
    assert names(found) == ["text-00000"]
    warnings = capsys.readouterr().out.splitlines()
    assert ["copy.meta.json: the same contents as" in line for line in warnings] == [True, False]
    assert all(line.endswith("used once") for line in warnings)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    counting_shards(tmp_path, [20])
    with pytest.raises(ShardError, match=r"manifest\.json: missing.*Run the tokenizing"):
        find_shards([tmp_path], "train")


@pytest.mark.parametrize("name", ["x.bin", "x.meta.json", "x"])
def test_a_path_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(ShardError, match=rf"{name}: no such file or folder"):
        find_shards([tmp_path / name], "train")


def test_a_bin_without_its_meta_is_refused(tmp_path):
    write_counting(tmp_path, "x", 20).path.unlink()
    with pytest.raises(ShardError, match=r"x\.bin: its x\.meta\.json is missing.*Rename and copy them together"):
        find_shards([tmp_path / "x.bin"], "train")


def test_a_listed_shard_that_is_missing_is_named(tmp_path):
    shards = counting_shards(tmp_path, [20, 30])
    publish(tmp_path, shards)
    shards[1].meta.path.unlink()
    with pytest.raises(ShardError, match=r"text-00001\.meta\.json: missing, though .*manifest\.json lists it"):
        find_shards([tmp_path], "train")


def test_a_shard_replaced_under_its_name_is_refused(tmp_path):
    shards = counting_shards(tmp_path / "a", [20])
    publish(tmp_path / "a", shards)
    write_counting(tmp_path / "b", "text-00000", 21)
    for path in (tmp_path / "b").iterdir():
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(ShardError, match=rf"text-00000\.meta\.json: replaced: .*{shards[0].meta.shard_id[:16]}"):
        find_shards([tmp_path / "a"], "train")


def test_a_damaged_manifest_is_refused(tmp_path):
    publish(tmp_path, counting_shards(tmp_path, [20]))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"n_tokens": 20', '"n_tokens": 21'))
    with pytest.raises(ShardError, match=r"manifest\.json: .*own hash.*Delete it and run the tokenizing again"):
        load_manifest(tmp_path)


def test_a_failed_write_keeps_the_old_manifest(tmp_path, monkeypatch):
    shards = counting_shards(tmp_path, [20, 30])
    old = publish(tmp_path, shards[:1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ShardError, match=r"manifest\.json: cannot be written \(No space left"):
        publish(tmp_path, shards)
    assert load_manifest(tmp_path) == old
    assert not list(tmp_path.glob("*.tmp"))


def test_another_tokenizer_is_refused_with_both_values(tmp_path):
    with pytest.raises(ShardError, match=r"text-00000\.meta\.json: .*abababab.*efefefef.*tokenizer_path"):
        check_compatible(counting_shards(tmp_path, [20]), "ef" * 32, 8)


def test_another_seq_len_is_refused_with_both_values_unless_rechunk_is_said(tmp_path):
    shards = counting_shards(tmp_path, [20])
    check_compatible(shards, TOKENIZER["fingerprint"], 8)
    with pytest.raises(ShardError, match=r"text-00000\.meta\.json: made for seq_len 8, this run has 16.*--rechunk"):
        check_compatible(shards, TOKENIZER["fingerprint"], 16)
    check_compatible(shards, TOKENIZER["fingerprint"], 16, rechunk=True)
