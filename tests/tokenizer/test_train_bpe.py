"""Training of a tokenizer: deterministic, bounded, honest about what it measured."""

import pytest

from llm.log import UserError
from llm.tokenizer.train import MAX_SAMPLE_BYTES, MAX_TOKEN_BYTES, held_out, train_bpe

DOCUMENTS = [f"document {i}: the quick brown fox number {i * 7919} jumps over the lazy dog {i % 13}\n" * 3 for i in range(300)]


def saved(trained, folder):
    folder.mkdir(exist_ok=True)
    trained.tokenizer.save(folder)
    return (folder / "tokenizer.json").read_bytes()


def test_the_same_texts_in_any_order_give_the_same_tokenizer(tmp_path):
    forwards = train_bpe(DOCUMENTS, 320, sample_bytes=20_000)
    backwards = train_bpe(reversed(DOCUMENTS), 320, sample_bytes=20_000)
    assert saved(forwards, tmp_path) == saved(backwards, tmp_path)


def test_the_sample_stays_within_its_bytes_and_other_bytes_make_another():
    small, large = train_bpe(DOCUMENTS, 300, sample_bytes=5_000), train_bpe(DOCUMENTS, 300, sample_bytes=50_000)
    assert 4_000 < small.sample_bytes <= 5_000 < large.sample_bytes <= 50_000


def test_vocab_size_counts_plain_tokens_and_the_special_ones_come_after():
    tokenizer = train_bpe(DOCUMENTS, 300).tokenizer
    assert tokenizer.vocab_size == 304
    assert tokenizer.special_ids == {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": 302, "<|pad|>": 303}


def test_special_tokens_in_the_training_text_stay_plain_text():
    tokenizer = train_bpe(["user <|im_start|> says <|im_end|> " * 50] * 20, 400).tokenizer
    assert min(tokenizer.special_ids.values()) > max(tokenizer.encode("<|im_start|> says <|im_end|><|endoftext|><|pad|>"))


def test_bytes_per_token_is_measured_on_text_that_was_not_trained_on():
    trained = train_bpe(DOCUMENTS, 400)
    assert trained.measured_on == "held-out text"
    assert trained.sample_bytes < sum(len(text) for text in DOCUMENTS)
    assert 1.5 < trained.bytes_per_token < 10


def test_one_small_document_is_enough_and_what_was_measured_is_said():
    assert train_bpe(["one small document"], 256).measured_on == "its own training text"


def test_numbers_are_split_into_groups_of_at_most_three_digits():
    tokenizer = train_bpe(["123456789 " * 400, "123456 " * 400], 300).tokenizer
    assert max(len(tokenizer.token_bytes(int(i)).strip()) for i in tokenizer.encode("123456789")) <= 3


@pytest.mark.parametrize(
    ("documents", "vocab_size", "sample_bytes", "said"),
    [
        (DOCUMENTS, 255, 1000, "vocabulary size 255 is too small"),
        (DOCUMENTS, 300, MAX_SAMPLE_BYTES + 1, "2,147,483,648 bytes is out of range"),
        ([], 300, 1000, "no text to train a tokenizer on"),
    ],
)
def test_impossible_wishes_are_refused(documents, vocab_size, sample_bytes, said):
    with pytest.raises(UserError, match=said):
        train_bpe(documents, vocab_size, sample_bytes)


def test_no_token_is_longer_than_32_bytes_and_the_vocabulary_is_full_all_the_same():
    rulers = ["=" * 400 + "\n", "-" * 300 + "\n", "x" * 500 + " "] * 40
    tokenizer = train_bpe([*rulers, *DOCUMENTS], 320).tokenizer
    assert tokenizer.vocab_size == 324
    assert max(len(tokenizer.token_bytes(i)) for i in range(320)) == MAX_TOKEN_BYTES
    assert tokenizer.rank_encoder, "it has no form as ranks"


def test_text_that_is_held_out_is_the_same_for_everybody_and_never_in_the_sample(monkeypatch):
    from llm.tokenizer import train

    trained_on, real = [], train._train
    monkeypatch.setattr(train, "_train", lambda texts, size: real(iter(trained_on.extend(texts) or trained_on), size))
    train_bpe(DOCUMENTS, 300)
    out = {piece for text in DOCUMENTS for piece in held_out(text)}
    assert out and trained_on and not out & set(trained_on) and out | set(trained_on) == set(DOCUMENTS)
