"""The fast encoder: the reference's ids or none."""

import numpy as np
import pytest
from test_tokenizers import write_gpt2

from llm.tokenizer import fast, load_tokenizer
from llm.tokenizer.fast import FastEncoder, FastPathWrong, no_fast_encoder
from llm.tokenizer.fingerprint import probes
from llm.tokenizer.train import train_bpe

pytest.importorskip("gigatoken")

# U+A7CF is a letter for gigatoken's tables and unassigned for tiktoken's, so only one of them parts it from the quote
DOCUMENTS = [f'document {i}: "quick", brown\n    \ua7cf",\n "\ua7cf",\n, 123{i}) = naïve 中文 😀",\n' * 3 for i in range(300)]
PLAIN = [f"document {i}: nothing that needs the reference" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS, 500).tokenizer


def test_the_reference_of_a_trained_tokenizer_gives_the_ids_of_its_tokenizer_json_for_every_character(tokenizer):
    chars = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x20000))]
    texts = [f'{"".join(chars[i : i + 8])}a {"1 ".join(chars[i : i + 8])}",\n' for i in range(0, len(chars), 8)]
    theirs = tokenizer._hf.encode_batch_fast(texts)
    assert tokenizer.rank_encoder
    assert all(np.array_equal(ids, t.ids) for ids, t in zip(tokenizer.encode_batch(texts), theirs, strict=True))


def test_it_gives_the_ids_of_the_reference_also_for_characters_that_only_newer_tables_know(tokenizer):
    texts = [*probes(), *DOCUMENTS, 'a\ua7cf",\n', "\ua7ce", "\U00020000\U000323b0", "x" * 10_000, "", "\x00"]
    for ids, text in zip(FastEncoder(tokenizer.rank_encoder).encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text)), text


def test_gpt2s_vocabulary_has_a_fast_encoder_with_the_ids_of_the_reference(tmp_path):
    gpt2 = load_tokenizer(write_gpt2(tmp_path))
    texts = [*probes(), *DOCUMENTS, "a  \n b\n\n", " \n"]
    for ids, text in zip(FastEncoder(gpt2.rank_encoder).encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, gpt2.encode(text)), text


def test_the_names_of_special_tokens_in_text_stay_text(tokenizer):
    (ids,) = FastEncoder(tokenizer.rank_encoder).encode_batch(["<|im_end|><|endoftext|>"])
    assert max(ids) < min(tokenizer.special_ids.values())


def wrong_from(n_good, monkeypatch):
    """gigatoken, but after so many texts every one ends with a wrong id."""
    real, calls = fast._gigatoken, []

    def wrong(content):
        encode = real(content)
        return lambda text: np.append(encode(text), 7).astype(np.uint32) if calls.append(0) or len(calls) > n_good else encode(text)

    monkeypatch.setattr(fast, "_gigatoken", wrong)


def test_a_wrong_id_is_found_in_the_probes_in_the_first_text_and_later_in_one_batch_of_many(tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        wrong_from(10, patch)
        with pytest.raises(FastPathWrong, match="it gives"):
            FastEncoder(tokenizer.rank_encoder)
    with monkeypatch.context() as patch:
        wrong_from(len(probes()), patch)
        with pytest.raises(FastPathWrong, match=r"from token \d+ of a text that begins 'document"):
            FastEncoder(tokenizer.rank_encoder).encode_batch(PLAIN)
    monkeypatch.setattr(fast, "CHECKED_CHARS", 0)
    wrong_from(len(probes()), monkeypatch)
    encoder = FastEncoder(tokenizer.rank_encoder)
    for _ in range(fast.CHECK_ONE_BATCH_OF - 1):
        encoder.encode_batch(PLAIN[:1])
    with pytest.raises(FastPathWrong):
        encoder.encode_batch(PLAIN[:1])


def test_a_tokenizer_that_ranks_cannot_say_has_no_fast_encoder(tokenizer, tmp_path):
    import json

    tokenizer.save(tmp_path)
    structure = json.loads((tmp_path / "tokenizer.json").read_bytes())
    structure["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(structure))
    other = load_tokenizer(tmp_path)
    assert other.rank_encoder is None and "byte-level BPE" in no_fast_encoder(other)
    assert no_fast_encoder(tokenizer) is None
