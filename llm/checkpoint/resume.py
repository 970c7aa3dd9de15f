"""Resuming: find the newest checkpoint that is whole, agreed by all ranks; readers open one without changing anything."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.hashes import file_sha256
from llm.checkpoint.manifest import NAME, Manifest, read_manifest
from llm.checkpoint.slices import CheckpointError, SliceReader
from llm.dist import World
from llm.log import log


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint that may be read."""

    folder: Path
    manifest: Manifest

    @cached_property
    def reader(self) -> SliceReader:
        return SliceReader(self.folder, self.manifest.shapes, [f.model_dump() for f in self.manifest.files])


def damage(checkpoint: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first thing wrong with this rank's share (rank, size) of the files, in words; None when sound."""
    rank, size = share
    if manifest.gaps:
        return f"{checkpoint / NAME}: {manifest.gaps[0]}"
    for record in manifest.files[rank::size]:
        path = checkpoint / record.path
        if not path.is_file() or path.is_symlink():
            return f"{path}: is missing"
        if path.stat().st_size != record.bytes:
            return f"{path}: has {path.stat().st_size:,} bytes, the manifest says {record.bytes:,}"
        if file_sha256(path) != record.sha256:
            return f"{path}: its content does not match the hash in the manifest"
    return None


def open_checkpoint(path: str | Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint folder, or the newest sound one (or that of `step`) in a run's folder. Verified; changes nothing."""
    path = Path(path)
    if (path / NAME).exists():
        manifest = read_manifest(path)
        problem = damage(path, manifest)
        if problem:
            raise CheckpointError(f"{problem}. This checkpoint is damaged; use another step of the run.")
        return Checkpoint(path, manifest)
    there = folder.entries(path, thinned=True)
    found = [e for e in there if step is None or e.step == step]
    if not found:
        steps = ", ".join(map(str, sorted({e.step for e in there})))
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"{path}: {wanted} here{f' (there are steps {steps})' if steps else ''}. Give a run's folder, such as checkpoints/toy.")
    for entry in reversed(found):
        try:
            return open_checkpoint(entry.path)
        except CheckpointError as error:
            log.warning(f"{error} Trying an older one.")
    raise CheckpointError(f"{path}: none of its {len(found)} checkpoints is sound.")


def newest(world: World, run: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint to go on from (of `step`, if given), the same on every rank; None for a run that never committed one. Collective.

    A damaged one is named and moved to quarantine, and the next older is tried. Raises CheckpointError when none is left.
    """
    names = world.on_rank_0(lambda: _candidates(run, step))
    for name in names:
        path = run / name
        manifest, problem = None, None
        try:
            manifest = read_manifest(path)
            problem = damage(path, manifest, (world.rank, world.size)) if manifest.is_whole else f"{path}: has no optimizer moments"
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path}: cannot be read ({error})"
        problem = next((p for p in world.gather(problem) if p), None)
        if problem is None:
            return Checkpoint(path, manifest)
        if world.rank == 0:
            log.error(f"{problem}. This checkpoint is not used; it is now in {folder.quarantine(path)}.")
        world.barrier()
    if step is not None:  # another step than the one asked for is for a person to choose
        world.on_rank_0(lambda: _candidates(run, step))
    if names or world.on_rank_0(lambda: folder.has_committed(run)):
        raise CheckpointError(
            f"{run}: the run has saved before, but no sound checkpoint is left{_weights_left(run)}. It does not start again from step 0 by itself: "
            f"restore a checkpoint folder, or give --fresh, which moves the old run aside and begins anew."
        )
    return None


def _weights_left(run: Path) -> str:
    thinned = folder.entries(run, thinned=True)
    return f" ({thinned[-1].path} has weights alone: a new run can begin with --init-from)" if thinned else ""


def _candidates(run: Path, step: int | None) -> list[str]:
    """The names of the checkpoints that may be resumed from, the best first."""
    found = list(reversed(folder.entries(run)))
    chosen = [e.path.name for e in found if step is None or e.step == step]
    if step is not None and not chosen:
        steps = ", ".join(f"{s:,}" for s in sorted({e.step for e in found}))
        there = f"there are steps {steps}" if found else "it has no checkpoint at all"
        thinned = [e.path for e in folder.entries(run, thinned=True) if e.step == step]
        if thinned:
            there = f"only its weights were kept (checkpoint.thin), for --init-from {thinned[-1]} and for generating; {there}"
        raise CheckpointError(f"{run}: no checkpoint of step {step:,} to go on from; {there}.")
    return chosen
