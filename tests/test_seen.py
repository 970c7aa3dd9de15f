"""`ledger.py seen` and `untrained` on texts of all kinds, tokenized by a BPE."""

import json
import random
import re
import shutil
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from little_run import sit_alone

from llm.corpus.encode import Request
from llm.corpus.tokenize_corpus import tokenize_corpus
from llm.data.manifest import find_shards
from llm.log import UserError
from llm.tokenizer import load_tokenizer
from llm.tokenizer.train import train_bpe
from tools import ledger as ledger_tool

RNG = random.Random(5)
WORDS = [
    "".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(300)
]
LICENCE = " ".join(RNG.choices(WORDS, k=60))


def text(n_words: int = 150) -> str:
    return " ".join(RNG.choices(WORDS, k=n_words))


TRAINED = [text() for _ in range(30)]
LATER = [text() for _ in range(4)]
IDS = [text(30) for _ in range(20)] + [text(3)]
FOREIGN = [text() for _ in range(8)]
TRAINED[3] += " " + LICENCE


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run that was trained on TRAINED, less what is held out, and IDS; LATER came afterwards."""
    root = tmp_path_factory.mktemp("seen")
    tokenizer = train_bpe([*TRAINED, *LATER, *IDS], vocab_size=500).tokenizer
    (root / "tokenizer").mkdir()
    tokenizer.save(root / "tokenizer")
    lists = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(IDS)]
    (root / "ids.jsonl").write_text("".join(json.dumps(ids) + "\n" for ids in lists))
    tokenize(root, jsonl(root / "trained.jsonl", TRAINED))
    cfg = {
        "n_layers": 1,
        "d_model": 16,
        "n_heads": 2,
        "d_ff": 24,
        "seq_len": 64,
        "lr": 1e-2,
        "batch_size": 8,
        "batch_tokens": 512,
        "save_every": 0,
        "precision": "fp32",
        "tensorboard": False,
        "device": "cpu",
        "tokenizer_path": str(root / "tokenizer"),
        "eval_every": 0,
        "data_path": {"texts": str(root / "set"), "lists": str(root / "ids.jsonl")},
        "checkpoint_dir": str(root / "checkpoints"),
    }
    (root / "run.json").write_text(json.dumps(cfg))
    sit_alone(root, root / "run.json")
    tokenize(root, jsonl(root / "later.jsonl", LATER))
    return root


def tokenize(root: Path, path: Path) -> None:
    tokenize_corpus(Request((str(path),), root / "set", str(root / "tokenizer"), 64, val_ratio=0.2))


@cache
def held_out(root: Path) -> list[str]:
    """The texts of the validation shards, read back from these."""
    tokenizer, texts = load_tokenizer(root / "tokenizer"), []
    for shard in find_shards([root / "set"], "val"):
        ends = [0, *shard.doc_ends.tolist()]
        texts += [tokenizer.decode(shard.tokens(a, b - 1)) for a, b in pairwise(ends)]
    return texts


@pytest.fixture
def ask(root, capsys, monkeypatch):
    def asked(command: str, *words, run: str = "run") -> str:
        monkeypatch.setattr(
            sys, "argv", ["ledger.py", command, str(root / "checkpoints" / run), *map(str, words)]
        )
        ledger_tool.main()
        return capsys.readouterr().out

    return asked


def seen_share(told: str, file: Path) -> float:
    """0 for never, 1 for fully."""
    verdict = re.search(rf"^{re.escape(str(file))}: (.*)$", told, re.M)[1]
    partly = re.fullmatch(r"partly \(([\d.]+) %\)", verdict)
    return float(partly[1]) / 100 if partly else {"never": 0.0, "fully": 1.0}[verdict]


def own(root: Path) -> list[str]:
    return [t for t in TRAINED if t not in held_out(root)]


# name -> (what writes the file, the share to be told, least and most)
def one_document(root, path):
    return jsonl(path / "x.jsonl", [own(root)[2]])


def a_cut_out_in_the_middle_of_words(root, path):
    (path / "x.txt").write_text(own(root)[4][103:471])
    return path / "x.txt"


def half_of_the_file(root, path):
    return jsonl(path / "x.jsonl", own(root)[:12])


def half_of_a_document(root, path):
    return jsonl(path / "x.jsonl", [own(root)[5][:400]])


def all_in_another_order_and_one_text(root, path):
    (path / "x.txt").write_text("\n\n".join(reversed(own(root))))
    return path / "x.txt"


def in_the_field_of_a_table(root, path):
    (path / "x.csv").write_text(
        "n,text\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(own(root)[6:9]))
    )
    return path / "x.csv"


def said_in_a_chat(root, path):
    turns = [
        {"role": "user", "content": own(root)[7]},
        {"role": "assistant", "content": own(root)[8]},
    ]
    (path / "x.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return path / "x.jsonl"


def the_ids(root, path):
    return root / "ids.jsonl"


def some_of_the_ids_under_another_name(root, path):
    lines = (root / "ids.jsonl").read_text().splitlines(keepends=True)
    (path / "y.jsonl").write_text("\n" + "".join(lines[3:9] + lines[-1:]))
    return path / "y.jsonl"


def the_text_of_the_ids(root, path):
    return jsonl(path / "x.jsonl", IDS)


FOUND = {
    one_document: (1, 1),
    a_cut_out_in_the_middle_of_words: (0.99, 1),
    half_of_the_file: (1, 1),
    half_of_a_document: (0.95, 1),
    all_in_another_order_and_one_text: (0.9, 0.99),
    in_the_field_of_a_table: (1, 1),
    said_in_a_chat: (0.9, 1),
    the_ids: (1, 1),
    some_of_the_ids_under_another_name: (1, 1),
    the_text_of_the_ids: (1, 1),
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_text_that_was_trained_on_is_found_however_it_comes(root, tmp_path, ask, kind):
    file, (least, most) = kind(root, tmp_path), FOUND[kind]
    told = ask("seen", file)
    assert least <= seen_share(told, file) <= most, told


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_foreign_text_was_never_trained_on(root, tmp_path, ask, suffix):
    file = tmp_path / f"x.{suffix}"
    jsonl(file, FOREIGN) if suffix == "jsonl" else file.write_text("\n".join(FOREIGN))
    told = ask("seen", file)
    assert (
        seen_share(told, file) == 0
        and "windows trained on" not in told
        and "not compared" not in told
    )


def test_a_licence_that_foreign_text_shares_is_told_as_so_many_windows_of_its_document(
    root, tmp_path, ask
):
    file = jsonl(
        tmp_path / "x.jsonl", [FOREIGN[0], f"{FOREIGN[1]} {LICENCE} {FOREIGN[2]}", own(root)[1]]
    )
    told = ask("seen", file, "--documents", tmp_path / "found.jsonl")
    records = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    shares = [record["trained"] / record["windows"] for record in records]
    assert shares[0] == 0 and 0.05 < shares[1] < 0.3 and shares[2] == 1
    assert (
        f"document 1: {records[1]['trained']} of {records[1]['windows']} windows trained on" in told
        and "document 0:" not in told
    )
    assert records[2]["places"][0][1:] == ["trained.jsonl", own(root).index(own(root)[1])]
    assert records[2]["by_run"] == {"run": records[2]["windows"]}


def test_text_that_is_tokenized_but_in_no_phase_is_told_with_its_shard(root, tmp_path, ask):
    later = [t for t in LATER if t not in held_out(root)]
    for file in (root / "later.jsonl", jsonl(tmp_path / "x.jsonl", later[:1])):
        told = ask("seen", file)
        assert seen_share(told, file) == 0 and "--separator" not in told
        assert re.search(
            r"[1-9]\d* windows are tokenized, in shards that no phase holds: set.cached.64", told
        )


def test_a_document_that_is_held_out_was_never_trained_on_and_that_is_said(root, tmp_path, ask):
    file = jsonl(tmp_path / "x.jsonl", held_out(root)[:1])
    told = ask("seen", file)
    assert seen_share(told, file) == 0 and re.search(
        r"(\d+) windows stand in validation shards", told
    )


def test_without_the_shards_never_is_not_said_of_what_could_not_be_compared(root, tmp_path, ask):
    file = one_document(root, tmp_path)
    told = ask("seen", file, "--data", tmp_path / "gone")
    assert f"{file}: never, but not all could be compared" in told
    assert re.search(
        r"not compared: 2 shards of [\d,]+ tokens that the run itself was trained on", told
    )
    told = ask("seen", root / "trained.jsonl", "--data", tmp_path / "gone")
    assert f"{root / 'trained.jsonl'}: fully" in told  # a whole file is known by content


def test_a_damaged_shard_is_named_and_takes_nothing_from_what_others_hold(root, tmp_path, ask):
    shutil.copytree(root / "set", tmp_path / "set")
    shutil.copytree(root / "ids.imported", tmp_path / "ids.imported")
    (path,) = (tmp_path / "ids.imported").glob("*.bin")
    path.write_bytes(bytes(path.stat().st_size))
    file = one_document(root, tmp_path)
    told = ask("seen", file, "--data", tmp_path / "set", tmp_path / "ids.imported")
    assert seen_share(told, file) == 1 and f"not compared: {path}" in told


def test_an_answer_that_cannot_be_written_is_a_mistake_of_the_users(root, tmp_path, ask):
    with pytest.raises(UserError, match="no folder"):
        ask("seen", one_document(root, tmp_path), "--documents", tmp_path / "no" / "x.jsonl")


# ---------------------------------------------------------------- what is left


def test_untrained_names_each_shard_and_file_of_which_something_is_left(root, ask):
    told = ask("untrained")
    tokens = {
        int(n.replace(",", ""))
        for n in re.findall(
            r"^  ([\d,]+) of \1 tokens  \S+ \(later.jsonl\): in no phase", told, re.M
        )
    }
    (later,) = [
        s for s in find_shards([root / "set"], "train") if s.meta.units[0]["name"] == "later.jsonl"
    ]
    assert tokens == {later.meta.n_tokens}
    assert (
        f"left untrained: {later.meta.n_tokens:,} tokens in 1 shards; "
        "files in no phase: later.jsonl" in told
    )


def test_untrained_knows_text_by_its_units_whatever_shard_it_is_in(root, tmp_path, ask):
    inputs = (str(root / "trained.jsonl"),)
    tokenize_corpus(Request(inputs, tmp_path / "again", str(root / "tokenizer"), 64))
    assert "left untrained: 0 tokens in 0 shards" in ask("untrained", "--data", tmp_path / "again")


def test_untrained_counts_the_samples_of_an_open_phase_and_the_new_lines_of_ids(
    root, tmp_path, ask, monkeypatch
):
    cfg = json.loads((root / "run.json").read_text()) | {
        "run_name": "open",
        "data_path": str(tmp_path / "a.jsonl"),
    }
    (tmp_path / "a.jsonl").write_text("".join(f"{[n, n + 1, n + 2]}\n" for n in range(0, 300, 3)))
    (tmp_path / "run.json").write_text(json.dumps(cfg))
    sit_alone(tmp_path, tmp_path / "run.json", ["batch_tokens=128", "batch_size=2"], steps_today=1)
    told = ask("untrained", run="open")
    assert re.search(
        r"^  3 of 5 samples, (171|192) of 299 tokens  a.cached.64.\w+ \(a.jsonl\): phase p0$",
        told,
        re.M,
    ), told
    (tmp_path / "a.jsonl").write_text("".join(f"{[n, n + 1, n + 2]}\n" for n in range(0, 330, 3)))
    assert f"not counted: what has changed in {tmp_path / 'a.jsonl'}" in ask(
        "untrained", run="open"
    )
    sit_alone(tmp_path, tmp_path / "run.json", ["batch_tokens=128", "batch_size=2"])
    told = ask("untrained", run="open")
    assert "left untrained: 30 tokens in 1 shards" in told and "30 of 330 tokens" in told
    sit_alone(tmp_path, tmp_path / "run.json", ["batch_tokens=128", "batch_size=2"], only_new=True)
    assert "left untrained: 0 tokens in 0 shards; files in no phase: none" in ask(
        "untrained", run="open"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no document"),
        ("[]\n\n", "no list of token ids"),
        ("[1, 2, 99999]\n", "99999"),
        ('[1]\n"a"\n', "x.jsonl:2"),
    ],
)
def test_a_file_that_holds_nothing_to_ask_for_is_a_mistake_of_the_users(
    tmp_path, ask, content, what
):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=what):
        ask("seen", tmp_path / "x.jsonl")


def test_documents_of_a_shard_are_looked_for_and_ids_of_another_tokenizer_are_refused(
    root, tmp_path, ask
):
    jsonl(tmp_path / "some.jsonl", [*own(root)[3:8], *FOREIGN[:5]])
    tokenize_corpus(
        Request((str(tmp_path / "some.jsonl"),), tmp_path / "set", str(root / "tokenizer"), 64)
    )
    (shard,) = (tmp_path / "set").glob("*.bin")
    told = ask("seen", shard)
    assert 0.2 < seen_share(told, shard) < 0.6 and "compared: 10 documents" in told
    assert len(re.findall(r"document \d+: (\d+) of \1 windows trained on:", told)) == 5
    held = find_shards([root / "set"], "val")[0].meta.file("bin")
    assert seen_share(ask("seen", held), held) == 0
    other = train_bpe(TRAINED[:5], vocab_size=300).tokenizer
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    tokenize_corpus(
        Request((str(tmp_path / "some.jsonl"),), tmp_path / "set2", str(tmp_path / "other"), 64)
    )
    (shard,) = (tmp_path / "set2").glob("*.bin")
    with pytest.raises(UserError, match="made with tokenizer"):
        ask("seen", shard)
