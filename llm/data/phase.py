"""A plan to go through shards, and how far it has come. Which samples were seen is computed, never stored.

A phase goes through the samples of its shards in the order of a permutation per epoch. Draw k of a phase, 0 <= k < total, is one
sample; a step takes the next B draws. So `consumed`, one number, says exactly which samples were seen, for any world size.
"""

import bisect
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from pydantic import ConfigDict, NonNegativeInt, PositiveInt

from .packing import bins_of
from .permutation import ALGORITHM, Permutation
from .record import sha256_of
from .shards import Shard

COUNT_DRAWS = 1 << 20
_STRICT = ConfigDict(extra="forbid")


def count_windows(n_tokens: int, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens, seq_len apart, the last one padded: each token but the first is a target exactly once."""
    return -(-(n_tokens - 1) // seq_len)


def count_samples(shard: Shard, seq_len: int, packing: str | None) -> int:
    """Windows of a shard, or bins when it is packed."""
    return len(bins_of(shard, seq_len)) if packing else count_windows(shard.meta.n_tokens, seq_len)


@dataclass(frozen=True)
class PhaseShard:
    """A shard as a phase holds it."""

    shard_id: str
    name: str
    n_tokens: PositiveInt
    n_samples: NonNegativeInt
    unit_ids: tuple[str, ...]
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Share:
    """Neighbouring shards of a phase that are drawn at one rate, in an order of their own."""

    name: str
    weight: PositiveInt
    """Out of the sum of all weights, so many draws are this share's, evenly at every point of the phase."""
    n_shards: PositiveInt
    is_replay: bool
    """The phase lasts until every other share has been passed `epochs` times; a replayed one gives what its weight says until then."""
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Portion:
    """What `Phase.mix` makes a share of."""

    name: str
    weight: int
    shards: list[Shard]
    is_replay: bool = False


@dataclass(frozen=True)
class Skipped:
    """The draws [start, stop): they were consumed by `step`, but its update was not applied."""

    start: NonNegativeInt
    stop: NonNegativeInt
    step: NonNegativeInt
    reason: str
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Phase:
    """A plan to go through `shards` `epochs` times, and how many of its draws are `consumed`."""

    name: str
    seed: int
    epochs: PositiveInt
    seq_len: PositiveInt
    shards: tuple[PhaseShard, ...]
    """Share after share, in each sorted by shard_id, so that names, listing order and world size cannot matter."""
    shares: tuple[Share, ...]
    consumed: NonNegativeInt
    algorithm: str
    first_step: int | None
    """The optimizer step that took the first samples."""
    last_step: int | None
    """The latest one so far."""
    dataset: str
    """The name that the run's config has for these data."""
    skipped: tuple[Skipped, ...]
    """In order of steps."""
    document_mask: bool = False
    """Whether the documents in a sample are kept apart."""
    packing: str | None = None
    """BESTFIT: a sample is a bin of documents. None: a window of the text as it runs."""
    __pydantic_config__ = _STRICT

    @classmethod
    def plan(cls, name: str, seed: int, epochs: int, seq_len: int, shards: list[Shard], dataset: str = "", **cut) -> "Phase":
        """A phase over these shards, all alike, with nothing consumed."""
        return cls.mix(name, seed, epochs, seq_len, [Portion(dataset, 1, shards)], dataset, **cut)

    @classmethod
    def mix(
        cls, name: str, seed: int, epochs: int, seq_len: int, portions: list[Portion], dataset: str = "",
        document_mask: bool = False, packing: str | None = None,
    ) -> "Phase":  # fmt: skip
        """A phase that draws from several sets of shards at rates of their own, with nothing consumed."""
        assert portions and all(p.shards for p in portions) and not all(p.is_replay for p in portions), "a phase without shards has no end"
        rows = []
        for portion in portions:
            for shard in sorted(portion.shards, key=lambda shard: shard.meta.shard_id):
                meta, n_samples = shard.meta, count_samples(shard, seq_len, packing)
                assert meta.role == "train", "validation data is never offered"
                rows.append(PhaseShard(meta.shard_id, meta.name, meta.n_tokens, n_samples, tuple(meta.unit_ids)))
        assert len({row.shard_id for row in rows}) == len(rows), "find_shards gives each shard once"
        shares = tuple(Share(p.name, p.weight, len(p.shards), p.is_replay) for p in portions)
        return cls(name, seed, epochs, seq_len, tuple(rows), shares, 0, ALGORITHM, None, None, dataset, (), document_mask, packing)

    def plan_id(self) -> str:
        """The same as long as the order and the samples are."""
        return sha256_of("phase", asdict(replace(self, consumed=0, first_step=None, last_step=None, skipped=())))

    @cached_property
    def shard_ends(self) -> np.ndarray:
        """Exclusive ends of the shards' samples, int64: sample i of the phase is in the first shard whose end is above i."""
        return np.cumsum([shard.n_samples for shard in self.shards], dtype=np.int64)

    @cached_property
    def share_bounds(self) -> list[tuple[int, int]]:
        """The samples [start, stop) of each share."""
        ends = [0, *self.shard_ends[np.cumsum([share.n_shards for share in self.shares]) - 1].tolist()]
        return list(zip(ends, ends[1:], strict=False))

    @property
    def samples(self) -> int:
        """Different ones."""
        return int(self.shard_ends[-1])

    @cached_property
    def total(self) -> int:
        """Draws until every share that is not replayed has been passed `epochs` times."""
        sizes = [stop - start for start, stop in self.share_bounds]
        weights = [share.weight for share in self.shares]
        if not all(sizes):
            return 0
        most = max((self.epochs * n + len(sizes)) * sum(weights) // w + 1 for n, w in zip(sizes, weights, strict=True))
        return bisect.bisect_left(range(most), self.epochs, key=self.passes)

    def passes(self, draws: int) -> int:
        """How many epochs are over after so many draws: what the slowest share has, replayed ones left out."""
        shares = zip(self.shares, self.share_bounds, self.share_counts(draws).tolist(), strict=True)
        return min(drawn // (stop - start) for share, (start, stop), drawn in shares if not share.is_replay)

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that no text fills; where long documents are packed in pieces, at most so much."""
        return 1 - sum(shard.n_tokens for shard in self.shards) / max(1, self.samples * (self.seq_len + 1))

    @property
    def is_done(self) -> bool:
        return self.consumed >= self.total

    def order(self, epoch: int, share: int = 0) -> Permutation:
        """From a place in an epoch of a share to the sample, counted from the share's first, that it takes."""
        start, stop = self.share_bounds[share]
        name = self.name if share == 0 else f"{self.name}/{share}"
        return Permutation(stop - start, self.seed, name, epoch)

    def share_counts(self, draws: int | np.ndarray) -> np.ndarray:
        """How many of the first `draws` draws are each share's, int64[n_shares, ...]. Exact for weights whose sum is up to 1e7.

        One draw more is one more for exactly one share, and each is within one or two of its weight's part all the time
        (the recursion of google/grain's mixtures, in integers).
        """
        left, rates, counts = np.asarray(draws, np.int64), sum(share.weight for share in self.shares), []
        for share in self.shares:
            rest = left * (rates - share.weight) // rates
            counts.append(left - rest)
            left, rates = rest, rates - share.weight
        return np.stack(counts)

    def samples_at(self, draws: np.ndarray) -> np.ndarray:
        """The sample of each draw, int64."""
        keys = self.share_counts(draws)
        share_of = np.argmax(self.share_counts(draws + 1) > keys, axis=0)
        samples = np.empty_like(draws)
        for share in np.unique(share_of).tolist():
            here = share_of == share
            samples[here] = self._samples_of_share(share, keys[share][here])
        return samples

    def _samples_of_share(self, share: int, keys: np.ndarray) -> np.ndarray:
        """The samples of the share's own draws."""
        start, stop = self.share_bounds[share]
        epochs, places = np.divmod(keys, stop - start)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():  # one, or two where a step goes over the end of an epoch
            here = epochs == epoch
            samples[here] = start + self.order(epoch, share)(places[here])
        return samples

    def draw_counts(self, start: int, stop: int) -> np.ndarray:
        """How many of the draws [start, stop) fall into each shard: exact, int64[n_shards]. 1e9 draws take a minute or two."""
        counts = np.zeros(len(self.shards), np.int64)
        for share, (first, last) in enumerate(zip(self.share_counts(start).tolist(), self.share_counts(stop).tolist(), strict=True)):
            counts += self._key_counts(share, first, last)
        return counts

    def _key_counts(self, share: int, start: int, stop: int) -> np.ndarray:
        low, high = self.share_bounds[share]
        n = high - low
        first, last = -(-start // n), stop // n
        if first < last:  # whole epochs take every sample: only what lies before and after needs counting
            around = self._key_counts(share, start, first * n) + self._key_counts(share, last * n, stop)
            return around + (last - first) * np.diff(np.clip(self.shard_ends, low, high), prepend=low)
        counts = np.zeros(len(self.shards), np.int64)
        for at in range(start, stop, COUNT_DRAWS):
            samples = self._samples_of_share(share, np.arange(at, min(at + COUNT_DRAWS, stop)))
            counts += np.bincount(np.searchsorted(self.shard_ends, samples, side="right"), minlength=len(counts))
        return counts

    def seen_samples(self, shard_index: int) -> np.ndarray:
        """Which samples of one shard were consumed at least once, bool[n_samples]: asks the inverse, so costs the shard only."""
        stop = int(self.shard_ends[shard_index])
        samples = np.arange(stop - self.shards[shard_index].n_samples, stop)
        share = next(index for index, (_, end) in enumerate(self.share_bounds) if stop <= end)
        start, end = self.share_bounds[share]
        drawn = int(self.share_counts(self.consumed)[share])
        if drawn >= end - start:
            return np.ones(len(samples), bool)
        return self.order(0, share).inverse(samples - start) < drawn
