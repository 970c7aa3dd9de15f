"""Batches of a step as tensors, and the proof of what was fed. A step is the draws [g, g + B) of a phase, whoever takes them."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .sampler import Sampler, Windows
from .shards import Shard

NOT_COUNTED = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch. B rows, T tokens a row."""

    tokens_BT: torch.Tensor
    """int64"""
    targets_BT: torch.Tensor
    """int64: the next token, or -100 where it does not count."""
    doc_ids_BT: torch.Tensor | None
    """int64: tokens see only those of the same row and number; None: all of the row."""
    samples: np.ndarray
    """int64[B]: the draw that each row is; -1 for a row of padding."""
    n_tokens: int = 0
    """Of the B x T inputs those that are text and no padding, whether or not their targets count."""


def deal(start: int, stop: int, rank: int, world_size: int, rows: int, n_micro_batches: int) -> np.ndarray:
    """int64[micro-batch, row]: the numbers of [start, stop) that this rank takes, -1 past the end.

    Number start + (m * world_size + rank) * rows + s goes to micro-batch m, row s: another world size or number of rows only
    cuts the same window otherwise.
    """
    m, s = np.arange(n_micro_batches)[:, None], np.arange(rows)[None, :]
    numbers = start + (m * world_size + rank) * rows + s
    return np.where(numbers < stop, numbers, -1)


def micro_batches(sampler: Sampler, g: int, batch_rows: int, rank: int, world_size: int, rows: int) -> list[Batch]:
    """This rank's part of the step that takes the draws [g, g + batch_rows), cut at the end of the phase and padded there."""
    n_micro_batches, rest = divmod(batch_rows, world_size * rows)
    assert rest == 0 and n_micro_batches > 0, f"{batch_rows} rows cannot be dealt to {world_size} ranks by {rows}"
    assert 0 <= g < sampler.phase.total, (g, sampler.phase.total)
    draws = deal(g, min(g + batch_rows, sampler.phase.total), rank, world_size, rows, n_micro_batches)
    numbers = sampler.numbers(draws.ravel())
    ids, counted, lengths = sampler.windows.rows_and_lengths(numbers)
    doc_ids = sampler.windows.doc_ids(numbers)
    batches = []
    for m, at in enumerate(range(0, len(ids), rows)):
        cut = slice(at, at + rows)
        documents = None if doc_ids is None else doc_ids[cut]
        batches.append(_batch(ids[cut], counted[cut], lengths[cut], documents, draws[m]))
    return batches


def _batch(
    ids: np.ndarray, counted: np.ndarray, lengths: list[int], doc_ids: np.ndarray | None, samples: np.ndarray
) -> Batch:
    targets = ids[:, 1:].copy()
    if not counted.all():
        targets[~counted] = NOT_COUNTED
    documents = None if doc_ids is None else torch.from_numpy(doc_ids)
    tokens = torch.from_numpy(np.ascontiguousarray(ids[:, :-1]))
    return Batch(tokens, torch.from_numpy(targets), documents, samples, sum(lengths))


class Stream:
    """The steps of a phase for one rank; the step after the one asked for is made ready in a thread.

    It has no position: any `g` may be asked for at any time, and what was made ready in vain is dropped.
    """

    def __init__(self, sampler: Sampler, batch_rows: int, rank: int, world_size: int, rows: int):
        self._sampler, self.batch_rows, self._rank, self._world_size = sampler, batch_rows, rank, world_size
        self.rows = rows
        """Of a micro-batch; another number cuts the steps that are asked for from then on."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ready: tuple[tuple[int, int], Future] | None = None

    def step(self, g: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins at draw g."""
        ready, future = self._ready or (None, None)
        self._ready = None
        batches = future.result() if ready == (g, self.rows) else self._make(g, self.rows)
        following = (g + self.batch_rows, self.rows)
        self._ready = (following, self._thread.submit(self._make, *following)) if following[0] < self._sampler.phase.total else None
        return batches

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, g: int, rows: int) -> list[Batch]:
        return micro_batches(self._sampler, g, self.batch_rows, self._rank, self._world_size, rows)


def eval_batches(
    shards: list[Shard], seq_len: int, rows: int, rank: int, world_size: int, max_rows: int | None = None,
    document_mask: bool = False, packing: str | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Unshuffled windows of the shards, dealt over the ranks, as many batches on each; the same ones every time.

    With `max_rows`, that many windows spread evenly over all. Whole windows and tails alike; rows past the end are padding.
    """
    windows = Windows(sorted(shards, key=lambda shard: shard.meta.shard_id), seq_len, document_mask, packing)
    n_rows = min(len(windows), max_rows or len(windows))
    n_batches = -(-n_rows // (rows * world_size))
    for places in deal(0, n_rows, rank, world_size, rows, n_batches):
        samples = np.where(places >= 0, places * len(windows) // n_rows, -1)
        yield _batch(*windows.rows_and_lengths(samples), windows.doc_ids(samples), samples)


def count_targets(batches: list[Batch]) -> int:
    """How many targets of these batches count: over all ranks, the denominator of the step's loss."""
    return sum(int((batch.targets_BT != NOT_COUNTED).sum()) for batch in batches)


def count_tokens(batches: list[Batch]) -> int:
    """How many tokens of text these batches hold, those of prompts too; padding is none."""
    return sum(batch.n_tokens for batch in batches)


def step_digest(batches: list[Batch]) -> int:
    """A hash of what these batches feed, as a signed 64-bit number. Sums of it over ranks (wrapping) are the digest of the step:

    the same however the step is cut into rows, micro-batches and ranks, and blind to padding rows.
    """
    total = 0
    for batch in batches:
        rows = zip(batch.samples.tolist(), batch.tokens_BT.numpy(), batch.targets_BT.numpy(), strict=True)
        total += sum(_row_hash(draw, ids, targets) for draw, ids, targets in rows if draw >= 0)
    return (total + 2**63) % 2**64 - 2**63


def _row_hash(draw: int, ids: np.ndarray, targets: np.ndarray) -> int:
    hasher = hashlib.blake2b(draw.to_bytes(8, "little"), digest_size=8)
    hasher.update(ids.astype("<i4"))
    hasher.update(targets.astype("<i4"))
    return int.from_bytes(hasher.digest(), "little")


def chain(previous_hex: str, digest: int) -> str:
    """The digest chain after one more step: equal chains mean that the same data were fed in the same steps."""
    return hashlib.sha256(bytes.fromhex(previous_hex) + (digest % 2**64).to_bytes(8, "little")).hexdigest()
