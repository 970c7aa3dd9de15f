"""used_by.json keeps a tokenizer from being replaced unawares; where it is never written."""

import json
import os
import runpy
import shutil
import sys
from base64 import b64encode
from pathlib import Path

import pytest
from little_run import add_shard
from raw_text import prose, write_jsonl
from test_commands import command
from test_text_tools import ROOT, tool

from llm.corpus.tokenizer_use import begin_note, datasets_made_with, note_use
from llm.log import UserError
from llm.tokenizer import load_tokenizer
from llm.tokenizer.train import train_bpe


@pytest.fixture(scope="module")
def trained():
    return {size: train_bpe([prose(0, 3000)], size).tokenizer for size in (256, 270)}


@pytest.fixture
def text(tmp_path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", [prose(0, 2000)])


def of_train_tokenizer(folder: Path, tokenizer) -> Path:
    folder.mkdir(parents=True)
    begin_note(folder)
    tokenizer.save(folder)
    return folder


def downloaded(folder: Path, tokenizer) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    return folder


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} | {
        "": (b"", folder.stat().st_mtime_ns)
    }


def test_tokenizing_writes_nothing_into_the_folder_of_a_download(tmp_path, text, trained):
    folder = downloaded(tmp_path / "theirs", trained[256])
    before = state(folder)
    code, said = tool(
        "tokenize_parallel.py",
        text,
        "--tokenizer",
        folder,
        "--seq-len",
        64,
        "--out",
        tmp_path / "set",
        "--workers",
        1,
    )
    assert code == 0 and "used_by" not in said, said
    assert state(folder) == before


FOREIGN = {
    "a checkpoint": lambda folder: (folder.parent / "MANIFEST.json").write_text("{}"),
    "one of another user's": lambda folder: [begin_note(folder), os.chown(folder, 12345, 12345)],
    "one that is protected": lambda folder: [begin_note(folder), folder.chmod(0o555)],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_is_noted_in_a_folder_that_is_not_ours(tmp_path, trained, kind):
    if "user" in kind and os.geteuid():
        pytest.skip("only root can give a folder away")
    folder = downloaded(tmp_path / "theirs" / "tokenizer", trained[256])
    FOREIGN[kind](folder)
    before = state(folder)
    note_use(folder, tmp_path / "set")
    assert state(folder) == before
    folder.chmod(0o755)


def test_a_note_leads_to_the_dataset_whichever_way_the_tokenizer_was_named(
    tmp_path, trained, monkeypatch
):
    folder = of_train_tokenizer(tmp_path / "deep" / "down" / "tokenizer", trained[256])
    (tmp_path / "link").symlink_to(folder)
    add_shard(tmp_path / "set", folder, 0, 100)
    monkeypatch.chdir(folder)
    for named in (folder, tmp_path / "link", folder / "tokenizer.json", Path(".")):
        (folder / "used_by.json").write_text("[]")
        note_use(named, tmp_path / "set")
        assert json.loads((folder / "used_by.json").read_text()) == ["../../../set"], named
        for again in (folder, tmp_path / "link", Path(".")):
            assert datasets_made_with(again, trained[256].fingerprint) == [tmp_path / "set"], (
                named,
                again,
            )


def test_a_dataset_that_moves_with_its_tokenizer_is_found(tmp_path, trained):
    folder = of_train_tokenizer(tmp_path / "here" / "tokenizer", trained[256])
    add_shard(tmp_path / "here" / "set", folder, 0, 100)
    note_use(folder, tmp_path / "here" / "set")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert datasets_made_with(tmp_path / "there" / "tokenizer", trained[256].fingerprint) == [
        tmp_path / "there" / "set"
    ]


NOTES = {
    "relative": lambda folder, dataset: [os.path.relpath(dataset, folder)],
    "relative to a link": lambda folder, dataset: [
        os.path.relpath(dataset, folder.parent.parent / "link")
    ],
    "absolute": lambda folder, dataset: [str(dataset)],
}


@pytest.mark.parametrize("note", NOTES)
def test_a_note_of_an_earlier_version_is_still_read(tmp_path, trained, note):
    folder = downloaded(tmp_path / "deep" / "tokenizer", trained[256])
    (tmp_path / "link").symlink_to(folder)
    add_shard(tmp_path / "set", folder, 0, 100)
    (folder / "used_by.json").write_text(
        json.dumps(NOTES[note](folder, tmp_path / "set"), indent=1)
    )
    assert datasets_made_with(tmp_path / "link", trained[256].fingerprint) == [tmp_path / "set"]


def without_a_note(folder: Path, tokenizer) -> None:
    downloaded(folder, tokenizer)


def with_a_torn_note(folder: Path, tokenizer) -> None:
    downloaded(folder, tokenizer)
    (folder / "used_by.json").write_text('["../se')


def gpt2(folder: Path, tokenizer) -> None:
    folder.mkdir()
    ranks = {bytes([b]): b for b in range(256)}
    (folder / "gpt2.tiktoken").write_text(
        "".join(f"{b64encode(t).decode()} {rank}\n" for t, rank in ranks.items())
    )


def torn(folder: Path, tokenizer) -> None:
    of_train_tokenizer(folder, tokenizer)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])


@pytest.mark.parametrize(
    "there", [without_a_note, with_a_torn_note, gpt2, torn], ids=lambda there: there.__name__
)
def test_what_nothing_is_known_of_is_replaced_by_force_alone(tmp_path, text, trained, there):
    there(tmp_path / "tokenizer", trained[256])
    before = state(tmp_path / "tokenizer")
    save = runpy.run_path(str(ROOT / "tools/train_tokenizer.py"))["_save"]
    with pytest.raises(UserError, match=f"{tmp_path}/tokenizer.*--force") as refused:
        save(trained[270], tmp_path / "tokenizer", force=False)
    assert refused.value.exit_code == 2 and state(tmp_path / "tokenizer") == before
    save(trained[270], tmp_path / "tokenizer", force=True)
    assert load_tokenizer(tmp_path / "tokenizer").fingerprint == trained[270].fingerprint


def test_a_full_disk_leaves_the_tokenizer_that_datasets_need_and_the_next_try_replaces_it(
    tmp_path, text, trained
):
    folder = of_train_tokenizer(tmp_path / "tokenizer", trained[256])
    before = (folder / "tokenizer.json").read_bytes()
    train = [
        sys.executable,
        "tools/train_tokenizer.py",
        text,
        "--vocab-size",
        "270",
        "--out",
        folder,
        "--force",
    ]
    done = command(
        "bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", *train, PYTHONDONTWRITEBYTECODE="1"
    )
    assert (
        done.returncode == 2
        and str(folder) in done.stderr + done.stdout
        and "Traceback" not in done.stderr
    )
    assert (folder / "tokenizer.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "used_by.json"]
    assert command(*train).returncode == 0
    assert load_tokenizer(folder).vocab_size == 274
