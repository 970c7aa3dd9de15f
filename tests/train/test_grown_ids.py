"""A .jsonl of token ids that changes while a run lives: what was added is new, nothing comes twice.

Every id occurs in one place only. What is counted is what the engine was given, so nothing that the
ledger says is believed.
"""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from little_run import fed_targets, make_tokenizer, newest_ledger, run_and_kill, sit, sit_alone
from ranks import run_ranks

from llm.batch_plan import BatchPlan
from llm.config import load_config
from llm.data.at_hand import ShardsAtHand
from llm.data.ledger import Ledger
from llm.data.sampler import Sampler
from llm.data.shards import Shard
from llm.dist import World
from llm.log import UserError
from llm.tokenizer import load_tokenizer
from llm.train.datasets import open_shards, pool, settle_imports
from llm.train.loop import Progress
from llm.train.phases import Wish
from llm.train.start import Found

WIDTH = 3  # ids in a list


def lists(first: int, last: int) -> list[list[int]]:
    """The lists number first to last - 1, with the ids 3n, 3n + 1 and 3n + 2 in number n."""
    return [list(range(WIDTH * n, WIDTH * n + WIDTH)) for n in range(first, last)]


def text(of: list[list[int]], blank: int = 0, end: str = "\n") -> str:
    """The lists as a file; after each `blank`-th a blank line."""
    lines = [
        json.dumps(ids) + end + (end if blank and n % blank == 0 else "")
        for n, ids in enumerate(of, 1)
    ]
    return "".join(lines)


def make_config(root: Path, tokenizer: Path) -> Path:
    cfg = {
        "n_layers": 1,
        "d_model": 16,
        "n_heads": 2,
        "d_ff": 24,
        "seq_len": 8,
        "tokenizer_path": str(tokenizer),
        "data_path": str(root / "a.jsonl"),
        "checkpoint_dir": str(root / "checkpoints"),
        "lr": 1e-2,
        "batch_size": 1,
        "batch_tokens": 32,
        "save_every": 0,
        "keep_last": 9,
        "precision": "fp32",
        "tensorboard": False,
        "device": "cpu",
    }
    root.mkdir(exist_ok=True)
    (root / "ids.json").write_text(json.dumps(cfg))
    return root / "ids.json"


class Life:
    """A run in a folder of its own, with the files that it is trained on, by the real trainer."""

    def __init__(self, world: World, root: Path, tokenizer: Path):
        self.world, self.root, self.tokenizer, self.config = (
            world,
            root,
            tokenizer,
            make_config(root, tokenizer),
        )
        self.paths, self.settings, self.refusals = ["a.jsonl"], [], []

    def write(self, content: str, name: str = "a.jsonl") -> "Life":
        if self.world.rank == 0:
            (self.root / name).write_text(content)
        self.world.barrier()
        return self

    def sit(self, **options) -> "Life":
        paths = json.dumps([str(self.root / name) for name in self.paths])
        try:
            self.train([f"data_path={paths}", *self.settings], **options)
        except UserError as error:
            self.refusals.append([type(error).exit_code, str(error)])
        return self

    def only_new(self, **options) -> "Life":
        return self.sit(only_new=True, **options)

    def train(self, settings: list[str], **options) -> None:
        sit(self.world, str(self.config), settings, str(self.root / "fed"), **options)

    def fed(self) -> Counter:
        """How often each id was fed: as a target, or as the first of a shard, which is none."""
        there = {s.meta.shard_id: s for s in map(Shard.open, self.root.parent.rglob("*.meta.json"))}
        phases = newest_ledger(self.config).phases
        firsts = Counter(
            int(there[s.shard_id].tokens(0, 1)[0]) for phase in phases for s in phase.shards
        )
        return fed_targets(self.root / "fed") + firsts


class LifeWithoutAModel(Life):
    """The same data, found, chosen and put into rows as training does, and only counted."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ledger, self.step, self.counts = Ledger(), 0, Counter()

    def train(self, settings: list[str], steps_today: int = 10**6, **wish) -> None:
        cfg, world = load_config(str(self.config), settings), World()
        tokenizer = load_tokenizer(self.tokenizer)
        shards, _ = open_shards(cfg, tokenizer, world)
        shards, refused = settle_imports(shards, self.ledger, world)
        at, plan = Progress(self.step, 0, self.ledger, ""), BatchPlan(4, 1, 1, 8)
        found = Found(cfg, world, tokenizer, shards, [], None, False, at, plan, refused)
        while steps_today and isinstance(ledger := found.choose(Wish(**wish)), Ledger):
            at.ledger, steps_today = self._feed(ledger, pool(shards), steps_today)
            self.ledger = at.ledger
            if not wish:
                break

    def _feed(self, ledger: Ledger, shards: list[Shard], steps: int) -> tuple[Ledger, int]:
        sampler = Sampler(ledger.open_phase, shards)
        while steps and (phase := ledger.open_phase):
            draws = np.arange(phase.consumed, min(phase.consumed + 4, phase.total))
            ids, counted = sampler.rows(draws)
            self.counts.update(ids[:, 1:][counted].tolist())
            firsts = [
                shard.tokens(0, 1).item() for shard in sampler.windows.shards if phase.consumed == 0
            ]
            self.counts.update(firsts)
            self.step, steps = self.step + 1, steps - 1
            ledger = ledger.advance(len(draws), self.step)
        return ledger, steps

    def fed(self) -> Counter:
        return self.counts


# What happens to the file; at the end each of so many lists must have been fed once.


def grown_once(life):
    life.write(text(lists(0, 20))).sit().write(text(lists(0, 30))).only_new()
    return 30


def grown_twice(life):
    life.write(text(lists(0, 20))).sit().write(text(lists(0, 30))).only_new().write(
        text(lists(0, 37))
    ).only_new()
    return 37


def grown_beyond_units_of_64_lines(life):
    life.write(text(lists(0, 63))).sit().write(text(lists(0, 64))).only_new().write(
        text(lists(0, 200))
    ).only_new()
    return 200


def grown_in_an_open_phase(life):
    life.write(text(lists(0, 40))).sit(steps_today=1).write(text(lists(0, 50))).sit().only_new()
    return 50


def grown_in_an_open_phase_of_a_named_dataset(life):
    life.write(text(lists(0, 40))).sit(steps_today=1, dataset="a.jsonl")
    life.write(text(lists(0, 50))).sit(dataset="a.jsonl").only_new(dataset="a.jsonl")
    return 50


def grown_in_an_open_phase_of_many_lines(life):
    life.write(text(lists(0, 100))).sit(steps_today=2).write(text(lists(0, 160))).only_new()
    return 160


def grown_while_the_shard_is_in_the_run(life):
    life.settings = ["data.save_bin=false"]
    life.write(text(lists(0, 20))).sit(steps_today=1).write(text(lists(0, 30))).sit().only_new()
    return 30


def last_line_without_an_end(life):
    life.write(text(lists(0, 20)).rstrip("\n")).sit().write(text(lists(0, 20))).only_new().write(
        text(lists(0, 25))
    ).only_new()
    return 25


def last_line_broken_off(life):
    whole = text(lists(0, 20))
    life.write(whole[:-5]).sit().write(whole).only_new().write(
        text(lists(0, 25))[:-3]
    ).only_new().write(text(lists(0, 25))).only_new()
    return 25


def blank_lines(life):
    life.write(text(lists(0, 20), blank=3)).sit().write(text(lists(0, 20), blank=2)).only_new()
    life.write("\n\n" + text(lists(0, 30), blank=4)).only_new()
    return 30


def other_spaces_and_line_ends(life):
    life.write(text(lists(0, 20))).sit().write(
        text(lists(0, 30), end="\r\n").replace(", ", ",")
    ).only_new()
    return 30


def renamed_and_grown(life):
    life.write(text(lists(0, 20))).sit()
    (life.root / "a.jsonl").unlink()
    life.paths = ["b.jsonl"]
    life.write(text(lists(0, 30)), "b.jsonl").only_new()
    return 30


def copied(life):
    life.write(text(lists(0, 20))).sit().write(text(lists(0, 20)), "b.jsonl")
    life.paths = ["a.jsonl", "b.jsonl"]
    life.only_new()
    return 20


def a_copy_that_has_grown_beside_the_first(life):
    life.write(text(lists(0, 20))).write(text(lists(0, 30)), "b.jsonl").write(
        text(lists(0, 35)), "c.jsonl"
    )
    life.paths = ["c.jsonl", "b.jsonl", "a.jsonl"]
    life.sit()
    return 35


def an_older_copy_comes_later(life):
    life.write(text(lists(0, 30))).sit().write(text(lists(0, 20)), "old.jsonl")
    life.paths = ["old.jsonl", "a.jsonl"]
    life.only_new()
    return 30


def another_time_of_change(life):
    life.write(text(lists(0, 20))).sit()
    os.utime(life.root / "a.jsonl", (1, 1))
    life.only_new()
    return 20


def shards_deleted_and_grown(life):
    life.write(text(lists(0, 40)).replace(", ", ",")).sit(steps_today=1).write(text(lists(0, 50)))
    shutil.rmtree(life.root / "a.imported")
    life.sit().only_new()
    return 50


def a_run_that_began_later_has_the_whole_file(life):
    life.write(text(lists(0, 20))).sit().write(text(lists(0, 30)))
    other = type(life)(life.world, life.root / "other", life.tokenizer)
    for name in ("a.jsonl", "a.imported"):
        (other.root / name).symlink_to(life.root / name)
    assert (
        set(other.sit().write(text(lists(0, 35))).only_new().fed().values()) == {1}
        and not other.refusals
    )
    life.only_new()
    return 35


def grown_by_other_lists_and_a_file_of_its_own(life):
    life.write(text(lists(0, 20))).sit().write(text(lists(0, 30))).write(
        text(lists(30, 40)), "b.jsonl"
    )
    life.paths = ["b.jsonl", "a.jsonl"]
    life.only_new()
    return 40


LIVES = [
    grown_once,
    grown_twice,
    grown_beyond_units_of_64_lines,
    grown_in_an_open_phase,
    grown_in_an_open_phase_of_a_named_dataset,
    grown_in_an_open_phase_of_many_lines,
    grown_while_the_shard_is_in_the_run,
    last_line_without_an_end,
    last_line_broken_off,
    blank_lines,
    other_spaces_and_line_ends,
    renamed_and_grown,
    copied,
    a_copy_that_has_grown_beside_the_first,
    an_older_copy_comes_later,
    another_time_of_change,
    shards_deleted_and_grown,
    a_run_that_began_later_has_the_whole_file,
    grown_by_other_lists_and_a_file_of_its_own,
]


IN_FULL = LIVES if os.environ.get("TORTURE") else [grown_twice, grown_while_the_shard_is_in_the_run]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.mark.parametrize("story", LIVES, ids=lambda story: story.__name__)
def test_each_id_is_fed_exactly_once_whatever_becomes_of_its_file(tmp_path, tokenizer, story):
    life = LifeWithoutAModel(World(), tmp_path / "life", tokenizer)
    n_lists = story(life)
    assert life.refusals == []
    assert life.fed() == Counter(range(WIDTH * n_lists))
    imported = [str(path) for path in (tmp_path / "life").rglob("*.imported")]
    assert ShardsAtHand(imported).problems(life.ledger, quick=False) == []


def live(world: World, root: str, tokenizer: str, story: str) -> dict:
    life = Life(world, Path(root), Path(tokenizer))
    n_lists = globals()[story](life)
    return {"lists": n_lists, "fed": [*life.fed().items()], "refusals": life.refusals}


@pytest.mark.parametrize("story", IN_FULL, ids=lambda story: story.__name__)
def test_the_engine_gets_each_id_exactly_once_whatever_becomes_of_its_file(
    tmp_path, tokenizer, story
):
    ranks = 2 if story is grown_twice else 1
    lived = run_ranks(
        live, ranks, tmp_path, str(tmp_path / "life"), str(tokenizer), story.__name__
    )[0]
    assert lived["refusals"] == []
    assert Counter(dict(lived["fed"])) == Counter(range(WIDTH * lived["lists"]))


# A file that does not begin with what the run was trained on: a new phase, and an open one.

CHANGES = {
    "shortened": (text(lists(0, 12)), "20 lists, 60 tokens of it; now it has 12 lists, 36 tokens"),
    "shortened and grown": (
        text(lists(0, 12) + lists(30, 50)),
        "20 lists, 60 tokens of it; now it has 32 lists, 96 tokens",
    ),
    "one id": (
        text(lists(0, 20)).replace("[30, 31, 32]", "[30, 99, 32]"),
        "20 lists, 60 tokens, that do not begin with those (list 11 is",
    ),
    "a line in front": (text(lists(40, 41) + lists(0, 20)), "(list 1 is another)"),
    "another order": (text(lists(10, 20) + lists(0, 10)), "(list 1 is another)"),
    "all new": (text(lists(50, 60)), "now it has 10 lists"),
    "one list divided": (
        text(lists(0, 20)).replace("[30, 31, 32]", "[30]\n[31, 32]"),
        "now it has 21 lists, 60 tokens",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_is_refused_with_both_counts_and_nothing_of_it_is_fed(
    tmp_path, tokenizer, change
):
    life = LifeWithoutAModel(World(), tmp_path / "life", tokenizer)
    content, said = CHANGES[change]
    life.write(text(lists(0, 20))).sit().write(content).only_new().sit(reset_epoch=True)
    assert [code for code, _ in life.refusals] == [2, 2]
    assert all(said in why for _, why in life.refusals), life.refusals
    assert life.fed() == Counter(range(WIDTH * 20))
    life.write(text(lists(0, 20) + lists(70, 75))).only_new()
    assert life.fed() == Counter([*range(WIDTH * 20), *range(WIDTH * 70, WIDTH * 75)])


@pytest.mark.parametrize("change", CHANGES)
def test_an_open_phase_goes_on_with_what_it_had_of_a_file_that_was_changed(
    tmp_path, tokenizer, change
):
    life = LifeWithoutAModel(World(), tmp_path / "life", tokenizer)
    life.write(text(lists(0, 20))).sit(steps_today=1).write(CHANGES[change][0]).sit()
    assert life.refusals == [] and life.fed() == Counter(range(WIDTH * 20))


def test_a_file_that_was_changed_after_it_had_grown_is_refused_and_another_of_its_name_as_well(
    tmp_path, tokenizer
):
    life = LifeWithoutAModel(World(), tmp_path / "life", tokenizer)
    life.write(text(lists(0, 20))).sit().write(text(lists(0, 30))).only_new()
    life.write(text(lists(0, 25) + lists(40, 50))).only_new()
    assert (
        "30 lists, 90 tokens of it; now it has 35 lists" in life.refusals[0][1]
        and "(list 26 is another)" in life.refusals[0][1]
    )
    assert life.fed() == Counter(range(WIDTH * 30))


@pytest.mark.skipif(not os.environ.get("TORTURE"), reason="in make torture")
@pytest.mark.parametrize("save", ["async_save=false", "async_save=true"])
def test_each_id_counts_once_when_the_file_grows_between_a_kill_and_the_next_start(
    tmp_path, tokenizer, save
):
    life = Life(World(), tmp_path / "life", tokenizer)
    life.write(text(lists(0, 40)))
    fed = life.root / "fed"
    assert run_and_kill(tmp_path, life.config, fed, 3, save) == -signal.SIGKILL
    life.write(text(lists(0, 55)))
    for options in ({}, {"only_new": True}):
        sit_alone(tmp_path, life.config, [save], str(fed), **options)
    assert life.fed() == Counter(range(WIDTH * 55))
