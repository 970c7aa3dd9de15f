"""The manifest of a dataset folder: which shards belong to it, written last. Readers open it and never list the folder."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llm.log import log

from .record import ShardError, read_record, sha256_of, write_record
from .shard_meta import ShardMeta, meta_path_of
from .shards import Shard

FORMAT, VERSION = "tally-manifest", 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    sources: list[dict]
    """source_id, names, docs, bytes, unit_bytes, unit_ids of each text, in the order of first arrival"""
    shards: list[dict]
    """shard_id, path of the meta relative to the folder, role, n_tokens, n_bytes, dtype, unit_ids of each, in order of writing"""
    tokenizer: dict
    seq_len: int
    template: dict | None = None
    """The chat template that conversations were written with; None where there are none."""

    def takes(self, template: dict | None) -> bool:
        """Whether conversations written with this template may stand beside those that are there; its name does not matter."""
        return not (self.template and template) or same_form(self.template, template)

    @property
    def manifest_id(self) -> str:
        return sha256_of(FORMAT, sorted(shard["shard_id"] for shard in self.shards))


def same_form(template: dict, other: dict) -> bool:
    """Whether two chat templates write the same, whatever they are called."""
    return template | {"name": ""} == other | {"name": ""}


def load_manifest(folder: Path | str) -> Manifest:
    """The manifest of a dataset folder. Raises ShardError when tokenizing has not finished there."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        raise ShardError(f"{path}: missing: {folder} is not a dataset folder, or its tokenizing was cut off. "
                         f"Run the tokenizing (again): finished work is kept.")
    record = read_record(path, FORMAT, VERSION, "Delete it and run the tokenizing again: finished shards are kept.")
    return Manifest(record["sources"], record["shards"], record["tokenizer"], record["seq_len"], record.get("template"))


def write_manifest(
    folder: Path | str, *, sources: list[dict], shards: list[ShardMeta], tokenizer: dict, seq_len: int, template: dict | None = None
) -> Manifest:
    """Publish manifest.json with these sources and shards added to those it has: nothing is ever taken out."""
    folder = Path(folder)
    if (folder / FILE_NAME).exists():
        old = load_manifest(folder)
        theirs, ours = (old.tokenizer["fingerprint"], old.seq_len), (tokenizer["fingerprint"], seq_len)
        if theirs != ours:
            raise ShardError(f"{folder / FILE_NAME}: made with tokenizer {theirs[0][:16]} for seq_len {theirs[1]}, "
                             f"these shards with {ours[0][:16]} for {ours[1]}. Write them to another folder.")
        if not old.takes(template):
            raise ShardError(f"{folder / FILE_NAME}: its conversations were written with template {old.template['name']}, these with "
                             f"{template['name']}. Write them to another folder.")
    else:
        old = Manifest([], [], tokenizer, seq_len)
    known = {shard["shard_id"] for shard in old.shards}
    added = [_entry(meta, folder) for meta in shards if meta.shard_id not in known]
    manifest = Manifest(_merged_sources(old.sources, sources), old.shards + added, tokenizer, seq_len, old.template or template)
    fields = {"format": FORMAT, "version": VERSION, "manifest_id": manifest.manifest_id, **asdict(manifest)}
    write_record(folder / FILE_NAME, fields)
    return manifest


def _entry(meta: ShardMeta, folder: Path) -> dict:
    return {
        "shard_id": meta.shard_id, "path": str(meta.path.relative_to(folder)), "role": meta.role,
        "n_tokens": meta.n_tokens, "n_bytes": meta.n_bytes, "dtype": meta.dtype, "unit_ids": meta.unit_ids,
    }


def _merged_sources(old: list[dict], new: list[dict]) -> list[dict]:
    """A source that is known already keeps its place and only gains names."""
    merged = {source["source_id"]: source for source in old}
    for source in new:
        known = merged.get(source["source_id"], source)
        merged[source["source_id"]] = {**known, "names": known["names"] + [name for name in source["names"] if name not in known["names"]]}
    return list(merged.values())


def find_shards(paths: list[str | Path], role: str | None) -> list[Shard]:
    """The shards of this role (None: of any) in `paths`, each a dataset folder, a .bin or a .meta.json; copies only once, with a warning."""
    found: dict[str, Shard] = {}
    for path in map(Path, paths):
        for shard in _shards_at(path, role):
            first = found.setdefault(shard.meta.shard_id, shard)
            if first is not shard:
                log.warning(f"{shard.meta.path}: the same contents as {first.meta.path}; used once")
    if role != "val" and not found:
        raise ShardError(f"no {'training shards' if role else 'shards'} in {', '.join(map(str, paths)) or 'an empty list of paths'}. "
                         f"Name a folder or a .bin file that tokenizing made.")
    return list(found.values())


def _shards_at(path: Path, role: str | None) -> Iterator[Shard]:
    if path.is_dir():
        for entry in load_manifest(path).shards:
            if role in (None, entry["role"]):
                yield _open_listed(path, entry)
        return
    meta_path = meta_path_of(path)
    if not meta_path.exists():
        what = f"its {meta_path.name} is missing" if path.exists() else "no such file or folder"
        raise ShardError(f"{path}: {what}. A shard is a .bin with the .idx and .meta.json of the same name. "
                         f"Rename and copy them together, or tokenize again.")
    shard = Shard.open(meta_path)
    if role in (None, shard.meta.role):
        yield shard


def _open_listed(folder: Path, entry: dict) -> Shard:
    path = folder / entry["path"]
    if not path.exists():
        raise ShardError(f"{path}: missing, though {folder / FILE_NAME} lists it. Restore the files of this shard, "
                         f"or delete the folder and tokenize again.")
    shard = Shard.open(path)
    if shard.meta.shard_id != entry["shard_id"]:
        raise ShardError(f"{path}: replaced: {folder / FILE_NAME} lists shard {entry['shard_id'][:16]} there, the file says "
                         f"{shard.meta.shard_id[:16]}. Restore the files of this shard, or delete the folder and tokenize again.")
    return shard


def check_compatible(shards: list[Shard], fingerprint: str, seq_len: int, rechunk: bool = False) -> None:
    """Refuse shards made with another tokenizer, or for another seq_len unless `rechunk`. Raises ShardError with both values."""
    for meta in (shard.meta for shard in shards):
        its = meta.tokenizer["fingerprint"]
        if its != fingerprint:
            raise ShardError(f"{meta.path}: made with tokenizer {its[:16]}, this run's is {fingerprint[:16]}. "
                             f"Set tokenizer_path to the one of the shards, or tokenize the text again with this one.")
        if meta.seq_len != seq_len and not rechunk:
            raise ShardError(f"{meta.path}: made for seq_len {meta.seq_len}, this run has {seq_len}. Set seq_len to "
                             f"{meta.seq_len}, tokenize again, or say --rechunk to cut these shards into other windows.")
