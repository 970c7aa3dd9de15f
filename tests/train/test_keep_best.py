"""keep_best: the best weights are there at the end, whatever the intervals, and only losses of one measure are compared."""

from pathlib import Path

import pytest
from little_run import add_shard, make_run, sit
from ranks import run_ranks

from llm.checkpoint import folder
from llm.checkpoint.manifest import read_manifest
from llm.config import load_config
from llm.data.manifest import find_shards
from llm.train.validate import measure_digest

LOSSES = {3: 7.0, 5: 6.0, 6: 5.0, 9: 6.5, 10: 6.9}  # by step; the best is at step 6


def train_all(world, runs: list) -> None:
    """Each run: a config, the losses that validation gives, and sittings of these words and steps."""
    from llm.train import run as training

    for config, losses, sittings in runs:
        training.validate = lambda engine, *args, losses=losses: {"loss": losses[engine.state()["optimizer_step"]], "bits_per_byte": 1.0}
        for words, steps_today in sittings:
            sit(world, config, words, steps_today=steps_today)


def train_each(tmp_path: Path, *cases: tuple, ranks: int = 1) -> list[Path]:
    """The folders of runs that keep their last checkpoint and their best. A case: losses and sittings."""
    configs = [make_run(tmp_path / f"run-{n}", keep_last=1, keep_epochs=False) for n in range(len(cases))]
    runs = [(str(config), *case) for config, case in zip(configs, cases, strict=True)]
    run_ranks(train_all, ranks, tmp_path, runs)
    return [load_config(config).run_folder for config in configs]


def kept(run: Path) -> list[int]:
    return [entry.step for entry in folder.entries(run)]


def test_intervals_that_never_meet_still_keep_the_best(tmp_path):
    words = [["eval_every=3", "save_every=4"], ["eval_every=3", "save_every=7", "async_save=false"], ["eval_every=30%", "save_every=80%"]]
    for run in train_each(tmp_path, *((LOSSES, [(w, 10)]) for w in words)):
        assert kept(run) == [6, 10]
        best = read_manifest(folder.entries(run)[0].path)
        assert (best.metrics["val_loss"], best.metrics["val_step"]) == (5.0, 6)


def test_ranks_and_sittings_agree_on_what_is_the_best_so_far(tmp_path):
    words = ["eval_every=3", "save_every=4", "keep_last=9"]
    (run,) = train_each(tmp_path, (LOSSES | {3: 5.5, 6: 5.7, 9: 5.4}, [(words, 4), (words, 1), (words, 5)]), ranks=2)
    assert kept(run) == [3, 4, 5, 8, 9, 10]  # 6 was worse than 3, which the third sitting knows from the first


def test_as_many_are_saved_as_are_to_be_kept_and_none_where_the_intervals_meet(tmp_path):
    never, every = ["eval_every=3", "save_every=4"], "keep_last=9"
    found = train_each(
        tmp_path,
        (LOSSES, [([*never, "keep_best=2"], 10)]),
        (LOSSES, [([*never, "keep_best=0", every], 10)]),
        (LOSSES, [(["eval_every=5", "save_every=2", every], 10)]),
        (LOSSES, [(["eval_every=3", "save_every=0", every], 10)]),
    )
    assert [kept(run) for run in found] == [[6, 9, 10], [4, 8, 10], [2, 4, 6, 8, 10], [10]]


def test_a_loss_of_other_rows_or_other_text_displaces_none(tmp_path):
    config, measures = make_run(tmp_path, keep_last=1, keep_epochs=False), set()
    words, run = ["eval_every=3", "save_every=4"], load_config(config).run_folder
    for more, steps_today in (([], 4), (["train.eval_rows=2"], 3), (["train.eval_rows=2"], 3)):
        if (run / "step-000000007-a2").exists():
            add_shard(tmp_path / "data", tmp_path / "tokenizer", 460, 490, role="val")
        run_ranks(train_all, 1, tmp_path, [(str(config), LOSSES | {3: 1.0}, [([*words, *more], steps_today)])])
        measures.add(read_manifest(folder.entries(run)[-1].path).validated_on)
    assert kept(run) == [3, 6, 7, 9, 10]  # the best on 256 rows, on two, what was resumed from, the best on two shards, the last
    assert len(measures) == 3


@pytest.mark.parametrize("changed", [["train.eval_rows=0"], ["data.document_mask=true"], ["model.seq_len=4"], ["train.eval_rows=7"]], ids=" ".join)
def test_the_measure_tells_rows_and_cut_apart_and_nothing_else(tmp_path, changed):
    config = make_run(tmp_path)
    shards = find_shards([str(tmp_path / "data")], "val")
    digest = measure_digest(shards, load_config(config))
    assert measure_digest(shards, load_config(config, changed)) != digest
    assert measure_digest(shards, load_config(config, ["train.lr=1.0", "train.batch_tokens=64", "checkpoint.keep_best=3"])) == digest
    assert measure_digest([], load_config(config)) == ""
