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
from step import changed, setting, take_turns, warm

from llm import cli
from llm.batch_plan import batch_plan
from llm.config import RunConfig, load_config
from llm.data.stream import Batch
from llm.dist import World
from llm.engine import build_engine
from llm.engine.attention_kernel import training_kernels
from llm.engine.precision import resolve_precision
from llm.engine.process import keep_freed_memory
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
    cfg = resolve_precision(cfg, World(device=args.device))
    torch.set_flush_denormal(True)
    if args.device == "cpu":
        keep_freed_memory()
    contenders = {name: warm(name, build, cfg, args.device, 2) for name, build in forms(cfg, args.device).items()}
    clock = time.process_time if args.cpu_time else time.perf_counter
    rounds = [take_turns(contenders, cfg, args.steps, turn, args.device, clock) for turn in range(args.rounds)]
    summary = {}
    for name, contender in contenders.items():
        s = summary[name] = in_rounds(rounds, name, WHOLE)
        print(f"{name:32} {s['tokens_per_second']:10,.0f} tok/s   {s['ratio']:.3f} ({s['ratio_low']:.3f} to {s['ratio_high']:.3f}){contender.memory}")
    report = {"config": cfg.model_dump(mode="json"), "batch": str(batch_plan(cfg, 1)), "rounds_tokens_per_second": rounds, "summary": summary}
    write_json(report | {"machine": machine(["torch"]) | setting(args.device, True)}, args.out)


def forms(cfg: RunConfig, device: str) -> dict[str, Callable]:
    """Name -> a function of (config, device) that builds an engine and gives its step."""

    def less(*, head: type[Head] = Head, fused: bool = True, onednn: bool = products.ONEDNN, cudnn: bool = True, **sections: dict) -> Callable:
        return lambda cfg, device: stepper(changed(cfg, **sections), device, head, fused, onednn, cudnn)

    other = "sdpa" if cfg.model.attention == "eager" else "eager"
    found = {
        WHOLE: less(),
        "without compile": less(engine={"compile": False}),
        f"attention: {other}": less(model={"attention": other}),
        "logits of all rows at once": less(head=WholeLogits),
        "AdamW one tensor at a time": less(fused=False),
        "half of the blocks recomputed": less(engine={"activation_checkpointing": 0.5}),
        "all blocks recomputed": less(engine={"activation_checkpointing": True}),
    }
    if products.ONEDNN and cfg.engine.precision == "fp32" and device == "cpu":
        found["products by MKL"] = less(onednn=False)
    if device.startswith("cuda") and cfg.model.attention == "sdpa":
        found["attention without cuDNN"] = less(cudnn=False)
    return found


class WholeLogits(Head):
    """torch's cross-entropy over the logits of all rows, as most scripts have it."""

    def forward(self, x, targets_BT=None, z_loss=0.0):
        return F.cross_entropy(super().forward(x).flatten(0, 1).float(), targets_BT.flatten(), reduction="sum", ignore_index=-100)


def stepper(cfg: RunConfig, device: str, head: type[Head], fused: bool, onednn: bool, cudnn: bool) -> Callable:
    model = build_model(cfg.model, cfg.train.seed)
    model.head.__class__ = head
    if head is WholeLogits and cfg.engine.compile:
        model.head.forward = torch.compile(model.head.forward, fullgraph=True, dynamic=False)
    engine = build_engine(cfg, World(device=device), model)
    for group in engine.optimizer.param_groups:
        group.update(fused=fused, foreach=False)

    def step(batches) -> float:
        with mock.patch.object(products, "ONEDNN", onednn), training_kernels(cfg.model, not cudnn):
            n_targets = sum(y.numel() for _, y in batches)
            return engine.train_step([Batch(x, y, None, None) for x, y in batches], n_targets, cfg.train.lr, lambda _: True).loss

    return step


if __name__ == "__main__":
    cli.run(main)
