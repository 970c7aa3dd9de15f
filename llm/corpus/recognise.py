"""Which units of text a file holds, whatever it is called now: cut and hashed again as tokenizing would, without a tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from llm.corpus.compressed import unpacked_size
from llm.corpus.documents import Counts, read_documents
from llm.corpus.encode import SOURCE_TAG, UNIT_TAG, document_digest, ids_so_far, unit_id_of
from llm.corpus.formats import is_cut, is_readable, kinds, wanted_borders
from llm.corpus.options import ReadOptions
from llm.corpus.plan import unit_bytes_for
from llm.log import UserError


@dataclass(frozen=True)
class TextUnit:
    unit_id: str
    n_docs: int
    n_bytes: int
    """UTF-8 bytes of its documents."""


@dataclass(frozen=True)
class _Documents:
    digests: list[bytes]
    starts: np.ndarray
    """int64: where each document starts in the file."""
    sizes: np.ndarray


def units_of_file(
    path: Path, sources: list[dict], known: set[str], options: ReadOptions, advance: Callable[[int], None] = lambda _: None
) -> list[TextUnit]:
    """The units of a file. `sources`: those of the manifests at hand; `known`: unit ids to be recognised.

    Where a file is cut depends on what it was when it was first tokenized, which its name may no longer tell. So each cut that the
    sources suggest is tried, and the one that recognises most of the text is the answer. `advance(n)` hears of bytes read.
    """
    if not is_readable(path) and not options.format:
        raise UserError(f"{path}: cannot read files called *{path.suffix}; {kinds()} can be read.")
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    documents = _read(path, options, advance)
    size = unpacked_size(path) if is_cut(path, options) else 0
    cuts = [_units(documents, starts) for starts in _possible_cuts(path, size, documents, sources)]
    return max(cuts, key=lambda units: sum(unit.n_bytes for unit in units if unit.unit_id in known))


def _read(path: Path, options: ReadOptions, advance: Callable[[int], None]) -> _Documents:
    digests, starts, sizes, told = [], [], [], 0
    for document in read_documents(path, path.name, 0, path.stat().st_size, options, Counts()):
        digests.append(document_digest(document.identity()))
        starts.append(document.index)
        sizes.append(len(document.text.encode()))
        advance(document.index - told)
        told = document.index
    if not digests:
        raise UserError(f"{path}: holds no document that is not empty.")
    return _Documents(digests, np.array(starts, np.int64), np.array(sizes, np.int64))


def _possible_cuts(path: Path, size: int, documents: _Documents, sources: list[dict]) -> list[list[int]]:
    """Which documents start a unit: in a file of its own; in one of this name; in one that begins as known sources do; in one with all
    the text of a source that may have been another kind of file.
    """
    same_name = [s for s in sources if any(Path(name).name == path.name for name in s["names"])]
    lengths = {s["docs"] for s in sources}
    prefixes = {n_docs: source_id for n_docs, source_id in enumerate(ids_so_far(SOURCE_TAG, documents.digests), 1) if n_docs in lengths}
    begins = [s for s in sources if prefixes.get(s["docs"]) == s["source_id"]]
    cuts = [(unit_bytes_for(size), [])]
    for earlier in (same_name, begins):
        ends = sorted({s["bytes"] for s in earlier})
        cuts += [(unit_bytes, chosen) for unit_bytes in {s["unit_bytes"] for s in earlier} for chosen in ([], ends)]
    by_position = [np.searchsorted(documents.starts, wanted_borders(size, *cut)).tolist() for cut in cuts]
    return by_position + [_starts(source, documents.digests) for source in begins if source["docs"] == len(documents.digests)]


def _starts(source: dict, digests: list[bytes]) -> list[int]:
    """The documents with which the units of a source of the same text start."""
    starts = [0]
    for unit_id in source["unit_ids"]:
        rest = islice(digests, starts[-1], None)
        starts.append(starts[-1] + next(n_docs for n_docs, so_far in enumerate(ids_so_far(UNIT_TAG, rest), 1) if so_far == unit_id))
    return starts


def _units(documents: _Documents, starts: list[int]) -> list[TextUnit]:
    borders = pairwise([0, *starts, len(documents.digests)])
    return [TextUnit(unit_id_of(documents.digests[a:b]), b - a, int(documents.sizes[a:b].sum())) for a, b in borders if a < b]
