"""Phases that draw from several sets of shards at rates of their own."""

from dataclasses import replace

import numpy as np
import pytest
from counting_shards import counting_shards

from llm.data import phase as phase_module
from llm.data.audit import audit_phase
from llm.data.ledger import Ledger
from llm.data.phase import Phase, Portion
from llm.data.sampler import Sampler

SIZES = [100, 33, 34, 60, 57]
L = 8


@pytest.fixture
def shards(tmp_path):
    return counting_shards(tmp_path, SIZES)


def mix(shards, weights=(3, 1, 2), epochs=2, replay=(False, False, True)) -> Phase:
    parts = [shards[:2], shards[2:4], shards[4:]]
    portions = [Portion(name, w, part, r) for name, w, part, r in zip("abc", weights, parts, replay, strict=True)]
    return Phase.mix("p1", 3, epochs, L, portions)


def walk(phase: Phase, stop: int) -> list[int]:
    return [phase.samples_at(np.array([draw])).item() for draw in range(stop)]


def share_of(phase: Phase, sample: int) -> int:
    return next(i for i, (start, stop) in enumerate(phase.share_bounds) if start <= sample < stop)


@pytest.mark.parametrize("weights", [(3, 1, 2), (1, 1, 1), (1, 7, 1), (9000, 1, 999)])
def test_every_share_is_drawn_at_its_rate_all_the_time(shards, weights):
    phase = mix(shards, weights)
    drawn = [0, 0, 0]
    for draw, sample in enumerate(walk(phase, 300), start=1):
        drawn[share_of(phase, sample)] += 1
        assert phase.share_counts(draw).tolist() == drawn
        assert all(abs(n - draw * w / sum(weights)) < 2 for n, w in zip(drawn, weights, strict=True))


def test_the_phase_ends_when_each_share_but_the_replayed_has_been_passed_and_not_a_draw_later(shards):
    phase = mix(shards)
    times = np.bincount(walk(phase, phase.total), minlength=phase.samples)
    (_, a_end), (b_start, b_end), _ = phase.share_bounds
    assert times[:a_end].min() >= 2 and times[b_start:b_end].min() == 2
    before = np.bincount(walk(phase, phase.total - 1), minlength=phase.samples)
    assert before[b_start:b_end].min() == 1, "the slowest share is not passed yet"


def test_in_each_share_every_sample_is_drawn_once_before_any_is_drawn_again(shards):
    phase = mix(shards)
    for stop in range(0, phase.total, 7):
        times = np.bincount(walk(phase, stop), minlength=phase.samples)
        for start, end in phase.share_bounds:
            assert times[start:end].max() - times[start:end].min() <= 1


def test_a_replayed_share_does_not_lengthen_the_phase_beyond_its_part(shards):
    plain = Phase.plan("p1", 3, 1, L, shards[:2])
    with_replay = Phase.mix("p1", 3, 1, L, [Portion("new", 9, shards[:2]), Portion("old", 1, shards[2:], is_replay=True)])
    assert plain.samples == plain.total
    assert plain.total / 0.9 - 1 <= with_replay.total <= plain.total / 0.9 + 1


def test_counts_and_seen_samples_are_those_of_a_walk(shards, monkeypatch):
    monkeypatch.setattr(phase_module, "COUNT_DRAWS", 5)
    phase = mix(shards, epochs=4)
    steps = [0, 1, 6, phase.samples, phase.total // 2, phase.total]
    for start, stop in zip(steps, steps[1:], strict=False):
        samples = walk(phase, stop)
        shard_of = np.searchsorted(phase.shard_ends, samples[start:], side="right")
        assert phase.draw_counts(start, stop).tolist() == np.bincount(shard_of, minlength=5).tolist()
        seen = np.concatenate([replace(phase, consumed=stop).seen_samples(index) for index in range(5)])
        assert set(np.flatnonzero(seen).tolist()) == set(samples)


def test_a_mixture_passes_its_own_audit_and_reads_back(shards):
    ledger = Ledger().open(mix(shards)).advance(31, 1)
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger
    audit = audit_phase(again.open_phase, {s.meta.shard_id: s for s in shards})
    assert audit.problems == []
    assert audit.targets == Sampler(again.open_phase, shards).rows(np.arange(31))[1].sum()
    assert [(share.name, size) for share, size, *_ in audit.draws_each] == [("a", 17), ("b", 13), ("c", 7)]


def test_epochs_are_counted_by_the_slowest_share(shards):
    phase = mix(shards)
    ends = [draw for draw in range(1, phase.total + 1) if phase.passes(draw) > phase.passes(draw - 1)]
    assert len(ends) == 2 and ends[-1] == phase.total
