"""Rows whose documents are kept apart, as windows of the text as it runs and as bins: what is fed, what counts, and what the ledger says of it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from counting_shards import PAD_ID, TOKENIZER

from llm.data.audit import audit_phase
from llm.data.ledger import Ledger, LedgerError
from llm.data.origin import origins
from llm.data.packing import BESTFIT, best_fit, bins_of, split_documents
from llm.data.phase import Phase
from llm.data.sampler import Sampler
from llm.data.seen import seen_by_unit
from llm.data.shards import Shard, token_dtype, write_shard
from llm.data.stream import count_targets, eval_batches, micro_batches, step_digest

L = 8
LENGTHS = [[5, 1, 9, 2, 30, 4, 4, 1, 8, 3, 17, 10, 6], [3] * 9]
CUTS = pytest.mark.parametrize("packing", [None, BESTFIT], ids=["windows", "bins"])


def shard_of(folder, lengths, first, spans=None) -> Shard:
    """Values first, first + 1, ... in documents of these lengths."""
    n = sum(lengths)
    meta = write_shard(
        folder, f"text-{first}", [(np.arange(first, first + n), np.array(lengths))], dtype=token_dtype(TOKENIZER["vocab_size"]),
        tokenizer=TOKENIZER, units=[{"unit_id": f"u{first}", "bytes": n, "docs": len(lengths), "name": "a.txt"}], role="train", seq_len=L,
        writer={}, mask_spans=spans,
    )  # fmt: skip
    return Shard.open(meta.path)


@pytest.fixture
def shards(tmp_path):
    """The first with a mask: of its values only the multiples of three and their successors carry loss."""
    n = sum(LENGTHS[0])
    spans = np.array([[i, min(2, n - i)] for i in range(0, n, 3)])
    return [shard_of(tmp_path, LENGTHS[0], 0, spans), shard_of(tmp_path, LENGTHS[1], 1000)]


def document_of() -> dict[int, tuple]:
    values = [(first + i, n) for first, lengths in zip((0, 1000), LENGTHS, strict=True) for i, n in enumerate(_numbers(lengths))]
    return {value: (value >= 1000, n) for value, n in values}


def _numbers(lengths):
    return [n for n, length in enumerate(lengths) for _ in range(length)]


def targets_due() -> list[int]:
    """Every value but the first of each document, as far as the mask lets it count."""
    documents = document_of()
    inside = [value for value in documents if documents.get(value - 1) == documents[value]]
    return [value for value in inside if value >= 1000 or value % 3 != 2]


def sampler_of(shards, packing, epochs=1) -> Sampler:
    return Sampler(Phase.plan("p", 3, epochs, L, shards, document_mask=True, packing=packing), shards)


@CUTS
def test_every_token_but_the_first_of_a_document_is_a_target_once_an_epoch(shards, packing):
    sampler, fed = sampler_of(shards, packing, epochs=2), []
    for g in range(0, sampler.phase.total, 4):
        for batch in micro_batches(sampler, g, 4, 0, 1, 2):
            fed += batch.targets_BT[batch.targets_BT != -100].tolist()
    assert sorted(fed) == sorted(2 * targets_due())


@CUTS
def test_a_target_follows_its_input_in_the_same_document_and_doc_ids_tell_documents_apart(shards, packing):
    sampler, documents = sampler_of(shards, packing), document_of()
    for g in range(0, sampler.phase.total, 4):
        for batch in micro_batches(sampler, g, 4, 0, 1, 4):
            for ids, targets, doc_ids in zip(*(t.tolist() for t in (batch.tokens_BT, batch.targets_BT, batch.doc_ids_BT)), strict=True):
                counted = [(token, target) for token, target in zip(ids, targets, strict=True) if target != -100]
                assert all(target == token + 1 and documents[token] == documents[target] for token, target in counted)
                owners = [documents.get(token, "padding") for token in ids]
                assert [a == b for a, b in zip(doc_ids, doc_ids[1:], strict=False)] == [a == b for a, b in zip(owners, owners[1:], strict=False)]


def test_bins_hold_every_token_of_every_document_once_and_documents_whole(shards):
    for shard, lengths in zip(shards, LENGTHS, strict=True):
        bins, ends = bins_of(shard, L), np.cumsum(lengths)
        found = Counter()
        for number in range(len(bins)):
            pieces = bins.pieces(number)
            assert 0 < sum(stop - start for start, stop in pieces) <= L + 1
            for start, stop in pieces:
                document = int(np.searchsorted(ends, start, side="right"))
                assert start == ends[document] - lengths[document] and stop == ends[document] or lengths[document] > L + 1
                found.update(range(start, stop))
        shared = {int(end - n + k * L) for end, n in zip(ends, lengths, strict=True) for k in range(1, -(-(n - 1) // L))}
        assert found == Counter(range(sum(lengths))) + Counter(shared)  # neighbouring pieces of a long document share one token


def test_the_first_pieces_of_long_documents_are_full():
    starts, stops = split_documents(np.array([20, 21, 30]), 8)
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == [(0, 9), (8, 17), (16, 20), (20, 21), (21, 30)]


def test_best_fit_leaves_little_room_and_does_not_depend_on_chance():
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    bins = best_fit(lengths, 1025)
    filled = np.bincount(bins, lengths)
    assert filled.max() <= 1025 and filled.sum() / (1025 * len(filled)) > 0.99
    assert best_fit(np.array([3, 6, 7]), 10).tolist() == [0, 1, 0]  # the 3 fills the bin of the 7, though that of the 6 has more room


def test_padding_of_a_bin_counts_for_nothing_and_sees_no_document(shards):
    sampler, documents = sampler_of(shards, BESTFIT), document_of()
    rows = np.arange(sampler.phase.total)
    (ids, counted), doc_ids = sampler.rows(rows), sampler.windows.doc_ids(sampler.numbers(rows))
    padding = ids == PAD_ID
    assert padding.any() and not (counted & padding[:, 1:]).any()
    for row, pad in zip(doc_ids, padding[:, :-1], strict=True):
        assert not set(row[pad]) & set(row[~pad])
    assert set(ids[~padding].tolist()) == set(documents)


def test_two_runs_over_masked_and_unmasked_text_tell_their_steps_apart(tmp_path):
    plain, masked = shard_of(tmp_path / "a", [40], 0), shard_of(tmp_path / "b", [40], 0, np.array([[5, 20]]))
    digests = []
    for shard in (plain, masked):
        sampler = Sampler(Phase.plan("p", 3, 1, L, [shard]), [shard])
        batches = micro_batches(sampler, 0, 5, 0, 1, 5)
        digests.append(step_digest(batches))
        assert count_targets(batches) == (39 if shard is plain else 20)
    assert digests[0] != digests[1]


# the ledger


@CUTS
def test_the_audit_counts_the_targets_that_were_fed_and_finds_nothing_wrong(shards, packing):
    phase = sampler_of(shards, packing, epochs=2).phase
    done = replace(phase, consumed=phase.total, first_step=1, last_step=1)
    audit = audit_phase(done, {shard.meta.shard_id: shard for shard in shards})
    assert audit.problems == [] and audit.targets == 2 * len(targets_due())


@CUTS
def test_a_ledger_comes_back_with_how_its_rows_were_cut(shards, packing):
    phase = sampler_of(shards, packing).phase
    assert Ledger.from_json(Ledger().open(phase).to_json()).phases == (phase,)


def test_a_ledger_from_before_there_were_masks_is_read(shards):
    saved = Ledger().open(Phase.plan("p", 3, 1, L, shards)).to_json()
    for phase in saved["phases"]:
        del phase["document_mask"], phase["packing"]
    assert not Ledger.from_json(saved).phases[0].document_mask


@pytest.mark.parametrize("change", [{"packing": "other/v1"}, {"document_mask": False}])
def test_a_ledger_packed_by_another_algorithm_is_refused(shards, change):
    saved = Ledger().open(sampler_of(shards, BESTFIT).phase).to_json()
    saved["phases"][0] |= change
    with pytest.raises(LedgerError, match="packed by"):
        Ledger.from_json(saved)


@CUTS
def test_draws_are_traced_to_the_documents_they_fed(shards, packing):
    sampler, documents = sampler_of(shards, packing), document_of()
    ids, _ = sampler.rows(np.arange(sampler.phase.total))
    found = origins(sampler.phase, 0, sampler.phase.total, {shard.meta.shard_id: shard for shard in shards})
    for row, origin in zip(ids, found, strict=True):
        first = 0 if origin.shard.name == "text-0" else 1000
        assert [first + i for piece in origin.pieces for i in range(*piece)] == row[row != PAD_ID].tolist()
        assert {number for _, number in origin.documents} == {documents[value][1] for value in row[row != PAD_ID].tolist()}


def test_text_seen_once_in_windows_and_once_in_bins_is_seen(shards):
    both = [Phase.plan(f"p{i}", 3, 1, L, shards, document_mask=True, packing=packing) for i, packing in enumerate([None, BESTFIT])]
    ledger = Ledger(tuple(replace(phase, consumed=phase.total, first_step=1, last_step=1) for phase in both))
    assert set(seen_by_unit(ledger).values()) == {1.0}


@CUTS
def test_validation_is_cut_like_training(shards, packing):
    batches = list(eval_batches(shards, L, 4, 0, 1, document_mask=True, packing=packing))
    targets = [t for batch in batches for t in batch.targets_BT[batch.targets_BT != -100].tolist()]
    assert sorted(targets) == sorted(targets_due()) and all(batch.doc_ids_BT is not None for batch in batches)


def test_of_a_hundred_packed_shards_none_is_packed_again_for_each_row(tmp_path):
    shards = [shard_of(tmp_path, [5, 3, 4], first) for first in range(0, 1200, 12)]
    sampler = sampler_of(shards, BESTFIT)
    packed = bins_of.cache_info().misses
    sampler.rows(np.arange(sampler.phase.total))
    assert bins_of.cache_info().misses == packed
