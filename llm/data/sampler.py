"""From draw numbers to rows of token ids. Nothing here remembers anything: a row is a function of the plan and its number."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np

from .packing import bins_of
from .phase import Phase, count_samples
from .record import ShardError
from .shards import Shard

BLOCK_DRAWS = 1 << 10  # to compute the order of so many draws costs about as much as that of one


class Windows:
    """All windows of seq_len + 1 tokens of some shards, numbered in the order given.

    Neighbours share one token, so each token but a shard's first is a target exactly once; the last window is padded. With `document_mask`
    documents are apart: their first tokens are no targets. With `packing` a window is a bin of whole documents.
    """

    def __init__(self, shards: list[Shard], seq_len: int, document_mask: bool = False, packing: str | None = None):
        assert shards
        assert document_mask or not packing, "documents packed side by side have nothing to do with each other"
        self.shards, self.seq_len, self.document_mask, self.packing = shards, seq_len, document_mask, packing
        self.pad_id = shards[0].meta.tokenizer["pad_id"]
        sizes = np.array([count_samples(shard, seq_len, packing) for shard in shards], np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids int64[R, L+1] and counted bool[R, L] (which targets carry loss) of these windows; -1 gives a row of padding."""
        ids, counted, _ = self.rows_and_lengths(numbers)
        return ids, counted

    def rows_and_lengths(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """As `rows`, and for each row how many of its L input tokens are text and no padding."""
        lengths = [0] * len(numbers)
        ids = np.empty((len(numbers), self.seq_len + 1), np.int64)
        counted = np.ones((len(numbers), self.seq_len), bool)
        ids[numbers < 0], counted[numbers < 0] = self.pad_id, False
        for row, shard, pieces in self._pieces_of_rows(numbers):
            end = 0
            for start, stop in pieces:
                at, end = end, end + stop - start
                shard.read(start, stop, ids[row, at:end])
                if end - at > 1 and (mask := shard.loss_mask(start + 1, stop)) is not None:
                    counted[row, at : end - 1] = mask
                counted[row, end - 1 : end] = False  # the first token of what follows is predicted from nothing
            ids[row, end:], counted[row, end - 1 :] = self.pad_id, False
            lengths[row] = min(end, self.seq_len)
        return ids, counted, lengths

    def doc_ids(self, numbers: np.ndarray) -> np.ndarray | None:
        """Which document of its row each input token of these windows is in, int64[R, L], padding in one of its own; None without
        document_mask, when all may see all before them.
        """
        if not self.document_mask:
            return None
        found = np.zeros((len(numbers), self.seq_len), np.int64)
        for row, _, pieces in self._pieces_of_rows(numbers):
            ends = np.cumsum([stop - start for start, stop in pieces])
            found[row] = np.searchsorted(ends, np.arange(self.seq_len), side="right")
        return found

    def _pieces_of_rows(self, numbers: np.ndarray) -> Iterator[tuple[int, Shard, list[tuple[int, int]]]]:
        """(row, shard, its [start, stop) of tokens) of each number that is not -1."""
        shard_of = np.searchsorted(self._ends, numbers, side="right")
        for row in np.flatnonzero(numbers >= 0).tolist():
            index = int(shard_of[row])
            yield row, self.shards[index], self.pieces(index, int(numbers[row] - self._starts[index]))

    def pieces(self, shard_index: int, number: int) -> list[tuple[int, int]]:
        """[start, stop) of the shard's tokens that make up its window of this number: a document each, where documents are apart."""
        shard = self.shards[shard_index]
        if self.packing:
            return bins_of(shard, self.seq_len).pieces(number)
        start = number * self.seq_len
        stop = min(start + self.seq_len + 1, shard.meta.n_tokens)
        assert start + 2 <= stop, (shard.meta.name, start, stop)  # a window has at least one token after its first
        if not self.document_mask:
            return [(start, stop)]
        ends = shard.doc_ends.view(np.int64)  # as they are, they would all be converted for each search
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return list(pairwise([start, *ends[first:last].tolist(), stop]))


class Sampler:
    """The rows of a phase by draw number. Memory is a few numbers per shard, whatever the number of samples."""

    def __init__(self, phase: Phase, shards: list[Shard]):
        by_id = {shard.meta.shard_id: shard for shard in shards}
        for planned in phase.shards:
            if planned.shard_id not in by_id:
                raise ShardError(
                    f"shard {planned.name} ({planned.shard_id[:16]}), which phase {phase.name} trains on, is not "
                    f"among the data given. Restore its files, under any name, where data_path points."
                )
        self.phase = phase
        planned_shards = [by_id[planned.shard_id] for planned in phase.shards]
        self.windows = Windows(planned_shards, phase.seq_len, phase.document_mask, phase.packing)
        assert len(self.windows) == phase.samples, (len(self.windows), phase.samples)
        self._block = lru_cache(maxsize=64)(self._samples_of_block)

    def rows(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids int64[R, L+1] and counted bool[R, L] of these draws; -1 gives a row of padding."""
        return self.windows.rows(self.numbers(draws))

    def numbers(self, draws: np.ndarray) -> np.ndarray:
        """Which of the windows these draws take, int64; -1 where a draw is -1."""
        numbers = np.full_like(draws, -1)
        real = draws >= 0
        if real.any():
            first, last = (int(end) // BLOCK_DRAWS for end in (draws[real].min(), draws.max()))
            samples = np.concatenate([self._block(block) for block in range(first, last + 1)])
            numbers[real] = samples[draws[real] - first * BLOCK_DRAWS]
        return numbers

    def _samples_of_block(self, block: int) -> np.ndarray:
        return self.phase.samples_at(np.arange(block * BLOCK_DRAWS, (block + 1) * BLOCK_DRAWS))
