"""From draws back to text: which shard, file and document a sample of a phase came from."""

from dataclasses import dataclass

import numpy as np

from .packing import bins_of
from .phase import Phase, PhaseShard
from .shards import Shard


@dataclass(frozen=True)
class Origin:
    """The text of one sample."""

    shard: PhaseShard
    pieces: list[tuple[int, int]]
    """The sample's tokens in its shard: [start, stop) of each piece; empty for a packed sample when the shard's files are not at hand."""
    documents: list[tuple[str, int]]
    """(source file, document in it as far as this shard holds it, from 0) in order; empty when the shard's files are not at hand."""


def origins(phase: Phase, start: int, stop: int, shards: dict[str, Shard]) -> list[Origin]:
    """Of the draws [start, stop), in order. `shards`: those at hand, by shard_id."""
    return [_origin(phase, int(sample), shards) for sample in phase.samples_at(np.arange(start, stop))]


def _origin(phase: Phase, sample: int, shards: dict[str, Shard]) -> Origin:
    index = int(np.searchsorted(phase.shard_ends, sample, side="right"))
    shard = phase.shards[index]
    number, here = sample - int(phase.shard_ends[index]) + shard.n_samples, shards.get(shard.shard_id)
    if here and phase.packing:
        pieces = bins_of(here, phase.seq_len).pieces(number)
    else:
        start = number * phase.seq_len
        pieces = [] if phase.packing else [(start, min(start + phase.seq_len + 1, shard.n_tokens))]
    return Origin(shard, pieces, [document for piece in pieces for document in documents_between(here, *piece)] if here else [])


def documents_between(shard: Shard, start: int, stop: int) -> list[tuple[str, int]]:
    """Documents that have tokens in [start, stop), as (source file, document in it, from 0).

    They are counted as far as this shard holds the file: a unit's documents follow one another, and
    units lie as the meta lists them.
    """
    ends = shard.doc_ends.view(np.int64)  # as they are, they would all be converted for each search
    first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
    units = shard.meta.units
    unit_ends = np.cumsum([unit.get("docs", 0) for unit in units], dtype=np.int64)
    found = []
    for document in range(first, last + 1):
        # the last for shards made from bare ids, which are of one file and do not say how many documents that has
        at = min(int(np.searchsorted(unit_ends, document, side="right")), len(units) - 1)
        before = int(unit_ends[at - 1]) if at else 0
        found.append((units[at].get("name", shard.meta.name), document - before))
    return found
