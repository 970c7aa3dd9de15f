import threading

import numpy as np
import pytest
import torch
from counting_shards import PAD_ID, counting_shards

from llm.data import stream as stream_module
from llm.data.phase import Phase
from llm.data.sampler import Sampler
from llm.data.shards import ShardError
from llm.data.stream import Batch, Stream, chain, count_targets, eval_batches, micro_batches, step_digest

SIZES = [100, 33, 34, 2, 57]  # 30 samples of 8 targets, three of them tails
L, B = 8, 8
CUTS = [(1, 8), (1, 4), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1), (8, 1)]  # world size, rows per micro-batch


@pytest.fixture
def sampler(tmp_path):
    shards = counting_shards(tmp_path, SIZES)
    return Sampler(Phase.plan("p", 3, 2, L, shards), shards)


def whole_step(sampler, g, world_size, rows) -> list[Batch]:
    return [batch for rank in range(world_size) for batch in micro_batches(sampler, g, B, rank, world_size, rows)]


def real_rows(batches) -> dict[int, tuple]:
    """draw -> (ids, targets)"""
    rows = {}
    for batch in batches:
        for row, draw in enumerate(batch.samples.tolist()):
            if draw >= 0:
                assert draw not in rows
                rows[draw] = (batch.tokens_BT[row].tolist(), batch.targets_BT[row].tolist())
    return rows


def digest_of_step(sampler, g, world_size, rows) -> int:
    ranks = [step_digest(micro_batches(sampler, g, B, rank, world_size, rows)) for rank in range(world_size)]
    return int(np.sum(np.array(ranks, np.int64)))  # wraps, as the all-reduce of int64 does


@pytest.mark.parametrize(("world_size", "rows"), CUTS)
def test_every_cut_of_a_step_feeds_the_same_rows(sampler, world_size, rows):
    for g in range(0, sampler.phase.total, B):
        expected = {}
        for draw in range(g, min(g + B, sampler.phase.total)):
            ids, counted = sampler.rows(np.array([draw]))
            expected[draw] = (ids[0, :-1].tolist(), np.where(counted[0], ids[0, 1:], -100).tolist())
        assert real_rows(whole_step(sampler, g, world_size, rows)) == expected


def test_every_cut_of_every_step_has_the_same_digest_and_number_of_targets(sampler):
    chains = set()
    for world_size, rows in CUTS:
        hexes, targets = "", []
        for g in range(0, sampler.phase.total, B):
            hexes = chain(hexes, digest_of_step(sampler, g, world_size, rows))
            targets.append(count_targets(whole_step(sampler, g, world_size, rows)))
        chains.add((hexes, tuple(targets)))
    assert len(chains) == 1


def test_a_run_that_changes_its_world_size_feeds_the_same_data(sampler):
    steady = changing = ""
    for number, g in enumerate(range(0, sampler.phase.total, B)):
        steady = chain(steady, digest_of_step(sampler, g, 1, 8))
        changing = chain(changing, digest_of_step(sampler, g, *CUTS[number % len(CUTS)]))
    assert steady == changing


def test_slots_are_dealt_by_micro_batch_then_rank_then_row(sampler):
    assert [batch.samples.tolist() for batch in micro_batches(sampler, 16, 8, 1, 2, 2)] == [[18, 19], [22, 23]]


def test_all_steps_together_feed_every_target_once_per_epoch(sampler):
    fed = []
    for g in range(0, sampler.phase.total, B):
        for batch in whole_step(sampler, g, 2, 2):
            fed += batch.targets_BT[batch.targets_BT != -100].tolist()
    firsts = np.cumsum([0, *SIZES]).tolist()
    assert sorted(fed) == sorted(2 * [i for i in range(sum(SIZES)) if i not in firsts])


def test_the_short_last_step_is_padded_with_rows_that_do_not_count(sampler):
    total = sampler.phase.total
    assert total == 60 and total % B == 4
    batches = whole_step(sampler, 56, 2, 2)
    assert sorted(draw for batch in batches for draw in batch.samples.tolist()) == [-1] * 4 + [56, 57, 58, 59]
    for batch in batches:
        padding = batch.samples < 0
        assert (batch.targets_BT[padding] == -100).all() and (batch.tokens_BT[padding] == PAD_ID).all()
    assert count_targets(batches) == sum(t != -100 for _, targets in real_rows(batches).values() for t in targets)


def test_targets_are_the_next_tokens(sampler):
    for batch in whole_step(sampler, 0, 1, 4):
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.tokens_BT.shape == batch.targets_BT.shape == (4, L)
        assert batch.tokens_BT.is_contiguous() and batch.doc_ids_BT is None
        counted = batch.targets_BT != -100
        assert torch.equal(batch.targets_BT[counted], batch.tokens_BT[counted] + 1)


@pytest.mark.parametrize(("batch_rows", "world_size", "rows"), [(8, 3, 1), (8, 2, 3), (2, 4, 1)])
def test_a_batch_that_ranks_cannot_share_is_our_own_mistake(sampler, batch_rows, world_size, rows):
    with pytest.raises(AssertionError, match="cannot be dealt"):
        micro_batches(sampler, 0, batch_rows, 0, world_size, rows)


# --- the digest -------------------------------------------------------------------------------------------------------------


def changed(batch: Batch, **changes) -> Batch:
    return Batch(**{**vars(batch), "tokens_BT": batch.tokens_BT.clone(), "targets_BT": batch.targets_BT.clone(), **changes})


def test_the_digest_sees_a_changed_token_target_or_draw_and_a_lost_or_repeated_row(sampler):
    batches = whole_step(sampler, 0, 1, 4)
    digest = step_digest(batches)
    token, target = changed(batches[0]), changed(batches[0])
    token.tokens_BT[2, 5] += 1
    target.targets_BT[2, 5] = -100
    draw = changed(batches[0], samples=batches[0].samples + np.array([0, 0, 0, 96]))
    swapped = changed(batches[0], samples=batches[0].samples[::-1])
    variants = [[other, batches[1]] for other in (token, target, draw, swapped)] + [batches[:1], batches + batches[:1]]
    assert len({digest, *map(step_digest, variants)}) == 7


def test_the_digest_is_a_signed_64_bit_number_that_sums_by_wrapping(sampler):
    batches = whole_step(sampler, 0, 1, 1)
    parts = [step_digest([batch]) for batch in batches]
    assert all(-(2**63) <= part < 2**63 for part in parts) and min(parts) < 0 < max(parts)
    assert int(np.sum(np.array(parts, np.int64))) == step_digest(batches)
    assert int(torch.tensor(parts).sum()) == step_digest(batches)
    assert step_digest([]) == 0


def test_the_chain_depends_on_every_step_and_their_order():
    assert len({chain(chain("", a), b) for a, b in [(1, 2), (2, 1), (1, 3), (1, -2)]}) == 4
    assert chain("", 2**63) == chain("", -(2**63))


def test_the_digest_of_known_data_never_changes(tmp_path):
    """A change here breaks the comparison with chains that are saved in checkpoints."""
    shards = counting_shards(tmp_path, [50])
    batches = micro_batches(Sampler(Phase.plan("p", 3, 1, L, shards), shards), 0, 4, 0, 1, 4)
    assert chain("", step_digest(batches)) == "058be950cb326725ccbea1ddbc0b935842d42d1f2b9e58d630330555f1b534e2"


# --- the stream -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(sampler):
    stream = Stream(sampler, B, 1, 2, 2)
    yield stream
    stream.close()


def assert_same(batches, expected):
    assert [b.samples.tolist() for b in batches] == [b.samples.tolist() for b in expected]
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(batches, expected, strict=True))
    assert all(torch.equal(a.targets_BT, b.targets_BT) for a, b in zip(batches, expected, strict=True))


@pytest.mark.parametrize("asked", [[0, 8, 16, 24], [0, 8, 8, 0], [24, 0, 8], [56, 56], [3, 11, 16], [52, 0]])
def test_any_step_may_be_asked_for_at_any_time(sampler, stream, asked):
    for g in asked:
        assert_same(stream.step(g), micro_batches(sampler, g, B, 1, 2, 2))


def test_resuming_at_every_step_gives_what_never_stopping_gives(sampler):
    never_stopping = Stream(sampler, B, 0, 2, 2)
    whole = {g: never_stopping.step(g) for g in range(0, sampler.phase.total, B)}
    for start in whole:
        resumed = Stream(sampler, B, 0, 2, 2)
        for g in range(start, sampler.phase.total, B):
            assert_same(resumed.step(g), whole[g])
        resumed.close()
    never_stopping.close()


def test_the_next_step_is_made_ready_before_it_is_asked_for(sampler, monkeypatch):
    made, second_is_made = [], threading.Event()

    def recording(sampler, g, *place):
        made.append((g, threading.current_thread() is threading.main_thread()))
        if g == 8:
            second_is_made.set()
        return micro_batches(sampler, g, *place)

    monkeypatch.setattr(stream_module, "micro_batches", recording)
    stream = Stream(sampler, B, 0, 1, 4)
    stream.step(0)
    assert second_is_made.wait(30)
    stream.step(8)
    stream.close()
    assert made[:2] == [(0, True), (8, False)]
    assert [g for g, _ in made].count(8) == 1


def test_nothing_is_made_ready_past_the_end(sampler, stream):
    stream.step(56)
    assert stream._ready is None
    with pytest.raises(AssertionError):
        stream.step(60)


def test_damage_found_ahead_is_told_when_its_step_is_asked_for_and_only_then(sampler, stream, monkeypatch):
    def failing(sampler, g, *place):
        if g == 8:
            raise ShardError("text-00001.bin: damaged")
        return micro_batches(sampler, g, *place)

    monkeypatch.setattr(stream_module, "micro_batches", failing)
    stream.step(0)
    stream.step(24)
    stream.step(0)
    with pytest.raises(ShardError, match="text-00001"):
        stream.step(8)
    monkeypatch.undo()
    assert_same(stream.step(8), micro_batches(sampler, 8, B, 1, 2, 2))


# --- validation -------------------------------------------------------------------------------------------------------------


def evaluated(shards, world_size, rows, max_rows=None) -> list[Batch]:
    """The batches of all ranks, each of which had as many."""
    ranks = [list(eval_batches(shards, L, rows, rank, world_size, max_rows)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return sum(ranks, [])


@pytest.mark.parametrize(("world_size", "rows"), [(1, 1), (1, 7), (2, 4), (4, 3), (4, 16)])
def test_validation_takes_every_target_once_on_any_number_of_ranks(sampler, world_size, rows):
    shards = sampler.windows.shards
    fed = [t for batch in evaluated(shards, world_size, rows) for t in batch.targets_BT[batch.targets_BT != -100].tolist()]
    firsts = np.cumsum([0, *SIZES]).tolist()
    assert sorted(fed) == [i for i in range(sum(SIZES)) if i not in firsts]


def test_validation_is_the_same_for_any_listing_order(sampler):
    shards = sampler.windows.shards
    for a, b in zip(eval_batches(shards, L, 4, 0, 1), eval_batches(shards[::-1], L, 4, 0, 1), strict=True):
        assert torch.equal(a.tokens_BT, b.tokens_BT)


@pytest.mark.parametrize("max_rows", [1, 7, 29, 30, 1000])
def test_a_bounded_validation_takes_windows_from_everywhere(sampler, max_rows):
    samples = [
        {s for batch in evaluated(sampler.windows.shards, *cut, max_rows) for s in batch.samples.tolist() if s >= 0}
        for cut in [(1, 4), (2, 3), (4, 1)]
    ]
    assert samples[0] == samples[1] == samples[2]
    assert len(samples[0]) == min(max_rows, 30)
    gaps = np.diff([*sorted(samples[0]), 30])
    assert gaps.max() - gaps.min() <= 1
