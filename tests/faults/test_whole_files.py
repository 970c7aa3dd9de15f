"""What a full disk or a kill leaves of each file that the commands write: never a part of one.

The old file, the new one, or none. Checkpoints and tokenizing have tests of their own. Where files
are written is listed in tests/test_writers.py.
"""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from generate.test_generate_run import save_model
from little_run import add_shard

from benchmarks.machine import write_json
from llm import durable
from llm.config import ModelConfig
from llm.corpus import assemble, convert, fetch, look, plan, recipes
from llm.corpus.documents import Document
from llm.corpus.options import ReadOptions
from llm.data.merge import merge_datasets
from llm.log import UserError
from llm.model.init import build_model
from llm.report.page import write_report
from llm.report.record import read_run
from llm.tokenizer.train import train_bpe
from llm.train.lines import note
from llm.train.profiler import StepProfiler
from tools.export_hf import export
from tools.import_hf import import_folder

LIMIT_S = 20


# ------------------------------------------------------------------ faults


def full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))


def killed_in_the_middle() -> None:
    """The kernel ends the process when a file would grow past 64 bytes, which it has by then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    full_disk()


def killed_at_the_rename() -> None:
    def kill(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = os.rename = kill


FAULTS = (full_disk, killed_in_the_middle, killed_at_the_rename)
ENDED_WELL, REFUSED, CRASHED = range(3)


def in_a_process(work: Callable[[], None], fault: Callable[[], None]) -> int:
    """How a copy of this process ends that does `work` under `fault`; negative: by that signal."""
    pid = os.fork()
    if not pid:
        signal.alarm(LIMIT_S)
        end = CRASHED
        try:
            fault()
            work()
            end = ENDED_WELL
        except (UserError, OSError):
            end = REFUSED
        finally:
            os._exit(end)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------ writers of version 1 or 2


@dataclass(frozen=True)
class Writer:
    write: Callable[[Path, Path, int], None]
    """(sources, path, version)"""
    content: Callable[[Path], object] = Path.read_bytes
    """What is the same each time that a version is written."""
    replaces: bool = True
    """Whether a second time takes the place of the first; else that is refused, or it stays."""
    full_disk: int = REFUSED


def text_of(version: int) -> str:
    return f"version {version} " * 40


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for version in (1, 2):
        run = root / f"run-{version}"
        (run / "logs").mkdir(parents=True)
        (run / "logs" / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "train/loss": float(version)}) + "\n"
        )
        (root / f"{version}.txt.gz").write_bytes(gzip.compress(text_of(version).encode()))
        rows = [
            {"question": text_of(version), "subject": "s", "choices": list("abcd"), "answer": 1}
        ]
        (root / f"mmlu-{version}").mkdir()
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), root / f"mmlu-{version}" / "test-0.parquet"
        )
        TRAINED.append(trained(root / f"tokenizer-{version}", version))
        add_shard(root / f"set-{version}", root / f"tokenizer-{version}", 0, 100 * version)
        cfg = ModelConfig(n_layers=1, d_model=8 * version, n_heads=1, d_ff=8, seq_len=8).with_vocab(
            TRAINED[-1].vocab_size
        )
        save_model(root / f"model-{version}", 1, build_model(cfg, 1), TRAINED[-1])
        export(str(root / f"model-{version}"), root / f"hf-{version}")
    return root


TRAINED = []


def trained(folder: Path, version: int):
    made = train_bpe([text_of(version)], vocab_size=255 + version).tokenizer
    folder.mkdir(exist_ok=True)
    made.save(folder)
    assert made.fingerprint  # computed now: it takes threads, which copies of this process lack
    return made


def write_page(sources: Path, path: Path, version: int) -> None:
    path.parent.mkdir(exist_ok=True)
    write_report([read_run(str(sources / f"run-{version}"))], path.parent)


def write_text_of_page(*where) -> None:
    with mock.patch(
        "llm.report.page.draw", lambda *_: b"small"
    ):  # so that the page is what grows too large
        write_page(*where)


def write_pictures_of_page(sources: Path, path: Path, version: int) -> None:
    with mock.patch("llm.report.page.draw", lambda *_: text_of(version).encode()):
        write_page(sources, path, version)


def page_content(path: Path) -> str:
    return re.sub("<footer>.*</footer>", "", path.read_text())


def write_plot(_: Path, path: Path, version: int) -> None:
    def savefig(figure, file: Path, **how) -> None:  # the library's takes seconds
        Path(file).write_bytes(text_of(version).encode())

    with mock.patch("matplotlib.figure.Figure.savefig", savefig):
        look.draw(look.Look([], "tokens", np.array([1, 5, 9]), 0), "title", path)


class Profile:
    """What torch's profiler is to StepProfiler."""

    def __init__(self, version: int):
        self._version = version

    def stop(self) -> None: ...

    def key_averages(self) -> list:
        return []

    def export_chrome_trace(self, path: str) -> None:
        content = f"{self._version} {np.random.default_rng(0).bytes(400).hex()}".encode()
        with gzip.open(path, "wb") if path.endswith(".gz") else open(path, "wb") as file:
            file.write(content)


def write_profile(_: Path, path: Path, version: int) -> None:
    profiler = StepProfiler((1, 2), path.parent, "cpu")
    profiler._running, profiler._began, profiler._done = Profile(version), 1, 2
    profiler.close()


def write_fetched(_: Path, path: Path, version: int) -> None:
    urllib.request.urlopen, original = (
        lambda *_, **__: BytesIO(text_of(version).encode()),
        urllib.request.urlopen,
    )
    try:
        fetch.from_address("http://nowhere", path)
    finally:
        urllib.request.urlopen = original


def write_unpacked(sources: Path, path: Path, version: int) -> None:
    path.mkdir(exist_ok=True)
    plan._unpack(plan.find_sources([sources / f"{version}.txt.gz"], ReadOptions())[0], path)


def write_ids(sources: Path, path: Path, version: int) -> None:
    assemble._write_ids(
        assemble.Shard.open(next((sources / f"set-{version}").glob("*.meta.json"))), path
    )


def write_merged(sources: Path, path: Path, version: int) -> None:
    with mock.patch("os.link", side_effect=OSError("another disk")):
        merge_datasets([sources / f"set-{version}"], path)


def dataset(path: Path) -> dict[str, bytes]:
    """What makes a folder a dataset: nothing does without a manifest."""
    return files(path) if (path / "manifest.json").exists() else {}


def converter(suffix: str) -> Writer:
    def write(_: Path, path: Path, version: int) -> None:
        convert.write_documents(
            [Document(text_of(version), "source", 0)], path, convert.WRITERS[suffix], "\n--\n"
        )

    return Writer(write)


def names_and_sizes(path: Path) -> list[tuple[str, int]]:
    """Of the files in a folder that has numbers of its own each time."""
    return sorted(
        (str(p.relative_to(path)), p.stat().st_size)
        for p in path.rglob("*")
        if p.is_file() and p.suffix != ".yaml"
    )


def files(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


WRITERS = {
    "tokenizer.json": Writer(lambda _, path, version: TRAINED[version - 1].save(path.parent)),
    "report.html": Writer(write_text_of_page, page_content),
    "loss.png": Writer(write_pictures_of_page),
    "lengths.png": Writer(write_plot),
    "profile-1-2.json.gz": Writer(
        write_profile, lambda path: gzip.decompress(path.read_bytes()), full_disk=ENDED_WELL
    ),
    "results.json": Writer(
        lambda _, path, version: write_json({"version": text_of(version)}, path)
    ),
    "small.json": Writer(lambda _, path, version: durable.write_text(path, text_of(version))),
    "fetched": Writer(write_fetched, replaces=False),
    "unpacked": Writer(write_unpacked, files, replaces=False),
    "ids.jsonl": Writer(write_ids),
    "merged": Writer(write_merged, dataset, replaces=False),
    "mmlu": Writer(
        lambda s, path, v: recipes.write_mmlu_layout([*(s / f"mmlu-{v}").iterdir()], path),
        files,
        replaces=False,
    ),
    "export": Writer(
        lambda s, path, v: export(str(s / f"model-{v}"), path), names_and_sizes, replaces=False
    ),
    "import": Writer(
        lambda s, path, v: import_folder(s / f"hf-{v}", path), names_and_sizes, replaces=False
    ),
} | {f"converted{suffix}": converter(suffix) for suffix in convert.WRITERS}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_full_disk_or_a_kill_leaves_is_the_old_file_or_the_new_or_none(
    tmp_path, sources, name
):
    writer, whole = WRITERS[name], {}
    for version in (1, 2):
        (tmp_path / f"whole-{version}").mkdir()
        writer.write(sources, tmp_path / f"whole-{version}" / name, version)
        whole[version] = writer.content(tmp_path / f"whole-{version}" / name)
    assert whole[1] != whole[2]
    befores = (None, 1) if writer.replaces else (None,)
    for fault in FAULTS:
        for before in befores:
            path = tmp_path / f"{fault.__name__}-{before}" / name
            path.parent.mkdir()
            if before:
                shutil.copy(tmp_path / f"whole-{before}" / name, path)
            end = in_a_process(lambda path=path: writer.write(sources, path, 2), fault)
            expected = {
                full_disk: writer.full_disk,
                killed_in_the_middle: -signal.SIGXFSZ,
                killed_at_the_rename: -signal.SIGKILL,
            }
            assert end == expected[fault], (fault, before)
            left = writer.content(path) if path.exists() else None
            assert left == (whole[1] if before else {} if left == {} else None), (fault, before)
            writer.write(sources, path, 2)  # the next command works
            assert writer.content(path) == whole[2], (fault, before)
            assert not list(path.parent.rglob("*.new")) and not list(path.parent.glob(".tmp-*"))


@pytest.mark.parametrize(
    "fault", (full_disk, killed_in_the_middle), ids=lambda fault: fault.__name__
)
def test_after_a_line_that_was_cut_off_the_next_one_of_a_log_is_whole(tmp_path, fault):
    logs = tmp_path / "logs"
    logs.mkdir()
    note(logs / "metrics.jsonl", {"step": 1, "train/loss": 5.0})
    in_a_process(
        lambda: note(logs / "metrics.jsonl", {"step": 2, "train/loss": 4.0, "why": text_of(1)}),
        fault,
    )
    assert (logs / "metrics.jsonl").stat().st_size == 64  # torn
    note(logs / "metrics.jsonl", {"step": 3, "train/loss": 3.0})
    note(logs / "metrics.jsonl", {"step": 4, "train/loss": 2.0})
    assert read_run(str(tmp_path)).curves == {"train/loss": [(1, 5.0), (3, 3.0), (4, 2.0)]}
