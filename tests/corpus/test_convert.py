"""Files into files: nothing changes on the way but what was asked for, and every step counts what it dropped."""

import json

import pytest

from llm.corpus.cleaning import Cleaning, repaired
from llm.corpus.convert import convert
from llm.corpus.documents import Counts, Document, read_documents
from llm.corpus.options import ReadOptions
from llm.log import UserError

SEPARATOR = "<|endoftext|>"
TEXTS = ["one\n\nline", "two\r\n", "thrée \x00 <|im_end|>", "x" * 1000]
TALK = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}


def read(path):
    options = ReadOptions(separator=SEPARATOR)
    return list(read_documents(path, path.name, 0, path.stat().st_size, options, Counts()))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_go_round_through_every_kind_of_file_unchanged(tmp_path):
    source = jsonl(tmp_path / "0.jsonl", *({"text": text} for text in TEXTS))
    for number, suffix in enumerate((".arrow", ".parquet", ".txt", ".jsonl"), 1):
        path = tmp_path / f"{number}{suffix}"
        assert convert(read(source), path, SEPARATOR) == 4
        assert [document.text for document in read(path)] == TEXTS
        source = path


def test_conversations_stay_conversations_through_tables(tmp_path):
    source = jsonl(tmp_path / "0.jsonl", TALK)
    identity = read(source)[0].identity()
    for number, suffix in enumerate((".parquet", ".arrow", ".jsonl"), 1):
        path = tmp_path / f"{number}{suffix}"
        convert(read(source), path, SEPARATOR)
        assert [document.identity() for document in read(path)] == [identity]
        source = path


def test_large_tables_are_written_in_groups_that_tokenizing_can_cut_at(tmp_path, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setattr("llm.corpus.convert.GROUP_BYTES", 100)
    convert((Document("x" * 60, "a", i) for i in range(10)), tmp_path / "a.parquet", SEPARATOR)
    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 5 and len(read(tmp_path / "a.parquet")) == 10


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    talk = read(jsonl(tmp_path / "talk.jsonl", TALK))
    cases = {
        "a.pdf": ([Document("a", "s", 0)], "cannot write"),
        "talk.jsonl": ([Document("a", "s", 0)], "there already"),
        "a.txt": ([Document(f"a{SEPARATOR}b", "s", 0)], "holds the separator"),
        "a.parquet": ([Document("a", "s", 0), *talk], "texts and conversations"),
        "b.jsonl": ([], "no document is left"),
        "talk.jsonl/c.txt": ([Document("a", "s", 0)], "talk.jsonl: .*choose another --out"),
    }
    for name, (documents, said) in cases.items():
        with pytest.raises(UserError, match=said):
            convert(documents, tmp_path / name, SEPARATOR)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_a_separator_that_would_not_part_the_documents_again_as_they_are_is_refused(tmp_path):
    for separator, said in (("\n\n", "the one before ends with the beginning"), (None, "--out-separator is empty")):
        with pytest.raises(UserError, match=said):
            convert([Document("one line\n", "s", 0), Document("another\n", "s", 1)], tmp_path / "a.txt", separator)
    documents = [Document("one line", "s", 0), Document("\nanother\n", "s", 1)]
    assert convert(documents, tmp_path / "a.txt", "\n\n") == 2
    read_again = read_documents(tmp_path / "a.txt", "a.txt", 0, (tmp_path / "a.txt").stat().st_size, ReadOptions(separator="\n\n"), Counts())
    assert [document.text for document in read_again] == [document.text for document in documents]


def test_every_step_drops_what_it_says_and_counts_it():
    cleaning = Cleaning(repair_unicode=True, drop_lines=("^Advert", "cookie"), min_chars=5, max_chars=20, dedup=True)
    texts = ["A good text.", "A good text.", "Advert: buy\nA good\ncookies!\ntext.", "tiny", "x" * 21, "cookie", "itâ€™s fine"]
    kept = [document.text for document in cleaning(Document(text, "s", 0) for text in texts)]
    assert kept == ["A good text.", "A good\ntext.", "it’s fine"]
    assert dict(cleaning.counts) == {
        "documents read": 7, "documents kept": 3, "documents with repaired characters": 1, "documents with lines left out": 2, "lines left out": 3,
        "documents dropped: seen before": 1, "documents dropped: shorter than 5 characters": 1,
        "documents dropped: longer than 20 characters": 1, "documents dropped: nothing left": 1,
    }  # fmt: skip


def test_conversations_are_cleaned_turn_by_turn(tmp_path):
    talk = read(jsonl(tmp_path / "a.jsonl", {"prompt": "Advert\nWhy?", "response": "cafÃ©"}))
    (document,) = Cleaning(repair_unicode=True, drop_lines=("Advert",))(talk)
    assert [turn.content for turn in document.conversation.turns] == ["Why?", "café"] and "Why?" in document.text


@pytest.mark.parametrize(
    "broken, right",
    [
        ("ok \ufffd cafÃ© â€œxâ€\x9d", "ok \ufffd café “x”"),
        ("e\u0301", "é"),
        ("a\x00b\x07\r\nc\rd", "ab\nc\nd"),
        ("Ãœber Â£5", "Über £5"),
        ("naïve Ärger â", "naïve Ärger â"),
    ],
)
def test_unicode_is_repaired_and_what_is_right_is_left_alone(broken, right):
    assert repaired(broken) == right
