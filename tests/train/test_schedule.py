from dataclasses import replace
from types import SimpleNamespace

import pytest

from llm.config import TrainConfig
from llm.data.permutation import ALGORITHM
from llm.data.phase import Phase, PhaseShard, Share
from llm.train.budget import horizon
from llm.train.schedule import Horizon, lr_at


def train(**changes) -> TrainConfig:
    return TrainConfig(**(dict(lr=1.0, batch_size=1, warmup_steps=10, min_lr_ratio=0.1, decay_steps=20) | changes))


def rates(cfg: TrainConfig, horizon: Horizon) -> list[float]:
    return [lr_at(cfg, horizon, step) for step in range(horizon.start, horizon.end)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_to_the_peak_and_never_above(schedule):
    values = rates(train(schedule=schedule), Horizon(0, 100, is_whole_run=True))
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_decaying_schedule_ends_at_the_floor(schedule):
    values = rates(train(schedule=schedule), Horizon(0, 100, is_whole_run=True))
    assert values[-1] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_cosine_is_halfway_in_the_middle():
    assert lr_at(train(schedule="cosine", warmup_steps=0), Horizon(0, 101, is_whole_run=True), 50) == pytest.approx(0.55)


def test_wsd_holds_the_peak_until_the_decay_and_never_decays_in_a_phase_that_may_be_followed():
    values = rates(train(schedule="wsd"), Horizon(0, 100, is_whole_run=True))
    assert values[10:80] == [1.0] * 70 and values[80] < 1.0
    assert rates(train(schedule="wsd"), Horizon(0, 100, is_whole_run=False))[10:] == [1.0] * 90


def test_a_second_phase_warms_up_again_from_its_own_start():
    assert rates(train(), Horizon(500, 100, False)) == rates(train(), Horizon(0, 100, False))


def test_percentages_are_of_the_horizon():
    assert rates(train(warmup_steps="10%"), Horizon(0, 50, True))[4] == 1.0


def test_a_phase_whose_batch_was_changed_on_the_way_has_the_steps_that_its_rest_takes():
    shards, shares = (PhaseShard("a", "a", 801, 100, ()),), (Share("", 1, 1, False),)
    phase = Phase("p0", 3, 1, 8, shards, shares, 0, ALGORITHM, None, None, "", ())
    cfg = SimpleNamespace(train=train(total_step_budget=0))
    assert horizon(cfg, phase, 4, 0).end == 25
    after_ten_steps = replace(phase, consumed=40, first_step=1, last_step=10)
    assert horizon(cfg, after_ten_steps, 4, 10).end == 25
    assert horizon(cfg, after_ten_steps, 20, 10).end == 13  # not at step 5 already, nor in the middle of the data
