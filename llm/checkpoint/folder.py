"""A run's folder: names of checkpoints, the rename that commits one, quarantine and retention.

run/step-000001200-a3/   a committed checkpoint: step 1200, saved by the run's third attempt (sitting)
run/.tmp-...             being written; never read
run/.trash-...           being deleted
run/quarantine/          failed verification; only a person deletes
run/LOCK                 which job may write here (llm.checkpoint.lock)
run/RUN.json             written after the first commit: from then on the run never starts from step 0 by itself
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm import durable
from llm.checkpoint.manifest import NAME
from llm.log import log

_COMMITTED = re.compile(r"step-(\d{9})-a(\d+)")


@dataclass(frozen=True, order=True)
class Entry:
    """A committed checkpoint. Sorts by attempt, then step: returning to an older step on purpose makes its branch the newest."""

    attempt: int
    step: int
    path: Path


def step_name(step: int, attempt: int) -> str:
    return f"step-{step:09d}-a{attempt}"


def entries(run: Path) -> list[Entry]:
    """Committed checkpoints, oldest first."""
    found = []
    for path in run.iterdir() if run.is_dir() else ():
        match = _COMMITTED.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Entry(int(match[2]), int(match[1]), path))
    return sorted(found)


def parse_name(name: str) -> tuple[int, int]:
    """(attempt, step) of a committed checkpoint's name."""
    match = _COMMITTED.fullmatch(name)
    assert match, name
    return int(match[2]), int(match[1])


def other_branches(run: Path, attempt: int, lineage: list[str]) -> set[Path]:
    """Checkpoints that are no ancestors of what `attempt` saves: what came after a step that someone went back to on purpose.

    `lineage`: from which checkpoint each attempt in its history went on. Their names tell it even when they are long deleted.
    """
    left_at = dict(map(parse_name, lineage))
    return {e.path for e in entries(run) if e.attempt != attempt and e.step > left_at.get(e.attempt, -1)}


def next_attempt(run: Path) -> int:
    """One more than any attempt that left a trace, committed or not."""
    names = [p.name for folder in (run, run / "quarantine") if folder.is_dir() for p in folder.iterdir()]
    attempts = [int(m[2]) for name in names if (m := _COMMITTED.search(name))]
    return max(attempts, default=0) + 1


def publish(temporary: Path, final: Path, manifest_text: str, check: Callable[[], None]) -> None:
    """Write the manifest and make the checkpoint appear by one rename, unless `check`, asked at the last moment, raises. Raises OSError."""
    durable.write_text(temporary / NAME, manifest_text)
    durable.fsync_folder(temporary)
    check()
    temporary.rename(final)  # refuses a folder that is not empty, so nothing is ever overwritten
    durable.fsync_folder(final.parent)


def mark_run(run: Path, run_id: str) -> None:
    """Record that this run has committed something."""
    if not (run / "RUN.json").exists():
        durable.write_text(run / "RUN.json", json.dumps({"run_id": run_id}) + "\n")


def has_committed(run: Path) -> bool:
    return (run / "RUN.json").exists() or bool(entries(run))


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
    for leftover in (*run.glob(".tmp-*"), *run.glob(".trash-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(run: Path, keep: set[Path]) -> None:
    """Delete every committed checkpoint that is not in `keep`."""
    for entry in entries(run):
        if entry.path in keep:
            continue
        trash = run / f".trash-{entry.path.name}"
        try:
            entry.path.rename(trash)  # first out of sight in one go: a kill in the middle leaves no half checkpoint
            shutil.rmtree(trash)
        except OSError as error:
            log.warning(f"{entry.path}: old checkpoint could not be deleted ({error}).")
