"""Which checkpoints stay: the last, every so many steps, the best, ends of epochs; and old ones thinned to their weights. Rank 0 only.

Nothing is changed in place. A thinned checkpoint is a new folder, weights-000001200-a3, written, read back and committed like any other;
only then does the whole one go, by a rename out of sight and then file by file. A kill at any point leaves one of the two whole, or both,
and the next call goes on from there.
"""

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm.checkpoint import folder
from llm.checkpoint.errors import CheckpointError
from llm.checkpoint.folder import Entry
from llm.checkpoint.hashes import file_sha256, tokenizer_records
from llm.checkpoint.invariants import check_invariants
from llm.checkpoint.manifest import NAME, WEIGHTS_FORMAT, File, Manifest, Parent, read_manifest
from llm.checkpoint.resume import Checkpoint, damage
from llm.checkpoint.weights import write_weights
from llm.log import log


@dataclass(frozen=True)
class Retention:
    """What stays of a run's own branch. An entry that the rules do not name goes."""

    last: int
    """So many of the newest whole ones whose manifest can be read, always whole."""
    best: int = 0
    """So many with the lowest validation loss, of each measure: other rows' losses say nothing."""
    epochs: bool = False
    """Ends of epochs."""
    every: int = 0
    """The first at or after each multiple of so many steps; 0: none for this reason."""
    thin: bool = False
    """What stays beyond the last keeps only its weights."""


def apply_retention(run: Path, rules: Retention, protect: Iterable[Path], apart: Iterable[Path] = ()) -> None:
    """Thin and delete. `protect` stays as it is; so do `apart`, the checkpoints of other branches, which the rules do not count either."""
    apart, protected = set(apart), set(protect)
    found = [entry for entry in folder.entries(run, thinned=True) if entry.path not in apart]
    manifests = {entry: manifest for entry in found if (manifest := _readable(entry.path))}
    whole = [entry for entry in manifests if entry.is_whole]
    unknown = {e for e in found if e not in manifests}
    as_it_is = set(whole[-rules.last :]) | unknown | {e for e in found if e.path in protected}
    keep = {entry.save for entry in as_it_is | set(_chosen(manifests, rules))}
    for save in {entry.save: None for entry in found}:
        both = {entry.is_whole: entry for entry in found if entry.save == save}
        if save not in keep:
            removed = list(both.values())
        elif rules.thin and True in both and both[True] not in as_it_is:
            removed = [both[True]] if False in both or _try_to_thin(run, both[True], manifests[both[True]]) else []
        else:  # the thinned twin of a whole one that stays, say because it was resumed from: a kill came between
            removed = [both[False]] if len(both) == 2 else []
        for entry in removed:
            if entry in manifests and entry.path not in protected:
                folder.remove(entry.path)


def val_losses(run: Path, measure: str, apart: Collection[Path]) -> list[float]:
    """Validation losses of this measure, one of each save that is there and not `apart`."""
    found = {}
    for entry in folder.entries(run, thinned=True):
        manifest = None if entry.path in apart else _readable(entry.path)
        if manifest is None or manifest.validated_on != measure:
            continue
        if (loss := manifest.metrics.get("val_loss")) is not None:
            found[entry.save] = loss
    return list(found.values())


def _readable(path: Path) -> Manifest | None:
    """None for one that cannot be read, is another run's or contradicts itself: that is for resume
    and a person to judge."""
    try:
        manifest = read_manifest(path)
        check_invariants(path, manifest)
        return manifest
    except CheckpointError as error:
        log.warning(str(error))
        return None


def _chosen(manifests: dict[Entry, Manifest], rules: Retention) -> Iterator[Entry]:
    scored = defaultdict(dict)
    for entry, manifest in manifests.items():
        if (loss := manifest.metrics.get("val_loss")) is not None:
            scored[manifest.validated_on][entry.save] = (loss, entry)
    for of_measure in scored.values():
        yield from (entry for _, entry in sorted(of_measure.values())[: rules.best])
    reached = 0
    for entry in sorted(manifests, key=lambda e: (e.step, e.attempt)):
        if rules.epochs and manifests[entry].epoch_end:
            yield entry
        if rules.every and entry.step // rules.every > reached:
            reached = entry.step // rules.every
            yield entry


def _try_to_thin(run: Path, entry: Entry, manifest: Manifest) -> bool:
    temporary = run / f".tmp-{folder.weights_name(entry.step, entry.attempt)}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        problem = damage(entry.path, manifest)
        if problem:
            raise CheckpointError(problem)
        _thin(entry.path, manifest, temporary)
        return True
    except (OSError, CheckpointError) as error:
        log.warning(f"{entry.path}: could not be thinned to its weights and stays whole ({error}).")
        shutil.rmtree(temporary, ignore_errors=True)
        return False


def _thin(whole: Path, manifest: Manifest, temporary: Path) -> None:
    """Commit a checkpoint of the weights of `whole` beside it."""
    temporary.mkdir()
    records, state = write_weights(temporary, manifest.shapes, Checkpoint(whole, manifest).reader)
    if (whole / "tokenizer").is_dir():
        shutil.copytree(whole / "tokenizer", temporary / "tokenizer", copy_function=shutil.copyfile)
    records += tokenizer_records(temporary)
    parent = Parent(name=whole.name, manifest_sha256=file_sha256(whole / NAME))
    files = [File.model_validate(record) for record in records]
    thinned = manifest.model_copy(update={"format": WEIGHTS_FORMAT, "parent": parent, "files": files, "state_hash": state})
    assert not thinned.gaps, thinned.gaps
    folder.publish(temporary, whole.with_name(folder.weights_name(manifest.step, manifest.attempt)), thinned.text())
