import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from counting_shards import PAD_ID, TOKENIZER, counting_shards, write_counting

from llm.data.phase import Phase, count_samples
from llm.data.sampler import Sampler, Windows
from llm.data.shards import Shard, ShardError

SIZES = [100, 33, 34, 1, 2, 57]  # with L = 8: a tail of 3, none, of 1, no sample at all, a tail of 1, none
L = 8


def plan(shards, **changes) -> Phase:
    return Phase.plan(**{"name": "p", "seed": 3, "epochs": 2, "seq_len": L, "shards": shards, **changes})


def expected_targets(sizes) -> list[int]:
    firsts = set(np.cumsum([0, *sizes]).tolist())
    return [i for i in range(sum(sizes)) if i not in firsts]


@pytest.mark.parametrize(("n_tokens", "samples"), [(1, 0), (2, 1), (8, 1), (9, 1), (10, 2), (17, 2), (18, 3)])
def test_a_shard_has_a_sample_for_every_target(n_tokens, samples):
    assert count_samples(n_tokens, L) == samples


def test_every_target_token_of_the_corpus_counts_exactly_once_per_epoch(tmp_path):
    sampler = Sampler(plan(shards := counting_shards(tmp_path, SIZES)), shards)
    n = sampler.phase.samples
    assert n == sum(count_samples(size, L) for size in SIZES)
    orders = []
    for epoch in range(2):
        ids, counted = sampler.rows(np.arange(epoch * n, (epoch + 1) * n))
        assert sorted(ids[:, 1:][counted].tolist()) == expected_targets(SIZES)
        assert np.array_equal(ids[:, :-1][counted] + 1, ids[:, 1:][counted])  # each predicts the token that follows it
        orders.append(ids[:, 0].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_every_row_is_one_window_and_tails_are_padded_and_masked(tmp_path):
    shards = counting_shards(tmp_path, SIZES)
    ids, counted = Windows(shards, L).rows(np.arange(sum(count_samples(size, L) for size in SIZES)))
    ends = np.cumsum(SIZES)
    for row, mask in zip(ids, counted, strict=True):
        real = min(L + 1, ends[np.searchsorted(ends, row[0], side="right")] - row[0])
        assert row.tolist() == [*range(row[0], row[0] + real), *[PAD_ID] * (L + 1 - real)]
        assert mask.tolist() == [True] * (real - 1) + [False] * (L + 1 - real)


def test_rows_do_not_depend_on_names_or_the_order_of_listing(tmp_path):
    shards = counting_shards(tmp_path / "a", SIZES)
    firsts = np.cumsum([0, *SIZES]).tolist()
    renamed = [Shard.open(write_counting(tmp_path / "b", f"z{9 - i}", size, firsts[i]).path) for i, size in enumerate(SIZES)]
    draws = np.arange(plan(shards).total)
    one = Sampler(plan(shards), shards).rows(draws)
    two = Sampler(plan(renamed[::-1]), renamed).rows(draws)
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])


def test_a_draw_asked_for_alone_is_the_same_as_in_company(tmp_path):
    sampler = Sampler(plan(shards := counting_shards(tmp_path, SIZES)), shards)
    n = sampler.phase.samples
    whole, _ = sampler.rows(np.arange(2 * n))
    for draw in (0, n - 1, n, 2 * n - 1):
        assert np.array_equal(sampler.rows(np.array([draw]))[0][0], whole[draw])


def test_a_padding_row_is_all_padding_and_counts_nothing(tmp_path):
    sampler = Sampler(plan(shards := counting_shards(tmp_path, SIZES)), shards)
    ids, counted = sampler.rows(np.array([-1, 0, -1]))
    assert (ids[[0, 2]] == PAD_ID).all() and not counted[[0, 2]].any()
    assert np.array_equal(ids[1], sampler.rows(np.array([0]))[0][0])


def test_only_masked_in_targets_count(tmp_path):
    spans = np.array([[0, 5], [8, 1], [20, 30]])
    shard = Shard.open(write_counting(tmp_path, "x", 60, mask_spans=spans).path)
    sampler = Sampler(plan([shard], epochs=1), [shard])
    ids, counted = sampler.rows(np.arange(sampler.phase.total))
    carries_loss = {t for start, n in spans.tolist() for t in range(start, start + n)}
    assert sorted(ids[:, 1:][counted].tolist()) == sorted(carries_loss - {0})  # token 0 is nobody's target


def test_a_missing_shard_is_named(tmp_path):
    shards = counting_shards(tmp_path, SIZES)
    with pytest.raises(ShardError, match=r"shard text-00002 \(.*phase p trains on.*Restore"):
        Sampler(plan(shards), shards[:2] + shards[3:])


def test_other_shards_beside_those_of_the_phase_change_nothing(tmp_path):
    shards = counting_shards(tmp_path, SIZES)
    draws = np.arange(10)
    assert np.array_equal(Sampler(plan(shards[1:]), shards).rows(draws)[0], Sampler(plan(shards[1:]), shards[1:]).rows(draws)[0])


def test_an_id_beyond_the_vocabulary_stops_the_row_that_holds_it(tmp_path):
    shards = counting_shards(tmp_path, [1000])
    data = np.memmap(shards[0].meta.file("bin"), "<u4", mode="r+")
    sampler = Sampler(plan(shards, epochs=1), shards)
    sampler.rows(np.arange(sampler.phase.total))  # now the checksums of the blocks have passed
    data[500] |= 1 << 24
    with pytest.raises(ShardError, match=r"text-00000\.bin: token 500 is id 16777716, beyond the vocabulary"):
        sampler.rows(np.arange(sampler.phase.total))


def test_a_billion_samples_need_memory_for_their_shards_only():
    """A plan at the size of the web; only the plan, as the order must not touch a token."""
    tokens = 128_000_000
    metas = [SimpleNamespace(shard_id=f"{i:064x}", name=f"web-{i:05}", n_tokens=tokens, role="train", unit_ids=[f"u{i}"],
                             tokenizer=TOKENIZER) for i in range(8000)]
    shards = [SimpleNamespace(meta=meta) for meta in metas]
    tracemalloc.start()
    sampler = Sampler(plan(shards, seq_len=1024, epochs=3), shards)
    samples = sampler.phase.samples_at(np.arange(sampler.phase.samples - 100, sampler.phase.samples + 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sampler.phase.samples == 8000 * 125_000 == 10**9
    assert len(np.unique(samples)) == 200
    assert peak < 10 << 20


def test_another_seq_len_cuts_the_same_tokens_into_other_windows(tmp_path):
    shards = counting_shards(tmp_path, SIZES)
    for seq_len in (1, 5, 200):
        sampler = Sampler(plan(shards, seq_len=seq_len, epochs=1), shards)
        ids, counted = sampler.rows(np.arange(sampler.phase.total))
        assert sorted(ids[:, 1:][counted].tolist()) == expected_targets(SIZES)


def test_progress_does_not_change_the_order(tmp_path):
    phase = plan(counting_shards(tmp_path, SIZES))
    later = replace(phase, consumed=17, first_step=1, last_step=4)
    assert np.array_equal(phase.samples_at(np.arange(phase.total)), later.samples_at(np.arange(phase.total)))


def test_draws_over_the_borders_of_blocks_and_epochs_are_those_of_the_phase(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.data.sampler.BLOCK_DRAWS", 16)
    shards = counting_shards(tmp_path, [400])
    phase = Phase.plan("s0", 7, 3, 8, shards)
    sampler = Sampler(phase, shards)
    for draws in (np.arange(10, 40), np.array([5, -1, 149, 17]), np.arange(phase.total - 3, phase.total)):
        real = draws >= 0
        ids, _ = sampler.rows(draws)
        assert np.array_equal(ids[real, 0], phase.samples_at(draws[real]) * 8)
