"""What a launcher and the next sitting learn of an end: the exit code, exit.json, and retries that do not go on for ever."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from counts import TORTURE, torture
from launched import Launched
from little_run import make_run
from lives import exit_note, live, start

from llm.cli import MISTAKE, NEEDS_A_PERSON, RETRY

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
    crash = "micro_batch:all:1:crash"  # in the first step, so that there is nothing to save
    with Launched("torchrun", config, "save_every=0", fault=crash, PET_MAX_RESTARTS="1") as run:
        output = run.ended()
    assert output.count("made for the test") >= 2, output  # it was started twice
    third = live(config, 2, fault=crash, retry_anyway=False)
    assert third.codes == [1, 1] and "all failed" not in third.output, third.output
    fourth = live(config, 2, fault=crash, retry_anyway=False)
    assert fourth.codes == [NEEDS_A_PERSON] * 2, fourth.output
    assert "The last 3 sittings" in fourth.output and "--retry-anyway" in fourth.output
    assert (exit_note(config)["code"], exit_note(config)["kind"]) == (NEEDS_A_PERSON, "permanent")
    assert live(config, 2, steps_today=3, retry_anyway=True).codes == [0, 0] and exit_note(config)["step"] == 3
    assert live(config, 1, steps_today=1, retry_anyway=False).codes == [0]


# Three ends from step 0 in a row: what is told, its fault, the codes, and whether the fourth start is refused.
ENDS = {
    "killed from outside": ([], "micro_batch:0:1:kill", -signal.SIGKILL, False),
    "killed while loading": ([], "init:0:1:kill", -signal.SIGKILL, False),
    "a file that is not there": (["zero_stage=1", "ds_config=nowhere.json"], "", MISTAKE, False),
    "a DeepSpeed key misspelt": (["zero_stage=1", "ds_config=misspelt.json"], "", MISTAKE, False),
    "more rows than fit": (["zero_stage=3", "batch_size=auto"], "", MISTAKE, False),
    "an exception": ([], "micro_batch:0:1:crash", 1, True),
    "a crash in native code": ([], "micro_batch:0:1:segfault", -signal.SIGSEGV, True),
    "a hang": (["hang_timeout_s=0.5"], "micro_batch:0:1:hang", RETRY, True),
}
SAMPLE = ["killed from outside", "a crash in native code"]


@pytest.mark.parametrize("end", ENDS if TORTURE else SAMPLE)
def test_only_sittings_that_failed_by_themselves_count_against_the_next(config, end, monkeypatch):
    monkeypatch.chdir(config.parent)
    Path("misspelt.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_cliping": 1.0}')
    words, fault, code, is_counted = ENDS[end]
    for _ in range(3):
        life = live(config, 1, *words, fault=fault, retry_anyway=False)
        assert life.codes == [code], life.output
    fourth = live(config, 1, steps_today=1, retry_anyway=False)
    assert fourth.codes == [NEEDS_A_PERSON if is_counted else 0], fourth.output


@torture
def test_failures_are_counted_by_run_and_not_by_folder_of_logs(config, tmp_path):
    for _ in range(3):
        live(config, 1, "out_dir=" + str(tmp_path / "logs"), fault="micro_batch:0:1:crash", retry_anyway=False)
    moved = live(config, 1, "out_dir=" + str(tmp_path / "others"), steps_today=1, retry_anyway=False)
    assert moved.codes == [NEEDS_A_PERSON], moved.output
    assert live(config, 1, "run_name=another", steps_today=1, retry_anyway=False).codes == [0]


def test_two_runs_with_one_folder_of_logs_are_refused_and_nothing_is_mixed(config, tmp_path):
    logs = tmp_path / "logs"
    one = [f"out_dir={logs}", "run_name=one"]
    assert live(config, 1, *one, steps_today=2).codes == [0]
    before = {path.name: path.read_bytes() for path in logs.iterdir()}
    for other in ([f"out_dir={logs}", "run_name=two"], [f"out_dir={logs}", "run_name=two", "zero_stage=1"]):
        life = live(config, 2, *other, steps_today=2)
        assert life.codes == [MISTAKE] * 2 and "checkpoints/one" in life.output, life.output
    assert {path.name: path.read_bytes() for path in logs.iterdir()} == before
    assert live(config, 1, *one, steps_today=2).codes == [0]
    shutil.rmtree(tmp_path / "checkpoints" / "one")  # its logs are nobody's now
    assert live(config, 1, f"out_dir={logs}", "run_name=two", steps_today=2).codes == [0]


@torture
def test_another_runs_own_folder_of_logs_is_refused_also_where_an_earlier_version_left_it_unsigned(config, tmp_path):
    assert live(config, 1, "run_name=one", steps_today=2).codes == [0]
    logs = tmp_path / "checkpoints" / "one" / "logs"
    for _ in range(2):
        life = live(config, 1, f"out_dir={logs}", "run_name=two", steps_today=2)
        assert life.codes == [MISTAKE] and "checkpoints/one" in life.output, life.output
        (logs / "run").unlink(missing_ok=True)
    (tmp_path / "checkpoints" / "one").rename(tmp_path / "checkpoints" / "renamed")
    assert live(config, 1, "run_name=renamed", steps_today=2).codes == [0]


def test_a_fresh_run_leaves_the_logs_of_the_old_one_to_it(config, tmp_path):
    logs = f"out_dir={tmp_path / 'logs'}"
    assert live(config, 1, logs, steps_today=2).codes == [0]
    assert live(config, 1, logs, steps_today=3, fresh=True).codes == [0]
    (aside,) = tmp_path.glob("logs.before-*")
    steps = [[json.loads(line)["step"] for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (aside, tmp_path / "logs")]
    assert steps == [[1, 2], [1, 2, 3]]
