"""How long one optimizer step takes on many devices: a model, held against published rows by benchmarks/scaling.py.

Rings: a reduce-scatter or an all-gather of B bytes among n devices takes latency x log2(n) + (n-1)/n x B / (0.8 x bandwidth), an all-reduce
twice that. What of it hides behind computing depends on the ZeRO stage and on when DeepSpeed 0.19.8 or DDP starts it.
"""

import math
from dataclasses import dataclass

from llm.plan.hardware import Device

LINK_EFFICIENCY = 0.8
LATENCY_S, NETWORK_LATENCY_S = 20e-6, 60e-6  # of one hop in a machine, and between machines
HIDDEN = 0.9  # of the time in which something could hide, this part is used
BACKWARD = 2 / 3  # of a micro-batch
OPTIMIZER_BYTES, ZERO_OPTIMIZER_BYTES = 30, 56  # read and written for each parameter, by fused AdamW alone and with DeepSpeed's copies and norm
HOST_ADAM_BYTES_PER_S, PCIE_BYTES_PER_S = 40e9, 20e9  # offload; assumed
HOOK_S = 0.15e-3  # DeepSpeed's hooks: host time for each parameter tensor in a backward pass
LAUNCH_S = 0.1e-3  # host time to launch what belongs to one parameter tensor, forward and backward; assumed. Small models go no faster
# Ranks wait for the slowest. A fit to MosaicML's rows of 1.3B on H100 at one micro-batch a step: seconds for each doubling beyond one machine
# of 8, and for each beyond 256. What those runs did not hide of their own traffic is in it.
JITTER_S, JITTER_S_BEYOND_256 = 0.017, 0.039


@dataclass(frozen=True)
class Cluster:
    device: Device
    ranks: int
    per_node: int = 8

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go into."""

    compute: float
    optimizer: float
    exposed: float
    """Communication that nothing hides."""
    jitter: float
    travelling: float
    """All communication, hidden or not; no part of the sum."""

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.exposed + self.jitter

    @property
    def communication_share(self) -> float:
        return self.exposed / self.total


def ring_seconds(n_bytes: float, cluster: Cluster) -> float:
    """One reduce-scatter or all-gather of so many bytes among all ranks."""
    n = cluster.ranks
    if n == 1:
        return 0.0
    device, across = cluster.device, cluster.nodes > 1
    bandwidth = min(device.node_link, device.network) if across else device.node_link
    latency = NETWORK_LATENCY_S if across else LATENCY_S
    return latency * math.log2(n) + (n - 1) / n * n_bytes / (LINK_EFFICIENCY * bandwidth)


def exposed_seconds(
    stage: int, params: int, accumulation: int, micro_s: float, cluster: Cluster, *, weight_bytes: int = 4, gradient_bytes: int = 4, overlap: bool
) -> tuple[float, float]:
    """(what of a step's communication is not hidden, all of it), in seconds.

    DDP and ZeRO-1 reduce once, behind the last backward pass; ZeRO-2 in each one; ZeRO-3 gathers the weights twice a micro-batch as well. DeepSpeed
    reduces by all-reduce in stages 1 and 2. Nothing hides the gathering of the new weights in stages 1 and 2. Weights and gradients
    travel in 4 bytes, as here, or in 2, as where both are bf16.
    """
    one_way, gather = ring_seconds(gradient_bytes * params, cluster), ring_seconds(weight_bytes * params, cluster)
    if stage == 3:
        total = accumulation * (one_way + 2 * gather)
        return total - HIDDEN * min(total, accumulation * micro_s), total
    reductions, reduce = (accumulation if stage == 2 else 1), 2 * one_way
    room = HIDDEN * BACKWARD * micro_s if overlap else 0.0
    last_gather = gather if stage else 0.0
    return reductions * (reduce - min(reduce, room)) + last_gather, reductions * reduce + last_gather


def jitter_seconds(cluster: Cluster) -> float:
    """What waiting for the slowest rank adds, beyond one machine of 8."""
    doublings = max(0.0, math.log2(cluster.ranks / 8))
    within = min(doublings, math.log2(256 / 8))
    return JITTER_S * within + JITTER_S_BEYOND_256 * (doublings - within)


def optimizer_seconds(stage: int, params: int, cluster: Cluster, offload: bool = False) -> float:
    shards = cluster.ranks if stage else 1
    if offload:  # gradients to the host, weights back
        return params / shards * (OPTIMIZER_BYTES / HOST_ADAM_BYTES_PER_S + 8 / PCIE_BYTES_PER_S)
    return params / shards * (ZERO_OPTIMIZER_BYTES if stage else OPTIMIZER_BYTES) / cluster.device.hbm


def step_time(
    stage: int, params: int, flops: float, accumulation: int, mfu: float, cluster: Cluster, *, tensors: int = 0, offload: bool = False, **bytes_of
) -> StepTime:
    """`flops`: of one micro-batch on one rank. `tensors`: of parameters, each of which costs the host time."""
    on_gpu = cluster.device.kind == "cuda"
    micro_s = flops / (cluster.device.flops * mfu)
    if on_gpu:
        micro_s = max(micro_s, tensors * (HOOK_S / BACKWARD if stage else LAUNCH_S))
    overlap = stage == 0 or on_gpu
    exposed, travelling = exposed_seconds(stage, params, accumulation, micro_s, cluster, overlap=overlap, **bytes_of)
    jitter = jitter_seconds(cluster) if on_gpu else 0.0
    return StepTime(accumulation * micro_s, optimizer_seconds(stage, params, cluster, offload), exposed, jitter, travelling)
