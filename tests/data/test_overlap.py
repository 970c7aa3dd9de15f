"""Windows of tokens: what was cut out of a text is found in its shards, other text is not.

Whether it was trained on is told exactly.
"""

import random

import numpy as np
import pytest
from counting_shards import TOKENIZER, counting_shards, write_counting

from llm.data import overlap as overlap_module
from llm.data.ledger import Ledger
from llm.data.overlap import ALL, NONE, SOME, cuts_for, find_windows
from llm.data.packing import BESTFIT, bins_of
from llm.data.phase import Phase
from llm.data.sampler import Sampler
from llm.data.shards import Shard, token_dtype, write_shard
from llm.tokenizer import tokenizer_info
from llm.tokenizer.train import train_bpe

TRIES = 400


def prose(rng: random.Random, words: list[str], n: int) -> str:
    return " ".join(rng.choice(words) + rng.choice(["", "", "", ",", "."]) for _ in range(n))


def code(rng: random.Random, words: list[str], n: int) -> str:
    lines = [
        f"{'    ' * rng.randrange(4)}{rng.choice(words)}({rng.choice(words)}, {rng.randrange(999)})"
        for _ in range(n // 4)
    ]
    return "\n".join(lines)


def unspaced(rng: random.Random, words: list[str], n: int) -> str:
    """Long runs of letters with a stop now and then, as Chinese is written."""
    return "".join(rng.choice(words) + rng.choice([""] * 9 + ["\u3002"]) for _ in range(n))


ALPHABETS = {
    prose: "abcdefghijklmnopqrstuvwxyz\u00e4\u00f6\u00fc",
    code: "abcdefghij_",
    unspaced: "".join(map(chr, range(0x4E00, 0x4E40))),
}


KINDS = [*((kind, 600) for kind in ALPHABETS), (prose, 280), (code, 280)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}")
def corpus(request, tmp_path_factory):
    """Texts of one kind, as a shard of a tokenizer trained on them, and others of their words."""
    rng, (kind, vocab_size) = random.Random(11), request.param
    words = ["".join(rng.choices(ALPHABETS[kind], k=rng.randint(1, 9))) for _ in range(400)]
    texts = [kind(rng, words, rng.randint(150, 400)) for _ in range(60)]
    tokenizer = train_bpe(texts, vocab_size=vocab_size).tokenizer
    info = tokenizer_info(tokenizer)
    parts = [
        (np.r_[ids, tokenizer.eos_id].astype(np.int64), np.array([len(ids) + 1]))
        for ids in tokenizer.encode_batch(texts)
    ]
    meta = write_shard(
        tmp_path_factory.mktemp("shards"),
        "x",
        parts,
        dtype=token_dtype(info["vocab_size"]),
        tokenizer=info,
        units=[{"unit_id": "u", "bytes": sum(len(t.encode()) for t in texts)}],
        role="train",
        seq_len=32,
        writer={},
    )
    foreign = [kind(rng, words, 300) for _ in range(60)]
    return rng, tokenizer, texts, foreign, Shard.open(meta.path)


def cut_out(rng: random.Random, tokenizer, texts: list[str]) -> np.ndarray:
    """The ids of letters from a text, from 64 tokens on, wherever that begins and ends."""
    while True:
        text = rng.choice(texts)
        start, size = rng.randrange(len(text)), rng.randint(70, 600)
        if len(ids := tokenizer.encode(text[start : start + size])) >= 64:
            return ids


def shares(documents: list[np.ndarray], shard: Shard) -> np.ndarray:
    """The part of each document's windows that was trained on, after one pass over the shard."""
    phase = Phase.plan("p0", 3, 1, 32, [shard])
    ledger = Ledger().open(phase).advance(phase.total, 1)
    overlap, unreadable = find_windows(documents, [shard], [ledger], cuts=cuts_for([shard]))
    assert not unreadable
    document = overlap.compared.document
    counts = np.bincount(document, minlength=len(documents))
    assert counts.min() > 0
    return np.bincount(document[overlap.trained == ALL], minlength=len(documents)) / counts


def test_of_cut_outs_99_in_100_are_found_and_of_foreign_text_99_in_100_are_not(corpus):
    rng, tokenizer, texts, foreign, shard = corpus
    own = shares([cut_out(rng, tokenizer, texts) for _ in range(TRIES)], shard)
    other = shares([cut_out(rng, tokenizer, foreign) for _ in range(TRIES)], shard)
    assert (own > 0).mean() >= 0.99 and (own == 1).mean() >= 0.95
    assert (other == 0).mean() >= 0.99


def test_a_shared_passage_in_foreign_text_is_that_part_of_its_windows(corpus):
    rng, tokenizer, texts, foreign, shard = corpus
    mixed = [
        f"{theirs[:700]} {ours[60:400]} {theirs[700:1400]}"
        for ours, theirs in zip(texts, foreign, strict=True)
    ]
    found = shares(tokenizer.encode_batch(mixed), shard)
    assert (found > 0.01).all() and (found < 0.6).all()


def of_document(overlap, number: int) -> np.ndarray:
    return np.flatnonzero(overlap.compared.document == number)


def test_whether_a_window_was_trained_on_is_what_walking_through_the_draws_says(tmp_path):
    shards = counting_shards(tmp_path, [300, 200], doc_tokens=90)
    phase = Phase.plan("p0", 3, 1, 8, shards)
    ledger = Ledger().open(phase).advance(44, 5)
    drawn = set()
    for row in Sampler(phase, shards).rows(np.arange(44))[0].tolist():
        drawn.update(zip(row, row[1:], strict=False))  # neighbours, of which the second is a target
    overlap, _ = find_windows(
        [np.arange(90, 180), np.arange(2, 80), np.arange(310, 340), np.arange(400, 418)],
        shards,
        [ledger],
    )
    compared = overlap.compared
    states = set()
    for window in range(len(compared)):
        first, length = int(compared.ids[compared.start[window]]), int(compared.length[window])
        pairs = [(n, n + 1) in drawn for n in range(first, first + length - 1)]
        wanted = ALL if all(pairs) else SOME if any(pairs) else NONE
        states.add(wanted)
        assert overlap.trained[window] == wanted, (first, length)
        assert overlap.place[window] == first - (300 if first >= 300 else 0)
    assert states == {NONE, SOME, ALL}


def test_of_packed_documents_as_well(tmp_path):
    (shard,) = counting_shards(tmp_path, [600], doc_tokens=25)
    phase = Phase.plan("p0", 3, 1, 32, [shard], document_mask=True, packing=BESTFIT)
    ledger = Ledger().open(phase).advance(phase.total // 2, 1)
    seen, bins = ledger.phases[0].seen_samples(0), bins_of(shard, 32)
    trained = {start for number in np.flatnonzero(seen) for start, _ in bins.pieces(int(number))}
    documents = [np.arange(start, start + 25) for start in range(0, 600, 25)]
    overlap, _ = find_windows(documents, [shard], [ledger])
    for number in range(len(documents)):
        states = overlap.trained[of_document(overlap, number)]
        assert set(states.tolist()) == ({ALL} if number * 25 in trained else {NONE})
    assert 0 < len(trained) < len(documents)


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 15])
def test_a_document_of_few_tokens_is_found_as_a_whole_document_only(tmp_path, n_tokens):
    eos = 0
    documents = [
        [*range(100, 100 + n_tokens), eos],
        [*range(300, 340)],
        [*range(500, 500 + n_tokens)],
        [*range(700, 740)],
        [*range(800, 800 + n_tokens), 900],
    ]
    parts = [(np.array(ids), np.array([len(ids)])) for ids in documents]
    meta = write_shard(
        tmp_path,
        "x",
        parts,
        dtype=token_dtype(70_000),
        tokenizer=TOKENIZER,
        units=[{"unit_id": "u", "bytes": 1}],
        role="train",
        seq_len=8,
        writer={},
    )
    there = [np.arange(100, 100 + n_tokens), np.arange(500, 500 + n_tokens)]
    not_there = [
        np.arange(702, 702 + n_tokens),
        np.arange(800, 800 + n_tokens),
        np.arange(501, 501 + n_tokens),
        np.arange(901, 901 + n_tokens),
    ]
    overlap, _ = find_windows(there + not_there, [Shard.open(meta.path)], [])
    places = [overlap.place[of_document(overlap, n)].tolist() for n in range(6)]
    assert places == [[0], [n_tokens + 41], [-1], [-1], [-1], [-1]]


def test_windows_are_found_at_the_borders_of_blocks_and_in_the_same_text_twice(tmp_path):
    (shard,) = counting_shards(tmp_path, [69_000], doc_tokens=69_000)
    again = write_counting(tmp_path / "again", "x", 100, 500)
    starts = [0, 5, 1000, 68_900]
    overlap, _ = find_windows(
        [np.arange(s, s + 100) for s in starts], [shard, Shard.open(again.path)], []
    )
    for number, start in enumerate(starts):
        windows = of_document(overlap, number)
        assert (
            overlap.place[windows].tolist()
            == (overlap.compared.start[windows] - 100 * number + start).tolist()
        )


def test_at_the_borders_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap_module, "BLOCK_TOKENS", 64)
    (shard,) = counting_shards(tmp_path, [1000], doc_tokens=1000)
    heard = []
    overlap, _ = find_windows([np.arange(1000)], [shard], [], heard.append)
    assert (overlap.place == overlap.compared.start).all() and sum(heard) == 1000


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_compared(tmp_path):
    shards = counting_shards(tmp_path, [300, 300])
    path = shards[0].meta.file("bin")
    path.write_bytes(bytes(600))
    overlap, unreadable = find_windows([np.arange(310, 390)], shards, [])
    assert (
        list(unreadable) == [shards[0].meta.shard_id]
        and str(path) in unreadable[shards[0].meta.shard_id]
    )
    assert (overlap.shard == 1).all()


def test_no_documents_and_no_shards_find_nothing(tmp_path):
    overlap, _ = find_windows([], counting_shards(tmp_path, [100]), [Ledger()])
    assert len(overlap.compared) == 0
    overlap, _ = find_windows([np.arange(100)], [], [])
    assert (overlap.shard == -1).all() and len(overlap.trained) == len(overlap.compared)


def test_equal_hashes_alone_find_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap_module, "_mixed", lambda ids: np.zeros(ids.shape, np.uint64))
    (shard,) = counting_shards(tmp_path, [300])
    half = np.arange(100, 200)
    half[1::2] += 1000
    foreign = [half, np.arange(400, 500), np.arange(600, 610)]
    overlap, _ = find_windows(foreign, [shard], [])
    assert (overlap.shard == -1).all()
    assert (find_windows([np.arange(10, 26)], [shard], [])[0].shard >= 0).any()


def test_one_changed_bit_within_a_shard_makes_it_unreadable_instead_of_a_never(tmp_path):
    parts = [(np.arange(3_000_000) % 60_000, np.array([3_000_000]))]
    options = {"units": [{"unit_id": "u", "bytes": 1}], "role": "train", "seq_len": 8, "writer": {}}
    meta = write_shard(
        tmp_path, "x", parts, dtype=token_dtype(70_000), tokenizer=TOKENIZER, **options
    )
    shard, path = Shard.open(meta.path), meta.file("bin")
    with open(path, "r+b") as file:
        file.seek(5 << 20)  # not in its first block, nor in its last
        byte = file.read(1)
        file.seek(5 << 20)
        file.write(bytes([byte[0] ^ 1]))
    _, unreadable = find_windows([np.arange(100)], [shard], [])
    assert str(path) in unreadable[shard.meta.shard_id]
