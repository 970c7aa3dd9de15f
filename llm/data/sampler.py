"""From draw numbers to rows of token ids. Nothing here remembers anything: a row is a function of the plan and its number."""

from functools import lru_cache

import numpy as np

from .phase import Phase, count_samples
from .record import ShardError
from .shards import Shard

BLOCK_DRAWS = 1 << 10  # to compute the order of so many draws costs about as much as that of one


class Windows:
    """All windows of seq_len + 1 tokens of some shards, numbered in the order given.

    Neighbours share one token, so each token but a shard's first is a target exactly once; the last window is padded.
    """

    def __init__(self, shards: list[Shard], seq_len: int):
        assert shards
        self.shards, self.seq_len = shards, seq_len
        self.pad_id = shards[0].meta.tokenizer["pad_id"]
        sizes = np.array([count_samples(shard.meta.n_tokens, seq_len) for shard in shards], np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids int64[R, L+1] and counted bool[R, L] (which targets carry loss) of these windows; -1 gives a row of padding."""
        ids = np.empty((len(numbers), self.seq_len + 1), np.int64)
        counted = np.ones((len(numbers), self.seq_len), bool)
        ids[numbers < 0], counted[numbers < 0] = self.pad_id, False
        shard_of = np.searchsorted(self._ends, numbers, side="right")
        starts = (numbers - self._starts[shard_of]) * self.seq_len
        for row in np.flatnonzero(numbers >= 0).tolist():
            self._fill(ids[row], counted[row], self.shards[shard_of[row]], int(starts[row]))
        return ids, counted

    def _fill(self, ids: np.ndarray, counted: np.ndarray, shard: Shard, start: int) -> None:
        stop = min(start + self.seq_len + 1, shard.meta.n_tokens)
        assert start + 2 <= stop, (shard.meta.name, start, stop)  # a window has at least one target
        n_tokens = stop - start
        shard.read(start, stop, ids[:n_tokens])
        ids[n_tokens:], counted[n_tokens - 1 :] = self.pad_id, False
        if (mask := shard.loss_mask(start + 1, stop)) is not None:
            counted[: n_tokens - 1] = mask


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
        self.windows = Windows([by_id[planned.shard_id] for planned in phase.shards], phase.seq_len)
        assert len(self.windows) == phase.samples, (len(self.windows), phase.samples)
        self._block = lru_cache(maxsize=64)(self._samples_of_block)

    def rows(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids int64[R, L+1] and counted bool[R, L] of these draws; -1 gives a row of padding."""
        numbers = np.full_like(draws, -1)
        real = draws >= 0
        if real.any():
            first, last = (int(end) // BLOCK_DRAWS for end in (draws[real].min(), draws.max()))
            samples = np.concatenate([self._block(block) for block in range(first, last + 1)])
            numbers[real] = samples[draws[real] - first * BLOCK_DRAWS]
        return self.windows.rows(numbers)

    def _samples_of_block(self, block: int) -> np.ndarray:
        return self.phase.samples_at(np.arange(block * BLOCK_DRAWS, (block + 1) * BLOCK_DRAWS))
