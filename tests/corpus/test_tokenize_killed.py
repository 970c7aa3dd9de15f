"""Killed at any moment and run again: the same shards as an undisturbed run."""

import contextlib
import os
import random
import signal
import time

import pytest
from raw_text import manifest_id, prose, stamp_of, write_jsonl
from tokenizing import launch, workers_of

from llm.corpus import assemble
from llm.corpus import tokenize_corpus as module
from llm.corpus.tokenize_corpus import WORK, tokenize_corpus
from llm.data.manifest import load_manifest
from llm.log import UserError

KILLS = 30 if os.environ.get("TORTURE") else 3


@pytest.fixture
def much_text(tmp_path):
    write_jsonl(tmp_path / "raw" / "a.jsonl", [prose(i, 300) for i in range(800)])
    (tmp_path / "raw" / "b.txt").write_text(prose(-1, 3000))
    return tmp_path / "raw"


def kill_when(request, signal_target, pattern, n_files):
    """Once there are so many files of this pattern, kill the run or one of its workers. Returns its exit code and what it printed."""
    process = launch(request, workers=2, val_ratio=0.1, shard_tokens=10_000)
    while len(list(request.out.glob(pattern))) < n_files and process.poll() is None:
        pass
    if process.poll() is None:
        victims = workers_of(process.pid) if signal_target == "worker" else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(victims[0] if victims else process.pid, signal.SIGKILL)
    return process.wait(), process.communicate()[0]


def go_on(request):
    """Run again; the workers of a killed parent leave by themselves, and until then may hold nothing that stops us."""
    time_out = time.monotonic() + 30
    while True:
        try:
            return tokenize_corpus(request)
        except UserError:
            assert time.monotonic() < time_out


@pytest.mark.timeout(900)
def test_killed_at_random_points_and_run_again_gives_what_an_undisturbed_run_gives(request_for, much_text, tmp_path):
    settings = {"workers": 2, "val_ratio": 0.1, "shard_tokens": 10_000}
    tokenize_corpus(request_for("undisturbed", **settings))
    seed = int.from_bytes(os.urandom(4), "big")
    chance, killed = random.Random(seed), 0
    for number in range(KILLS):
        request, victim = request_for(f"killed-{number}", **settings), ("parent", "worker")[number % 2]
        pattern, most = chance.choice([(f"{WORK}/*.digests", 60), (f"{WORK}/*.json", 60), ("*.bin", 6), ("*.tmp", 1)])
        n_files = chance.randint(1, most)
        code, output = kill_when(request, victim, pattern, n_files)
        killed += code != 0
        go_on(request)
        said = f"seed {seed}, kill {number}: {victim} at {n_files} of {pattern}, exit code {code}: {output}"
        assert manifest_id(request.out) == manifest_id(tmp_path / "undisturbed"), said
        assert not list(request.out.glob("*.tmp")) and not (request.out / WORK).exists(), said
    assert killed, "every run ended before it could be killed"


def test_a_worker_that_is_killed_is_told_and_its_run_goes_on_where_it_was(request_for, much_text, tmp_path, capsys):
    settings = {"workers": 2, "val_ratio": 0.1, "shard_tokens": 10_000}
    tokenize_corpus(request_for("undisturbed", **settings))
    request = request_for("killed", **settings)
    code, output = kill_when(request, "worker", f"{WORK}/*.digests", 3)
    assert code == 2 and "a worker process died" in output and "Run the same command again" in output and "Traceback" not in output
    assert not (request.out / "manifest.json").exists()
    go_on(request)
    assert "parts are there already" in capsys.readouterr().out
    assert manifest_id(request.out) == manifest_id(tmp_path / "undisturbed")


def test_killed_between_two_shards_the_rerun_keeps_the_first_and_its_timestamp(request_for, much_text, tmp_path, monkeypatch):
    settings = {"workers": 2, "val_ratio": 0.1, "shard_tokens": 100_000}
    tokenize_corpus(request_for("undisturbed", **settings))
    request, written = request_for("killed", **settings), []
    real = assemble.write_shard

    def dies_at_the_third(*args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(real(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr(assemble, "write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(request)
    monkeypatch.setattr(assemble, "write_shard", real)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    before = {meta.path: meta.path.stat().st_mtime_ns for meta in written}
    report = tokenize_corpus(request)
    assert manifest_id(request.out) == manifest_id(tmp_path / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {stamp_of(meta.name) for meta in report.shards} == {stamp_of(written[0].name)}


def test_a_rerun_with_other_files_leaves_no_shard_of_the_interrupted_one(request_for, much_text, tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", dies)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(request_for(shard_tokens=100_000))
    (much_text / "a.jsonl").unlink()
    report = tokenize_corpus(request_for())
    assert sorted(request_for().out.glob("*.meta.json")) == sorted(meta.path for meta in report.shards)
    assert manifest_id(request_for().out) == load_manifest(request_for().out).manifest_id
