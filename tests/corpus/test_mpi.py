"""Many machines, as ranks of mpirun on this one."""

import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from raw_text import contents
from tokenizing import launch

from llm.corpus.tokenize_corpus import tokenize_corpus

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not MPIRUN, reason="there is no mpirun: pip install 'tally-llm[mpi]'"),
    pytest.mark.skipif(not find_spec("mpi4py"), reason="mpi4py is missing: pip install 'tally-llm[mpi]'"),
]
RANKS = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "3"]
SETTINGS = {"val_ratio": 0.1, "shard_tokens": 10_000}


def test_one_worker_three_workers_and_three_ranks_give_the_same_bytes(request_for, raw):
    for workers in (1, 3):
        tokenize_corpus(request_for(f"{workers}/data", workers=workers, **SETTINGS))
    ranks = launch(request_for("ranks/data"), RANKS, **SETTINGS)
    assert ranks.communicate()[0].count("reference") <= 1 and ranks.returncode == 0
    one, three, mpi = (contents(request_for(f"{name}/data").out) for name in ("1", "3", "ranks"))
    assert len(one) >= 6 and one == three == mpi


def test_a_mistake_ends_all_ranks_with_one_message(request_for, raw, tmp_path):
    ranks = launch(request_for(inputs=(str(tmp_path / "nowhere"),)), RANKS)
    assert ranks.communicate()[0].count("nowhere: no such file or folder") == 1 and ranks.returncode == 2


def test_a_rank_that_is_killed_ends_all_and_the_same_command_goes_on(request_for, raw):
    tokenize_corpus(request_for("whole/data", **SETTINGS))
    request = request_for("killed/data")
    ranks = launch(request, RANKS, **SETTINGS)
    while not list((request.out / ".work").glob("*.digests")) and ranks.poll() is None:
        pass
    assert ranks.poll() is None
    os.kill(ranks_of(ranks.pid)[-1], signal.SIGKILL)
    assert "signal 9" in ranks.communicate()[0] and ranks.returncode != 0
    assert not (request.out / "manifest.json").exists()
    again = launch(request, RANKS, **SETTINGS)
    assert again.communicate()[0] and again.returncode == 0
    assert contents(request.out) == contents(request_for("whole/data").out)


def ranks_of(pid):
    """The processes that mpirun has started, in order."""
    found, todo = [], [pid]
    while todo:
        at = todo.pop()
        for child in Path(f"/proc/{at}/task/{at}/children").read_text().split():
            (found if "script.py" in Path(f"/proc/{child}/cmdline").read_text() else todo).append(int(child))
    return sorted(found)
