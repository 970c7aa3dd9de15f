"""Saving: every rank stages and writes its slices, all vote, rank 0 commits by one rename."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

from llm import durable
from llm.checkpoint import folder
from llm.checkpoint.lock import LockLost
from llm.checkpoint.manifest import File, Manifest, read_manifest
from llm.checkpoint.rng import rng_state
from llm.checkpoint.slices import Slice, check_finite, coverage_gaps, state_hash, write_slices
from llm.checkpoint.staging import Staging
from llm.dist import World
from llm.log import UserError, log

SMALL_FILES_BYTES = 4 << 20  # for a rank's headers and random states, the tokenizer, the manifest


class SaveFailed(Exception):
    """This save did not happen, on any rank; the older checkpoints are untouched."""


class Fenced(SaveFailed):
    """This save did not happen because the run's folder belongs to another job now: no later one can happen either."""


def save(
    world: World, run: Path, manifest: Manifest, slices: list[Slice], add_files: Callable[[Path], None], check: Callable[[], None] = bool
) -> Path:
    """Write and commit one checkpoint at once; returns its folder. Collective. Arguments and errors are those of `Save`."""
    saving = Save(world, run, manifest, slices, add_files, check)
    saving.write()
    return saving.commit()


class Save:
    """One checkpoint on its way to the disk: `Save(...)`, then `write` or `start`, then `commit`.

    The first and the last are collective and raise SaveFailed on every rank when any rank failed; whatever was written is then removed.
    What lies between is this rank's alone and may run in a thread: it hashes and does file I/O, and never waits for another rank.

    `manifest` comes without files and state_hash, which are filled in here; `add_files(folder)` lets rank 0 add small files (the tokenizer).
    `check()` is asked by rank 0 just before the rename and raises LockLost when the run's folder is not ours any more: then Fenced.
    With `staging` the slices are copied before this returns; without it they must not change until `write` has.
    """

    def __init__(
        self,
        world: World,
        run: Path,
        manifest: Manifest,
        slices: list[Slice],
        add_files: Callable[[Path], None],
        check: Callable[[], None] = bool,
        staging: Staging | None = None,
    ):
        self.world, self.run, self.manifest, self._add_files, self._check = world, run, manifest, add_files, check
        self.final = run / folder.step_name(manifest.step, manifest.attempt)
        self.seconds = 0.0
        """How long this rank wrote."""
        self._thread: Thread | None = None
        self._written = [f"rank {world.rank}: its writer ended without a word", None, False]
        self._temporary = run / f".tmp-{self.final.name}-{self._check_space(slices)}"
        self._rng = json.dumps(rng_state())  # now: when the writer gets to it, training has drawn from them

        def prepare() -> list[Slice]:
            if world.rank == 0:
                self._temporary.mkdir(parents=True)
            self._slices = staging.copy(slices) if staging else slices

        self._vote(self._outcome(prepare))

    def _check_space(self, slices: list[Slice]) -> str:
        """Raise SaveFailed on every rank when the disk, as any rank sees it, has no room for all ranks' files; returns a name for this try."""

        def measure() -> tuple[int, int, str]:
            return SMALL_FILES_BYTES + sum(4 * s.values.numel() for s in slices), shutil.disk_usage(self.run).free, uuid.uuid4().hex[:8]

        measured = self._vote(self._outcome(measure))
        needed, free = sum(m[0] for m in measured), min(m[1] for m in measured)
        if free < needed:
            room = f"the disk has {free / 1e6:,.1f} MB ({free:,} bytes) free"
            self._fail(SaveFailed, f"{self.run}: it needs {needed / 1e6:,.1f} MB ({needed:,} bytes), {room}")
        return measured[0][2]

    def start(self) -> None:
        """Write in a thread; `written` tells when it is done."""
        self._thread = Thread(target=self.write, name="checkpoint writer", daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write this rank's files and check them. An error waits for the vote."""
        started_at = time.monotonic()
        self._written = self._outcome(self._write_and_hash)
        self.seconds = time.monotonic() - started_at

    def _write_and_hash(self) -> list:
        with ThreadPoolExecutor(1) as beside:  # both let go of Python's lock, and the disk is waited for anyway
            rank_hash = beside.submit(state_hash, self._slices)
            return [self._write_files(), rank_hash.result()]

    @property
    def written(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until this rank's writer has ended, well or not."""
        if self._thread:
            self._thread.join()

    def commit(self) -> Path:
        """Publish what all ranks wrote; returns the checkpoint's folder. Collective."""
        self.wait()
        votes = self._vote(self._written)
        files = [record for records, _ in votes for record in records]
        state = (sum(rank_hash for _, rank_hash in votes) + 2**63) % 2**64 - 2**63  # wraps as the sums of one rank do

        def publish() -> None:
            if self.world.rank:
                return
            gaps = coverage_gaps([(p.name, _numel(p.shape)) for p in self.manifest.params], files)
            assert not gaps, gaps
            whole = self.manifest.model_copy(update={"files": [File.model_validate(f) for f in files], "state_hash": state})
            folder.publish(self._temporary, self.final, whole.text(), self._check)
            folder.mark_run(self.run, self.manifest.run_id)

        self._vote(self._outcome(publish))
        return self.final

    def _outcome(self, work: Callable) -> list:
        """[what went wrong in words or None, the result, whether the lock was lost] of this rank's part."""
        try:
            return [None, work(), False]
        except LockLost as error:
            return [str(error), None, True]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # some libraries' errors are no Exception, and a rank that left alone would hang the others
            name = "" if isinstance(error, (OSError, UserError)) else type(error).__name__
            return [f"rank {self.world.rank}: {': '.join(filter(None, (name, str(error))))}", None, False]

    def _vote(self, outcome: list) -> list:
        """Every rank's result; if any rank failed, clean up and raise on all."""
        votes = self.world.gather(outcome)
        failures = [failure for failure, *_ in votes if failure is not None]
        if failures:
            self._fail(Fenced if any(fenced for *_, fenced in votes) else SaveFailed, "; ".join(failures))
        return [result for _, result, _ in votes]

    def _fail(self, kind: type[SaveFailed], why: str) -> None:
        if self.world.rank == 0 and hasattr(self, "_temporary"):
            shutil.rmtree(self._temporary, ignore_errors=True)
        raise kind(f"checkpoint of step {self.manifest.step:,} could not be saved: {why}")

    def _write_files(self) -> list[dict]:
        check_finite(self._slices)
        tag = f"{self.world.rank:05d}-of-{self.world.size:05d}"
        shard = write_slices(self._temporary / f"shard-{tag}.safetensors", self._slices)
        (self._temporary / f"rank-{tag}.json").write_text(self._rng)
        small = [self._temporary / f"rank-{tag}.json"]
        if self.world.rank == 0:
            self._add_files(self._temporary)
            tokenizer = self._temporary / "tokenizer"
            small += [p for p in tokenizer.iterdir() if p.is_file()] if tokenizer.is_dir() else []
        records = [shard, *(_small_record(path, self._temporary) for path in small)]
        durable.fsync_folder(self._temporary)
        return records


def _small_record(path: Path, root: Path) -> dict:
    content = path.read_bytes()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    name = path.relative_to(root).as_posix()
    return {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "chunks": []}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest_in_blocks(file)


def _digest_in_blocks(file) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _numel(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def apply_retention(run: Path, *, keep_last: int, keep_best: int, keep_epochs: bool, protect: set[Path]) -> None:
    """Keep the newest, the best by validation loss, the ends of epochs and `protect`; delete the rest. Rank 0 only."""
    found = folder.entries(run)
    manifests = {}
    for entry in found:
        try:
            manifests[entry.path] = read_manifest(entry.path)
        except UserError as error:
            log.warning(str(error))
    scored = sorted((m.metrics.get("val_loss"), str(p), p) for p, m in manifests.items() if m.metrics.get("val_loss") is not None)
    keep = {entry.path for entry in found[-keep_last:]} | {path for *_, path in scored[:keep_best]} | protect
    keep |= {path for path, m in manifests.items() if keep_epochs and m.epoch_end}
    keep |= {entry.path for entry in found if entry.path not in manifests}  # unreadable: for resume to judge, not for retention
    folder.prune(run, keep)
