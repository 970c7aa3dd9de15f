"""SIGKILL at any moment: what was committed is whole, the end is bit for bit that of a run that was never disturbed, every sample is fed once."""

import json
import os
import random
import signal
import time

import pytest
from counts import SEED, TORTURE, done, torture
from launched import Launched
from lives import Whole, assert_nothing_lost, committed, fault_run, live, start, uninterrupted
from points import ON_RANK_0, POINTS

from llm.checkpoint.resume import newest
from llm.config import load_config
from llm.dist import World

pytestmark = pytest.mark.timeout(300)
EPOCHS, STEPS = 2, 19
SAVES = ("async_save=true", "async_save=false")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run on so many ranks with these words."""
    known: dict[tuple, Whole] = {}

    def get(ranks: int, *words: str) -> Whole:
        if (ranks, words) not in known:
            known[ranks, words] = uninterrupted(tmp_path_factory.mktemp("whole"), ranks, *words, epochs=EPOCHS)
        return known[ranks, words]

    return get


# The order lets the run move on now and then: pruning needs some checkpoints before it.
CHAIN = [
    "after_rename", "before_prune", "before_shard:2", "mid_shard", "after_shard", "before_barrier", "before_manifest", "before_rename", "mid_prune",
]  # fmt: skip


def commits(point: str, victim: int, nth: int) -> set[int]:
    """How many checkpoints a life that is killed there may leave: once a rank has voted, rank 0 finishes what it has begun without it."""
    before, after = {nth - 1}, {nth}
    if victim and point == "before_manifest":  # rank 0 may still be waiting for the last byte of its vote
        return before | after
    return after if point in ON_RANK_0[1:] or (victim and point == "before_rename") else before


CHAINS = {
    "2 ranks, in turns, async": (2, lambda n: n % 2, [SAVES[0]]),
    "2 ranks, in turns, sync": (2, lambda n: (n + 1) % 2, [SAVES[1]]),
    "1 rank, async": (1, lambda n: 0, [SAVES[0]]),
    "2 ranks, rank 0, async": (2, lambda n: 0, [SAVES[0]]),
    "2 ranks, rank 1, async": (2, lambda n: 1, [SAVES[0]]),
    "2 ranks, rank 0, sync": (2, lambda n: 0, [SAVES[1]]),
    "2 ranks, rank 1, sync": (2, lambda n: 1, [SAVES[1]]),
    "4 ranks, rank 3, async": (4, lambda n: 3, [SAVES[0]]),
    "2 ranks, ZeRO-2, rank 0": (2, lambda n: 0, ["zero_stage=2"]),
    "2 ranks, ZeRO-3, rank 1": (2, lambda n: 1, ["zero_stage=3"]),
}


@pytest.mark.parametrize("case", CHAINS if TORTURE else list(CHAINS)[:1])
def test_killed_at_each_point_of_a_save_one_life_after_another(tmp_path, whole, case):
    ranks, victim_of, words = CHAINS[case]
    config = fault_run(tmp_path, epochs=EPOCHS)
    run = load_config(config).run_folder
    assert {p.split(":")[0] for p in CHAIN} == set(POINTS)
    for n, named in enumerate(CHAIN):
        point, nth = (*named.split(":"), "1")[:2]
        before, victim = max(committed(config), default=0), victim_of(n)
        life = live(config, ranks, *words, fault=f"{point}:{victim}:{nth}")
        assert life.codes[victim] == -signal.SIGKILL, f"{named}: {life.codes}\n{life.output}"
        if point != "mid_prune":
            assert (max(committed(config), default=0) - before) // 2 in commits(point, victim, int(nth)), named
        if point == "before_rename" and victim == 0:
            assert list(run.glob(".tmp-step-*"))  # the next life cleans up
        assert newest(World(), run).manifest.step == max(committed(config)) and not (run / "quarantine").exists()
    life = live(config, ranks, *words)
    assert life.codes == [0] * ranks, life.output
    assert_nothing_lost(config, whole(ranks, *words), EPOCHS)


MOMENTS = {
    "between two micro-batches": (["micro_batch:0:15"], 1),
    "before the first save": (["applied:0:1"], 2),
    "at the end of an epoch": (["save:1:5"], 2),
    "after the last step": ([f"applied:0:{STEPS}"], 2),
    "twice with a save between": (["applied:1:3", "applied:0:4"], 2),
    "while another rank writes for five seconds": (["after_shard:1:1:late,before_barrier:0:1"], 2),
}


@torture
@pytest.mark.parametrize("case", MOMENTS)
def test_killed_at_a_moment_of_its_own(tmp_path, whole, case):
    faults, ranks = MOMENTS[case]
    config = fault_run(tmp_path, epochs=EPOCHS)
    for fault in faults:
        life = live(config, ranks, fault=fault)
        assert life.killed, life.output
        assert "five seconds" not in case or committed(config) == []
    assert live(config, ranks).codes == [0] * ranks
    assert_nothing_lost(config, whole(ranks), EPOCHS)
    before = committed(config)
    again = live(config, ranks)  # a finished run trains no more
    assert again.codes == [0] * ranks and committed(config) == before and "go on" not in again.output


@pytest.mark.parametrize("last", ["after_rename:0:10", "mid_prune:0:7"])  # ten saves, and three of their checkpoints stay
def test_a_run_killed_right_after_its_last_save_is_tidied_up_by_the_next_life(tmp_path, whole, last):
    config = fault_run(tmp_path, epochs=EPOCHS)
    life = live(config, 2, fault=last)
    assert life.killed and max(committed(config)) == STEPS, life.output
    assert "mid_prune" not in last or list(load_config(config).run_folder.glob(".trash-*"))
    assert live(config, 2).codes == [0, 0]
    assert_nothing_lost(config, whole(2), EPOCHS)
    view = json.loads((load_config(config).run_folder / "seen_datasets.json").read_text())
    assert [phase["percent_done"] for phase in view["phases"]] == [100.0]


# ranks, kind of save, kills in `make torture`
AT_RANDOM = {
    "2 ranks, async": (2, SAVES[0], 50),
    "2 ranks, sync": (2, SAVES[1], 50),
    "1 rank, async": (1, SAVES[0], 50),
    "4 ranks, async": (4, SAVES[0], 50),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", AT_RANDOM if TORTURE else list(AT_RANDOM)[:1])
def test_the_group_killed_at_random_times_until_it_is_done(tmp_path, whole, case):
    """Over as many runs as the kills take."""
    ranks, save, many = AT_RANDOM[case]
    undisturbed, wanted = whole(ranks, save), many if TORTURE else 3
    times, kills, runs = random.Random(f"{SEED} {case}"), 0, 0
    while kills < wanted:
        config = fault_run(tmp_path / f"run-{runs}", epochs=EPOCHS)
        kills += kill_until_done(config, ranks, save, undisturbed, times, max_kills=wanted)
        assert_nothing_lost(config, undisturbed, EPOCHS)
        runs += 1
    print(f"{case}: TORTURE_SEED={SEED}, {kills} kills in {runs} runs")


def kill_until_done(config, ranks: int, save: str, undisturbed: Whole, times: random.Random, max_kills: int) -> int:
    """Kill times spread over the length of an undisturbed life, so that start, training, saves and the end are all hit."""
    for kills in range(10 * max_kills):
        group = start(config, ranks, save)
        if kills < max_kills:
            group.wait(times.uniform(0.1, undisturbed.seconds))
        killed = kills < max_kills and group.kill()
        life = group.ended()
        if life.codes == [0] * ranks:
            return kills
        assert killed and set(life.codes) <= {0, -signal.SIGKILL}, f"TORTURE_SEED={SEED}, kill {kills}: {life.codes}\n{life.output}"
        done["kills"] += 1
        assert not (load_config(config).run_folder / "quarantine").exists(), f"TORTURE_SEED={SEED}, kill {kills}"
    raise AssertionError("never done")


LAUNCHED = {
    "python": (1, [("python", "before_rename:0:2")]),
    "torchrun, deepspeed": (2, [("torchrun", "before_manifest:1:2"), ("deepspeed", "mid_shard:0:2")]),
    "python, points": (1, [("python", point) for point in POINTS[:-2]]),
    "torchrun, points": (2, [("torchrun", f"{point}:{n % 2}") for n, point in enumerate(POINTS[:-2])]),
    "deepspeed, points": (2, [("deepspeed", f"{point}:{(n + 1) % 2}") for n, point in enumerate(POINTS[:-2])]),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", LAUNCHED if TORTURE else list(LAUNCHED)[:2])
def test_killed_under_a_launcher_nothing_is_lost_either(tmp_path, whole, case):
    ranks, lives = LAUNCHED[case]
    config = fault_run(tmp_path, epochs=EPOCHS)
    for launcher, fault in lives:
        with Launched(launcher, config, "--retry-anyway", fault=fault, FED=str(tmp_path / "fed")) as run:
            output = run.ended()
        assert run.process.returncode != 0 and "phase finished" not in output, f"{fault}: {output}"
        done["kills"] += 1
        run.forget()
    assert live(config, ranks).codes == [0] * ranks
    assert_nothing_lost(config, whole(ranks), EPOCHS)


@torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_everything_under_a_launcher_killed_at_random_times(tmp_path, whole, launcher):
    ranks, times = 1 if launcher == "python" else 2, random.Random(f"{SEED} {launcher}")
    config, kills, code = fault_run(tmp_path, epochs=EPOCHS), 0, None
    while code != 0:
        with Launched(launcher, config, "--retry-anyway", FED=str(tmp_path / "fed")) as run:
            run.until(lambda: "starts at step" in run.output or "resumes" in run.output or run.process.poll() is not None, "trains")
            time.sleep(times.uniform(0, 0.6) if kills < 5 else 0)  # the random moment itself
            if kills < 5:
                for pid in run.alive():
                    os.kill(pid, signal.SIGKILL)
                kills += run.process.wait(10) != 0
            run.ended()
        code = run.process.returncode
    done["kills"] += kills
    assert_nothing_lost(config, whole(ranks), EPOCHS)
