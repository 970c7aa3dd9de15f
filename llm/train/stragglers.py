"""Which rank keeps the others waiting? Wall clocks cannot tell, for in data parallel all ranks take as long as the slowest."""

import socket
from statistics import median_low

from llm.dist import World
from llm.log import log
from llm.train.metrics import Metrics

SLOW = 1.3  # times the median of all ranks
DATA_SHARE = 0.1  # of all time, spent waiting for one rank's data
LEAST_S = 0.02  # a step; less is the noise of a small model
MICRO = 1_000_000


class Stragglers:
    """Compares the ranks' forward passes, in which plain data parallel waits for nobody, and their waits for data.

    Every `every` steps the times travel in slots of their own with the counts that are summed anyway, so no collective is added.
    Created and called on every rank. Each rank is told of once when it has been slow twice running, and once when it is so no more.
    """

    def __init__(self, world: World, every: int, metrics: Metrics):
        self.world, self.every, self.metrics = world, every, metrics
        self.hosts = world.gather(socket.gethostname())
        self.named: set[int] = set()
        self._slow_before: set[int] = set()
        self._forward_s = self._data_s = self._all_s = 0.0
        self._steps = -1  # the first one compiles and warms up

    def add(self, forward_s: float, data_s: float, all_s: float) -> None:
        """A step's times on this rank: in forward passes, waiting for data, in all."""
        self._steps += 1
        if self._steps:
            self._forward_s, self._data_s, self._all_s = self._forward_s + forward_s, self._data_s + data_s, self._all_s + all_s

    def numbers(self) -> list[int]:
        """This rank's microseconds at its own place and 0 at the others', to be summed over ranks; nothing while it is not time yet."""
        if self.world.size == 1 or self._steps < self.every:
            return []
        slots = [0] * (2 * self.world.size)
        slots[2 * self.world.rank : 2 * self.world.rank + 2] = round(self._forward_s * MICRO), round(self._data_s * MICRO)
        return slots

    def judge(self, step: int, summed: list[int]) -> None:
        """Name who became slow and who is no more, from the sums of all ranks' `numbers`."""
        steps, all_s = self._steps, self._all_s
        self._steps, self._forward_s, self._data_s, self._all_s = 0, 0.0, 0.0, 0.0
        forward_s, data_s = ([n / MICRO / steps for n in summed[kind::2]] for kind in (0, 1))
        slow = self._slow(forward_s, data_s, all_s / steps)
        slowest = max(range(self.world.size), key=lambda rank: forward_s[rank])
        values = {"forward_s_median": median_low(forward_s), "forward_s_max": forward_s[slowest], "slowest": slowest}
        self.metrics.ranks(step, values | {"data_wait_s_max": max(data_s)})
        lasting = slow.keys() & (self._slow_before | self.named)  # once may be chance
        for rank in sorted(lasting - self.named):
            self.metrics.fault(step, "slow_rank", slow[rank])
            if self.world.rank == 0:
                log.warning(f"step {step:,}: {slow[rank]}. All other ranks wait for it.")
        for rank in sorted(self.named - lasting):
            if self.world.rank == 0:
                log.info(f"step {step:,}: rank {rank} on {self.hosts[rank]} keeps up with the others again.")
        self.named, self._slow_before = lasting, set(slow)

    def _slow(self, forward_s: list[float], data_s: list[float], step_s: float) -> dict[int, str]:
        usual_forward, usual_data = median_low(forward_s), median_low(data_s)
        slow = {}
        for rank, (forward, data) in enumerate(zip(forward_s, data_s, strict=True)):
            who = f"rank {rank} on {self.hosts[rank]}"
            if data - usual_data > max(DATA_SHARE * step_s, LEAST_S):
                slow[rank] = f"{who} waits for its data {data:.4f} s a step of {step_s:.4f} s, the median rank {usual_data:.4f} s"
            elif forward > SLOW * usual_forward and forward - usual_forward > LEAST_S:
                slow[rank] = f"{who} computes slowly: its forward passes take {forward:.4f} s a step, the median rank's {usual_forward:.4f} s"
        return slow
