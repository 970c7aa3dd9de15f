"""The model of many GPUs, against the figures it was written down from and the published rows."""

import sys
from pathlib import Path

import pytest

from llm.plan.hardware import NAMES, PlanError, find_device
from llm.plan.scaling import Cluster, exposed_seconds, jitter_seconds, ring_seconds, step_time

ROOT = Path(__file__).parent.parent.parent
PARAMS = 1.172e9
LONG_S = 10.0  # a micro-batch behind which anything hides
ALONE, NODE, EIGHT_NODES = (Cluster(find_device("h200"), n) for n in (1, 8, 64))


@pytest.fixture(scope="module")
def published():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import scaling

    sys.path.remove(str(ROOT / "benchmarks"))
    return scaling


@pytest.mark.parametrize(
    ("cluster", "reduce_scatter_ms", "ddp_ms", "zero1_ms", "zero3_ms"), [(NODE, 5.7, 11.4, 17.1, 17.1), (EIGHT_NODES, 7.6, 15.1, 22.7, 22.7)]
)
def test_traffic_of_a_1b_model_in_bf16_takes_what_was_calculated_by_hand(cluster, reduce_scatter_ms, ddp_ms, zero1_ms, zero3_ms):
    assert ring_seconds(2 * PARAMS, cluster) * 1e3 == pytest.approx(reduce_scatter_ms, rel=0.02)
    for stage, expected in ((0, ddp_ms), (1, zero1_ms), (3, zero3_ms)):
        everything = exposed_seconds(stage, PARAMS, 1, LONG_S, cluster, weight_bytes=2, gradient_bytes=2, overlap=True)[1]
        assert everything * 1e3 == pytest.approx(expected, rel=0.02), stage


def test_one_device_sends_nothing_and_waits_for_nobody():
    assert ring_seconds(1e9, ALONE) == 0
    assert exposed_seconds(3, PARAMS, 4, 1.0, ALONE, overlap=True) == (0, 0)
    assert jitter_seconds(ALONE) == jitter_seconds(NODE) == 0 < jitter_seconds(EIGHT_NODES)


def test_what_hides_behind_computing_is_not_counted_and_the_last_gathering_always_is():
    ddp, _ = exposed_seconds(0, PARAMS, 1, LONG_S, NODE, overlap=True)
    zero1, _ = exposed_seconds(1, PARAMS, 1, LONG_S, NODE, overlap=True)
    bare, everything = exposed_seconds(1, PARAMS, 1, LONG_S, NODE, overlap=False)
    assert ddp == 0 and zero1 == pytest.approx(ring_seconds(4 * PARAMS, NODE)) and bare == everything > zero1


def test_zero2_travels_for_each_micro_batch_and_zero1_once():
    assert exposed_seconds(2, PARAMS, 8, 0.0, NODE, overlap=True)[1] > 4 * exposed_seconds(1, PARAMS, 8, 0.0, NODE, overlap=True)[1]


def test_twice_the_mfu_is_half_the_computing_and_the_rest_stays():
    slow, fast = (step_time(1, int(PARAMS), 2e14, 4, mfu, NODE) for mfu in (0.2, 0.4))
    assert fast.compute == pytest.approx(slow.compute / 2) and fast.optimizer == slow.optimizer


def test_speed_at_the_published_mfu_is_the_published_speed(published):
    for anchor in published.ANCHORS:
        assert abs(published.check_anchor(anchor)["difference"]) < 0.02, anchor


def test_published_series_of_more_and_more_gpus_are_met_within_a_twentieth(published):
    rows = [row for series in published.SERIES for row in published.check_series(series)]
    assert sum(not (row["is_fit"] or row["is_start"]) for row in rows) >= 8  # nothing was fitted to these
    assert max(abs(row["difference"]) for row in rows) < 0.05
    assert not any(row["communication_share"] > 0.05 for row in rows)


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    with pytest.raises(PlanError, match="h1000.*h100, h200"):
        find_device("h1000")
    for name in NAMES:
        device = find_device(name)
        assert device.flops > 0 and device.usable < device.memory, name
