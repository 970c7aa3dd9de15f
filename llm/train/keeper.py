"""Turns where the run stands into a checkpoint, keeps the right ones, and writes the views that people read."""

import json
import platform
import uuid
from pathlib import Path

import torch

import llm
from llm import durable
from llm.batch_plan import BatchPlan
from llm.checkpoint import folder
from llm.checkpoint.errors import CheckpointError
from llm.checkpoint.hashes import file_sha256
from llm.checkpoint.lock import LockLost, RunLock
from llm.checkpoint.manifest import NAME, BatchSince, Manifest, Parameter, Parent
from llm.checkpoint.resume import Checkpoint
from llm.checkpoint.retention import Retention, apply_retention, val_losses
from llm.checkpoint.saver import Save
from llm.checkpoint.staging import Staging
from llm.checkpoint.template import write_template
from llm.config import RunConfig, interval_steps
from llm.data.ledger import Ledger
from llm.data.lineage import bases_of_run
from llm.data.seen import seen_view
from llm.dist import World
from llm.engine import Engine
from llm.log import log
from llm.tokenizer import Tokenizer
from llm.train.budget import horizon
from llm.train.loop import Progress
from llm.train.probe import Probe


class Keeper:
    """Saves for one attempt (sitting) of a run. Created and called on every rank."""

    def __init__(
        self,
        cfg: RunConfig,
        plan: BatchPlan,
        world: World,
        engine: Engine,
        tokenizer: Tokenizer,
        parent: Checkpoint | None,
        lock: RunLock,
        probe: Probe,
        template: dict | None,
        validated_on: str,
        is_fork: bool = False,
        source: Checkpoint | None = None,
    ):
        """`parent`: where the run goes on from; with `is_fork` it is another run's, and this one begins its own history there. `template`:
        of the conversations it is trained on. `validated_on`: digest of what validation losses are
        measured on (`measure_digest`). `source`: whose weights alone a new run begins with."""
        self.cfg, self.plan, self.world, self.engine, self.tokenizer = cfg, plan, world, engine, tokenizer
        self.lock, self.probe, self.template = lock, probe, template
        self.validated_on = validated_on
        self.run = cfg.run_folder
        self.run_id = parent.manifest.run_id if parent and not is_fork else world.broadcast(uuid.uuid4().hex)
        self.attempt = world.on_rank_0(lock.take)  # the lock's token: attempts that never saved count too
        self.parent = Parent(name=parent.folder.name, manifest_sha256=file_sha256(parent.folder / NAME)) if parent else None
        self.lineage = [*parent.manifest.lineage, parent.folder.name] if parent and not is_fork else []
        self.bases = bases_of_run(parent, is_fork, source)
        self.resumed_from = parent.folder if parent else None
        self.batch_since = _batch_since(parent, plan.global_rows)
        self.saved_step = parent.manifest.step if parent else 0
        self.write_s = 0.0
        """How long the last save took to write, in this process or its thread."""
        self._losses: list[float] = world.on_rank_0(self._saved_losses)
        """By today's measure, of this branch's checkpoints that are there or were at the start."""
        self._staging = Staging() if cfg.checkpoint.async_save else None
        self._saving: Save | None = None
        self._ledger: Ledger | None = None  # as of the save on its way
        self.view: dict | None = None  # of the last save: only what came after it is counted anew

    def save(self, at: Progress, wait: bool = True) -> int | None:
        """Commit a checkpoint of `at` and return its step; without `wait`, where the config allows it, only begin to: then None.

        Collective, and no other may be on its way. Raises SaveFailed on every rank.
        """
        assert self._saving is None
        aside = self._staging if not wait else None
        slices = list(self.engine.local_slices())
        self._ledger = at.ledger
        self._saving = Save(self.world, self.run, self._manifest(at), slices, self._add_tokenizer, self.lock.check, aside)
        if self._saving.is_staged:
            self._saving.start()
            return None
        self._saving.write()
        return self.finish()

    @property
    def written(self) -> bool:
        """Whether this rank has a save on its way and its files are written, so that `finish` will not wait for them."""
        return self._saving is not None and self._saving.written

    def finish(self) -> int | None:
        """Commit what is on its way, if anything is, and return its step. Collective. Raises SaveFailed on every rank."""
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        path = saving.commit()
        self.saved_step, self.write_s = saving.manifest.step, saving.seconds
        self.parent = Parent(name=path.name, manifest_sha256=self.world.on_rank_0(lambda: file_sha256(path / NAME)))
        if (loss := saving.manifest.metrics.get("val_loss")) is not None:
            self._losses.append(loss)
        if self.world.rank == 0:
            self._after_commit(path)
        return self.saved_step

    def is_among_best(self, val_loss: float | None) -> bool:
        """Whether retention would keep a checkpoint for this loss. The same on every rank."""
        if val_loss is None:
            return False
        keep = self.cfg.checkpoint.keep_best
        best = sorted(self._losses)[:keep]
        return len(best) < keep or any(val_loss < loss for loss in best)

    def _saved_losses(self) -> list[float]:
        others = folder.other_branches(self.run, self.attempt, self.lineage)
        return val_losses(self.run, self.validated_on, others)

    def close(self) -> None:
        """Let go of a save that can be committed no more, and of the memory for copies."""
        if self._saving:
            self._saving.wait()  # its thread would outlive what it uses
            self._saving = None
        if self._staging:
            self._staging.close()

    def _manifest(self, at: Progress) -> Manifest:
        return Manifest(
            run_id=self.run_id,
            attempt=self.attempt,
            step=at.step,
            tokens_seen=at.tokens_seen,
            parent=self.parent,
            lineage=self.lineage,
            bases=self.bases,
            world_size=self.world.size,
            global_rows=self.plan.global_rows,
            batch_since=self.batch_since,
            config=self.cfg.model_dump(mode="json"),
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            ledger=at.ledger.to_json(),
            chain=at.chain,
            engine=self.engine.state(),
            versions={"tally": llm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            metrics=dict(at.metrics),
            validated_on=self.validated_on,
            recent={key: list(values) for key, values in at.recent.items()},
            probe=self.probe.taken(),
            epoch_end=at.epoch_end,
            params=[Parameter(name=name, shape=list(shape)) for name, shape in self.engine.params],
            files=[],
            state_hash=0,
        )

    def _add_tokenizer(self, checkpoint: Path) -> None:
        (checkpoint / "tokenizer").mkdir()
        self.tokenizer.save(checkpoint / "tokenizer")
        if self.template:
            write_template(checkpoint, self.template)

    def _after_commit(self, path: Path) -> None:
        """What may fail without harm: the checkpoint is committed already."""
        try:
            self.view = seen_view(self._ledger, self.view)
            self.lock.check()  # thinning and deleting in a folder that is another job's now could take what it stands on
            write_view(self.run, self.view)
            protect = {path} | ({self.resumed_from} if self.resumed_from else set())
            apply_retention(self.run, self._retention(), protect, folder.other_branches(self.run, self.attempt, self.lineage))
        except (OSError, CheckpointError, LockLost) as error:
            log.warning(f"After saving {path.name}: {error}.")
        except Exception as error:  # on this rank alone, and no reason to end training
            log.warning(f"After saving {path.name}: {type(error).__name__}: {error}.", exc_info=error)
        log.info(f"saved {path}")

    def _retention(self) -> Retention:
        keep, phase = self.cfg.checkpoint, self._ledger.phases[-1]
        every = interval_steps(keep.keep_every, horizon(self.cfg, phase, self.plan.global_rows, self.saved_step).length)
        return Retention(keep.keep_last, keep.keep_best, keep.keep_epochs, every, keep.thin)


def _batch_since(parent: Checkpoint | None, global_rows: int) -> BatchSince:
    """Where this attempt's global batch began: with the run, or where it changed or was unknown."""
    if parent is None:
        return BatchSince(step=0, draws=0)
    manifest = parent.manifest
    if manifest.batch_since and manifest.global_rows == global_rows:
        return manifest.batch_since
    draws = sum(phase.consumed for phase in Ledger.from_json(manifest.ledger).phases)
    return BatchSince(step=manifest.step, draws=draws)


def write_view(run: Path, view: dict) -> None:
    """What the run has seen, for people."""
    durable.write_text(run / "seen_datasets.json", json.dumps(view, indent=2) + "\n")
