"""Which windows of tokens of some documents stand in shards, and whether those were trained on.

A text that was cut out of another begins and ends within words, so its first and last tokens are
others; between them the ids are the same. So a document is compared by overlapping windows of its
inner tokens: 32 tokens long, in documents of less than 64 tokens 16 or 8, and below 16 tokens the
document as a whole. Of a tokenizer that has hardly learned anything, so that a token is little more
than a byte, 32 tokens are a few words that any text may have; there windows are 48 tokens long, or
24. A rolling hash of every window of every shard is looked up among those of the documents, and what
is found there is compared id by id. Shards are read block by block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from llm.log import UserError

from .ledger import Ledger
from .packing import bins_of
from .phase import Phase
from .shards import Shard, verify_shard

Cuts = tuple[tuple[int, int], ...]
"""(tokens that a document must have, length of its windows), longest first; below, it is whole."""
CUTS: Cuts = ((64, 32), (32, 16), (16, 8))
CUTS_OF_BYTES: Cuts = ((64, 48), (32, 24))
BLOCK_TOKENS, BLOCK_DOCUMENTS = 1 << 18, 1 << 14
NONE, SOME, ALL = 0, 1, 2
"""How many of the samples that hold a window were trained on."""


@dataclass(frozen=True)
class Compared:
    """The windows of all documents, in order."""

    ids: np.ndarray
    """int64: those of all documents, one after another."""
    document: np.ndarray
    """int64[windows]: which document each is of."""
    start: np.ndarray
    """int64[windows]: its first token in `ids`."""
    length: np.ndarray
    is_whole: np.ndarray
    """bool[windows]: it is a whole document, and only a whole document is the same."""

    def __len__(self) -> int:
        return len(self.document)

    @classmethod
    def of(cls, documents: list[np.ndarray], cuts: Cuts) -> "Compared":
        """`documents`: ids of each, without an end-of-text."""
        sizes = np.array([len(ids) for ids in documents], np.int64)
        windows = [_windows_of(size, cuts) for size in sizes.tolist()]
        begins = np.cumsum(sizes) - sizes
        starts = [begin + starts for begin, (starts, _) in zip(begins, windows, strict=True)]
        counts = np.array([len(some) for some in starts], np.int64)
        nothing = [np.zeros(0, np.int64)]  # so that no documents are no special case
        return cls(
            ids=np.concatenate(nothing + documents).astype(np.int64),
            document=np.repeat(np.arange(len(documents)), counts),
            start=np.concatenate(nothing + starts),
            length=np.repeat(np.array([length for _, length in windows], np.int64), counts),
            is_whole=np.repeat(sizes < cuts[-1][0], counts),
        )


def cuts_for(shards: list[Shard]) -> Cuts:
    """How documents are to be cut that are compared with these shards."""
    metas = [
        shard.meta for shard in shards if shard.meta.n_bytes
    ]  # others came as ids, without text
    is_of_bytes = sum(meta.n_bytes for meta in metas) < 2 * sum(meta.n_tokens for meta in metas)
    return CUTS_OF_BYTES if is_of_bytes else CUTS


def _windows_of(n_tokens: int, cuts: Cuts) -> tuple[np.ndarray, int]:
    """Where the windows of a document start, and their length.

    Edges, which a cut may have changed, are left out.
    """
    for least, length in cuts:
        if n_tokens >= least:
            edge = least // 8
            last = n_tokens - edge - length
            return np.unique([*range(edge, last, length // 8), last]), length
    return np.zeros(min(1, n_tokens), np.int64), n_tokens


@dataclass
class Overlap:
    """What was found of each window; arrays are as long as there are windows."""

    compared: Compared
    state: np.ndarray
    """uint8[runs, windows]: NONE, SOME or ALL, by each run."""
    in_phase: np.ndarray
    """bool: in a shard that a phase of any run holds."""
    held_out: np.ndarray
    """bool: in a validation shard."""
    shard: np.ndarray
    """int64: number of a shard that it stands in, if it can be of one trained on; -1: in none."""
    place: np.ndarray
    """int64: its first token there."""

    @classmethod
    def nothing_yet(cls, compared: Compared, runs: int) -> "Overlap":
        n = len(compared)
        return cls(
            compared,
            np.zeros((runs, n), np.uint8),
            np.zeros(n, bool),
            np.zeros(n, bool),
            np.full(n, -1),
            np.full(n, -1),
        )

    @property
    def trained(self) -> np.ndarray:
        """uint8[windows]: by the run that was trained on most of it."""
        return self.state.max(axis=0, initial=NONE)

    def note(self, found: "_Found", number: int, shard: Shard, trained: "_Trained") -> None:
        """Windows that stand in the shard of this number."""
        states = trained(found.place, found.place + found.length)
        best = states.max(axis=0, initial=NONE)
        is_better = (best > self.trained[found.window]) | (self.shard[found.window] < 0)
        better = np.flatnonzero(is_better)
        better = better[np.argsort(best[better], kind="stable")]  # of one window, the best is last
        self.shard[found.window[better]] = number
        self.place[found.window[better]] = found.place[better]
        for mine, state in zip(self.state, states, strict=True):
            np.maximum.at(mine, found.window, state)
        self.held_out[found.window] |= shard.meta.role == "val"
        self.in_phase[found.window] |= trained.is_held

    def spread(self, same_as: np.ndarray) -> None:
        """Tell each window what was found of the one with the same ids that stands for it."""
        self.state = self.state[:, same_as]
        self.in_phase, self.held_out = self.in_phase[same_as], self.held_out[same_as]
        self.shard, self.place = self.shard[same_as], self.place[same_as]


@dataclass(frozen=True)
class _Found:
    """Windows that stand in a shard, and where."""

    window: np.ndarray
    place: np.ndarray
    length: int


def find_windows(
    documents: list[np.ndarray],
    shards: list[Shard],
    ledgers: list[Ledger],
    advance: Callable[[int], None] = lambda _: None,
    cuts: Cuts = CUTS,
) -> tuple[Overlap, dict[str, str]]:
    """What `shards` hold of the documents, and which of the runs with these ledgers trained on it.

    Also the shards that cannot be read, by shard_id: why. Memory: some 100 bytes for each token of
    the documents and a block of a shard. `advance(n)` hears of tokens of shards.
    """
    compared = Compared.of(documents, cuts)
    overlap, unreadable = Overlap.nothing_yet(compared, len(ledgers)), {}
    kinds = np.unique(np.stack([compared.length, compared.is_whole], axis=1), axis=0).tolist()
    tables = [_Table(compared, length, bool(is_whole)) for length, is_whole in kinds]
    for number, shard in enumerate(shards):
        trained = _Trained(shard, ledgers)
        try:
            verify_shard(shard)  # a damaged one proves nothing
            for found in _found_in(shard, tables, advance):
                overlap.note(found, number, shard, trained)
        except UserError as error:
            unreadable[shard.meta.shard_id] = str(error)
    same_as = np.arange(len(compared))
    for table in tables:
        same_as[table.members] = table.windows[table.inverse]
    overlap.spread(same_as)
    return overlap, unreadable


class _Table:
    """The windows of one length by hash; of several with the same ids, one stands for all."""

    def __init__(self, compared: Compared, length: int, is_whole: bool):
        self.length, self.is_whole, self._ids = length, is_whole, compared.ids
        self.members = np.flatnonzero((compared.length == length) & (compared.is_whole == is_whole))
        starts = compared.start[self.members]
        hash_windows = _whole_hashes if is_whole else _window_hashes
        hashes = hash_windows(self._ids, starts, length)
        unique = np.unique(hashes, return_index=True, return_inverse=True)
        self._hashes, first, self.inverse = unique
        self.windows, self._starts = self.members[first], starts[first]
        bits = min(26, max(16, len(self._hashes).bit_length() + 4))
        self._shift, self._filter = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        self._filter[self._hashes >> self._shift] = True

    def find(
        self, hashes: np.ndarray, rows: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(windows, which of `hashes` they are); `rows`: the ids behind some of the hashes."""
        maybe = np.flatnonzero(self._filter[hashes >> self._shift])
        at = np.minimum(np.searchsorted(self._hashes, hashes[maybe]), len(self._hashes) - 1)
        is_there = self._hashes[at] == hashes[maybe]
        which, at = maybe[is_there], at[is_there]
        is_same = (rows(which) == _rows(self._ids, self._starts[at], self.length)).all(axis=1)
        return self.windows[at[is_same]], which[is_same]


def _found_in(
    shard: Shard, tables: list[_Table], advance: Callable[[int], None]
) -> Iterator[_Found]:
    n_tokens = shard.meta.n_tokens
    lengths = {table.length for table in tables if not table.is_whole}
    for begin in range(0, n_tokens, BLOCK_TOKENS) if lengths else ():
        tokens = shard.tokens(begin, min(begin + BLOCK_TOKENS + max(lengths) - 1, n_tokens))
        hashes = _rolling_hashes(tokens, lengths)
        for table in (table for table in tables if not table.is_whole):
            rows = partial(_rows, tokens, length=table.length)
            windows, places = table.find(hashes[table.length][:BLOCK_TOKENS], rows)
            yield _Found(windows, begin + places, table.length)
        advance(min(BLOCK_TOKENS, n_tokens - begin))
    for table in (table for table in tables if table.is_whole):
        yield from _whole_documents(shard, table)


def _whole_documents(shard: Shard, table: _Table) -> Iterator[_Found]:
    """Documents of the shard that are the same from first token to last, but for an end-of-text."""
    ends, eos = shard.doc_ends.astype(np.int64), shard.meta.tokenizer["eos_id"]
    sizes = np.diff(ends, prepend=0)
    for size in (table.length, table.length + 1):
        starts = (ends - sizes)[sizes == size]
        for cut in range(0, len(starts), BLOCK_DOCUMENTS):
            begins = starts[cut : cut + BLOCK_DOCUMENTS]
            rows = np.stack([shard.tokens(begin, begin + size) for begin in begins.tolist()])
            if size > table.length:
                begins, rows = begins[rows[:, -1] == eos], rows[rows[:, -1] == eos, :-1]
            windows, which = table.find(_hash_rows(rows), rows.__getitem__)
            yield _Found(windows, begins[which], table.length)


class _Trained:
    """How many of the samples that hold some tokens of a shard were trained on, by each run."""

    def __init__(self, shard: Shard, ledgers: list[Ledger]):
        shard_id = shard.meta.shard_id
        self._shard = shard
        self._phases = [
            [
                (p, i)
                for p in ledger.phases
                for i, s in enumerate(p.shards)
                if s.shard_id == shard_id
            ]
            for ledger in ledgers
        ]
        self._samples: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
        self.is_held = any(self._phases)

    def __call__(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """uint8[runs, windows]: NONE, SOME or ALL for the tokens [start, stop) of each window."""
        states = np.zeros((len(self._phases), len(starts)), np.uint8)
        for run, phases in enumerate(self._phases):
            for phase, index in phases:
                key = run, phase.name
                if key not in self._samples:
                    self._samples[key] = samples_in_order(phase, index, self._shard)
                np.maximum(states[run], _state(*self._samples[key], starts, stops), out=states[run])
        return states


def samples_in_order(phase: Phase, index: int, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Where samples of a phase, or their pieces, start in a shard, and which were trained on."""
    seen = phase.seen_samples(index)
    if not phase.packing:
        return np.arange(len(seen)) * phase.seq_len, seen
    bins = bins_of(shard, phase.seq_len)
    order = np.argsort(bins.starts)
    return bins.starts[order], np.repeat(seen, np.diff(bins.first))[order]


def _state(
    sample_starts: np.ndarray, seen: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> np.ndarray:
    first = np.searchsorted(sample_starts, starts, side="right") - 1
    last = np.maximum(
        first, np.searchsorted(sample_starts, stops - 1) - 1
    )  # neighbours share a token
    before = np.r_[0, np.cumsum(seen)]
    n_seen = before[last + 1] - before[first]
    return (n_seen > 0).astype(np.uint8) + (n_seen == last + 1 - first)


# ---------------------------------------------------------------- hashes

_MIX = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)  # splitmix64
_FACTORS = {length: np.uint64(0xD1342543DE82EF95 + 2 * length) for length in (1, 2, 4, 8, 16)}


def _mixed(ids: np.ndarray) -> np.ndarray:
    z = (ids.astype(np.uint64) + np.uint64(1)) * _MIX[0]
    z = (z ^ (z >> np.uint64(30))) * _MIX[1]
    z = (z ^ (z >> np.uint64(27))) * _MIX[2]
    return z ^ (z >> np.uint64(31))


def _rolling_hashes(tokens: np.ndarray, lengths: set[int]) -> dict[int, np.ndarray]:
    """For each length, a multiple of 8: the hash of the window at each token, uint64."""
    powers, hashes = {}, _mixed(tokens)
    for half, factor in _FACTORS.items():
        hashes = hashes[:-half] * factor + hashes[half:]
        powers[2 * half] = hashes
    return {length: _joined(powers, length) for length in lengths}


def _joined(powers: dict[int, np.ndarray], length: int) -> np.ndarray:
    """Hashes of windows of this length from those of its powers of two, the largest first."""
    parts = [power for power in sorted(powers, reverse=True) if length & power]
    assert sum(parts) == length, length
    hashes, stop = powers[parts[0]], parts[0]
    for power in parts[1:]:
        rest = powers[power][stop:]
        hashes, stop = hashes[: len(rest)] * _FACTORS[1] + rest, stop + power
    return hashes


def _window_hashes(ids: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Without a row of ids for each window, which would take much memory."""
    return _rolling_hashes(ids, {length})[length][starts]


def _whole_hashes(ids: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return _hash_rows(_rows(ids, starts, length))


def _hash_rows(rows: np.ndarray) -> np.ndarray:
    """The hash of each row of ids, of whatever width."""
    hashes = np.zeros(len(rows), np.uint64)
    for column in _mixed(rows).T:
        hashes = hashes * _FACTORS[1] + column
    return hashes


def _rows(ids: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return ids[starts[:, None] + np.arange(length)]
