"""A run's folder: names of checkpoints, the rename that commits one, and quarantine.

run/step-000001200-a3/   a committed checkpoint: step 1200, saved by the run's third attempt (sitting)
run/weights-000000600-a3/  what retention has left of an older one: committed as well, but never resumed from
run/.tmp-...             being written; never read
run/.trash-...           being deleted
run/quarantine/          failed verification; only a person deletes
run/LOCK                 which job may write here (llm.checkpoint.lock)
run/RUN.json             written after the first commit: from then on the run never starts from step 0 by itself
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llm import durable
from llm.checkpoint.errors import CheckpointError, Unjudged, system_errors
from llm.checkpoint.manifest import NAME, read_manifest
from llm.log import log

COMMITTED = re.compile(r"(step|weights)-(\d{9})-a(\d+)")
MARK = "RUN.json"


@dataclass(frozen=True, order=True)
class Entry:
    """A committed checkpoint. Sorts by attempt, then step: returning to an older step on purpose makes its branch the newest."""

    attempt: int
    step: int
    is_whole: bool
    """With the optimizer's moments; else thinned to the weights."""
    path: Path

    @property
    def save(self) -> tuple[int, int]:
        """Which save it is of: a whole checkpoint and its thinned twin are of one."""
        return self.attempt, self.step


def step_name(step: int, attempt: int) -> str:
    return f"step-{step:09d}-a{attempt}"


def weights_name(step: int, attempt: int) -> str:
    return f"weights-{step:09d}-a{attempt}"


def entries(run: Path, thinned: bool = False) -> list[Entry]:
    """Folders called like checkpoints that can be resumed from, oldest first; with `thinned`, also
    like those that only have their weights left.

    What they hold is for `read_manifest` and the invariants to say. Raises Unreadable.
    """
    found = []
    with system_errors(run):
        for name in _listed(run):
            match = COMMITTED.fullmatch(name)
            if match and (thinned or match[1] == "step") and _is_folder(run / name):
                found.append(Entry(int(match[3]), int(match[2]), match[1] == "step", run / name))
    return sorted(found)


def _listed(folder: Path) -> list[str]:
    """What is in it; nothing when it is not there. Raises OSError."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(path: Path) -> bool:
    """Raises OSError, and Unjudged for a link to what is not there (a disk that is not mounted)."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        if not path.is_symlink():
            return False  # deleted since it was listed
    target = os.readlink(path)
    raise Unjudged(
        f"{path}: is a link to {target}, which is not there. Nothing was moved. Mount or restore "
        f"what it leads to, or remove the link."
    )


def is_there(path: Path) -> bool:
    """Whether something of that name is there. Raises Unreadable."""
    with system_errors(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def parse_name(name: str) -> tuple[int, int]:
    """(attempt, step) of a committed checkpoint's name."""
    match = COMMITTED.fullmatch(name)
    assert match, name
    return int(match[3]), int(match[2])


def other_branches(run: Path, attempt: int, lineage: list[str]) -> set[Path]:
    """Checkpoints that are no ancestors of what `attempt` saves: what came after a step that someone went back to on purpose.

    `lineage`: from which checkpoint each attempt in its history went on. Their names tell it even when they are long deleted.
    """
    left_at = dict(map(parse_name, lineage))
    return {e.path for e in entries(run, thinned=True) if e.attempt != attempt and e.step > left_at.get(e.attempt, -1)}


def next_attempt(run: Path) -> int:
    """One more than any attempt that left a trace, committed or not."""
    names = [p.name for folder in (run, run / "quarantine") if folder.is_dir() for p in folder.iterdir()]
    attempts = [int(m[3]) for name in names if (m := COMMITTED.search(name))]
    return max(attempts, default=0) + 1


def publish(temporary: Path, final: Path, manifest_text: str, check: Callable[[], None] = bool) -> None:
    """Write the manifest and make the checkpoint appear by one rename, unless `check`, asked at the last moment, raises. Raises OSError."""
    durable.write_text(temporary / NAME, manifest_text)
    check()
    temporary.rename(final)  # refuses a folder that is not empty, so nothing is ever overwritten
    durable.fsync_folder(final.parent)


def mark_run(run: Path, run_id: str) -> None:
    """Record that this run has committed something."""
    if not (run / MARK).exists():
        durable.fsync_folder(run.parent)  # the run's folder may be as new as its first checkpoint
        durable.write_text(run / MARK, json.dumps({"run_id": run_id}) + "\n")


def run_ids(run: Path, besides: Path) -> dict[str, str]:
    """Which run the folder is of, by what says so: RUN.json, else the checkpoints other than
    `besides`. Raises Unreadable."""
    with system_errors(run / MARK):
        try:
            return {MARK: str(json.loads((run / MARK).read_bytes())["run_id"])}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            pass  # a kill came between the first commit and this file
    found = {}
    for entry in entries(run, thinned=True):
        if entry.path != besides:
            with suppress(CheckpointError):
                found[entry.path.name] = read_manifest(entry.path).run_id
    return found


def has_committed(run: Path) -> bool:
    """Whether anything tells so: a kill may have come between the first commit and its RUN.json,
    and that checkpoint be in quarantine. Raises Unreadable."""
    return is_there(run / MARK) or is_there(run / "quarantine") or bool(entries(run, thinned=True))


def quarantine(path: Path) -> Path:
    """Move a damaged checkpoint aside, where it is never chosen and never deleted."""
    target = path.parent / "quarantine" / path.name
    target.parent.mkdir(exist_ok=True)
    copies = len(list(target.parent.glob(f"{path.name}*")))
    target = target.with_name(f"{path.name}.{copies}") if copies else target
    path.rename(target)
    return target


def clean(run: Path) -> None:
    """Remove what earlier attempts left half-written or half-deleted."""
    with system_errors(run):
        for name in _listed(run):
            if name.startswith((".tmp-", ".trash-")):
                shutil.rmtree(run / name, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a committed checkpoint, first out of sight in one go: a kill in the middle leaves no half one. Failing is only told."""
    trash = path.with_name(f".trash-{path.name}")
    try:
        path.rename(trash)
        durable.fsync_folder(path.parent)  # else a power cut may take files of it and leave it its name
        shutil.rmtree(trash)
    except OSError as error:
        log.warning(f"{path}: old checkpoint could not be deleted ({error}).")
