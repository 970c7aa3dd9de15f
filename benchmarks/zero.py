"""What do ZeRO's stages cost against DDP on the same ranks?

  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/zero.py --config configs/toy.yaml --seconds 240 --out build/zero.json

DDP and the stages live side by side in the same processes and take turns, some steps each, round after round. The ratio is the median
over rounds of a stage by DDP in the same round. It ends after --rounds, or before the round that would go beyond --seconds.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import in_rounds, machine, write_json
from step import changed, draw, tally_step

from llm import cli
from llm.batch_plan import batch_plan
from llm.config import RunConfig, load_config
from llm.dist import World, joined, pick_device
from llm.engine.precision import resolve_precision
from llm.engine.process import settled
from llm.log import log

TOKENIZER_VOCAB = 4100  # the quick start's, where the config leaves it to the tokenizer


def main() -> None:
    args = arguments()
    with joined() as world:
        world = world.on(pick_device(args.device, world))
        cfg = load_config(args.config, args.overrides, preset=args.model)
        cfg = changed(cfg, model={"vocab_size": cfg.model.with_vocab(TOKENIZER_VOCAB).vocab_size})
        cfg = resolve_precision(cfg, world)
        with settled(world.device, keep_memory=True):
            report = measure(cfg, world, args)
        if world.rank == 0:
            for name, s in report["summary"].items():
                print(f"{name:8} {s['tokens_per_second']:10,.0f} tokens/s   {s['ratio']:.3f} of DDP ({s['ratio_low']:.3f} to {s['ratio_high']:.3f})")
            write_json(report, args.out)


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each stage (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps in a turn (%(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no round that would end later, building included (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    return parser.parse_args()


def measure(cfg: RunConfig, world: World, args: argparse.Namespace) -> dict:
    began, plan = time.monotonic(), batch_plan(cfg, world.size)
    stages = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
    contenders = {}
    for name, stage in stages.items():
        contenders[name] = tally_step(changed(cfg, engine={"zero_stage": stage}), world)
        turn(contenders[name], cfg, world, 2, seed=0)
        if world.rank == 0:
            log.info(f"{name} is warm after {time.monotonic() - began:.0f} s")
    rounds, longest_s = [], 0.0
    while world.broadcast(len(rounds) < args.rounds and time.monotonic() - began + longest_s < args.seconds):
        round_began, names = time.monotonic(), list(contenders)
        first = len(rounds) % len(names)
        seconds = {name: turn(contenders[name], cfg, world, args.steps, seed=len(rounds)) for name in names[first:] + names[:first]}
        rounds.append({name: args.steps * plan.tokens / seconds[name] for name in names})
        longest_s = max(longest_s, time.monotonic() - round_began)
    assert rounds, f"--seconds {args.seconds:g} were over before the first round"
    return {
        "model": cfg.model.model_dump(), "precision": cfg.engine.precision, "batch": str(plan), "rounds_tokens_per_second": rounds,
        "summary": {name: in_rounds(rounds, name, "DDP") for name in stages}, "machine": machine(["torch", "deepspeed"]),
        "threads": torch.get_num_threads(), "device": world.device,
    }  # fmt: skip


def turn(step: Callable, cfg: RunConfig, world: World, n: int, seed: int) -> float:
    """Seconds for `n` steps, from the moment that all ranks begin until all have ended."""
    batches = [draw(cfg, 1000 * seed + i, world) for i in range(n)]
    world.barrier()
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    world.barrier()  # a step has waited for the device by itself: it reads the loss
    return time.perf_counter() - began


if __name__ == "__main__":
    cli.run(main)
