"""Compressed text unpacked once, so that it can be cut into units like any other: the same text gives the same units, packed or not."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llm.corpus import compressed
from llm.corpus.formats import is_cut
from llm.corpus.options import ReadOptions
from llm.corpus.plan import Source
from llm.data.record import sha256_of
from llm.log import progress


def unpacked(sources: Iterable[Source], work: Path, options: ReadOptions) -> list[Source]:
    """The sources, with plain files in `work` in the place of .gz and .zst ones. What an interrupted run has unpacked is used again."""
    sources = list(sources)
    packed = [source for source in sources if source.path.suffix in (".gz", ".zst") and is_cut(source.path, options)]
    plain = {}
    if packed:
        with progress(sum(source.size for source in packed), "unpacking", "bytes") as bar:
            for source in packed:
                plain[source.path] = _unpack(source, work)
                bar.advance(source.size)
    return [plain.get(source.path, source) for source in sources]


def _unpack(source: Source, work: Path) -> Source:
    key = sha256_of("unpacked", str(source.path), source.size, source.mtime_ns)[:32]
    path = work / f"{key}-{source.path.stem}"  # the name for messages
    if not path.exists():
        tmp = path.with_name(path.name + ".tmp")
        with compressed.opened(source.path) as stream, open(tmp, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        tmp.replace(path)
    return replace(source, path=path, size=path.stat().st_size)
