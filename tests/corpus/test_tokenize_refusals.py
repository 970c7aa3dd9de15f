"""What tokenizing refuses, in one paragraph, with nothing half-written."""

import gzip
from concurrent.futures import ProcessPoolExecutor

import pytest
from raw_text import prose, write_jsonl

from llm.corpus import tokenize_corpus as module
from llm.corpus.tokenize_corpus import WORK, tokenize_corpus
from llm.log import UserError
from llm.tokenizer import load_tokenizer
from llm.tokenizer.train import train_bpe


def refusal(request):
    with pytest.raises(UserError) as caught:
        tokenize_corpus(request)
    return str(caught.value)


def test_another_tokenizer_is_refused_with_both_fingerprints(request_for, raw, tokenizer_folder, tmp_path):
    tokenize_corpus(request_for())
    (tmp_path / "tok2").mkdir()
    train_bpe([prose(1, 3000)], 280).tokenizer.save(tmp_path / "tok2")
    said = refusal(request_for(tokenizer_path=str(tmp_path / "tok2")))
    for folder in (tokenizer_folder, tmp_path / "tok2"):
        assert load_tokenizer(folder).fingerprint[:16] in said
    assert "another --out" in said


def test_another_seq_len_is_refused_with_both_values(request_for, raw):
    tokenize_corpus(request_for())
    said = refusal(request_for(seq_len=128))
    assert "seq_len 64" in said and "not 128" in said
    assert not (request_for().out / WORK).exists()


def test_empty_text_is_refused_and_nothing_is_left(request_for, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("")
    (tmp_path / "raw" / "b.jsonl").write_text('{"text": " "}\n')
    assert "no text" in refusal(request_for())
    assert not request_for().out.exists()


def test_too_many_malformed_lines_are_refused_and_few_are_told(request_for, tmp_path, capsys):
    path = write_jsonl(tmp_path / "raw" / "a.jsonl", [f"document {i}" for i in range(1999)])
    with open(path, "a") as file:
        file.write("{broken\n")
    assert tokenize_corpus(request_for("good")).counts.malformed == 1
    assert "malformed: " in capsys.readouterr().out
    with open(path, "a") as file:
        file.write("{broken\n" * 2)
    assert "3 of 2,002 records are malformed" in refusal(request_for("bad"))
    assert not request_for("bad").out.exists()


def test_of_a_packed_file_the_name_is_told_that_was_given(request_for, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n{broken\n'))
    said = refusal(request_for())
    assert said.startswith(f"{tmp_path}/raw/a.jsonl.gz: 1 of 2 records are malformed") and "raw/a.jsonl.gz, byte 14" in said and WORK not in said


def test_a_split_that_leaves_nothing_to_train_on_is_refused(request_for, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("one document")
    assert "all fell into the validation split" in refusal(request_for(val_ratio=0.999999))


def test_a_folder_that_cannot_be_made_is_refused(request_for, raw, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refusal(request_for("file/out"))


def test_a_second_run_into_the_same_folder_at_the_same_time_is_refused(request_for, raw, monkeypatch):
    said = []
    real = module.encode_all

    def meanwhile(*args):
        said.append(refusal(request_for()))
        return real(*args)

    monkeypatch.setattr(module, "encode_all", meanwhile)
    tokenize_corpus(request_for())
    assert "another run" in said[0]


@pytest.mark.parametrize("change", [{"val_ratio": 1.0}, {"seq_len": 0}, {"workers": 0}, {"shard_tokens": 0}])
def test_values_out_of_range_are_refused(change, request_for):
    with pytest.raises(UserError, match="--"):
        request_for(**change)


def test_a_worker_that_cannot_read_its_file_is_told_in_one_paragraph(request_for, raw, monkeypatch):
    real = ProcessPoolExecutor.submit

    def without_the_file(self, run_task, *args):
        (raw / "0.txt").unlink(missing_ok=True)
        return real(self, run_task, *args)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", without_the_file)
    said = refusal(request_for())
    assert "0.txt: No such file or directory" in said and "run again" in said
