"""What a launcher and the next sitting learn of an end: the exit code, exit.json, hangs that end, retries that do not go on for ever."""

import json
from pathlib import Path

import pytest
from launched import Launched
from little_run import make_run

from llm.cli import MISTAKE, NEEDS_A_PERSON

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def config(tmp_path) -> Path:
    return make_run(tmp_path, epochs=1000, save_every=2)


def exit_note(config: Path) -> dict:
    return json.loads((config.parent / "checkpoints/little/logs/exit.json").read_text())


def test_a_sitting_that_is_over_leaves_0_and_a_mistake_leaves_2(config):
    with Launched("python", config, "--steps-today", "3") as run:
        run.ended()
        note = exit_note(config)
        assert (run.process.returncode, note["code"], note["kind"], note["step"]) == (0, 0, "done", 3)
        assert note["why"] == "--steps-today 3 done" and note["pid"] == run.process.pid and note["host"]
    with Launched("python", config, "lr=1") as run:
        run.ended()
        assert run.process.returncode == MISTAKE


def test_a_slow_rank_that_goes_on_in_time_is_not_a_hang(config):
    with Launched("torchrun", config, "hang_timeout_s=20", "--steps-today", "4", fault="step:1:3:hold") as run:
        run.reached(1)
        run.go()
        output = run.ended()
    assert exit_note(config)["code"] == 0 and run.process.returncode == 0, output


def test_restarts_without_progress_end_with_a_refusal_until_told_to_retry(config):
    with Launched("torchrun", config, "save_every=0", fault="step:all:2:crash", PET_MAX_RESTARTS="3") as run:
        output = run.ended()
    assert "all failed" in output, output  # the fourth start
    with Launched("python", config, fault="step:all:2:crash") as run:
        output = run.ended()
    assert run.process.returncode == NEEDS_A_PERSON, output
    assert "all failed" in output and "--retry-anyway" in output
    assert (exit_note(config)["code"], exit_note(config)["kind"]) == (NEEDS_A_PERSON, "permanent")
    with Launched("python", config, "--retry-anyway", "--steps-today", "3") as run:
        run.ended()
    assert (run.process.returncode, exit_note(config)["step"]) == (0, 3)
    with Launched("python", config, "--steps-today", "1") as run:
        run.ended()
    assert run.process.returncode == 0
