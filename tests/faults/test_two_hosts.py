"""Two hosts with addresses of their own: one is cut off or dies, the other notices in time, and goes on alone without losing anything."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from counts import TORTURE, done, torture
from hosts import ADDRESSES, Hosts, two_hosts
from launched import BIN, ROOT, Launched
from lives import assert_fed_once, committed, exit_note, fault_run, live, start

from llm.checkpoint.resume import newest
from llm.cli import RETRY
from llm.config import load_config
from llm.dist import World

pytestmark = pytest.mark.timeout(180)
EPOCHS, STEPS = 2, 19
HANG_S = 5
SAVING_S = 4 * HANG_S  # the watchdog gives a save four times as long
SPARE_S = 20  # for a machine that has other things to do


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
            yield hosts
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture
def hosts(pair: Hosts) -> Hosts:
    pair.plug()
    return pair


@pytest.fixture
def config(tmp_path) -> Path:
    return fault_run(tmp_path, epochs=EPOCHS, hang_timeout_s=HANG_S, keep_last=99)


# What befalls which host (0 is where all meet), and when.
CASES = {
    "killed in a step": ("killed", 1, "step:1:5"),
    "killed in a save": ("killed", 1, "mid_shard:1:2"),
    "cut off in a save": ("cut", 1, "before_barrier:all:2:hold"),
    "cut off in a step": ("cut", 1, "step:all:5:hold"),
    "cut off before the manifest": ("cut", 0, "before_manifest:all:2:hold"),
    "the first killed in a step": ("killed", 0, "step:0:5"),
    "the first killed before the rename": ("killed", 0, "before_rename:0:2"),
    "the second killed before the rename": ("killed", 1, "before_rename:1:2"),
    "killed with a vote given": ("killed", 1, "before_manifest:1:2"),
}


@pytest.mark.parametrize("case", CASES if TORTURE else list(CASES)[:2])
@pytest.mark.parametrize("save", ["async_save=true", "async_save=false"] if TORTURE else ["async_save=true"])
def test_a_host_that_goes_is_noticed_in_time_and_the_other_goes_on_alone(hosts, config, case, save):
    what, victim, fault = CASES[case]
    group = start(config, 2, save, fault=fault, hosts=hosts)
    if what == "cut":
        group.reached(0, 1)
        hosts.pull(victim)
        group.go()
    else:
        group.processes[victim].join(60)
    gone_at = time.monotonic()
    group.processes[1 - victim].join(SAVING_S + SPARE_S)
    print(f"{case}, {save}: noticed after {time.monotonic() - gone_at:.1f} s")
    life = group.ended(SAVING_S + SPARE_S)
    assert life.codes[1 - victim] == RETRY, (life.codes, life.output)
    assert life.codes[victim] == (RETRY if what == "cut" else -9), (life.codes, life.output)
    assert (exit_note(config)["code"], exit_note(config)["kind"]) == (RETRY, "retryable")
    assert_whole(config)
    done["hosts lost"] += 1
    alone = live(config, 1)
    assert alone.codes == [0], alone.output
    assert_fed_once(config, STEPS, EPOCHS)


def assert_whole(config: Path) -> None:
    """Each checkpoint that is there is sound."""
    run = load_config(config).run_folder
    steps = committed(config)
    assert steps in ([2], [2, 4]) and newest(World(), run).manifest.step == steps[-1] and not (run / "quarantine").exists()


def on_both(hosts: Hosts, config: Path, fault: str, **env: str) -> list[Launched]:
    """clusters/torchrun.sh with the same words on each host, one rank a host."""
    env = {"HEAD": ADDRESSES[0], "HOSTS": "2", "RANKS": "1", "FED": str(config.parent / "fed")} | env
    return [Launched([*hosts.prefix(host), "clusters/torchrun.sh"], config, "--retry-anyway", fault=fault, **env) for host in (0, 1)]


@pytest.mark.parametrize("what", ["cut", "killed"] if TORTURE else ["cut"])
def test_torchrun_meets_trains_and_ends_on_both_hosts_when_one_goes_and_the_ledger_stays_exact(hosts, config, what):
    first, second = on_both(hosts, config, fault="step:all:5:hold")
    with first, second:
        _, cut_off = first.reached(0, 1)
        hosts.pull(1) if what == "cut" else hosts.kill(1)
        first.go()
        gone_at = time.monotonic()
        first.process.wait(HANG_S + SPARE_S)
        print(f"torchrun, {what}: the first host has ended after {time.monotonic() - gone_at:.1f} s")
        second.until(lambda: cut_off not in second.alive(), "its rank has ended", SPARE_S)  # torchrun itself waits on for the other host
        print(f"torchrun, {what}: the other's rank after {time.monotonic() - gone_at:.1f} s")
    assert first.process.returncode == 1, first.output + second.output
    assert "127.0.1.1" not in first.output + second.output
    assert exit_note(config)["code"] == RETRY, first.output
    assert_whole(config)
    assert live(config, 1).codes == [0]
    assert_fed_once(config, STEPS, EPOCHS)
    verify = [sys.executable, "tools/ledger.py", "verify", load_config(config).run_folder]
    audit = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr


@torture
@pytest.mark.parametrize("what", ["cut", "killed"])
def test_with_a_range_of_hosts_the_one_that_is_left_goes_on_by_itself(hosts, config, what):
    first, second = on_both(hosts, config, "step:1:5:hold", HOSTS="1:2", RESTARTS="1")
    with first, second:
        second.reached(1)
        hosts.pull(1) if what == "cut" else hosts.kill(1)
        gone_at = time.monotonic()
        assert first.process.wait(120) == 0, first.output  # torchrun gives up a host after 15 s and waits 30 s for others
        print(f"torchrun, 1:2, {what}: done without the other after {time.monotonic() - gone_at:.1f} s")
    assert first.output.count("little starts at step 0") == 1 and "saved on 2 ranks" in first.output
    assert_fed_once(config, STEPS, EPOCHS)


@torture
def test_deepspeed_with_a_hostfile_trains_on_both_hosts(hosts, config, tmp_path):
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    words = [BIN / "deepspeed", "--hostfile", tmp_path / "hostfile", "--no_ssh", "--master_addr", ADDRESSES[0]]
    first, second = (
        Launched([*hosts.prefix(host), *words, "--node_rank", host], config, "zero_stage=2", FED=str(tmp_path / "fed"))
        for host in (0, 1)
    )
    with first, second:
        output = first.ended() + second.ended()
    assert (first.process.returncode, second.process.returncode) == (0, 0), output
    assert_fed_once(config, STEPS, EPOCHS)
