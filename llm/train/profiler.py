"""Where the time of a few steps goes (log.profile): a trace for chrome://tracing or ui.perfetto.dev, and a table. It changes no number."""

import gzip
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from llm import durable
from llm.log import log, result

ROWS = 10


class StepProfiler:
    """Profiles this rank's steps first..last of the run. Call `before` and `after` each step, and `close` at the end of the sitting."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: str):
        self._first, self._last = steps or (1, 0)
        self._folder, self._on_gpu = folder, device.startswith("cuda")
        self._running = self._mark = None
        self._began = self._done = 0

    def before(self, step: int) -> None:
        if not self._first <= step <= self._last:
            return
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._running is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._running, self._began = profile(activities=activities), step
            self._running.start()
        self._mark = record_function(f"step {step}")
        self._mark.__enter__()

    def after(self, step: int) -> None:
        if self._mark:
            self._mark.__exit__(None, None, None)
            self._mark, self._done = None, step
            if step == self._last:
                self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        if self._done < self._began:  # the sitting ended where these steps would have begun
            return
        trace = self._folder / f"profile-{self._began}-{self._done}.json.gz"
        try:
            _write_trace(running, trace)
            table = self._table(running)
            durable.write_text(trace.with_name(trace.name.replace(".json.gz", ".txt")), table + "\n")
        except (OSError, RuntimeError) as error:  # training must not end for want of a picture of it
            log.warning(f"{trace}: cannot be written ({error}). Training goes on.")
        else:
            result(f"{table}\n{trace}: opens in chrome://tracing and ui.perfetto.dev")

    def _table(self, running) -> str:
        """The operations that took most time by themselves: on the GPU if there is one, else on the CPU."""
        where = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        spent = [(getattr(event, where), event.count, event.key) for event in running.key_averages() if not event.key.startswith("step ")]
        whole = sum(us for us, *_ in spent)
        head = f"steps {self._began} to {self._done}: {whole / 1e6:.3f} s of {'GPU' if self._on_gpu else 'CPU'} time, by operation"
        rows = [f"  {us / max(1, whole):6.1%}  {us / 1e6:9.3f} s  {calls:8,} calls  {name}" for us, calls, name in sorted(spent, reverse=True)[:ROWS]]
        return "\n".join([head, *rows])


def _write_trace(running, path: Path) -> None:
    """A .json.gz, as torch would write it by itself, but whole or not at all."""
    with TemporaryDirectory() as folder:
        running.export_chrome_trace(f"{folder}/trace.json")
        with open(f"{folder}/trace.json", "rb") as plain, durable.new_file(path) as fresh, gzip.open(fresh, "wb") as packed:
            shutil.copyfileobj(plain, packed)
