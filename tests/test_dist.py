import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from folders import Ranks, free_port, host
from ranks import run_ranks

from llm import dist
from llm.cli import RETRY
from llm.dist import World, pick_device, read_environment
from llm.log import UserError


def collectives(world: World) -> list:
    def fail_on_rank_1() -> None:
        if world.rank == 1:
            raise UserError("only rank 1 knows")

    try:
        world.together(fail_on_rank_1)
        verdict = "went on"
    except UserError as error:
        verdict = str(error)
    return [
        world.sum_ints([world.rank + 1, 2**62]),
        world.gather({"rank": world.rank, "text": "é" * world.rank}),
        world.broadcast(f"from {world.rank}"),
        world.on_rank_0(lambda: world.rank),
        verdict,
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_gets_the_same_answer(tmp_path, size):
    results = run_ranks(collectives, size, tmp_path)
    assert all(result == results[0] for result in results)
    sums, gathered, told, first, verdict = results[0]
    assert sums == [sum(range(1, size + 1)), (size * 2**62 + 2**63) % 2**64 - 2**63]
    assert gathered == [{"rank": r, "text": "é" * r} for r in range(size)]
    assert (told, first) == ("from 0", 0)
    assert verdict == ("only rank 1 knows" if size > 1 else "went on")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, (5, 8, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0)),  # a batch script, without srun
    ],
)
def test_each_launcher_is_understood(monkeypatch, variables, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_environment() == place


@pytest.mark.parametrize(
    ("variables", "all_here"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({}, False),
    ],
)
def test_processes_that_are_all_on_one_host_need_no_address(monkeypatch, variables, all_here):
    for name in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist._is_on_one_host() == all_here


def test_processes_on_several_hosts_without_an_address_are_told_what_to_export(monkeypatch):
    monkeypatch.setattr("os.environ", {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"})
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        dist.start()


def meet_late(rank: int, root: Path) -> None:
    """Rank 1 comes when rank 0 has told that it waits."""
    dist.FIRST_NOTICE_S = 0.5
    while rank == 1 and not any("waiting for" in output.read_text() for output in root.glob("out-0-*")):
        time.sleep(0.05)


def test_a_rank_that_waits_for_others_says_for_whom_and_where(tmp_path):
    for rank in (0, 1):
        host(tmp_path, rank).mkdir()
    ranks = Ranks(tmp_path, [["--config", "nowhere.yaml"]] * 2, meet_late)
    ended = ranks.ended()
    place = f"127.0.0.1:{ranks.meeting['MASTER_PORT']}"
    assert ended.codes == [2, 2] and f"waiting for 1 of 2 ranks at {place} (rank 1), for 0:00 so far" in ended.outputs[0]


def meet_where_nobody_is(rank: int, root: Path) -> None:
    dist.FIRST_NOTICE_S, dist.MEET_WITHIN_S = 0.1, 1.0


def test_a_rank_that_finds_nobody_tells_and_leaves_with_the_code_for_a_retry(tmp_path):
    for rank in (0, 1):
        host(tmp_path, rank).mkdir()
    port = str(free_port())
    one = Ranks(tmp_path, [["--config", "nowhere.yaml"]] * 2, meet_where_nobody_is, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    one.processes[0].kill()
    ended = one.ended()
    assert ended.codes == [-9, RETRY]
    told = f"waiting for rank 0 at 127.0.0.1:{port} (connection refused)"
    assert ended.outputs[1].count(f"{told}, for 0:00 so far") >= 2 and f"Gave up after 0:01: {told}" in ended.outputs[1]


@pytest.mark.parametrize("port", ["in use", "0", "abc"])
def test_a_port_that_cannot_be_used_is_a_mistake_and_named(tmp_path, port):
    for rank in (0, 1):
        host(tmp_path, rank).mkdir()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1]) if port == "in use" else port
        ranks = Ranks(tmp_path, [["--config", "nowhere.yaml"]] * 2, None, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        ranks.processes[0].join(60)
        ranks.processes[1].kill()  # to which nothing tells that it is not rank 0 that listens there
    ended = ranks.ended()
    assert ended.codes[0] == 2 and port in ended.outputs[0] and "MASTER_PORT" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]


def late_by(world: World, seconds: float, after: float | None) -> str:
    """Rank 1 comes late to a collective of each group, with the time-out that a config with `after` sets."""
    import torch.distributed as torch_dist

    own = torch_dist.new_group(timeout=timedelta(seconds=0.3))
    dist.set_timeout(after)
    try:
        for group in (world.group, own, None):
            if world.rank == 1:
                time.sleep(seconds)
            torch_dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return "gave up" if dist.is_lost_rank(error) else str(error)
    return "went on"


@pytest.mark.parametrize(("after", "told"), [(None, "went on"), (0.3, "gave up")])
def test_how_long_ranks_wait_for_each_other_is_what_was_set_last_in_all_groups(tmp_path, after, told):
    assert run_ranks(late_by, 2, tmp_path, 0.6, after)[0] == told


def test_this_very_host_is_reached_through_no_interface():
    assert dist._interface_towards("127.0.0.1") is None
    assert dist._interface_towards("no.such.host.invalid") is None


def pretend_gpus(monkeypatch, free: list[int]) -> None:
    """There is no GPU in CI: torch is made to report these, by free bytes."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i], free[i]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)


def test_alone_without_a_terminal_the_freest_gpu_is_taken_and_a_named_one_always(monkeypatch, capsys):
    pretend_gpus(monkeypatch, [1 << 30, 9 << 30, 2 << 30])
    assert pick_device("auto", World()) == "cuda:1"
    assert "9 GiB free" in capsys.readouterr().out
    assert pick_device("cuda:2", World()) == "cuda:2"
    assert pick_device("cpu", World()) == "cpu"


SMI = """#!/bin/sh
cat "$0.says"
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A driver's tool that says what is in the file beside it."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(SMI)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return script.with_name("nvidia-smi.says")


def pretend_uuids(monkeypatch, uuids: str) -> list[int]:
    """GPUs with these ids, which note when CUDA itself is asked for their memory: that makes a context on each."""
    pretend_gpus(monkeypatch, [1 << 30] * len(uuids))
    contexts = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"{uuids[i]}-{i}"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: contexts.append(i) or (1 << 30, 1 << 30))
    return contexts


@pytest.mark.parametrize(("said", "chosen", "asked"), [
    ("GPU-a-0, 1000\nGPU-b-1, 9000\nGPU-c-2, 2000\n", "cuda:1", []),
    ("GPU-c-2, 2000\nGPU-x-7, 99999\nGPU-b-1, 1\nGPU-a-0, 9000\n", "cuda:0", []),  # in another order, with one that is not visible
    ("GPU-a-0, 0\nGPU-b-1, 0\nGPU-c-2, 5\n", "cuda:2", []),  # the first are full
    ("GPU-a-0, [N/A]\nGPU-b-1, 100\nGPU-c-2, 200\n", "cuda:0", [0]),
    ("GPU-a-0, 100\nGPU-b-1, 9000\n", "cuda:1", [2]),  # a MIG slice, which is not in the list
    ("Failed to initialize NVML: Driver/library version mismatch\n", "cuda:0", [0, 1, 2]),
    ("", "cuda:0", [0, 1, 2]),
])  # fmt: skip
def test_the_driver_is_asked_which_gpu_is_free_and_cuda_only_where_it_does_not_know(monkeypatch, nvidia_smi, said, chosen, asked):
    nvidia_smi.write_text(said)
    contexts = pretend_uuids(monkeypatch, "abc")
    assert pick_device("auto", World()) == chosen and contexts == asked


def test_a_gpu_that_is_full_does_not_keep_the_others_from_being_used(monkeypatch):
    pretend_gpus(monkeypatch, [1, 3 << 30, 5 << 30, 4 << 30])
    ask = torch.cuda.mem_get_info

    def asked(i: int):
        if i == 0:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return ask(i)

    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    monkeypatch.setenv("PATH", "")
    assert pick_device("auto", World()) == "cuda:2"


def test_at_a_terminal_the_person_chooses_the_gpu(monkeypatch):
    import sys

    from llm import log

    class Terminal:
        def isatty(self):
            return True

        def write(self, text):
            pass

        def flush(self):
            pass

    pretend_gpus(monkeypatch, [1 << 30, 9 << 30])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(log._handler, "stream", Terminal())
    for answer, device in (("0", "cuda:0"), ("", "cuda:1")):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert pick_device("auto", World()) == device
    monkeypatch.setattr("builtins.input", lambda _: "7")
    with pytest.raises(UserError, match="no GPU '7'"):
        pick_device("auto", World())


def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    pretend_gpus(monkeypatch, [1 << 30, 1 << 30])
    assert [pick_device("auto", World(rank=r, size=2, local_rank=r)) for r in (0, 1)] == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="has 2 GPUs"):
        pick_device("auto", World(rank=2, size=3, local_rank=2))


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    pretend_gpus(monkeypatch, [])
    assert pick_device("auto", World()) == "cpu"
    with pytest.raises(UserError, match="sees no GPU"):
        pick_device("cuda", World())


@pytest.fixture
def gpu(monkeypatch) -> list:
    """A machine with one GPU, which nothing in this process may touch: what the allocator was told when it was first chosen."""
    told = []
    monkeypatch.setattr("os.environ", {"PATH": ""})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: told.append({k: v for k, v in os.environ.items() if "ALLOC_CONF" in k}))
    monkeypatch.setattr("platform.release", lambda: "6.1.0-generic")
    return told


GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}], ids=str)
def test_gpu_memory_grows_in_place_unless_the_person_has_set_how(monkeypatch, gpu, own):
    os.environ.update(own)
    assert pick_device("auto", World()) == "cuda:0"
    monkeypatch.setattr("llm.dist._meet", mock.Mock(side_effect=ConnectionError))  # when the GPU has been chosen
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    os.environ.update(own)
    with pytest.raises(ConnectionError):
        dist.start(init_method="file:///nowhere", place=(0, 2, 0))
    assert gpu == [own or GROWING] * 2


def test_it_is_left_alone_where_it_would_fail_and_without_a_gpu(monkeypatch, gpu):
    monkeypatch.setattr("platform.release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert pick_device("auto", World()) == "cuda:0" and gpu == [{}]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("platform.release", lambda: "6.1.0-generic")
    assert pick_device("auto", World()) == "cpu" and "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="torch 2.12 is the first that tells")
def test_torch_reads_it_although_it_was_imported_before():
    code = "import torch; from llm import dist; dist.use_growing_segments(); print(torch._C._accelerator_getAllocatorSettings())"
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == GROWING["PYTORCH_ALLOC_CONF"], done.stderr
