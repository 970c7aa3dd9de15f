"""--anneal: a fork whose learning rate goes down to its floor, beside a trunk that does not notice."""

import json
from pathlib import Path

import pytest
from little_run import SEQ_LEN, fed_by_step, make_run, sit
from ranks import run_ranks
from test_from_step import contents

from llm.checkpoint import folder
from llm.checkpoint.manifest import read_manifest
from llm.config import ConfigError, load_config

STEP_TOKENS = 4 * SEQ_LEN
CONSTANT = {"schedule": "wsd", "save_every": 2, "warmup_steps": 0, "epochs": 2, "min_lr_ratio": 0.1}


def rates(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/lr"] for r in records if "train/lr" in r}


def newest(run: Path):
    return read_manifest(folder.entries(run)[-1].path)


def one_sitting(world, config: str, fed: str | None, options: dict) -> None:
    sit(world, config, fed=fed, **options)


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """A trunk of 6 steps, a fork cut short, the trunk to its end, the fork to its end; the same fork at once; a trunk without forks."""
    tmp_path = tmp_path_factory.mktemp("anneal")
    config, whole = make_run(tmp_path / "run", **CONSTANT), make_run(tmp_path / "whole", **CONSTANT)
    run = load_config(config).run_folder
    fork, tokens = run.with_name("little-anneal-6"), 3 * STEP_TOKENS

    def sit_down(fed: str | None = None, config: Path = config, **options) -> None:
        run_ranks(one_sitting, 1, tmp_path, str(config), fed and f"{config}.{fed}", options)

    sit_down(steps_today=6)
    before = contents(run)
    sit_down("fork", anneal=tokens, steps_today=1)
    told = {"untouched": contents(run) == before}
    sit_down("trunk")
    sit_down(anneal=tokens)
    told["cut"] = newest(fork).state_hash
    fork.rename(fork.with_name("aside"))
    sit_down(anneal=tokens, from_step=6)
    told["never cut"] = newest(fork).state_hash
    sit_down(config=whole)
    return config, whole, told


def test_the_fork_decays_from_the_peak_to_the_floor_and_ends(forked):
    fork = load_config(forked[0]).run_folder.with_name("little-anneal-6")
    assert list(rates(fork).items()) == [(7, pytest.approx(7e-3)), (8, pytest.approx(4e-3)), (9, pytest.approx(1e-3))]
    assert newest(fork).step == 9 and newest(fork).ledger["phases"][0]["consumed"] == 36


def test_the_trunk_does_not_notice_it(forked):
    config, whole, told = forked
    trunk, alone = (newest(load_config(c).run_folder) for c in (config, whole))
    assert told["untouched"]
    assert (trunk.state_hash, trunk.chain, trunk.ledger) == (alone.state_hash, alone.chain, alone.ledger)
    assert set(rates(load_config(config).run_folder).values()) == {1e-2}


def test_the_fork_takes_the_samples_that_the_trunk_would_take_next(forked):
    fork, trunk = (list(fed_by_step(Path(f"{forked[0]}.{who}")).values()) for who in ("fork", "trunk"))
    assert len(fork) == 1 and fork[0] == trunk[0]


def test_an_unfinished_fork_goes_on_by_the_same_command_though_the_trunk_has_moved(forked):
    assert forked[2]["cut"] == forked[2]["never cut"]


def test_the_fork_is_a_run_of_its_own_that_names_where_it_came_from(forked):
    run = load_config(forked[0]).run_folder
    first = read_manifest(folder.entries(run.with_name("little-anneal-6"))[0].path)
    assert first.run_id != newest(run).run_id and first.lineage == []
    assert first.parent.name == "step-000000006-a1"


def refused(world, config: str, **options) -> str:
    try:
        sit(world, config, **options)
    except ConfigError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(("changes", "tokens", "told"), [
    ({"schedule": "cosine"}, 64, "train.schedule cosine decays by itself"),
    ({"total_step_budget": 8, "decay_steps": 6}, 64, "step 6 is in the run's own decay since 2"),
    ({}, 99 * STEP_TOKENS, "decaying takes 99 more steps, but the data of phase p0 ends after 13. Give --anneal 416 or less"),
])  # fmt: skip
def test_a_fork_that_could_not_decay_is_refused_and_leaves_nothing(tmp_path, changes, tokens, told):
    config = make_run(tmp_path, **CONSTANT | changes)
    run_ranks(steps_of, 1, tmp_path, str(config))
    assert told in run_ranks(refuse, 1, tmp_path, str(config), tokens)[0]
    assert [path.name for path in load_config(config).run_folder.parent.iterdir()] == ["little"]


def steps_of(world, config: str) -> None:
    sit(world, config, steps_today=6)


def refuse(world, config: str, tokens: int) -> str:
    return refused(world, config, anneal=tokens)
