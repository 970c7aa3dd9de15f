"""What gpu_checks.py and gpu_speed.py share.

The device and its clock, findings as lines of JSON, the model, a dataset, runs of launch/train.py.
"""

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from llm import cli
from llm.config import RunConfig, load_config
from llm.data.manifest import write_manifest
from llm.data.shards import token_dtype, write_shard
from llm.data.stream import Batch
from llm.dist import use_growing_segments
from llm.model.transformer import Transformer
from llm.tokenizer import load_tokenizer, tokenizer_info
from llm.train.lines import note

ROOT = Path(__file__).parent.parent
TINY = [
    "model.n_layers=2", "model.d_model=128", "model.n_heads=2", "model.n_kv_heads=1",
    "model.d_head=64", "model.d_ff=256", "model.vocab_size=2048", "model.seq_len=256",
]  # fmt: skip
"""Of configs/gpt-1b.yaml, for a CPU."""
VOCABULARY = 2000  # of `make_dataset`


@dataclass(frozen=True)
class Bench:
    """The device that is looked at, and where findings go."""

    tiny: bool
    """In small on a CPU, to know that the checks run."""
    out: Path

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda:0"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    def tell(self, check: str, **found) -> None:
        """A finding: a line of results.jsonl, at once."""
        record = {"check": check, "at": round(time.time(), 1)} | found
        print(json.dumps(record), flush=True)
        note(self.out / "results.jsonl", record)

    @contextmanager
    def guarded(self, check: str, **what) -> Iterator[None]:
        """What is raised in the block is a finding too, and the next block comes."""
        try:
            yield
        except Exception as error:  # whatever a kernel, a compiler or a driver raises
            self.tell(check, **what, failed=f"{type(error).__name__}: {str(error)[:400]}")

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return 0.0 if self.tiny else round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def seconds(self, work: Callable, times: int = 5, warm: int = 2) -> float:
        """How long one call takes, the median."""
        for _ in range(warm):
            work()
        return statistics.median(self.once(work) for _ in range(times))

    def once(self, work: Callable) -> float:
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def model(self, *overrides: str) -> tuple[RunConfig, Transformer]:
        """configs/gpt-1b.yaml with random weights, on the device."""
        changes = ["engine.zero_stage=0", *(TINY if self.tiny else ()), *overrides]
        cfg = load_config(ROOT / "configs/gpt-1b.yaml", changes)
        model = Transformer(cfg.model).to(self.device)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(0, 0.02)
        return cfg, model


def main(
    about: str, checks: dict[str, Callable], add_options: Callable[[cli.Parser], None] = bool
) -> None:
    """Do the check that the command line names, as check(bench, options)."""
    parser = cli.parser(about)
    parser.add_argument("check", choices=checks)
    parser.add_argument("--tiny", action="store_true", help="the same in small on a CPU")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu_hour"),
        metavar="FOLDER",
        help="of results.jsonl (%(default)s)",
    )
    add_options(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench, began = Bench(options.tiny, options.out), time.monotonic()
    warnings.simplefilter("ignore")
    if options.tiny:  # C++ takes minutes, and is not what is to be seen
        torch.compile = partial(torch.compile, backend="aot_eager")
    else:
        use_growing_segments()
        torch.cuda.set_device(0)
    with bench.guarded(options.check):
        checks[options.check](bench, options)
    bench.tell("done", of=options.check, seconds=round(time.monotonic() - began, 1))


def random_batch(vocabulary: int, rows: int, seq_len: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, seq_len + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, None)


# ------------------------------------------------------------------ runs through launch/train.py


def make_dataset(root: Path, seq_len: int, tokens: int) -> dict:
    """A tokenizer and token shards in `root`; returns the sections of a config that name them."""
    sys.path.append(str(ROOT / "tests"))
    from little_run import make_tokenizer

    folder = make_tokenizer(root / "tokenizer", VOCABULARY)
    info = tokenizer_info(load_tokenizer(folder))
    shards, sources = [], []
    for role, n in (("train", tokens), ("val", max(tokens // 20, 4 * seq_len))):
        steps = np.random.default_rng(0).integers(0, 5, n)
        parts = [(np.cumsum(steps) % VOCABULARY, np.array([n]))]
        unit = {"unit_id": role, "bytes": n}
        same = {
            "dtype": token_dtype(info["vocab_size"]),
            "tokenizer": info,
            "seq_len": seq_len,
            "writer": {"version": "check"},
        }
        shards.append(write_shard(root / "data", role, parts, units=[unit], role=role, **same))
        sources.append(
            {
                "source_id": role,
                "names": [role],
                "docs": 1,
                "bytes": n,
                "unit_bytes": n,
                "unit_ids": [role],
            }
        )
    write_manifest(root / "data", sources=sources, shards=shards, tokenizer=info, seq_len=seq_len)
    return {
        "tokenizer": {"tokenizer_path": str(folder)},
        "data": {"data_path": str(root / "data")},
        "checkpoint": {"checkpoint_dir": str(root / "checkpoints"), "keep_last": 9},
    }


RUNNER = (
    "import os, runpy, sys, torch; {first}; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def train(
    config: dict,
    root: Path,
    *words: str,
    first: str = "pass",
    kill_at: str | None = None,
    limit_s: float = 300,
) -> tuple[int, str]:
    """A session of launch/train.py in a process of its own, which runs `first` before.

    `kill_at`: SIGKILL once it says this. Returns its exit code and what it said.
    """
    path = root / f"{config['checkpoint']['run_name']}.json"
    path.write_text(json.dumps(config))
    command = [
        sys.executable,
        "-c",
        RUNNER.format(first=first),
        "launch/train.py",
        "--config",
        str(path),
        *words,
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
    )
    limit = threading.Timer(limit_s, process.kill)
    limit.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if kill_at and kill_at in line:
            process.send_signal(signal.SIGKILL)
    limit.cancel()
    return process.wait(), "".join(lines)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpu-hour-") as folder:
        yield Path(folder)
