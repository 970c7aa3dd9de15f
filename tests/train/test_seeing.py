"""What a run shows of itself: metrics in groups, TensorBoard, samples, profiles, time left. None of it changes what is learned."""

import functools
import gzip
import json
import re
import time
from pathlib import Path
from unittest import mock

import pytest
from little_run import add_shard, make_run, make_tokenizer, sit, sit_alone
from ranks import run_ranks

from llm.config import ConfigError, load_config
from llm.data.ledger import Ledger
from llm.data.manifest import find_shards
from llm.data.phase import Phase, Portion
from llm.train.budget import Sitting
from llm.train.datasets import DatasetTokens

PROMPTS = ["w1 w2", "w7 <b> `w8`"]
Z_LOSS = ["model.z_loss=0.01"]  # is there in training mode only, so a model that is left in the other one learns something else
ALL_ON = [*Z_LOSS, "log.profile=[3, 5]", f"log.sample_prompts={json.dumps(PROMPTS)}", "log.sample_tokens=4", "log.tensorboard=true", "save_every=2"]


def logs(config: Path) -> Path:
    return load_config(config).log_folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sit_with_samples(world, config: str, overrides: list[str]) -> dict:
    from llm.generate.samples import write_samples

    return sit(world, config, overrides, write_samples=write_samples)


@pytest.fixture(scope="module")
def seen_run(tmp_path_factory) -> tuple[Path, dict]:
    """A run with all that can be shown, and the state it ends in."""
    root = tmp_path_factory.mktemp("seen")
    config = make_run(root)
    (ended,) = run_ranks(sit_with_samples, 1, root, str(config), ALL_ON)
    return config, ended


def test_profiling_and_samples_change_no_bit_of_what_is_learned(seen_run, tmp_path):
    plain = sit_alone(tmp_path, make_run(tmp_path), Z_LOSS)
    assert seen_run[1] == plain | {"ledger": seen_run[1]["ledger"]}
    assert seen_run[1]["state"] and seen_run[1]["step"] == 10


def test_a_profile_has_a_trace_of_exactly_these_steps_and_the_ten_costliest_operations(seen_run):
    folder = logs(seen_run[0])
    assert sorted(path.name for path in folder.glob("profile-*")) == ["profile-3-5.json.gz", "profile-3-5.txt"]
    events = json.loads(gzip.decompress((folder / "profile-3-5.json.gz").read_bytes()))["traceEvents"]
    assert {e["name"] for e in events if str(e.get("name")).startswith("step ")} == {"step 3", "step 4", "step 5"}
    table = (folder / "profile-3-5.txt").read_text().splitlines()
    assert len(table) == 11 and "_HeadLoss" in "\n".join(table)
    shares = [float(row.split("%")[0]) for row in table[1:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) < 100


def test_metrics_come_in_groups_and_time_is_divided_without_rest(seen_run):
    steps = [r for r in lines(logs(seen_run[0]) / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    wanted = {"train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_s", "memory/host_gb", "memory/host_peak_gb", "data/data_tokens"}
    for record in steps:
        assert wanted <= record.keys()
        shares = {key: value for key, value in record.items() if key.endswith("_share")}
        assert len(shares) == 5 and sum(shares.values()) == pytest.approx(1)
    assert [r["step"] for r in steps if r["time/validating_share"]] == [6], "step 5 ended with validation, and step 10 is the last one noted"
    assert steps[-1]["data/data_tokens"] == 149 + 140, "every token but each shard's first"


def stop_before_the_profile(world, config: str) -> dict:
    return sit(world, config, ["log.profile=[3, 5]"], steps_today=2)


def test_a_sitting_that_ends_where_a_profile_would_begin_leaves_none(tmp_path):
    config = make_run(tmp_path)
    assert run_ranks(stop_before_the_profile, 1, tmp_path, str(config))[0]["step"] == 2
    assert not list(logs(config).glob("profile-*"))


def sit_three_times(world, config: str) -> None:
    for settings in (["activation_checkpointing=0.5"], ["activation_checkpointing=0.1", "epochs=3"], []):
        sit(world, config, settings, steps_today=1)


def test_the_first_lines_tell_how_many_blocks_are_recomputed_and_of_epochs_that_come_too_late_for_the_phase(tmp_path):
    config = make_run(tmp_path)
    run_ranks(sit_three_times, 1, tmp_path, str(config))
    told = (logs(config) / "rank-0.log").read_text()
    assert told.count(" RESULT This sitting:\n") == 3
    assert re.findall(r"\d of \d blocks recomputed", told) == ["1 of 2 blocks recomputed", "0 of 2 blocks recomputed"]
    assert re.findall(r"x 1 epochs (\(.*?\))", told) == ["(train.epochs 3 is for the next phase)"]


def sit_compiled(world, config: str, overrides: list[str]) -> dict:
    import torch

    with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
        return sit(world, config, overrides)


def test_the_time_of_the_first_step_is_told_where_it_compiles_and_nowhere_else(seen_run, tmp_path):
    config = make_run(tmp_path)
    run_ranks(sit_compiled, 1, tmp_path, str(config), ["engine.compile=true"])
    told = (logs(config) / "rank-0.log").read_text()
    assert len(re.findall(r"the first step took \d+\.\d s, compiling included", told)) == 1
    assert "the first step took" not in (logs(seen_run[0]) / "rank-0.log").read_text()


def test_tensorboard_has_the_same_names_and_the_texts(seen_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(logs(seen_run[0]) / "tensorboard"))
    board.Reload()
    noted = {key for r in lines(logs(seen_run[0]) / "metrics.jsonl") for key in r} - {"step", "time"}
    assert set(board.Tags()["scalars"]) == noted
    texts = {tag.removesuffix("/text_summary"): board.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert texts.keys() >= {"config", "environment", "ledger", "samples/1", "samples/2"}
    assert "    d_model: 32" in texts["config"] and "phase p0 (data), done: 100.00 %" in texts["ledger"]
    assert all(line.startswith("    ") for line in texts["samples/2"].splitlines()), "shown as it is, whatever markdown it looks like"


def test_samples_are_written_at_each_validation_and_starts_tell_machine_and_config(seen_run):
    samples = lines(logs(seen_run[0]) / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(step, prompt) for step in (5, 10) for prompt in PROMPTS]
    assert all(s["text"].startswith("w") for s in samples)
    (start,) = lines(logs(seen_run[0]) / "starts.jsonl")
    assert start["step"] == 0 and start["ranks"] == 1 and start["config"]["model"]["vocab_size"] == 2048 and start["versions"]["torch"]


def test_a_sample_is_what_generation_from_the_checkpoint_of_its_step_writes(seen_run):
    from llm.generate.generator import Writing, prompt_ids
    from llm.generate.load import load_run
    from llm.generate.samples import SAMPLING

    model, tokenizer, checkpoint = load_run(load_config(seen_run[0]).run_folder)
    for sample in lines(logs(seen_run[0]) / "samples.jsonl")[-2:]:
        ids = prompt_ids(tokenizer, sample["prompt"], False)
        text = "".join(Writing(model, tokenizer, ids, max_tokens=4, sampling=SAMPLING, seed=1337))
        assert (sample["step"], sample["text"]) == (checkpoint.manifest.step, text)


def sit_with_failing_samples(world, config: str) -> dict:
    def out_of_memory(*args):
        raise MemoryError("no room")

    return sit(world, config, ["zero_stage=2"], write_samples=out_of_memory, steps_today=6)


def test_samples_that_cannot_be_written_do_not_end_training(tmp_path):
    config = make_run(tmp_path)
    assert [r["step"] for r in run_ranks(sit_with_failing_samples, 2, tmp_path, str(config))] == [6, 6]
    assert "MemoryError: no room" in (logs(config) / "rank-0.log").read_text()


@pytest.mark.parametrize("value", ["[5, 3]", "[0, 3]", "5", "[1, 500]", "[1, 2, 3]", "[1.5, 2]", "[true, 2]"])
def test_a_range_of_steps_that_makes_no_sense_is_refused_with_an_example(tmp_path, value):
    with pytest.raises(ConfigError, match=r"log\.profile is .*such as \[10, 15\], at most 100"):
        load_config(make_run(tmp_path), [f"log.profile={value}"])


def test_tokens_are_counted_for_each_dataset_whatever_the_phase_pools(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    for name, first, last in (("a", 0, 80), ("b", 100, 120), ("c", 200, 209)):
        add_shard(tmp_path / name, tokenizer, first, last)
    datasets = {name: find_shards([str(tmp_path / name)], "train") for name in "abc"}
    everything = [shard for found in datasets.values() for shard in found]
    ledger = Ledger().open(Phase.mix("p0", 1, 2, 8, [Portion("", 1, everything)], "a, b, c"))
    counter, total = DatasetTokens(datasets), ledger.open_phase.total
    for _ in range(total // 2):
        ledger = ledger.advance(1, 1)
    assert counter.of(ledger) == {"a": 79, "b": 19, "c": 8}, "one whole pass"
    ledger = ledger.advance(total - total // 2, 2)
    assert counter.of(ledger) == DatasetTokens(datasets).of(ledger) == {"a": 158, "b": 38, "c": 16}
    moved = DatasetTokens({"a": datasets["a"]})
    assert moved.of(ledger) == {"a": 158, "not_configured": 54}


def test_time_left_is_that_of_the_nearest_limit_of_the_sitting():
    now = time.monotonic()
    sitting = Sitting(started_at=now - 60, minutes=2, tokens=1000)
    assert sitting.pace_s == 0, "one step says nothing"
    sitting.steps_done, sitting.tokens_done, sitting._first_step_at, sitting._last_step_at = 11, 500, now - 20, now
    assert sitting.pace_s == 2
    assert sitting.left_s(steps=3) == pytest.approx(6)
    assert sitting.left_s(steps=1000) == pytest.approx(22), "500 more tokens are 11 steps"
    sitting.tokens = None
    assert sitting.left_s(steps=1000) == pytest.approx(60, abs=1)
