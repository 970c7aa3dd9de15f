"""Resuming: find the newest checkpoint that is whole, agreed by all ranks; readers open one without changing anything."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.hashes import file_sha256
from llm.checkpoint.manifest import NAME, Manifest, read_manifest
from llm.checkpoint.slices import CheckpointError, SliceReader
from llm.cli import NEEDS_A_PERSON
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
    """A checkpoint that one rank cannot read and another finds sound: no damage."""

    exit_code = NEEDS_A_PERSON


_ADVICE = "Look at that rank's host: is the file system there that all share, and at the same place? Then run again."


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

    A damaged one is named and moved to quarantine, and the next older is tried. Raises CheckpointError when none is left, Unseen when only
    some rank cannot read one, twice.
    """
    names = world.on_rank_0(lambda: _candidates(run, step))
    for path in (run / name for name in names):
        manifest, rank, problem = _agreed(world, path)
        if problem and world.on_rank_0(lambda path=path, rank=rank: _is_sound(path, (rank, world.size))):
            manifest, rank, problem = _agreed(world, path)  # a file system may fail for a moment, or be late on one host
            if problem:
                raise Unseen(f"{problem}, as rank {rank} sees it, but rank 0 finds it sound, so nothing was moved. {_ADVICE}")
        if problem is None:
            return Checkpoint(path, manifest)
        world.on_rank_0(lambda path=path, problem=problem: _set_aside(path, problem))
    if step is not None:  # another step than the one asked for is for a person to choose
        world.on_rank_0(lambda: _candidates(run, step))
    committed = world.gather(folder.has_committed(run))
    if any(committed) and not committed[0]:
        raise Unseen(f"{run}: rank {committed.index(True)} sees that the run has saved before, rank 0 sees nothing. {_ADVICE}")
    if committed[0]:
        raise CheckpointError(
            f"{run}: the run has saved before, but no sound checkpoint is left{_weights_left(run)}. It does not start again from step 0 by itself: "
            f"restore a checkpoint folder, or give --fresh, which moves the old run aside and begins anew."
        )
    return None


def _agreed(world: World, path: Path) -> tuple[Manifest | None, int, str | None]:
    """The manifest, and which rank has found what first; the same on every rank. Collective."""
    manifest, problem = _examined(path, (world.rank, world.size))
    if manifest and not manifest.is_whole:
        problem = f"{path}: has no optimizer moments"
    rank, told = next(((r, p) for r, p in enumerate(world.gather(problem)) if p), (0, None))
    return manifest, rank, told


def _is_sound(path: Path, share: tuple[int, int]) -> bool:
    manifest, problem = _examined(path, share)
    return problem is None and manifest.is_whole


def _set_aside(path: Path, problem: str) -> None:
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
