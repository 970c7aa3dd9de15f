"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass

from llm.config import TrainConfig, interval_steps


@dataclass(frozen=True)
class Horizon:
    """The steps [start, start + length) that one schedule runs over: the whole budget, or one phase."""

    start: int
    length: int
    is_whole_run: bool

    @property
    def end(self) -> int:
        return self.start + self.length


def lr_at(train: TrainConfig, horizon: Horizon, step: int) -> float:
    """The rate for the update that takes the run from `step` to `step + 1`.

    Linear warmup from 0, then cosine (arXiv 1608.03983), linear, or constant down to lr x min_lr_ratio. `wsd` (arXiv 2404.06395) stays
    at the peak and decays over the last decay_steps only when the horizon is the whole run: a phase that more data may follow does not decay.
    """
    at, floor = step - horizon.start, train.lr * train.min_lr_ratio
    warmup = interval_steps(train.warmup_steps, horizon.length)
    if at < warmup:
        return train.lr * (at + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "wsd":
        decay = interval_steps(train.decay_steps, horizon.length) if horizon.is_whole_run else 0
        begin = horizon.length - decay
        return train.lr if at < begin else train.lr + (floor - train.lr) * (at - begin + 1) / decay
    done = min(1.0, (at - warmup) / max(1, horizon.length - 1 - warmup))
    share = (1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1 - done
    return floor + (train.lr - floor) * share
