"""A file is recognised by its text: under another name, and cut where it was cut when it was tokenized."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from raw_text import prose, write_jsonl

from llm.corpus import plan
from llm.corpus.options import ReadOptions
from llm.corpus.recognise import units_of_file
from llm.corpus.tokenize_corpus import tokenize_corpus
from llm.data.manifest import load_manifest


def recognised(path, out) -> tuple[int, int]:
    """Bytes of this file's text that the dataset knows, and all of them."""
    sources = load_manifest(out).sources
    known = {unit_id for source in sources for unit_id in source["unit_ids"]}
    units = units_of_file(path, sources, known, ReadOptions())
    return sum(u.n_bytes for u in units if u.unit_id in known), sum(u.n_bytes for u in units)


def test_every_file_is_recognised_under_its_own_and_another_name(request_for, raw, tmp_path):
    tokenize_corpus(request_for())
    for path in list(raw.iterdir()):
        for now in (path, path.rename(tmp_path / f"renamed{path.suffix}")):
            if now.exists():
                known, all_bytes = recognised(now, request_for().out)
                assert known == all_bytes > 0


def test_a_grown_file_is_recognised_whole_and_under_another_name_too(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "UNITS_PER_SOURCE", 1)  # so that its units would be larger had it come as it is now
    path = write_jsonl(tmp_path / "raw" / "a.jsonl", [prose(i, 40) for i in range(60)])
    tokenize_corpus(request_for())
    before = path.read_bytes()
    with open(path, "a") as file:
        file.writelines(json.dumps({"text": prose(i, 40)}) + "\n" for i in range(60, 300))
    grown_bytes = sum(len(prose(i, 40)) for i in range(300))
    first_bytes = sum(len(prose(i, 40)) for i in range(60))
    assert recognised(path, request_for().out) == (first_bytes, grown_bytes)
    tokenize_corpus(request_for())
    assert recognised(path.rename(path.with_name("b.jsonl")), request_for().out) == (grown_bytes, grown_bytes)
    path.write_bytes(before)
    assert recognised(path, request_for().out) == (first_bytes, first_bytes)


def test_a_copy_in_another_kind_of_file_is_recognised_whole(request_for, raw, tmp_path):
    tokenize_corpus(request_for())
    documents = [json.loads(line)["text"] for line in (raw / "big.jsonl").read_text().splitlines()]
    pq.write_table(pa.table({"text": documents}), tmp_path / "copy.parquet", row_group_size=7)
    n_bytes = sum(map(len, documents))
    assert recognised(tmp_path / "copy.parquet", request_for().out) == (n_bytes, n_bytes)


def test_unknown_text_is_not_recognised(request_for, raw, tmp_path):
    tokenize_corpus(request_for())
    assert recognised(write_jsonl(tmp_path / "new.jsonl", [prose(77, 50)]), request_for().out) == (0, len(prose(77, 50)))
