"""The promises of docs/design.md, each kept by real processes. Promises 4 and 8 are also tested engine by engine in tests/engine."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from little_run import (
    CORPUS,
    add_shard,
    fed_by_step,
    fed_targets,
    losses,
    make_run,
    make_tokenizer,
    message_of,
    newest_manifest,
    run_and_kill,
    sit,
    sit_alone,
    sit_with,
    targets_of_the_corpus,
)  # fmt: skip
from ranks import run_ranks

from llm.checkpoint import folder
from llm.checkpoint.slices import CheckpointError
from llm.config import load_config
from llm.data.ledger import Ledger
from llm.data.shards import ShardError
from llm.dist import World

STEPS = 10


# ------------------------------------------------------------------ 1 exactly once, 2 same order, 4 any topology


def test_every_target_is_trained_on_exactly_once_through_other_ranks_stages_and_micro_batches(tmp_path):
    config, fed = make_run(tmp_path), tmp_path / "fed"
    run_ranks(sit_with, 2, tmp_path, str(config), ["zero_stage=2"], str(fed), {"steps_today": 3})
    run_ranks(sit_with, 1, tmp_path, str(config), ["zero_stage=3", "batch_size=2"], str(fed), {"steps_today": 2})
    last = run_ranks(sit_with, 2, tmp_path, str(config), ["zero_stage=0", "batch_size=2"], str(fed), {})[0]
    assert last["step"] == STEPS
    assert fed_targets(fed) == CORPUS
    alone, fed_alone = make_run(tmp_path / "alone"), tmp_path / "fed-alone"
    whole = sit_alone(tmp_path, alone, [], str(fed_alone))
    assert fed_by_step(fed) == fed_by_step(fed_alone)
    assert last["chain"] == whole["chain"]
    for step, loss in losses(alone).items():
        assert losses(config)[step] == pytest.approx(loss, abs=1e-5), step


@pytest.mark.parametrize(("seed", "save"), [(0, "async_save=false"), (1, "async_save=true")])
def test_killed_and_resumed_equals_never_stopped_bit_for_bit_and_still_exactly_once(tmp_path, seed, save):
    whole = sit_alone(tmp_path, make_run(tmp_path / "whole"))
    config, fed = make_run(tmp_path / "killed"), tmp_path / "fed"
    kills, code = random.Random(seed), -signal.SIGKILL
    deaths = 0
    while code == -signal.SIGKILL:  # after 3 to 6 steps, so that a life commits a save, if its writer was quick enough, and loses something
        code = run_and_kill(tmp_path, config, fed, kills.randint(3, 6), save)
        deaths += code == -signal.SIGKILL
    assert code == 0 and deaths >= 1
    manifest = newest_manifest(config)
    assert (manifest.step, manifest.state_hash, manifest.chain) == (STEPS, whole["state"], whole["chain"])
    assert losses(config) == losses(tmp_path / "whole" / "little.json")
    assert fed_targets(fed) == CORPUS


def one_and_two_sittings(world: World, one: str, two: str, settings: list[str]) -> list[dict]:
    whole = sit(world, one, settings)
    sit(world, two, settings, steps_today=4)
    return [whole, sit(world, two, settings)]


@pytest.mark.parametrize(("stage", "ranks", "precision"), [(0, 2, "fp32"), (1, 2, "bf16"), (2, 2, "fp32"), (3, 2, "fp32"), (3, 1, "bf16")])
def test_two_sittings_equal_one_bit_for_bit_on_the_same_topology(tmp_path, stage, ranks, precision):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    settings = [f"zero_stage={stage}", f"precision={precision}"]
    whole, resumed = run_ranks(one_and_two_sittings, ranks, tmp_path, str(one), str(two), settings)[0]
    assert resumed["state"] == whole["state"] and resumed["step"] == whole["step"] == STEPS
    assert losses(two) == losses(one)


# ------------------------------------------------------------------ 1 new files


def test_only_new_trains_on_new_text_alone_however_the_old_is_called(tmp_path):
    config, fed = make_run(tmp_path), tmp_path / "fed"
    sit_alone(tmp_path, config, [], str(fed))
    step = newest_manifest(config).step
    assert sit_alone(tmp_path, config, [], str(fed), only_new=True)["step"] == step  # nothing new: no step, no checkpoint
    add_shard(tmp_path / "data", tmp_path / "tokenizer", 500, 580)
    copy_under_another_name(tmp_path / "data", "train-00000", tmp_path / "more")
    paths = json.dumps([str(tmp_path / "data"), str(tmp_path / "more" / "renamed.bin")])
    result = sit_alone(tmp_path, config, [f"data_path={paths}"], str(fed), only_new=True)
    assert fed_targets(fed) == CORPUS + targets_of_the_corpus((500, 580))
    ledger = Ledger.from_json(result["ledger"])
    assert [len(phase.shards) for phase in ledger.phases] == [2, 1] and ledger.open_phase is None


def copy_under_another_name(data: Path, name: str, target: Path) -> None:
    target.mkdir()
    for path in data.glob(f"{name}.*"):
        (target / path.name.replace(name, "renamed")).write_bytes(path.read_bytes())


def test_only_new_finishes_the_open_phase_first(tmp_path):
    config, fed = make_run(tmp_path), tmp_path / "fed"
    sit_alone(tmp_path, config, [], str(fed), steps_today=3)
    add_shard(tmp_path / "data", tmp_path / "tokenizer", 500, 580)
    sit_alone(tmp_path, config, [], str(fed), only_new=True)
    assert fed_targets(fed) == CORPUS + targets_of_the_corpus((500, 580))


def test_several_epochs_see_everything_that_often_and_reset_epoch_once_more(tmp_path):
    config, fed = make_run(tmp_path, epochs=2), tmp_path / "fed"
    sit_alone(tmp_path, config, [], str(fed))
    assert fed_targets(fed) == CORPUS + CORPUS
    sit_alone(tmp_path, config, ["epochs=1"], str(fed), reset_epoch=True)
    assert fed_targets(fed) == CORPUS + CORPUS + CORPUS


# ------------------------------------------------------------------ 6 rank-consistent


def stop_rank_1_by_signal(world: World, config: str) -> dict:
    from llm.train import loop

    if world.rank == 1:
        original, calls = loop.step_digest, iter(range(100))

        def ask_to_stop_in_the_fourth_step(batches):
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(batches)

        loop.step_digest = ask_to_stop_in_the_fourth_step
    return sit(world, config)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_one_checkpoint(tmp_path):
    config = make_run(tmp_path)
    first, second = run_ranks(stop_rank_1_by_signal, 2, tmp_path, str(config))
    assert first == second and first["step"] in (3, 4)
    assert len(folder.entries(load_config(config).run_folder)) == 1


def damage_one_ranks_data(world: World, config: str) -> str:
    """Rank 1 reads an id beyond the vocabulary in its third step."""
    from llm.data.shards import Shard

    if world.rank == 1:
        original, calls = Shard.read, iter(range(10_000))

        def failing(self, start, stop, into):
            if next(calls) == 12:  # eight rows are the probe's
                raise ShardError(f"{self.meta.path}: damaged for the test")
            return original(self, start, stop, into)

        Shard.read = failing
    try:
        sit(world, config)
    except ShardError as error:
        return f"shard: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_damaged_data_on_one_rank_ends_all_of_them_after_a_save(tmp_path):
    config = make_run(tmp_path)
    first, second = run_ranks(damage_one_ranks_data, 2, tmp_path, str(config))
    assert "damaged for the test" in first and "damaged for the test" in second
    manifest = newest_manifest(config)
    assert 0 < manifest.step < STEPS
    assert Ledger.from_json(manifest.ledger).open_phase.consumed == 4 * manifest.step


# ------------------------------------------------------------------ 7 self-describing


def refused(tmp_path: Path, config: Path, overrides: list[str], error: type) -> str:
    from llm.log import UserError

    (message,) = run_ranks(message_of, 1, tmp_path, str(config), overrides)
    assert message.startswith(error.__name__), message
    assert issubclass(error, UserError)
    return message


def test_another_tokenizer_is_refused_with_both_fingerprints_by_shards_and_by_checkpoints(tmp_path):
    config = make_run(tmp_path)
    from llm.tokenizer import load_tokenizer

    other = make_tokenizer(tmp_path / "other", words=1999)
    prints = [load_tokenizer(tmp_path / name).fingerprint[:16] for name in ("tokenizer", "other")]
    message = refused(tmp_path, config, [f"tokenizer_path={other}"], ShardError)
    assert all(p in message for p in prints)
    sit_alone(tmp_path, config, [], steps_today=1)
    add_shard(tmp_path / "other-data", other, 0, 100)
    message = refused(tmp_path, config, [f"tokenizer_path={other}", f"data_path={tmp_path / 'other-data'}"], CheckpointError)
    assert all(p in message for p in prints)
    renamed = tmp_path / "renamed"
    (tmp_path / "tokenizer").rename(renamed)  # its name does not matter
    assert sit_alone(tmp_path, config, [f"tokenizer_path={renamed}"], steps_today=1)["step"] == 2


def test_shards_for_another_seq_len_are_refused_unless_told(tmp_path):
    config = make_run(tmp_path)
    message = refused(tmp_path, config, ["seq_len=16", "batch_tokens=64"], ShardError)
    assert "8" in message and "16" in message and "--rechunk" in message
    fed = tmp_path / "fed"
    sit_alone(tmp_path, config, ["seq_len=16", "batch_tokens=64", "rechunk=true"], str(fed))
    assert fed_targets(fed) == CORPUS


def test_a_cut_off_shard_is_refused_before_anything_is_written(tmp_path):
    config = make_run(tmp_path)
    path = next((tmp_path / "data").glob("train-00000.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    assert str(path) in refused(tmp_path, config, [], ShardError)
    assert not folder.entries(load_config(config).run_folder)


# ------------------------------------------------------------------ 3 + 5: a state that did not load is never trained on


def load_something_else(world: World, config: str) -> str:
    from llm.engine import torch_engine

    original = torch_engine.TorchEngine.load_slices

    def forget_one(self, reader):
        original(self, reader)
        next(self.model.parameters()).data[0, 0] += 1e-3

    torch_engine.TorchEngine.load_slices = forget_one
    return message_of(world, config, [])


def test_a_state_that_differs_from_what_was_saved_is_noticed_after_loading(tmp_path):
    config = make_run(tmp_path)
    sit_alone(tmp_path, config, [], steps_today=2)
    (message,) = run_ranks(load_something_else, 1, tmp_path, str(config))
    assert message.startswith("CheckpointError") and "hash" in message
