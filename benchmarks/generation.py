"""How fast is text written, against transformers' `generate` with the same weights, prompts, dtype and batch?

  python benchmarks/generation.py
  python benchmarks/generation.py --model my-llm --dtypes bf16 --batches 8 --out build/generation.json

Random weights of a config's dimensions are exported as tools/export_hf.py does and loaded by transformers; random prompts, all equally
long; greedy, and no end before --new tokens. In fp32 both must write the same tokens. They live in one process and take turns, so that a
busy machine slows both; the ratio is the median over rounds of ours by theirs in the same round.
"""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from machine import machine, write_json

from llm import cli
from llm.config import ModelConfig, load_config
from llm.engine.precision import DTYPES, measure_rates
from llm.generate.generator import generate_rows
from llm.generate.sampling import Sampling
from llm.log import log
from llm.model.flops import count_params
from llm.model.huggingface import to_config_json
from llm.model.huggingface_weights import write_tensors
from llm.model.init import build_model
from llm.model.packed import pack

SMALL = dict(n_layers=6, d_model=384, n_heads=6, d_ff=1536, vocab_size=32768, seq_len=512, tie_embeddings=True)  # 27M weights


def main() -> None:
    args = arguments()
    cfg = load_config(preset=args.model).model.with_vocab(SMALL["vocab_size"]) if args.model else ModelConfig(**SMALL)
    log.info(f"{count_params(cfg):,} parameters, prompts of {args.prompt} tokens, {args.new} new ones, {torch.get_num_threads()} threads")
    clock = time.process_time if args.cpu_time else time.perf_counter
    report = {"model": cfg.model_dump(), "machine": machine(["torch", "transformers"]), "cases": {}}
    for dtype in (measure_rates("cpu").fastest if name == "auto" else name for name in args.dtypes):
        ours, theirs = both(cfg, DTYPES[dtype])
        for batch in args.batches:
            prompts = torch.randint(0, cfg.vocab_size, (batch, args.prompt), generator=torch.Generator().manual_seed(batch))
            report["cases"][f"{dtype}, batch {batch}"] = compare(ours, theirs, prompts, args.new, args.rounds, clock, dtype == "fp32")
    for name, case in report["cases"].items():
        rates = ", ".join(f"{who} {rate:,.0f} tokens/s" for who, rate in case["tokens_per_s"].items())
        log.info(f"{name}: {rates}; ratio {case['ratio']:.2f} ({case['smallest']:.2f} to {case['largest']:.2f})")
    write_json(report, args.out)


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("--model", metavar="NAME", help="the dimensions of this preset (6 layers, width 384, vocabulary 32,768)")
    parser.add_argument("--dtypes", nargs="+", choices=("auto", *DTYPES), default=list(DTYPES), help="auto: the faster one here")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=128, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="by CPU time: on a machine that others use too, with one thread")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    return parser.parse_args()


def both(cfg: ModelConfig, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Functions (prompts_BT, number of new tokens) -> the new tokens of each row, by us and by transformers."""
    model = build_model(cfg, 1).eval()
    weights = dict(model.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        their_config = to_config_json(cfg)
        Path(folder, "config.json").write_text(json.dumps(their_config))
        list(write_tensors(Path(folder), cfg, their_config["model_type"], lambda name: weights[name].detach(), dtype, 10**10))
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for weight in weights.values():
        weight.data = weight.data.to(dtype)
    pack(model)
    endless = SimpleNamespace(vocab_size=cfg.vocab_size, eos_id=-1)

    def write(prompts_BT: torch.Tensor, n: int) -> list[list[int]]:
        rows = [[] for _ in prompts_BT]
        for row, token in generate_rows(model, endless, prompts_BT.tolist(), max_tokens=n, sampling=Sampling(temperature=0), seed=0):
            rows[row].append(token)
        return rows

    def write_theirs(prompts_BT: torch.Tensor, n: int) -> list[list[int]]:
        how = dict(max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
        return theirs.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), **how)[:, prompts_BT.shape[1] :].tolist()

    return write, write_theirs


def compare(ours: Callable, theirs: Callable, prompts_BT: torch.Tensor, n: int, rounds: int, clock: Callable, must_agree: bool) -> dict:
    found = ours(prompts_BT, n), theirs(prompts_BT, n)  # and warms both up
    assert not must_agree or found[0] == found[1], "other tokens"
    seconds = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for name, write in (("ours", ours), ("transformers", theirs)):
            began = clock()
            write(prompts_BT, n)
            seconds[name].append(clock() - began)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    rates = {name: prompts_BT.shape[0] * n / statistics.median(each) for name, each in seconds.items()}
    return {"tokens_per_s": rates, "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios), "seconds": seconds}


if __name__ == "__main__":
    cli.run(main)
