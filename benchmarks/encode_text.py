"""Text to tokens: CPU seconds per MB, wall and peak memory, beside what others do. Contenders take turns, two processes each.

  python benchmarks/encode_text.py
  python benchmarks/encode_text.py --corpus big.jsonl --tokenizer data/tokenizers/32k --rounds 3 --out build/encode.json

Without --corpus, real text found on this machine (Python and C sources, documentation) is gathered into a temporary folder. All must give
the same number of tokens. "ours" hashes, indexes, checks and publishes; "yardstick" and its kin only encode. See encode_others.py for them.
CPU seconds are those of all processes, which a busy machine changes less than wall time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from machine import machine, write_json

from llm import cli
from llm.log import UserError, log

ROOT = Path(__file__).parent.parent
OURS = {"ours, fast": "fast", "ours, tiktoken": "reference"}
OTHERS = ("yardstick", "nanogpt", "one writer", "datatrove", "litdata", "gigatoken alone")
FOLDERS = (sys.prefix, os.path.dirname(os.__file__), "/usr/lib", "/usr/include", "/usr/share")
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".html", ".pm", ".pl", ".js", ".c", ".cpp", ".cuh", ".sh"}
WORKERS = 2


def main() -> None:
    args = arguments()
    folder = Path(tempfile.mkdtemp(prefix="encode-benchmark-", dir=args.folder))
    try:
        corpus = args.corpus or gather(folder / "corpus.jsonl", args.bytes)
        tokenizer = args.tokenizer or train(corpus, folder / "tokenizer")
        rounds = [{name: measure(name, corpus, tokenizer, folder) for name in args.only} for _ in range(args.rounds)]
        corpus_bytes = corpus.stat().st_size
    finally:
        shutil.rmtree(folder)
    packages = ["tiktoken", "tokenizers", "gigatoken", "datasets", "datatrove", "litdata", "numpy"]
    report = {"machine": machine(packages), "corpus_bytes": corpus_bytes, "workers": WORKERS, "rounds": rounds}
    report["summary"] = summarise(rounds, corpus_bytes)
    print_table(report)
    write_json(report, args.out)
    counts = {name: s["tokens"] for name, s in report["summary"].items()}
    if len(set(counts.values())) > 1:
        log.warning(f"not the same number of tokens everywhere: {counts}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--corpus", type=Path, metavar="FILE", help=".jsonl with a field text; default: what the machine holds")
    parser.add_argument("--bytes", type=cli.amount, default=210_000_000, metavar="N", help="to gather without --corpus (default 210M)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="of tools/train_tokenizer.py; default: 32k trained on the corpus")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="turns of each (default 1)")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *OTHERS], default=[*OURS, *OTHERS], metavar="NAME", help="contenders, in this order")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: where temporary files go")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    return parser.parse_args()


def gather(path: Path, n_bytes: int) -> Path:
    """Text files of this machine as JSON lines, until there are so many bytes; the same text once."""
    seen, size = set(), 0
    with open(path, "w", encoding="utf-8") as out:
        for file in (Path(at, name) for root in FOLDERS for at, _, names in sorted(os.walk(root)) for name in sorted(names)):
            if file.suffix not in SUFFIXES or file.is_symlink() or not 20 < file.stat().st_size < 1_000_000:
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if hash(text) not in seen:
                seen.add(hash(text))
                size += len(out.write(line := json.dumps({"text": text}, ensure_ascii=False) + "\n") and line.encode())
            if size >= n_bytes:
                return path
    log.warning(f"this machine holds only {size:,} bytes of text")
    return path


def train(corpus: Path, folder: Path) -> Path:
    run = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), str(corpus), "--vocab-size", "32000", "--out", str(folder)]
    subprocess.run(run, check=True)
    return folder


def measure(name: str, corpus: Path, tokenizer: Path, folder: Path) -> dict | None:
    """Run one contender in processes of its own; None where it is not installed."""
    out = folder / "turn" / "data"
    if name in OURS:
        script = [str(ROOT / "tools/tokenize_parallel.py"), str(corpus), "--tokenizer", str(tokenizer), "--seq-len", "2048"]
        words = [*script, "--out", str(out), "--workers", str(WORKERS), "--encoder", OURS[name]]
    else:
        words = [str(ROOT / "benchmarks/encode_others.py"), name, str(corpus), str(tokenizer), str(out), str(WORKERS)]
    out.parent.mkdir()
    os.sync()
    before, started_at = os.times(), time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    memory = Watch(process.pid)
    said = process.communicate()[0]
    wall, after = time.perf_counter() - started_at, os.times()
    memory.stop()
    n_tokens = tokens_of(out, said) if process.returncode == 0 else None
    shutil.rmtree(out.parent)
    if process.returncode == 69:
        log.info(f"{name}: skipped, {said.strip().splitlines()[-1]}")
        return None
    if process.returncode:
        raise UserError(f"{name} failed: {said[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    cpu = max(cpu, memory.cpu_s)  # nobody waits for the processes of a forkserver, so the system's count lacks them
    turn = {"wall_s": wall, "cpu_s": cpu, "peak_mb": memory.total / 1e6, "worker_peak_mb": memory.one / 1e6, "tokens": n_tokens}
    log.info(f"{name}: {json.dumps({key: round(value, 2) for key, value in turn.items()})}")
    return turn


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": os.devnull + "-cache"}


def tokens_of(out: Path, said: str) -> int:
    if (out / "manifest.json").exists():
        return sum(json.loads(path.read_bytes())["n_tokens"] for path in out.glob("*.meta.json"))
    return int(said.strip().splitlines()[-1])


class Watch:
    """Memory and CPU seconds of a process and its children, looked at ten times a second. Shared pages count once (PSS)."""

    def __init__(self, pid: int):
        self.total, self.one, self._cpu, self._pid, self._done = 0, 0, {}, pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu.values())

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            members = family(self._pid)
            sizes = [pss(pid) for pid in members]
            self.total, self.one = max(self.total, sum(sizes)), max(self.one, *sizes, 0)
            self._cpu |= {pid: seconds for pid in members if (seconds := cpu_seconds(pid))}


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(member for child in children for member in family(int(child)))]


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def pss(pid: int) -> int:
    try:
        return next(int(line.split()[1]) * 1024 for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def summarise(rounds: list[dict], corpus_bytes: int) -> dict:
    """Medians over the rounds."""
    summary = {}
    for name in rounds[0]:
        turns = [r[name] for r in rounds if r[name]]
        if turns:
            summary[name] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            summary[name]["cpu_s_per_mb"] = summary[name]["cpu_s"] / corpus_bytes * 1e6
    return summary


def print_table(report: dict) -> None:
    where = report["machine"]
    log.info(f"{where['cpu']}, load {where['load_average']}, commit {where['commit']}")
    log.info(f"{report['corpus_bytes']:,} bytes of JSONL, {report['workers']} processes, {len(report['rounds'])} rounds")
    log.info(f"{'':16} {'CPU s/MB':>9} {'wall s':>8} {'peak MB':>8} {'a process':>9} {'tokens':>12}")
    for name, s in report["summary"].items():
        log.info(f"{name:16} {s['cpu_s_per_mb']:9.4f} {s['wall_s']:8.1f} {s['peak_mb']:8.0f} {s['worker_peak_mb']:9.0f} {s['tokens']:12,.0f}")


if __name__ == "__main__":
    cli.run(main)
