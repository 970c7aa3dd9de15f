"""How fast is our training step against others of the same dimensions, dtype and batch?

  python benchmarks/step.py --config configs/toy.yaml
  python benchmarks/step.py --config configs/gpt-1b.yaml --device cuda --out build/step.json train.batch_size=16
  python benchmarks/step.py --config configs/toy.yaml --against hf,litgpt,fsdp2 --only eager

A minimal nanoGPT-style loop is always among them; the others are Hugging Face's and litgpt's models in the same loop, and that loop's
model under FSDP2. Those that are not installed are left out.

All contenders live in one process and take turns, a few steps each, round after round, so that a busy machine slows all of them. The
ratio is the median over rounds of ours by theirs in the same round. Data are random ids, the same for all; reading shards is left out.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import NEEDS, others
from machine import in_rounds, machine, write_json
from nanogpt_loop import Loop

from llm import cli
from llm.config import RunConfig, batch_plan, check_config, load_config
from llm.data.stream import Batch
from llm.dist import World
from llm.engine import build_engine
from llm.engine.process import keep_freed_memory
from llm.log import log
from llm.model.flops import count_params, flops_per_token, peak_flops
from llm.model.init import build_model

TOKENIZER_VOCAB = 4100  # the quick start's, where the config leaves it to the tokenizer
ALONE = World()
MALLOC = ("LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "OMP_NUM_THREADS")


def main() -> None:
    args = arguments()
    cfg = load_config(args.config, args.overrides, preset=args.model)
    cfg = changed(cfg, model={"vocab_size": cfg.model.with_vocab(TOKENIZER_VOCAB).vocab_size}, engine={"zero_stage": 0})
    torch.set_flush_denormal(True)
    if args.keep_memory and args.device == "cpu":
        keep_freed_memory()  # for all contenders
    contenders = build_contenders(cfg, args.device, args.only, others(args.against))
    plan = batch_plan(cfg, 1)
    size = f"{count_params(cfg.model):,} parameters"
    log.info(f"{cfg.model.model_name}: {size}, {cfg.engine.precision}, {plan}, {torch.get_num_threads()} threads")
    first_losses = {name: warm_up(step, cfg, args.warm_up) for name, step in contenders.items()}
    clock = time.process_time if args.cpu_time else time.perf_counter
    rounds = [take_turns(contenders, cfg, args.steps, r, args.device, clock) for r in range(args.rounds)]
    report = {
        "model": cfg.model.model_dump(), "precision": cfg.engine.precision, "tokens_per_step": plan.tokens, "micro_rows": plan.micro_rows,
        "first_losses": first_losses, "rounds_tokens_per_second": rounds, "summary": summarise(rounds, cfg, args.device),
        "best": best(rounds),
        "machine": machine(["torch", "numpy"]) | setting(args.device, args.keep_memory),
    }  # fmt: skip
    print_table(report)
    write_json(report, args.out)


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps in a turn (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each before the first turn (%(default)s)")
    parser.add_argument("--only", choices=("eager", "compiled"), help="leave the other pair out")
    parser.add_argument("--against", type=lambda text: text.split(","), default=[], metavar="NAMES", help=f"more contenders: {','.join(NEEDS)}")
    parser.add_argument("--cpu-time", action="store_true", help="tokens per second of CPU time: on a CPU that others use too, with one thread")
    parser.add_argument("--no-keep-memory", dest="keep_memory", action="store_false", help="CPU: give freed memory back, as glibc does by itself")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    if unknown := [name for name in args.against if name not in NEEDS]:
        parser.error(f"there is no contender {unknown[0]}")
    return args


def changed(cfg: RunConfig, **sections: dict) -> RunConfig:
    tree = cfg.model_dump()
    for name, fields in sections.items():
        tree[name] |= fields
    return check_config(tree, "benchmark")


def build_contenders(cfg: RunConfig, device: str, only: str | None, rest: dict[str, Callable]) -> dict[str, Callable]:
    """Name -> a function that makes one optimizer step on a list of (tokens, targets) and returns its loss."""
    contenders = {}
    for mode in [only] if only else ["eager", "compiled"]:
        torch.manual_seed(cfg.train.seed)
        loop = Loop(cfg, device, compiled=mode == "compiled")
        assert sum(p.numel() for p in loop.model.parameters()) == count_params(cfg.model)
        contenders[f"nanogpt {mode}"] = loop.step
        for name, build in rest.items():
            contenders[f"{name} {mode}"] = build(cfg, device, mode == "compiled")
        contenders[f"tally {mode}"] = tally_step(changed(cfg, engine={"compile": mode == "compiled"}), World(device=device))
    return contenders


def tally_step(cfg: RunConfig, world: World) -> Callable:
    engine = build_engine(cfg, world, build_model(cfg.model, cfg.train.seed))

    def step(batches) -> float:
        micro_batches = [Batch(x, y, None, None) for x, y in batches]
        n_targets = world.size * sum(y.numel() for _, y in batches)
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


def warm_up(step: Callable, cfg: RunConfig, n: int) -> float:
    """Steps that compile and fill allocators; returns the loss of the first, which must be near ln V for all."""
    return float([step(draw(cfg, seed)) for seed in range(n)][0])


def take_turns(contenders: dict[str, Callable], cfg: RunConfig, n: int, turn: int, device: str, clock: Callable) -> dict[str, float]:
    """Tokens per second of each; the order turns with the rounds."""
    names = list(contenders)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    batches = [draw(cfg, 1000 * turn + i) for i in range(n)]
    speeds = {}
    for name in names:
        synchronize(device)
        started_at = clock()
        for batch in batches:
            contenders[name](batch)
        synchronize(device)
        speeds[name] = n * batch_plan(cfg, 1).tokens / (clock() - started_at)
    return speeds


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summarise(rounds: list[dict[str, float]], cfg: RunConfig, device: str) -> dict[str, dict]:
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None
    summary = {}
    for name in sorted(rounds[0]):
        speeds, found = [r[name] for r in rounds], in_rounds(rounds, name, f"nanogpt {name.split()[1]}")
        mfu = found["tokens_per_second"] * flops_per_token(cfg.model) / peak if peak else None
        summary[name] = found | {"slowest": min(speeds), "fastest": max(speeds), "mfu": mfu}
    return summary


def best(rounds: list[dict[str, float]]) -> dict:
    """Ours in its better form by the fastest of the others, each in its own better form."""
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ours, theirs = (max((n for n in median if n.startswith("tally ") == is_ours), key=median.get) for is_ours in (True, False))
    return {"ours": ours, "fastest_other": theirs} | in_rounds(rounds, ours, theirs)


def setting(device: str, keeps_memory: bool) -> dict:
    """What else the speed of a step depends on."""
    return {
        "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "keeps_memory": keeps_memory, "environment": {key: os.environ[key] for key in MALLOC if key in os.environ},
    }  # fmt: skip


def print_table(report: dict) -> None:
    print(f"{'':20} {'tok/s':>10} {'slowest':>10} {'fastest':>10}   ratio to nanogpt of the same mode")
    for name, s in report["summary"].items():
        speeds = " ".join(f"{s[key]:10,.0f}" for key in ("tokens_per_second", "slowest", "fastest"))
        mfu = f"   MFU {s['mfu']:.1%}" if s["mfu"] else ""
        print(f"{name:20} {speeds}   {s['ratio']:.3f} ({s['ratio_low']:.3f} to {s['ratio_high']:.3f}){mfu}")
    b = report["best"]
    print(f"{b['ours']} by {b['fastest_other']}, the fastest of the others: {b['ratio']:.3f} ({b['ratio_low']:.3f} to {b['ratio_high']:.3f})")


if __name__ == "__main__":
    cli.run(main)
