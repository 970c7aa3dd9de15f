"""What an engine really holds: bytes of tensors by kind, counted in the process over a few steps on random ids. Not used in training.

python -m llm.engine.census STEPS < run.json      the resolved config of a run; prints a line after each, and a last one of JSON
"""

import json
import math
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm.batch_plan import batch_plan
from llm.config import RunConfig, check_config
from llm.data.stream import Batch
from llm.dist import World, pick_device
from llm.engine import Engine, build_engine
from llm.engine.precision import resolve_precision
from llm.engine.process import settled
from llm.model.init import build_model

STEP = "census: step"  # tools/plan_run.py counts these lines


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that torch has made under it and not freed yet, and the most there were. Slow: it looks at every result."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor) and item.device.type != "meta":
                self._note(item.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_):
            del self._known[key]
            self.now -= n_bytes

        self._known[key] = weakref.ref(storage, freed)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


class _Saved:
    """What autograd keeps of one forward pass: bytes of different storages, the model's own weights left out."""

    def __init__(self, engine: Engine):
        self.engine, self.bytes_of = engine, {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.bytes_of and key not in {p.untyped_storage().data_ptr() for p in _model(self.engine).parameters()}:
            self.bytes_of[key] = storage.nbytes()
        return tensor


class _Watched(list):
    """Micro-batches that call `tell` before each of them is taken."""

    def __init__(self, batches: list[Batch], tell: Callable[[], None]):
        super().__init__(batches)
        self.tell = tell

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.tell()
            yield batch


def count(cfg: RunConfig, world: World) -> dict[str, int]:
    """Bytes by kind on this rank, in the second step of a fresh engine. Collective.

    gradients: at the start of the step's last micro-batch or when all are over, before any weight moves; activations: what autograd keeps of a
    forward pass, the gradients that the head has ready by then among it; peak: of all tensors together; process: the most
    this process had. On a CPU compiled code hides gradients and peak: None.
    """
    cuda = world.device.startswith("cuda")
    before = _process_bytes()
    live = LiveBytes() if not (cuda or cfg.engine.compile) else None
    now = (lambda: torch.cuda.memory_allocated(world.device)) if cuda else (lambda: live.now if live else 0)
    with live or nullcontext():
        engine = build_engine(cfg, world, build_model(cfg.model, cfg.train.seed))
        _step(engine, cfg, world, seed=0)
        saved, at_rest, grown = _Saved(engine), now(), []
        _reset_peak(world, live)

        def micro_batch_begins() -> None:
            saved.bytes_of.clear()
            grown.append(now() - at_rest - _buckets(engine))

        def accept(_) -> bool:
            grown.append(now() - at_rest - _buckets(engine))
            return True

        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            _step(engine, cfg, world, seed=1, watch=micro_batch_begins, accept=accept)
    peak = torch.cuda.max_memory_allocated(world.device) if cuda else live.peak if live else None
    return _held(engine) | {
        "gradients": _standing_gradients(engine) or (max(grown) if live or cuda else None),
        "activations": sum(saved.bytes_of.values()), "peak": peak,
        "process": _process_bytes(), "process_before": before,
    }  # fmt: skip


def time_steps(cfg: RunConfig, world: World, steps: int, tell: Callable[[], None]) -> float:
    """Seconds of an optimizer step on a fresh engine: the median of `steps` after one that compiles and warms up. Collective. `tell`: after each."""
    engine, seconds = build_engine(cfg, world, build_model(cfg.model, cfg.train.seed)), []
    for step in range(steps + 1):
        started_at = time.perf_counter()
        _step(engine, cfg, world, seed=step)  # ends with a read of the loss, so with all work done
        seconds.append(time.perf_counter() - started_at)
        tell()
    return statistics.median(seconds[1:])


def _step(engine: Engine, cfg: RunConfig, world: World, seed: int, watch: Callable = lambda: None, accept: Callable = math.isfinite) -> None:
    plan, generator = batch_plan(cfg, world.size), torch.Generator().manual_seed(seed)
    shape = (plan.accumulation, plan.micro_rows, plan.seq_len + 1)
    ids = torch.randint(0, cfg.model.vocab_size, shape, generator=generator)
    doc_ids = torch.zeros(shape[1], shape[2] - 1, dtype=torch.int64) if cfg.data.document_mask else None
    batches = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), doc_ids, None) for rows in ids]
    engine.train_step(_Watched(batches, watch), plan.tokens, cfg.train.lr, accept)


def _model(engine: Engine) -> torch.nn.Module:
    return engine.model if hasattr(engine, "model") else engine.engine.module


def _held(engine: Engine) -> dict[str, int]:
    """Weights, fp32 masters and moments, as the engine's own tensors add up."""
    is_torch = hasattr(engine, "model")
    adamw, flats = (engine.optimizer, []) if is_torch else (engine.adamw, engine._flats())
    moments = [t for state in adamw.state.values() for name, t in state.items() if name != "step"]
    weights = [getattr(p, "ds_tensor", p) for p in _model(engine).parameters()]
    return {"weights": _storages(weights), "masters": _storages(flats), "moments": _storages(moments)}


def _standing_gradients(engine: Engine) -> int:
    """ZeRO-3's flat gradients and DDP's buckets, which are there from the start; 0 elsewhere."""
    flat = getattr(getattr(engine, "zero", None), "grad_partitions_flat_buffer", None)
    return _storages([flat] if flat is not None else [p.grad for p in _model(engine).parameters() if p.grad is not None])


def _buckets(engine: Engine) -> int:
    """ZeRO-1's and 2's buckets, which come and go between micro-batches."""
    if getattr(engine, "stage", 0) not in (1, 2):
        return 0
    return _storages([tensor for bucket in engine.zero.ipg_buckets.values() for tensor in bucket.buffer])


def _storages(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _reset_peak(world: World, live: LiveBytes | None) -> None:
    if live:
        live.peak = live.now
    if world.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(world.device)


def _process_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell of the peak of the process that launched this one, if that was higher
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tell_step() -> None:
    print(STEP, flush=True)


def main() -> None:
    cfg = check_config(json.load(sys.stdin), "the run to measure")
    world = World()
    world = world.on(pick_device(cfg.engine.device, world))
    cfg = resolve_precision(cfg, world)
    with settled(world.device, cfg.engine.keep_memory):
        counted = count(cfg, world)
        _tell_step()
        seconds = time_steps(cfg, world, int(sys.argv[1]), _tell_step)
    name = torch.cuda.get_device_name(world.device) if world.device.startswith("cuda") else "cpu"
    found = {"bytes": counted, "step_seconds": seconds, "device": name, "threads": torch.get_num_threads()}
    print(json.dumps(found | {"precision": cfg.engine.precision}))


if __name__ == "__main__":
    main()
