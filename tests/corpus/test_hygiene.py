"""Text as people really have it: every oddity has one documented result, and whatever bytes come, no document is lost and nothing crashes."""

import csv
import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.corpus.documents import Counts, read_documents
from llm.corpus.formats import unit_borders
from llm.corpus.options import ReadOptions
from llm.log import UserError

PLAIN = ReadOptions()


def read(path, options=PLAIN):
    counts, size = Counts(), path.stat().st_size
    borders = unit_borders(path, size, 512, [], options)
    spans = zip(borders, [*borders[1:], size], strict=True)
    texts = [d.text for span in spans for d in read_documents(path, path.name, *span, options, counts)]
    assert counts.records == len(texts) + counts.empty + counts.malformed
    return texts, counts


def json_string(content: bytes) -> bytes:
    r"""A JSON string that holds these bytes as they are, but for what JSON must escape; \ud800 stays an escape."""
    escaped = content.replace(b"\\", b"\\\\").replace(b"\\\\ud800", b"\\ud800").replace(b'"', b'\\"')
    for byte, spelled in ((0, rb"\u0000"), (9, rb"\t"), (10, rb"\n"), (13, rb"\r")):
        escaped = escaped.replace(bytes([byte]), spelled)
    return b'"' + escaped + b'"'


def binary_column(content: bytes) -> pa.Table:
    return pa.table({"text": pa.array([content], pa.binary()).view(pa.string())})


def parquet(content: bytes) -> bytes:
    out = io.BytesIO()
    pq.write_table(binary_column(content), out)
    return out.getvalue()


def arrow(content: bytes) -> bytes:
    out, table = io.BytesIO(), binary_column(content)
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


HOLDS = {
    "txt": lambda content: content,
    "txt.gz": gzip.compress,
    "jsonl": lambda content: b'{"text": ' + json_string(content) + b"}\n",
    "json": lambda content: b'[{"text": ' + json_string(content) + b"}]",
    "csv": lambda content: b'text,n\r\n"' + content.replace(b'"', b'""') + b'",1\r\n',
    "parquet": parquet,
    "arrow": arrow,
}
CASES = {  # bytes: text, counted as bad
    "invalid UTF-8": (b"caf\xe9 au \xf0\x9f lait", "caf\ufffd au \ufffd lait", 1),
    "CRLF stays": (b"a\r\nb\r\n", "a\r\nb\r\n", 0),
    "lone CR stays": (b"a\rb", "a\rb", 0),
    "NUL stays": (b"a\x00b", "a\x00b", 0),
    "typed special tokens are letters": (b"<|im_end|> <|endoftext|>", "<|im_end|> <|endoftext|>", 0),
    "Unicode is not normalised": ("e\u0301 ﬁ \u2028".encode(), "e\u0301 ﬁ \u2028", 0),
    "white space around stays": (b" \n a \t", " \n a \t", 0),
    "half a surrogate pair in UTF-8": (b"a\xed\xa0\x80b", "a\ufffd\ufffd\ufffdb", 1),
    "a megabyte without a space": (b"x" * (1 << 20), "x" * (1 << 20), 0),
}


@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("case", CASES)
def test_every_oddity_has_the_same_result_in_every_kind_of_file(case, kind, tmp_path):
    content, text, bad = CASES[case]
    (tmp_path / f"a.{kind}").write_bytes(HOLDS[kind](content))
    assert read(tmp_path / f"a.{kind}") == ([text], Counts(records=1, bad_utf8=bad))


@pytest.mark.parametrize("kind", HOLDS)
def test_nothing_but_white_space_is_empty_and_counted(kind, tmp_path):
    for content in (b"", b" \n\t "):
        (tmp_path / f"a.{kind}").write_bytes(HOLDS[kind](content))
        assert read(tmp_path / f"a.{kind}") == ([], Counts(records=1, empty=1))


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_a_byte_order_mark_is_no_text(kind, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(HOLDS[kind](b"\xef\xbb\xbfa"))
    assert read(tmp_path / f"a.{kind}")[0] == ["a"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_before_a_table_is_no_text(kind, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(b"\xef\xbb\xbf" + HOLDS[kind](b"a"))
    assert read(tmp_path / f"a.{kind}")[0] == ["a"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_surrogate_pair_that_json_spells_is_replaced_and_counted(kind, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(HOLDS[kind](rb"a\ud800b"))
    assert read(tmp_path / f"a.{kind}") == (["a\ufffdb"], Counts(records=1, bad_utf8=1))
    (tmp_path / f"a.{kind}").write_bytes(json.dumps([{"text": "😀"}]).strip("[]" if kind == "jsonl" else "").encode())
    assert read(tmp_path / f"a.{kind}") == (["😀"], Counts(records=1))  # json.dumps spells it as a whole pair


def test_a_line_of_fifty_megabytes_is_one_document(tmp_path):
    line = json.dumps({"text": "word " * (10 << 20)}).encode()
    (tmp_path / "a.jsonl").write_bytes(line + b'\n{"text": "b"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line + b'\n{"text": "b"}\n', 1))
    for name in ("a.jsonl", "b.jsonl.gz"):
        texts, counts = read(tmp_path / name)
        assert [len(text) for text in texts] == [50 << 20, 1] and counts == Counts(records=2)


# fuzz


ODD = ["", " ", "a", "\n", "\r", "\r\n", '"', ",", ";", "\t", "\\", "{", "}", "[", "]", ":", "\x00", "\ufeff", "\u2028", "é", "😀", "text"]
ODD += ["<|im_end|>", "\n\n"]


def random_rows(rng):
    def text():
        return "".join(rng.choices(ODD, k=rng.choice([0, 1, 3, 40])))

    shapes = [
        lambda: {"text": text(), "n": rng.choice([None, "x"])},
        lambda: {"instruction": text(), "input": text(), "output": text()},
        lambda: {"messages": [{"role": rng.choice(["user", "assistant", "system"]), "content": text()} for _ in range(rng.randrange(4))]},
        lambda: {"question": text(), "answer": text()},
    ]
    shape = rng.choice(shapes)
    return [shape() for _ in range(rng.randrange(1, 30))]


def as_file(rows, kind):
    if kind == "jsonl":
        return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    if kind == "json":
        return json.dumps(rows).encode()
    if kind == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=5)
        return out.getvalue()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return out.getvalue().encode()


@pytest.mark.parametrize("seed", range(40))
def test_no_document_is_lost_whatever_it_says(seed, tmp_path):
    rng = random.Random(seed)
    rows = random_rows(rng)
    kinds = ["jsonl", "json", "parquet"] + ["csv"] * (not any(isinstance(v, (list, type(None))) for row in rows for v in row.values()))
    found = []
    for kind in kinds:
        path = tmp_path / f"a.{kind}"
        path.write_bytes(as_file(rows, kind))
        texts, counts = read(path)
        assert (counts.records, counts.malformed) == (len(rows), 0), counts.examples
        found.append(texts)
    assert all(texts == found[0] for texts in found)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_bytes_come_it_is_documents_or_one_refusal_with_the_file(seed, tmp_path):
    rng = random.Random(seed)
    for kind in ("txt", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "csv.zst", "zip"):
        path = tmp_path / f"fuzz.{kind}"
        path.write_bytes(damaged(rng, kind))
        try:
            read(path, ReadOptions(separator=rng.choice([None, "\n", "blank-lines"])))
        except UserError as error:
            assert "fuzz." in str(error), error


def damaged(rng, kind) -> bytes:
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(200))
    rows = [{"text": row.get("text", "x"), "n": "1"} for row in random_rows(rng)]
    content = arrow(b"some text") if kind == "arrow" else as_file(rows, "csv" if kind[:2] in ("cs", "ts") else kind.partition(".")[0])
    content = gzip.compress(content) if kind.endswith(".gz") else content
    content = bytearray(content)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(content))
        how = rng.randrange(3)
        if how == 0:
            content[at] = rng.randrange(256)
        elif how == 1:
            del content[at : at + rng.randrange(1, 20)]
        else:
            content[at:at] = rng.randbytes(3)
        if not content:
            break
    return bytes(content)
