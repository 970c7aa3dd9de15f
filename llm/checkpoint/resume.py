"""Resuming: find the newest checkpoint that is whole, agreed by all ranks; readers open one without changing anything."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.hashes import file_sha256
from llm.checkpoint.manifest import NAME, Manifest, read_manifest
from llm.checkpoint.slices import CheckpointError, SliceReader
from llm.cli import RETRY
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


class Unseen(CheckpointError):
    """One look at a checkpoint has failed, another finds it sound: no damage, and it may be over soon."""

    exit_code = RETRY


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
        manifest, problem = _examined(path)
        if problem:
            raise CheckpointError(f"{problem}. This checkpoint is damaged; use another step of the run.")
        if step not in (None, manifest.step):
            raise CheckpointError(f"{path}: is the checkpoint of step {manifest.step}, not of {step}. Give the run's folder with --step.")
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


def _examined(path: Path, share: tuple[int, int] = (0, 1)) -> tuple[Manifest | None, str | None]:
    """A checkpoint's manifest, and the first thing wrong with it or with this rank's share of its files, in words."""
    try:
        manifest = read_manifest(path)
        return manifest, damage(path, manifest, share)
    except CheckpointError as error:
        return None, str(error).removesuffix(".")
    except OSError as error:
        return None, f"{path}: cannot be read ({error})"


def newest(world: World, run: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint to go on from (of `step`, if given), the same on every rank; None for a run that never committed one. Collective.

    A damaged one is named and moved to quarantine, and the next older is tried. Raises CheckpointError when none is left, Unseen when it is
    only some rank that cannot read one.
    """
    names = world.on_rank_0(lambda: _candidates(run, step))
    for name in names:
        path = run / name
        manifest, problem = _examined(path, (world.rank, world.size))
        if manifest and not manifest.is_whole:
            problem = f"{path}: has no optimizer moments"
        bad = next(((rank, told) for rank, told in enumerate(world.gather(problem)) if told), None)
        if bad is None:
            return Checkpoint(path, manifest)
        world.on_rank_0(lambda path=path, bad=bad: _set_aside(path, *bad, world.size))
    if step is not None:  # another step than the one asked for is for a person to choose
        world.on_rank_0(lambda: _candidates(run, step))
    committed = world.gather(folder.has_committed(run))
    if any(committed) and not committed[0]:
        raise Unseen(f"{run}: rank {committed.index(True)} sees that the run has saved before, rank 0 does not. Do all hosts see the same folder?")
    if committed[0]:
        raise CheckpointError(
            f"{run}: the run has saved before, but no sound checkpoint is left{_weights_left(run)}. It does not start again from step 0 by itself: "
            f"restore a checkpoint folder, or give --fresh, which moves the old run aside and begins anew."
        )
    return None


def _set_aside(path: Path, rank: int, problem: str, world_size: int) -> None:
    """Tell what `rank` has found, and move the checkpoint to quarantine. Raises Unseen when rank 0, which runs this, finds that part of it sound."""
    manifest, still = _examined(path, (rank, world_size))
    if manifest and manifest.is_whole and still is None:
        raise Unseen(
            f"{problem}, as rank {rank} saw it. Looked at once more by rank 0 it is sound, so nothing was moved. Is the shared file system there "
            f"on that rank's host, and at the same place? Then run again."
        )
    try:
        moved = folder.quarantine(path)
    except OSError as error:
        raise CheckpointError(f"{problem}. It cannot be moved to quarantine ({error}): move it out of {path.parent} yourself.") from None
    log.error(f"{problem}. This checkpoint is not used; it is now in {moved}.")


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
