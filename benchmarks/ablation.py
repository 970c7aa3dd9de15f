"""What does each part of the fast path bring? One at a time is taken away, and all forms take turns.

  OMP_NUM_THREADS=1 python benchmarks/ablation.py --config configs/toy.yaml --cpu-time train.batch_size=8 batch_tokens=2048
  python benchmarks/ablation.py --config configs/gpt-1b.yaml --device cuda --out build/ablation.json

The first row is the config as it is, compiled; a ratio below 1 says what is lost without the part. Freed memory is kept in all.
"""

import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from machine import in_rounds, machine, write_json
from step import changed, draw, setting, take_turns

from llm import cli
from llm.config import RunConfig, batch_plan, load_config
from llm.data.stream import Batch
from llm.dist import World
from llm.engine import build_engine
from llm.engine.process import keep_freed_memory
from llm.log import log
from llm.model import products
from llm.model.init import build_model
from llm.model.loss import Head

WHOLE = "all of it"


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each form (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps in a turn (%(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: on a machine that others use too, with one thread")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides, preset=args.model)
    cfg = changed(cfg, model={"vocab_size": cfg.model.with_vocab(4100).vocab_size}, engine={"zero_stage": 0, "compile": True})
    torch.set_flush_denormal(True)
    if args.device == "cpu":
        keep_freed_memory()
    steps = {}
    for name, step in forms(cfg, args.device).items():
        for seed in range(2):
            step(draw(cfg, seed))
        steps[name] = step
        log.info(f"{name}: warm")
    clock = time.process_time if args.cpu_time else time.perf_counter
    rounds = [take_turns(steps, cfg, args.steps, turn, args.device, clock) for turn in range(args.rounds)]
    summary = {}
    for name in steps:
        s = summary[name] = in_rounds(rounds, name, WHOLE)
        print(f"{name:32} {s['tokens_per_second']:10,.0f} tok/s   {s['ratio']:.3f} ({s['ratio_low']:.3f} to {s['ratio_high']:.3f})")
    report = {"config": cfg.model_dump(mode="json"), "batch": str(batch_plan(cfg, 1)), "rounds_tokens_per_second": rounds, "summary": summary}
    write_json(report | {"machine": machine(["torch"]) | setting(args.device, True)}, args.out)


def forms(cfg: RunConfig, device: str) -> dict[str, Callable]:
    """Name -> a function that makes a step."""
    other = "sdpa" if cfg.model.attention == "eager" else "eager"
    found = {
        WHOLE: stepper(cfg, device),
        "without compile": stepper(changed(cfg, engine={"compile": False}), device),
        f"attention: {other}": stepper(changed(cfg, model={"attention": other}), device),
        "logits of all rows at once": stepper(cfg, device, head=WholeLogits),
        "AdamW one tensor at a time": stepper(cfg, device, fused=False),
        "with activation checkpointing": stepper(changed(cfg, engine={"activation_checkpointing": True}), device),
    }
    if products.ONEDNN and cfg.engine.precision == "fp32" and device == "cpu":
        found["products by MKL"] = stepper(cfg, device, onednn=False)
    return found


class WholeLogits(Head):
    """torch's cross-entropy over the logits of all rows, as most scripts have it."""

    def forward(self, x, targets_BT=None, z_loss=0.0):
        return F.cross_entropy(super().forward(x).flatten(0, 1).float(), targets_BT.flatten(), reduction="sum", ignore_index=-100)


def stepper(cfg: RunConfig, device: str, head: type[Head] = Head, fused: bool = True, onednn: bool = products.ONEDNN) -> Callable:
    model = build_model(cfg.model, cfg.train.seed)
    model.head.__class__ = head
    if head is WholeLogits and cfg.engine.compile:
        model.head.forward = torch.compile(model.head.forward, fullgraph=True, dynamic=False)
    engine = build_engine(cfg, World(device=device), model)
    for group in engine.optimizer.param_groups:
        group.update(fused=fused, foreach=False)

    def step(batches) -> None:
        with mock.patch.object(products, "ONEDNN", onednn):
            engine.train_step([Batch(x, y, None, None) for x, y in batches], sum(y.numel() for _, y in batches), cfg.train.lr, lambda _: True)

    return step


if __name__ == "__main__":
    cli.run(main)
