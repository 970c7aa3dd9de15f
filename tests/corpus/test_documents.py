"""Readers: what a document is in each format, hygiene, and units that cut a file without losing or doubling any of it."""

import json

import pytest

from llm.corpus.documents import Counts, read_documents
from llm.corpus.formats import unit_borders
from llm.corpus.options import ReadOptions, separator_from

PLAIN = ReadOptions()


def read(path, options=PLAIN, start=0, stop=None):
    counts = Counts()
    stop = path.stat().st_size if stop is None else stop
    return list(read_documents(path, path.name, start, stop, options, counts)), counts


def texts(path, options=PLAIN):
    return [document.text for document in read(path, options)[0]]


def jsonl(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def test_a_txt_file_is_one_document_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"  first\r\n\r\nsecond\x00 \n")
    documents, counts = read(path)
    assert [(d.text, d.source, d.index) for d in documents] == [("  first\r\n\r\nsecond\x00 \n", "a.txt", 0)]
    assert counts == Counts(records=1)


def test_a_separator_divides_a_txt_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two\n<|endoftext|><|endoftext|>three<|endoftext|>")
    documents, counts = read(path, ReadOptions(separator="<|endoftext|>"))
    assert [(d.text, d.index) for d in documents] == [("one", 0), ("two\n", 16), ("three", 46)]
    assert (counts.records, counts.empty) == (4, 1)


def test_a_shell_can_spell_line_ends_and_tabs_in_a_separator():
    assert separator_from(r"\n\n") == "\n\n" and separator_from(r"a\tb") == "a\tb" and separator_from(None) is None


def test_jsonl_gives_its_text_field(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one", "url": "x"}, {"text": "two\nlines"})
    assert texts(path) == ["one", "two\nlines"]
    path = jsonl(tmp_path / "b.jsonl", {"content": "three"})
    assert texts(path, ReadOptions(text_field="content")) == ["three"]


def test_jsonl_needs_no_line_end_at_its_end_and_takes_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n{"text": "two"}')
    assert texts(path) == ["one", "two"]


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    documents, counts = read(tmp_path / "a.txt")
    assert documents[0].text == "caf\ufffd au lait" and counts.bad_utf8 == 1


def test_empty_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    assert read(tmp_path / "a.txt") == ([], Counts(records=1, empty=1))
    documents, counts = read(jsonl(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"}, {"text": "x"}, ""))
    assert [d.text for d in documents] == ["x"] and (counts.records, counts.empty) == (4, 3)


def test_malformed_lines_are_counted_and_the_first_five_are_told(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"}, "{", "[1]", {"txt": "y"}, {"text": 7}, "[" * 100_000, "}", {"text": "z"})
    documents, counts = read(path)
    assert [d.text for d in documents] == ["x", "z"] and (counts.records, counts.malformed) == (8, 6)
    assert len(counts.examples) == 5 and "byte 14" in counts.examples[0] and "--text-field" in counts.examples[2]


# units


def cut(path, unit_bytes, known_ends=(), options=PLAIN):
    """The documents of each unit."""
    size = path.stat().st_size
    borders = unit_borders(path, size, unit_bytes, list(known_ends), options)
    return [[d.text for d in read(path, options, *span)[0]] for span in zip(borders, [*borders[1:], size], strict=True)]


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 16, 17, 18, 64, 1000])
def test_units_hold_every_document_once_wherever_the_borders_fall(tmp_path, unit_bytes):
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x" * (i % 9 + 1) + str(i)} for i in range(40)))
    units = cut(path, unit_bytes)
    assert [text for unit in units for text in unit] == texts(path)
    assert all(units) and len(units) <= 40
    separated = tmp_path / "a.txt"
    separated.write_text("<sep>".join(texts(path)))
    options = ReadOptions(separator="<sep>")
    assert [text for unit in cut(separated, unit_bytes, options=options) for text in unit] == texts(path)


@pytest.mark.parametrize("unit_bytes", [1, 5, 50, 333])
def test_a_unit_starts_with_the_first_record_at_or_after_each_multiple_of_its_size(tmp_path, unit_bytes):
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x" * (i * 37 % 90 + 1)} for i in range(60)))
    size, starts = path.stat().st_size, [document.index for document in read(path)[0]]
    after = [min((start for start in starts if start >= wanted), default=None) for wanted in range(unit_bytes, size, unit_bytes)]
    assert unit_borders(path, size, unit_bytes, [], PLAIN) == sorted({0, *after} - {None})


def test_a_txt_file_without_separator_is_never_cut(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb" * 100)
    assert len(cut(tmp_path / "a.txt", 16)) == 1


@pytest.mark.parametrize("old_end", ["\n", ""])
def test_a_grown_file_keeps_its_units_and_what_was_added_is_in_units_of_its_own(tmp_path, old_end):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {i}"}) for i in range(30)]
    path.write_text("\n".join(lines[:20]) + old_end)
    old, old_size = cut(path, 128), path.stat().st_size
    path.write_text("\n".join(lines))
    assert cut(path, 128, [old_size])[: len(old)] == old
    assert cut(path, 128)[: len(old)] != old  # without the known end the last unit would have changed
