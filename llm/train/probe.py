"""A few fixed rows whose loss is saved with each checkpoint and computed again after loading.

The state hash proves that the weights came back; this proves that they still mean the same: model code, kernels, what the engine
computes with.
"""

import hashlib
import math
import platform

import torch

from llm.batch_plan import BatchPlan
from llm.checkpoint.manifest import Manifest, Probed
from llm.checkpoint.slices import CheckpointError
from llm.config import RunConfig
from llm.data.ledger import Ledger
from llm.data.shards import Shard
from llm.data.stream import Batch, eval_batches, step_digest
from llm.dist import World
from llm.engine import Engine
from llm.log import log
from llm.train.phases import row_cut
from llm.train.starts import device_name
from llm.train.validate import summed

ROWS = 8
# Relative to the loss, where topology, precision or machine differ. fp32: other orders of summing move a loss by some 1e-6, and TF32
# matmuls (11 bits) by some 1e-4. bf16 keeps 8 bits: a logit may be off by 0.4 %, and layers add up to a few times that. A lost
# layer or weights of another model are off by far more than either.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
ACCEPT = "probe"


class Probe:
    """Created and called on every rank."""

    def __init__(self, cfg: RunConfig, plan: BatchPlan, world: World, engine: Engine, shards: list[Shard]):
        self.world, self.engine, self.precision = world, engine, cfg.engine.precision
        # elsewhere kernels may be chosen by timing them
        self.is_exact = world.device == "cpu" and not cfg.engine.compile
        self.batches = world.together(lambda: _batches(shards, cfg, plan, world))
        (digest,) = world.sum_ints([step_digest(self.batches)])
        self.rows = f"{digest % 2**64:016x}"
        self.place = hashlib.sha256(repr(world.gather(_place(cfg, plan, world))).encode()).hexdigest()[:16]

    def loss(self) -> float | None:
        """Mean over the counted targets; None if there are none. Collective, and ZeRO-3 needs every rank to evaluate as often."""
        sums = self.world.together(lambda: [self.engine.evaluate(batch) for batch in self.batches])
        nats, n_targets = summed(self.world, [sum(s for s, _ in sums), sum(n for _, n in sums)])
        return nats / n_targets if n_targets else None

    def taken(self) -> Probed | None:
        """What a checkpoint of the weights as they are now says. Collective."""
        loss = self.loss()
        return Probed(loss=loss, rows=self.rows, place=self.place) if loss is not None and math.isfinite(loss) else None

    def check(self, saved: Manifest, accepted: bool) -> None:
        """Compare with what was saved beside the weights that are loaded now. Collective. Raises CheckpointError on every rank."""
        then = saved.probe
        if then is None or then.rows != self.rows:
            self._tell("The probe batch was not evaluated at this checkpoint, or its data have changed: the loss after loading is not compared.")
            return
        now, is_same_place = self.loss(), then.place == self.place
        precisions = {self.precision, saved.config["engine"]["precision"]}
        tolerance = max(TOLERANCE[p] for p in precisions) * max(1.0, abs(then.loss))
        allowed = 0.0 if is_same_place and self.is_exact else tolerance
        if now is not None and abs(now - then.loss) <= allowed:  # false for nan as well
            self._tell(f"The probe batch has loss {now:.6f}" + (", bit for bit as saved." if now == then.loss else f", saved with {then.loss:.6f}."))
            if is_same_place and now != then.loss and self.world.rank == 0:
                log.warning(f"That is {now - then.loss:.2g} off on the same kind of ranks and hardware: this machine does not repeat its sums.")
            return
        told = (
            f"step {saved.step:,}: the same weights gave a probe loss of {then.loss!r} when they were saved and {now!r} now, "
            f"{f'and {allowed:.2g} is allowed' if allowed else 'where the same bits are due,'} "
            f"on {'the same kind of' if is_same_place else 'other'} ranks or hardware"
        )
        if not accepted:
            raise CheckpointError(
                f"{told}. The model's code, a library or this machine computes something else. Saved with {_words(saved.versions)}. "
                f"Go back to that, or accept it with --accept-change {ACCEPT}."
            )
        if self.world.rank == 0:
            log.warning(f"accepted: {told}.")

    def _tell(self, text: str) -> None:
        if self.world.rank == 0:
            log.info(text)


def probe_shards(train_shards: list[Shard], ledger: Ledger) -> list[Shard]:
    """The shard whose rows are probed: the first, by content, that the run was ever trained on; none if it is not at hand any more."""
    first = ledger.phases[0].shards[0].shard_id
    return [shard for shard in train_shards if shard.meta.shard_id == first]


def _batches(shards: list[Shard], cfg: RunConfig, plan: BatchPlan, world: World) -> list[Batch]:
    if not shards:
        return []
    return list(eval_batches(shards, cfg.model.seq_len, plan.micro_rows, world.rank, world.size, ROWS, **row_cut(cfg)))


def _place(cfg: RunConfig, plan: BatchPlan, world: World) -> list:
    """All that may change the last bits of a loss, beside the weights and the data."""
    engine = cfg.engine.model_dump(mode="json", exclude={"device", "activation_checkpointing"})
    device = device_name(world.device)
    if not world.device.startswith("cuda"):  # CPUs of other kinds choose other kernels, which add in other orders
        device = f"{platform.machine()} {device} {torch.backends.cpu.get_cpu_capability()}"
    return [plan.micro_rows, world.size, engine, cfg.model.attention, device, torch.get_num_threads(), torch.__version__]


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
