"""Saving: every rank writes its slices, all vote, rank 0 commits by one rename."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from llm import durable
from llm.checkpoint import folder
from llm.checkpoint.manifest import File, Manifest, read_manifest
from llm.checkpoint.rng import rng_state
from llm.checkpoint.slices import Slice, check_finite, coverage_gaps, state_hash, write_slices
from llm.dist import World
from llm.log import UserError, log


class SaveFailed(Exception):
    """This save did not happen, on any rank; the older checkpoints are untouched."""


def save(world: World, run: Path, manifest: Manifest, slices: list[Slice], add_files: Callable[[Path], None]) -> Path:
    """Write and commit one checkpoint; returns its folder. Collective. Raises SaveFailed on every rank when any rank could not write.

    `manifest` comes without files and state_hash, which are filled in here; `add_files(folder)` lets rank 0 add small files (the tokenizer).
    """
    final = run / folder.step_name(manifest.step, manifest.attempt)
    temporary = run / f".tmp-{final.name}-{world.broadcast(uuid.uuid4().hex[:8])}"
    _agreed(world, temporary, lambda: temporary.mkdir(parents=True) if world.rank == 0 else None)
    records = _agreed(world, temporary, lambda: _write_rank(world, temporary, slices, add_files))
    files = [record for of_rank in records for record in of_rank]
    (hash_sum,) = world.sum_ints([state_hash(slices)])

    def commit() -> None:
        if world.rank:
            return
        gaps = coverage_gaps([(p.name, _numel(p.shape)) for p in manifest.params], files)
        assert not gaps, gaps
        whole = manifest.model_copy(update={"files": [File.model_validate(f) for f in files], "state_hash": hash_sum})
        folder.publish(temporary, final, whole.text())
        folder.mark_run(run, manifest.run_id)

    _agreed(world, temporary, commit)
    return final


def _agreed(world: World, temporary: Path, work: Callable) -> list:
    """Every rank's result of `work`; if it failed on any rank, clean up and raise SaveFailed on all."""
    result, failure = None, None
    try:
        result = work()
    except (OSError, MemoryError, UserError, AssertionError, RuntimeError, ValueError) as error:
        failure = f"rank {world.rank}: {error or type(error).__name__}"
    votes = world.gather([failure, result])
    failures = [vote[0] for vote in votes if vote[0] is not None]
    if failures:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveFailed("; ".join(failures))
    return [vote[1] for vote in votes]


def _write_rank(world: World, temporary: Path, slices: list[Slice], add_files: Callable[[Path], None]) -> list[dict]:
    check_finite(slices)
    tag = f"{world.rank:05d}-of-{world.size:05d}"
    shard = write_slices(temporary / f"shard-{tag}.safetensors", slices)
    (temporary / f"rank-{tag}.json").write_text(json.dumps(rng_state()))
    small = [temporary / f"rank-{tag}.json"]
    if world.rank == 0:
        add_files(temporary)
        small += [p for p in (temporary / "tokenizer").iterdir() if p.is_file()] if (temporary / "tokenizer").is_dir() else []
    records = [shard, *(_small_record(path, temporary) for path in small)]
    for record in records:
        written = file_sha256(temporary / record["path"])
        if written != record["sha256"]:
            raise OSError(f"{temporary / record['path']}: what was read back is not what was written; the disk or its driver is failing")
    durable.fsync_folder(temporary)
    return records


def _small_record(path: Path, root: Path) -> dict:
    content = path.read_bytes()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    name = path.relative_to(root).as_posix()
    return {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "chunks": []}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest_in_blocks(file)


def _digest_in_blocks(file) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _numel(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def apply_retention(run: Path, *, keep_last: int, keep_best: int, keep_epochs: bool, protect: set[Path]) -> None:
    """Keep the newest, the best by validation loss, the ends of epochs and `protect`; delete the rest. Rank 0 only."""
    found = folder.entries(run)
    manifests = {}
    for entry in found:
        try:
            manifests[entry.path] = read_manifest(entry.path)
        except UserError as error:
            log.warning(str(error))
    scored = sorted((m.metrics.get("val_loss"), str(p), p) for p, m in manifests.items() if m.metrics.get("val_loss") is not None)
    keep = {entry.path for entry in found[-keep_last:]} | {path for *_, path in scored[:keep_best]} | protect
    keep |= {path for path, m in manifests.items() if keep_epochs and m.epoch_end}
    keep |= {entry.path for entry in found if entry.path not in manifests}  # unreadable: for resume to judge, not for retention
    folder.prune(run, keep)
