"""What a run tells while it runs: a live line, metrics.jsonl, samples.jsonl, TensorBoard. Rank 0 only; other ranks write none of these.

Names are group/what, the same in metrics.jsonl and TensorBoard: train, val, speed, time, memory, data, ranks, fault.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from llm.config import RunConfig
from llm.data.ledger import Ledger
from llm.data.seen import view_lines
from llm.dist import World
from llm.log import LiveLine, clock, log
from llm.model.flops import flops_per_token, peak_flops
from llm.train.budget import Sitting
from llm.train.datasets import DatasetTokens
from llm.train.lines import note
from llm.train.profiler import StepProfiler

MAX_LINES = 200  # of the ledger, at each checkpoint, in TensorBoard's files


@dataclass(frozen=True)
class StepRecord:
    """One applied update, the same on every rank."""

    loss: float
    lr: float
    grad_norm: float
    targets: int
    """Of the global step, those that carry loss."""
    tokens: int
    """Of the global step, all that were computed, padding left out: what speed is counted by."""
    seconds: float
    data_wait_s: float


class Metrics:
    """Averages steps between two reports. Times are seconds of wall clock."""

    def __init__(self, cfg: RunConfig, world: World, sitting: Sitting, by_dataset: DatasetTokens):
        self.cfg, self.sitting, self.speaks, self.device = cfg, sitting, world.rank == 0, world.device
        self.end_step = self.run_end_step = 0
        """The last step of this sitting, at the latest, and of the run as far as is known."""
        self.flops_per_token, self.peak_flops = flops_per_token(cfg.model), _peak_flops(world)
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.targets = 0
        self.tokens = 0
        self.busy_s = 0.0
        self.profiler = StepProfiler(cfg.log.profile if self.speaks else None, cfg.log_folder, world.device)
        self._by_dataset = by_dataset
        self._window: list[StepRecord] = []
        self._since = self._clocks()
        self._line = LiveLine() if self.speaks else None
        self._folder = cfg.log_folder
        self._board = None

    def step(self, step: int, ledger: Ledger, record: StepRecord) -> None:
        """`step`: the number of steps done, with this one."""
        if not self.speaks:
            return
        if self.first_loss is None:
            self.first_loss = record.loss
            if self.cfg.engine.compile:
                log.info(f"the first step took {record.seconds:.1f} s, compiling included; what is compiled is kept for the next sitting")
        self.last_loss = record.loss
        self.targets += record.targets
        self.tokens += record.tokens
        self.busy_s += record.seconds
        self._window.append(record)
        seconds = sum(r.seconds for r in self._window)
        rate = sum(r.tokens for r in self._window) / seconds
        self._line.show(self._text(step, record.loss, record.lr, rate))
        if step % self.cfg.log.log_every and step != self.end_step:
            return
        values = {"train/loss": record.loss, "train/lr": record.lr, "train/grad_norm": record.grad_norm}
        values["speed/tokens_per_s"] = rate
        values["speed/target_tokens_per_s"] = sum(r.targets for r in self._window) / seconds
        if self.peak_flops:
            values["speed/mfu"] = self.mfu(rate)
        values |= self._times() | _memory(self.device)
        values |= {f"data/{name}_tokens": n for name, n in self._by_dataset.of(ledger).items()}
        self._write(step, values)
        if not self._line.alive:
            log.info(self._text(step, record.loss, record.lr, rate))
        self._window.clear()

    def validation(self, step: int, values: dict[str, float]) -> None:
        self._write(step, {f"val/{key}": value for key, value in values.items()})
        log.info(f"step {step:,}  validation loss {values['loss']:.4f}, {values['bits_per_byte']:.4f} bits per byte")

    def tasks(self, step: int, values: dict[str, float]) -> None:
        """What eval.tasks have measured: {"TASK/METRIC": value}."""
        self._write(step, {f"eval/{key}": value for key, value in values.items()})
        shown = [f"{name} {value:.4f}" for name, value in values.items() if name.endswith(("/all", "/bits_per_byte"))]
        log.info(f"step {step:,}  {', '.join(shown)}")

    def ranks(self, step: int, values: dict[str, float]) -> None:
        """How the ranks' own times compare, in seconds a step."""
        self._write(step, {f"ranks/{key}": value for key, value in values.items()})

    def fault(self, step: int, kind: str, why: str) -> None:
        """Something odd happened in this step: a line of its own in metrics.jsonl, a mark and its reason in TensorBoard."""
        self._note(step, {f"fault/{kind}": why})
        self._on_board(lambda board: board.add_scalar(f"fault/{kind}", 1.0, step))
        self._on_board(lambda board: board.add_text(f"fault/{kind}", why, step))

    def start(self, step: int, record: dict) -> None:
        """What `note_start` noted of a sitting that goes on from `step`. Rank 0 only."""
        if self.cfg.log.tensorboard:
            self._open_board(step)
        for name, value in {"config": record["config"], "environment": {key: v for key, v in record.items() if key != "config"}}.items():
            self.page(name, yaml.safe_dump(value, sort_keys=False), step)

    def samples(self, step: int, texts: dict[str, str]) -> None:
        """What the model wrote after each of the prompts."""
        for number, (prompt, text) in enumerate(texts.items(), start=1):
            self._note(step, {"prompt": prompt, "text": text}, "samples.jsonl")
            self.page(f"samples/{number}", prompt + text, step)

    def seen(self, step: int, view: dict | None) -> None:
        """What a checkpoint's ledger says; a view of `seen_view`, None on ranks that have none."""
        if view:
            lines = view_lines(view)
            more = [f"and {len(lines) - MAX_LINES:,} lines more: tools/ledger.py show"] if len(lines) > MAX_LINES else []
            self.page("ledger", "\n".join([*lines[:MAX_LINES], *more]).strip(), step)

    def page(self, name: str, text: str, step: int) -> None:
        """A plain text for TensorBoard, shown as it is."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # markdown leaves it alone
        self._on_board(lambda board: board.add_text(name, indented, step))

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOP utilisation, exact-causal count."""
        return tokens_per_s * self.flops_per_token / self.peak_flops

    @property
    def tokens_per_s(self) -> float:
        """Over the training steps of this sitting, validation and saving left out."""
        return self.tokens / self.busy_s if self.busy_s else 0.0

    @property
    def target_tokens_per_s(self) -> float:
        """Of these the tokens that carry loss."""
        return self.targets / self.busy_s if self.busy_s else 0.0

    def close(self) -> None:
        self.profiler.close()
        if self._line:
            self._line.close()
        self._on_board(lambda board: board.close())

    def _text(self, step: int, loss: float, lr: float, rate: float) -> str:
        mfu = f"  MFU {self.mfu(rate):.1%}" if self.peak_flops else ""
        today_s, whole_s = self.sitting.left_s(self.end_step - step), (self.run_end_step - step) * self.sitting.pace_s
        whole = f", {clock(whole_s)} for the whole run" if whole_s - today_s >= 1 else ""
        left = f"  {clock(today_s)} left{whole}" if self.sitting.pace_s else ""
        return f"step {step:,}/{self.end_step:,}  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s{mfu}{left}"

    def _clocks(self) -> tuple[float, float, float]:
        return time.perf_counter(), self.sitting.validating_s, self.sitting.saving_s

    def _times(self) -> dict[str, float]:
        """Seconds a step, and where all the time since the last report went, as shares of it."""
        now = self._clocks()
        all_s, validating_s, saving_s = (b - a for a, b in zip(self._since, now, strict=True))
        step_s, waited_s = sum(r.seconds for r in self._window), sum(r.data_wait_s for r in self._window)
        self._since = now
        spent = {"training": step_s - waited_s, "data_wait": waited_s, "validating": validating_s, "saving": saving_s}
        spent["other"] = max(0.0, all_s - sum(spent.values()))
        return {"time/step_s": step_s / len(self._window)} | {f"time/{name}_share": s / all_s for name, s in spent.items()}

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._note(step, values)
        for key, value in values.items():
            self._on_board(lambda board, key=key, value=value: board.add_scalar(key, value, step))

    def _note(self, step: int, values: dict, file: str = "metrics.jsonl") -> None:
        if self.speaks:
            note(self._folder / file, {"step": step, "time": round(time.time(), 3)} | values)

    def _open_board(self, step: int) -> None:
        folder = self._folder / "tensorboard"
        try:
            self._board = _tensorboard(folder, step)
        except OSError as error:
            self._board_lost(error)

    def _on_board(self, write: Callable) -> None:
        """`write(board)`, if there is one. What its own thread could not write is raised here, some time later: then there is none any more."""
        try:
            if self._board:
                write(self._board)
        except OSError as error:
            self._board_lost(error)

    def _board_lost(self, error: OSError) -> None:
        self._board = None
        folder = self._folder / "tensorboard"
        log.warning(f"{folder}: cannot be written ({error.strerror}). Training goes on without it.")


def _tensorboard(folder: Path, step: int):
    """A writer to which what other files of the folder say of later steps is void: a kill, or --from-step, has undone them."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder), flush_secs=10, purge_step=step + 1)
    board.add_custom_scalars({"training and validation": {"loss": ["Multiline", ["train/loss", "val/loss"]]}})
    return board


def _peak_flops(world: World) -> float | None:
    """Of all ranks' GPUs together; None where it is not known."""
    if not world.device.startswith("cuda"):
        return None
    import torch

    peak = peak_flops(torch.cuda.get_device_name(world.device))
    return peak * world.size if peak else None


def _memory(device: str) -> dict[str, float]:
    """GB (1e9 bytes) of rank 0: in host memory now and at most so far, and at most on the GPU. Where the system does not say, nothing."""
    values, status = {}, Path("/proc/self/status")
    if status.exists():
        said = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        values = {f"memory/{name}_gb": int(said[key].split()[0]) * 1024 / 1e9 for key, name in (("VmRSS", "host"), ("VmHWM", "host_peak"))}
    if device.startswith("cuda"):
        import torch

        values["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values
