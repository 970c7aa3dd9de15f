"""Random windows of a large corpus: batches a second beside nanoGPT's get_batch and a Megatron-style index, and what a start costs.

  python benchmarks/loader.py
  python benchmarks/loader.py --tokens 500M --rows 16 --rounds 9 --out build/loader.json

One file of random uint16 tokens serves all, so the page cache does too; contenders take turns, one thread each, and give int64 tensors
of ids and targets. Ours takes every window once, in a computed order, and checks ids against the vocabulary; nanoGPT draws with replacement.
The start is from a folder to the first row: of ours at 10^9 samples in sparse files, of the index at --index-samples.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
from machine import machine, write_json

from llm import cli
from llm.data.manifest import find_shards, write_manifest
from llm.data.phase import Phase
from llm.data.record import write_record
from llm.data.sampler import Sampler
from llm.data.shard_meta import CRC_BLOCK_BYTES, META_SUFFIX, ShardMeta, shard_id_of
from llm.data.shards import write_shard
from llm.log import log

VOCAB_SIZE = 32_000
TOKENIZER = {"fingerprint": "0" * 64, "kind": "bpe", "vocab_size": VOCAB_SIZE, "eos_id": 0, "pad_id": 1}
SEQ_LEN, DOC_TOKENS = 2048, 500
SPARSE_SHARDS, SPARSE_TOKENS, SPARSE_SEQ_LEN = 64, 1 << 27, 8  # 1.07e9 samples


def main() -> None:
    args = arguments()
    if args.start:
        print(json.dumps(STARTS[args.start](args.folder, args.index_samples)))
        return
    folder = Path(tempfile.mkdtemp(prefix="loader-benchmark-", dir=args.folder))
    try:
        contenders = make_contenders(folder, args.tokens, args.rows)
        rounds = [{name: speed(batch, args.seconds) for name, batch in contenders.items()} for _ in range(args.rounds + 1)][1:]
        (folder / "sparse").mkdir()
        write_sparse(folder / "sparse")
        starts = {name: start(name, folder / "sparse", args.index_samples) for name in STARTS}
    finally:
        shutil.rmtree(folder)
    report = {"machine": machine(["numpy", "torch"]), "tokens": args.tokens, "rows": args.rows, "rounds": rounds, "starts": starts}
    report["summary"] = {
        name: {"batches_per_s": statistics.median(r[name] for r in rounds), "ratio": statistics.median(r[name] / r["nanogpt"] for r in rounds)}
        for name in rounds[0]
    }
    print_table(report)
    write_json(report, args.out)


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--tokens", type=cli.amount, default=500_000_000, metavar="N", help="tokens in the corpus (default 500M)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="windows in a batch (default 16)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each that are counted (default 7)")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="length of a turn (default 0.5)")
    parser.add_argument("--index-samples", type=cli.amount, default=10_000_000, metavar="N", help="for the start of the index (default 10M)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--start", choices=list(STARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_contenders(folder: Path, n_tokens: int, rows: int) -> dict[str, Callable[[], tuple]]:
    """Name to a function that makes the next batch."""
    import torch

    from llm.data.stream import micro_batches

    meta = write_corpus(folder, n_tokens)
    path = meta.file("bin")
    opened = np.memmap(path, np.uint16, "r")
    index = MegatronIndex(opened, n_tokens)
    shards = find_shards([folder], "train")
    sampler, draws = Sampler(Phase.plan("s0", 7, 1000, SEQ_LEN, shards), shards), count(0, rows)
    samples = count()

    def get_batch(data: np.ndarray) -> tuple:
        ix = torch.randint(len(data) - SEQ_LEN, (rows,))
        x = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in ix])
        return x, y

    def megatron() -> tuple:
        made = [torch.from_numpy(index.sample(next(samples))) for _ in range(rows)]
        return torch.stack([ids[:-1] for ids in made]).contiguous(), torch.stack([ids[1:] for ids in made]).contiguous()

    def ours() -> tuple:
        (batch,) = micro_batches(sampler, next(draws), rows, 0, 1, rows)
        return batch.tokens_BT, batch.targets_BT

    return {
        "nanogpt": lambda: get_batch(np.memmap(path, np.uint16, "r")),  # opened anew for each batch, as nanoGPT does against a leak
        "nanogpt, opened once": lambda: get_batch(opened),
        "megatron-style": megatron,
        "ours": ours,
    }


def write_corpus(folder: Path, n_tokens: int) -> ShardMeta:
    random = np.random.default_rng(0)
    pieces = [min(1 << 24, n_tokens - at) for at in range(0, n_tokens, 1 << 24)]
    parts = ((random.integers(2, VOCAB_SIZE, n, dtype=np.uint16), lengths(n)) for n in pieces)
    units = [{"unit_id": "0" * 64, "bytes": 4 * n_tokens}]
    meta = write_shard(folder, "corpus", parts, dtype=np.dtype("<u2"), tokenizer=TOKENIZER, units=units, role="train", seq_len=SEQ_LEN, writer={})
    write_manifest(folder, sources=[], shards=[meta], tokenizer=TOKENIZER, seq_len=SEQ_LEN)
    return meta


def lengths(n_tokens: int) -> np.ndarray:
    return np.diff(np.append(np.arange(0, n_tokens, DOC_TOKENS), n_tokens))


class MegatronIndex:
    """GPTDataset of Megatron-LM in short: documents in a shuffled order, the document and offset each sample starts at, samples shuffled."""

    def __init__(self, data: np.ndarray, n_tokens: int):
        random = np.random.RandomState(0)
        self._data, self._lengths = data, lengths(n_tokens)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._documents = np.arange(len(self._lengths), dtype=np.int32)
        random.shuffle(self._documents)
        ends = np.cumsum(self._lengths[self._documents])
        firsts = np.arange(0, n_tokens - SEQ_LEN, SEQ_LEN)
        document = np.searchsorted(ends, firsts, side="right")
        self._samples = np.stack([document, firsts - (ends - self._lengths[self._documents])[document]], axis=1)
        self._shuffle = np.arange(len(firsts), dtype=np.uint32)
        random.shuffle(self._shuffle)

    def sample(self, number: int) -> np.ndarray:
        at, offset = self._samples[self._shuffle[number % len(self._shuffle)]]
        parts, missing = [], SEQ_LEN + 1
        while missing > 0 and at < len(self._documents):
            document = self._documents[at]
            first = self._starts[document] + offset
            parts.append(self._data[first : first + min(missing, self._lengths[document] - offset)])
            missing, at, offset = missing - len(parts[-1]), at + 1, 0
        return np.concatenate(parts).astype(np.int64)


def speed(batch: Callable[[], tuple], seconds: float) -> float:
    """Batches a second."""
    n, started_at = 0, time.perf_counter()
    while (spent := time.perf_counter() - started_at) < seconds:
        x, y = batch()
        assert x.shape == y.shape and x.shape[1] == SEQ_LEN
        n += 1
    return n / spent


def write_sparse(folder: Path) -> None:
    """Shards of zeros that take no space, with metas that hold for them as far as a start looks."""
    n_bytes, metas = SPARSE_TOKENS * 2, []
    crc32 = [zlib.crc32(bytes(CRC_BLOCK_BYTES))] * (n_bytes // CRC_BLOCK_BYTES)
    for number in range(SPARSE_SHARDS):
        path = folder / f"sparse-{number:05}{META_SUFFIX}"
        files = {"bin": {"bytes": n_bytes, "sha256": f"{number:064x}", "crc32": crc32}, "idx": {"bytes": 8, "sha256": "0" * 64, "crc32": [0]}}
        shard_id = shard_id_of(TOKENIZER["fingerprint"], "uint16", SPARSE_TOKENS, files)
        units = [{"unit_id": f"{number:064x}", "bytes": 0}]
        metas.append(ShardMeta(path, shard_id, SPARSE_TOKENS, 1, 0, "uint16", 0, 0, "train", SPARSE_SEQ_LEN, TOKENIZER, units, files, {}))
        for kind in files:
            with open(metas[-1].file(kind), "wb") as file:
                file.truncate(files[kind]["bytes"])
        write_record(path, metas[-1].to_json())
    write_manifest(folder, sources=[], shards=metas, tokenizer=TOKENIZER, seq_len=SPARSE_SEQ_LEN)


def start(name: str, folder: Path, index_samples: int) -> dict:
    words = [sys.executable, __file__, "--start", name, "--folder", str(folder), "--index-samples", str(index_samples)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def ours_start(folder: Path, _: int) -> dict:
    def first_row() -> int:
        shards = find_shards([folder], "train")
        sampler = Sampler(Phase.plan("s0", 7, 1, SPARSE_SEQ_LEN, shards), shards)
        sampler.rows(np.arange(1))
        return len(sampler.windows)

    return cost(first_row)


def index_start(_: Path, samples: int) -> dict:
    def first_row() -> int:
        data = np.broadcast_to(np.uint16(1), (samples * SEQ_LEN,))  # costs nothing, as a sparse file would
        MegatronIndex(data, len(data)).sample(0)
        return samples

    return cost(first_row)


def cost(run: Callable[[], int]) -> dict:
    before, started_at, cpu_started_at = peak_mb(), time.perf_counter(), time.process_time()
    samples = run()
    wall, cpu = time.perf_counter() - started_at, time.process_time() - cpu_started_at
    return {"samples": samples, "seconds": wall, "cpu_s": cpu, "mb": peak_mb() - before}


def peak_mb() -> float:
    """Of this process since its start; getrusage would tell of the one that launched it too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


STARTS = {"ours": ours_start, "megatron-style": index_start}


def print_table(report: dict) -> None:
    log.info(f"{report['machine']['cpu']}, load {report['machine']['load_average']}, commit {report['machine']['commit']}")
    log.info(f"{report['tokens']:,} tokens, windows of {SEQ_LEN:,}, {report['rows']} a batch, median of {len(report['rounds'])} rounds")
    for name, s in report["summary"].items():
        log.info(f"{name:22} {s['batches_per_s']:9,.0f} batches/s   {s['ratio']:.2f} of nanogpt")
    for name, s in report["starts"].items():
        log.info(f"start, {name:15} {s['samples']:14,} samples: {s['seconds']:.3f} s ({s['cpu_s']:.3f} s of CPU), {s['mb']:.0f} MB more")


if __name__ == "__main__":
    cli.run(main)
