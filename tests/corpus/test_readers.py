"""Every kind of file and every shape of record: recognised, read whole, and the same text in each is the same source."""

import csv
import gzip
import io
import json
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.corpus import compressed, records
from llm.corpus.documents import Counts, read_documents
from llm.corpus.encode import document_digest, source_id_of
from llm.corpus.formats import container_of, shape_of, unit_borders
from llm.corpus.options import ReadOptions
from llm.log import UserError

TEXTS = ["one", "two\nlines", 'thrée, with "quotes"', "tab\there", "x" * 5000, "nul\x00 end", "lone\rcr and crlf\r\n."]
TEXTS += ["<|im_end|> and <|endoftext|>"]


def read(path, options=ReadOptions(), start=0, stop=None):  # noqa: B008
    counts = Counts()
    documents = list(read_documents(path, path.name, start, path.stat().st_size if stop is None else stop, options, counts))
    assert counts.records == len(documents) + counts.empty + counts.malformed
    return documents, counts


def texts(path, **options):
    return [document.text for document in read(path, ReadOptions(**options))[0]]


def turns(path, **options):
    return [[tuple(turn) for turn in document.conversation.turns] for document in read(path, ReadOptions(**options))[0]]


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows, **options):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def as_arrow(rows, writer):
    out, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with writer(out, table.schema) as sink:
        sink.write_table(table, max_chunksize=3)
    return out.getvalue()


def as_zip(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


ROWS = [{"text": text, "url": f"u{i}"} for i, text in enumerate(TEXTS)]
FILES = {
    "a.jsonl": lambda: as_jsonl(ROWS),
    "a.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "lines.json": lambda: as_jsonl(ROWS),  # C4 calls its lines .json
    "a.csv": lambda: as_csv(ROWS),
    "semicolons.csv": lambda: as_csv(ROWS, ";"),
    "a.tsv": lambda: as_csv(ROWS, "\t"),
    "a.parquet": lambda: as_parquet(ROWS, row_group_size=3),
    "file.arrow": lambda: as_arrow(ROWS, pa.ipc.new_file),
    "stream.arrow": lambda: as_arrow(ROWS, pa.ipc.new_stream),
    "a.json.gz": lambda: gzip.compress(as_jsonl(ROWS[:3])) + gzip.compress(as_jsonl(ROWS[3:])),
    "a.csv.gz": lambda: gzip.compress(as_csv(ROWS)),
    "a.zip": lambda: as_zip(**{"d/1.jsonl": as_jsonl(ROWS[:3]), "d/2.csv": as_csv(ROWS[3:]), "d/read.me": b"?", "__MACOSX/d/1.jsonl": b"x"}),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_documents_in_every_kind_of_file_are_the_same_source(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name]())
    documents, counts = read(tmp_path / name)
    assert [document.text for document in documents] == TEXTS and counts == Counts(records=len(TEXTS))
    want = source_id_of(document_digest(text.encode()) for text in TEXTS)
    assert source_id_of(document_digest(document.identity()) for document in documents) == want


def test_zstandard_is_read_and_one_that_was_cut_off_is_refused(tmp_path):
    content = as_jsonl(ROWS)
    for name in ("a", "b"):
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.zst"), "zstd") as stream:
            stream.write(content)
    frames = b"".join((tmp_path / f"{name}.zst").read_bytes() for name in ("a", "b"))
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    assert texts(tmp_path / "c.jsonl.zst") == TEXTS * 2
    (tmp_path / "c.jsonl.zst").write_bytes(frames[:-9])
    with pytest.raises(UserError, match="c.jsonl.zst: cannot be decompressed"):
        texts(tmp_path / "c.jsonl.zst")


SHAPES = {
    "alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, ("Add.\n\n1 and 2", "3")),
    "alpaca without input": ({"instruction": "Say hi.", "input": "", "output": "Hi"}, ("Say hi.", "Hi")),
    "dolly": ({"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "qa"}, ("Who?\n\nIt was Ann.", "Ann")),
    "prompt": ({"prompt": "p", "response": "r"}, ("p", "r")),
    "question": ({"question": "q", "answer": "a"}, ("q", "a")),
    "squad": ({"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, ("c\n\nq", "a")),
    "choice": ({"question": "q", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 2}, ("q\nA. w\nB. x\nC. y\nD. z", "C. y")),
    "messages": ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, ("u", "a")),
    "parts": ({"messages": [{"role": role, "content": [{"type": "text", "text": role[0]}]} for role in ("user", "assistant")]}, ("u", "a")),
    "sharegpt": ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ("u", "a")),
    "dialog": ({"dialog": ["u ", " a"], "act": [1, 2]}, ("u", "a")),
    "personas": ({"user 1 personas": "I.", "Best Generated Conversation": "User 1: u\nUser 2: a"}, ("u", "a")),
}


@pytest.mark.parametrize("container", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_conversation_is_recognised(shape, container, tmp_path):
    row, (user, assistant) = SHAPES[shape]
    path = tmp_path / f"a.{container}"
    path.write_bytes({"jsonl": as_jsonl, "json": lambda rows: json.dumps(rows).encode(), "parquet": as_parquet}[container]([row, row]))
    assert turns(path) == [[("user", user), ("assistant", assistant)]] * 2
    assert read(path)[0][0].text == f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"


def test_squad_as_it_is_distributed_gives_each_question(tmp_path):
    paragraph = {"context": "c", "qas": [{"question": f"q{i}", "id": "x", "answers": [{"text": "a", "answer_start": 0}]} for i in range(3)]}
    unanswerable = {"context": "d", "qas": [{"question": "q", "answers": [], "is_impossible": True}]}
    path = tmp_path / "train-v1.1.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph, unanswerable]}]}))
    documents, counts = read(path)
    assert [d.conversation.turns[0].content for d in documents] == ["c\n\nq0", "c\n\nq1", "c\n\nq2"] and counts.empty == 1


def test_a_dictionary_by_words_gives_an_entry_for_each(tmp_path):
    meanings = [{"def": "to run", "speech_part": "verb", "example": "I go", "synonyms": ["walk", "move"]}, {"def": "a game", "speech_part": "noun"}]
    (tmp_path / "a.json").write_text(json.dumps({"go": {"word": "go", "meanings": meanings}, "void": {"meanings": []}}))
    assert texts(tmp_path / "a.json") == ['go (verb): to run. "I go". Synonyms: walk, move\ngo (noun): a game']
    assert read(tmp_path / "a.json")[1].empty == 1


def test_mmlus_rows_need_no_header(tmp_path):
    (tmp_path / "a.csv").write_text('"What, now?",w,x,y,z,B\nWhy?,1,2,3,4,D\n')
    assert turns(tmp_path / "a.csv") == [
        [("user", "What, now?\nA. w\nB. x\nC. y\nD. z"), ("assistant", "B. x")],
        [("user", "Why?\nA. 1\nB. 2\nC. 3\nD. 4"), ("assistant", "D. 4")],
    ]


def test_dialogues_by_lines_are_read_when_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hi\t1 hello\nbye\t2 so long\n\nwho?\t1 me\r\n\r\n\r\nAnn: a\nBob: b\nBob: c\n")
    assert turns(tmp_path / "a.txt", format="script", separator="blank-lines") == [
        [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")],
        [("user", "who?"), ("assistant", "me")],
        [("user", "a"), ("assistant", "b\nc")],
    ]


def test_a_wrong_guess_is_overridden_and_fields_have_other_names(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl([{"question": "q", "answer": "a", "reply": "r"}]))
    assert shape_of(path, ReadOptions()) == "question" and texts(path, text_field="answer") == ["a"]
    assert turns(path, format="prompt", fields=(("prompt", "question"), ("response", "reply"))) == [[("user", "q"), ("assistant", "r")]]
    assert turns(path, fields=(("answer", "reply"),)) == [[("user", "q"), ("assistant", "r")]]
    path.rename(tmp_path / "a.dump")
    assert texts(tmp_path / "a.dump", format="jsonl,text", text_field="answer") == ["a"]


def test_first_bytes_win_over_the_name(tmp_path):
    (tmp_path / "a.json").write_bytes(as_jsonl(ROWS))
    (tmp_path / "b.txt").write_bytes(as_parquet(ROWS))
    assert [container_of(tmp_path / name, ReadOptions()) for name in ("a.json", "b.txt")] == ["jsonl", "parquet"]


def test_a_conversation_in_which_the_assistant_says_nothing_is_empty_and_strange_ones_are_malformed(tmp_path):
    def talk(**answer):
        return {"messages": [{"role": "user", "content": "u"}, answer]}

    rows = [talk(role="assistant", content=c) for c in ("a", "", None)] + [talk(role="mum", content="a"), talk(role="assistant", content=7), {"x": 1}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    documents, counts = read(tmp_path / "a.jsonl")
    assert (len(documents), counts.empty, counts.malformed) == (1, 2, 3)
    assert "mum" in counts.examples[0] and "byte" in counts.examples[0] and "messages" in counts.examples[2]


# units


def test_a_parquet_file_is_cut_between_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet([{"text": f"document {i} {'x' * i}"} for i in range(100)], row_group_size=7))
    size = path.stat().st_size
    for unit_bytes in (64, 500, size):
        borders = unit_borders(path, size, unit_bytes, [], ReadOptions())
        units = [[d.text for d in read(path, ReadOptions(), a, b)[0]] for a, b in zip(borders, [*borders[1:], size], strict=True)]
        assert [text for unit in units for text in unit] == texts(path) and all(units)
        assert (len(units) > 5) == (unit_bytes < size)


@pytest.mark.parametrize("separator", ["blank-lines", "\n\n", "=="])
def test_a_compressed_text_is_cut_as_the_plain_one(separator, tmp_path, monkeypatch):
    text = b"\n\n".join([b"one", b"two\r\n \r\n\n", b"\n\n\n\n", b"", b"=== three ====", b"four\n" * 50]) * 40
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
    plain = [(d.text, d.index) for d in read(tmp_path / "a.txt", ReadOptions(separator=separator))[0]]
    for chunk in (7, 64, 1000):
        monkeypatch.setattr(records, "_CHUNK_BYTES", chunk)
        assert [(d.text, d.index) for d in read(tmp_path / "a.txt.gz", ReadOptions(separator=separator))[0]] == plain


def test_names_in_capitals_say_the_same(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "B.ZIP").write_bytes(as_zip(**{"a.txt": b"hello"}))
    assert texts(tmp_path / "A.TXT.GZ") == texts(tmp_path / "B.ZIP") == ["hello"]


def test_times_that_python_cannot_hold_do_no_harm_to_the_text_beside_them(tmp_path):
    nanoseconds, far = pa.array([1, 2], pa.timestamp("ns")), pa.array([2**40] * 2, pa.timestamp("s"))
    table = pa.table({"text": ["one", "two"], "at": nanoseconds, "until": far})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.parquet") == texts(tmp_path / "a.arrow") == ["one", "two"]


# what is refused


def refusal(path):
    with pytest.raises(UserError, match=path.name) as caught:
        texts(path)
    return str(caught.value)


def test_damaged_files_are_refused_with_their_name_and_never_read_in_part(tmp_path):
    whole = {"a.parquet": as_parquet(ROWS), "a.arrow": as_arrow(ROWS, pa.ipc.new_file), "a.json": json.dumps(ROWS).encode(),
             "a.jsonl.gz": gzip.compress(as_jsonl(ROWS)), "a.zip": as_zip(**{"a.jsonl": as_jsonl(ROWS)})}  # fmt: skip
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        refusal(tmp_path / name)
    (tmp_path / "b.json").write_bytes(b'[{"text": "a"}, {"text": }, {"text": "c"}]')
    assert "element 2" in refusal(tmp_path / "b.json")
    (tmp_path / "b.csv").write_bytes(b'text,n\na,1\n"b,2\nc,3\n')
    assert "line 3: a quote opens here" in refusal(tmp_path / "b.csv")


OTHERS = {"gzip": gzip.compress(b"hello"), "zip": as_zip(a=b"hello"), "a PDF": b"%PDF-1.7\n\xe2\xe3", "UTF-16": "\ufeffhello".encode("utf-16-le")}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_plain_text_is_refused_under_the_name_of_text_unless_it_is_said_to_be(what, tmp_path):
    (tmp_path / "a.txt").write_bytes(OTHERS[what])
    assert what in refusal(tmp_path / "a.txt")
    assert len(texts(tmp_path / "a.txt", format="txt")) == 1


def test_a_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + b" " * (8 << 20)))
    assert "over 200 times" in refusal(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.zip").write_bytes(as_zip(**{"a.txt": b" " * (8 << 20)}))
    assert "over 200 times" in refusal(tmp_path / "a.zip")


def test_what_does_not_fit_in_memory_is_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 10)
    for name, content in (("a.txt", b"x" * 2000), ("a.txt.gz", gzip.compress(b"x" * 2000))):
        (tmp_path / name).write_bytes(content)
        assert "--separator" in refusal(tmp_path / name)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused_and_kills_nobody(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl([{"text": "x" * 1000}] * 5000))
    documents = read_documents(path, "a", 0, path.stat().st_size, ReadOptions(), Counts())
    next(documents)
    os.truncate(path, 100)
    with pytest.raises(UserError, match="a.jsonl: became shorter"):
        list(documents)


def test_rows_of_another_width_are_malformed_and_parquet_inside_zip_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,n\na,1\nb\nc,3,4\n\nd,5\n")
    documents, counts = read(tmp_path / "a.csv")
    assert [d.text for d in documents] == ["a", "d"] and (counts.malformed, counts.empty) == (2, 1)
    assert "line 3: 1 cells, and the header has 2" in counts.examples[0]
    (tmp_path / "a.zip").write_bytes(as_zip(**{"a.parquet": as_parquet(ROWS)}))
    assert "Unpack" in refusal(tmp_path / "a.zip")
