"""The shards that can be found, by content, where a run's config or a person says that they are."""

from pathlib import Path

from llm.log import UserError, progress

from .import_ids import BACKEND
from .ledger import Ledger
from .manifest import FILE_NAME, load_manifest
from .shard_meta import META_SUFFIX, meta_path_of
from .shards import Shard, verify_shard


class ShardsAtHand:
    """What lies in `paths`, folders or single shards: shards by shard_id, the sources that their manifests list, and what is damaged."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.shards: dict[str, Shard] = {}
        self.sources: list[dict] = []
        self.damage: list[str] = []
        self.is_reachable = any(Path(path).exists() for path in paths)
        for path in paths:
            self._add(Path(path))

    def _add(self, path: Path) -> None:
        metas = [meta_path_of(path)] if path.exists() or meta_path_of(path).exists() else []
        if path.is_dir():
            metas = sorted(path.glob(f"*{META_SUFFIX}"))
            self.sources += load_manifest(path).sources if (path / FILE_NAME).exists() else []
        for meta in metas:
            try:
                shard = Shard.open(meta)
                self.shards.setdefault(shard.meta.shard_id, shard)
            except UserError as error:
                self.damage.append(str(error))

    def where(self) -> str:
        """Where was looked."""
        if not self.paths:
            return "this model was imported, and no config says where data lie"
        places = ", ".join(self.paths)
        return f"looked in {places}" if self.is_reachable else f"none of {places} is there"

    def count(self, ledger: Ledger) -> str:
        held = ledger.shards_held()
        return f"{len(held & self.shards.keys()):,} of {len(held):,}"

    def is_whole(self, ledger: Ledger) -> bool:
        return ledger.shards_held() <= self.shards.keys()

    def problems(self, ledger: Ledger, quick: bool) -> list[str]:
        """What is wrong with the shards that the ledger lists; unless `quick`, every byte of them is read."""
        listed = {shard.shard_id: shard for phase in ledger.phases for shard in phase.shards}
        missing = [shard for shard_id, shard in listed.items() if shard_id not in self.shards]
        there = [self.shards[shard_id] for shard_id in listed if shard_id in self.shards]
        problems = [f"shard {s.name} ({s.shard_id[:16]}) of {s.n_tokens:,} tokens is not in {', '.join(self.paths)}" for s in missing]
        problems += self.damage if missing else []
        problems += [] if quick else _unreadable(there)
        for shard in there:
            told, meta = listed[shard.meta.shard_id], shard.meta
            units = told.unit_ids if meta.writer.get("backend") == BACKEND else meta.unit_ids  # of lines, blank ones too
            if (told.n_tokens, sorted(told.unit_ids)) != (meta.n_tokens, sorted(units)):
                problems.append(
                    f"{meta.path}: has {meta.n_tokens:,} tokens and {len(meta.unit_ids):,} units, "
                    f"the ledger says {told.n_tokens:,} and {len(told.unit_ids):,}"
                )
        return problems


def configured_paths(config: dict) -> list[str]:
    """Where a run's config, as a checkpoint holds it, has its data.

    A .jsonl of ids has become a shard beside it, or in the run's folder. The config of an imported
    model names none.
    """
    if "data" not in config:
        return []
    run = Path(config["checkpoint"]["checkpoint_dir"]) / config["checkpoint"]["run_name"]
    files = configured_ids(config)
    imported = [folder / f"{p.stem}.imported" for p in files for folder in (p.parent, run)]
    others = [path for path in _data_paths(config) if not path.endswith(".jsonl")]
    return others + [str(path) for path in imported if path.is_dir()]


def configured_ids(config: dict) -> list[Path]:
    """The .jsonl of ids that a run's config names."""
    return [Path(p) for p in _data_paths(config) if p.endswith(".jsonl")]


def _data_paths(config: dict) -> list[str]:
    paths = config.get("data", {}).get("data_path", [])
    if isinstance(paths, str):
        return [paths]
    return list(paths.values()) if isinstance(paths, dict) else paths


def _unreadable(shards: list[Shard]) -> list[str]:
    problems = []
    with progress(sum(shard.meta.files["bin"]["bytes"] for shard in shards), "reading shards", "bytes") as bar:
        for shard in shards:
            try:
                verify_shard(shard, bar)
            except (UserError, OSError) as error:
                problems.append(str(error))
    return problems
