"""Each kind of damage is refused by name, with what to do."""

import json

import numpy as np
import pytest
from counting_shards import TOKENIZER, write_counting

from llm.data import shards as shards_module
from llm.data.record import write_record
from llm.data.shards import Shard, ShardError, verify_shard

REMEDY = r".*Restore x\.\* from a copy, or delete them and run the tokenizing again"


@pytest.fixture
def meta(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "CRC_BLOCK_BYTES", 400)  # 100 tokens: the shard has a first, a middle and a last block
    return write_counting(tmp_path, "x", 290, mask_spans=np.array([[10, 20], [50, 100]]))


def flip_bit(path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def read_everything(meta) -> None:
    """What training does with a shard."""
    shard = Shard.open(meta.path)
    shard.tokens(0, meta.n_tokens)
    assert shard.doc_ends[-1] == meta.n_tokens
    shard.loss_mask(0, 10)


@pytest.mark.parametrize("kind", ["bin", "idx", "mask"])
@pytest.mark.parametrize("difference", [-1, 1])
def test_one_byte_short_or_long_is_refused_at_open(meta, kind, difference):
    path = meta.file(kind)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if difference < 0 else data + b"\0")
    sizes = f"has {len(data) + difference:,} bytes, its meta promises {len(data):,}"
    with pytest.raises(ShardError, match=rf"x\.{kind}: {sizes}" + REMEDY):
        Shard.open(meta.path)


@pytest.mark.parametrize("kind", ["bin", "idx", "mask"])
def test_a_missing_file_is_refused_at_open(meta, kind):
    meta.file(kind).unlink()
    with pytest.raises(ShardError, match=rf"x\.{kind}: missing" + REMEDY):
        Shard.open(meta.path)


@pytest.mark.parametrize("kind", ["bin", "idx", "mask"])
def test_a_file_that_goes_missing_after_its_shard_was_opened_is_a_damaged_shard_to_all_ranks(meta, kind):
    shard = Shard.open(meta.path)
    meta.file(kind).unlink()
    read = {"bin": lambda: shard.tokens(0, 5), "idx": lambda: shard.doc_ends, "mask": lambda: shard.loss_mask(0, 5)}[kind]
    with pytest.raises(ShardError, match=rf"x\.{kind}: opened before.*No such file" + REMEDY):
        read()


def test_a_file_that_goes_missing_while_its_shard_is_in_use_is_one_too(meta):
    shard = Shard.open(meta.path)
    shard.tokens(0, 5)
    meta.file("bin").unlink()
    shards_module._mapped.cache_clear()  # as when many other shards have been read since
    with pytest.raises(ShardError, match=r"x\.bin: opened before"):
        shard.tokens(0, 5)


def test_a_missing_meta_is_refused(meta):
    meta.path.unlink()
    with pytest.raises(ShardError, match=r"x\.meta\.json: cannot be read" + REMEDY):
        Shard.open(meta.path)


@pytest.mark.parametrize("token", [0, 99, 200, 289])
def test_a_flipped_bit_in_the_first_or_last_block_is_found_at_first_use(meta, token):
    flip_bit(meta.file("bin"), 4 * token)
    first = token // 100 * 100
    with pytest.raises(ShardError, match=rf"x\.bin: tokens {first} to {min(first + 100, 290)} do not match" + REMEDY):
        Shard.open(meta.path).tokens(150, 151)


def test_a_flipped_bit_in_a_middle_block_is_found_by_verify(meta):
    flip_bit(meta.file("bin"), 4 * 150)
    with pytest.raises(ShardError, match=r"x\.bin: tokens 100 to 200 do not match" + REMEDY):
        verify_shard(Shard.open(meta.path))


def test_a_flipped_bit_past_the_vocabulary_names_file_and_token(meta):
    flip_bit(meta.file("bin"), 4 * 150 + 2, bit=1)
    shard = Shard.open(meta.path)
    assert shard.tokens(100, 150).tolist() == list(range(100, 150))
    with pytest.raises(ShardError, match=r"x\.bin: token 150 is id 131222, beyond the vocabulary of 70,000" + REMEDY):
        shard.tokens(145, 160)


@pytest.mark.parametrize("kind", ["idx", "mask"])
def test_any_flipped_bit_in_idx_or_mask_is_found_when_they_are_used(meta, kind):
    for at in range(meta.files[kind]["bytes"]):
        flip_bit(meta.file(kind), at)
        with pytest.raises(ShardError, match=rf"x\.{kind}: .*hash" + REMEDY):
            read_everything(meta)
        with pytest.raises(ShardError, match=rf"x\.{kind}: .*hash" + REMEDY):
            verify_shard(Shard(meta))
        flip_bit(meta.file(kind), at)
    read_everything(meta)
    verify_shard(Shard(meta))


def test_any_flipped_bit_in_the_meta_is_refused_at_open(meta):
    text = meta.path.read_bytes()
    for at in range(0, len(text), 3):
        flip_bit(meta.path, at, bit=at % 7)
        try:
            Shard.open(meta.path)
        except ShardError as error:
            assert "x.meta.json" in str(error) and "Restore x.*" in str(error)
        else:  # white space between values carries nothing
            assert json.loads(meta.path.read_bytes()) == json.loads(text)
        meta.path.write_bytes(text)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"self_sha256": 1}', "{" * 50])
def test_a_meta_that_is_no_meta_is_refused(meta, text):
    meta.path.write_text(text)
    with pytest.raises(ShardError, match=r"x\.meta\.json: " + REMEDY):
        Shard.open(meta.path)


def test_a_swapped_dtype_is_refused_even_with_a_fresh_hash(meta):
    record = meta.to_json()
    meta.path.write_text(meta.path.read_text().replace('"uint32"', '"uint16"'))
    with pytest.raises(ShardError, match=r"x\.meta\.json: .*own hash" + REMEDY):
        Shard.open(meta.path)
    write_record(meta.path, {**record, "dtype": "uint16"})
    with pytest.raises(ShardError, match=r"x\.meta\.json: its shard_id does not follow from its dtype \(uint16\)" + REMEDY):
        Shard.open(meta.path)


def test_a_vocabulary_below_the_ids_is_refused(meta):
    record = meta.to_json()
    write_record(meta.path, {**record, "tokenizer": {**TOKENIZER, "vocab_size": 100}})
    with pytest.raises(ShardError, match=r"x\.meta\.json: holds id 289, beyond its tokenizer's vocabulary of 100" + REMEDY):
        Shard.open(meta.path)


def test_a_newer_format_is_refused_as_such(meta):
    write_record(meta.path, {**meta.to_json(), "version": 2})
    with pytest.raises(ShardError, match=r"x\.meta\.json: holds tally-shard version 2, this program reads tally-shard version 1"):
        Shard.open(meta.path)


def test_verify_reads_every_byte_and_says_so(meta):
    class Progress:
        done = 0

        def advance(self, n):
            self.done += n

    progress = Progress()
    verify_shard(Shard.open(meta.path), progress)
    assert progress.done == 4 * 290
