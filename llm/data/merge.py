"""Datasets tokenized apart, for example on the disks of several machines, as one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llm import durable
from llm.checkpoint.hashes import file_sha256

from .manifest import FILE_NAME, Manifest, load_manifest, write_manifest
from .record import ShardError
from .shard_meta import META_SUFFIX
from .shards import Shard


def merge_datasets(folders: list[Path], out: Path, advance: Callable[[int], None] = lambda _: None) -> Manifest:
    """Add the shards of `folders` to the dataset `out`, linked where that is possible, else copied and verified. Raises ShardError.

    The manifest comes last: interrupted, the same call goes on. `advance(n)` hears of tokens.
    """
    manifests = {folder: load_manifest(folder) for folder in [*([out] if (out / FILE_NAME).exists() else []), *folders]}
    _refuse_strangers(manifests)
    _refuse_text_twice(manifests)
    out.mkdir(parents=True, exist_ok=True)
    present = {shard["shard_id"] for shard in manifests[out].shards} if out in manifests else set()
    for folder in folders:
        manifest, metas = manifests[folder], []
        for entry in manifest.shards:
            if entry["shard_id"] not in present:
                metas.append(_bring(Shard.open(folder / entry["path"]), out).meta)
                present.add(entry["shard_id"])
            advance(entry["n_tokens"])
        same = {"tokenizer": manifest.tokenizer, "seq_len": manifest.seq_len, "template": manifest.template}
        merged = write_manifest(out, sources=manifest.sources, shards=metas, **same)
    return merged


def _refuse_strangers(manifests: dict[Path, Manifest]) -> None:
    first, *others = manifests
    for folder in others:
        theirs, ours = ((m.tokenizer["fingerprint"][:16], m.seq_len) for m in (manifests[folder], manifests[first]))
        if theirs != ours:
            raise ShardError(f"{folder}: made with tokenizer {theirs[0]} for seq_len {theirs[1]}, {first} with {ours[0]} for {ours[1]}. "
                             f"A dataset has one tokenizer and one seq_len: merge those that agree.")  # fmt: skip
    written = [folder for folder, manifest in manifests.items() if manifest.template]
    for folder in written[1:]:
        if not manifests[written[0]].takes(manifests[folder].template):
            raise ShardError(f"{folder}: its conversations were written with template {manifests[folder].template['name']}, those of {written[0]} "
                             f"with {manifests[written[0]].template['name']}. A dataset has one template: merge those that agree.")  # fmt: skip


def _refuse_text_twice(manifests: dict[Path, Manifest]) -> None:
    holder: dict[tuple[str, str], tuple[str, Path]] = {}
    for folder, manifest in manifests.items():
        for shard in manifest.shards:
            for unit_id in shard["unit_ids"]:
                shard_id, first = holder.setdefault((shard["role"], unit_id), (shard["shard_id"], folder))
                if shard_id != shard["shard_id"]:
                    names = ", ".join(name for s in manifest.sources if unit_id in s["unit_ids"] for name in s["names"])
                    raise ShardError(f"{folder}: holds text ({names or unit_id[:16]}) that is in another shard of {first} too, so it would "
                                     f"be trained on twice. Tokenize each file in one place only.")  # fmt: skip


def _bring(shard: Shard, out: Path) -> Shard:
    meta = shard.meta
    for name in (meta.name, f"{meta.name}-{meta.shard_id[:8]}"):
        path = out / f"{name}{META_SUFFIX}"
        if not path.exists():
            break
        if (there := Shard.open(path)).meta.shard_id == meta.shard_id:
            return there  # from a merge that was interrupted
    for kind, record in meta.files.items():
        target = out / f"{name}.{kind}"
        if not _link_or_copy(meta.file(kind), target) and file_sha256(target) != record["sha256"]:
            raise ShardError(f"{target}: the copy of {meta.file(kind)} does not match the hash in its meta: one of the two disks "
                             f"has damaged it. Check the first one's data (verify), and merge again.")  # fmt: skip
    _link_or_copy(meta.path, path)  # last: without it there is no shard
    durable.fsync_folder(out)
    return Shard.open(path)


def _link_or_copy(source: Path, target: Path) -> bool:
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        linked = True
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        linked = False
    os.replace(temporary, target)
    return linked
