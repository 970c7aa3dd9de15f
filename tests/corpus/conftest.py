"""A tokenizer, some raw text, and requests to tokenize it."""

from dataclasses import replace

import pytest
from raw_text import prose, write_jsonl

from llm.corpus import plan
from llm.corpus.tokenize_corpus import Request
from llm.tokenizer.train import train_bpe


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([prose(0, 5000)], 300).tokenizer.save(folder)
    return folder


@pytest.fixture
def small_units(monkeypatch):
    """Units and tasks of 8 KiB, so that little text has many of both. Planning is in this process only."""
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 8 << 10)
    monkeypatch.setattr(plan, "TASK_BYTES", 8 << 10)


@pytest.fixture
def request_for(tmp_path, tokenizer_folder, small_units):
    """A request for tmp_path/raw into tmp_path/NAME."""

    def make(name="out", **changes):
        first = Request((str(tmp_path / "raw"),), tmp_path / name, str(tokenizer_folder), seq_len=64)
        return replace(first, **changes)

    return make


@pytest.fixture
def raw(tmp_path):
    """Six sources, about 100 KB, with a name order that is no order of contents."""
    write_jsonl(tmp_path / "raw" / "big.jsonl", [prose(i, 60 + i) for i in range(100)])
    for i in range(4):
        (tmp_path / "raw" / f"{i}.txt").write_text(prose(1000 + i, 200))
    write_jsonl(tmp_path / "raw" / "other.jsonl", [prose(2000 + i, 30) for i in range(50)])
    return tmp_path / "raw"
