"""How long this sitting may go on, and how many steps the phase and the run have."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llm.config import ConfigError, RunConfig
from llm.data.phase import Phase
from llm.train.schedule import Horizon


@dataclass
class Sitting:
    """The limits that a person set for today. Time counts from `started_at` (time.monotonic), start-up and the last save included."""

    started_at: float
    steps: int | None = None
    minutes: float | None = None
    tokens: int | None = None
    steps_done: int = 0
    tokens_done: int = 0
    saving_s: float = 0.0
    """How long training has stood still for saving, and for validation."""
    validating_s: float = 0.0
    slowest_save_s: float = 5.0
    _last_step_at: float = field(default_factory=time.monotonic)
    _first_step_at: float = 0.0
    _slowest_step_s: float = 0.0

    def __post_init__(self):
        for flag, value in (("--steps-today", self.steps), ("--minutes-today", self.minutes), ("--tokens-today", self.tokens)):
            if value is not None and value <= 0:
                raise ConfigError(f"{flag} is {value}; give a number above 0, or leave it out to train to the end.")

    def count_step(self, tokens: int) -> None:
        """`tokens`: those of the global step that carry loss, of an update that was applied."""
        now = time.monotonic()
        if self.steps_done:  # the first step compiles and warms up: it says nothing about the next
            self._slowest_step_s = max(self._slowest_step_s, now - self._last_step_at)
        else:
            self._first_step_at = now
        self._last_step_at = now
        self.steps_done += 1
        self.tokens_done += tokens

    @property
    def pace_s(self) -> float:
        """Seconds a step, validation and saving included; 0.0 before the second one."""
        return (self._last_step_at - self._first_step_at) / (self.steps_done - 1) if self.steps_done > 1 else 0.0

    def left_s(self, steps: int) -> float:
        """Seconds until this sitting ends, which has at most `steps` to go."""
        left = [steps * self.pace_s]
        if self.minutes is not None:
            left.append(60 * self.minutes - (time.monotonic() - self.started_at))
        if self.tokens is not None and self.tokens_done:
            left.append((self.tokens - self.tokens_done) / self.tokens_done * self.steps_done * self.pace_s)
        return max(0.0, min(left))

    def validation(self, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `work` gives, its time counted."""
        began = time.monotonic()
        result = work()
        self.validating_s += time.monotonic() - began
        return result

    def over(self) -> str | None:
        """Why the sitting should end before another step, or None."""
        if self.steps is not None and self.steps_done >= self.steps:
            return f"--steps-today {self.steps} done"
        if self.tokens is not None and self.tokens_done >= self.tokens:
            return f"--tokens-today {self.tokens:,} done"
        if self.minutes is not None:
            left_s = 60 * self.minutes - (time.monotonic() - self.started_at)
            if left_s < self._slowest_step_s + 1.5 * self.slowest_save_s:
                return f"--minutes-today {self.minutes:g} are over"
        return None


def phase_steps(phase: Phase, global_rows: int) -> int:
    """Optimizer steps of a whole phase; its last one may be short."""
    return -(-phase.total // global_rows)


def horizon(cfg: RunConfig, phase: Phase, global_rows: int, step: int) -> Horizon:
    """What the learning rate runs over: the step budget of the run, or without one the phase, which begins now if it has not yet."""
    if cfg.train.total_step_budget:
        return Horizon(0, cfg.train.total_step_budget, is_whole_run=True)
    start = step if phase.first_step is None else phase.first_step - 1
    left = -(-(phase.total - phase.consumed) // global_rows)  # the steps before may have been of another batch
    return Horizon(start, step - start + left, is_whole_run=False)
