"""Raw text to shards: every document once, the same for any number of workers, and only what is new."""

import gzip
import json
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
from raw_text import contents, documents_of, manifest_id, prose, raw_texts, stamp_of, texts_of, write_jsonl

from llm.corpus import plan
from llm.corpus.options import ReadOptions
from llm.corpus.recognise import units_of_file
from llm.corpus.tokenize_corpus import tokenize_corpus
from llm.data.manifest import find_shards, load_manifest
from llm.data.shards import verify_shard
from llm.tokenizer import load_tokenizer


def test_every_document_is_in_the_shards_once_and_ends_with_end_of_text(request_for, raw, tokenizer_folder):
    report = tokenize_corpus(request_for())
    assert sorted(texts_of(request_for().out, tokenizer_folder)) == sorted(raw_texts(raw))
    assert report.counts.records == 154
    assert sum(meta.n_bytes for meta in report.shards) == sum(len(text.encode()) for text in raw_texts(raw))
    for shard in find_shards([request_for().out], "train"):
        verify_shard(shard)


def test_names_and_places_of_files_do_not_matter(request_for, raw, tmp_path):
    tokenize_corpus(request_for("first", shard_tokens=10_000))
    for i, path in enumerate(sorted(raw.iterdir(), reverse=True)):
        path.rename(raw / f"renamed-{i}{path.suffix}")
    tokenize_corpus(request_for("second", shard_tokens=10_000))
    assert manifest_id(tmp_path / "first") == manifest_id(tmp_path / "second")


def test_packed_text_gives_the_shards_of_the_plain_one_and_is_recognised(request_for, raw, tmp_path):
    tokenize_corpus(request_for("plain"))
    sources = load_manifest(tmp_path / "plain").sources
    assert max(len(source["unit_ids"]) for source in sources) > 3
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    tokenize_corpus(request_for("packed", workers=2))
    assert manifest_id(tmp_path / "packed") == manifest_id(tmp_path / "plain")
    packed = load_manifest(tmp_path / "packed").sources
    assert [(source["source_id"], source["unit_ids"]) for source in packed] == [(source["source_id"], source["unit_ids"]) for source in sources]
    known = {unit_id for source in sources for unit_id in source["unit_ids"]}
    for path in raw.iterdir():
        assert all(unit.unit_id in known for unit in units_of_file(path, sources, known, ReadOptions()))
    assert not tokenize_corpus(request_for("packed")).shards


def test_shards_are_whole_units_up_to_the_target(request_for, raw):
    report = tokenize_corpus(request_for(shard_tokens=12_000))
    units = [unit_id for meta in report.shards for unit_id in meta.unit_ids]
    assert len(units) == len(set(units)) > len(report.shards) > 2
    assert all(meta.n_tokens <= 12_000 for meta in report.shards)


def test_names_tell_the_dataset_the_length_and_the_split(request_for, raw):
    names = [meta.name for meta in tokenize_corpus(request_for("plays", val_ratio=0.3)).shards]
    assert [name.replace(stamp_of(name), "STAMP") for name in names] == ["plays.cached.64.STAMP-00000", "plays-val.cached.64.STAMP-00000"]


def test_nothing_but_the_dataset_is_left_behind(request_for, raw):
    tokenize_corpus(request_for())
    assert {path.name.rpartition(".")[2] for path in request_for().out.iterdir()} == {"bin", "idx", "json"}


# validation split, shuffle, emit


def test_the_validation_split_goes_by_content(request_for, raw, tokenizer_folder, tmp_path):
    tokenize_corpus(request_for("first", val_ratio=0.2))
    first = set(texts_of(tmp_path / "first", tokenizer_folder, "val"))
    train = texts_of(tmp_path / "first", tokenizer_folder, "train")
    assert 15 < len(first) < 50 and not first & set(train) and len(first) + len(train) == 154
    write_jsonl(raw / "big.jsonl", reversed([json.loads(line)["text"] for line in (raw / "big.jsonl").read_text().splitlines()]))
    tokenize_corpus(request_for("second", val_ratio=0.2))
    assert set(texts_of(tmp_path / "second", tokenizer_folder, "val")) == first


def test_shuffling_permutes_the_documents_inside_their_unit(request_for, raw, tmp_path):
    orders = {}
    for name, seed in (("plain", None), ("seed 1", 1), ("seed 1 again", 1), ("seed 2", 2)):
        report = tokenize_corpus(request_for(name, shuffle_seed=seed))
        orders[name] = [tuple(document) for document in documents_of(tmp_path / name)]
        units = {unit["unit_id"]: unit["docs"] for meta in report.shards for unit in meta.units}
    assert orders["seed 1"] == orders["seed 1 again"]
    assert len({tuple(order) for order in orders.values()}) == 3
    start = 0
    for docs in units.values():  # the units stand in the same order in all, as their ids do not depend on the shuffle
        assert len({tuple(sorted(order[start : start + docs])) for order in orders.values()}) == 1
        start += docs


def test_emitted_jsonl_has_the_ids_of_one_document_a_line(request_for, raw):
    request = request_for(emit_jsonl=True, val_ratio=0.2)
    for meta in tokenize_corpus(request).shards:
        lines = (request.out / f"{meta.name}.jsonl").read_text().splitlines()
        assert len(lines) == meta.n_docs and sum(len(json.loads(line)) for line in lines) == meta.n_tokens
        assert all(json.loads(line)[-1] == meta.tokenizer["eos_id"] for line in lines)


# more text into the same folder


def test_the_same_again_adds_nothing(request_for, raw):
    tokenize_corpus(request_for())
    before = contents(request_for().out), manifest_id(request_for().out)
    assert tokenize_corpus(request_for()).shards == []
    assert (contents(request_for().out), manifest_id(request_for().out)) == before


def test_new_and_grown_files_bring_only_their_new_text(request_for, raw, tokenizer_folder):
    tokenize_corpus(request_for(workers=2))
    before = {path: path.read_bytes() for path in request_for().out.glob("*.cached.*")}
    (raw / "new.txt").write_text("quite new text")
    with open(raw / "other.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more line"}) + "\n")
    report = tokenize_corpus(request_for(workers=2))
    tokenizer = load_tokenizer(tokenizer_folder)
    assert sum(meta.n_tokens for meta in report.shards) == sum(len(tokenizer.encode(t)) + 1 for t in ("quite new text", "one more line"))
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(texts_of(request_for().out, tokenizer_folder)) == sorted(raw_texts(raw))
    held = [unit_id for shard in load_manifest(request_for().out).shards for unit_id in shard["unit_ids"]]
    assert len(held) == len(set(held))


def test_a_file_that_has_grown_and_has_another_name_now_brings_only_its_new_text(request_for, tmp_path):
    documents = [prose(i, 600) for i in range(50)]
    path = write_jsonl(tmp_path / "raw" / "a.jsonl", documents[:30])
    tokenize_corpus(request_for())
    for name, n_docs in (("b.jsonl", 40), ("c.jsonl", 50)):
        path = write_jsonl(path.rename(path.with_name(name)), documents[:n_docs])
        assert [meta.n_docs for meta in tokenize_corpus(request_for()).shards] == [10]


def test_two_runs_in_one_second_have_names_of_their_own(request_for, raw, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2e9)
    names = [meta.name for meta in tokenize_corpus(request_for()).shards]
    (raw / "new.txt").write_text("quite new text")
    assert not {meta.name for meta in tokenize_corpus(request_for()).shards} & set(names)


def test_a_renamed_file_is_no_new_text_but_gains_a_name(request_for, raw):
    tokenize_corpus(request_for())
    (raw / "big.jsonl").rename(raw / "large.jsonl")
    assert tokenize_corpus(request_for()).shards == []
    assert ["raw/big.jsonl", "raw/large.jsonl"] in [source["names"] for source in load_manifest(request_for().out).sources]


def test_the_same_text_in_two_files_is_used_once_and_said(request_for, raw, tokenizer_folder, capsys):
    (raw / "copy of 0.txt").write_bytes((raw / "0.txt").read_bytes())
    tokenize_corpus(request_for())
    assert sorted(texts_of(request_for().out, tokenizer_folder)) == sorted(set(raw_texts(raw)))
    assert "used once" in capsys.readouterr().out


def test_files_of_one_name_are_told_apart_and_each_keeps_its_units(request_for, tmp_path):
    files = [write_jsonl(tmp_path / folder / "train.jsonl", [prose(1000 * i + j, 60) for j in range(n)])
             for i, (folder, n) in enumerate((("books", 30), ("wiki", 100)))]  # fmt: skip
    request = request_for(inputs=tuple(map(str, files)))
    assert sum(meta.n_docs for meta in tokenize_corpus(request).shards) == 130
    assert tokenize_corpus(request).shards == []
    write_jsonl(files[0], [prose(j, 60) for j in range(40)])
    assert sum(meta.n_docs for meta in tokenize_corpus(request).shards) == 10


def test_text_that_is_there_is_not_new_in_another_kind_of_file_or_as_a_copy_that_is_cut_otherwise(request_for, tmp_path):
    documents = [prose(i, 60) for i in range(100)]
    path = write_jsonl(tmp_path / "raw" / "a.jsonl", documents[:70])
    tokenize_corpus(request_for())
    write_jsonl(path, documents)  # it has grown, so its units are not those of a file that has always been so large
    assert sum(meta.n_docs for meta in tokenize_corpus(request_for()).shards) == 30
    shutil.copy(path, path.with_name("copy.jsonl"))
    pq.write_table(pa.table({"text": documents}), path.with_name("a.parquet"), row_group_size=30)
    assert tokenize_corpus(request_for()).shards == []
    assert sum(meta.n_docs for meta in tokenize_corpus(request_for("another")).shards) == 100
    names = [sorted(source["names"]) for source in load_manifest(request_for().out).sources]
    assert names == [["raw/a.jsonl"], ["raw/a.jsonl", "raw/a.parquet", "raw/copy.jsonl"]]
    write_jsonl(path, [*documents, "one more"])
    assert [meta.n_docs for meta in tokenize_corpus(request_for()).shards] == [1]


def test_a_dataset_inside_the_folder_of_its_text_is_not_taken_for_text(request_for, raw, tokenizer_folder):
    for name in ("raw", "raw/set"):
        tokenize_corpus(request_for(name, emit_jsonl=True))
    (raw / "new.txt").write_text("quite new text")
    for name in ("raw", "raw/set"):
        assert [meta.n_docs for meta in tokenize_corpus(request_for(name, emit_jsonl=True)).shards] == [1]


def test_units_of_a_grown_source_keep_the_size_of_its_first_time(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "UNITS_PER_SOURCE", 1)  # so that a larger file would get larger units
    documents = [prose(i, 40) for i in range(600)]
    path = write_jsonl(tmp_path / "raw" / "a.jsonl", documents[:60])
    tokenize_corpus(request_for())
    write_jsonl(path, documents)
    report = tokenize_corpus(request_for())
    assert sum(meta.n_docs for meta in report.shards) == 540
    first, second = load_manifest(request_for().out).sources
    assert first["unit_bytes"] == second["unit_bytes"] < plan.unit_bytes_for(path.stat().st_size)


def test_thousands_of_small_files_are_no_burden(request_for, tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(3000):
        (tmp_path / "raw" / f"{i}.txt").write_text(f"file number {i}")
    started_at = time.process_time()
    report = tokenize_corpus(request_for())
    assert [meta.n_docs for meta in report.shards] == [3000]
    assert time.process_time() - started_at < 20


def test_a_separator_makes_documents_of_a_txt_file(request_for, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("\n\n".join(prose(i, 50) for i in range(100)))
    assert sum(meta.n_docs for meta in tokenize_corpus(request_for(options=ReadOptions(separator="\n\n"))).shards) == 100
