"""Parts to shards: whole units in an order that depends on contents alone, gathered up to a target size and published."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from llm import durable
from llm.corpus.encode import Request, source_id_of
from llm.corpus.masks import joined
from llm.corpus.parts import ROLES, PartUnit
from llm.corpus.plan import Source, beginning, ending
from llm.data.manifest import load_manifest
from llm.data.record import ShardError
from llm.data.shard_meta import META_SUFFIX, ShardMeta, token_dtype
from llm.data.shards import Shard, write_shard
from llm.log import log


@dataclass(frozen=True)
class ReadSource:
    """A source whose units have all been read, and so its identity is known."""

    source: Source
    source_id: str
    units: list[PartUnit]

    def to_json(self, unit_bytes: int) -> dict:
        """Its entry in the manifest."""
        return {
            "source_id": self.source_id,
            "names": [self.source.name],
            "docs": sum(unit.record["docs"] for unit in self.units),
            "bytes": self.source.size,
            "unit_bytes": unit_bytes,
            "unit_ids": [unit.unit_id for unit in self.units],
            "beginning": beginning(self.source),
            "ending": ending(self.source.path, self.source.size),
        }


def identify(part_units: list[PartUnit]) -> list[ReadSource]:
    """The sources in the order of their ids, which names and listing order cannot change. Those without documents are left out."""
    sources = []
    for source, units in groupby(part_units, key=lambda part_unit: part_unit.unit.source):
        with_docs = [unit for unit in units if unit.record["docs"]]
        if with_docs:
            sources.append(ReadSource(source, source_id_of(unit.digests() for unit in with_docs), with_docs))
        else:
            log.warning(f"{source.given}: holds no document that is not empty; left out")
    return sorted(sources, key=lambda source: (source.source_id, [unit.unit_id for unit in source.units]))


def distinct_units(sources: list[ReadSource], held: set[str]) -> list[PartUnit]:
    """All units in the order of sources, once each, without sources whose text as a whole has come before or is `held` by the dataset,
    in another kind of file perhaps, cut otherwise. Single units that the dataset holds already have no tokens.
    """
    found: dict[str, PartUnit] = {}
    repeated: dict[str, None] = {}
    for _, group in groupby(sources, key=lambda source: source.source_id):
        first, *copies = group
        for unit in first.units if first.source_id not in held else ():
            if found.setdefault(unit.unit_id, unit) is not unit:
                repeated[first.source.name] = None
        repeated.update((copy.source.name, None) for copy in copies)
    if repeated:
        log.warning(f"text that occurs twice is used once; files that repeat some: {len(repeated):,} ({', '.join(list(repeated)[:5])})")
    return list(found.values())


@dataclass(frozen=True)
class ShardWriter:
    """Publishes shards in the folder of a request, each made of whole units."""

    request: Request
    tokenizer: dict
    timestamp: str
    writer: dict

    def publish(self, units: list[PartUnit]) -> list[ShardMeta]:
        """All shards of these units. Those that an interrupted run has published already are taken as they are."""
        published = []
        for role in ROLES:
            for number, group in enumerate(self._groups(units, role)):
                name = f"{self._stem(role)}-{number:05}"
                published.append(self._finished(name, group) or self._write(name, role, group))
        self._remove_leftovers({meta.path for meta in published})
        return published

    def _stem(self, role: str) -> str:
        return f"{self.request.out.resolve().name}{'-val' if role == 'val' else ''}.cached.{self.request.seq_len}.{self.timestamp}"

    def _groups(self, units: list[PartUnit], role: str) -> Iterator[list[PartUnit]]:
        group, n_tokens = [], 0
        for unit in units:
            unit_tokens = unit.record[role]["tokens"]
            if group and n_tokens + unit_tokens > self.request.shard_tokens:
                yield group
                group, n_tokens = [], 0
            if unit_tokens:
                group.append(unit)
                n_tokens += unit_tokens
        if group:
            yield group

    def _write(self, name: str, role: str, group: list[PartUnit]) -> ShardMeta:
        dtype = token_dtype(self.tokenizer["vocab_size"])
        return write_shard(
            self.request.out,
            name,
            (piece for unit in group for piece in unit.pieces(role, dtype)),
            dtype=dtype,
            tokenizer=self.tokenizer,
            units=[self._unit_entry(unit, role) for unit in group],
            role=role,
            seq_len=self.request.seq_len,
            writer=self.writer,
            mask_spans=joined((unit.spans(role), unit.record[role]["tokens"]) for unit in group),
        )

    def _unit_entry(self, unit: PartUnit, role: str) -> dict:
        counts = unit.record["counts"]
        return {
            "unit_id": unit.unit_id,
            "name": unit.unit.source.name,
            "docs": unit.record[role]["docs"],
            "bytes": unit.record[role]["bytes"],
            **{key: counts[key] for key in ("empty", "bad_utf8", "malformed")},
        }

    def _finished(self, name: str, group: list[PartUnit]) -> ShardMeta | None:
        path = self.request.out / f"{name}{META_SUFFIX}"
        if not path.exists():
            return None
        wanted = ([unit.unit_id for unit in group], self.tokenizer, self.request.seq_len, self.writer)
        try:
            meta = Shard.open(path).meta
        except ShardError:
            meta = None
        if meta and (meta.unit_ids, meta.tokenizer, meta.seq_len, meta.writer) == wanted:
            return meta
        _remove(path)
        return None

    def _remove_leftovers(self, published: set[Path]) -> None:
        """An interrupted run may have had other files to read. What it published nobody has seen: no manifest names it."""
        for path in list(self.request.out.iterdir()):
            if f".{self.timestamp}-" in path.name and path.name.endswith(META_SUFFIX) and path not in published:
                _remove(path)
            elif path.name.endswith(".tmp"):
                path.unlink()


def _remove(meta_path: Path) -> None:
    stem = meta_path.name.removesuffix(META_SUFFIX)
    for suffix in (META_SUFFIX, ".bin", ".idx", ".mask"):  # the meta first: without it there is no shard
        meta_path.with_name(stem + suffix).unlink(missing_ok=True)


def emit_jsonl(folder: Path) -> None:
    """Beside each shard of a dataset that has none yet, a .jsonl: one list of ids a line, a document each."""
    for entry in load_manifest(folder).shards:
        shard = Shard.open(folder / entry["path"])
        path = folder / f"{shard.meta.name}.jsonl"
        if not path.exists():
            _write_ids(shard, path)


def _write_ids(shard: Shard, path: Path) -> None:
    start = 0
    with durable.new_file(path) as fresh, open(fresh, "w", encoding="ascii") as file:
        for end in shard.doc_ends.tolist():
            file.write(json.dumps(shard.tokens(start, end).tolist()) + "\n")
            start = end
