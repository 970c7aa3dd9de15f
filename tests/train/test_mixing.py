"""Runs that draw old data again beside the new, or one dataset more often than another."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from little_run import SEQ_LEN, add_shard, fed_by_step, fed_targets, make_run, newest_ledger, sit, targets_of_the_corpus
from ranks import run_ranks

from llm.config import ConfigError, check_config
from llm.data.ledger import Ledger
from llm.data.shards import Shard
from llm.train.phases import Wish, choose_phase, for_the_next_phase

ROOT = Path(__file__).parents[2]
CORPUS = targets_of_the_corpus((0, 150), (200, 341))


def old_then_new(world, config: str, fed: str) -> dict:
    sit(world, config, [], fed)
    root = Path(config).parent
    if world.rank == 0:
        add_shard(root / "data", root / "tokenizer", 500, 1000)
    world.barrier()
    sit(world, config, [], fed, only_new=True, replay=0.25, steps_today=3)
    return sit(world, config, [], fed, only_new=True, replay=0.25)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("replay")
    config = make_run(tmp_path)
    run_ranks(old_then_new, 2, tmp_path, str(config), str(tmp_path / "fed"))
    return config


def test_with_replay_the_new_text_is_seen_once_and_the_old_evenly_by_its_part(replayed):
    fed = fed_targets(replayed.parent / "fed") - CORPUS
    new = Counter({token: n for token, n in fed.items() if token >= 500})
    assert new == targets_of_the_corpus((500, 1000))
    old = fed - new
    assert set(old.values()) == {1}, "no old sample comes twice before all have come"
    assert abs(old.total() / fed.total() - 0.25) < 0.02


def test_each_step_of_a_phase_with_replay_has_its_part_of_old_text(replayed):
    steps = list(fed_by_step(replayed.parent / "fed").values())[10:-1]
    old_rows = [sum(token < 500 for token in step) / SEQ_LEN for step in steps]
    assert len(steps) > 15 and all(0 <= rows <= 2 for rows in old_rows) and 0.5 < sum(old_rows) / len(steps) < 1.5


def test_the_ledger_of_a_replay_is_verified_and_names_its_parts(replayed):
    run = str(replayed.parent / "checkpoints" / "little")
    for command, told in (("verify", "everything agrees"), ("show", "25.00 %  of the samples from replay")):
        done = subprocess.run([sys.executable, "tools/ledger.py", command, run], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and told in done.stdout, done.stdout + done.stderr
    assert [(s.name, s.is_replay) for s in newest_ledger(replayed).phases[-1].shares] == [("new", False), ("replay", True)]


def settings(**weights: int):
    model = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_ff": 8, "seq_len": SEQ_LEN}
    data = {"data_path": {"a": "a", "b": "b"}, "weights": weights}
    return check_config({"model": model, "tokenizer": {"tokenizer_path": "t"}, "data": data, "train": {"lr": 1, "batch_size": 1}}, "here")


@pytest.fixture
def datasets(tmp_path) -> dict[str, list[Shard]]:
    tokenizer = json.loads(make_run(tmp_path).read_text())["tokenizer_path"]
    ranges = {"a": (0, 40), "b": (100, 260), "c": (300, 330)}
    return {name: [Shard.open(add_shard(tmp_path / name, Path(tokenizer), *ends))] for name, ends in ranges.items()}


def test_datasets_with_weights_are_drawn_in_proportion_until_each_was_passed(datasets):
    two = {name: datasets[name] for name in "ab"}
    phase = choose_phase(Ledger(), two, Wish(), settings(a=1, b=3), 0, 4).open_phase
    assert [(s.name, s.weight, s.n_shards) for s in phase.shares] == [("a", 1, 1), ("b", 3, 1)]
    assert phase.total == pytest.approx(20 * 4 / 3, abs=1)  # b's 20 samples take the longest


def test_the_part_of_old_data_is_that_asked_for_whatever_the_weights_of_the_new(datasets):
    ledger = choose_phase(Ledger(), {"c": datasets["c"]}, Wish(), settings(), 0, 4)
    ledger = ledger.advance(ledger.open_phase.total, 1)
    phase = choose_phase(ledger, datasets, Wish(only_new=True, replay=0.1), settings(a=1, b=3), 1, 4).open_phase
    weights = [s.weight for s in phase.shares]
    assert [s.name for s in phase.shares] == ["a", "b", "replay"]
    assert (weights[2] / sum(weights), weights[1] / weights[0]) == (0.1, 3)


def test_settings_that_come_too_late_for_an_open_phase_are_named(datasets):
    two = {name: datasets[name] for name in "ab"}
    even, weighted = (choose_phase(Ledger(), two, Wish(), settings(**weights), 0, 4).open_phase for weights in ({}, {"a": 2, "b": 6}))
    for phase, weights, named in (
        (even, {}, []), (even, {"a": 1}, ["data.weights {'a': 1}"]), (weighted, {"a": 2, "b": 6}, []), (weighted, {"a": 1, "b": 3}, []),
        (weighted, {}, ["data.weights {}"]), (weighted, {"a": 1, "b": 2}, ["data.weights {'a': 1, 'b': 2}"]),
    ):  # fmt: skip
        assert for_the_next_phase(phase, settings(**weights)) == named
    ledger = choose_phase(Ledger(), {"c": datasets["c"]}, Wish(), settings(), 0, 4)
    ledger = ledger.advance(ledger.open_phase.total, 1)
    for weights in ({}, {"a": 1, "b": 3}):
        replayed = choose_phase(ledger, datasets, Wish(only_new=True, replay=0.1), settings(**weights), 1, 4).open_phase
        assert for_the_next_phase(replayed, settings(**weights)) == []


@pytest.mark.parametrize(("wish", "weights", "told"), [
    ({"replay": 0.1}, {}, "goes with --only-new"),
    ({"replay": 1.0, "only_new": True}, {}, "--replay is 1"),
    ({"replay": 0.1, "only_new": True, "reset_epoch": True}, {}, "without --reset-epoch"),
    ({}, {"x": 2}, "data.weights: x is none of the datasets in data.data_path: a, b, c"),
])  # fmt: skip
def test_what_cannot_be_mixed_is_refused(datasets, wish, weights, told):
    with pytest.raises(ConfigError, match=told):
        choose_phase(Ledger(), datasets, Wish(**wish), settings(**weights), 0, 4)


def test_replay_without_the_old_files_is_refused(datasets):
    ledger = choose_phase(Ledger(), {"c": datasets["c"]}, Wish(), settings(), 0, 4)
    ledger = ledger.advance(ledger.open_phase.total, 1)
    with pytest.raises(ConfigError, match="no shard of an earlier phase is in data.data_path"):
        choose_phase(ledger, {"a": datasets["a"]}, Wish(only_new=True, replay=0.1), settings(), 1, 4)
