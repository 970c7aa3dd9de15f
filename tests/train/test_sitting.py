"""What a sitting leaves behind beside its checkpoints: metrics, TensorBoard, the log of sittings, the view of the ledger."""

import json
import time
from datetime import timedelta

import pytest
from little_run import losses, make_run, message_of, sit
from ranks import run_ranks

from llm.checkpoint import folder
from llm.config import load_config
from llm.dist import World
from llm.train.budget import Sitting
from llm.train.datasets import DatasetTokens


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


def sit_go_back_and_sit(world: World, config: str) -> None:
    settings = ["tensorboard=true", "save_every=4", "eval_every=0"]
    sit(world, config, settings, steps_today=6)  # saves at 4 and 6
    sit(world, config, settings, steps_today=3, from_step=4)


def die_and_sit(world: World, config: str) -> None:
    """Seven steps of which four are in a checkpoint, and once more; the first end is one that sees to nothing."""
    from llm.train import loop

    class Died(BaseException):
        pass

    collect, calls = loop.collect_garbage, iter(range(1, 100))

    def die(step):
        if next(calls) == 7:
            raise Died
        collect(step)

    loop.collect_garbage = die
    with pytest.raises(Died):
        sit(world, config, ["tensorboard=true", "save_every=4", "eval_every=0"])
    sit(world, config, ["tensorboard=true", "save_every=4", "eval_every=0"])


@pytest.mark.parametrize(("work", "steps"), [(sit_go_back_and_sit, 7), (die_and_sit, 10)])
def test_tensorboard_shows_each_step_once_after_a_kill_and_after_going_back(tmp_path, work, steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_run(tmp_path)
    run_ranks(work, 1, tmp_path, str(config))
    board = EventAccumulator(str(run_of(config) / "logs" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, steps + 1))
    last = losses(config)
    assert [e.value for e in board.Scalars("train/loss")] == [pytest.approx(last[step]) for step in range(1, steps + 1)]


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
            raise RuntimeError("a fault, for the test")
        return original(self, *args)

    TorchEngine._loss = failing
    try:
        sit(world, config)
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_an_error_between_two_updates_saves_first_and_is_raised(tmp_path):
    config = make_run(tmp_path)
    assert run_ranks(fail_in_the_fourth_step, 1, tmp_path, str(config)) == ["a fault, for the test"]
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_three_refused_updates_in_a_row_stop_the_run_without_saving_them(tmp_path, ranks):
    config = make_run(tmp_path)
    told = run_ranks(lose_the_loss_in_the_third_step, ranks, tmp_path, str(config), 3)
    assert len(set(told)) == 1 and told[0].startswith("3 updates in a row") and "Nothing was saved since step 0" in told[0]
    assert not folder.entries(run_of(config))
    logs = [(run_of(config) / "logs" / f"rank-{rank}.log").read_text() for rank in range(ranks)]
    assert [log.count("ERROR 3 updates in a row") for log in logs] == ([1, 0] if ranks == 2 else [0]), "of several ranks one tells it"


def run_away(world: World, config: str) -> str:
    return message_of(world, config, ["lr=1e30", "warmup_steps=0", "eval_every=1"])


def test_a_run_whose_weights_run_away_ends_with_what_a_person_can_do_though_it_validates_them(tmp_path):
    told = run_ranks(run_away, 2, tmp_path, str(make_run(tmp_path)))
    assert all(t.startswith("NeedsAPerson: 3 updates in a row were refused") and "Lower train.lr" in t for t in told), told


def test_a_run_goes_on_when_its_logs_cannot_be_written_and_says_so_once_for_each(tmp_path):
    config = make_run(tmp_path)
    logs = run_of(config) / "logs"
    logs.mkdir(parents=True)
    names = ("metrics.jsonl", "starts.jsonl", "sittings.jsonl")
    for name in names:
        (logs / name).symlink_to("/dev/full")
    assert run_ranks(sit, 1, tmp_path, str(config))[0]["step"] == 10
    told = (logs / "rank-0.log").read_text()
    assert [told.count(f"{logs / name}: cannot be written (No space left on device)") for name in names] == [1, 1, 1]


def fill_the_disk_under_tensorboard(world: World, config: str) -> str:
    import resource

    from llm.train.metrics import Metrics

    cfg = load_config(config, ["tensorboard=true", "vocab_size=2048"])
    cfg.log_folder.mkdir(parents=True)
    metrics = Metrics(cfg, world, Sitting(0.0), DatasetTokens({}))
    metrics.start(0, {"config": {}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    metrics.page("a", "text", 1)
    metrics.close()
    return "went on"


def test_a_disk_that_is_full_ends_tensorboard_and_not_training(tmp_path):
    assert run_ranks(fill_the_disk_under_tensorboard, 1, tmp_path, str(make_run(tmp_path))) == ["went on"]


def tell_many_steps_on_rank_1(world: World, config: str) -> int:
    from llm.train.metrics import Metrics, StepRecord

    if world.rank == 0:
        return 0
    metrics = Metrics(load_config(config, ["vocab_size=2048"]), world, Sitting(0.0), DatasetTokens({}))
    for step in range(100):
        metrics.step(step, None, StepRecord(1.0, 1.0, 1.0, targets=1, tokens=1, seconds=1.0, data_wait_s=0.0))
    return len(metrics._window)


def test_ranks_that_tell_nothing_keep_nothing_of_their_steps(tmp_path):
    config = make_run(tmp_path)
    assert run_ranks(tell_many_steps_on_rank_1, 2, tmp_path, str(config)) == [0, 0]


def with_another_rate_on_rank_1(world: World, config: str) -> str:
    return message_of(world, config, ["lr=0.5"] if world.rank else [])


def test_ranks_that_were_started_with_other_settings_are_refused_together(tmp_path):
    config = make_run(tmp_path)
    told = run_ranks(with_another_rate_on_rank_1, 2, tmp_path, str(config))
    assert told == ["ConfigError: train.lr is 0.01 on rank 0, but 0.5 on rank 1. Start all ranks with one config and one command."] * 2
    assert not run_of(config).exists()


def late_in_a_step(world: World, config: str) -> str:
    """All groups begin with a time-out of 0.5 s; rank 1 takes longer than that for a step, and less than train.hang_timeout_s."""
    import torch.distributed as torch_dist

    from llm.train import loop

    for group in (world.group, torch_dist.group.WORLD):
        torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), group)
    digest = loop.step_digest

    def late(batches):
        if world.rank == 1:
            time.sleep(0.8)
        return digest(batches)

    loop.step_digest = late
    return message_of(world, config, ["train.hang_timeout_s=20", "eval_every=0", "batch_tokens=320"])


def test_ranks_wait_for_each_other_as_long_as_the_config_says_and_not_as_their_groups_began(tmp_path):
    assert run_ranks(late_in_a_step, 2, tmp_path, str(make_run(tmp_path))) == ["went on"] * 2
