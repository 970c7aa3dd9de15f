"""Checkpoints from somebody who means ill, hashes recomputed: refused in words, at once, with nothing read or run that is not theirs."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from resealing import forge
from test_save_and_resume import NUMEL, names, save_step

from llm.checkpoint import manifest as manifest_module
from llm.checkpoint.errors import Unjudged
from llm.checkpoint.manifest import NAME, read_manifest
from llm.checkpoint.resume import newest, open_checkpoint
from llm.checkpoint.slices import CheckpointError
from llm.cli import NEEDS_A_PERSON
from llm.dist import World


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    return save_step(World(), run, 1)


PATHS = [
    "../x",
    "/etc/passwd",
    "a/b",
    "tokenizer/../../x",
    "tokenizer/../x",
    "C:\\x",
    "C:x",
    "..",
    ".",
    "",
    ".hidden",
    "a\0b",
    "a\nb",
    "shard\n",
    "ä",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_name_that_is_not_plain_is_refused(checkpoint, path):
    forge(checkpoint, lambda fields: fields["files"][1].update(path=path))
    with pytest.raises(CheckpointError, match=NAME):
        open_checkpoint(checkpoint)


LINEAGES = ["../step-000000001-a1", "step-1-a1", "step-000000001-a1/..", "step-000000001-a1\n"]


@pytest.mark.parametrize("name", LINEAGES)
def test_a_lineage_of_anything_but_checkpoints_is_refused(checkpoint, name):
    forge(checkpoint, lambda fields: fields.update(lineage=[name]))
    with pytest.raises(CheckpointError, match=NAME):
        open_checkpoint(checkpoint)


SHAPES = {
    "more elements than there are": lambda f: f["params"][0].update(shape=[NUMEL + 1]),
    "elements beyond counting": lambda f: f["params"][0].update(shape=[2**62, 2**62]),
    "elements twice": lambda f: f["files"][0]["chunks"].append(f["files"][0]["chunks"][0]),
    "a moment missing": lambda f: f["files"][0]["chunks"].pop(),
    "a slice of nothing known": lambda f: f["files"][0]["chunks"][0].update(name="other"),
    "the moments of a thinned one": lambda f: f.update(format="tally-weights/1"),
}


@pytest.mark.parametrize("lie", SHAPES)
def test_slices_that_do_not_make_up_the_parameters_are_refused_before_anything_is_read(checkpoint, lie):
    forge(checkpoint, SHAPES[lie])
    with pytest.raises(CheckpointError, match=f"{NAME}: (w|other)/"):
        open_checkpoint(checkpoint)


def shard_of(checkpoint: Path, content: bytes) -> None:
    """Replace the shard, and its hash and size in the manifest."""
    path = next(checkpoint.glob("shard-*"))
    path.write_bytes(content)
    forge(checkpoint, lambda f: f["files"][0].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))


def with_header(fields: dict | str, data: bytes = bytes(12 * NUMEL)) -> bytes:
    text = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes) -> dict:
    return {"w/fp32/0": {"dtype": "F32", "shape": [NUMEL], "data_offsets": [0, 4 * NUMEL]} | changes}


SHARDS = {
    "nothing": b"",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 2^64 - 1 bytes": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "deep brackets": with_header("[" * 100_000),
    "no such tensor": with_header({"x": entry()["w/fp32/0"]}, bytes(4 * NUMEL)),
    "a tensor beyond the end": with_header(entry(data_offsets=[0, 2**40])),
    "a shape of 2^64 elements": with_header(entry(shape=[2**32, 2**32])),
    "a shorter tensor": with_header(entry(shape=[3], data_offsets=[0, 12]), bytes(12)),
    "another type": with_header(entry(dtype="I32"), bytes(4 * NUMEL)),
    "more dimensions": with_header(entry(shape=[NUMEL // 2, 2]), bytes(4 * NUMEL)),
    "negative offsets": with_header(entry(data_offsets=[-4, 4 * NUMEL])),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_shard_that_lies_about_itself_is_refused_by_name(checkpoint, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard_of(checkpoint, SHARDS[kind])
    found = open_checkpoint(checkpoint)  # its hash is right, after all
    with pytest.raises(CheckpointError, match="shard-00000-of-00001"):
        found.reader.read_full("w")
    assert names(tmp_path) == {"run"}


def test_a_manifest_larger_than_any_is_not_read(checkpoint, monkeypatch):
    monkeypatch.setattr(manifest_module, "MAX_BYTES", 500)
    with pytest.raises(CheckpointError, match="larger than 500 bytes"):
        read_manifest(checkpoint)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "endless", "link", "folder"])
def test_a_manifest_that_is_no_plain_file_is_refused_and_not_waited_for(checkpoint, kind, tmp_path):
    path = checkpoint / NAME
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to("/dev/zero" if kind == "endless" else tmp_path / "elsewhere")
    with pytest.raises(Unjudged, match=NAME):
        read_manifest(checkpoint)
    with pytest.raises(Unjudged, match=NAME) as refused:
        newest(World(), checkpoint.parent)
    assert refused.value.exit_code == NEEDS_A_PERSON
    assert names(checkpoint.parent) == {checkpoint.name, "RUN.json"}  # no hash proves it wrong, so it is not moved


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
@pytest.mark.timeout(20)
def test_a_file_of_a_checkpoint_that_is_no_plain_file_is_refused_and_not_waited_for(checkpoint, kind, tmp_path):
    path = next(checkpoint.glob("rank-*"))
    path.rename(tmp_path / "elsewhere")
    {"pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(tmp_path / "elsewhere"), "folder": path.mkdir}[kind]()
    with pytest.raises(Unjudged, match=path.name):
        open_checkpoint(checkpoint)
    with pytest.raises(Unjudged, match=path.name):
        newest(World(), checkpoint.parent)
    assert names(checkpoint.parent) == {checkpoint.name, "RUN.json"}


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 2}}', '"x"', "1" * 5000, "\ufeff{}", "\x00"]
)
def test_json_that_is_not_quite_json_is_no_manifest(checkpoint, text):
    (checkpoint / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=NAME):
        read_manifest(checkpoint)


def test_numbers_that_are_not_finite_are_refused_anywhere_in_a_manifest(checkpoint):
    forge(checkpoint, lambda f: f.update(engine={"lr": float("nan")}))
    with pytest.raises(CheckpointError, match=NAME):
        read_manifest(checkpoint)
