"""What of the data at hand a run has not been trained on: samples not taken, shards in no phase."""

from dataclasses import dataclass

import numpy as np

from .at_hand import ShardsAtHand
from .grown_ids import pieces_of
from .import_ids import BACKEND
from .ledger import Ledger
from .packing import bins_of
from .seen import SeenShard, seen_shards
from .shards import Shard


@dataclass(frozen=True)
class Untrained:
    """What is left of a shard."""

    shard: str
    sources: list[str]
    """Names of the files that it was made of, where a manifest or the shard tells."""
    unit_ids: tuple[str, ...]
    phase: str | None
    """That holds it; None: no phase does."""
    samples: int
    """That no phase has taken; 0 without a phase, which would cut them."""
    of_samples: int
    tokens: int
    of_tokens: int


def untrained(ledger: Ledger, at_hand: ShardsAtHand, imports: set[str]) -> list[Untrained]:
    """One for each shard of which something is left.

    `imports`: names of the shards that the .jsonl of ids in the run's config are now. Of a file
    that has grown, others lie beside them: what it was before.
    """
    names = _names_by_unit(at_hand)
    held: dict[str, SeenShard] = {}
    for found in seen_shards(ledger):
        before = held.get(found.shard.shard_id)
        held[found.shard.shard_id] = (
            max(before, found, key=lambda seen: seen.fraction) if before else found
        )
    left = [
        _rest(found, at_hand.shards.get(shard_id), names)
        for shard_id, found in held.items()
        if not found.seen.all()
    ]
    known = {shard_id: found.shard.n_tokens for shard_id, found in held.items()}
    for shard in _in_no_phase(ledger, at_hand):
        meta, n_new = shard.meta, _new_tokens(shard, known, imports)
        if n_new:
            sources, units = _sources(meta.unit_ids, names, shard), tuple(meta.unit_ids)
            left.append(Untrained(meta.name, sources, units, None, 0, 0, n_new, meta.n_tokens))
    return left


def _in_no_phase(ledger: Ledger, at_hand: ShardsAtHand) -> list[Shard]:
    """Training shards with text that no phase holds, in whatever shard."""
    shards, units = ledger.shards_held(), ledger.units_held()
    return [
        shard
        for shard in at_hand.shards.values()
        if shard.meta.role == "train"
        and shard.meta.shard_id not in shards
        and not units.issuperset(shard.meta.unit_ids)
    ]


def files_in_no_phase(ledger: Ledger, at_hand: ShardsAtHand) -> list[str]:
    """Names of the sources in the manifests at hand that have training shards, but in no phase."""
    held = ledger.units_held()
    trainable = {
        unit_id
        for shard in at_hand.shards.values()
        if shard.meta.role == "train"
        for unit_id in shard.meta.unit_ids
    }
    return [
        ", ".join(source["names"])
        for source in at_hand.sources
        if not held.intersection(source["unit_ids"]) and trainable.intersection(source["unit_ids"])
    ]


def _new_tokens(shard: Shard, known: dict[str, int], imports: set[str]) -> int:
    """Tokens of a shard in no phase that are in no other shard of a phase either."""
    if shard.meta.writer.get("backend") != BACKEND:
        return shard.meta.n_tokens
    pieces = pieces_of(shard, known) if shard.meta.name in imports else []
    return sum(piece.stop - piece.start for piece in pieces if not piece.is_known)


def _rest(found: SeenShard, shard: Shard | None, names: dict[str, list[str]]) -> Untrained:
    held, left = found.shard, ~found.seen
    sizes = _sample_tokens(found, shard)
    sources = _sources(held.unit_ids, names, shard)
    tokens, of_tokens = int(sizes[left].sum()), int(sizes.sum())
    return Untrained(
        held.name,
        sources,
        held.unit_ids,
        found.phase.name,
        int(left.sum()),
        len(left),
        tokens,
        of_tokens,
    )


def _sample_tokens(found: SeenShard, shard: Shard | None) -> np.ndarray:
    """How many tokens each sample predicts, int64; an even part in a packed shard not at hand."""
    phase, held = found.phase, found.shard
    if phase.packing and shard:
        bins = bins_of(shard, phase.seq_len)
        return np.add.reduceat(bins.stops - bins.starts - 1, bins.first[:-1])
    if phase.packing:
        return np.diff(np.linspace(0, held.n_tokens, held.n_samples + 1).astype(np.int64))
    ends = np.minimum(np.arange(1, held.n_samples + 1) * phase.seq_len, held.n_tokens - 1)
    return np.diff(ends, prepend=0)


def _names_by_unit(at_hand: ShardsAtHand) -> dict[str, list[str]]:
    return {
        unit_id: source["names"] for source in at_hand.sources for unit_id in source["unit_ids"]
    }


def _sources(unit_ids, names: dict[str, list[str]], shard: Shard | None) -> list[str]:
    of_units = (
        {unit["unit_id"]: [unit["name"]] for unit in shard.meta.units if "name" in unit}
        if shard
        else {}
    )
    return list(
        dict.fromkeys(
            name for unit_id in unit_ids for name in names.get(unit_id, of_units.get(unit_id, []))
        )
    )
