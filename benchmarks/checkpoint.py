"""How long does a save stop training, and how fast is it against torch.distributed.checkpoint on the same state?

  python benchmarks/checkpoint.py
  python benchmarks/checkpoint.py --params 300M --folder /mnt/disk --out build/checkpoint.json

The state is a weight and two Adam moments in fp32 for so many parameters, in matrices of 4M, as one rank owns them. Contenders take
turns, every other round backwards, so that a busy disk, or one that tires, slows all of them alike: ours at once, ours in a thread (what the
loop waits for: the copy, and later the commit), and DCP's own `save` and `async_save`, which neither hash nor read again. Each first turn is
left out: it makes the buffers. With --synchronous only the two that wait.

At the end, how long the threads of one more save of ours were busy with each part of it. The parts
overlap, so their sum is more than the save took.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from machine import machine, write_json

from llm import cli
from llm.checkpoint import direct, saver
from llm.checkpoint.manifest import Manifest, Parameter
from llm.checkpoint.saver import Save
from llm.checkpoint.slices import KINDS, Slice
from llm.checkpoint.staging import Staging
from llm.dist import World
from llm.log import log

MATRIX = 1 << 22


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    root = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.folder))
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=0, world_size=1)  # DCP's async_save asks for one
    try:
        slices = make_state(args.params, args.device)
        rounds = [take_turns(root, slices, args.think, args.synchronous, backwards=n % 2 == 1) for n in range(args.rounds + 1)][1:]
        parts = alone(root, lambda folder: busy_seconds(folder, slices))
    finally:
        dist.destroy_process_group()
        shutil.rmtree(root)
    report = summarise(rounds, sum(4 * s.values.numel() for s in slices))
    report |= {"rounds": rounds, "busy_seconds": parts}
    report |= {"params": args.params, "machine": machine(["torch", "numpy"])}
    print_table(report)
    write_json(report, args.out)


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--params", type=cli.amount, default=30_000_000, metavar="N", help="parameters, for example 300M (default 30M)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each that are counted (default 3)")
    parser.add_argument("--think", type=float, default=0.05, metavar="S", help="seconds between two looks whether the thread is done")
    parser.add_argument("--synchronous", action="store_true", help="leave the asynchronous saves out")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    parser.add_argument("--device", default="cpu", help="where the state lies: cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    return parser.parse_args()


def make_state(params: int, device: str) -> list[Slice]:
    sizes = [MATRIX] * (params // MATRIX) + ([params % MATRIX] if params % MATRIX else [])
    return [Slice(f"layer.{i}.weight", kind, 0, torch.randn(n, device=device)) for i, n in enumerate(sizes) for kind in KINDS]


def manifest_of(slices: list[Slice]) -> Manifest:
    params = [Parameter(name=s.name, shape=[s.values.numel()]) for s in slices if s.kind == "fp32"]
    return Manifest(
        run_id="r", attempt=1, step=1, tokens_seen=0, parent=None, world_size=1, global_rows=1, config={}, tokenizer_fingerprint="", ledger={},
        chain="", engine={}, versions={}, metrics={}, epoch_end=False, params=params, files=[], state_hash=0,
    )  # fmt: skip


def take_turns(root: Path, slices: list[Slice], think_s: float, synchronous: bool, backwards: bool) -> dict[str, float]:
    """Seconds of each contender; each writes into an empty folder, and what the one before left is on the disk by then."""
    state = {s.key: s.values for s in slices}

    def ours(folder: Path, staging: Staging | None = None) -> Save:
        return Save(World(), folder, manifest_of(slices), slices, lambda checkpoint: None, staging=staging)

    def at_once(folder: Path) -> dict[str, float]:
        started_at = time.perf_counter()
        saving = ours(folder)
        saving.write()
        saving.commit()
        return {"ours": time.perf_counter() - started_at}

    def in_a_thread(folder: Path) -> dict[str, float]:
        started_at = time.perf_counter()
        saving = ours(folder, STAGING)
        saving.start()
        begun_at = time.perf_counter()
        while not saving.written:
            time.sleep(think_s)
        written_at = time.perf_counter()
        saving.commit()
        ended_at = time.perf_counter()
        return {"ours async, blocked": begun_at - started_at + ended_at - written_at, "ours async, in all": ended_at - started_at}

    def dcp_at_once(folder: Path) -> dict[str, float]:
        started_at = time.perf_counter()
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
        return {"dcp": time.perf_counter() - started_at}

    def dcp_in_a_thread(folder: Path) -> dict[str, float]:
        started_at = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=folder / "dcp", async_stager=DCP_STAGER)
        begun_at = time.perf_counter()
        future.result()
        return {"dcp async, blocked": begun_at - started_at, "dcp async, in all": time.perf_counter() - started_at}

    turns = (at_once, dcp_at_once) if synchronous else (at_once, in_a_thread, dcp_at_once, dcp_in_a_thread)
    return {k: v for turn in (reversed(turns) if backwards else turns) for k, v in alone(root, turn).items()}


PARTS = {
    "look for NaN": (saver, "check_finite"),
    "copy to buffers": (direct, "_fill"),
    "write": (direct, "_write_all"),
    "fsync": (os, "fsync"),
    "read back, compare": (direct, "_check_same"),
    "SHA-256": (direct, "_sha256"),
    "hash of the state": (saver, "state_hash"),
}


def busy_seconds(folder: Path, slices: list[Slice]) -> dict[str, float]:
    """What the threads of one save spend in each part, and the save."""
    seconds = {part: [] for part in PARTS}
    originals = {part: getattr(*place) for part, place in PARTS.items()}

    def timed(part: str) -> Callable:
        def work(*args):
            started_at = time.perf_counter()
            try:
                return originals[part](*args)
            finally:
                seconds[part].append(time.perf_counter() - started_at)

        return work

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(part))
    started_at = time.perf_counter()
    try:
        saving = Save(World(), folder, manifest_of(slices), slices, lambda checkpoint: None)
        saving.write()
        saving.commit()
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])
    took = time.perf_counter() - started_at
    return {part: sum(spent) for part, spent in seconds.items()} | {"the save": took}


STAGING = Staging()
DCP_STAGER = dcp.staging.BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())  # its cache is page-locked, so needs a GPU


def alone(root: Path, turn: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    folder = root / "turn"
    folder.mkdir()
    os.sync()
    result = turn(folder)
    shutil.rmtree(folder)
    return result


def summarise(rounds: list[dict[str, float]], state_bytes: int) -> dict:
    """Medians over rounds; ratios are taken within a round, and their mean over both orders."""
    def median(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(of(r) for r in rounds)

    report = {
        "state_gb": state_bytes / 1e9,
        "seconds": {name: median(lambda r, name=name: r[name]) for name in rounds[0]},
        "throughput_by_dcp": statistics.geometric_mean([r["dcp"] / r["ours"] for r in rounds]),
    }
    if "ours async, blocked" in rounds[0]:
        report["blocked_share_of_ours"] = median(lambda r: r["ours async, blocked"] / r["ours"])
        report["blocked_share_of_dcp"] = median(lambda r: r["dcp async, blocked"] / r["dcp"])
    return report


def print_table(report: dict) -> None:
    log.info(f"{report['params']:,} parameters, {report['state_gb']:.2f} GB with Adam's moments, median of {len(report['rounds'])} rounds")
    for name, seconds in report["seconds"].items():
        log.info(f"  {name:<22}{seconds:8.2f} s  {report['state_gb'] / seconds:8.2f} GB/s")
    ratios = sorted(r["dcp"] / r["ours"] for r in report["rounds"])
    if "blocked_share_of_ours" in report:
        log.info(f"async save blocks for {report['blocked_share_of_ours']:.1%} of the synchronous one (DCP's: {report['blocked_share_of_dcp']:.1%})")
        log.info(f"kept host memory: {report['state_gb']:.2f} GB")
    for part, seconds in report["busy_seconds"].items():
        log.info(f"  {part:<22}{seconds:8.2f} s busy")
    log.info(f"synchronous throughput, ours by DCP's: {report['throughput_by_dcp']:.2f}, geometric mean ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    cli.run(main)
