"""Every way to cut a run over ranks, with its memory and the time of its step; and which of them to take."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

from llm.batch_plan import BatchPlan, batch_plan, smaller_rows
from llm.config import ConfigError, RunConfig
from llm.model.flops import count_params, flops_per_token
from llm.plan.hardware import NAMES, find_device, shared_by
from llm.plan.memory import Memory, memory_of
from llm.plan.scaling import Cluster, StepTime, step_time

MORE_RANKS = [2**k for k in range(1, 11)]
AS_FAST = 1.02  # the model of time is not better than that


@dataclass(frozen=True, eq=False)
class Candidate:
    """A config whose batch is cut for a cluster."""

    cfg: RunConfig
    cluster: Cluster
    plan: BatchPlan
    mfu: float

    @cached_property
    def memory(self) -> Memory:
        return memory_of(self.cfg, self.cluster.ranks, self.cluster.device.kind)

    @cached_property
    def time(self) -> StepTime:
        engine, tokens = self.cfg.engine, self.plan.micro_rows * self.plan.seq_len
        return step_time(
            engine.zero_stage, count_params(self.cfg.model), tokens * step_flops_per_token(self.cfg), self.plan.accumulation, self.mfu,
            self.cluster, tensors=tensor_count(self.cfg), offload=engine.offload,
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.device.usable

    @property
    def tokens_per_s(self) -> float:
        return self.plan.tokens / self.time.total

    @property
    def row(self) -> tuple[int, bool]:
        """What is told apart on the screen: stage, offload."""
        return self.cfg.engine.zero_stage, self.cfg.engine.offload

    @property
    def again(self) -> int:
        """Blocks that are computed again in the backward pass."""
        return len(self.cfg.engine.recomputed_blocks(self.cfg.model.n_layers))

    @property
    def share(self) -> str:
        """engine.activation_checkpointing as it is written down: rounded, but not so far that it would be another number of blocks."""
        return f"{round(self.again / self.cfg.model.n_layers, 3):g}"


def step_flops_per_token(cfg: RunConfig) -> float:
    """FLOPs of a training step for one token, with the second forward pass of the blocks that do not keep their activations."""
    flops = flops_per_token(cfg.model)
    blocks = flops - 6 * cfg.model.vocab_size * cfg.model.d_model
    return flops + blocks / 3 * len(cfg.engine.recomputed_blocks(cfg.model.n_layers)) / cfg.model.n_layers


def tensor_count(cfg: RunConfig) -> int:
    """Parameter tensors of the model, roughly: four maps and the norms of each block, twice as many with biases."""
    m = cfg.model
    per_block = 4 + (1 if m.parallel_blocks else 2) + (2 if m.qk_norm else 0)
    return m.n_layers * per_block * (2 if m.bias else 1) + 3


def cluster_of(gpu: str, ranks: int, per_node: int, network: float | None = None) -> Cluster:
    """`ranks` devices of this name. `network`: bytes a second between machines, instead of the table's."""
    device = shared_by(find_device(gpu), min(ranks, per_node))
    if network:
        device = type(device)(**{**device.__dict__, "network": network})
    return Cluster(device, ranks, per_node)


def global_rows(cfg: RunConfig, ranks: int) -> int:
    """Rows of an optimizer step. Raises ConfigError where so many ranks cannot share them."""
    one_row = cfg.train.model_copy(update={"batch_size": 1}) if cfg.train.batch_tokens else cfg.train
    return batch_plan(cfg.model_copy(update={"train": one_row}), ranks).global_rows


def candidates(cfg: RunConfig, cluster: Cluster, mfu: float, offload: bool | None = None) -> list[Candidate]:
    """All stages and micro-batches that divide the global batch, with as little activation checkpointing as fits and with the config's own; with
    `offload` instead of the config's."""
    rows, offload = global_rows(cfg, cluster.ranks), cfg.engine.offload if offload is None else offload
    stages = [s for s in range(4) if (s or not offload) and (cluster.ranks > 1 or offload or s in (0, cfg.engine.zero_stage))]
    each, n_layers = rows // cluster.ranks, cfg.model.n_layers
    own, found = len(cfg.engine.recomputed_blocks(n_layers)), []
    for stage, micro_rows in product(stages, (n for n in range(1, each + 1) if each % n == 0)):
        cut = partial(candidate, cfg, cluster, mfu, rows, micro_rows, zero_stage=stage, offload=offload)
        # each block more takes less memory, but for the last
        needed = bisect_left(range(n_layers), True, key=lambda blocks, cut=cut: cut(activation_checkpointing=blocks / n_layers).fits)
        found += [cut(activation_checkpointing=blocks / n_layers) for blocks in sorted({needed, own})]
    return found


def candidate(cfg: RunConfig, cluster: Cluster, mfu: float, rows: int, micro_rows: int, **engine) -> Candidate:
    train = cfg.train.model_copy(update={"batch_size": micro_rows, "batch_tokens": rows * cfg.model.seq_len, "grad_accum": None})
    cut = cfg.model_copy(update={"train": train, "engine": cfg.engine.model_copy(update=engine)})
    return Candidate(cut, cluster, batch_plan(cut, cluster.ranks), mfu)


def as_configured(cfg: RunConfig, found: list[Candidate]) -> Candidate | None:
    """The config as it is, among the candidates, with train.batch_size: auto as training would settle it if the plan is right; None where its
    micro-batch does not divide what the ranks share, or where training could not try sizes out."""
    row, rows = (cfg.engine.zero_stage, cfg.engine.offload), cfg.train.batch_size
    again = len(cfg.engine.recomputed_blocks(cfg.model.n_layers))
    of_rows = {c.plan.micro_rows: c for c in found if (c.row, c.again) == (row, again)}
    if rows == "auto" and of_rows:
        plan = batch_plan(cfg, found[0].cluster.ranks)
        rows = None if cfg.engine.zero_stage == 3 else plan.micro_rows
        while rows and rows > 1 and not of_rows[rows].fits:
            rows = smaller_rows(plan.rank_rows, rows)
    return of_rows.get(rows)


def best_of_each_row(found: list[Candidate]) -> list[Candidate]:
    """Of each stage the fastest that fits, or the smallest where none does."""
    rows = {c.row: [d for d in found if d.row == c.row] for c in found}
    return [fastest(of_row) or min(of_row, key=lambda c: c.memory.total) for of_row in rows.values()]


def fastest(found: list[Candidate], configured: Candidate | None = None) -> Candidate | None:
    """The one to take: it fits, and of those that are as fast within what the model can tell apart `configured`, else the plainest
    with its largest micro-batch. None: nothing fits."""
    fitting = [c for c in found if c.fits]
    if not fitting:
        return None
    limit = AS_FAST * min(c.time.total for c in fitting)
    if configured in fitting and configured.time.total <= limit:
        return configured
    return min((c for c in fitting if c.time.total <= limit), key=lambda c: (c.row, c.again, -c.plan.micro_rows))


def what_would_fit(cfg: RunConfig, cluster: Cluster, mfu: float) -> Iterator[str]:
    """Ways out when nothing fits: more of these devices, the same number of others, or the optimizer in host memory."""
    name, ranks = cluster.device.name, cluster.ranks
    ways = [(f"--gpus {n} --gpu {name}", name, n, None) for n in MORE_RANKS if n > ranks and name != "cpu"]
    ways.append((f"engine.offload=true with {ranks} x {name}", name, ranks, True))
    ways += [(f"--gpus {ranks} --gpu {other}", other, ranks, None) for other in NAMES if other not in (name, "cpu")]
    told = set()
    for text, gpu, n, offload in ways:
        group = "more" if gpu == name and n > ranks else text
        if group in told:
            continue
        try:
            found = fastest(candidates(cfg, cluster_of(gpu, n, cluster.per_node), mfu, offload))
        except ConfigError:
            continue
        if found:
            told.add(group)
            again = f", engine.activation_checkpointing={found.share}" if found.again else ""
            host = f", and {found.memory.host * min(n, cluster.per_node) / 2**30:,.0f} GiB of host memory a machine" if offload else ""
            yield f"{text}: ZeRO-{found.row[0]}{again}, train.batch_size={found.plan.micro_rows}{host}"
