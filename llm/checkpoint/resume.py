"""Resuming: find the newest checkpoint that is whole, agreed by all ranks; readers open one without changing anything."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from llm.checkpoint import folder
from llm.checkpoint.errors import CheckpointError, Damaged, Gone, Unjudged, is_gone, system_errors
from llm.checkpoint.invariants import INVARIANTS, Rule, check_invariants
from llm.checkpoint.manifest import NAME, Manifest, read_manifest
from llm.checkpoint.plain_files import open_file, sha256_of
from llm.checkpoint.slices import SliceReader
from llm.cli import NEEDS_A_PERSON
from llm.dist import World
from llm.log import UserError, log

Result = TypeVar("Result")
LOOKS = 10  # of a reader whose checkpoint is deleted each time by the run that trains


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint that may be read."""

    folder: Path
    manifest: Manifest

    @cached_property
    def reader(self) -> SliceReader:
        return SliceReader(
            self.folder, self.manifest.shapes, [f.model_dump() for f in self.manifest.files]
        )


@dataclass(frozen=True)
class _Finding:
    """What one rank has found wrong with a checkpoint or its share of the files."""

    rank: int
    text: str
    is_damage: bool
    exit_code: int

    def error(self, text: str) -> CheckpointError:
        error = Unjudged(text)
        error.exit_code = self.exit_code
        return error


_ADVICE = "Look at that rank's host: is the file system there that all share, and at the same place? Then run again."


def damage(checkpoint: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> str | None:
    """What proves that this rank's share (rank, size) of the files is damaged, in words; None when
    sound. Raises Unjudged."""
    rank, size = share
    for record in manifest.files[rank::size]:
        path = checkpoint / record.path
        try:
            with open_file(checkpoint, record.path) as handle:
                n_bytes = os.fstat(handle).st_size
                if n_bytes != record.bytes:
                    return f"{path}: has {n_bytes:,} bytes, the manifest says {record.bytes:,}"
                if sha256_of(handle) != record.sha256:
                    return f"{path}: its content does not match the hash in the manifest"
        except Damaged as missing:
            return str(missing)
    return None


def examine(
    path: Path, rules: Mapping[str, Rule] = INVARIANTS, share: tuple[int, int] = (0, 1)
) -> Manifest:
    """The manifest of a checkpoint whose files (this rank's share of them) are what it says.

    Raises Damaged when something proves the contrary, Unjudged when nothing can be told or it
    contradicts itself, and Gone.
    """
    try:
        with system_errors(path):
            manifest = read_manifest(path)
            check_invariants(path, manifest, rules)
            if problem := damage(path, manifest, share):
                raise Damaged(problem)
            return manifest
    except CheckpointError:
        if is_gone(path.absolute()):
            raise Gone(path) from None
        raise


def open_checkpoint(
    path: str | Path, step: int | None = None, rules: Mapping[str, Rule] = INVARIANTS
) -> Checkpoint:
    """Open a checkpoint folder, or the newest sound one (or that of `step`) in a run's folder.

    Verified; changes nothing. A damaged one is named and passed over. Raises CheckpointError; it is
    Unjudged for one of which nothing can be told: whether an older one will do, a person must say.
    """
    path = Path(path)
    if folder.is_there(path / NAME):
        return _open_folder(path, step, rules)
    for _ in range(LOOKS):
        found = _of_step(path, step)
        try:
            for entry in reversed(found):
                try:
                    return Checkpoint(entry.path, examine(entry.path, rules))
                except Damaged as error:
                    log.warning(f"{error}. Trying an older one.")
            raise CheckpointError(f"{path}: none of its {len(found)} checkpoints is sound.")
        except Gone as error:
            gone = error
            log.warning(f"{error} Looking once more.")
    raise gone


def read_checkpoint(
    path: str | Path, step: int | None, read: Callable[[Checkpoint], Result]
) -> Result:
    """`read` of what `open_checkpoint` gives; of the next newest if the run deletes that meanwhile.

    Raises what they raise; Gone when the checkpoint's own folder was asked for.
    """
    for _ in range(LOOKS):
        checkpoint = open_checkpoint(path, step)
        try:
            return read(checkpoint)
        except (UserError, OSError):
            if not is_gone(checkpoint.folder.absolute()):
                raise
            gone = Gone(checkpoint.folder)
        if checkpoint.folder == Path(path):
            break
        log.warning(f"{gone} Looking once more.")
    raise gone


def _open_folder(path: Path, step: int | None, rules: Mapping[str, Rule]) -> Checkpoint:
    try:
        manifest = examine(path, rules)
    except Damaged as error:
        raise Damaged(
            f"{error}. This checkpoint is damaged; use another step of the run."
        ) from None
    if step not in (None, manifest.step):
        raise CheckpointError(
            f"{path}: is the checkpoint of step {manifest.step}, not of {step}. Give the run's "
            f"folder with --step."
        )
    return Checkpoint(path, manifest)


def _of_step(run: Path, step: int | None) -> list[folder.Entry]:
    """Its checkpoints (of that step), oldest first; at least one, or CheckpointError."""
    there = folder.entries(run, thinned=True)
    found = [e for e in there if step is None or e.step == step]
    if not found:
        steps = ", ".join(map(str, sorted({e.step for e in there})))
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(
            f"{run}: {wanted} here{f' (there are steps {steps})' if steps else ''}. Give a run's "
            f"folder, such as checkpoints/toy."
        )
    return found


def newest(
    world: World, run: Path, step: int | None = None, rules: Mapping[str, Rule] = INVARIANTS
) -> Checkpoint | None:
    """The checkpoint to go on from (of `step`, if given), the same on every rank; None for a run that never committed one. Collective.

    A damaged one is named and moved to quarantine, once rank 0 itself has found it so, and the next
    older is tried. Raises CheckpointError when none is left, Unjudged when nothing can be told of
    one, on any rank, twice; then nothing is moved.
    """
    names = world.on_rank_0(lambda: _candidates(run, step))
    for path in (run / name for name in names):
        manifest, finding = _agreed(world, path, rules)
        if finding is None:
            return Checkpoint(path, manifest)
        of_rank_0 = world.on_rank_0(
            lambda path=path, rank=finding.rank: _look_for(path, rules, rank, world.size)
        )
        if of_rank_0 is None:
            # once more: a file system may fail for a moment, or be late on one host
            manifest, finding = _agreed(world, path, rules)
            if finding is None:
                return Checkpoint(path, manifest)
            raise finding.error(
                f"{finding.text}, as rank {finding.rank} sees it, but rank 0 finds it sound, so "
                f"nothing was moved. {_ADVICE}"
            )
        finding = _Finding(*of_rank_0)
        if not finding.is_damage:
            raise finding.error(f"{finding.text}.")
        world.on_rank_0(lambda path=path, problem=finding.text: _set_aside(path, problem))
    if step is not None:  # another step than the one asked for is for a person to choose
        world.on_rank_0(lambda: _candidates(run, step))
    committed = world.gather(world.together(lambda: folder.has_committed(run)))
    if any(committed) and not committed[0]:
        raise Unjudged(
            f"{run}: rank {committed.index(True)} sees that the run has saved before, rank 0 sees "
            f"nothing. {_ADVICE}"
        )
    if committed[0]:
        raise CheckpointError(
            f"{run}: the run has saved before, but no sound checkpoint is left{_weights_left(run)}. It does not start again from step 0 by itself: "
            f"restore a checkpoint folder, or give --fresh, which moves the old run aside and begins anew."
        )
    return None


def _agreed(
    world: World, path: Path, rules: Mapping[str, Rule]
) -> tuple[Manifest | None, _Finding | None]:
    """The manifest, and what the first rank with a complaint has found, the same on every rank.

    Collective.
    """
    manifest, mine = None, None
    try:
        manifest = examine(path, rules, (world.rank, world.size))
    except CheckpointError as error:
        mine = _complaint(world.rank, error)
    first = next((finding for finding in world.gather(mine) if finding), None)
    return manifest, _Finding(*first) if first else None


def _look_for(path: Path, rules: Mapping[str, Rule], rank: int, size: int) -> list | None:
    """What this rank finds in another one's share."""
    try:
        examine(path, rules, (rank, size))
    except CheckpointError as error:
        return _complaint(rank, error)
    return None


def _complaint(rank: int, error: CheckpointError) -> list:
    """The fields of a _Finding, as they travel between ranks."""
    # the run is locked, so no other job has deleted it
    code = NEEDS_A_PERSON if isinstance(error, Gone) else error.exit_code
    return [rank, str(error).removesuffix("."), isinstance(error, Damaged), code]


def _set_aside(path: Path, problem: str) -> None:
    try:
        moved = folder.quarantine(path)
    except OSError as error:
        raise CheckpointError(
            f"{problem}. It cannot be moved to quarantine ({error}): move it out of {path.parent} "
            f"yourself."
        ) from None
    log.error(f"{problem}. This checkpoint is not used; it is now in {moved}.")


def _weights_left(run: Path) -> str:
    thinned = folder.entries(run, thinned=True)
    return (
        f" ({thinned[-1].path} has weights alone: a new run can begin with --init-from)"
        if thinned
        else ""
    )


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
