from dataclasses import replace

import numpy as np
from counting_shards import counting_shards

from llm.data.audit import audit_phase
from llm.data.packing import BESTFIT
from llm.data.permutation import Permutation
from llm.data.phase import Phase
from llm.data.sampler import Sampler


def test_a_shortcut_that_goes_wrong_is_noticed(tmp_path, monkeypatch):
    """The walk must not use what it proves."""
    shards = counting_shards(tmp_path, [100, 57])
    phase = Phase.plan("p0", 3, 2, 8, shards)
    half = replace(phase, consumed=25, first_step=1, last_step=7)
    assert audit_phase(half, {}).problems == []
    with monkeypatch.context() as patch:
        patch.setattr(Permutation, "__call__", lambda self, places: np.minimum(places, 12))  # a permutation that repeats
        assert any("each must be taken once" in problem for problem in audit_phase(half, {}).problems)
    with monkeypatch.context() as patch:
        patch.setattr(Permutation, "inverse", lambda self, samples: samples)
        one_epoch = replace(half, consumed=7)
        assert any("are not those that the draws took" in problem for problem in audit_phase(one_epoch, {}).problems)


def test_tokens_are_counted_through_loss_masks(tmp_path):
    shards = counting_shards(tmp_path, [30, 45], mask_spans=np.array([[3, 6], [12, 11]]))
    phase = Phase.plan("p0", 3, 2, 8, shards)
    for consumed in range(1, phase.total + 1):
        counted = Sampler(phase, shards).rows(np.arange(consumed))[1].sum()
        walked = replace(phase, consumed=consumed, first_step=1, last_step=1)
        assert audit_phase(walked, {s.meta.shard_id: s for s in shards}).targets == counted


def test_without_the_shards_of_a_packed_phase_no_fewer_tokens_are_recounted_than_were_trained_on(tmp_path):
    shards = counting_shards(tmp_path, [700, 300], doc_tokens=5)
    phase = Phase.plan("p0", 1, 1, 8, shards, document_mask=True, packing=BESTFIT)
    for consumed in range(1, phase.total + 1):
        counted = Sampler(phase, shards).rows(np.arange(consumed))[1].sum()
        assert audit_phase(replace(phase, consumed=consumed, first_step=1, last_step=1), {}).targets >= counted


def test_a_sample_may_be_drawn_more_often_than_two_bytes_can_count(tmp_path, monkeypatch):
    phase = Phase.plan("p0", 3, 70_000, 1, counting_shards(tmp_path, [2]))
    monkeypatch.setattr(Phase, "samples_at", lambda self, draws: np.zeros_like(draws))  # it has one; asking a permutation for it takes seconds
    assert phase.samples == 1
    assert audit_phase(replace(phase, consumed=phase.total, first_step=1, last_step=1), {}).problems == []
