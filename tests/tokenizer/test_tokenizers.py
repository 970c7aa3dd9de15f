"""The three kinds of tokenizer, on small files made here."""

import base64
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llm.tokenizer import SPECIAL_TOKENS, TokenizerError, load_tokenizer
from llm.tokenizer import cut as cut_module
from llm.tokenizer import huggingface as huggingface_module
from llm.tokenizer.byte_level import BYTE_OF
from llm.tokenizer.export import write_tokenizer
from llm.tokenizer.fingerprint import N_PROBES, probes
from llm.tokenizer.gpt2 import PATTERN
from llm.tokenizer.train import train_bpe

TEXT = "\n".join(f"def function_{i}(self, value):\n    return value + {i}  # the sum of both" for i in range(300))
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "i m", "< |"]


def write_gpt2(folder):
    """GPT-2's two files, with eight merges."""
    folder.mkdir(exist_ok=True)
    tokens = [*BYTE_OF, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return folder


def write_ranks(folder):
    """The same vocabulary as a .tiktoken file."""
    folder.mkdir(exist_ok=True)
    byte_tokens = [bytes([b]) for b in BYTE_OF.values()]
    merged = [bytes(BYTE_OF[c] for c in merge.replace(" ", "")) for merge in MERGES]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate([*byte_tokens, *merged])]
    (folder / "gpt2.tiktoken").write_bytes(b"".join(lines))
    return folder


def write_foreign(folder):
    """A tokenizer.json that was not made here: SentencePiece's manner, ends with </s>."""
    folder.mkdir(exist_ok=True)
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "a", "b", "▁a", "ab", *(f"<0x{b:02X}>" for b in range(256))])}
    hf = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    hf.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    hf.save(str(folder / "tokenizer.json"))
    return folder


def write_bpe(folder):
    folder.mkdir(exist_ok=True)
    train_bpe([TEXT], 300).tokenizer.save(folder)
    return folder


WRITERS = {"bpe": write_bpe, "tiktoken": write_gpt2, "huggingface": write_foreign}


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    return WRITERS[request.param](tmp_path / request.param)


def test_the_kind_is_recognised_from_what_is_there(folder):
    assert load_tokenizer(folder).kind == folder.name


def test_special_tokens_never_come_out_of_raw_text(folder):
    tokenizer = load_tokenizer(folder)
    text = "a" + "".join(SPECIAL_TOKENS) + "</s> <|im_end|>\n<|endoftext|>b"
    ids = set(tokenizer.encode(text)) | set(np.concatenate(tokenizer.encode_batch([text, "<|im_start|>"])))
    assert tokenizer.special_ids and not ids & set(tokenizer.special_ids.values())


@pytest.mark.parametrize("kind", ["bpe", "tiktoken"])
def test_decoding_gives_the_text_back_and_so_do_the_bytes_of_its_tokens(kind, tmp_path):
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path / kind))
    for text in [*probes(), TEXT, "".join(probes())]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(int(i)) for i in ids) == text.encode()


def test_a_sentencepiece_vocabulary_decodes_and_has_bytes(tmp_path):
    tokenizer = load_tokenizer(write_foreign(tmp_path / "foreign"))
    ids = tokenizer.encode("ab é a")
    assert tokenizer.decode(ids) == "ab é a"
    assert b"".join(tokenizer.token_bytes(int(i)) for i in ids) == " ab é a".encode()  # SentencePiece puts a space in front


def test_special_tokens_have_their_own_ids_and_spelling(tmp_path):
    for kind in ("bpe", "tiktoken"):
        tokenizer = load_tokenizer(WRITERS[kind](tmp_path / kind))
        assert list(tokenizer.special_ids) == list(SPECIAL_TOKENS)
        assert sorted(tokenizer.special_ids.values()) == list(range(tokenizer.vocab_size - 4, tokenizer.vocab_size))
        assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
        assert tokenizer.token_bytes(tokenizer.pad_id) == b"<|pad|>"


def test_ids_of_the_padding_of_the_vocabulary_decode_to_nothing(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 5]) == "ab"


def test_saving_gives_the_same_bytes_and_loads_as_the_same_tokenizer(folder, tmp_path):
    first = load_tokenizer(folder)
    (tmp_path / "copy").mkdir()
    first.save(tmp_path / "copy")
    second = load_tokenizer(tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()}
    assert (first.kind, first.fingerprint) == (second.kind, second.fingerprint)


def test_a_batch_gives_what_each_text_gives_alone(folder):
    tokenizer = load_tokenizer(folder)
    texts = ["hello the hello", "", TEXT, *probes()]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_ranks_from_merges_are_those_from_a_tiktoken_file(tmp_path):
    merges, ranks = load_tokenizer(write_gpt2(tmp_path / "a")), load_tokenizer(write_ranks(tmp_path / "b"))
    assert merges.fingerprint == ranks.fingerprint
    assert len(merges.encode("hello the")) == 2


def test_the_gpt2_kind_encodes_like_tiktoken_itself(tmp_path):
    ranks = {base64.b64decode(t): int(r) for t, r in (x.split() for x in (write_ranks(tmp_path / "b") / "gpt2.tiktoken").open())}
    reference = tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_tokenizer(tmp_path / "b")
    for text in [*probes(), TEXT]:
        assert tokenizer.encode(text).tolist() == reference.encode(text)


# fingerprint


def edited(folder, change):
    """The fingerprint after `change` of the parsed tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder, "huggingface").fingerprint


def test_the_fingerprint_is_over_content_not_over_the_bytes_of_the_file(tmp_path):
    first = load_tokenizer(write_bpe(tmp_path / "bpe")).fingerprint
    assert edited(tmp_path / "bpe", lambda content: None) == first  # another layout of the same JSON
    assert edited(tmp_path / "bpe", lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]])) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"]["merges"].pop(),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\s+"),
        lambda c: c["added_tokens"].pop(),
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ],
    ids=["merges", "regex", "added tokens", "normalizer", "prefix space"],
)
def test_the_fingerprint_changes_with(change, tmp_path):
    first = load_tokenizer(write_bpe(tmp_path / "bpe")).fingerprint
    assert edited(tmp_path / "bpe", change) != first


def test_the_fingerprint_hears_of_swapped_ids(tmp_path):
    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]

    first = load_tokenizer(write_bpe(tmp_path / "bpe")).fingerprint
    assert edited(tmp_path / "bpe", swap) != first


def test_the_probe_strings_are_many_and_different():
    assert len(set(probes())) == len(probes()) == N_PROBES


# long text


@pytest.mark.parametrize("kind", ["bpe", "tiktoken"])
def test_long_text_in_parts_has_the_ids_of_the_whole(kind, tmp_path, monkeypatch):
    WRITERS[kind](tmp_path / kind)
    text = "".join(part + space for part in probes() for space in ("a ", "b\n", "c\t\t", "d \n"))
    whole = load_tokenizer(tmp_path / kind).encode(text)
    monkeypatch.setattr(huggingface_module, "CUT_CHARS", 10)
    monkeypatch.setattr("llm.tokenizer.ranks.CUT_CHARS", 10)
    assert len(cut_module.cut_text(text, 10)) > 200
    np.testing.assert_array_equal(load_tokenizer(tmp_path / kind).encode(text), whole)


def test_long_text_is_encoded_in_parts_in_batches_too(tmp_path, monkeypatch):
    content = json.loads((write_bpe(tmp_path / "bpe") / "tokenizer.json").read_bytes())
    content["model"]["ignore_merges"] = True  # as Llama 3's, which ranks cannot say
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(content))
    texts = [TEXT, "", "short"]
    whole = load_tokenizer(tmp_path / "bpe").encode_batch(texts)
    monkeypatch.setattr(huggingface_module, "CUT_CHARS", 1000)
    tokenizer = load_tokenizer(tmp_path / "bpe")
    assert tokenizer.rank_encoder is None
    lengths, real = [], tokenizer._hf.encode_batch_fast
    recorder = lambda texts, **options: lengths.extend(map(len, texts)) or real(texts, **options)  # noqa: E731
    tokenizer._hf = SimpleNamespace(encode_batch_fast=recorder)
    for ids, wanted in zip(tokenizer.encode_batch(texts), whole, strict=True):
        np.testing.assert_array_equal(ids, wanted)
    assert max(lengths) < 1100 < len(TEXT)


def test_text_is_not_cut_for_a_tokenizer_that_marks_the_start_of_text(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_foreign(tmp_path / "foreign"))
    monkeypatch.setattr(huggingface_module, "CUT_CHARS", 4)
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "foreign").encode("ab ab\nab\na b"), tokenizer.encode("ab ab\nab\na b"))


def test_text_is_not_cut_under_a_normalizer(tmp_path):
    bpe = tokenizers.Tokenizer.from_file(str(write_bpe(tmp_path / "bpe") / "tokenizer.json"))
    assert huggingface_module._splits_after_letters(bpe)
    bpe.normalizer = normalizers.Strip()
    assert not huggingface_module._splits_after_letters(bpe)


def test_a_long_word_is_encoded_whole(tmp_path):
    for kind in ("bpe", "tiktoken"):
        tokenizer = load_tokenizer(WRITERS[kind](tmp_path / kind))
        assert tokenizer.decode(tokenizer.encode("x" * 300_000)) == "x" * 300_000


# errors


def error_of(path, kind=None):
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path, kind)
    return str(caught.value)


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path):
    assert "train_tokenizer.py" in error_of(tmp_path / "nothing")
    assert "neither a tokenizer.json nor GPT-2's files" in error_of(tmp_path)
    assert "encoder.json and vocab.bpe" in error_of(tmp_path, "tiktoken") and "nothing is ever downloaded" in error_of(tmp_path, "tiktoken")
    assert "holds no tokenizer.json" in error_of(write_gpt2(tmp_path / "gpt2"), "huggingface")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "not a tokenizer.json" in error_of(tmp_path)


def test_a_tokenizer_of_another_maker_is_not_bpe(tmp_path):
    assert "Use kind 'huggingface'" in error_of(write_foreign(tmp_path / "foreign"), "bpe")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    hf = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    hf.save(str(tmp_path / "tokenizer.json"))
    assert "no end-of-text token" in error_of(tmp_path)


def test_a_tokenizer_whose_special_tokens_can_be_typed_is_refused(tmp_path):
    hf = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1}, "[UNK]"))
    hf.add_special_tokens([AddedToken("</s>", special=True)])
    hf.save(str(tmp_path / "tokenizer.json"))
    assert "plain text that contains '</s>'" in error_of(tmp_path)


def test_gpt2_files_of_two_vocabularies_are_refused(tmp_path):
    (write_gpt2(tmp_path / "gpt2") / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(MERGES[:-1]) + "\n")
    assert "not of one vocabulary" in error_of(tmp_path / "gpt2")


def test_a_tiktoken_file_of_unknown_pattern_is_not_guessed_at(tmp_path):
    shutil.move(write_ranks(tmp_path / "ranks") / "gpt2.tiktoken", tmp_path / "ranks" / "cl100k_base.tiktoken")
    assert "neither a tokenizer.json nor GPT-2's files" in error_of(tmp_path / "ranks")


@pytest.mark.parametrize("write", [write_gpt2, write_ranks])
def test_gpt2s_files_become_a_tokenizer_json_with_the_same_ids(write, tmp_path):
    ours = load_tokenizer(write(tmp_path / "gpt2"))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, tmp_path / "out", 1024)
    theirs = load_tokenizer(tmp_path / "out")
    for text in probes():
        assert theirs.encode(text).tolist() == ours.encode(text).tolist(), text
    assert theirs.special_ids == ours.special_ids
