"""What a run tells while it runs: a live line, metrics.jsonl, TensorBoard. Rank 0 only; on other ranks everything is silent."""

import json
import time
from pathlib import Path

from llm.config import RunConfig
from llm.log import LiveLine, log


class Metrics:
    """Averages steps between two reports. Times are seconds of wall clock."""

    def __init__(self, cfg: RunConfig, *, speaks: bool, flops_per_token: float, peak_flops: float | None):
        self.cfg, self.speaks = cfg, speaks
        self.end_step = 0
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.tokens = 0
        self.started_at = time.perf_counter()
        self.busy_s = 0.0
        self._window: list[tuple[float, int, float]] = []  # (seconds, tokens, data wait)
        self._line = LiveLine() if speaks else None
        folder = cfg.log_folder
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8") if speaks else None  # noqa: SIM115 - until close()
        self._board = _tensorboard(folder) if speaks and cfg.log.tensorboard else None

    def step(self, step: int, *, loss: float, lr: float, grad_norm: float, tokens: int, seconds: float, data_wait_s: float) -> None:
        """One applied update: `step` is the number of steps done, `tokens` the counted targets of the global step."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        self.tokens += tokens
        self.busy_s += seconds
        self._window.append((seconds, tokens, data_wait_s))
        if not self.speaks:
            return
        rate = sum(t for _, t, _ in self._window) / sum(s for s, *_ in self._window)
        self._line.show(self._text(step, loss, lr, rate))
        if step % self.cfg.log.log_every and step != self.end_step:
            return
        waited = sum(w for *_, w in self._window) / sum(s for s, *_ in self._window)
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_s": rate, "data_wait_share": waited}
        if self.peak_flops:
            values["mfu"] = self.mfu(rate)
        self._write(step, "train", values)
        if not self._line.alive:
            log.info(self._text(step, loss, lr, rate))
        self._window.clear()

    def validation(self, step: int, values: dict[str, float]) -> None:
        if self.speaks:
            self._write(step, "val", values)
            log.info(f"step {step:,}  validation loss {values['loss']:.4f}, {values['bits_per_byte']:.4f} bits per byte")

    def tasks(self, step: int, values: dict[str, float]) -> None:
        """What eval.tasks have measured: {"TASK/METRIC": value}."""
        if self.speaks:
            self._write(step, "eval", values)
            shown = [f"{name} {value:.4f}" for name, value in values.items() if name.endswith(("/all", "/bits_per_byte"))]
            log.info(f"step {step:,}  {', '.join(shown)}")

    def ranks(self, step: int, values: dict[str, float]) -> None:
        """How the ranks' own times compare, in seconds a step."""
        if self.speaks:
            self._write(step, "ranks", values)

    def fault(self, step: int, kind: str, why: str) -> None:
        """Something odd happened in this step: a line of its own in metrics.jsonl, a mark and its reason in TensorBoard."""
        if not self.speaks:
            return
        print(json.dumps({"step": step, "time": round(time.time(), 3), f"fault/{kind}": why}), file=self._file, flush=True)
        if self._board:
            self._board.add_scalar(f"fault/{kind}", 1.0, step)
            self._board.add_text(f"fault/{kind}", why, step)

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOP utilisation, exact-causal count."""
        return tokens_per_s * self.flops_per_token / self.peak_flops

    @property
    def tokens_per_s(self) -> float:
        """Over the training steps of this sitting, validation and saving left out."""
        return self.tokens / self.busy_s if self.busy_s else 0.0

    def close(self) -> None:
        if self._line:
            self._line.close()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def _text(self, step: int, loss: float, lr: float, rate: float) -> str:
        done_s = self.busy_s / max(1, self.tokens)
        tokens_a_step = self._window[-1][1]
        left_s = (self.end_step - step) * tokens_a_step * done_s
        mfu = f"  MFU {self.mfu(rate):.1%}" if self.peak_flops else ""
        return f"step {step:,}/{self.end_step:,}  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s{mfu}  {clock(left_s)} left"

    def _write(self, step: int, group: str, values: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3)} | {f"{group}/{k}": v for k, v in values.items()}
        print(json.dumps(record), file=self._file, flush=True)
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(f"{group}/{key}", value, step)


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), flush_secs=10)


def clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
