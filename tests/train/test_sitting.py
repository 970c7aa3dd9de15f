"""What a sitting leaves behind beside its checkpoints: metrics, TensorBoard, the log of sittings, the view of the ledger."""

import json
from pathlib import Path

import pytest
from little_run import make_run, sit
from ranks import run_ranks

from llm.checkpoint import folder
from llm.config import load_config
from llm.dist import World


def run_of(config):
    return load_config(config).run_folder


def sit_with_tensorboard(world: World, config: str) -> dict:
    return sit(world, config, ["tensorboard=true"])


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_run(tmp_path)
    run_ranks(sit_with_tensorboard, 2, tmp_path, str(config))
    logs = run_of(config) / "logs"
    records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(logs / "tensorboard"))
    board.Reload()
    for key in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/bits_per_byte"):
        written = [(r["step"], r[key]) for r in records if key in r]
        assert written and [(e.step, pytest.approx(e.value)) for e in board.Scalars(key)] == written


def sit_twice(world: World, config: str) -> None:
    sit(world, config, steps_today=3)
    sit(world, config)


def test_each_sitting_adds_a_line_that_says_from_where_to_where_and_why_it_ended(tmp_path):
    config = make_run(tmp_path)
    run_ranks(sit_twice, 1, tmp_path, str(config))
    first, second = map(json.loads, (run_of(config) / "logs" / "sittings.jsonl").read_text().splitlines())
    assert (first["from_step"], first["to_step"], first["why"]) == (0, 3, "--steps-today 3 done")
    assert (second["from_step"], second["to_step"], second["why"]) == (3, 10, "phase finished")
    assert first["tokens"] + second["tokens"] == 289  # every target of the corpus
    assert second["loss_last"] < first["loss_first"]


def tokens_today(world: World, config: str, tokens: int) -> int:
    return sit(world, config, tokens_today=tokens)["step"]


@pytest.mark.parametrize(("tokens", "steps"), [(61, 2), (62, 3), (93, 3), (94, 4)])
def test_tokens_today_ends_after_the_step_that_reaches_them(tmp_path, tokens, steps):
    config = make_run(tmp_path)  # the first three steps have 29, 32 and 32 targets
    assert run_ranks(tokens_today, 2, tmp_path, str(config), tokens)[0] == steps
    (sitting,) = map(json.loads, (run_of(config) / "logs" / "sittings.jsonl").read_text().splitlines())
    assert (sitting["why"], sitting["to_step"]) == (f"--tokens-today {tokens} done", steps)


def test_the_view_of_the_ledger_names_the_files_with_percentages_and_steps(tmp_path):
    config = make_run(tmp_path)
    run_ranks(sit_twice, 1, tmp_path, str(config))
    (phase,) = json.loads((run_of(config) / "seen_datasets.json").read_text())["phases"]
    assert (phase["state"], phase["first_step"], phase["last_step"], phase["percent_done"]) == ("done", 1, 10, 100.0)
    assert {f["file"]: f["percent_seen"] for f in phase["files"]} == {"train-00000.bin": 100.0, "train-00200.bin": 100.0}


def fail_in_the_fourth_step(world: World, config: str) -> str:
    from llm.engine.torch_engine import TorchEngine

    original, calls = TorchEngine._loss, iter(range(1000))

    def failing(self, *args):
        if self.model.training and next(calls) == 3 * 4 + 2:  # four micro-batches a step
            raise RuntimeError("out of memory, for the test")
        return original(self, *args)

    TorchEngine._loss = failing
    try:
        sit(world, config)
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_an_error_between_two_updates_saves_first_and_is_raised(tmp_path):
    config = make_run(tmp_path)
    assert run_ranks(fail_in_the_fourth_step, 1, tmp_path, str(config)) == ["out of memory, for the test"]
    assert [e.step for e in folder.entries(run_of(config))] == [3]
    whole = make_run(tmp_path / "whole")
    (resumed,), (never_stopped,) = (run_ranks(sit, 1, tmp_path, str(c)) for c in (config, whole))
    assert resumed["state"] == never_stopped["state"]


def lose_the_loss_in_the_third_step(world: World, config: str, times: int) -> str:
    from llm.engine.torch_engine import TorchEngine
    from llm.train.exits import NeedsAPerson

    original, steps = TorchEngine.train_step, iter(range(1000))

    def failing(self, batches, n_targets, lr, accept):
        bad = 2 <= next(steps) < 2 + times
        return original(self, batches, n_targets, lr, (lambda loss: accept(float("nan"))) if bad else accept)

    TorchEngine.train_step = failing
    try:
        sit(world, config)
    except NeedsAPerson as error:
        return str(error)
    return "finished"


def test_an_update_that_is_not_finite_is_refused_and_noted_with_its_samples(tmp_path):
    config = make_run(tmp_path)
    assert run_ranks(lose_the_loss_in_the_third_step, 2, tmp_path, str(config), 1) == ["finished"] * 2
    (phase,) = json.loads((run_of(config) / "seen_datasets.json").read_text())["phases"]
    (skipped,) = phase["samples_skipped"]
    assert (skipped["start"], skipped["stop"], skipped["step"]) == (8, 12, 3)


def test_three_refused_updates_in_a_row_stop_the_run_without_saving_them(tmp_path):
    config = make_run(tmp_path)
    first, second = run_ranks(lose_the_loss_in_the_third_step, 2, tmp_path, str(config), 3)
    assert first == second and first.startswith("3 updates in a row")
    assert not folder.entries(run_of(config))


def begin_afresh(world: World, config: str) -> int:
    sit(world, config, steps_today=2)
    return sit(world, config, fresh=True, steps_today=3)["step"]


def test_a_run_of_bare_ids_begins_afresh_though_its_shard_lay_in_the_folder_that_is_moved(tmp_path):
    ids = tmp_path / "mine.jsonl"
    ids.write_text("".join(f"[{n}, {n + 1}, 0]\n" for n in range(1, 60)))
    config = make_run(tmp_path, data_path=str(ids), save_bin=False)
    assert run_ranks(begin_afresh, 1, tmp_path, str(config)) == [3]
    assert len(list((tmp_path / "checkpoints").glob("little.before-*"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_logs_on_a_full_disk_lose_their_lines_and_training_goes_on(tmp_path):
    config = make_run(tmp_path)
    logs = run_of(config) / "logs"
    logs.mkdir(parents=True)
    for name in ("metrics.jsonl", "sittings.jsonl", "starts.jsonl"):
        (logs / name).symlink_to("/dev/full")
    run_ranks(sit, 1, tmp_path, str(config))
    assert folder.entries(run_of(config))[-1].step == 10
    told = (logs / "rank-0.log").read_text()
    assert told.count("what is told there is lost for now") == 1 and "No space left on device" in told
