"""Turns where the run stands into a checkpoint, keeps the right ones, and writes the views that people read."""

import json
import platform
import uuid
from pathlib import Path

import torch

import llm
from llm import durable
from llm.checkpoint import folder
from llm.checkpoint.manifest import NAME, Manifest, Parameter, Parent
from llm.checkpoint.resume import Checkpoint
from llm.checkpoint.saver import apply_retention, file_sha256, save
from llm.config import BatchPlan, RunConfig
from llm.data.ledger import seen_view
from llm.dist import World
from llm.engine import Engine
from llm.log import log
from llm.tokenizer import Tokenizer
from llm.train.loop import Progress


class Keeper:
    """Saves for one attempt (sitting) of a run. Created and called on every rank."""

    def __init__(self, cfg: RunConfig, plan: BatchPlan, world: World, engine: Engine, tokenizer: Tokenizer, parent: Checkpoint | None):
        self.cfg, self.plan, self.world, self.engine, self.tokenizer = cfg, plan, world, engine, tokenizer
        self.run = cfg.run_folder
        self.run_id = parent.manifest.run_id if parent else world.broadcast(uuid.uuid4().hex)
        self.attempt = world.on_rank_0(lambda: folder.next_attempt(self.run))
        self.parent = Parent(name=parent.folder.name, manifest_sha256=file_sha256(parent.folder / NAME)) if parent else None
        self.lineage = [*parent.manifest.lineage, parent.folder.name] if parent else []
        self.resumed_from = parent.folder if parent else None
        self.view: dict | None = None  # of the last save: only what came after it is counted anew

    def save(self, at: Progress) -> None:
        """Commit a checkpoint of `at`. Collective. Raises SaveFailed on every rank."""
        manifest = self._manifest(at)
        path = save(self.world, self.run, manifest, list(self.engine.local_slices()), self._add_tokenizer)
        self.parent = Parent(name=path.name, manifest_sha256=self.world.on_rank_0(lambda: file_sha256(path / NAME)))
        if self.world.rank == 0:
            self._after_commit(at, path)

    def _manifest(self, at: Progress) -> Manifest:
        return Manifest(
            run_id=self.run_id,
            attempt=self.attempt,
            step=at.step,
            tokens_seen=at.tokens_seen,
            parent=self.parent,
            lineage=self.lineage,
            world_size=self.world.size,
            global_rows=self.plan.global_rows,
            config=self.cfg.model_dump(mode="json"),
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            ledger=at.ledger.to_json(),
            chain=at.chain,
            engine=self.engine.state(),
            versions={"tally": llm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            metrics=dict(at.metrics),
            epoch_end=at.epoch_end,
            params=[Parameter(name=name, shape=list(shape)) for name, shape in self.engine.params],
            files=[],
            state_hash=0,
        )

    def _add_tokenizer(self, checkpoint: Path) -> None:
        (checkpoint / "tokenizer").mkdir()
        self.tokenizer.save(checkpoint / "tokenizer")

    def _after_commit(self, at: Progress, path: Path) -> None:
        """What may fail without harm: the checkpoint is committed already."""
        keep = self.cfg.checkpoint
        try:
            self.view = seen_view(at.ledger, self.view)
            durable.write_text(self.run / "seen_datasets.json", json.dumps(self.view, indent=2) + "\n")
            protect = {path} | ({self.resumed_from} if self.resumed_from else set())
            protect |= folder.other_branches(self.run, self.attempt, self.lineage)
            apply_retention(
                self.run, keep_last=keep.keep_last, keep_best=keep.keep_best, keep_epochs=keep.keep_epochs, protect=protect
            )
        except OSError as error:
            log.warning(f"After saving {path.name}: {error}.")
        log.info(f"saved {path}")
