"""Bits that flip and files that are cut: none is accepted, whatever is refused is named, and the run goes on from what is sound."""

import random
import shutil
from pathlib import Path

import pytest
from counts import SEED, done, torture
from lives import assert_nothing_lost, assert_same_state, committed, fault_run, live, start, uninterrupted

from llm.checkpoint import folder
from llm.checkpoint.resume import open_checkpoint
from llm.checkpoint.slices import CheckpointError
from llm.config import load_config
from llm.data.shards import Shard, ShardError

pytestmark = pytest.mark.timeout(200)
FLIPS = 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("whole"), 2)


def checkpoints(config: Path) -> list[Path]:
    return [entry.path for entry in folder.entries(load_config(config).run_folder)]


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    done["bit flips tried"] += 1


def accepted(checkpoint: Path, damaged: Path) -> bool:
    try:
        open_checkpoint(checkpoint)
    except CheckpointError as error:
        assert str(damaged) in str(error), error
        return False
    done["accepted"] += 1
    return True


def test_a_bit_flipped_anywhere_in_a_checkpoint_is_refused_by_the_name_of_the_file(tmp_path, whole):
    checkpoint = Path(shutil.copytree(checkpoints(whole.config)[-1], tmp_path / "checkpoint"))
    dice, files = random.Random(SEED), files_of(checkpoint)
    done["accepted"] += 0
    for n in range(FLIPS):
        path = files[n % len(files)]
        before = path.read_bytes()
        flip(path, dice)
        assert not accepted(checkpoint, path), (SEED, n, path)
        path.write_bytes(before)
    open_checkpoint(checkpoint)


CUTS = {
    "to nothing": lambda content: b"",
    "to a byte": lambda content: content[:1],
    "in half": lambda content: content[: len(content) // 2],
    "by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "longer by itself": lambda content: content + content,
}


def test_a_file_cut_or_extended_is_refused_by_name(tmp_path, whole):
    checkpoint = Path(shutil.copytree(checkpoints(whole.config)[-1], tmp_path / "checkpoint"))
    done["accepted"] += 0
    for path in files_of(checkpoint):
        before = path.read_bytes()
        for cut in CUTS.values():
            path.write_bytes(cut(before))
            done["truncations and extensions tried"] += 1
            assert not accepted(checkpoint, path), (path, cut)
        path.write_bytes(before)
    open_checkpoint(checkpoint)


def test_shards_swapped_between_ranks_or_steps_are_refused(tmp_path, whole):
    older, newest = (Path(shutil.copytree(path, tmp_path / path.name)) for path in checkpoints(whole.config)[-2:])
    first, second = sorted(newest.glob("shard-*"))
    contents = first.read_bytes(), second.read_bytes(), (older / first.name).read_bytes()
    first.write_bytes(contents[1]), second.write_bytes(contents[0])
    assert not accepted(newest, first)
    second.write_bytes(contents[1]), first.write_bytes(contents[2])
    assert not accepted(newest, first)
    first.write_bytes(contents[0])
    open_checkpoint(newest)


def test_ranks_fall_back_together_past_damaged_checkpoints_and_come_to_the_same_end(tmp_path, whole):
    config = fault_run(tmp_path, keep_last=9)
    assert live(config, 2, steps_today=6).codes == [0, 0]
    steps, (older, newest) = committed(config), checkpoints(config)[-2:]
    flip(sorted(newest.glob("shard-*"))[1], random.Random(SEED))  # rank 1's
    cut = next(older.glob("rank-00000-*"))
    cut.write_bytes(cut.read_bytes()[:-1])
    life = live(config, 2)
    assert life.codes == [0, 0], life.output
    assert f"resumes {checkpoints(config)[0].parent}/step-{steps[-3]:09d}" in life.output and cut.name in life.output
    run = load_config(config).run_folder
    assert {p.name for p in (run / "quarantine").iterdir()} == {older.name, newest.name}
    assert_same_state(run, whole)


def test_with_all_damaged_no_rank_starts_from_step_0(tmp_path):
    config = fault_run(tmp_path)
    live(config, 2, steps_today=4)
    for checkpoint in checkpoints(config):
        flip(next(checkpoint.glob("shard-*")), random.Random(SEED))
    for _ in range(2):  # the second time nothing but the quarantine is there
        life = live(config, 2)
        assert life.codes == [2, 2] and "--fresh" in life.output, life.output
        assert committed(config) == []


# ------------------------------------------------------------------ token shards


def token_files(config: Path) -> list[Path]:
    return sorted(path for path in (config.parent / "data").iterdir() if path.suffix in (".bin", ".idx") and path.name.startswith("train"))


def read_as_training_does(config: Path) -> None:
    for meta in (config.parent / "data").glob("train*.meta.json"):
        shard = Shard.open(meta)
        shard.tokens(0, shard.meta.n_tokens)
        assert shard.doc_ends[-1] == shard.meta.n_tokens


def test_a_bit_flipped_in_a_token_shard_is_refused_when_it_is_opened_and_read(tmp_path):
    config = fault_run(tmp_path)
    dice, files = random.Random(SEED), token_files(config)
    done["accepted"] += 0
    for n in range(100):
        path = files[n % len(files)]
        before = path.read_bytes()
        flip(path, dice)
        with pytest.raises(ShardError, match=path.name):
            read_as_training_does(config)
            done["accepted"] += 1
        path.write_bytes(before)
    read_as_training_does(config)


def test_a_token_shard_that_goes_bad_during_the_run_stops_all_ranks_and_nothing_is_lost_once_it_is_restored(tmp_path, whole):
    config = fault_run(tmp_path)
    group = start(config, 2, fault="step:all:3:hold")
    group.reached(0, 1)
    before = {path: path.read_bytes() for path in token_files(config) if path.suffix == ".bin"}
    for path, content in before.items():
        with open(path, "r+b") as file:  # in place, as a failing disk would
            file.write(b"\xff" * len(content))
    group.go()
    life = group.ended()
    assert life.codes == [2, 2] and any(path.name in life.output for path in before), life.output
    assert committed(config) and max(committed(config)) <= 3 + 4  # what was read ahead
    refused = live(config, 2)
    assert refused.codes == [2, 2], refused.output
    for path, content in before.items():
        path.write_bytes(content)
    assert live(config, 2).codes == [0, 0]
    assert_nothing_lost(config, whole)


@torture
def test_the_newest_checkpoint_damaged_in_each_file_in_turn_is_passed_over_by_two_ranks(tmp_path, whole):
    config = fault_run(tmp_path, keep_last=9)
    live(config, 2, steps_today=4)
    kept = shutil.copytree(load_config(config).run_folder, tmp_path / "kept", ignore=shutil.ignore_patterns("LOCK"))
    for n, path in enumerate(files_of(checkpoints(config)[-1])):
        run = load_config(config).run_folder
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        flip(path, random.Random(SEED + n))
        life = live(config, 2)
        assert life.codes == [0, 0] and path.name in life.output, life.output
        assert_same_state(run, whole)
