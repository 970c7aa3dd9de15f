"""Saving: every rank stages and writes its slices, all vote, rank 0 commits by one rename."""

import errno
import json
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

from llm import durable
from llm.checkpoint import folder
from llm.checkpoint.hashes import small_record, tokenizer_records
from llm.checkpoint.host_memory import available_bytes, host_name
from llm.checkpoint.lock import LockLost
from llm.checkpoint.manifest import File, Manifest
from llm.checkpoint.rng import rng_state
from llm.checkpoint.slices import NotFinite, Slice, check_finite, state_hash, wrap, write_slices
from llm.checkpoint.staging import Staging
from llm.dist import World
from llm.log import UserError, log

SMALL_FILES_BYTES = 4 << 20  # for a rank's headers and random states, the tokenizer, the manifest
MEMORY_SHARE = 0.9  # of what is available, for the copies of an asynchronous save; the rest is for whatever grows next


MAKE_ROOM = "Make room, then run again."
MEND = "Mend that, then run again."
BAD_STATE = "Lower train.lr, or look at the data of the last steps with tools/ledger.py; --from-step goes back to an older checkpoint."
LOST_LOCK = "Another job owns the folder."


class SaveFailed(Exception):
    """This save did not happen, on any rank; the older checkpoints are untouched. `advice` says what a person can do."""

    def __init__(self, message: str, advice: str = MEND):
        super().__init__(message)
        self.advice = advice


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
    With `staging` the slices are copied before this returns, if there is memory; if not (`is_staged`) or without it, they must not change
    until `write` has.
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
        self._written = [f"rank {world.rank}: its writer ended without a word", None, MEND]
        self._slices, self._staging = slices, staging
        nonce, short_of = self._measure()
        self._temporary = run / f".tmp-{self.final.name}-{nonce}"
        self._vote(self._outcome(self._prepare))
        self.is_staged = staging is not None and self._stage(short_of)
        """Whether there was memory for a copy, on all ranks; if not, `write` at once."""

    def _measure(self) -> tuple[str, str | None]:
        """A name for this try, and what host memory is short for a copy. Raises SaveFailed on every rank when the disk has no room for all.

        Of the disk, the rank counts that sees the least; of memory, every host by itself.
        """

        def measure() -> list:
            memory = [host_name(), self._staging.missing_bytes(self._slices), available_bytes()] if self._staging else None
            needed = SMALL_FILES_BYTES + sum(4 * s.values.numel() for s in self._slices)
            return [needed, shutil.disk_usage(self.run).free, uuid.uuid4().hex[:8], memory]

        measured = self._vote(self._outcome(measure))
        needed, free = sum(m[0] for m in measured), min(m[1] for m in measured)
        if free < needed:
            room = f"the disk has {free / 1e6:,.1f} MB ({free:,} bytes) free"
            self._fail(SaveFailed, f"{self.run}: it needs {needed / 1e6:,.1f} MB ({needed:,} bytes), {room}", MAKE_ROOM)
        return measured[0][2], _short_of_memory([m[3] for m in measured if m[3]])

    def _prepare(self) -> None:
        self._rng = json.dumps(rng_state(self.world.device))  # now: when the writer gets to it, training has drawn from them
        if self.world.rank == 0:
            self._temporary.mkdir(parents=True)

    def _stage(self, short_of: str | None) -> bool:
        """Copy the slices, on all ranks or on none."""

        def copy() -> None:
            if short_of is None:
                self._staged = self._staging.copy(self._slices)

        failures = [failure for failure, *_ in self.world.gather(self._outcome(copy)[:1]) if failure is not None]
        why = short_of or ("; ".join(failures) if failures else None)
        if why:
            if self._staging.give_up() and self.world.rank == 0:
                log.warning(f"No copy in host memory for an asynchronous save ({why}): training waits while a checkpoint is written.")
            return False
        self._slices = self._staged
        return True

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
            written = [self._write_files(), rank_hash.result()]
        if self.is_staged:
            self._staging.check(written[1])
        return written

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
        state = wrap(sum(rank_hash for _, rank_hash in votes))

        def publish() -> None:
            if self.world.rank:
                return
            whole = self.manifest.model_copy(update={"files": [File.model_validate(f) for f in files], "state_hash": state})
            assert not whole.gaps, whole.gaps
            folder.publish(self._temporary, self.final, whole.text(), self._check)
            folder.mark_run(self.run, self.manifest.run_id)

        self._vote(self._outcome(publish))
        return self.final

    def _outcome(self, work: Callable) -> list:
        """[what went wrong in words or None, the result, what to do about it] of this rank's part."""
        try:
            return [None, work(), None]
        except LockLost as error:
            return [str(error), None, LOST_LOCK]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # some libraries' errors are no Exception, and a rank that left alone would hang the others
            name = "" if isinstance(error, (OSError, UserError)) else type(error).__name__
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = MAKE_ROOM if full else BAD_STATE if isinstance(error, NotFinite) else MEND
            return [f"rank {self.world.rank}: {': '.join(filter(None, (name, str(error))))}", None, advice]

    def _vote(self, outcome: list) -> list:
        """Every rank's result; if any rank failed, clean up and raise on all."""
        votes = self.world.gather(outcome)
        failures = [failure for failure, *_ in votes if failure is not None]
        if failures:
            advice = [advice for *_, advice in votes if advice]
            self._fail(Fenced if LOST_LOCK in advice else SaveFailed, "; ".join(failures), " ".join(dict.fromkeys(advice)))
        return [result for _, result, _ in votes]

    def _fail(self, kind: type[SaveFailed], why: str, advice: str) -> None:
        if self.world.rank == 0 and hasattr(self, "_temporary"):
            shutil.rmtree(self._temporary, ignore_errors=True)
        raise kind(f"checkpoint of step {self.manifest.step:,} could not be saved: {why}", advice)

    def _write_files(self) -> list[dict]:
        check_finite(self._slices)
        tag = f"{self.world.rank:05d}-of-{self.world.size:05d}"
        shard = write_slices(self._temporary / f"shard-{tag}.safetensors", self._slices)
        (self._temporary / f"rank-{tag}.json").write_text(self._rng)
        records = [shard, small_record(self._temporary / f"rank-{tag}.json", self._temporary)]
        if self.world.rank == 0:
            self._add_files(self._temporary)
            records += tokenizer_records(self._temporary)
        durable.fsync_folder(self._temporary)
        return records


def _short_of_memory(asked: list[tuple[str, int, int | None]]) -> str | None:
    """The first host that has too little for all its ranks, in words. `asked`: (host, bytes that a rank needs, bytes available) by rank."""
    for host in dict.fromkeys(host for host, _, _ in asked):
        needed = sum(n for h, n, _ in asked if h == host)
        known = [left for h, _, left in asked if h == host and left is not None]
        if needed and known and needed > MEMORY_SHARE * min(known):
            return f"it takes {needed / 1e9:,.2f} GB, {min(known) / 1e9:,.2f} GB are available"
    return None
