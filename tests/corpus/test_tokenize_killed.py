"""Killed at any moment and run again: the same shards as an undisturbed run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raw_text import manifest_id, prose, stamp_of, write_jsonl

from llm.corpus import assemble
from llm.corpus import tokenize_corpus as module
from llm.corpus.tokenize_corpus import WORK, tokenize_corpus
from llm.data.manifest import load_manifest
from llm.log import UserError


@pytest.fixture
def much_text(tmp_path):
    write_jsonl(tmp_path / "raw" / "a.jsonl", [prose(i, 300) for i in range(800)])
    (tmp_path / "raw" / "b.txt").write_text(prose(-1, 3000))
    return tmp_path / "raw"


def kill_during(request, signal_target, after_parts):
    """Run in a process of its own; once `after_parts` parts are there, kill it or one of its workers. Returns what it printed."""
    code = (
        "import sys, json; from pathlib import Path; from llm import cli; from llm.corpus import plan\n"
        "from llm.corpus.tokenize_corpus import Request, tokenize_corpus\n"
        "def main():\n"
        "    plan.MIN_UNIT_BYTES = plan.TASK_BYTES = 8 << 10\n"
        "    a = json.loads(sys.argv[1])\n"
        "    tokenize_corpus(Request(tuple(a['inputs']), Path(a['out']), a['tok'], 64, workers=2, val_ratio=0.1, shard_tokens=10_000))\n"
        "if __name__ == '__main__': cli.run(main)\n"
    )
    script = Path(request.out).parent / "script.py"
    script.write_text(code)
    arguments = json.dumps({"inputs": request.inputs, "out": str(request.out), "tok": request.tokenizer_path})
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    while len(list((request.out / WORK).glob("*.digests"))) < after_parts and process.poll() is None:
        pass
    assert process.poll() is None, process.stdout.read()
    victim = process.pid if signal_target == "parent" else workers_of(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    output = process.communicate()[0]
    return process.returncode, output


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_killed_at_any_part_and_run_again_gives_what_an_undisturbed_run_gives(victim, request_for, much_text, tmp_path, capsys):
    settings = {"workers": 2, "val_ratio": 0.1, "shard_tokens": 10_000}
    tokenize_corpus(request_for("undisturbed", **settings))
    request = request_for("killed", **settings)
    code, output = kill_during(request, victim, after_parts=3)
    if victim == "worker":
        assert code == 2 and "a worker process died" in output and "Run the same command again" in output and "Traceback" not in output
    assert not (request.out / "manifest.json").exists()
    time_out = time.monotonic() + 30
    while True:  # the workers of a killed parent leave by themselves; until then they may hold nothing that stops us
        with contextlib.suppress(UserError):
            tokenize_corpus(request)
            break
        assert time.monotonic() < time_out
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
