"""What a run knows of a .jsonl of ids that has grown, and what of it is new.

Lines that were added since the run was trained on the file become shards of their own, beside those
that the ledger holds. All of it goes by the documents' ids: names and blank lines do not matter.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from .import_ids import BACKEND, imported_name, line_unit_ids, one_writer, write_imported
from .ledger import Ledger
from .phase import Phase, PhaseShard
from .shard_meta import IDX_DTYPE, META_SUFFIX, shard_id_of
from .shards import Shard

HASH_TOKENS = 1 << 22
_NAME = re.compile(r"(.*)\.cached\.\d+\.[0-9a-f]{12}")


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of an imported shard: the documents of the shard `shard_id`."""

    start: int
    stop: int
    shard_id: str
    is_known: bool


@dataclass(frozen=True)
class Settled:
    """The imported files of a run as its ledger knows them."""

    shards: dict[str, list[Shard]]
    """By the shard_id of a whole file: what is to be used in its place."""
    refused: list[str]
    """Of each file that may not be trained on: why not."""


def settle(shards: Iterable[Shard], ledger: Ledger) -> Settled:
    """Cut those of `shards` that were imported where the ledger's shards end; write the pieces.

    They lie beside the whole. A file that no longer begins with what the run was trained on is
    refused; what an open phase holds of it is used in its place, if that is still there. A file
    that is the beginning of one that the run knows is left out. Raises ShardError where nothing
    can be written.
    """
    wholes = {s.meta.shard_id: s for s in shards if s.meta.writer.get("backend") == BACKEND}
    held = {shard.shard_id: shard for phase in ledger.phases for shard in phase.shards}
    pieces = _pieces_of_all(wholes, held)
    pieces_there = {piece.shard_id for found in pieces.values() for piece in found}
    lost = [
        shard
        for shard in held.values()
        if shard.shard_id not in pieces_there
        and not any(_begins(whole, shard.shard_id, shard.n_tokens) for whole in wholes.values())
    ]
    settled, refused = {}, []
    for shard_id, whole in wholes.items():
        found, stem = pieces[shard_id], stem_of(whole.meta.name)
        is_new = found[-1].shard_id not in held
        lost_of_it = [shard for shard in lost if stem and stem_of(shard.name) == stem]
        if lost_of_it and is_new:
            refused.append(_changed(whole, found, held, lost_of_it))
            settled[shard_id] = _still_there(whole, lost_of_it, ledger.open_phase)
        elif is_new and any(
            _is_inside(whole, wholes[other], pieces[other], held) for other in wholes
        ):
            settled[shard_id] = []
        else:
            settled[shard_id] = _write_pieces(whole, found, held)
    return Settled(settled, refused)


def _pieces_of_all(wholes: dict[str, Shard], held: dict[str, PhaseShard]) -> dict[str, list[Piece]]:
    """Of a file and a copy of it that has grown, both new, the second is the first and the rest."""
    known, pieces = {shard_id: shard.n_tokens for shard_id, shard in held.items()}, {}
    for shard_id, whole in sorted(wholes.items(), key=lambda item: item[1].meta.n_tokens):
        pieces[shard_id] = pieces_of(whole, known)
        known |= {piece.shard_id: piece.stop - piece.start for piece in pieces[shard_id]}
    return pieces


def pieces_of(whole: Shard, known: dict[str, int]) -> list[Piece]:
    """The documents of `whole` as known shards one after another, from its first on, then the rest.

    `known`: numbers of tokens by shard_id. Of several that fit, the longest is taken.
    """
    lengths, pieces, start, end = (
        sorted(set(known.values()), reverse=True),
        [],
        0,
        whole.meta.n_tokens,
    )
    while start < end:
        stops = (start + length for length in lengths if _is_document_end(whole, start + length))
        candidates = (Piece(start, stop, _id_between(whole, start, stop), True) for stop in stops)
        found = next(
            (piece for piece in candidates if known.get(piece.shard_id) == piece.stop - start), None
        )
        pieces.append(found or Piece(start, end, _id_between(whole, start, end), False))
        start = pieces[-1].stop
    return pieces


def stem_of(name: str) -> str | None:
    """The name, without .jsonl, of the file that a shard is of; None for shards of text."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


def _is_document_end(shard: Shard, place: int) -> bool:
    ends = shard.doc_ends.view(np.int64)
    at = int(np.searchsorted(ends, place))
    return at < len(ends) and int(ends[at]) == place


def _id_between(whole: Shard, start: int, stop: int) -> str:
    """The shard_id of a shard with the documents in [start, stop) of `whole`."""
    meta, tokens = whole.meta, hashlib.sha256()
    if (start, stop) == (0, meta.n_tokens):
        return meta.shard_id
    for at in range(start, stop, HASH_TOKENS):
        tokens.update(
            whole.tokens(at, min(at + HASH_TOKENS, stop)).astype(
                np.dtype(meta.dtype).newbyteorder("<")
            )
        )
    ends = hashlib.sha256(_ends_between(whole, start, stop).astype(IDX_DTYPE))
    files = {"bin": {"sha256": tokens.hexdigest()}, "idx": {"sha256": ends.hexdigest()}}
    return shard_id_of(meta.tokenizer["fingerprint"], meta.dtype, stop - start, files)


def _ends_between(whole: Shard, start: int, stop: int) -> np.ndarray:
    """Document ends counted from `start`, int64."""
    ends = whole.doc_ends.view(np.int64)
    first, last = np.searchsorted(ends, [start, stop], side="right")
    return ends[first:last] - start


def _is_inside(
    whole: Shard, other: Shard, pieces: list[Piece], held: dict[str, PhaseShard]
) -> bool:
    """Whether `whole` is the beginning of what the run knows of `other`."""
    known = sum(piece.stop - piece.start for piece in pieces if piece.shard_id in held)
    return whole.meta.n_tokens <= known and _begins(other, whole.meta.shard_id, whole.meta.n_tokens)


def _begins(whole: Shard, shard_id: str, n_tokens: int) -> bool:
    """Whether the first documents of `whole`, or all, are those of this shard."""
    return _is_document_end(whole, n_tokens) and _id_between(whole, 0, n_tokens) == shard_id


def _changed(
    whole: Shard, pieces: list[Piece], held: dict[str, PhaseShard], lost: list[PhaseShard]
) -> str:
    """What is wrong with a file that does not begin with what the run was trained on."""
    meta, begin = whole.meta, pieces[-1].start
    then = [held[piece.shard_id] for piece in pieces if piece.shard_id in held] + lost
    there = [_find(meta.path.parent, shard.name, shard.shard_id) for shard in then]
    lists = f"{sum(shard.meta.n_docs for shard in there):,} lists, " if all(there) else ""
    n_tokens = sum(shard.n_tokens for shard in then)
    first_lost = there[-len(lost)]
    place = _first_difference(whole, begin, first_lost) if first_lost else None
    return (
        f"{meta.units[0]['name']}: the run was trained on {lists}{n_tokens:,} tokens of it; "
        f"now it has {meta.n_docs:,} lists, {meta.n_tokens:,} tokens, that do not begin with those"
        f"{f' (list {place:,} is another)' if place else ''}. Put the old lines back, new ones "
        f"behind them, or give the new text in a file of another name."
    )


def _first_difference(whole: Shard, begin: int, old: Shard) -> int | None:
    """The number, from 1, of the first list that differs from those of `old`.

    `begin`: the token of `whole` at which `old` began. None where one of the two ends before.
    """
    before = int(np.searchsorted(whole.doc_ends.view(np.int64), begin, side="right"))
    now, then = _documents(whole, begin, whole.meta.n_tokens), _documents(old, 0, old.meta.n_tokens)
    differs = (number for number, (a, b) in enumerate(zip(now, then, strict=False), 1) if a != b)
    return next((before + number for number in differs), None)


def _still_there(whole: Shard, lost: list[PhaseShard], phase: Phase | None) -> list[Shard]:
    """Those shards of the open phase that lie where the file was imported before."""
    wanted = {shard.shard_id for shard in phase.shards} if phase else set()
    found = (
        _find(whole.meta.path.parent, shard.name, shard.shard_id)
        for shard in lost
        if shard.shard_id in wanted
    )
    return [shard for shard in found if shard]


def _write_pieces(whole: Shard, pieces: list[Piece], held: dict[str, PhaseShard]) -> list[Shard]:
    """The pieces as shards beside `whole`; those that are there already are found there."""
    if len(pieces) == 1:
        return [whole]
    return [_write_piece(whole, piece, held.get(piece.shard_id)) for piece in pieces]


def _write_piece(whole: Shard, piece: Piece, known: PhaseShard | None) -> Shard:
    meta, folder, shard_id = whole.meta, whole.meta.path.parent, piece.shard_id
    name = imported_name(stem_of(meta.name) or meta.name, meta.seq_len, shard_id)
    with one_writer(folder):
        for candidate in (known.name if known else name, name):
            if there := _find(folder, candidate, shard_id):
                return there
        lines = (json.dumps(ids).encode() for ids in _documents(whole, piece.start, piece.stop))
        unit_ids = line_unit_ids(lines, meta.tokenizer["fingerprint"])
        documents = _documents(whole, piece.start, piece.stop)
        parts = ((np.array(ids), np.array([len(ids)])) for ids in documents)
        source = meta.units[0]["name"]
        written = write_imported(
            folder, name, parts, meta.tokenizer, meta.seq_len, source, unit_ids
        )
    assert written.shard_id == shard_id, (written.path, written.shard_id, shard_id)
    return Shard.open(written.path)


def _documents(whole: Shard, start: int, stop: int) -> Iterator[list[int]]:
    for a, b in pairwise([0, *_ends_between(whole, start, stop).tolist()]):
        yield whole.tokens(start + a, start + b).tolist()


def _find(folder: Path, name: str, shard_id: str) -> Shard | None:
    """The shard of this name in `folder`, if it is the one that is meant."""
    path = folder / f"{name}{META_SUFFIX}"
    shard = Shard.open(path) if path.exists() else None
    return shard if shard and shard.meta.shard_id == shard_id else None
