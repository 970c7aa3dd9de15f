"""The planner's model of many GPUs against published rows. Nothing is measured here: it is arithmetic, and says how far it is off.

  python benchmarks/scaling.py
  python benchmarks/scaling.py --out build/scaling.json

First table: tokens/s that follow from a published MFU, which checks the count of FLOPs. Second: the speed of a series of runs that differ in
the number of GPUs only; the model's rate of computing is set so that it meets the first row of each series, and the rest is predicted. The
waiting for the slowest rank (jitter) was fitted to the series marked `fit`. Nobody publishes the share of communication: what is checked of
it is what GPUs lose as there are more of them.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import machine, write_json

from llm import cli
from llm.config import ModelConfig
from llm.model.flops import count_params, flops_per_token, palm_flops_per_token
from llm.plan.hardware import find_device
from llm.plan.scaling import Cluster, StepTime, step_time

MOSAIC = "mosaicml/llm-foundry scripts/train/benchmarking/README.md"


def mpt(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_ff=4 * d_model, vocab_size=50368, seq_len=2048, mlp="gelu", norm="layernorm",
        positions="learned", tie_embeddings=True,
    )  # fmt: skip


def llama(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, vocab_size: int, seq_len: int, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=d_ff, vocab_size=vocab_size, seq_len=seq_len,
        tie_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "MPT 760M": mpt(24, 1536, 12),
    "MPT 1.3B": mpt(24, 2048, 16),
    "MPT 2.7B": mpt(32, 2560, 20),
    "MPT 13B": mpt(40, 5120, 40),
    "TinyLlama 1.1B": llama(22, 2048, 32, 4, 5632, 32000, 2048),
    "Llama 3.2 1B": llama(16, 2048, 32, 8, 8192, 128256, 4096, tied=True),
    "Llama 3 8B": llama(32, 4096, 32, 8, 14336, 128256, 8192),
    "GPT-2 1.56B": ModelConfig(n_layers=48, d_model=1600, n_heads=25, d_ff=6400, vocab_size=50304, seq_len=1024, norm="layernorm",
                               positions="learned", mlp="gelu", bias=True, tie_embeddings=True),
}  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """Published: tokens/s of one GPU and MFU in percent."""

    model: str
    gpu: str
    gpus: int
    tokens_per_s: float
    mfu: float
    source: str
    is_causal: bool = False


ANCHORS = [
    Anchor("MPT 1.3B", "h100", 8, 45_455, 41.82, MOSAIC),
    Anchor("MPT 1.3B", "h100", 64, 44_402, 40.85, MOSAIC),
    Anchor("MPT 1.3B", "h100", 512, 39_837, 36.65, MOSAIC),
    Anchor("MPT 1.3B", "a100", 8, 20_513, 59.86, MOSAIC),
    Anchor("TinyLlama 1.1B", "a100", 16, 24_000, 56, "TinyLlama README, arXiv 2401.02385"),
    Anchor("Llama 3.2 1B", "h100", 8, 42_000, 38, "nanotron, in marin-community/marin#1826"),
    Anchor("GPT-2 1.56B", "h100", 8, 46_811, 46, "llm.c scripts/run_gpt2_1558M.sh", is_causal=True),
    Anchor("Llama 3 8B", "h100", 8, 5_762, 33.7, "torchtitan benchmarks/llama3_h100_202412"),
]


@dataclass(frozen=True)
class Series:
    """Runs with the same rows a micro-batch and micro-batches a step: (GPUs, tokens/s of one GPU). All shard as ZeRO-3 does, in bf16."""

    model: str
    gpu: str
    rows: int
    accumulation: int
    published: tuple[tuple[int, float], ...]
    is_fit: bool = False


SERIES = [
    Series("MPT 1.3B", "h100", 20, 1, ((16, 46_037), (32, 45_130), (64, 44_402)), is_fit=True),
    Series("MPT 1.3B", "h100", 12, 1, ((128, 44_123), (256, 42_555), (512, 39_837)), is_fit=True),
    Series("MPT 1.3B", "a100", 10, 1, ((64, 19_001), (128, 18_647))),
    Series("MPT 760M", "h100", 24, 1, ((16, 68_551), (32, 67_971))),
    Series("MPT 760M", "a100", 12, 1, ((16, 29_607), (32, 29_648), (64, 29_344), (128, 28_940))),
    Series("MPT 2.7B", "h100", 6, 3, ((32, 23_021), (64, 22_525))),
    Series("MPT 13B", "h100", 2, 1, ((8, 4_792), (16, 4_767), (32, 4_811), (64, 4_800))),
]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args: argparse.Namespace = parser.parse_args()
    speeds = [check_anchor(anchor) for anchor in ANCHORS]
    scalings = [row for series in SERIES for row in check_series(series)]
    print(f"{'tokens/s a GPU at the published MFU':38} {'published':>10} {'model':>10} {'difference':>11}")
    for row in speeds:
        print(f"{row['what']:38} {row['published']:10,.0f} {row['predicted']:10,.0f} {row['difference']:+10.1%}")
    head = f"{'published':>10} {'model':>10} {'difference':>11} {'no jitter':>11} {'comm.':>7} {'s/step':>7}"
    print(f"\n{'tokens/s a GPU as GPUs are added':41} {head}")
    for row in scalings:
        figures = f"{row['published']:10,.0f} {row['predicted']:10,.0f} {row['difference']:+10.1%} {row['difference_without_jitter']:+11.1%}"
        print(f"{row['what']:41} {figures} {row['communication_share']:7.1%} {row['step_seconds']:7.3f}")
    write_json({"is_a_model": True, "speeds": speeds, "scaling": scalings, "machine": machine([])}, args.out)


def check_anchor(anchor: Anchor) -> dict:
    """Tokens/s that follow from the published MFU."""
    model = MODELS[anchor.model]
    flops = flops_per_token(model) if anchor.is_causal else palm_flops_per_token(model)
    predicted = anchor.mfu / 100 * find_device(anchor.gpu).flops / flops
    return _row(f"{anchor.model}, {anchor.gpus} {anchor.gpu}", anchor.tokens_per_s, predicted) | asdict(anchor)


def check_series(series: Series) -> list[dict]:
    """Predicted speed at each number of GPUs; the first row sets the rate of computing, so it is met by construction."""
    tokens = series.rows * series.accumulation * MODELS[series.model].seq_len
    rows, mfu = [], fitted_mfu(series)
    base_jitter = predict(series, series.published[0][0], mfu).jitter
    for gpus, published in series.published:
        step = predict(series, gpus, mfu)
        mark = "fit, " if series.is_fit else ""
        start = ", start" if gpus == series.published[0][0] else ""
        row = _row(f"{series.model}, {gpus} {series.gpu} ({mark}{series.rows} x {series.accumulation}{start})", published, tokens / step.total)
        without = tokens / (step.total - step.jitter + base_jitter)
        shares = {"communication_share": step.communication_share, "step_seconds": step.total, "difference_without_jitter": without / published - 1}
        rows.append(row | shares | {"gpus": gpus, "mfu": mfu, "is_fit": series.is_fit, "is_start": bool(start)})
    return rows


def fitted_mfu(series: Series) -> float:
    """The part of the peak at which the model meets the first published row, by halving: more MFU is always faster."""
    gpus, published = series.published[0]
    wanted = series.rows * series.accumulation * MODELS[series.model].seq_len / published
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if predict(series, gpus, middle).total > wanted else (low, middle)
    return high


def predict(series: Series, gpus: int, mfu: float) -> StepTime:
    model = MODELS[series.model]
    flops = series.rows * model.seq_len * flops_per_token(model)
    cluster = Cluster(find_device(series.gpu), gpus)
    return step_time(3, count_params(model), flops, series.accumulation, mfu, cluster, weight_bytes=2, gradient_bytes=2)


def _row(what: str, published: float, predicted: float) -> dict:
    return {"what": what, "published": published, "predicted": predicted, "difference": predicted / published - 1}


if __name__ == "__main__":
    cli.run(main)
