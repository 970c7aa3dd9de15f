"""Asked to stop, in whatever way and at whatever moment: one checkpoint at one step, nobody left behind, twice means now."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from counts import TORTURE
from launched import Launched
from little_run import make_run
from lives import start

from llm.checkpoint import folder

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def config(tmp_path) -> Path:
    return make_run(tmp_path, epochs=1000, eval_every=2, save_every=0)


def checkpoints(config: Path) -> list[int]:
    return [entry.step for entry in folder.entries(config.parent / "checkpoints" / "little")]


def sittings(config: Path) -> list[dict]:
    return [json.loads(line) for line in (config.parent / "checkpoints/little/logs/sittings.jsonl").read_text().splitlines()]


# What is asked: launcher, who is told, with what, the phase that is held on all ranks meanwhile, the step of the one checkpoint afterwards.
# None: the deepspeed command is gone and only looked for twice a second, so the step is not foreseeable.
ASKED = {
    "launcher, SIGTERM, step": ("torchrun", "launcher", signal.SIGTERM, "step:all:3:hold", 3),
    "launcher, SIGINT, eval": ("torchrun", "launcher", signal.SIGINT, "eval:all:1:hold", 2),
    "launcher, SIGHUP, save": ("torchrun", "launcher", signal.SIGHUP, "save:all:1:hold", 2),
    "launcher, SIGUSR1 passed on, step": ("torchrun that passes SIGUSR1 on", "launcher", signal.SIGUSR1, "step:all:3:hold", 3),
    "launcher, SIGUSR1 not passed on, step": ("torchrun", "launcher", signal.SIGUSR1, "step:all:3:hold", 3),
    "launcher, SIGTERM, init": ("torchrun", "launcher", signal.SIGTERM, "init:all:1:hold", 0),
    "worker 1, SIGUSR1, step": ("torchrun", "worker", signal.SIGUSR1, "step:all:3:hold", 3),
    "worker 1, SIGHUP, eval": ("deepspeed", "worker", signal.SIGHUP, "eval:all:1:hold", 2),
    "all at once, SIGINT, step": ("torchrun", "all", signal.SIGINT, "step:all:3:hold", 3),
    "all at once, SIGTERM, save": ("deepspeed", "all", signal.SIGTERM, "save:all:1:hold", 2),
    "launcher, SIGTERM, step, deepspeed": ("deepspeed", "launcher", signal.SIGTERM, "step:all:3:hold", None),
    "launcher, SIGKILL, eval, deepspeed": ("deepspeed", "launcher", signal.SIGKILL, "eval:all:1:hold", None),
    "launcher, SIGKILL, step": ("torchrun", "launcher", signal.SIGKILL, "step:all:3:hold", 3),
    "launcher, SIGTERM, compile": ("torchrun", "launcher", signal.SIGTERM, "compile:all:1:hold", 1),
    "worker 1, SIGINT, init": ("torchrun", "worker", signal.SIGINT, "init:all:1:hold", 0),
    "worker 1, SIGTERM, compile": ("deepspeed", "worker", signal.SIGTERM, "compile:all:1:hold", 1),
    "all at once, SIGTERM, eval": ("torchrun", "all", signal.SIGTERM, "eval:all:1:hold", 2),
    "all at once, SIGINT, init": ("deepspeed", "all", signal.SIGINT, "init:all:1:hold", 0),
    "worker 1, SIGTERM, save": ("torchrun", "worker", signal.SIGTERM, "save:all:1:hold", 2),
    "worker 0, SIGINT, compile, alone": ("python", "worker", signal.SIGINT, "compile:all:1:hold", 1),
    "worker 0, SIGHUP, eval, alone": ("python", "worker", signal.SIGHUP, "eval:all:1:hold", 2),
    "worker 0, SIGUSR1, save, alone": ("python", "worker", signal.SIGUSR1, "save:all:1:hold", 2),
}


# Each takes up to ten seconds, so `make test` takes those that differ most and `make torture` all of them.
SAMPLE = ["launcher, SIGTERM, step", "launcher, SIGUSR1 not passed on, step", "worker 1, SIGHUP, eval", "launcher, SIGKILL, eval, deepspeed"]


@pytest.mark.parametrize("case", ASKED if TORTURE else SAMPLE)
def test_a_signal_ends_every_rank_with_one_checkpoint_and_leaves_no_orphan(config, case):
    name, who, number, fault, expected = ASKED[case]
    ranks = (0,) if name == "python" else (0, 1)
    save = ["save_every=2"] if fault.startswith("save") else []
    with Launched(name, config, *save, fault=fault) as run:
        pids = run.reached(*ranks)
        for pid in {"launcher": [run.process.pid], "worker": [pids[-1]], "all": run.alive()}[who]:
            os.kill(pid, number)
        if number == signal.SIGKILL:
            run.process.wait(10)
        if who == "all" and name == "torchrun":
            run.until(lambda: run.output.count("closing signal") == 2, "torchrun has sent its own copies")
        run.go()
        output = run.ended()
    steps, (sitting,) = checkpoints(config), sittings(config)
    assert sitting["to_step"] == max(steps, default=0) and "go on" in output
    if expected is not None:  # one step may pass before the last rank has noticed
        assert len(steps) == (expected > 0) and sitting["to_step"] - expected in (0, 1), output
    assert "return code = -" not in output
    assert "Traceback" not in (config.parent / "checkpoints/little/logs/rank-0.log").read_text()


@pytest.mark.parametrize("phase", ["step", "save"])
def test_a_second_signal_leaves_at_once_and_nothing_half_published(config, phase):
    fault = {"step": "step:all:3:hold", "save": "save:all:1:hold"}[phase]
    with Launched("python", config, "save_every=2", "async_save=false", fault=fault) as run:  # else one may be on its way
        (pid,) = run.reached(0)
        os.kill(pid, signal.SIGTERM)
        run.until(lambda: "SIGTERM: finishing" in run.output, "the first is noted")

        def gone() -> bool:  # the first two seconds' are the same request
            if run.process.poll() is None:
                os.kill(pid, signal.SIGTERM)
            return run.process.poll() is not None

        run.until(gone, "the second leaves", limit_s=10)
    assert run.process.returncode == 128 + signal.SIGTERM
    assert "saved" not in run.output.rpartition("SIGTERM: finishing")[2]
    assert checkpoints(config) == ([2] if phase == "step" else [])


# Rank 1 is held; rank 0 waits for it in a collective, where no handler of Python's runs.
WAITS = {"in a step": ("step:1:3:hold", []), "in a reduction": ("micro_batch:1:3:hold", []), "in validation": ("eval:1:1:hold", []),
         "in a save": ("save:1:1:hold", []), "at the start": ("init:1:1:hold", []), "ZeRO": ("step:1:3:hold", ["zero_stage=2"])}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if TORTURE else [signal.SIGINT])
@pytest.mark.parametrize("where", WAITS if TORTURE else ["in a step"])
def test_the_second_signal_leaves_at_once_also_while_the_rank_waits_for_others_in_native_code(tmp_path, where, number):
    fault, words = WAITS[where]
    group = start(make_run(tmp_path, epochs=1000, save_every=2, eval_every=2), 2, *words, fault=fault)
    group.reached(1)
    waiting = group.processes[0]
    give_up_at = time.monotonic() + 20
    while waiting.is_alive():  # what comes within two seconds of the first is the same request
        assert time.monotonic() < give_up_at, "it waits on"
        os.kill(waiting.pid, number)
        waiting.join(0.1)
    assert waiting.exitcode == 128 + number
    group.go()
    group.ended()


def test_a_run_whose_terminal_was_closed_saves_all_the_same(config):
    with Launched("python", config, fault="step:all:3:hold") as run:
        (pid,) = run.reached(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), run.process.stdout.fileno())  # nobody holds the reading end of its output any more
        os.kill(pid, signal.SIGHUP)
        run.go()
        run.ended()
    assert checkpoints(config) == [3] and run.process.returncode == 0


def test_under_nohup_a_hangup_changes_nothing(config):
    with Launched("python", config, "--steps-today", "4", fault="step:all:3:hold", NOHUP="1") as run:
        (pid,) = run.reached(0)
        os.kill(pid, signal.SIGHUP)
        run.go()
        run.ended()
    assert checkpoints(config) == [4] and "SIGHUP" not in run.output
