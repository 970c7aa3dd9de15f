"""How one optimizer step is cut into micro-batches on ranks: the only place where rows, ranks and accumulation are divided."""

from dataclasses import dataclass

from llm.config import ConfigError, RunConfig

AUTO_TOKENS = 65_536  # batch_size: auto looks at no larger micro-batches: they gain nothing more


@dataclass(frozen=True)
class BatchPlan:
    """global_rows = micro_rows x ranks x accumulation."""

    global_rows: int
    micro_rows: int
    ranks: int
    seq_len: int

    @property
    def accumulation(self) -> int:
        return self.rank_rows // self.micro_rows

    @property
    def tokens(self) -> int:
        return self.global_rows * self.seq_len

    @property
    def rank_rows(self) -> int:
        return self.global_rows // self.ranks

    def __str__(self) -> str:
        return (
            f"{self.global_rows} rows = {self.micro_rows} per micro-batch x {self.ranks} ranks x {self.accumulation} accumulated, "
            f"{self.tokens:,} tokens a step"
        )


def batch_plan(cfg: RunConfig, ranks: int, run_rows: int | None = None) -> BatchPlan:
    """Cut the global batch for `ranks`. `run_rows` is the global batch that an earlier sitting of the run used: it stays."""
    train, seq_len = cfg.train, cfg.model.seq_len
    rows, reason = run_rows, "the run's checkpoint"
    if train.batch_tokens:
        rows, reason = train.batch_tokens // seq_len, f"train.batch_tokens {train.batch_tokens:,}"
        if train.batch_tokens % seq_len:
            raise ConfigError(f"train.batch_tokens {train.batch_tokens:,} is not a multiple of model.seq_len {seq_len:,}.")
    if train.batch_size == "auto":
        return _largest_cut(rows, ranks, seq_len)
    if rows is None:
        rows, reason = train.batch_size * ranks * (train.grad_accum or 1), "batch_size x ranks x grad_accum"
    if rows % (train.batch_size * ranks):
        fits = [b for b in range(1, rows + 1) if rows % (b * ranks) == 0]
        advice = f"train.batch_size can be {', '.join(map(str, fits))}" if fits else f"use a number of ranks that divides {rows}"
        raise ConfigError(
            f"A global batch of {rows} rows ({reason}) cannot be cut into micro-batches of train.batch_size {train.batch_size} rows on "
            f"{ranks} ranks: {train.batch_size} x {ranks} = {train.batch_size * ranks} does not divide {rows}. With {ranks} ranks {advice}."
        )
    return BatchPlan(rows, train.batch_size, ranks, seq_len)


def _largest_cut(rows: int | None, ranks: int, seq_len: int) -> BatchPlan:
    """Micro-batches of as many rows as are ever worth it."""
    if rows is None or rows % ranks:
        raise ConfigError(f"train.batch_size: auto needs train.batch_tokens, in rows of {seq_len:,} tokens that divide among {ranks} ranks.")
    return BatchPlan(rows, _part(rows // ranks, max(1, AUTO_TOKENS // seq_len)), ranks, seq_len)


def smaller_rows(rank_rows: int, rows: int) -> int:
    """The largest part of `rank_rows` that is at most half of `rows`."""
    return _part(rank_rows, max(1, rows // 2))


def _part(rank_rows: int, most: int) -> int:
    """The largest divisor of `rank_rows` up to `most`."""
    return next(n for n in range(min(most, rank_rows), 0, -1) if rank_rows % n == 0)
