"""How fast is our training step against others of the same dimensions, dtype and batch?

  python benchmarks/step.py --config configs/toy.yaml
  python benchmarks/step.py --config configs/gpt-1b.yaml --device cuda --out build/step.json train.batch_size=16
  python benchmarks/step.py --config configs/toy.yaml --against hf,litgpt,fsdp2 --only eager

A minimal nanoGPT-style loop is always among them. --against adds Hugging Face's and litgpt's models in the same loop, Hugging Face's
Trainer, that loop's model under FSDP2 and under DeepSpeed as its defaults are, and ourselves under DeepSpeed: zero1, zero2, zero3. Those
that are not installed are left out.

All contenders live in one process and take turns, a few steps each, round after round, so that a busy machine slows all of them. The
ratio is the median over rounds of ours by theirs in the same round. Data are random ids, the same for all; reading shards is left out.
Beside the speed: seconds of the first step, compiling included (the compile cache makes it short the second time); on CUDA the most memory that
each took by itself; and the FLOPs of the model by those of one large product, measured before (`of product`) and, on a GPU in the list
of llm/model/flops.py, by its peak (MFU: causal attention; PaLM: all of it, as most publish).
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import NEEDS, others
from machine import in_rounds, machine, write_json
from nanogpt_loop import Loop

from llm import cli
from llm.batch_plan import batch_plan
from llm.config import RunConfig, check_config, load_config
from llm.data.stream import Batch
from llm.dist import World
from llm.engine import build_engine
from llm.engine.attention_kernel import training_kernels
from llm.engine.precision import resolve_precision
from llm.engine.process import keep_freed_memory
from llm.log import log
from llm.model import products
from llm.model.flops import count_params, flops_per_token, palm_flops_per_token, peak_flops
from llm.model.init import build_model

TOKENIZER_VOCAB = 4100  # the quick start's, where the config leaves it to the tokenizer
ALONE = World()
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
MALLOC = ("LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "OMP_NUM_THREADS")


def main() -> None:
    args = arguments()
    cfg = load_config(args.config, args.overrides, preset=args.model)
    cfg = changed(cfg, model={"vocab_size": cfg.model.with_vocab(TOKENIZER_VOCAB).vocab_size}, engine={"zero_stage": 0})
    cfg = resolve_precision(cfg, World(device=args.device))
    torch.set_flush_denormal(True)
    if args.keep_memory and args.device == "cpu":
        keep_freed_memory()  # for all contenders
    clock = time.process_time if args.cpu_time else time.perf_counter
    product_rate = rate_of_a_large_product(cfg.engine.precision, args.device, clock)
    plan = batch_plan(cfg, 1)
    size = f"{count_params(cfg.model):,} parameters"
    log.info(f"{cfg.model.model_name}: {size}, {cfg.engine.precision}, {plan}, {torch.get_num_threads()} threads")
    log.info(f"a large product of matrices: {product_rate / 1e9:,.0f} GFLOP/s")
    builders = builders_of(args.only, args.against)
    contenders = {name: warm(name, build, cfg, args.device, args.warm_up) for name, build in builders.items()}
    rounds = [take_turns(contenders, cfg, args.steps, r, args.device, clock) for r in range(args.rounds)]
    report = {
        "model": cfg.model.model_dump(), "precision": cfg.engine.precision, "tokens_per_step": plan.tokens, "micro_rows": plan.micro_rows,
        "product_flops_per_second": product_rate, "rounds_tokens_per_second": rounds,
        "summary": summarise(contenders, rounds, cfg, product_rate, args.device), "best": best(rounds),
        "machine": machine(["torch", "numpy", "deepspeed", "transformers", "litgpt"]) | setting(args.device, args.keep_memory),
    }  # fmt: skip
    print_table(report, contenders)
    write_json(report, args.out)


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps in a turn (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each before the first turn (%(default)s)")
    parser.add_argument("--only", choices=("eager", "compiled"), help="leave the other form of each out")
    known = f"more contenders: {','.join([*NEEDS, *STAGES])}"
    parser.add_argument("--against", type=lambda text: text.split(","), default=[], metavar="NAMES", help=known)
    parser.add_argument("--cpu-time", action="store_true", help="tokens per second of CPU time: on a CPU that others use too, with one thread")
    parser.add_argument("--no-keep-memory", dest="keep_memory", action="store_false", help="CPU: give freed memory back, as glibc does by itself")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    if unknown := [name for name in args.against if name not in {**NEEDS, **STAGES}]:
        parser.error(f"there is no contender {unknown[0]}: {known}")
    return args


def changed(cfg: RunConfig, **sections: dict) -> RunConfig:
    tree = cfg.model_dump()
    for name, fields in sections.items():
        tree[name] |= fields
    return check_config(tree, "benchmark")


@dataclass
class Contender:
    step: Callable
    """Makes one optimizer step on a list of (tokens, targets) and returns its loss."""
    first_loss: float
    first_step_s: float
    held_bytes: int
    """On CUDA: from building to the end of the first steps, what stays."""
    peak_bytes: int = 0
    """On CUDA: what a turn takes beside that."""

    @property
    def memory(self) -> str:
        return f"{(self.held_bytes + self.peak_bytes) / 2**30:6.2f}G" if self.held_bytes else f"{'-':>7}"


def builders_of(only: str | None, against: list[str]) -> dict[str, Callable]:
    """"NAME MODE" -> a function of (config, device) that gives a step."""
    found, modes = {}, [only] if only else ["eager", "compiled"]
    for name, build in {"nanogpt": nanogpt, **others(against)}.items():
        for mode in modes:
            found[f"{name} {mode}"] = functools.partial(build, compiled=mode == "compiled")
    for name, stage in {"tally": 0, **{f"tally-{name}": stage for name, stage in STAGES.items() if name in against}}.items():
        for mode in modes:
            found[f"{name} {mode}"] = functools.partial(tally, engine={"compile": mode == "compiled", "zero_stage": stage})
    return found


def tally(cfg: RunConfig, device: str, engine: dict) -> Callable:
    return tally_step(changed(cfg, engine=engine), World(device=device))


def nanogpt(cfg: RunConfig, device: str, compiled: bool) -> Callable:
    torch.manual_seed(cfg.train.seed)
    loop = Loop(cfg, device, compiled)
    assert sum(p.numel() for p in loop.model.parameters()) == count_params(cfg.model)
    return loop.step


def warm(name: str, build: Callable, cfg: RunConfig, device: str, n_steps: int) -> Contender:
    """Build it and make the steps that compile and fill allocators."""
    before, began = allocated(device), time.perf_counter()
    step = build(cfg, device)
    first_loss = float(step(draw(cfg, 0)))  # must be near ln V for all
    took_s = time.perf_counter() - began
    for seed in range(1, n_steps):
        step(draw(cfg, seed))
    log.info(f"{name} is warm: built, with its first step, in {took_s:.1f} s, loss {first_loss:.3f}")
    return Contender(step, first_loss, took_s, allocated(device) - before)


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def rate_of_a_large_product(precision: str, device: str, clock: Callable) -> float:
    """FLOP/s of the best of five, on random numbers: on zeros a GPU takes less power and is faster."""
    n, dtype = (2048 if device == "cpu" else 8192), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    shortest = math.inf
    for _ in range(6):
        synchronize(device)
        began = clock()
        products.times_transposed(a, b)
        synchronize(device)
        shortest = min(shortest, clock() - began)
    return 2 * n**3 / shortest


def tally_step(cfg: RunConfig, world: World) -> Callable:
    engine = build_engine(cfg, world, build_model(cfg.model, cfg.train.seed))

    def step(batches) -> float:
        micro_batches = [Batch(x, y, None, None) for x, y in batches]
        n_targets = world.size * sum(y.numel() for _, y in batches)
        with training_kernels(cfg.model, cfg.data.document_mask):
            update = engine.train_step(micro_batches, n_targets, cfg.train.lr, math.isfinite)
        assert update.applied
        return update.loss

    return step


def draw(cfg: RunConfig, seed: int, world: World = ALONE) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's micro-batches of one step: random ids and the ids after them."""
    plan, generator = batch_plan(cfg, world.size), torch.Generator().manual_seed(seed * world.size + world.rank)
    shape = (plan.accumulation, plan.micro_rows, plan.seq_len + 1)
    ids = torch.randint(0, cfg.model.vocab_size, shape, generator=generator)
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids]


def take_turns(contenders: dict[str, Contender], cfg: RunConfig, n: int, turn: int, device: str, clock: Callable) -> dict[str, float]:
    """Tokens per second of each; the order turns with the rounds."""
    names = list(contenders)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    batches = [draw(cfg, 1000 * turn + i) for i in range(n)]
    speeds = {}
    for name in names:
        contender, before = contenders[name], allocated(device)
        if before:
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started_at = clock()
        for batch in batches:
            contender.step(batch)
        synchronize(device)
        speeds[name] = n * batch_plan(cfg, 1).tokens / (clock() - started_at)
        if before:
            contender.peak_bytes = max(contender.peak_bytes, torch.cuda.max_memory_allocated(device) - before)
    return speeds


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summarise(contenders: dict[str, Contender], rounds: list[dict[str, float]], cfg: RunConfig, product_rate: float, device: str) -> dict[str, dict]:
    flops, palm_flops = flops_per_token(cfg.model), palm_flops_per_token(cfg.model)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None
    summary = {}
    for name in sorted(contenders):
        contender, speeds, found = contenders[name], [r[name] for r in rounds], in_rounds(rounds, name, f"nanogpt {name.split()[1]}")
        speed = found["tokens_per_second"]
        summary[name] = found | {
            "slowest": min(speeds), "fastest": max(speeds), "of_product": speed * flops / product_rate,
            "mfu": speed * flops / peak if peak else None, "palm_mfu": speed * palm_flops / peak if peak else None,
            "first_loss": contender.first_loss, "first_step_seconds": contender.first_step_s,
            "held_bytes": contender.held_bytes, "peak_bytes": contender.peak_bytes,
        }  # fmt: skip
    return summary


def best(rounds: list[dict[str, float]]) -> dict:
    """Ours in its better form by the fastest of the others, each in its own better form."""
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ours, theirs = (max((n for n in median if n.startswith("tally") == is_ours), key=median.get) for is_ours in (True, False))
    return {"ours": ours, "fastest_other": theirs} | in_rounds(rounds, ours, theirs)


def setting(device: str, keeps_memory: bool) -> dict:
    """What else the speed of a step depends on."""
    return {
        "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "keeps_memory": keeps_memory, "environment": {key: os.environ[key] for key in MALLOC if key in os.environ},
    }  # fmt: skip


def print_table(report: dict, contenders: dict[str, Contender]) -> None:
    print(f"{'':22} {'tok/s':>9} {'slowest':>9} {'fastest':>9}  ratio to nanogpt of the mode  of product  first step  memory     MFU    PaLM")
    for name, s in report["summary"].items():
        speeds = " ".join(f"{s[key]:9,.0f}" for key in ("tokens_per_second", "slowest", "fastest"))
        mfu = " ".join(f"{s[key]:7.1%}" if s[key] else f"{'-':>7}" for key in ("mfu", "palm_mfu"))
        ratio = f"{s['ratio']:.3f} ({s['ratio_low']:.3f} to {s['ratio_high']:.3f})"
        print(f"{name:22} {speeds}  {ratio:28} {s['of_product']:10.0%} {s['first_step_seconds']:9.1f} s {contenders[name].memory} {mfu}")
    b = report["best"]
    print(f"{b['ours']} by {b['fastest_other']}, the fastest of the others: {b['ratio']:.3f} ({b['ratio_low']:.3f} to {b['ratio_high']:.3f})")


if __name__ == "__main__":
    cli.run(main)
