"""Is this step's loss, or its gradient, out of all proportion? Judged against the last applied steps; the same on every rank."""

import math
from statistics import fmean, pstdev

LEAST_STEPS = 32  # fewer say little about what is usual
LEAST_RISE = 0.5  # nats per token: what a loss may rise without harm, also where a text known by heart leaves it near 0
FLOOR = 1e-3  # of the mean: where losses hardly differ, their rounding must not pass for a spike

Recent = dict[str, list[float]]
"""{"losses", "grad_norms"} of the last applied steps, oldest first: all that the guard knows, so a checkpoint carries it."""


class SpikeGuard:
    """Refuses a loss above mean + sigma x standard deviation of the last `window` applied steps, as OLMo-core's SkipStepOptimizer does.

    Unlike there, a refused loss never enters the window: one spike must not make the next look usual. It says nothing before half the
    window is full (and 32 steps at least), so the steep start of training passes. `recent` moves along; sigma None or 0: nothing but
    numbers that are not finite is refused.

    A gradient's norm is known only after the update, so it is reported, not refused. Into the window goes at most the limit: a level
    that has really changed becomes the usual one after a while, and a single spike hides no other.
    """

    def __init__(self, sigma: float | None, window: int, recent: Recent):
        self.sigma, self.window, self.recent = sigma, window, recent
        self._norm_was_high = False
        for values in (self._of("losses"), self._of("grad_norms")):
            del values[:-window]  # a shorter one than the checkpoint's

    def why_not(self, loss: float) -> str | None:
        """Why this loss must not move the weights, with value and limit; None when it may."""
        if not math.isfinite(loss):
            return f"the loss was {loss}"
        return self._spike("loss", loss, self._of("losses"), LEAST_RISE)

    def applied(self, loss: float, grad_norm: float) -> str | None:
        """Book an applied step. Returns what is odd about its gradient's norm, once for as long as it stays odd."""
        norms = self._of("grad_norms")
        odd = self._spike("gradient norm", grad_norm, norms)
        self._add("losses", loss)
        self._add("grad_norms", min(grad_norm, self._limit(norms)[0]) if odd else grad_norm)
        told, self._norm_was_high = self._norm_was_high, odd is not None
        return None if told else odd

    def _spike(self, what: str, value: float, before: list[float], least_rise: float = 0.0) -> str | None:
        if not self.sigma or len(before) < max(LEAST_STEPS, self.window // 2):
            return None
        limit, mean, deviation = self._limit(before)
        if value <= max(limit, mean + least_rise):
            return None
        return (
            f"the {what} was {value:.6g}, above {limit:.6g} = {mean:.6g} + {self.sigma:g} x {deviation:.3g}, "
            f"mean and standard deviation of the last {len(before)} applied steps"
        )

    def _limit(self, before: list[float]) -> tuple[float, float, float]:
        mean = fmean(before)
        deviation = max(pstdev(before), FLOOR * abs(mean))
        return mean + self.sigma * deviation, mean, deviation

    def _of(self, key: str) -> list[float]:
        return self.recent.setdefault(key, [])

    def _add(self, key: str, value: float) -> None:
        values = self._of(key)
        values.append(value)
        del values[: -self.window]


def refused_in_a_row(skipped_steps: list[int], step: int) -> int:
    """How many of the steps up to `step` were refused one after the other, from the ledger's skipped ones: a resume counts on."""
    refused = set(skipped_steps)
    count = 0
    while step - count in refused:
        count += 1
    return count
