"""What a launcher and the next sitting learn of an end: the exit code, exit.json, and retries that do not go on for ever."""

from pathlib import Path

import pytest
from launched import Launched
from little_run import make_run
from lives import exit_note, live, start

from llm.cli import NEEDS_A_PERSON

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def config(tmp_path) -> Path:
    return make_run(tmp_path, epochs=1000, save_every=2)


def test_a_sitting_that_is_over_leaves_0(config):
    assert live(config, 1, steps_today=3).codes == [0]
    note = exit_note(config)
    assert (note["code"], note["kind"], note["step"]) == (0, "done", 3)
    assert note["why"] == "--steps-today 3 done" and note["pid"] and note["host"]


def test_a_slow_rank_that_goes_on_in_time_is_not_a_hang(config):
    group = start(config, 2, "hang_timeout_s=20", fault="step:1:3:hold", steps_today=4)
    group.reached(1)
    group.go()
    life = group.ended()
    assert life.codes == [0, 0] and exit_note(config)["code"] == 0, life.output


def test_restarts_without_progress_end_with_a_refusal_until_told_to_retry(config):
    with Launched("torchrun", config, "save_every=0", fault="step:all:2:crash", PET_MAX_RESTARTS="1") as run:
        output = run.ended()
    assert output.count("made for the test") >= 2, output  # it was started twice
    third = live(config, 2, fault="step:all:2:crash", retry_anyway=False)
    assert third.codes == [1, 1] and "all failed" not in third.output, third.output
    fourth = live(config, 2, fault="step:all:2:crash", retry_anyway=False)
    assert fourth.codes == [NEEDS_A_PERSON] * 2, fourth.output
    assert "The last 3 sittings" in fourth.output and "--retry-anyway" in fourth.output
    assert (exit_note(config)["code"], exit_note(config)["kind"]) == (NEEDS_A_PERSON, "permanent")
    assert live(config, 2, steps_today=3, retry_anyway=True).codes == [0, 0] and exit_note(config)["step"] == 3
    assert live(config, 1, steps_today=1, retry_anyway=False).codes == [0]
