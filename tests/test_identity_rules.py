"""What counts as new text, from raw files to weights: each rule of docs/design.md's ledger through the commands that a person types.

Every word of the texts here occurs in one document only, so the words that were trained on say which documents were, and how often.
"""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from little_run import SEQ_LEN, WORDS, make_tokenizer
from test_commands import command, train
from test_ledger_tool import answer

from llm.checkpoint import folder
from llm.checkpoint.manifest import read_manifest
from llm.data.ledger import Ledger
from llm.data.manifest import find_shards
from llm.data.sampler import Sampler


@dataclass(frozen=True)
class Bench:
    """A folder with raw files, a dataset folder that they are tokenized into, and a run."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "checkpoints" / "rules"

    def write(self, name: str, *documents: range) -> Path:
        """A .jsonl with documents of these words."""
        path = self.root / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in words)}) + "\n" for words in documents))
        return path

    def tokenize(self, *files: Path) -> str:
        words = ["--tokenizer", self.root / "tokenizer", "--seq-len", SEQ_LEN, "--out", self.root / "set", "--workers", "1"]
        done = command(sys.executable, "tools/tokenize_parallel.py", *files, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(self, *words: str) -> str:
        done = train("--config", self.root / "rules.json", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def configure(self) -> "Bench":
        paths = {"tokenizer_path": "tokenizer", "data_path": "set", "checkpoint_dir": "checkpoints"}
        cfg = {
            "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24, "seq_len": SEQ_LEN, "lr": 1e-2, "batch_size": 1,
            "batch_tokens": 4 * SEQ_LEN, "save_every": 0, "keep_last": 9, "precision": "fp32", "tensorboard": False, "device": "cpu",
        }  # fmt: skip
        (self.root / "rules.json").write_text(json.dumps(cfg | {key: str(self.root / value) for key, value in paths.items()}))
        return self

    def ledger(self) -> Ledger:
        return Ledger.from_json(read_manifest(folder.entries(self.run)[-1].path).ledger)

    def trained_words(self) -> Counter:
        """How often each word was trained on: the targets of all consumed draws, and the first token of each shard once begun."""
        counts, shards = Counter(), find_shards([self.root / "set"], "train")
        for phase in self.ledger().phases:
            ids, counted = Sampler(phase, shards).rows(np.arange(phase.consumed))
            counts.update(ids[:, 1:][counted].tolist())
            held = {shard.shard_id for shard in phase.shards}
            counts.update(int(s.tokens(0, 1)[0]) for s in shards if s.meta.shard_id in held)
        return Counter({word: n for word, n in counts.items() if word < WORDS})

    def units(self) -> list[int]:
        """How many units each phase has, having made sure that no unit is in two."""
        phases = [[u for shard in phase.shards for u in shard.unit_ids] for phase in self.ledger().phases]
        assert max(Counter(u for units in phases for u in units).values()) == 1
        return [len(units) for units in phases]

    def shown(self) -> list[tuple[float, list[tuple[float, int]]]]:
        """What `ledger.py show` prints: per phase, percent done, and of each file percent seen and tokens. `verify` must agree first."""
        assert "everything agrees" in answer("verify", self.run)
        phases = []
        for line in answer("show", self.run).splitlines():
            if match := re.match(r"phase .*: +([\d.]+) % of", line):
                phases.append((float(match[1]), []))
            elif match := re.match(r" +([\d.]+) % +([\d,]+) tokens", line):
                phases[-1][1].append((float(match[1]), int(match[2].replace(",", ""))))
        return phases

    def seen(self, path: Path) -> str:
        told = answer("seen", self.run, path)
        return re.search(rf"^{re.escape(str(path))}: (.*)$", told, re.M)[1]


OLD = [range(0, 40), range(40, 90), range(90, 150)]  # with an end-of-text each: 153 tokens, 19 samples, 5 steps
OLD_SHOWN = (100.0, [(100.0, 153)])


def once(*documents: range) -> Counter:
    return Counter(word for words in documents for word in words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    bench = Bench(tmp_path_factory.mktemp("trained")).configure()
    make_tokenizer(bench.root / "tokenizer")
    bench.tokenize(bench.write("old.jsonl", *OLD))
    bench.train()
    return bench.root


@pytest.fixture
def bench(trained, tmp_path) -> Bench:
    """OLD as old.jsonl, tokenized and trained on."""
    shutil.copytree(trained, tmp_path / "copy")
    bench = Bench(tmp_path / "copy").configure()
    assert bench.trained_words() == once(*OLD) and bench.units() == [1]
    return bench


def nothing_is_new(bench: Bench) -> None:
    told = bench.train("--only-new")
    assert "Nothing new" in told
    assert bench.trained_words() == once(*OLD) and bench.units() == [1]
    assert bench.shown() == [OLD_SHOWN]
    assert [entry.step for entry in folder.entries(bench.run)] == [5]


def test_a_renamed_file_is_not_new(bench):
    renamed = (bench.root / "raw" / "old.jsonl").rename(bench.root / "raw" / "renamed.jsonl")
    assert "nothing new" in bench.tokenize(renamed)
    nothing_is_new(bench)
    assert bench.seen(renamed) == "fully"


def test_a_copy_under_another_name_is_not_new_beside_the_original_or_alone(bench):
    old = bench.root / "raw" / "old.jsonl"
    copy = Path(shutil.copy(old, bench.root / "raw" / "copy.jsonl"))
    assert "nothing new" in bench.tokenize(old, copy)
    assert "nothing new" in bench.tokenize(copy)
    nothing_is_new(bench)
    assert bench.seen(copy) == "fully"


def test_a_copy_tokenized_into_another_folder_is_not_new(bench):
    copy = Path(shutil.copy(bench.root / "raw" / "old.jsonl", bench.root / "raw" / "copy.jsonl"))
    second = Bench(bench.root / "second")
    shutil.copytree(bench.root / "tokenizer", second.root / "tokenizer")
    second.tokenize(copy)
    told = bench.train("--only-new", f"data_path={json.dumps([str(bench.root / 'set'), str(second.root / 'set')])}")
    assert "Nothing new" in told
    nothing_is_new(bench)


def test_of_a_grown_file_only_the_added_text_is_trained_on(bench):
    more = [range(200, 230), range(230, 260)]
    grown = bench.write("old.jsonl", *OLD, *more)
    share = re.fullmatch(r"partly \(([\d.]+) %\)", bench.seen(grown))[1]
    words = [" ".join(f"w{i}" for i in d) for d in [*OLD, *more]]
    assert float(share) == pytest.approx(100 * sum(map(len, words[:3])) / sum(map(len, words)), abs=0.01)
    assert "62 tokens" in bench.tokenize(grown)
    bench.train("--only-new")
    assert bench.trained_words() == once(*OLD, *more) and bench.units() == [1, 1]
    assert bench.shown() == [OLD_SHOWN, (100.0, [(100.0, 62)])]
    assert bench.seen(grown) == "fully"
    assert bench.seen(Path(shutil.copy(grown, bench.root / "raw" / "copy.jsonl"))) == "fully"
    grown_again = bench.write("old.jsonl", *OLD, *more, range(300, 330))
    bench.tokenize(grown_again)
    bench.train("--only-new")
    assert bench.trained_words() == once(*OLD, *more, range(300, 330)) and bench.units() == [1, 1, 1]


def test_of_an_edited_file_the_edited_unit_is_new_and_the_others_are_not(bench):
    """A unit is the grain: all of its text comes again, as what it teaches is another text now."""
    more = [range(200, 230), range(230, 260)]
    bench.tokenize(bench.write("old.jsonl", *OLD, *more))
    bench.train("--only-new")
    edited = bench.write("old.jsonl", *OLD, more[0], range(400, 430))  # the added part is a unit of its own
    assert bench.seen(edited).startswith("partly")
    bench.tokenize(edited)
    bench.train("--only-new")
    assert bench.trained_words() == once(*OLD, *more, more[0], range(400, 430)) and bench.units() == [1, 1, 1]
    assert bench.shown() == [OLD_SHOWN, (100.0, [(100.0, 62)]), (100.0, [(100.0, 62)])]
    assert bench.seen(edited) == "fully"


def test_a_file_edited_throughout_is_new(bench):
    edited = bench.write("old.jsonl", range(500, 540), range(540, 590), range(590, 650))
    assert bench.seen(edited) == "never"
    bench.tokenize(edited)
    bench.train("--only-new")
    assert bench.trained_words() == once(*OLD, range(500, 650)) and bench.units() == [1, 1]


def test_the_same_file_twice_in_the_list_and_a_copy_of_it_are_trained_on_once(bench):
    new = bench.write("new.jsonl", range(600, 650))
    shutil.copy(new, bench.root / "raw" / "copy.jsonl")
    bench.tokenize(new, bench.root / "raw" / "old.jsonl", new, new.parent)
    same = f"data_path={json.dumps([str(bench.root / 'set'), str(bench.root / 'set'), str(next((bench.root / 'set').glob('*00000.bin')))])}"
    bench.train("--only-new", same)
    assert bench.trained_words() == once(*OLD, range(600, 650)) and bench.units() == [1, 1]
    assert bench.shown() == [OLD_SHOWN, (100.0, [(100.0, 51)])]


def test_a_phase_cut_short_is_finished_first_and_then_the_new_text_comes(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "partial", ignore=shutil.ignore_patterns("checkpoints"))
    bench = Bench(tmp_path / "partial").configure()
    bench.train("--steps-today", "2")
    before = bench.trained_words()
    assert sum(before.values()) < 150 and max(before.values()) == 1
    assert bench.shown() == [(42.1, [(42.1, 153)])]  # 8 of 19 samples
    assert bench.seen(bench.root / "raw" / "old.jsonl") == "partly (42.10 %)"
    new = bench.write("new.jsonl", range(700, 760))
    bench.tokenize(new)
    assert bench.seen(new) == "never"
    bench.train("--only-new", "--steps-today", "2")
    assert len(bench.ledger().phases) == 1  # still the first: a sitting may end anywhere
    bench.train("--only-new")
    assert bench.trained_words() == once(*OLD, range(700, 760)) and bench.units() == [1, 1]
    assert bench.shown() == [OLD_SHOWN, (100.0, [(100.0, 61)])]
    assert [(phase.first_step, phase.last_step) for phase in bench.ledger().phases] == [(1, 5), (6, 7)]
