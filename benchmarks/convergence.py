"""Does our training reach the loss that a minimal nanoGPT-style loop reaches on the same data in the same order?

  OMP_NUM_THREADS=1 python benchmarks/convergence.py --config configs/gpt2-124m.yaml --out build/convergence.json
      model_name=gpt2-10m n_layers=6 d_model=320 n_heads=5 d_ff=1280 seq_len=128 attention=eager train.batch_size=8 batch_tokens=1024
      total_step_budget=600 warmup_steps=5% lr=1e-3 compile=false tokenizer_type=bpe tokenizer_path=TOKENIZER data_path=SHARDS   (one line)

Each seed is trained by both, in turns: own weights at the start, the same batches, learning rates, decay and clipping. What is compared
is the mean over seeds of the validation loss at the end, with the spread of the seeds as the measure of noise.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine, write_json
from nanogpt_loop import Loop
from step import changed

from llm import cli
from llm.batch_plan import batch_plan
from llm.config import RunConfig, load_config
from llm.data.phase import Phase
from llm.data.sampler import Sampler
from llm.data.stream import Batch, count_targets, eval_batches, micro_batches
from llm.dist import World
from llm.engine import build_engine, process
from llm.engine.optimizer import set_lr
from llm.engine.precision import resolve_precision
from llm.log import log
from llm.model.flops import count_params
from llm.model.init import build_model
from llm.tokenizer import load_tokenizer
from llm.train.datasets import open_shards, pool
from llm.train.schedule import Horizon, lr_at


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 3], help="(1,2,3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON, after each run")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides, preset=args.model)
    tokenizer = load_tokenizer(cfg.tokenizer.tokenizer_path, cfg.tokenizer.tokenizer_type)
    cfg = changed(cfg, model={"vocab_size": cfg.model.with_vocab(tokenizer.vocab_size).vocab_size}, engine={"zero_stage": 0})
    cfg = resolve_precision(cfg, World())
    train_shards, val_shards = open_shards(cfg, tokenizer, World())
    phase = Phase.plan("p0", cfg.train.seed, cfg.train.epochs, cfg.model.seq_len, pool(train_shards))
    sampler, rows = Sampler(phase, pool(train_shards)), batch_plan(cfg, 1).global_rows
    held_out = list(eval_batches(val_shards, cfg.model.seq_len, cfg.train.batch_size, 0, 1, cfg.train.eval_rows))
    steps = cfg.train.total_step_budget
    log.info(f"{count_params(cfg.model):,} parameters, {steps} steps of {rows} rows, {phase.total:,} rows there are")
    assert steps * rows <= phase.total, "too little text for so many steps"
    losses = {"tally": [], "nanogpt": []}
    with process.settled("cpu", keep_memory=True):
        for seed in args.seeds:
            for name, build in (("nanogpt", nanogpt), ("tally", tally)):
                began = time.process_time()
                losses[name].append(train(*build(cfg, seed), cfg, sampler, rows, held_out))
                log.info(f"seed {seed}, {name}: validation loss {losses[name][-1]:.4f}, {time.process_time() - began:.0f} s of CPU")
                summary = {key: spread(found) for key, found in losses.items() if found}
                report = {"config": cfg.model_dump(mode="json"), "losses": losses, "summary": summary, "machine": machine(["torch"])}
                write_json(report, args.out)
    for name, found in losses.items():
        print(f"{name:8} {'  '.join(f'{loss:.4f}' for loss in found)}   mean {spread(found)['mean']:.4f}, deviation {spread(found)['deviation']:.4f}")


def spread(found: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(found), "deviation": statistics.stdev(found) if len(found) > 1 else math.nan}


def tally(cfg: RunConfig, seed: int) -> tuple[Callable, Callable]:
    """(step(batches, lr), summed loss of a batch)."""
    engine = build_engine(cfg, World(), build_model(cfg.model, seed))
    return lambda batches, lr: engine.train_step(batches, count_targets(batches), lr, math.isfinite), lambda batch: engine.evaluate(batch)[0]


def nanogpt(cfg: RunConfig, seed: int) -> tuple[Callable, Callable]:
    torch.manual_seed(seed)
    loop = Loop(cfg, "cpu", compiled=False)

    def step(batches: list[Batch], lr: float) -> None:
        set_lr(loop.optimizer, lr)
        loop.step([(batch.tokens_BT, batch.targets_BT) for batch in batches])

    @torch.no_grad()
    def evaluate(batch: Batch) -> float:
        with loop.autocast:
            return loop.model(batch.tokens_BT, batch.targets_BT).item() * count_targets([batch])

    return step, evaluate


def train(step: Callable, evaluate: Callable, cfg: RunConfig, sampler: Sampler, rows: int, held_out: list[Batch]) -> float:
    """The mean validation loss after all steps."""
    whole = Horizon(0, cfg.train.total_step_budget, is_whole_run=True)
    for at in range(whole.length):
        step(micro_batches(sampler, at * rows, rows, 0, 1, cfg.train.batch_size), lr_at(cfg.train, whole, at))
    return sum(evaluate(batch) for batch in held_out) / count_targets(held_out)


if __name__ == "__main__":
    cli.run(main)
