"""Best-fit packing: whole documents put into rows so that little is left over. A row, called a bin, is then a sample like any other.

The bins follow from the lengths of a shard's documents and seq_len alone: a shard_id, a seq_len and the algorithm's name say which they are.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .shards import Shard

BESTFIT = "bestfit-decreasing/v1"


@dataclass(frozen=True)
class Bins:
    """Pieces of documents, bin after bin: those of bin b are starts[first[b]:first[b + 1]], in tokens of the shard."""

    starts: np.ndarray
    stops: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def pieces(self, number: int) -> list[tuple[int, int]]:
        here = slice(self.first[number], self.first[number + 1])
        return list(zip(self.starts[here].tolist(), self.stops[here].tolist(), strict=True))


@lru_cache(maxsize=1024)  # rows come from all shards in turn: beyond this, each costs the packing of its whole shard
def bins_of(shard: Shard, seq_len: int) -> Bins:
    """Every document of the shard, those that are too long in pieces, in rows of seq_len + 1 tokens. A million documents take about a second."""
    starts, stops = split_documents(shard.doc_ends.astype(np.int64), seq_len)
    bin_of = best_fit(stops - starts, seq_len + 1)
    order = np.argsort(bin_of, kind="stable")
    return Bins(starts[order], stops[order], np.r_[0, np.cumsum(np.bincount(bin_of))])


def split_documents(doc_ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """[start, stop) of each document, or of its pieces of seq_len + 1 tokens: neighbours share one, so each token but the first is a target once."""
    doc_starts = np.r_[0, doc_ends[:-1]]
    n_pieces = np.maximum(1, -(-(doc_ends - doc_starts - 1) // seq_len))
    first_piece = np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    starts = np.repeat(doc_starts, n_pieces) + seq_len * (np.arange(n_pieces.sum()) - first_piece)
    return starts, np.minimum(starts + seq_len + 1, np.repeat(doc_ends, n_pieces))


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The bin of each piece, int64[n]: longest first, each where it leaves the least room, in a new bin where it fits in none."""
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the tokens left in them
    rooms: list[int] = []  # which of these lists are not empty, in order
    bin_of, n_bins, sizes = np.empty(len(lengths), np.int64), 0, lengths.tolist()
    for i in np.argsort(-lengths, kind="stable").tolist():
        at, left = bisect_left(rooms, sizes[i]), room
        if at < len(rooms):
            left = rooms[at]
            chosen = with_room[left].pop()
            if not with_room[left]:
                del rooms[at]
        else:
            chosen, n_bins = n_bins, n_bins + 1
        left -= sizes[i]
        if left and not with_room[left]:
            insort(rooms, left)
        with_room[left].append(chosen)
        bin_of[i] = chosen
    return bin_of
