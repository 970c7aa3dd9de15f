"""What a person is shown of raw text and of shards is what is there."""

import json

import numpy as np
import pytest
from raw_text import prose, write_jsonl

from llm.corpus.look import draw, histogram, look_at_shards, look_at_text, verify
from llm.corpus.options import ReadOptions
from llm.corpus.tokenize_corpus import tokenize_corpus
from llm.data.shard_meta import token_dtype
from llm.data.shards import write_shard
from llm.log import UserError
from llm.tokenizer import load_tokenizer, tokenizer_info


def test_raw_text_is_counted_and_shown(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one\tdocument\nof two lines", "x" * 100, "x" * 100, " "])
    look = look_at_text(path, ReadOptions(), 2, 20)
    assert look.lengths.tolist() == [25, 100, 100] and look.repeated == 1
    assert "documents: 3" in look.facts[1] and "empty: 1" in look.facts[2]
    assert sorted(window.split("\n", 1)[1] for window in look.windows) == ["one⇥document↵\nof two …", "x" * 20 + "…"]


def test_a_conversation_shows_what_carries_loss(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Why?", "answer": "So."}))
    (window,) = look_at_text(tmp_path / "a.jsonl", ReadOptions(), 1, 1000).windows
    assert window.split("\n", 1)[1] == "‹<|im_start|>user↵\nWhy?<|im_end|>↵\n<|im_start|>assistant↵\n›So.<|im_end|>‹↵\n›"


def test_shards_are_counted_and_their_windows_show_text_and_borders(request_for, tmp_path, tokenizer_folder):
    texts = [f"<|im_end|> {i} " + prose(i, 3) for i in range(50)]
    write_jsonl(tmp_path / "raw" / "a.jsonl", [*texts, texts[0]])
    tokenize_corpus(request_for(val_ratio=0.2))
    look = look_at_shards(request_for().out, str(tokenizer_folder), 4, 200, seed=1)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert sorted(look.lengths.tolist()) == sorted(len(tokenizer.encode(text)) + 1 for text in [*texts, texts[0]])
    assert look.repeated == 1 and look.seq_len == 64 and any(fact.startswith("val: ") for fact in look.facts)
    for window in look.windows:
        head, *pieces = window.split("\n── document ")
        whole = [piece.split("\n", 1)[1] for piece in pieces[:-1]]
        assert "tokens" in head and whole and all(text.removesuffix("<|endoftext|>") in texts for text in whole)


def test_a_mask_is_made_visible(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = np.array([*b"abcdef"], np.int64)
    ids = np.array([tokenizer.encode(chr(byte))[0] for byte in ids])
    info = tokenizer_info(tokenizer)
    write_shard(tmp_path, "a", [(ids, np.array([4, 2]))], dtype=token_dtype(info["vocab_size"]), tokenizer=info,
                units=[{"unit_id": "u", "bytes": 6}], role="train", seq_len=8, writer={}, mask_spans=np.array([[1, 2], [4, 1]]))  # fmt: skip
    look = look_at_shards(tmp_path / "a.bin", str(tokenizer_folder), 1, 6, 0)
    assert look.windows[0].endswith("document 0\n‹a›bc‹d›\n── document 1\ne‹f›") and "50.0% of them carry loss" in look.facts[0]
    by_ids = look_at_shards(tmp_path / "a.bin", None, 1, 6, 0).windows[0]
    assert f"‹{ids[0]}›{ids[1]} {ids[2]}‹{ids[3]}›" in by_ids


def test_verifying_reads_everything_and_names_the_damaged_shard(request_for, raw):
    tokenize_corpus(request_for(val_ratio=0.2))
    n_tokens = verify(request_for().out)
    assert n_tokens == look_at_shards(request_for().out, None, 1, 8, 0).lengths.sum()
    path = next(request_for().out.glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        verify(request_for().out)


def test_the_histogram_counts_every_document_once_and_its_picture_is_drawn(tmp_path):
    lines = histogram(np.array([1, 2, 3, 4, 1000]))
    assert [int(line.split()[-1]) for line in lines] == [1, 2, 1, *[0] * 6, 1] and "512 to 1,023" in lines[-1]
    look = look_at_text(write_jsonl(tmp_path / "a.jsonl", ["one"]), ReadOptions(), 1, 9)
    draw(look, "a", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
