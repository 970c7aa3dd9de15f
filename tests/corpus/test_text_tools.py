"""The three scripts from raw text to shards, as a person runs them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raw_text import prose, write_jsonl

from llm.corpus.collect import collect
from llm.log import UserError
from llm.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def tool(name, *arguments):
    """Exit code and output."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    return done.returncode, done.stdout


def test_from_nothing_to_shards(tmp_path):
    raw, tok, out = tmp_path / "raw.jsonl", tmp_path / "tok", tmp_path / "set"
    assert tool("download.py", "--dataset", "pystdlib", "--out", raw, "--max-bytes", 400_000)[0] == 0
    code, said = tool("train_tokenizer.py", raw, "--vocab_size", 500, "--out", tok)
    assert code == 0 and "bytes per token on held-out text" in said
    arguments = (raw, "--tokenizer", tok, "--seq-len", 64, "--out", out, "--workers", 2, "--val_ratio", 0.1)
    code, said = tool("tokenize_parallel.py", *arguments)
    assert code == 0 and "train: " in said and "val: " in said and "MB/s" in said
    code, said = tool("tokenize_parallel.py", *arguments)
    assert code == 0 and "nothing new" in said


def test_a_tokenizer_that_shards_were_made_with_is_not_replaced_without_force(tmp_path):
    first, second = (write_jsonl(tmp_path / f"{i}.jsonl", [prose(i, 2000)]) for i in range(2))
    tok, out = tmp_path / "tok", tmp_path / "set"
    assert tool("train_tokenizer.py", first, "--vocab-size", 270, "--out", tok)[0] == 0
    assert tool("train_tokenizer.py", second, "--vocab-size", 280, "--out", tok)[0] == 0  # nothing was made with it yet
    fingerprint = load_tokenizer(tok).fingerprint
    assert tool("tokenize_parallel.py", first, "--tokenizer", tok, "--seq-len", 64, "--out", out)[0] == 0
    assert "this very tokenizer" in tool("train_tokenizer.py", second, "--vocab-size", 280, "--out", tok)[1]
    code, said = tool("train_tokenizer.py", first, "--vocab-size", 270, "--out", tok)
    assert code == 2 and str(out) in said and "--force" in said and fingerprint[:16] in said
    assert load_tokenizer(tok).fingerprint == fingerprint
    code, said = tool("train_tokenizer.py", first, "--vocab-size", 270, "--out", tok, "--force")
    assert code == 0 and str(out) in said and "no longer fit" in said
    assert load_tokenizer(tok).fingerprint != fingerprint


def test_a_terminal_that_knows_few_characters_shows_what_it_can(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, said = tool("inspect_data.py", write_jsonl(tmp_path / "caf\u00e9.jsonl", ["na\u00efve"]))
    assert code == 0 and "na?ve" in said
    code, said = tool("inspect_data.py", tmp_path / "caf\u00e9.jsonl", "--png", tmp_path / "nowhere" / "a.png")
    assert code == 2 and "cannot be written" in said and "Traceback" not in said


def test_mistakes_end_in_one_paragraph_and_exit_code_2(tmp_path):
    code, said = tool("tokenize_parallel.py", tmp_path / "missing.txt", "--tokenizer", tmp_path, "--seq-len", 64, "--out", tmp_path / "set")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("script", ["download.py", "train_tokenizer.py", "tokenize_parallel.py"])
def test_help_answers_at_once(script):
    def seconds():
        started_at = time.perf_counter()
        assert tool(script, "--help")[0] == 0
        return time.perf_counter() - started_at

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_recipe_gives_the_same_text_each_time_within_its_bytes(tmp_path):
    n_docs, n_bytes = collect("pystdlib", tmp_path / "a.jsonl", 300_000)
    collect("pystdlib", tmp_path / "b.jsonl", 300_000)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert 100_000 < n_bytes <= 300_000 and n_docs > 3


def test_a_recipe_that_finds_nothing_says_so_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="no text here within 1 bytes"):
        collect("pystdlib", tmp_path / "a.jsonl", 1)
    assert list(tmp_path.iterdir()) == []
