"""The rank that keeps the others waiting is named: by injected times, and by a rank that really has more to do."""

import json
import os

import pytest
import torch
from little_run import make_run, sit
from ranks import run_ranks

from llm.config import load_config
from llm.dist import World
from llm.train import stragglers
from llm.train.stragglers import Stragglers

STAGES = [0, 1, 2] if os.environ.get("TORTURE") else [0]


class Heard:
    """What metrics were told."""

    def __init__(self):
        self.faults, self.values = [], []

    def ranks(self, step, values):
        self.values.append((step, values))

    def fault(self, step, kind, why):
        self.faults.append((step, kind, why))


def summed(forward_s: list[float], data_s: list[float]) -> list[int]:
    """What the sum over ranks of their own numbers is, after three steps of which the first does not count."""
    totals = [0] * (2 * len(forward_s))
    for rank, times in enumerate(zip(forward_s, data_s, strict=True)):
        one = fake(len(forward_s), rank)[0]
        assert one.numbers() == []
        for seconds in (100.0, *times[:1] * 2):
            one.add(seconds, 100.0 if seconds == 100.0 else times[1], 1.0)
        totals = [a + b for a, b in zip(totals, one.numbers(), strict=True)]
    return totals


def fake(size: int, rank: int = 0) -> tuple[Stragglers, Heard]:
    heard = Heard()
    alone = Stragglers(World(), 2, heard)
    alone.world, alone.hosts = World(rank=rank, size=size), [f"host-{r}" for r in range(size)]
    return alone, heard


def judge(one: Stragglers, step: int, *times: list[float]) -> None:
    while not one.numbers():
        one.add(0.0, 0.0, 1.0)
    one.judge(step, summed(*times))


def test_a_rank_1_3_times_above_the_median_is_named_once_for_as_long_as_it_is_slow():
    one, heard = fake(4)
    usual, none = [0.2, 0.2, 0.2, 0.25], [0.0] * 4
    slow = [0.2, 0.2, 0.27, 0.2]
    for step, times in enumerate([usual, slow, usual, slow, slow, slow, usual, slow, slow]):
        judge(one, step, times, none)
    assert [(step, kind) for step, kind, _ in heard.faults] == [(4, "slow_rank"), (8, "slow_rank")]
    assert heard.faults[0][2].startswith("rank 2 on host-2 computes slowly: its forward passes take 0.2700 s a step, the median rank's 0.2000 s")
    assert heard.values[1][1] == {"forward_s_median": 0.2, "forward_s_max": 0.27, "slowest": 2, "data_wait_s_max": 0.0}


def test_waiting_for_data_is_told_apart_from_computing_and_of_two_ranks_the_faster_is_the_measure():
    one, heard = fake(2)
    for step in (5, 6):
        judge(one, step, [0.2, 0.2], [0.0, 0.5])
    for step in (7, 8):
        judge(one, step, [0.3, 0.2], [0.0, 0.0])
    (_, _, data), (_, _, compute) = heard.faults
    assert data.startswith("rank 1 on host-1 waits for its data 0.5000 s a step of 1.0000 s")
    assert compute.startswith("rank 0 on host-0 computes slowly")


def test_the_noise_of_a_small_model_names_nobody():
    one, heard = fake(2)
    for step in (5, 6):
        judge(one, step, [0.004, 0.012], [0.0, 0.009])
    assert not heard.faults


def slow_rank_1(world: World, config: str, stage: int) -> int:
    """It multiplies matrices in each forward pass; returns how many collectives of counts there were."""
    from llm.train import start as starting

    build, calls = starting.build_engine, []

    def slowed(*args):
        engine = build(*args)
        inner, big = engine._loss, torch.ones(600, 600)

        def more_to_do(*batch):
            for _ in range(8 if world.rank == 1 else 0):
                big @ big
            return inner(*batch)

        engine._loss = more_to_do
        return engine

    starting.build_engine = slowed
    original = stragglers.Stragglers.judge
    stragglers.Stragglers.judge = lambda self, *args: (calls.append(1), original(self, *args))
    sit(world, config, [f"zero_stage={stage}", "log_every=3", "eval_every=0"])
    return len(calls)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_has_more_to_do_is_named_in_log_and_metrics(tmp_path, stage):
    config = make_run(tmp_path)
    assert run_ranks(slow_rank_1, 2, tmp_path, str(config), stage) == [2, 2]  # after steps 4 and 7
    logs = load_config(config).run_folder / "logs"
    records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "fault/slow_rank" in r] == [7]
    assert [(r["step"], r["ranks/slowest"]) for r in records if "ranks/slowest" in r] == [(4, 1), (7, 1)]
    assert (logs / "rank-0.log").read_text().count("computes slowly") == 1
